"""TRL's DPOTrainer with our tokens and reference: the same loss and gradient as the native engine."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig

from align.dpo.collate import PreferenceCollator, PreferenceRows
from align.dpo.objective import Objective
from align.dpo.reference import reference_logps
from align.dpo.scoring import score
from align.dpo.trl_engine import MeasuredDPOTrainer, start_tick, trl_dpo_trainer
from align.dpo.trl_losses import SAME, trl_loss
from align.preference.losses.catalogue import find_loss, losses
from align.preference.rows.dataset import PreferenceGroups
from align.preference.rows.prepare import prepare_preferences
from align.preference.settings import PreferenceSettings
from align.preference.trl_engine import refuse_lists
from finetune.data.tokens import Encoder
from finetune.recipe.errors import UserError
from finetune.training.head import output_head
from finetune.training.stops import NotFiniteError

WORDS = ("the", "numbers", "Add", "Response", "Input", "Instruction", "that", "request")
ROWS = [
    {
        "prompt": f"Add {WORDS[i]}.",
        "chosen": " ".join(WORDS[: 2 + i % 4]),
        "rejected": " ".join(WORDS[i % 5 :]),
    }
    for i in range(7)
]


def groups_of(base: Path, rows: list[dict[str, Any]]) -> PreferenceGroups:
    encoder = Encoder(AutoTokenizer.from_pretrained(base), "plain")
    data = PreferenceSettings(source=rows, template="plain", cache=False)
    return prepare_preferences(data, encoder, max_length=64, seed=0).train


@pytest.fixture
def groups(base_folder: Path) -> PreferenceGroups:
    return groups_of(base_folder, ROWS)


def trainer_of(base: Path, out: Path, groups: PreferenceGroups, name: str = "dpo") -> MeasuredDPOTrainer:
    """Return the TRL engine's trainer, on a LoRA whose B is not zero."""
    torch.manual_seed(0)
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora)
    settings = settings_of(name)
    args = DPOConfig(
        output_dir=str(out),
        per_device_train_batch_size=4,
        precompute_ref_log_probs=True,
        max_length=None,
        use_cpu=True,
        bf16=False,
        report_to="none",
        **trl_loss(name, settings),
    )
    loss = partial(losses()[name].function(), **settings)
    tokenizer = AutoTokenizer.from_pretrained(base)
    return trl_dpo_trainer(model, args, tokenizer, train=groups, held_out=groups, loss=loss)


def settings_of(name: str) -> dict[str, Any]:
    given = {"over_tokens": "mean"} if name == "ipo" else {}
    return find_loss(name, where="").settings({"beta": 0.3, **given}, where="")


@pytest.mark.parametrize("name", SAME)
def test_loss_and_gradient_are_those_of_the_native_engine(
    base_folder: Path, tmp_path: Path, groups: PreferenceGroups, name: str
) -> None:
    trainer = trainer_of(base_folder, tmp_path, groups, name)
    model = trainer.model
    rows = [trainer.train_dataset[index] for index in range(4)]
    collate = PreferenceCollator(0)
    reference = reference_logps(model, groups, range(7), collate=collate, size=7, done=lambda _: None)
    torch.manual_seed(1)
    for key, weight in model.named_parameters():
        if "lora_B" in key:
            weight.data += 0.05 * torch.randn_like(weight)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    model.eval()

    def slope(loss: Tensor) -> Tensor:
        return torch.cat([part.flatten() for part in torch.autograd.grad(loss, weights)])

    expected = trainer.compute_loss(model, trainer.data_collator(rows))
    expected_slope = slope(expected)
    data = PreferenceRows(groups, reference)
    objective = Objective.of(losses()[name], settings_of(name))
    batch = collate([data[index] for index in range(4)])
    loss = score(model, output_head(model), batch, objective=objective).losses.mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert (slope(loss) - expected_slope).norm() < 1e-4 * expected_slope.norm()
    assert expected_slope.norm() > 1e-4, "the compared gradients are not zero"


def test_every_pair_reaches_trl_with_our_tokens(
    base_folder: Path, tmp_path: Path, groups: PreferenceGroups
) -> None:
    trainer = trainer_of(base_folder, tmp_path, groups)
    seen: set[tuple[tuple[int, ...], tuple[int, ...]]] = set()
    for batch in trainer.get_train_dataloader():
        widths = batch["attention_mask"].sum(1).tolist()
        lines = [tuple(line[:width].tolist()) for line, width in zip(batch["input_ids"], widths, strict=True)]
        half = len(lines) // 2
        seen |= set(zip(lines[:half], lines[half:], strict=True))
    rows = [groups[index] for index in range(len(groups))]
    sides = [[(*row.prompt_ids.tolist(), *ids.tolist()) for ids in row.completion_ids] for row in rows]
    assert seen == {(chosen, rejected) for chosen, rejected in sides}


def test_the_start_is_its_own_reference(base_folder: Path, tmp_path: Path, groups: PreferenceGroups) -> None:
    trainer = trainer_of(base_folder, tmp_path, groups)
    assert list(trainer.model.peft_config) == ["default"]
    tick = start_tick(trainer, "float32")
    assert tick.problem is None and tick.detail.endswith("loss 0.6931, expected 0.6931")
    found = trainer.measure(trainer.eval_dataset)
    assert found["loss"] == pytest.approx(0.693147, abs=1e-5)  # ln 2
    assert found["margin"] == pytest.approx(0.0, abs=1e-5) and found["chosen_drift"] == pytest.approx(
        0, abs=1e-6
    )
    assert found["chosen_logps"] < 0 and found["length_ratio"] == pytest.approx(
        groups.completion_lengths[::2].sum() / groups.completion_lengths[1::2].sum()
    )


def test_steps_are_logged_in_our_words(base_folder: Path, tmp_path: Path, groups: PreferenceGroups) -> None:
    trainer = trainer_of(base_folder, tmp_path, groups)
    trainer.args.logging_steps, trainer.args.max_steps = 1, 2
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert len(lines) == 2 and lines[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert {"margin", "accuracy", "chosen_reward", "rejected_reward"} <= lines[1].keys()


def test_a_loss_that_is_no_number_names_its_pairs(
    base_folder: Path, tmp_path: Path, groups: PreferenceGroups
) -> None:
    trainer = trainer_of(base_folder, tmp_path, groups)
    next(weight for weight in trainer.model.parameters() if weight.requires_grad).data.fill_(float("nan"))
    with pytest.raises(NotFiniteError, match=r"^loss is nan at step 1, on row \d(, row \d){3}$"):
        trainer.train()


@pytest.mark.parametrize("name", sorted(set(losses()) - set(SAME)))
def test_what_trl_has_not_is_refused_with_the_way_out(name: str) -> None:
    with pytest.raises(UserError, match="repair:   train.engine=native"):
        trl_loss(name, losses()[name].defaults)


def test_ipo_summed_over_tokens_is_not_trl_s() -> None:
    with pytest.raises(UserError, match=r"over_tokens: mean.*or train.engine=native"):
        trl_loss("ipo", losses()["ipo"].defaults)


def test_ranked_lists_are_refused_by_the_first_one_s_place(base_folder: Path) -> None:
    lists = [{"prompt": "Add", "responses": ["the", "numbers", "that"], "scores": [3, 2, 1]}]
    groups = groups_of(base_folder, lists)
    with pytest.raises(UserError, match=r"1 prompts with more than two completions \(first: row 1, 3 compl"):
        refuse_lists(groups, where="data.source")

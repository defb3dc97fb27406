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

from align.dpo.collate import PreferenceCollator, PreferenceDataset
from align.dpo.objective import PreferenceObjective
from align.dpo.reference_logps import compute_reference_logps
from align.dpo.settings import TRL_LOSS_TYPES, trl_loss_arguments
from align.dpo.trainer import forward_losses
from align.engines.trl.dpo import TrlDPOTrainer, check_initial_loss
from align.preference.losses.catalog import all_losses, find_loss
from align.preference.rows.dataset import PreferenceGroups
from align.preference.rows.prepare import prepare_preferences
from align.preference.settings import PreferenceSettings
from finetune.data.tokens import Encoder
from finetune.distributed.interrupts import NotFiniteError
from finetune.recipe.errors import UserError
from finetune.training.loss import output_head

WORDS = ("the", "numbers", "Add", "Response", "Input", "Instruction", "that", "request")
ROWS = [
    {
        "prompt": f"Add {WORDS[i]}.",
        "chosen": " ".join(WORDS[: 2 + i % 4]),
        "rejected": " ".join(WORDS[i % 5 :]),
    }
    for i in range(7)
]


def build_groups(base: Path, rows: list[dict[str, Any]]) -> PreferenceGroups:
    encoder = Encoder(AutoTokenizer.from_pretrained(base), "plain")
    data = PreferenceSettings(source=rows, template="plain", cache=False)
    return prepare_preferences(data, encoder, max_length=64, seed=0).train


@pytest.fixture
def groups(base_folder: Path) -> PreferenceGroups:
    return build_groups(base_folder, ROWS)


def build_trainer(base: Path, out: Path, groups: PreferenceGroups, name: str = "dpo") -> TrlDPOTrainer:
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
        **trl_loss_arguments(name, settings),
    )
    loss = partial(all_losses()[name].function(), **settings)
    tokenizer = AutoTokenizer.from_pretrained(base)
    return TrlDPOTrainer(model, args, tokenizer, train=groups, held_out=groups, loss=loss)


def settings_of(name: str) -> dict[str, Any]:
    given = {"length_normalized": True} if name == "ipo" else {}
    return find_loss(name, where="").settings({"beta": 0.3, **given}, where="")


@pytest.mark.parametrize("name", TRL_LOSS_TYPES)
def test_loss_and_gradient_match_the_native_engine(
    base_folder: Path, tmp_path: Path, groups: PreferenceGroups, name: str
) -> None:
    trainer = build_trainer(base_folder, tmp_path, groups, name)
    model = trainer.model
    rows = [trainer.train_dataset[index] for index in range(4)]
    collate = PreferenceCollator(0)
    reference = compute_reference_logps(
        model, groups, range(7), collate=collate, batch_size=7, on_progress=lambda _: None
    )
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
    data = PreferenceDataset(groups, reference)
    objective = PreferenceObjective.from_loss(all_losses()[name], settings_of(name))
    batch = collate([data[index] for index in range(4)])
    loss = forward_losses(model, output_head(model), batch, objective=objective).losses.mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert (slope(loss) - expected_slope).norm() < 1e-4 * expected_slope.norm()
    assert expected_slope.norm() > 1e-4, "the compared gradients are not zero"


def test_every_pair_reaches_trl_with_our_tokens(
    base_folder: Path, tmp_path: Path, groups: PreferenceGroups
) -> None:
    trainer = build_trainer(base_folder, tmp_path, groups)
    seen: set[tuple[tuple[int, ...], tuple[int, ...]]] = set()
    for batch in trainer.get_train_dataloader():
        widths = batch["attention_mask"].sum(1).tolist()
        token_rows = [
            tuple(row_ids[:width].tolist()) for row_ids, width in zip(batch["input_ids"], widths, strict=True)
        ]
        half = len(token_rows) // 2
        seen |= set(zip(token_rows[:half], token_rows[half:], strict=True))
    rows = [groups[index] for index in range(len(groups))]
    sides = [[(*row.prompt_ids.tolist(), *ids.tolist()) for ids in row.completion_ids] for row in rows]
    assert seen == {(chosen, rejected) for chosen, rejected in sides}


def test_initial_policy_equals_reference(base_folder: Path, tmp_path: Path, groups: PreferenceGroups) -> None:
    trainer = build_trainer(base_folder, tmp_path, groups)
    assert list(trainer.model.peft_config) == ["default"]
    result = check_initial_loss(trainer, "float32")
    assert result.problem is None and result.detail.endswith("loss 0.6931, expected 0.6931")
    metrics = trainer.held_out_metrics()
    assert metrics["loss"] == pytest.approx(0.693147, abs=1e-5)  # ln 2
    assert metrics["rewards/margins"] == pytest.approx(0.0, abs=1e-5) and metrics[
        "logratios/chosen"
    ] == pytest.approx(0, abs=1e-6)
    assert metrics["logps/chosen"] < 0 and metrics["data/length_ratio"] == pytest.approx(
        groups.completion_lengths[::2].sum() / groups.completion_lengths[1::2].sum()
    )


def test_steps_are_logged_with_our_metric_names(
    base_folder: Path, tmp_path: Path, groups: PreferenceGroups
) -> None:
    trainer = build_trainer(base_folder, tmp_path, groups)
    trainer.args.logging_steps, trainer.args.max_steps = 1, 2
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == 2 and entries[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert {"rewards/margins", "rewards/accuracies", "rewards/chosen", "rewards/rejected"} <= entries[
        1
    ].keys()


def test_non_finite_loss_names_its_pairs(base_folder: Path, tmp_path: Path, groups: PreferenceGroups) -> None:
    trainer = build_trainer(base_folder, tmp_path, groups)
    next(weight for weight in trainer.model.parameters() if weight.requires_grad).data.fill_(float("nan"))
    with pytest.raises(NotFiniteError, match=r"^loss is nan at step 1, on row \d(, row \d){3}$"):
        trainer.train()


@pytest.mark.parametrize("name", sorted(set(all_losses()) - set(TRL_LOSS_TYPES)))
def test_losses_missing_in_trl_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="repair:   train.engine=native"):
        trl_loss_arguments(name, all_losses()[name].defaults)


def test_summed_ipo_is_refused() -> None:
    with pytest.raises(UserError, match=r"length_normalized: true.*or train.engine=native"):
        trl_loss_arguments("ipo", all_losses()["ipo"].defaults)

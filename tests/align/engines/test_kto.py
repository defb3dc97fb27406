"""KTO: its loss by hand and against TRL's trainer, and the mismatched completions of its KL estimate."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from small_preferences import prepared
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import KTOConfig

from align.engines.trl.kto import (
    TrlKTOTrainer,
    check_initial_loss,
    to_label_dataset,
    training_order,
)
from align.preference.losses.unpaired import kto, mismatched_rows, reference_point
from align.preference.rows.dataset import PreferenceGroups
from finetune.distributed.interrupts import NotFiniteError

SETTINGS = {"beta": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.5}
WORDS = ("the", "numbers", "Add", "Response", "Input", "Instruction", "that", "request")


def rows(count: int = 10) -> list[dict[str, Any]]:
    """Return alternating good and bad completions, two per prompt."""
    return [
        {
            "prompt": f"Add {WORDS[index // 2]}.",
            "completion": " ".join(WORDS[: 2 + index % 5]),
            "label": index % 2 == 0,
        }
        for index in range(count)
    ]


@pytest.fixture(scope="module")
def groups() -> PreferenceGroups:
    return prepared(rows(), tokens="qwen", template="plain", kind="labels").train


def build_trainer(base: Path, out: Path, groups: PreferenceGroups, **settings: Any) -> TrlKTOTrainer:
    """Return the TRL engine's trainer, on a LoRA whose B is not zero."""
    torch.manual_seed(0)
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora)
    args = KTOConfig(
        output_dir=str(out),
        per_device_train_batch_size=4,
        precompute_ref_log_probs=True,
        max_length=None,
        use_cpu=True,
        bf16=False,
        report_to="none",
        **{**SETTINGS, **settings},
    )
    order = training_order(groups, batch_size=4, seed=0, group_by_length=False)
    tokenizer = AutoTokenizer.from_pretrained(base)
    return TrlKTOTrainer(model, args, tokenizer, train=groups, held_out=groups, order=order)


@pytest.fixture
def small_groups(base_folder: Path) -> PreferenceGroups:
    """Return the same rows in the small base's tokens."""
    from align.preference.rows.prepare import prepare_preferences
    from align.preference.settings import PreferenceSettings
    from finetune.data.tokens import Encoder

    encoder = Encoder(AutoTokenizer.from_pretrained(base_folder), "plain")
    data = PreferenceSettings(source=rows(), template="plain", cache=False)
    return prepare_preferences(data, encoder, max_length=64, seed=0, kind="labels").train


def test_loss_at_the_reference_is_half_the_weight() -> None:
    """With r = z = 0 both branches are w (1 - s(0)) = w / 2."""
    desirable = torch.tensor([True, False])
    output = kto(torch.zeros(2), desirable, reference_point=torch.tensor(0.0), **SETTINGS)
    assert output.losses.tolist() == [0.75, 0.25] and output.rewards.tolist() == [0.0, 0.0]


def test_the_loss_by_hand() -> None:
    """beta = 1, z = ln 3, r = ln 9 for both: s(ln 3) = 3/4, so good costs 1/4 and bad 3/4."""
    ratios = torch.full((2,), 9.0).log()
    output = kto(ratios, torch.tensor([True, False]), reference_point=torch.tensor(3.0).log(), beta=1.0)
    assert output.losses.tolist() == pytest.approx([0.25, 0.75])


def test_gradient_matches_the_paper() -> None:
    """Slope in r: -w_D beta s(1 - s) where good, +w_U beta s(1 - s) where bad; s = 3/4."""
    ratios = torch.full((2,), 3.0, dtype=torch.float64).log().requires_grad_()
    desirable = torch.tensor([True, False])
    losses = kto(ratios, desirable, reference_point=torch.tensor(0.0), beta=1.0, desirable_weight=2.0).losses
    [slope] = torch.autograd.grad(losses.sum(), ratios)
    assert slope.tolist() == pytest.approx([-2 * 3 / 16, 3 / 16])


def test_the_reference_point_is_never_negative() -> None:
    assert reference_point(torch.tensor([1.0, 2.0])) == 1.5
    assert reference_point(torch.tensor([1.0, -2.0])) == 0.0


def test_no_prompt_is_paired_with_its_own_completion(groups: PreferenceGroups) -> None:
    prompts = [tuple(groups[index].prompt_ids.tolist()) for index in range(len(groups))]
    mismatched_of = mismatched_rows(prompts, 4)
    assert all(prompts[other] != prompts[row] for row, other in enumerate(mismatched_of))
    assert [other // 4 for other in mismatched_of[:8]] == [0] * 4 + [1] * 4, (
        "rows of one forward pass exchange completions"
    )


def test_rows_of_one_prompt_take_the_neighbor() -> None:
    assert mismatched_rows(["a", "a", "a"], 4) == [2, 0, 1] and mismatched_rows(["a"], 4) == [0]


def test_every_row_reaches_trl_with_our_tokens(
    base_folder: Path, tmp_path: Path, small_groups: PreferenceGroups
) -> None:
    trainer = build_trainer(base_folder, tmp_path, small_groups)
    order = training_order(small_groups, batch_size=4, seed=0, group_by_length=False)
    assert sorted(order) == list(range(len(small_groups)))
    token_rows: list[list[int]] = []
    labels: list[bool] = []
    for batch in trainer.get_train_dataloader():
        widths = batch["attention_mask"].sum(1).tolist()
        token_rows += [
            row_ids[:width].tolist() for row_ids, width in zip(batch["input_ids"], widths, strict=True)
        ]
        labels += batch["label"].tolist()
    expected = [small_groups[row] for row in order]
    assert token_rows == [[*row.prompt_ids.tolist(), *row.completion_ids[0].tolist()] for row in expected]
    assert labels == [bool(row.scores[0]) for row in expected]


def test_reference_adapter_is_deleted(
    base_folder: Path, tmp_path: Path, small_groups: PreferenceGroups
) -> None:
    model = build_trainer(base_folder, tmp_path, small_groups).model
    assert list(model.peft_config) == ["default"] and model.active_adapter == "default"
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained and all("lora_" in name and ".default." in name for name in trained)


def batch_with_another_reference(trainer: TrlKTOTrainer) -> dict[str, Tensor]:
    """Return the first batch with shifted reference log-probabilities, so that no log-ratio is 0."""
    batch = next(iter(trainer.get_train_dataloader()))
    generator = torch.Generator().manual_seed(3)
    for key in ("ref_logps", "ref_KL_logps"):
        batch[key] = batch[key] - torch.rand(batch[key].shape, generator=generator) * 4
    return batch


def test_loss_and_gradient_match_trl(
    base_folder: Path, tmp_path: Path, small_groups: PreferenceGroups
) -> None:
    trainer = build_trainer(base_folder, tmp_path, small_groups)
    model = trainer.model.eval()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    batch = batch_with_another_reference(trainer)

    def slope(loss: Tensor) -> Tensor:
        return torch.cat([part.flatten() for part in torch.autograd.grad(loss, weights)])

    def logps(kind: str) -> Tensor:
        ids, mask = batch[f"{kind}input_ids"], batch[f"{kind}attention_mask"]
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
        tokens = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        return (tokens * batch[f"{kind}completion_mask"][:, 1:]).sum(-1)

    expected = trainer.compute_loss(model, dict(batch))
    expected_slope = slope(expected)
    point = reference_point(logps("KL_") - batch["ref_KL_logps"])
    assert point > 0.5, "the reference point matters"
    loss = kto(
        logps("") - batch["ref_logps"], batch["label"], reference_point=point, **SETTINGS
    ).losses.mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert (slope(loss) - expected_slope).norm() < 1e-4 * expected_slope.norm()
    assert expected_slope.norm() > 1e-4, "the compared gradients are not zero"


def test_initial_policy_equals_reference(
    base_folder: Path, tmp_path: Path, small_groups: PreferenceGroups
) -> None:
    trainer = build_trainer(base_folder, tmp_path, small_groups)
    result = check_initial_loss(trainer, "float32")
    assert result.problem is None and "loss 0.6250, expected 0.6250" in result.detail  # 3 good, 1 bad
    metrics = trainer.held_out_metrics()
    assert metrics["loss"] == pytest.approx(0.5, abs=1e-5)  # (1.5 + 0.5) / 2 / 2
    assert metrics["rewards/margins"] == pytest.approx(0.0, abs=1e-5)
    moved = [value - 5.0 for value in trainer.train_dataset["ref_logps"]]
    trainer.train_dataset = trainer.train_dataset.remove_columns("ref_logps").add_column("ref_logps", moved)
    assert check_initial_loss(trainer, "float32").problem is not None


def test_non_finite_loss_names_its_rows(
    base_folder: Path, tmp_path: Path, small_groups: PreferenceGroups
) -> None:
    trainer = build_trainer(base_folder, tmp_path, small_groups)
    weight = next(weight for weight in trainer.model.parameters() if weight.requires_grad)
    weight.data.fill_(float("nan"))
    with pytest.raises(NotFiniteError, match=r"^loss is nan at step 1, on row \d+(, row \d+){3}$"):
        trainer.train()


def test_columns_hold_mismatched_completions(groups: PreferenceGroups) -> None:
    columns = to_label_dataset(groups, order=list(range(len(groups))), batch_size=4)
    assert columns["KL_completion_ids"][2] != columns["completion_ids"][2]
    assert columns["KL_completion_ids"][2] in columns["completion_ids"][:4]

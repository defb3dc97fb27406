"""DPO trainer: a step does not depend on the micro-batch size or the layout; metrics and reference."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from group_models import SOME, gradient_error, tiny
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from align.dpo.collate import PreferenceCollator, PreferenceDataset, preference_scores
from align.dpo.objective import PreferenceObjective, pad_by_group
from align.dpo.reference_logps import compute_reference_logps
from align.dpo.trainer import PreferenceTrainer
from align.preference.losses import metrics
from align.preference.losses.catalog import all_losses
from align.preference.losses.inputs import Lists
from align.preference.rows.dataset import PreferenceGroups
from finetune.adapters.traits import Hooks
from finetune.training.trainer import TrainerData

SHAPES = [*SOME[:2], (3, [2, 9]), (5, [4, 1, 3])]


def grouped(shapes: Any = SHAPES, seed: int = 0) -> PreferenceGroups:
    """Return groups of random tokens; the first completion is the best."""
    random = np.random.default_rng(seed)
    pieces = [length for prompt, lengths in shapes for length in (prompt, *lengths)]
    sizes = [len(lengths) for _, lengths in shapes]
    return PreferenceGroups(
        input_ids=random.integers(1, 96, sum(pieces), dtype=np.int32),
        offsets=np.concatenate([[0], np.cumsum(pieces)]).astype(np.int64),
        prompt_index=np.concatenate([[0], np.cumsum(np.asarray(sizes) + 1)]).astype(np.int64),
        scores=np.full(sum(sizes), np.nan),
        ranks=np.concatenate([np.arange(size) for size in sizes]).astype(np.int32),
        margins=np.full(len(sizes), np.nan),
        locations=tuple(f"file:{number}" for number in range(len(sizes))),
        source_ids=(0,) * len(sizes),
    )


def policy() -> nn.Module:
    torch.manual_seed(1)
    model = get_peft_model(tiny("llama"), LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.05)
    return model


class GradientRecorder(TrainerCallback):
    """Records the gradient of each optimizer step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        named = kwargs["model"].named_parameters()
        self.steps.append({name: w.grad.clone() for name, w in named if w.grad is not None})


def objective(name: str = "dpo") -> PreferenceObjective:
    loss = all_losses()[name]
    return PreferenceObjective.from_loss(loss, loss.settings({}, where="test"))


def one_step(
    tmp_path: Path,
    micro_batch_size: int,
    *,
    loss: str = "dpo",
    one_per_row: bool = False,
    model: nn.Module | None = None,
    hooks: Hooks | None = None,
) -> tuple[dict[str, torch.Tensor], PreferenceTrainer]:
    """Return the gradient of an optimizer step over all groups, in micro-batches of ``micro_batch_size``."""
    model, groups = model or policy(), grouped()
    reference = compute_reference_logps(
        tiny("llama"),
        groups,
        range(4),
        collate=PreferenceCollator(0),
        batch_size=2,
        on_progress=lambda done: None,
    )
    rows = PreferenceDataset(groups, reference)
    args = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=micro_batch_size,
        gradient_accumulation_steps=4 // micro_batch_size,
        max_grad_norm=0.0,
        use_cpu=True,
        report_to="none",
        logging_steps=1,
        save_strategy="no",
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    trainer = PreferenceTrainer(
        model,
        args,
        TrainerData(rows, None, PreferenceCollator(0, one_per_row=one_per_row), 4, group_by_length=True),
        objective=objective(loss),
        hooks=hooks or Hooks(),
    )
    recorder = GradientRecorder()
    trainer.add_callback(recorder)
    trainer.train()
    [grads] = recorder.steps
    return grads, trainer


@pytest.mark.parametrize("loss", ["dpo", "ipo", "simpo", "plackett_luce", "pro"])
def test_pain_12_step_does_not_depend_on_micro_batch_size(tmp_path: Path, loss: str) -> None:
    full_batch, first = one_step(tmp_path, 4, loss=loss)
    assert max(float(value.abs().max()) for value in full_batch.values()) > 1e-4
    for micro_batch_size in (2, 1):
        accumulated, other = one_step(tmp_path, micro_batch_size, loss=loss)
        assert gradient_error(accumulated, full_batch) < 1e-4
        for key, value in first.state.log_history[0].items():
            assert other.state.log_history[0][key] == pytest.approx(value, abs=1e-4), key


def test_pain_12_layout_does_not_change_the_step(tmp_path: Path) -> None:
    shared, _ = one_step(tmp_path, 4)
    one_per_row, _ = one_step(tmp_path, 2, one_per_row=True)
    assert gradient_error(one_per_row, shared) < 1e-4


def test_pain_12_penalty_counts_once_per_step(tmp_path: Path) -> None:
    def with_penalty(micro_batch_size: int) -> dict[str, torch.Tensor]:
        model = policy()
        weights = [weight for name, weight in model.named_parameters() if "lora_A" in name]
        hooks = Hooks(penalty=lambda: torch.stack([weight.square().sum() for weight in weights]).sum())
        return one_step(tmp_path, micro_batch_size, model=model, hooks=hooks)[0]

    full_batch, plain = with_penalty(4), one_step(tmp_path, 4)[0]
    assert gradient_error(with_penalty(1), full_batch) < 1e-4
    name = next(name for name in full_batch if "lora_A" in name)
    weight = dict(policy().named_parameters())[name]
    assert torch.allclose(full_batch[name] - plain[name], 2 * weight.detach(), atol=1e-4)


def test_group_loss_is_the_mean_over_its_pairs() -> None:
    lists = Lists(
        logps=torch.tensor([[-1.0, -2.0, -4.0], [-1.0, -3.0, 0.0]]),
        lengths=torch.tensor([[1, 1, 1], [1, 1, 0]]),
        scores=torch.tensor([[2.0, 1.0, 0.0], [1.0, 0.0, 0.0]]),
        reference_logps=torch.zeros(2, 3),
    )
    group_losses = objective()(lists)
    sigmoid = torch.nn.functional.logsigmoid
    margins = torch.tensor([1.0, 3.0, 2.0]) * 0.1
    assert group_losses.losses[0].item() == pytest.approx(-sigmoid(margins).mean().item())
    assert group_losses.losses[1].item() == pytest.approx(-sigmoid(torch.tensor(0.2)).item())
    assert group_losses.margins.tolist() == pytest.approx(
        [0.2, 0.2]
    ) and group_losses.accuracies.tolist() == [1.0, 1.0]


def test_data_scores_are_used_if_they_agree_with_ranks() -> None:
    group = grouped([(2, [1, 1, 1])])[0]
    assert preference_scores(group).tolist() == [0, -1, -2], "the data has no scores"
    tied = replace(group, scores=np.array([9.5, 4.0, 4.0]), ranks=np.array([0, 1, 1], np.int32))
    assert preference_scores(tied).tolist() == [9.5, 4.0, 4.0]
    tie = replace(group, scores=np.array([4.0, 4.0, 1.0]), ranks=np.array([0, 1, 2], np.int32))
    assert preference_scores(tie).tolist() == [0, -1, -2], "the row's order breaks the tie"


def test_reference_is_nan_for_unused_rows() -> None:
    groups, counted = grouped(), []
    logps = compute_reference_logps(
        tiny("llama"), groups, [0, 2], collate=PreferenceCollator(0), batch_size=1, on_progress=counted.append
    )
    rows = PreferenceDataset(groups, logps)
    assert [bool(np.isnan(rows[index].reference_logps).any()) for index in range(4)] == [
        False,
        True,
        False,
        True,
    ]
    assert counted == [1, 1]
    one_per_row = compute_reference_logps(
        tiny("llama"),
        groups,
        range(4),
        collate=PreferenceCollator(0, one_per_row=True),
        batch_size=4,
        on_progress=lambda done: None,
    )
    for index in (0, 2):
        assert np.allclose(
            rows[index].reference_logps,
            PreferenceDataset(groups, one_per_row)[index].reference_logps,
            atol=1e-4,
        )


def test_k2_is_half_a_square_and_ties_are_half_right() -> None:
    assert metrics.kl_k2(torch.tensor([-1.0]), torch.tensor([-3.0])).item() == 2.0
    chosen = torch.tensor([1e-7, 1.0])
    assert metrics.accuracies(chosen, torch.zeros(2), tie=1e-5).tolist() == [0.5, 1.0]
    assert pad_by_group(torch.tensor([1, 2, 3]), torch.tensor([1, 2])).tolist() == [[1, 0], [2, 3]]

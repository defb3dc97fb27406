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

from align.dpo.collate import PreferenceCollator, PreferenceRows, scores_of
from align.dpo.objective import Objective, by_group
from align.dpo.reference import reference_logps
from align.dpo.trainer import PreferenceTrainer
from align.preference.losses import metrics
from align.preference.losses.catalogue import losses
from align.preference.losses.inputs import Lists
from align.preference.rows.dataset import PreferenceGroups
from finetune.adapters._traits import Hooks

SHAPES = [*SOME[:2], (3, [2, 9]), (5, [4, 1, 3])]


def grouped(shapes: Any = SHAPES, seed: int = 0) -> PreferenceGroups:
    """Return groups of random tokens; the first completion is the best."""
    random = np.random.default_rng(seed)
    pieces = [length for prompt, lengths in shapes for length in (prompt, *lengths)]
    sizes = [len(lengths) for _, lengths in shapes]
    return PreferenceGroups(
        input_ids=random.integers(1, 96, sum(pieces), dtype=np.int32),
        starts=np.concatenate([[0], np.cumsum(pieces)]).astype(np.int64),
        firsts=np.concatenate([[0], np.cumsum(np.asarray(sizes) + 1)]).astype(np.int64),
        scores=np.full(sum(sizes), np.nan),
        ranks=np.concatenate([np.arange(size) for size in sizes]).astype(np.int32),
        margins=np.full(len(sizes), np.nan),
        places=tuple(f"file:{number}" for number in range(len(sizes))),
        sources=(0,) * len(sizes),
    )


def policy() -> nn.Module:
    torch.manual_seed(1)
    model = get_peft_model(tiny("llama"), LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.05)
    return model


class Gradients(TrainerCallback):
    """Records the gradient of each optimizer step."""

    def __init__(self) -> None:
        self.found: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        named = kwargs["model"].named_parameters()
        self.found.append({name: w.grad.clone() for name, w in named if w.grad is not None})


def objective(name: str = "dpo") -> Objective:
    loss = losses()[name]
    return Objective.of(loss, loss.settings({}, where="test"))


def one_step(
    tmp_path: Path,
    micro: int,
    *,
    loss: str = "dpo",
    separate: bool = False,
    model: nn.Module | None = None,
    hooks: Hooks | None = None,
) -> tuple[dict[str, torch.Tensor], PreferenceTrainer]:
    """Return the gradient of an optimizer step over all groups, in micro-batches of ``micro``."""
    model, groups = model or policy(), grouped()
    reference = reference_logps(
        tiny("llama"), groups, range(4), collate=PreferenceCollator(0), size=2, done=lambda done: None
    )
    args = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=4 // micro,
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
        train_rows=PreferenceRows(groups, reference),
        held_out_rows=None,
        collator=PreferenceCollator(0, separate=separate),
        batch_size=4,
        group_by_length=True,
        hooks=hooks or Hooks(),
    )
    trainer.objective = objective(loss)
    kept = Gradients()
    trainer.add_callback(kept)
    trainer.train()
    [found] = kept.found
    return found, trainer


@pytest.mark.parametrize("loss", ["dpo", "ipo", "simpo", "plackett_luce", "pro"])
def test_pain_12_one_step_however_it_is_cut(tmp_path: Path, loss: str) -> None:
    whole, first = one_step(tmp_path, 4, loss=loss)
    assert max(float(value.abs().max()) for value in whole.values()) > 1e-4
    for micro in (2, 1):
        parts, other = one_step(tmp_path, micro, loss=loss)
        assert gradient_error(parts, whole) < 1e-4
        for key, value in first.state.log_history[0].items():
            assert other.state.log_history[0][key] == pytest.approx(value, abs=1e-4), key


def test_pain_12_the_layout_does_not_change_the_step(tmp_path: Path) -> None:
    shared, _ = one_step(tmp_path, 4)
    separate, _ = one_step(tmp_path, 2, separate=True)
    assert gradient_error(separate, shared) < 1e-4


def test_pain_12_a_penalty_counts_once_a_step(tmp_path: Path) -> None:
    def with_penalty(micro: int) -> dict[str, torch.Tensor]:
        model = policy()
        weights = [weight for name, weight in model.named_parameters() if "lora_A" in name]
        hooks = Hooks(penalty=lambda: torch.stack([weight.square().sum() for weight in weights]).sum())
        return one_step(tmp_path, micro, model=model, hooks=hooks)[0]

    whole, plain = with_penalty(4), one_step(tmp_path, 4)[0]
    assert gradient_error(with_penalty(1), whole) < 1e-4
    name = next(name for name in whole if "lora_A" in name)
    weight = dict(policy().named_parameters())[name]
    assert torch.allclose(whole[name] - plain[name], 2 * weight.detach(), atol=1e-4)


def test_the_loss_of_a_group_is_the_mean_over_its_pairs() -> None:
    lists = Lists(
        logps=torch.tensor([[-1.0, -2.0, -4.0], [-1.0, -3.0, 0.0]]),
        lengths=torch.tensor([[1, 1, 1], [1, 1, 0]]),
        scores=torch.tensor([[2.0, 1.0, 0.0], [1.0, 0.0, 0.0]]),
        reference_logps=torch.zeros(2, 3),
    )
    found = objective()(lists)
    sigmoid = torch.nn.functional.logsigmoid
    margins = torch.tensor([1.0, 3.0, 2.0]) * 0.1
    assert found.losses[0].item() == pytest.approx(-sigmoid(margins).mean().item())
    assert found.losses[1].item() == pytest.approx(-sigmoid(torch.tensor(0.2)).item())
    assert found.margins.tolist() == pytest.approx([0.2, 0.2]) and found.accuracies.tolist() == [1.0, 1.0]


def test_scores_are_the_data_s_where_they_say_what_the_ranks_say() -> None:
    group = grouped([(2, [1, 1, 1])])[0]
    assert scores_of(group).tolist() == [0, -1, -2], "the data has no scores"
    tied = replace(group, scores=np.array([9.5, 4.0, 4.0]), ranks=np.array([0, 1, 1], np.int32))
    assert scores_of(tied).tolist() == [9.5, 4.0, 4.0]
    tie = replace(group, scores=np.array([4.0, 4.0, 1.0]), ranks=np.array([0, 1, 2], np.int32))
    assert scores_of(tie).tolist() == [0, -1, -2], "the row's order breaks the tie"


def test_the_reference_is_nan_where_no_step_looks() -> None:
    groups, counted = grouped(), []
    found = reference_logps(
        tiny("llama"), groups, [0, 2], collate=PreferenceCollator(0), size=1, done=counted.append
    )
    rows = PreferenceRows(groups, found)
    assert [bool(np.isnan(rows[index].reference).any()) for index in range(4)] == [False, True, False, True]
    assert counted == [1, 1]
    alone = reference_logps(
        tiny("llama"),
        groups,
        range(4),
        collate=PreferenceCollator(0, separate=True),
        size=4,
        done=lambda done: None,
    )
    for index in (0, 2):
        assert np.allclose(rows[index].reference, PreferenceRows(groups, alone)[index].reference, atol=1e-4)


def test_k2_is_half_a_square_and_ties_are_half_right() -> None:
    assert metrics.kl_k2(torch.tensor([-1.0]), torch.tensor([-3.0])).item() == 2.0
    chosen = torch.tensor([1e-7, 1.0])
    assert metrics.accuracies(chosen, torch.zeros(2), tie=1e-5).tolist() == [0.5, 1.0]
    assert by_group(torch.tensor([1, 2, 3]), torch.tensor([1, 2])).tolist() == [[1, 0], [2, 3]]

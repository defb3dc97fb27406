"""Reward losses by hand; steps do not depend on micro-batches; each head trains on its sources."""

from math import log
from pathlib import Path

import pytest
import torch
from adapter_properties import WORDS
from group_models import gradients
from reward_models import adapted, tokenized
from torch import Tensor
from transformers import TrainingArguments

from align.reward.batch import RewardCollator
from align.reward.trainer import (
    RewardObjective,
    RewardTrainer,
    bradley_terry_losses,
    consistency_losses,
    mean_margins,
    pairwise_margins,
)
from finetune.training.trainer import TrainerData

pytestmark = pytest.mark.filterwarnings("ignore")
PAIRS = [(0, 1)] * 4
LISTS = [(0, 1), (0, 1, 2, 3), (0, 0, 2), (0, 1)]


class Rows(list):
    lengths = property(lambda self: [len(g.prompt_ids) + sum(map(len, g.completion_ids)) for g in self])
    locations = property(lambda self: [group.location for group in self])


def gradient_of_a_step(
    tmp_path: Path, micro: int, ranks: list[tuple[int, ...]], **options
) -> dict[str, Tensor]:
    """Return the gradient that the optimizer sees in the first step of four comparisons."""
    torch.manual_seed(0)
    model = adapted("lora", "llama")
    gradients_by_name: dict[str, Tensor] = {}

    class Watching(torch.optim.SGD):
        def step(self, *args, **kwargs):
            gradients_by_name.update(
                {name: w.grad.clone() for name, w in model.named_parameters() if w.grad is not None}
            )

    args = TrainingArguments(
        str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=-(-4 // micro),
        max_grad_norm=0.0,
        report_to="none",
        remove_unused_columns=False,
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = RewardTrainer(
        model,
        args,
        TrainerData(Rows(tokenized(ranks, heads=2)), None, RewardCollator(pad_id=0), 4, group_by_length=True),
        objective=RewardObjective((0, 1), **options),
    )
    trainer.optimizer = Watching([w for w in model.parameters() if w.requires_grad], lr=0.0)
    trainer.train()
    return gradients_by_name


@pytest.mark.parametrize("ranks", [PAIRS, LISTS], ids=["pairs", "lists"])
@pytest.mark.parametrize("micro", [1, 2, 3])
def test_pain_12_a_step_is_independent_of_micro_batches(
    tmp_path: Path, micro: int, ranks: list[tuple[int, ...]]
) -> None:
    full_batch = gradient_of_a_step(tmp_path, 4, ranks, center_rewards_coefficient=0.1, margin_scale=0.5)
    cut = gradient_of_a_step(tmp_path, micro, ranks, center_rewards_coefficient=0.1, margin_scale=0.5)
    assert full_batch.keys() == cut.keys() and len(full_batch) > 10
    for name, gradient in full_batch.items():
        assert torch.allclose(gradient, cut[name], atol=1e-6, rtol=1e-4), name


def test_each_group_trains_only_its_head() -> None:
    model, groups = adapted("lora", "llama"), tokenized(PAIRS, heads=2)
    collate = RewardCollator(pad_id=0)
    for head in (0, 1):
        head_groups = [group for group in groups if group.source == head]
        losses, rewards = RewardObjective((0, 1)).losses(model, collate(head_groups))
        assert losses.shape == (2,) and rewards.shape == (2, 2)
        head_gradients = gradients(model, losses.sum())
        [name] = [name for name in head_gradients if "score" in name]
        assert head_gradients[name][head].abs().max() > 0 and head_gradients[name][1 - head].abs().max() == 0


def test_the_loss_of_a_list_is_the_mean_over_its_pairs() -> None:
    rewards, ranks = torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([[0, 1, 1]])
    expected = (torch.nn.functional.softplus(torch.tensor([-2.0, -1.0]))).mean()
    assert torch.allclose(bradley_terry_losses(rewards, ranks), expected)
    padded = torch.tensor([[2.0, 0.0, 1.0, 0.0]]), torch.tensor([[0, 1, 1, -1]])
    assert torch.allclose(bradley_terry_losses(*padded), expected)
    assert bradley_terry_losses(torch.zeros(1, 2), torch.tensor([[0, 1]])).item() == pytest.approx(log(2))
    assert mean_margins(rewards, ranks).item() == pytest.approx(1.5)


def test_margins_of_pairs_and_lists() -> None:
    nan = float("nan")
    scores = torch.tensor([[7.0, nan, nan], [5.0, 4.0, 1.0], [1.0, 0.0, nan]])
    target_margins = pairwise_margins(
        torch.tensor([3.0, 4.0, nan]), scores, torch.tensor([2, 3, 2]), scale=2.0
    )
    assert target_margins[0, 0, 1] == 6.0 and target_margins[2, 0, 1] == 0.0
    assert target_margins[1].tolist() == [[0, 2, 8], [0, 0, 6], [0, 0, 0]]
    losses = bradley_terry_losses(
        torch.tensor([[6.0, 0.0]]), torch.tensor([[0, 1]]), margins=target_margins[:1, :2, :2]
    )
    assert losses.item() == pytest.approx(log(2)), "a lead of 6 where 6 is asked for is as good as none"


def test_consistency_loss_of_equal_passes_is_zero() -> None:
    rewards, ranks = torch.tensor([[1.0, -1.0]]), torch.tensor([[0, 1]])
    assert consistency_losses(rewards, rewards + 3.0, ranks).item() == 0.0
    p, q = torch.sigmoid(torch.tensor(2.0)), torch.tensor(0.5)
    kl = [a * (a / b).log() + (1 - a) * ((1 - a) / (1 - b)).log() for a, b in ((p, q), (q, p))]
    assert consistency_losses(rewards, torch.zeros(1, 2), ranks).item() == pytest.approx(float(sum(kl)) / 2)


def test_adamix_consistency_loss() -> None:
    torch.manual_seed(0)
    model, batch = adapted("adamix", "llama").train(), RewardCollator(pad_id=0)(tokenized(PAIRS))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad and weight.ndim > 1:
                weight.add_(torch.randn_like(weight))
    torch.manual_seed(5)
    once = RewardObjective((0,)).losses(model, batch)[0]
    torch.manual_seed(5)
    twice = RewardObjective((0,), forward_passes=2).losses(model, batch)[0]
    assert (twice > once).all()


def test_collated_ranks_scores_and_margins() -> None:
    batch = RewardCollator(pad_id=0)(tokenized(LISTS, heads=2))
    assert batch["ranks"].tolist() == [[0, 1, -1, -1], [0, 1, 2, 3], [0, 0, 2, -1], [0, 1, -1, -1]]
    assert batch["row_ids"].tolist() == [0, 1, 2, 3] and batch["sources"].tolist() == [0, 1, 0, 1]
    assert batch["scores"].isnan().sum() == 5 and batch["margins"].tolist() == [1.0, 3.0, 2.0, 1.0]
    assert int(batch["input_ids"].max()) < WORDS
    separate = RewardCollator(pad_id=0, one_per_row=True)(tokenized(LISTS, heads=2))
    assert len(separate["input_ids"]) == 11 and separate["sizes"].tolist() == [2, 4, 3, 2]

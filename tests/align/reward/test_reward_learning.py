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

from align.reward.collate import RewardCollator
from align.reward.loss import comparison_losses, disagreements, margin_table, mean_margins
from align.reward.objective import Objective
from align.reward.trainer import RewardTrainer

pytestmark = pytest.mark.filterwarnings("ignore")
PAIRS = [(0, 1)] * 4
LISTS = [(0, 1), (0, 1, 2, 3), (0, 0, 2), (0, 1)]


class Rows(list):
    lengths = property(lambda self: [len(g.prompt_ids) + sum(map(len, g.completion_ids)) for g in self])
    places = property(lambda self: [group.place for group in self])


def gradient_of_a_step(tmp_path: Path, micro: int, ranks: list[tuple[int, ...]], **more) -> dict[str, Tensor]:
    """Return the gradient that the optimizer sees in the first step of four comparisons."""
    torch.manual_seed(0)
    model = adapted("lora", "llama")
    found: dict[str, Tensor] = {}

    class Watching(torch.optim.SGD):
        def step(self, *args, **kwargs):
            found.update({name: w.grad.clone() for name, w in model.named_parameters() if w.grad is not None})

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
        train_rows=Rows(tokenized(ranks, heads=2)),
        held_out_rows=None,
        collator=RewardCollator(pad_id=0),
        batch_size=4,
        group_by_length=True,
    )
    trainer.objective, trainer.seen = Objective((0, 1), **more), []
    trainer.optimizer = Watching([w for w in model.parameters() if w.requires_grad], lr=0.0)
    trainer.train()
    return found


@pytest.mark.parametrize("ranks", [PAIRS, LISTS], ids=["pairs", "lists"])
@pytest.mark.parametrize("micro", [1, 2, 3])
def test_pain_12_a_step_is_the_same_however_it_is_cut(
    tmp_path: Path, micro: int, ranks: list[tuple[int, ...]]
) -> None:
    whole = gradient_of_a_step(tmp_path, 4, ranks, centring=0.1, margins=0.5)
    cut = gradient_of_a_step(tmp_path, micro, ranks, centring=0.1, margins=0.5)
    assert whole.keys() == cut.keys() and len(whole) > 10
    for name, gradient in whole.items():
        assert torch.allclose(gradient, cut[name], atol=1e-6, rtol=1e-4), name


def test_each_group_trains_its_own_head_alone() -> None:
    model, groups = adapted("lora", "llama"), tokenized(PAIRS, heads=2)
    collate = RewardCollator(pad_id=0)
    for head in (0, 1):
        own = [group for group in groups if group.source == head]
        losses, rewards = Objective((0, 1)).losses(model, collate(own))
        assert losses.shape == (2,) and rewards.shape == (2, 2)
        found = gradients(model, losses.sum())
        [name] = [name for name in found if "score" in name]
        assert found[name][head].abs().max() > 0 and found[name][1 - head].abs().max() == 0


def test_the_loss_of_a_list_is_the_mean_over_its_pairs() -> None:
    rewards, ranks = torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([[0, 1, 1]])
    wanted = (torch.nn.functional.softplus(torch.tensor([-2.0, -1.0]))).mean()
    assert torch.allclose(comparison_losses(rewards, ranks), wanted)
    padded = torch.tensor([[2.0, 0.0, 1.0, 0.0]]), torch.tensor([[0, 1, 1, -1]])
    assert torch.allclose(comparison_losses(*padded), wanted)
    assert comparison_losses(torch.zeros(1, 2), torch.tensor([[0, 1]])).item() == pytest.approx(log(2))
    assert mean_margins(rewards, ranks).item() == pytest.approx(1.5)


def test_margins_are_the_pair_s_own_and_differences_of_a_list_s_scores() -> None:
    nan = float("nan")
    scores = torch.tensor([[7.0, nan, nan], [5.0, 4.0, 1.0], [1.0, 0.0, nan]])
    found = margin_table(torch.tensor([3.0, 4.0, nan]), scores, torch.tensor([2, 3, 2]), scale=2.0)
    assert found[0, 0, 1] == 6.0 and found[2, 0, 1] == 0.0
    assert found[1].tolist() == [[0, 2, 8], [0, 0, 6], [0, 0, 0]]
    asked = comparison_losses(torch.tensor([[6.0, 0.0]]), torch.tensor([[0, 1]]), margins=found[:1, :2, :2])
    assert asked.item() == pytest.approx(log(2)), "a lead of 6 where 6 is asked for is as good as none"


def test_two_passes_that_agree_cost_nothing() -> None:
    rewards, ranks = torch.tensor([[1.0, -1.0]]), torch.tensor([[0, 1]])
    assert disagreements(rewards, rewards + 3.0, ranks).item() == 0.0
    p, q = torch.sigmoid(torch.tensor(2.0)), torch.tensor(0.5)
    kl = [a * (a / b).log() + (1 - a) * ((1 - a) / (1 - b)).log() for a, b in ((p, q), (q, p))]
    assert disagreements(rewards, torch.zeros(1, 2), ranks).item() == pytest.approx(float(sum(kl)) / 2)


def test_adamix_pulls_two_passes_together() -> None:
    torch.manual_seed(0)
    model, batch = adapted("adamix", "llama").train(), RewardCollator(pad_id=0)(tokenized(PAIRS))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad and weight.ndim > 1:
                weight.add_(torch.randn_like(weight))
    torch.manual_seed(5)
    once = Objective((0,)).losses(model, batch)[0]
    torch.manual_seed(5)
    twice = Objective((0,), passes=2).losses(model, batch)[0]
    assert (twice > once).all()


def test_a_batch_says_what_people_said() -> None:
    batch = RewardCollator(pad_id=0)(tokenized(LISTS, heads=2))
    assert batch["ranks"].tolist() == [[0, 1, -1, -1], [0, 1, 2, 3], [0, 0, 2, -1], [0, 1, -1, -1]]
    assert batch["rows"].tolist() == [0, 1, 2, 3] and batch["sources"].tolist() == [0, 1, 0, 1]
    assert batch["scores"].isnan().sum() == 5 and batch["margins"].tolist() == [1.0, 3.0, 2.0, 1.0]
    assert int(batch["input_ids"].max()) < WORDS
    separate = RewardCollator(pad_id=0, separate=True)(tokenized(LISTS, heads=2))
    assert len(separate["input_ids"]) == 11 and separate["sizes"].tolist() == [2, 4, 3, 2]

"""PPO-ptx: order of the pretraining rows, their split over micro-batches and processes, their weight."""

from typing import Any

import pytest
import torch
from cast import episodes, models
from small_models import plain_loss_sum, token_rows
from torch import Tensor

from align.ppo.pretraining import LABELS, ROWS, Pretraining
from align.ppo.roles import Roles
from finetune.data.collate import PaddedCollator
from finetune.data.dataset import TokenizedRows
from finetune.planning.world import World

pytestmark = pytest.mark.filterwarnings("ignore")
LENGTHS = [5, 9, 4, 7, 6]


def rows() -> TokenizedRows:
    found = token_rows(LENGTHS)
    found.arrays["input_ids"] %= 96
    return found


def mixed(batch_size: int, weight: float = 2.0) -> Pretraining:
    return Pretraining(rows(), PaddedCollator(0), batch_size, weight, seed=0)


def dealt(mix: Pretraining, passes: int, step: int) -> list[dict[str, Any]]:
    batches: list[dict[str, Any]] = [{} for _ in range(passes)]
    mix.add_to(batches, step=step)
    return batches


def learnt(roles: Roles, batch: dict[str, Any]) -> Tensor | float:
    """Return the summed NLL of the pretraining rows of a micro-batch."""
    laid = dict(episodes(roles).batch([0], pad_id=0))
    return roles(laid, spread=False, beside=batch.get(ROWS)).unlikelihood


@pytest.mark.parametrize("passes", [1, 2, 3, 7])
def test_a_step_s_passes_add_up_to_gamma_times_the_mean_over_labels(passes: int) -> None:
    roles, _ = models("lora", "llama")
    batches, mix = dealt(mixed(5), passes, step=0), mixed(5)
    assert sum(len(batch[ROWS]["input_ids"]) for batch in batches if ROWS in batch) == 5
    total = sum(float(mix.loss(learnt(roles, batch), batch)) for batch in batches)
    labels = sum(int((rows()[index]["labels"][1:] != -100).sum()) for index in range(5))
    expected = 2.0 * float(plain_loss_sum(roles.policy, rows())) / labels
    assert total == pytest.approx(expected, rel=1e-5)
    assert {batch[LABELS] for batch in batches if ROWS in batch} == {labels}


def test_every_row_comes_once_in_a_round_whatever_the_step() -> None:
    mix = mixed(2)
    seen = [row for step in range(5) for batch in dealt(mix, 1, step) for row in batch[ROWS]["rows"].tolist()]
    assert sorted(seen[:5]) == sorted(seen[5:]) == list(range(5)) and seen[:5] != seen[5:]
    again = dealt(mixed(2), 1, 3)[0][ROWS]["rows"]
    assert torch.equal(again, torch.tensor(seen[6:8]))


def test_nothing_is_added_where_a_pass_has_no_rows() -> None:
    assert mixed(1).loss(0.0, dealt(mixed(1), 2, step=0)[1]) == 0.0


def test_processes_share_a_step_s_rows_and_know_all_its_labels() -> None:
    [alone] = dealt(mixed(5), 1, step=0)
    passes = []
    for rank in range(2):
        batches: list[dict[str, Any]] = [{}, {}]
        mixed(5).add_to(batches, step=0, world=World(rank, 2, rank))
        passes += batches
    given = [row for batch in passes for row in batch[ROWS]["rows"].tolist()]
    assert sorted(given) == sorted(alone[ROWS]["rows"].tolist()) and len(given) == 5
    assert {batch[LABELS] for batch in passes} == {alone[LABELS]}

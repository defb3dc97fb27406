"""Automatic micro-batch size by the memory plan, without a GPU."""

from pathlib import Path

import pytest
from torch import nn

from finetune.planning.devices import GIB
from finetune.recipe.recipe import load
from finetune.training.loading import Policy
from finetune.training.memory_room import rows_that_fit


def most(stage: str, room: int, *, base: str = "llama-2-7b", processes: int = 1) -> int:
    """Return the largest number of rows of 512 tokens that fit."""
    settings = load(stage, "quickstart").settings
    model = settings.model.model_copy(update={"base": base, "start": None})
    settings = settings.model_copy(update={"model": model})
    policy = Policy(nn.Identity(), "bfloat16", "none")
    strategy = "ddp" if processes > 1 else "single"
    fits = rows_that_fit(settings, policy, longest=512, processes=processes, strategy=strategy, room=room)
    assert fits is not None
    found = [rows for rows in range(1, 200) if fits(rows)]
    assert found == list(range(1, len(found) + 1)), "more rows never need less"
    return len(found)


def test_more_room_has_more_rows() -> None:
    few, more = most("sft", 24 * GIB), most("sft", 40 * GIB)
    assert 0 < few < more < 199
    assert most("sft", 12 * GIB) == 0, "the weights alone have 12.6 GiB"


@pytest.mark.parametrize("stage", ["sft", "dpo", "reward", "kto", "grpo", "rloo", "ppo", "rejection"])
def test_every_stage_has_an_answer(stage: str) -> None:
    assert 0 < most(stage, 40 * GIB) < 199


def test_ppo_trains_two_roles_on_one_base() -> None:
    assert most("ppo", 40 * GIB) < 0.7 * most("sft", 40 * GIB)


def test_a_model_that_is_not_planned_here_has_no_answer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    settings = load("sft", "quickstart").settings
    model = settings.model.model_copy(update={"base": str(tmp_path)})
    policy = Policy(nn.Identity(), "bfloat16", "none")
    room = {"longest": 512, "processes": 1, "strategy": "single", "room": 40 * GIB}
    assert rows_that_fit(settings.model_copy(update={"model": model}), policy, **room) is None

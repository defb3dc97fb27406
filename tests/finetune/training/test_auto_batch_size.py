"""Automatic micro-batch size by the memory plan, without a GPU."""

from pathlib import Path

import pytest
from torch import nn

from finetune.planner.devices import GIB
from finetune.recipe.recipe import read_recipe
from finetune.training.auto_batch_size import batch_fits
from finetune.training.model import Policy


def largest_batch(stage: str, gpu_bytes: int, *, base: str = "llama-2-7b", processes: int = 1) -> int:
    """Return the largest number of rows of 512 tokens that fit."""
    settings = read_recipe(stage, "quickstart").settings
    model = settings.model.model_copy(update={"base": base, "init_from": None})
    settings = settings.model_copy(update={"model": model})
    policy = Policy(nn.Identity(), "bfloat16", "none")
    strategy = "ddp" if processes > 1 else "single"
    fits = batch_fits(
        settings, policy, longest=512, num_processes=processes, strategy=strategy, gpu_bytes=gpu_bytes
    )
    assert fits is not None
    predicate = [rows for rows in range(1, 200) if fits(rows)]
    assert predicate == list(range(1, len(predicate) + 1)), "more rows never need less"
    return len(predicate)


def test_more_memory_allows_larger_batches() -> None:
    few, more = largest_batch("sft", 24 * GIB), largest_batch("sft", 40 * GIB)
    assert 0 < few < more < 199
    assert largest_batch("sft", 12 * GIB) == 0, "the weights alone have 12.6 GiB"


@pytest.mark.parametrize("stage", ["sft", "dpo", "reward", "kto", "grpo", "rloo", "ppo", "rejection"])
def test_every_stage_has_a_predicate(stage: str) -> None:
    assert 0 < largest_batch(stage, 40 * GIB) < 199


def test_ppo_counts_actor_and_critic() -> None:
    assert largest_batch("ppo", 40 * GIB) < 0.7 * largest_batch("sft", 40 * GIB)


def test_an_unknown_architecture_has_no_predicate(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    settings = read_recipe("sft", "quickstart").settings
    model = settings.model.model_copy(update={"base": str(tmp_path)})
    policy = Policy(nn.Identity(), "bfloat16", "none")
    gpu = {"longest": 512, "num_processes": 1, "strategy": "single", "gpu_bytes": 40 * GIB}
    assert batch_fits(settings.model_copy(update={"model": model}), policy, **gpu) is None

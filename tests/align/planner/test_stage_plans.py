"""Steps, tokens and completions of full runs, derived by hand, and micro-batches of every stage."""

from dataclasses import replace
from typing import Any

import pytest

from align.planner.row_lengths import RowLengths
from align.planner.stage_plans import STAGE_PLANS, StagePlan, stage_plan
from finetune.planner.estimate import TotalWork, Workload, recipe_workload
from finetune.recipe.discovery import stage_names
from finetune.recipe.recipe import read_recipe

ROWS = RowLengths(
    rows=100,
    prompt=30.0,
    completion=10.0,
    completions=1.0,
    longest=60,
    longest_prompt=40,
    longest_completion=20,
    is_upper_bound=False,
    basis="",
)
PAIRS = replace(ROWS, completions=2.0)


def plan_of(stage: str, **values: Any) -> StagePlan:
    shortcuts = {key.replace("__", "."): value for key, value in values.items()}
    return stage_plan(stage, read_recipe(stage, "quickstart", shortcuts=shortcuts).settings)


def test_stages_on_conversations_are_planned_like_sft() -> None:
    assert {"sft", "chain_of_hindsight"} <= set(stage_names()) - set(STAGE_PLANS)
    assert set(STAGE_PLANS) < set(stage_names())


def test_supervised_work() -> None:
    stage = plan_of("sft", train__epochs=2.0, train__batch_size=8)
    assert stage.total_work(ROWS) == TotalWork(steps=26, trained_tokens=2 * 100 * 40.0)
    fixed = plan_of("sft", train__max_steps=5, train__batch_size=8)
    assert fixed.total_work(replace(ROWS, rows=None)) == TotalWork(steps=5, trained_tokens=5 * 8 * 40.0)
    assert stage.total_work(replace(ROWS, rows=None)) is None


@pytest.mark.parametrize(
    ("align", "forward_tokens"),
    [
        ({"loss": "dpo"}, 100 * 50.0),
        ({"loss": "dpo", "reference": "live"}, 2 * 100 * 50.0),
        ({"loss": "orpo"}, 0.0),
    ],
)
def test_reference_tokens(align: dict[str, Any], forward_tokens: float) -> None:
    values = {f"dpo__{key}": value for key, value in align.items()}
    stage = plan_of("dpo", train__epochs=2.0, train__batch_size=8, **values)
    # The last batch of each epoch has four pairs.
    assert stage.total_work(PAIRS) == TotalWork(
        steps=26, trained_tokens=2 * 100 * 50.0, forward_tokens=forward_tokens
    )


def test_ppo_work() -> None:
    stage = plan_of(
        "ppo", train__epochs=1.0, train__batch_size=8, ppo__rollout_size=32, ppo__ppo_epochs=3,
        sampling__max_new_tokens=10,
    )  # fmt: skip
    planned_work = stage.total_work(ROWS)
    episodes = 4 * 32
    assert planned_work is not None
    assert (planned_work.steps, planned_work.completions, planned_work.completion_tokens) == (
        4 * 3 * 4,
        episodes,
        10,
    )
    assert planned_work.trained_tokens == 2 * 3 * episodes * 40 and planned_work.forward_tokens in (
        3 * episodes * 40,
        4 * episodes * 40,
    )


def test_rejection_work() -> None:
    stage = plan_of(
        "rejection", train__epochs=1.0, train__batch_size=8, rejection__rounds=2,
        rejection__num_generations=4, rejection__prompts=40, sampling__max_new_tokens=10,
    )  # fmt: skip
    planned_work = stage.total_work(ROWS)
    assert planned_work is not None and (planned_work.steps, planned_work.completions) == (5 + 10, 2 * 40 * 4)


@pytest.mark.parametrize("stage", ["grpo", "rloo"])
def test_online_work(stage: str) -> None:
    online = plan_of(stage, train__epochs=1.0, train__batch_size=8, sampling__num_generations=4)
    planned_work = online.total_work(ROWS)
    assert planned_work is not None and (planned_work.steps, planned_work.completions) == (50, 400)


def micro_batch(stage: str, lengths: RowLengths, rows: int, **values: Any) -> Workload:
    planned = plan_of(stage, **values)
    step = recipe_workload(planned.settings, precision="float32", quantization="none", device="cpu")
    return planned.micro_batch(step, lengths, rows)


def test_supervised_rows_are_padded_and_completions_predicted() -> None:
    step = micro_batch("sft", ROWS, 4)
    assert (step.rows, step.seq_len, step.predicted, step.masked) == (4, 60, 80, True)
    assert micro_batch("sft", ROWS, 1).masked is False
    assert micro_batch("sft", ROWS, 4, data__loss_on="all").predicted == 240
    assert micro_batch("sft", ROWS, 4, train__engine="trl").predicted == 240


def test_packed_rows_are_one_row() -> None:
    step = micro_batch("sft", ROWS, 4, data__packing=True)
    assert (step.rows, step.seq_len, step.predicted, step.masked) == (1, 240, 80, True)


def test_completions_share_their_prompt_row() -> None:
    step = micro_batch("dpo", PAIRS, 3)
    assert (step.rows, step.seq_len, step.predicted) == (3, 80, 120)
    assert (step.completions, step.objective, step.live_reference) == (6, "comparison", False)
    assert micro_batch("dpo", PAIRS, 3, dpo__reference="live").live_reference
    by_trl = micro_batch("dpo", PAIRS, 3, train__engine="trl", dpo__loss="dpo")
    assert (by_trl.rows, by_trl.seq_len, by_trl.predicted) == (6, 60, 360)


def test_reward_micro_batch() -> None:
    step = micro_batch("reward", PAIRS, 3)
    assert (step.objective, step.heads, step.completions) == ("scores", 1, 6)


def test_ppo_micro_batch() -> None:
    step = micro_batch("ppo", ROWS, 4, sampling__max_new_tokens=24, ppo__rollout_size=64)
    assert step.objective == "ppo" and step.seq_len == 40 + 24 and step.predicted == 4 * 24
    assert step.rollout is not None
    assert (step.rollout.rows, step.rollout.prompt, step.rollout.completion) == (64, 40, 24)


def test_labelled_completions_have_their_own_row() -> None:
    step = micro_batch("kto", ROWS, 4)
    assert (step.rows, step.completions, step.objective) == (4, 4, "comparison")

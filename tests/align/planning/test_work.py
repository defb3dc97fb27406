"""Steps, tokens and completions of full runs, derived by hand, and micro-batches of every stage."""

from dataclasses import replace
from typing import Any

import pytest

from align.planning.forward import forward_pass
from align.planning.lengths import Lengths
from align.planning.work import Work, work
from finetune.planning.from_recipe import architecture_of, step_of
from finetune.planning.workload import Workload
from finetune.recipe.recipe import load
from finetune.recipe.settings import StageSettings

ROWS = Lengths(
    rows=100,
    prompt=30.0,
    reply=10.0,
    replies=1.0,
    longest=60,
    longest_prompt=40,
    longest_reply=20,
    bound=False,
    how="",
)
PAIRS = replace(ROWS, replies=2.0)


def settings_of(stage: str, **values: Any) -> StageSettings:
    given = {key.replace("__", "."): value for key, value in values.items()}
    return load(stage, "quickstart", shortcuts=given).settings


def test_supervised_tuning_learns_every_row_each_epoch() -> None:
    settings = settings_of("sft", train__epochs=2.0, train__batch_size=8)
    assert work(settings, ROWS) == Work(steps=26, learnt=26 * 8 * 40.0)
    fixed = settings_of("sft", train__max_steps=5, train__batch_size=8)
    assert work(fixed, replace(ROWS, rows=None)) == Work(steps=5, learnt=5 * 8 * 40.0)
    assert work(settings, replace(ROWS, rows=None)) is None


@pytest.mark.parametrize(
    ("align", "read"),
    [
        ({"loss": "dpo"}, 100 * 50.0),
        ({"loss": "dpo", "reference": "live"}, 26 * 8 * 50.0),
        ({"loss": "orpo"}, 0.0),
    ],
)
def test_a_reference_reads_what_is_in_use_once_or_in_every_step(align: dict[str, Any], read: float) -> None:
    given = {f"align__{key}": value for key, value in align.items()}
    settings = settings_of("dpo", train__epochs=2.0, train__batch_size=8, **given)
    assert work(settings, PAIRS) == Work(steps=26, learnt=26 * 8 * 50.0, read=read)


def test_ppo_reads_each_episode_four_times_and_learns_it_twice_an_epoch() -> None:
    settings = settings_of(
        "ppo", train__epochs=1.0, train__batch_size=8, ppo__rollout_size=32, ppo__epochs=3,
        sampling__max_new_tokens=10,
    )  # fmt: skip
    found = work(settings, ROWS)
    episodes = 4 * 32
    assert found is not None
    assert (found.steps, found.replies, found.reply) == (4 * 3 * 4, episodes, 10)
    assert found.learnt == 2 * 3 * episodes * 40 and found.read in (3 * episodes * 40, 4 * episodes * 40)


def test_rejection_learns_what_earlier_rounds_chose_again() -> None:
    settings = settings_of(
        "rejection", train__epochs=1.0, train__batch_size=8, rejection__rounds=2, rejection__samples=4,
        rejection__prompts=40, sampling__max_new_tokens=10,
    )  # fmt: skip
    found = work(settings, ROWS)
    assert found is not None and (found.steps, found.replies) == (5 + 10, 2 * 40 * 4)


@pytest.mark.parametrize("stage", ["grpo", "rloo"])
def test_groups_are_drawn_for_every_step(stage: str) -> None:
    settings = settings_of(stage, train__epochs=1.0, train__batch_size=8, sampling__samples=4)
    found = work(settings, ROWS)
    assert found is not None and (found.steps, found.replies) == (50, 400)


def laid_out(stage: str, lengths: Lengths, rows: int, **values: Any) -> Workload:
    settings = settings_of(stage, **values)
    architecture = architecture_of(settings.model)
    step = step_of(settings, architecture, precision="float32", quantization="none", device="cpu")
    return forward_pass(settings, step, lengths)(rows)


def test_rows_of_supervised_tuning_are_padded_and_only_replies_are_predicted() -> None:
    step = laid_out("sft", ROWS, 4)
    assert (step.lines, step.columns, step.predicted, step.masked) == (4, 60, 80, True)
    assert laid_out("sft", ROWS, 1).masked is False
    assert laid_out("sft", ROWS, 4, data__loss_on="all").predicted == 240
    assert laid_out("sft", ROWS, 4, train__engine="trl").predicted == 240


def test_packed_rows_are_one_line() -> None:
    step = laid_out("sft", ROWS, 4, data__packing=True)
    assert (step.lines, step.columns, step.predicted, step.masked) == (1, 240, 80, True)


def test_completions_share_the_line_of_their_prompt() -> None:
    step = laid_out("dpo", PAIRS, 3)
    assert (step.lines, step.columns, step.predicted) == (3, 80, 120)
    assert (step.completions, step.objective, step.live_reference) == (6, "comparison", False)
    assert laid_out("dpo", PAIRS, 3, align__reference="live").live_reference
    by_trl = laid_out("dpo", PAIRS, 3, train__engine="trl", align__loss="dpo")
    assert (by_trl.lines, by_trl.columns, by_trl.predicted) == (6, 60, 360)


def test_a_reward_model_scores() -> None:
    step = laid_out("reward", PAIRS, 3)
    assert (step.objective, step.heads, step.completions) == ("scores", 1, 6)


def test_ppo_has_a_rollout_and_two_roles() -> None:
    step = laid_out("ppo", ROWS, 4, sampling__max_new_tokens=24, ppo__rollout_size=64)
    assert step.objective == "ppo" and step.columns == 40 + 24 and step.predicted == 4 * 24
    assert step.rollout is not None
    assert (step.rollout.lines, step.rollout.prompt, step.rollout.completion) == (64, 40, 24)


def test_a_labelled_reply_is_a_line_of_its_own() -> None:
    step = laid_out("kto", ROWS, 4)
    assert (step.lines, step.completions, step.objective) == (4, 4, "comparison")

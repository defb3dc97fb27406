"""rollouts.jsonl: entries, the size limit, resuming, and runs whose rewards are all equal."""

from pathlib import Path

import numpy as np
import pytest

from align.rl.first_completions import check_equal_rewards
from align.rl.prompts import Prompt
from align.rl.rewards.rewards import RewardScores
from align.rl.rollout_log import (
    append_rollouts,
    equal_rewards_finding,
    replace_rollouts,
    rollout_entries,
)
from data_templates.segments import Message
from finetune.recipe.recipe import read_recipe
from finetune.training.run_directory import ROLLOUTS, RunDirectory


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path, read_recipe("sft", "quickstart"), "")


def entries(step: int, *rewards: float, **by_source: list[float]) -> list[dict]:
    prompt = Prompt((Message("system", "Add."), Message("user", "1 + 1?")), (1, 2), "q.jsonl:3", "2")
    names = {name: np.array(values) for name, values in by_source.items()} or {"right": np.array(rewards)}
    scores = RewardScores(np.array(rewards), names)
    count = len(rewards)
    return rollout_entries(step, [prompt] * count, ["2"] * count, scores, [True] * count)


def test_an_entry_has_all_that_is_known(run: RunDirectory) -> None:
    append_rollouts(run, entries(1, 1.5, right=[1.0], brief=[0.5]))
    assert run.read_jsonl(ROLLOUTS) == [
        {
            "step": 1,
            "location": "q.jsonl:3",
            "prompt": "Add.\n1 + 1?",
            "completion": "2",
            "ended_with_eos": True,
            "reward": 1.5,
            "rewards": {"right": 1.0, "brief": 0.5},
        }
    ]


def test_the_older_half_is_dropped_above_the_size(run: RunDirectory) -> None:
    for step in range(1, 9):
        append_rollouts(run, entries(step, 1.0, 2.0), max_bytes=1000)
        assert (run.path / ROLLOUTS).stat().st_size <= 1000
    steps = [entry["step"] for entry in run.read_jsonl(ROLLOUTS)]
    assert steps[-2:] == [8, 8] and 1 not in steps and steps == sorted(steps)
    append_rollouts(run, entries(9, *range(20)), max_bytes=1000)
    kept = [entry["reward"] for entry in run.read_jsonl(ROLLOUTS)]
    assert kept[-1] == 19 and 0 < len(kept) < 20, "one step may be larger than the limit"


def test_a_resumed_run_has_each_step_once(run: RunDirectory) -> None:
    for step in (1, 2, 3):
        append_rollouts(run, entries(step, 1.0))
    with (run.path / ROLLOUTS).open("a") as stream:
        stream.write('{"step": 3, "comp')  # killed while it wrote
    run.truncate_after(2)
    append_rollouts(run, entries(3, 1.0))
    assert [entry["step"] for entry in run.read_jsonl(ROLLOUTS)] == [1, 2, 3]


def test_a_round_that_runs_again_replaces_its_own(run: RunDirectory) -> None:
    replace_rollouts(run, entries(1, 1.0))
    replace_rollouts(run, entries(2, 2.0))
    replace_rollouts(run, entries(2, 3.0, 4.0))
    assert [entry["reward"] for entry in run.read_jsonl(ROLLOUTS)] == [1.0, 3.0, 4.0]


def test_equal_rewards_name_the_function(run: RunDirectory) -> None:
    assert equal_rewards_finding(run, ["right"]) is None, "nothing was sampled"
    append_rollouts(run, entries(1, 0.0, 0.0, 0.0))
    finding = equal_rewards_finding(run, ["right", "brief"])
    assert finding is not None
    assert finding.evidence == "all 3 sampled completions have reward 0 (right and brief)"
    assert "check right and brief on the completions in rollouts.jsonl" in finding.action
    [warning] = check_equal_rewards([0.0, 0.0], ["right"])
    assert warning.warned and "all 2 first completions have reward 0 (right)" in warning.detail
    append_rollouts(run, entries(2, 1.0))
    assert equal_rewards_finding(run, ["right"]) is None
    assert check_equal_rewards([0.0, 1.0], ["right"]) == check_equal_rewards([1.0], ["right"]) == []

"""Rewards: equal to `llm-align score`, weighted and combined; on the policy's base or on their own."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reward_sections import rewards, talk

from align.reward.scorer import TOTAL, load_reward
from align.reward.shared_base import same_weights
from align.rl.rewards.loading import load_rewards, rewards_record
from align.rl.rewards.rewards import Rewards
from align.rl.rewards.settings import RewardsSettings
from finetune.planning.hardware import detect
from finetune.recipe.errors import UserError
from finetune.recipe.settings import ModelSettings
from finetune.training.model import load_base, load_tokenizer
from finetune.training.stops import NotFiniteError

pytestmark = pytest.mark.filterwarnings("ignore")
TALKS = [talk("Add the numbers. 1", text) for text in ("good 1", "evil 4", "")] + [talk("Say it.", "good")]
PLACES = [f"prompt {number}" for number in range(len(TALKS))]


def loaded(section: RewardsSettings, base: Path, **how: str) -> Rewards:
    settings = ModelSettings(base=str(base))
    given = {"precision": "float32", "quantization": "none"} | how
    shared = load_base(settings, hardware=detect(), **given)
    return load_rewards(section, base=shared, tokenizer=load_tokenizer(settings))


def by_reward_model(run: Path) -> dict[str, np.ndarray]:
    model = load_reward(run)
    found = model.score_talks(TALKS, PLACES)
    return {name: np.asarray(values) for name, values in ({**found, **model.normalised(found)}).items()}


def test_on_the_policy_s_base_a_model_says_what_it_says_alone(lone_run: Path, base_folder: Path) -> None:
    ours, alone = loaded(rewards(str(lone_run)), base_folder), by_reward_model(lone_run)
    judged = ours.judge(TALKS, PLACES)
    assert judged.total == pytest.approx(alone[TOTAL], abs=1e-5) and ours.notes == []
    assert ours.names == ["reward"] == list(judged.parts)
    own = load_rewards(rewards(str(lone_run)), base=None, tokenizer=ours.tokenizer)
    assert own.judge(TALKS, PLACES).total == pytest.approx(alone[TOTAL], abs=1e-6)


def test_several_scores_of_one_run_are_loaded_once(two_headed: Path, base_folder: Path) -> None:
    parts = [{"run": str(two_headed), "score": score} for score in ("helpfulness", "safety")]
    ours = loaded(rewards({**parts[0], "weight": 2.0}, {**parts[1], "weight": -0.5}), base_folder)
    assert len(ours.models) == 1 and ours.names == ["helpfulness", "safety"]
    alone, judged = by_reward_model(two_headed), ours.judge(TALKS, PLACES)
    for name in ours.names:
        assert judged.parts[name] == pytest.approx(alone[name], abs=1e-5)
    assert judged.total == pytest.approx(2.0 * alone["helpfulness"] - 0.5 * alone["safety"], abs=1e-5)


def test_no_second_copy_of_the_base_s_weights(lone_run: Path, two_headed: Path, base_folder: Path) -> None:
    settings = ModelSettings(base=str(base_folder))
    base = load_base(settings, precision="float32", quantization="none", hardware=detect())
    known = {weight.data_ptr() for weight in same_weights(base).parameters()}
    section = rewards(str(lone_run), {"run": str(two_headed), "name": "both"})
    found = load_rewards(section, base=base, tokenizer=load_tokenizer(settings))
    for model in found.models:
        own = [name for name, weight in model.model.named_parameters() if weight.data_ptr() not in known]
        assert own and all("lora_" in name or "score" in name for name in own)


def test_a_run_of_the_whole_model_brings_its_own_weights(whole_run: Path, base_folder: Path) -> None:
    judged = loaded(rewards(str(whole_run)), base_folder).judge(TALKS, PLACES)
    assert judged.total == pytest.approx(by_reward_model(whole_run)[TOTAL], abs=1e-5)


def test_programs_and_length_stand_beside_what_is_learnt(
    lone_run: Path, rewards_folder: Path, base_folder: Path
) -> None:
    program = {"function": f"{rewards_folder}/programs.py:good", "weight": 3.0}
    watched = {"function": f"{rewards_folder}/programs.py:brief", "weight": 0.0}
    section = rewards(str(lone_run), program, watched, length_penalty=0.5, length_free=2)
    ours = loaded(section, base_folder)
    judged = ours.judge(TALKS, PLACES)
    assert ours.names == ["reward", "good", "brief", "length_penalty"] == list(judged.parts)
    assert judged.parts["good"].tolist() == [1, 0, 0, 1]
    tokens = [len(ours.tokenizer(one[-1].content, add_special_tokens=False)["input_ids"]) for one in TALKS]
    cost = [-0.5 * max(0, number - 2) for number in tokens]
    assert judged.parts["length_penalty"].tolist() == cost and min(cost) < 0 == cost[2]
    expected = judged.parts["reward"] + 3 * judged.parts["good"] + np.asarray(cost)
    assert judged.total == pytest.approx(expected)


def test_an_empty_reply_has_a_score_whatever_stands_beside_it(lone_run: Path, base_folder: Path) -> None:
    ours = loaded(rewards(str(lone_run)), base_folder)
    together = ours.judge(TALKS, PLACES).total
    assert np.isfinite(together[2]) and together[2] != together[0]
    assert ours.judge([TALKS[2]], PLACES[:1]).total == pytest.approx(together[2:3], abs=1e-5)
    nothing = ours.judge([], [])
    assert nothing.total.shape == (0,) and nothing.parts["reward"].shape == (0,)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("broken", "ZeroDivisionError"),
        ("nan", "it returned nan"),
        ("text", "it returned 'good 1'"),
    ],
)
def test_a_program_that_fails_is_named_with_prompt_and_reply(
    name: str, told: str, rewards_folder: Path, base_folder: Path
) -> None:
    ours = loaded(rewards(f"{rewards_folder}/programs.py:{name}"), base_folder)
    with pytest.raises(UserError) as error:
        ours.judge(TALKS, PLACES)
    [problem] = error.value.problems
    assert problem.where.startswith(f"reward '{name}' on prompt ") and told in problem.found
    assert "prompt 'Add the numbers. 1', reply" in problem.found


def test_rewards_are_tried_on_empty_replies_before_anything_is_drawn(
    lone_run: Path, rewards_folder: Path, base_folder: Path
) -> None:
    prompts = [one[:-1] for one in TALKS]
    ours = loaded(rewards(str(lone_run), f"{rewards_folder}/programs.py:good"), base_folder)
    told = ours.tick(prompts, PLACES)
    assert told.problem is None and told.detail.startswith("reward, good: empty replies to 4 prompts score ")
    broken = loaded(rewards(f"{rewards_folder}/programs.py:broken"), base_folder)
    with pytest.raises(UserError, match="reward 'broken' on prompt 0: ZeroDivisionError"):
        broken.tick(prompts, PLACES)


def test_a_reward_model_that_gives_no_number_is_named(lone_run: Path, base_folder: Path) -> None:
    ours = loaded(rewards(str(lone_run)), base_folder)
    for weight in ours.models[0].model.parameters():
        weight.data.fill_(float("nan")) if weight.shape[0] == 1 else None
    with pytest.raises(NotFiniteError, match="reward 'reward' is nan on prompt 0"):
        ours.judge(TALKS, PLACES)


def test_llama_2_takes_safety_for_risky_prompts_and_unsafe_replies(
    two_headed: Path, rewards_folder: Path, base_folder: Path
) -> None:
    parts = [{"run": str(two_headed), "score": score} for score in ("safety", "helpfulness")]
    asks = f"{rewards_folder}/programs.py:asks"
    talks = [talk("Add.", "good 1"), talk("danger", "good 1"), talk("Add.", "evil 3")]
    for below, by_threshold in ((1e-30, [False] * 3), (1 - 1e-15, [True] * 3)):
        section = rewards(*parts, combine="llama2", risky=asks, risky_below=below)
        judged = loaded(section, base_folder).judge(talks, PLACES[:3])
        names = ["safety" if risky else "helpfulness" for risky in by_threshold]
        names[1] = "safety"
        assert judged.total.tolist() == [judged.parts[name][row] for row, name in enumerate(names)]


@pytest.mark.parametrize(("precision", "quantization"), [("bfloat16", "none"), ("float32", "nf4")])
def test_a_base_that_is_stored_otherwise_is_told(
    lone_run: Path, base_folder: Path, precision: str, quantization: str
) -> None:
    [note] = loaded(rewards(str(lone_run)), base_folder, precision=precision, quantization=quantization).notes
    assert str(lone_run) in note and "trained on a base in float32" in note
    assert (precision if quantization == "none" else "in nf4 computed in") in note


def test_damaged_weights_are_told_before_anything_is_loaded(
    lone_run: Path, base_folder: Path, tmp_path: Path
) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(lone_run, copy)
    weights = copy / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="checksum mismatch: adapter/adapter_model.safetensors"):
        loaded(rewards(str(copy)), base_folder)


def test_the_record_names_runs_and_programs(lone_run: Path, rewards_folder: Path) -> None:
    found: list[dict[str, Any]] = rewards_record(rewards(str(lone_run), f"{rewards_folder}/programs.py:good"))
    assert found[0]["run"] == str(lone_run) and found[0]["files"] and found[0]["score"] == "total"
    assert found[1] == {"name": "good", "weight": 1.0, "function": f"{rewards_folder}/programs.py:good"}

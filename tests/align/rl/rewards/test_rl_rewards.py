"""Rewards: equal to `llm-align score`, weighted and combined; on the policy's base or on their own."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reward_sections import conversation, rewards

from align.reward.scorer import TOTAL, load_reward_model
from align.reward.shared_base import copy_sharing_weights
from align.rl.rewards.loading import load_rewards, rewards_record
from align.rl.rewards.rewards import Rewards
from align.rl.rewards.settings import RewardsSettings
from finetune.distributed.hardware import detect_hardware
from finetune.distributed.interrupts import NotFiniteError
from finetune.recipe.errors import UserError
from finetune.recipe.settings import ModelSettings
from finetune.training.model import load_base, load_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")
CONVERSATIONS = [conversation("Add the numbers. 1", text) for text in ("good 1", "evil 4", "")] + [
    conversation("Say it.", "good")
]
LOCATIONS = [f"prompt {number}" for number in range(len(CONVERSATIONS))]


def load_on_base(section: RewardsSettings, base: Path, **how: str) -> Rewards:
    settings = ModelSettings(base=str(base))
    given = {"precision": "float32", "quantization": "none"} | how
    shared = load_base(settings, hardware=detect_hardware(), **given)
    return load_rewards(section, base=shared, tokenizer=load_tokenizer(settings))


def scores_of_reward_model(run: Path) -> dict[str, np.ndarray]:
    model = load_reward_model(run)
    scores = model.score_conversations(CONVERSATIONS, LOCATIONS)
    return {name: np.asarray(values) for name, values in ({**scores, **model.normalized(scores)}).items()}


def test_reward_model_on_the_policy_base_scores_as_standalone(lone_run: Path, base_folder: Path) -> None:
    shared, expected = load_on_base(rewards(str(lone_run)), base_folder), scores_of_reward_model(lone_run)
    scores = shared.score(CONVERSATIONS, LOCATIONS)
    assert scores.total == pytest.approx(expected[TOTAL], abs=1e-5) and shared.notes == []
    assert shared.names == ["reward"] == list(scores.by_source)
    standalone = load_rewards(rewards(str(lone_run)), base=None, tokenizer=shared.tokenizer)
    assert standalone.score(CONVERSATIONS, LOCATIONS).total == pytest.approx(expected[TOTAL], abs=1e-6)


def test_several_scores_of_one_run_load_it_once(two_headed: Path, base_folder: Path) -> None:
    sources = [{"run": str(two_headed), "score": score} for score in ("helpfulness", "safety")]
    shared = load_on_base(rewards({**sources[0], "weight": 2.0}, {**sources[1], "weight": -0.5}), base_folder)
    assert len(shared.models) == 1 and shared.names == ["helpfulness", "safety"]
    expected, scores = scores_of_reward_model(two_headed), shared.score(CONVERSATIONS, LOCATIONS)
    for name in shared.names:
        assert scores.by_source[name] == pytest.approx(expected[name], abs=1e-5)
    assert scores.total == pytest.approx(2.0 * expected["helpfulness"] - 0.5 * expected["safety"], abs=1e-5)


def test_base_weights_are_shared(lone_run: Path, two_headed: Path, base_folder: Path) -> None:
    settings = ModelSettings(base=str(base_folder))
    base = load_base(settings, precision="float32", quantization="none", hardware=detect_hardware())
    base_pointers = {weight.data_ptr() for weight in copy_sharing_weights(base).parameters()}
    section = rewards(str(lone_run), {"run": str(two_headed), "name": "both"})
    loaded_rewards = load_rewards(section, base=base, tokenizer=load_tokenizer(settings))
    for model in loaded_rewards.models:
        own_params = [
            name for name, weight in model.model.named_parameters() if weight.data_ptr() not in base_pointers
        ]
        assert own_params and all("lora_" in name or "score" in name for name in own_params)


def test_fully_fine_tuned_reward_model_has_its_own_weights(whole_run: Path, base_folder: Path) -> None:
    scores = load_on_base(rewards(str(whole_run)), base_folder).score(CONVERSATIONS, LOCATIONS)
    assert scores.total == pytest.approx(scores_of_reward_model(whole_run)[TOTAL], abs=1e-5)


def test_reward_functions_and_length_penalty_add_to_reward_models(
    lone_run: Path, rewards_folder: Path, base_folder: Path
) -> None:
    function = {"function": f"{rewards_folder}/programs.py:good", "weight": 3.0}
    logged_only = {"function": f"{rewards_folder}/programs.py:brief", "weight": 0.0}
    section = rewards(str(lone_run), function, logged_only, length_penalty=0.5, length_free=2)
    loaded_rewards = load_on_base(section, base_folder)
    scores = loaded_rewards.score(CONVERSATIONS, LOCATIONS)
    assert loaded_rewards.names == ["reward", "good", "brief", "length_penalty"] == list(scores.by_source)
    assert scores.by_source["good"].tolist() == [1, 0, 0, 1]
    tokens = [
        len(loaded_rewards.tokenizer(conversation[-1].content, add_special_tokens=False)["input_ids"])
        for conversation in CONVERSATIONS
    ]
    cost = [-0.5 * max(0, count - 2) for count in tokens]
    assert scores.by_source["length_penalty"].tolist() == cost and min(cost) < 0 == cost[2]
    expected = scores.by_source["reward"] + 3 * scores.by_source["good"] + np.asarray(cost)
    assert scores.total == pytest.approx(expected)


def test_empty_completion_score_is_independent_of_the_batch(lone_run: Path, base_folder: Path) -> None:
    loaded_rewards = load_on_base(rewards(str(lone_run)), base_folder)
    batched = loaded_rewards.score(CONVERSATIONS, LOCATIONS).total
    assert np.isfinite(batched[2]) and batched[2] != batched[0]
    assert loaded_rewards.score([CONVERSATIONS[2]], LOCATIONS[:1]).total == pytest.approx(
        batched[2:3], abs=1e-5
    )
    empty = loaded_rewards.score([], [])
    assert empty.total.shape == (0,) and empty.by_source["reward"].shape == (0,)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("broken", "ZeroDivisionError"),
        ("nan", "it returned nan"),
        ("text", "it returned 'good 1'"),
    ],
)
def test_failing_reward_function_names_prompt_and_completion(
    name: str, message: str, rewards_folder: Path, base_folder: Path
) -> None:
    loaded_rewards = load_on_base(rewards(f"{rewards_folder}/programs.py:{name}"), base_folder)
    with pytest.raises(UserError) as error:
        loaded_rewards.score(CONVERSATIONS, LOCATIONS)
    [problem] = error.value.problems
    assert problem.where.startswith(f"reward '{name}' on prompt ") and message in problem.actual
    assert "prompt 'Add the numbers. 1', completion" in problem.actual


def test_rewards_are_checked_on_empty_completions_before_sampling(
    lone_run: Path, rewards_folder: Path, base_folder: Path
) -> None:
    prompts = [conversation[:-1] for conversation in CONVERSATIONS]
    loaded_rewards = load_on_base(rewards(str(lone_run), f"{rewards_folder}/programs.py:good"), base_folder)
    result = loaded_rewards.check(prompts, LOCATIONS)
    assert result.problem is None and result.detail.startswith(
        "reward, good: empty completions of 4 prompts score "
    )
    broken = load_on_base(rewards(f"{rewards_folder}/programs.py:broken"), base_folder)
    with pytest.raises(UserError, match="reward 'broken' on prompt 0: ZeroDivisionError"):
        broken.check(prompts, LOCATIONS)


def test_nan_reward_model_is_named(lone_run: Path, base_folder: Path) -> None:
    loaded_rewards = load_on_base(rewards(str(lone_run)), base_folder)
    for weight in loaded_rewards.models[0].model.parameters():
        weight.data.fill_(float("nan")) if weight.shape[0] == 1 else None
    with pytest.raises(NotFiniteError, match="reward 'reward' is nan on prompt 0"):
        loaded_rewards.score(CONVERSATIONS, LOCATIONS)


def test_llama2_uses_safety_for_unsafe_prompts_and_completions(
    two_headed: Path, rewards_folder: Path, base_folder: Path
) -> None:
    sources = [{"run": str(two_headed), "score": score} for score in ("safety", "helpfulness")]
    unsafe_prompt_fn = f"{rewards_folder}/programs.py:asks"
    conversations = [
        conversation("Add.", "good 1"),
        conversation("danger", "good 1"),
        conversation("Add.", "evil 3"),
    ]
    for below, by_threshold in ((1e-30, [False] * 3), (1 - 1e-15, [True] * 3)):
        section = rewards(
            *sources, combine="llama2", unsafe_prompt_fn=unsafe_prompt_fn, safety_threshold=below
        )
        scores = load_on_base(section, base_folder).score(conversations, LOCATIONS[:3])
        names = ["safety" if is_unsafe else "helpfulness" for is_unsafe in by_threshold]
        names[1] = "safety"
        assert scores.total.tolist() == [scores.by_source[name][row] for row, name in enumerate(names)]


@pytest.mark.parametrize(("precision", "quantization"), [("bfloat16", "none"), ("float32", "nf4")])
def test_other_storage_of_the_base_is_reported(
    lone_run: Path, base_folder: Path, precision: str, quantization: str
) -> None:
    [note] = load_on_base(
        rewards(str(lone_run)), base_folder, precision=precision, quantization=quantization
    ).notes
    assert str(lone_run) in note and "trained on a base in float32" in note
    assert (precision if quantization == "none" else "in nf4 computed in") in note


def test_corrupt_weights_are_reported_before_loading(
    lone_run: Path, base_folder: Path, tmp_path: Path
) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(lone_run, copy)
    weights = copy / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="checksum mismatch: adapter/adapter_model.safetensors"):
        load_on_base(rewards(str(copy)), base_folder)


def test_record_names_reward_runs_and_functions(lone_run: Path, rewards_folder: Path) -> None:
    entries: list[dict[str, Any]] = rewards_record(
        rewards(str(lone_run), f"{rewards_folder}/programs.py:good")
    )
    assert entries[0]["run"] == str(lone_run) and entries[0]["files"] and entries[0]["score"] == "total"
    assert entries[1] == {"name": "good", "weight": 1.0, "function": f"{rewards_folder}/programs.py:good"}

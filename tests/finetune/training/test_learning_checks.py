"""A run that learned nothing fails at its end, keeps its files, and says what did not move."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from fixture_types import Tune
from torch import nn

from finetune.recipe.errors import CheckFailedError, Problem
from finetune.training.preflight.learning_checks import (
    TrainedChecksums,
    check_learning,
    trained_checksums,
    unmoved_layers,
)

STEPS = [{"step": 1, "learning_rate": 1e-3, "grad_norm": 0.5}, {"step": 2, "learning_rate": 2e-3}]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_checksum_changes_with_any_bit_of_any_element(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Linear(16, 8, bias=False, dtype=dtype)
    original = model.weight.detach().clone()
    before = trained_checksums(model, model)
    assert trained_checksums(model, model) == before

    def is_noticed(changed: torch.Tensor) -> bool:
        with torch.no_grad():
            model.weight.copy_(changed)
        return bool(unmoved_layers(before, trained_checksums(model, model)) == {})

    for index in (0, 77, 127):
        one = original.clone()
        one.view(-1)[index] = torch.nextafter(one.view(-1)[index].float(), torch.tensor(9.0)).to(dtype) + 0.01
        assert is_noticed(one)
    # One unit in the last place up in one element and down in another cancels in a plain sum of bits.
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[original.element_size()]
    bits = original.clone().view(integers)
    bits[0, 0] += 1
    bits[3, 5] -= 1
    assert is_noticed(bits.view(dtype)) and is_noticed(original.flip(0)) and not is_noticed(original)


def checksums(layers: dict[str, list[str]], policy: set[str] | None = None) -> TrainedChecksums:
    names = [name for members in layers.values() for name in members]
    return TrainedChecksums(dict.fromkeys(names, 1), layers, frozenset(names if policy is None else policy))


LORA = {"q_proj": ["q_proj.A", "q_proj.B"], "v_proj": ["v_proj.A", "v_proj.B"]}
PPO = {"policy.q": ["policy.q.A", "policy.q.B"], "value.head": ["value.head"]}
POLICY = set(PPO["policy.q"])
LOSS = {"eval/loss_before": 2.0, "eval/loss_after": 1.5}
OK = "training changed all 2 layers with 4 trained tensors"


@pytest.mark.parametrize(
    ("before", "moved", "metrics", "expected"),
    [
        (checksums(LORA), ["q_proj.B", "v_proj.A"], LOSS, OK),
        (checksums(LORA), ["q_proj.B", "v_proj.B"], {}, OK),
        (checksums(LORA), ["q_proj.A"], LOSS, "2 of 4 trained tensors did not change: v_proj.A, v_proj.B"),
        (
            checksums(LORA),
            [],
            LOSS,
            "none of the 4 trained tensors changed (q_proj.A, q_proj.B, v_proj.A and",
        ),
        (checksums(PPO, POLICY), ["policy.q.B", "value.head"], {}, "all 2 layers with 3 trained tensors"),
        (checksums(PPO, POLICY), ["value.head"], {}, "none of the 2 trained tensors of the policy changed"),
        (checksums(PPO, POLICY), ["policy.q.A"], {}, "1 of 3 trained tensors did not change: value.head"),
        (checksums(LORA), ["q_proj.B", "v_proj.B"], LOSS | {"eval/loss_after": 2.0}, "the same eval/loss"),
        # Rewards of few completions may well be equal; the entropy under other weights is not.
        (
            checksums(LORA),
            ["q_proj.B", "v_proj.B"],
            {f"eval/{name}_{when}": 1.0 for name in ("objective/reward",) for when in ("before", "after")},
            OK,
        ),
        (
            checksums(LORA),
            ["q_proj.B", "v_proj.B"],
            {"eval/policy/entropy_before": 2.5, "eval/policy/entropy_after": 2.5},
            "the same eval/policy/entropy",
        ),
    ],
)
def test_what_moved_decides(
    before: TrainedChecksums, moved: list[str], metrics: dict[str, float], expected: str
) -> None:
    after = TrainedChecksums({**before.by_name, **dict.fromkeys(moved, 2)}, before.layers, before.policy)
    result = check_learning(before, unmoved_layers(before, after), metrics=metrics, entries=STEPS)
    assert expected in result.detail
    fails = "none of" in expected or "the same" in expected
    assert (result.problem is not None) == fails
    assert result.warned == ("did not change:" in expected)
    if result.problem:
        assert "2 steps, learning rate at most 0.002, gradient norm at most 0.5" in result.problem.actual
        assert "raise train.learning_rate" in result.problem.repair


def test_zero_gradients_are_the_reason() -> None:
    before = checksums(LORA)
    entries = [{"step": 3, "grad_norm": 0.0, "learning_rate": 1e-3}]
    problem = check_learning(before, LORA, metrics={}, entries=entries).problem
    assert problem is not None and problem.repair.startswith("every gradient was 0")


@pytest.mark.parametrize("engine", ["native", "trl"])
def test_a_run_that_learned_nothing_keeps_its_files_and_is_failed(
    engine: str, tune: Tune, tmp_path: Path
) -> None:
    # Adam's first step is the learning rate: of weights near 0.02 it changes no bit in float32.
    settings = {"train__learning_rate": 1e-12, "adapter__method": "layernorm", "train__engine": engine}
    for _ in range(2):  # the same command resumes after the last step, and fails as before
        with pytest.raises(CheckFailedError, match="nothing was learned: none of the") as error:
            tune("run", **settings)
        assert "raise train.learning_rate" in str(error.value) and "learning rate at most 1e-12" in str(
            error.value
        )
        record = json.loads((tmp_path / "run" / "run.json").read_text())
        assert record["status"] == "failed" and "nothing was learned" in record["error"]
        assert record["preflight"][-1] == record["preflight"][-1] | {"name": "learning", "passed": False}
        assert list((tmp_path / "run" / "adapter").glob("*.safetensors"))
        assert len((tmp_path / "run" / "samples.jsonl").read_text().splitlines()) == 2


def test_weights_that_moved_without_an_effect_are_a_failure_too(tune: Tune) -> None:
    # B moves from 0 to 1e-12: the loss of the held-out rows is the same to the last bit.
    with pytest.raises(CheckFailedError, match="the held-out rows give the same eval/loss, bit for bit"):
        tune("run", train__learning_rate=1e-12)


@pytest.mark.parametrize("engine", ["native", "trl"])
@pytest.mark.parametrize("steps", [1, 2])
def test_a_run_of_one_step_learns(steps: int, engine: str, tune: Tune) -> None:
    result = tune("run", train__max_steps=steps, train__engine=engine)
    rates = [entry["learning_rate"] for entry in result.metrics if "learning_rate" in entry]
    assert rates[0] == 1e-2 and len(rates) == steps
    metrics = result.record["metrics"]
    assert metrics["eval/loss_after"] != metrics["eval/loss_before"]
    assert result.record["preflight"][-1]["name"] == "learning" and result.record["steps"] == steps


def test_the_error_survives_between_processes() -> None:
    error = pickle.loads(pickle.dumps(CheckFailedError(Problem("train", "nothing", "something"))))
    assert type(error) is CheckFailedError and str(error) == "train: nothing\n    expected: something"

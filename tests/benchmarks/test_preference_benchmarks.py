"""The preference benchmarks on a model of two narrow layers: all contenders compute the same."""

import math

import pytest
from click.testing import CliRunner

from benchmarks import dpo, prompt_share
from benchmarks.common import adapted_llama, times_slower


@pytest.fixture(scope="module")
def work() -> dpo.DpoWork:
    return dpo.build_work(dpo.EMBEDDED_PREFERENCES, 4, 2, bfloat16=False, small=True)


def test_native_and_trl_logps_are_equal(work: dpo.DpoWork) -> None:
    differences = dpo.logp_differences(work)
    assert differences.keys() == {"policy", "reference"}
    assert max(differences.values()) < 1e-5


def test_contenders_share_data_and_initial_weights(work: dpo.DpoWork) -> None:
    runs = {contender: dpo.run_contender(work, contender) for contender in dpo.CONTENDERS}
    for contender, measured in runs.items():
        assert measured["first_losses"][0] == pytest.approx(math.log(2), abs=1e-5), contender
        assert len(measured["first_losses"]) == 2 and measured["seconds"] > 0, contender
    assert runs["native"]["first_losses"][1] == pytest.approx(
        runs["native-separate"]["first_losses"][1], abs=1e-5
    )
    assert runs["native"]["first_losses"][1] != pytest.approx(math.log(2), abs=1e-4), "a step was taken"


def test_ratios_are_within_a_repeat() -> None:
    """Repeat 0: 2 s and 6 s; repeat 1, on a machine that is twice as slow: 4 s and 12 s; the ratio is 3."""
    seconds = [(0, "a", 2.0), (0, "b", 6.0), (1, "b", 12.0), (1, "a", 4.0)]
    runs = [
        {"repeat": repeat, "contender": contender, "seconds": elapsed}
        for repeat, contender, elapsed in seconds
    ]
    assert times_slower(runs, ("a", "b")) == {"b": 3.0}


def test_shared_prompt_tokens_are_counted_once() -> None:
    model = adapted_llama(bfloat16=False, hidden_size=64, layers=1)
    point = prompt_share.measure_layouts(model, 48, 4, total=64, repeats=1)
    assert point["tokens"] == {"shared": 48 + 4 * 16, "separate": 4 * 64}
    assert point["token_ratio"] == pytest.approx(256 / 112)
    assert point["time_ratio"] > 0 and point["logps_differ_by"] < 1e-5


def test_prompt_share_prints_one_line_per_point() -> None:
    outcome = CliRunner().invoke(prompt_share.main, ["--small", "--repeats", "1"], catch_exceptions=False)
    lines = outcome.output.splitlines()
    assert len(lines) == len(prompt_share.PROMPT_LENGTHS) * len(prompt_share.COMPLETION_COUNTS)
    assert lines[0].startswith("K = 2, prompt 8 of 64: tokens 1.07x, time ")

"""Each piece of advice of a finding is followed to the letter, and what it complains about improves."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from advice_cases import AS_PRINTED, DPO, MEASURES, REWARD, SFT, Advice, Fault
from advice_rl_cases import PPO, REJECTION
from advice_runs import Workshop

from finetune.training.result import Result

FAULTS = (*SFT, *DPO, *REWARD, *PPO, *REJECTION)
ROOT = Path(__file__).parents[2]
SOURCES = (
    "finetune/training/curve_findings.py",
    "align/dpo/diagnostics.py",
    "align/ppo/diagnostics.py",
    "align/rejection/diagnostics.py",
    "align/reward/diagnostics.py",
    "align/rl/reward_finding.py",
    "align/rl/first_completions.py",
)
NOT_FOLLOWED = {
    # Followed in test_first_completions.py, by numbers.
    "ppo.missing_eos_reward",
    # What is not set by a key, or is no advice on a fault: where a curve turns, which column is cut.
    "train.evaluate_every",
    "data.max_length",
    # The toy does not reach these faults reliably: growth of completions that still end.
    *("rewards.length_penalty", "stop.max_length_ratio"),
    # With one epoch of one minibatch no ratio is clipped, by its definition.
    *("train.batch_size", "ppo.rollout_size"),
    # Only where each group of completions has equal rewards, which TRL's KL term hides.
    "sampling.num_generations",
}
"""Keys of the advice that no case here follows, with the reason."""
KEY = re.compile(
    r"\b(?:train|data|evaluate|dpo|ppo|rewards|sampling|rejection|stop)\.[a-z_]+(?:\.[a-z_]+)?\b"
)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("advice"))


def cases() -> Iterator[object]:
    for fault in FAULTS:
        for advice in fault.advice:
            marks = [pytest.mark.slow] if advice.slow else []
            yield pytest.param(
                fault, advice, marks=marks, id=f"{fault.stage} {fault.finding}: {advice.words}"
            )


def printed_advice(result: Result, name: str) -> str:
    """Return what a run prints about a fault; the findings are part of its record."""
    findings = [entry["action"] for entry in result.record["diagnostics"] if entry["name"] == name]
    checks = [
        entry["detail"] for entry in result.record["preflight"] if entry["name"] == name and entry["warned"]
    ]
    assert len(findings + checks) == 1, f"{name}: {result.record['diagnostics']}"
    return str((findings + checks)[0])


def measure(result: Result, name: str) -> float:
    return MEASURES[name](result) if name in MEASURES else float(result.record["metrics"][name])


@pytest.mark.parametrize(("fault", "advice"), cases())
def test_following_the_advice_improves_what_it_complains_about(
    workshop: Workshop, fault: Fault, advice: Advice
) -> None:
    faulty = workshop.run(fault.stage, fault.settings)
    text = printed_advice(faulty, fault.finding)
    assert advice.words in text
    steps = re.search(r"train\.max_steps=(\d+)", text)
    followed = {"train.max_steps": int(steps[1])} if advice.words == AS_PRINTED and steps else advice.followed
    assert followed
    better = workshop.run(fault.stage, fault.settings | followed)
    before, after = (measure(result, fault.metric) for result in (faulty, better))
    assert (after - before) * fault.better > 0, f"{fault.metric}: {before} -> {after}"


def test_every_key_of_the_advice_is_followed_in_a_case() -> None:
    named = set()
    for source in SOURCES:
        texts = ast.walk(ast.parse((ROOT / source).read_text(encoding="utf-8")))
        named |= {
            key
            for node in texts
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and "\n" not in node.value
            for key in KEY.findall(node.value)
        }
    followed = {key for fault in FAULTS for advice in fault.advice for key in KEY.findall(advice.words)}
    settings = {key for fault in FAULTS for advice in fault.advice for key in advice.followed}
    assert sorted(named - followed - settings - NOT_FOLLOWED) == []

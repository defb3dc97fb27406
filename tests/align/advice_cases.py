"""Faults of runs, the advice that their findings print, and the number that following it improves."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from advice_runs import FULL

from finetune.training.findings import count_repeating
from finetune.training.result import Result

Settings = dict[str, Any]
AS_PRINTED = "train.max_steps="
"""Stands for the number of steps that the advice names."""


@dataclass(frozen=True)
class Advice:
    """One piece of advice, followed to the letter.

    Attributes:
        words: part of the advice as it is printed.
        followed: the changed settings.
        slow: whether it is not in the default tier.
    """

    words: str
    followed: Settings
    slow: bool = True


@dataclass(frozen=True)
class Fault:
    """A run with a fault.

    Attributes:
        stage: its stage.
        settings: its settings.
        finding: name of the finding or check.
        metric: what the finding complains about, in run.json or in ``MEASURES``.
        better: 1 if a higher value is better, -1 if a lower one is.
        advice: all that is suggested.
    """

    stage: str
    settings: Settings
    finding: str
    metric: str
    better: int
    advice: tuple[Advice, ...]


def _growth(result: Result) -> float:
    """Return the ratio of completion lengths, after to before training, or its inverse if that is larger."""
    before, after = (sum(len(row[when].split()) for row in result.samples) for when in ("before", "after"))
    return max((after + 1) / (before + 1), (before + 1) / (after + 1))


def _zero_gradients(result: Result) -> float:
    norms = [line["grad_norm"] for line in result.metrics if "grad_norm" in line]
    return sum(norm == 0 for norm in norms) / len(norms)


MEASURES: dict[str, Callable[[Result], float]] = {
    "growth": _growth,
    "zero gradients": _zero_gradients,
    "accuracy gap": lambda result: (
        result.record["metrics"]["rewards/accuracies_after"]
        - result.record["metrics"]["eval/rewards/accuracies_after"]
    ),
    "repeating": lambda result: count_repeating([row["after"] for row in result.samples]),
    "equal rewards": lambda result: result.record["rounds"]["1"]["objective/frac_reward_zero_std"],
}

RANDOM = {"letters": ["abcdefgh", "abcdefgh"]}
LOW, LOWER = {"train.learning_rate": 1e-3}, "lower train.learning_rate"
DIVERGING = {"adapter": FULL, "train.learning_rate": 1.0, "train.max_steps": 8}
OVERFITTING = {
    "adapter": FULL,
    "rows": {"number": 40},
    "train.max_steps": 40,
    "train.evaluate_every": 5,
}
SHORT_EPOCHS = {"train.max_steps": None, "train.epochs": 12}
NOISE = {"rows": RANDOM, "train.learning_rate": 0.03, "train.max_steps": 60}
LOOPING = {"train.learning_rate": 0.05, "train.max_steps": 60}
SFT = (
    Fault(
        "sft",
        DIVERGING,
        "loss",
        "loss_after",
        -1,
        (
            Advice(LOWER, {"train.learning_rate": 1e-2}, slow=False),
            Advice("a longer train.warmup", {"train.warmup": 0.9}),
        ),
    ),
    Fault("sft", DIVERGING, "held-out loss", "eval/loss_after", -1, (Advice(LOWER, LOW),)),
    Fault(
        "sft",
        OVERFITTING,
        "held-out loss",
        "eval/loss_after",
        -1,
        (
            Advice(LOWER, LOW),
            Advice("more rows", {"rows": {"number": 512}}),
        ),
    ),
    Fault(
        "sft",
        OVERFITTING | SHORT_EPOCHS | {"train.epochs": 80, "train.evaluate_every": None},
        "held-out loss",
        "eval/loss_after",
        -1,
        (Advice("fewer train.epochs", {"train.epochs": 4}), Advice(LOWER, LOW)),
    ),
    Fault(
        "sft",
        {"rows": {"reply": 8}, "evaluate.max_new_tokens": 1, "evaluate.samples": 2},
        "endings",
        "samples/eos_rate_after",
        1,
        (Advice("raise evaluate.max_new_tokens", {"evaluate.max_new_tokens": 48}),),
    ),
    Fault(
        "sft",
        {"rows": {"reply": 1}, "evaluate.max_new_tokens": 2, "evaluate.samples": 2, "train.max_steps": 1}
        | LOW,
        "endings",
        "samples/eos_rate_after",
        1,
        (Advice("train longer", {"train.max_steps": 60}),),
    ),
)
DPO = (
    Fault(
        "dpo",
        {"train.learning_rate": 1e-6, "train.max_steps": 5},
        "learning",
        "eval/rewards/margins_after",
        1,
        (Advice("raise train.learning_rate", {"train.learning_rate": 1e-2}, slow=False),),
    ),
    Fault(
        "dpo",
        {"train.learning_rate": 3e-5, "train.max_steps": 2},
        "learning",
        "eval/rewards/margins_after",
        1,
        (Advice("train longer", {"train.max_steps": 100}),),
    ),
    Fault(
        "dpo",
        {"rows": {"exchanged": True}, "held_out_rows": {"number": 24, "seed": 1}},
        "learning",
        "eval/rewards/margins_after",
        1,
        (Advice("`chosen` and `rejected` exchanged", {"rows": {}}), Advice(LOWER, LOW)),
    ),
    Fault(
        "dpo",
        NOISE,
        "likelihood",
        "eval/logps/chosen_after",
        1,
        (
            Advice("dpo.loss={name: rpo}", {"dpo.loss": {"name": "rpo"}}),
            Advice("raise dpo.loss.beta", {"dpo.loss.beta": 1.0}),
            Advice(LOWER, LOW),
        ),
    ),
    Fault(
        "dpo",
        NOISE | {"dpo.loss": {"name": "rpo", "nll_weight": 0.001}},
        "likelihood",
        "eval/logps/chosen_after",
        1,
        (Advice("raise dpo.loss.nll_weight", {"dpo.loss": {"name": "rpo", "nll_weight": 1.0}}),),
    ),
    Fault(
        "dpo",
        {"adapter": FULL, "dpo.loss.beta": 0.01, "train.learning_rate": 0.01} | SHORT_EPOCHS,
        "distance",
        "eval/objective/kl_per_token_after",
        -1,
        (
            Advice("raise dpo.loss.beta", {"dpo.loss.beta": 0.5}),
            Advice(LOWER, LOW),
            Advice("fewer train.epochs", {"train.epochs": 2}),
        ),
    ),
    Fault(
        "dpo",
        {"train.max_steps": None, "train.epochs": 20},
        "saturated",
        "rewards/margins_after",
        -1,
        (
            Advice("fewer train.epochs", {"train.epochs": 4}),
            Advice("dpo.loss=ipo", {"dpo.loss": {"name": "ipo"}}),
            Advice("or cdpo", {"dpo.loss": {"name": "cdpo"}}),
        ),
    ),
    Fault(
        "dpo",
        {"dpo.loss.beta": 100.0, "train.learning_rate": 0.03},
        "gradients",
        "zero gradients",
        -1,
        (
            Advice(AS_PRINTED, {}),
            Advice(LOWER, {"train.learning_rate": 1e-4}),
            Advice("a loss that does not saturate", {"dpo.loss": {"name": "ipo", "beta": 100.0}}),
        ),
    ),
    Fault(
        "dpo",
        {"rows": {"lengths": [2, 8]}, "train.max_steps": 40},
        "length",
        "growth",
        -1,
        (
            Advice("raise dpo.loss.beta", {"dpo.loss.beta": 2.0}),
            Advice("balance the lengths", {"rows": {"lengths": [4, 4]}}),
        ),
    ),
    Fault("dpo", LOOPING, "length", "growth", -1, (Advice(LOWER, LOW),)),
    Fault(
        "dpo",
        LOOPING,
        "repetition",
        "repeating",
        -1,
        (
            Advice(LOWER, LOW),
            Advice("dpo.loss=rpo", {"dpo.loss": {"name": "rpo"}}),
        ),
    ),
)
# With seed 2 the untrained head prefers rejected replies.
MANY_PAIRS = {"rows": {"number": 260}, "data.held_out": 200, "train.seed": 2}
REWARD = (
    Fault(
        "reward",
        MANY_PAIRS | {"train.learning_rate": 1e-4, "train.max_steps": 3},
        "accuracy",
        "eval/rewards/accuracies_after",
        1,
        (
            Advice("raise train.learning_rate", {"train.learning_rate": 1e-2}),
            Advice("train longer", {"train.max_steps": 100}),
        ),
    ),
    Fault(
        "reward",
        {"rows": {"exchanged": True}, "held_out_rows": {"number": 100, "seed": 1}},
        "accuracy",
        "eval/rewards/accuracies_after",
        1,
        (Advice("`chosen` and `rejected` exchanged", {"rows": {}}),),
    ),
)

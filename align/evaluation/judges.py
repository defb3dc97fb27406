"""Judges that compare two completions of a prompt: what they return, and how far they can be trusted.

A judge sees each pair in both orders, because many prefer a position (Zheng et al. 2023, arXiv 2306.05685,
section 3.4; Wang et al. 2023, arXiv 2305.17926). A judgment that changes with the order is a tie.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

from data_templates.segments import Message, with_context
from finetune.evaluation.small_samples import wilson_interval

Verdict = Literal["A", "B", "tie"]
VERDICTS: tuple[Verdict, ...] = ("A", "B", "tie")
SWAPPED: Mapping[Verdict, Verdict] = {"A": "B", "B": "A", "tie": "tie"}
Progress = Callable[[int, int], None]
"""Receives the number of judgments so far, and of all pairs."""


@dataclass(frozen=True)
class Pair:
    """Two completions of a prompt.

    Attributes:
        prompt: the turns before them.
        completion_a: one completion.
        completion_b: the other one.
        reference: the expected answer, for functions that take ``expected``.
        id: for messages.
        columns: columns of the row, for functions that name them.
    """

    prompt: Sequence[Message]
    completion_a: str
    completion_b: str
    reference: str | None = None
    id: str = ""
    columns: Mapping[str, Any] = field(default_factory=dict)

    @property
    def swapped(self) -> "Pair":
        """Return the pair in the other order."""
        return Pair(self.prompt, self.completion_b, self.completion_a, self.reference, self.id, self.columns)


@dataclass(frozen=True)
class Judgment:
    """A judge's preference between the completions of a pair.

    Attributes:
        verdict: the better completion, or a tie; None: the judge gave no usable answer.
        by_order: the better completion as A was shown first, and as B was; None for a judge that scores each
            completion alone, which no order can influence.
        evidence: what the judge wrote, or its scores.
    """

    verdict: Verdict | None
    by_order: tuple[Verdict | None, Verdict | None] | None = None
    evidence: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def of_orders(
        first: Verdict | None, second: Verdict | None, evidence: Mapping[str, Any] | None = None
    ) -> "Judgment":
        """Return the judgment of both orders.

        Args:
            first: the better one of (A, B), by position.
            second: the better one of (B, A), by position: "A" means that completion B, shown first, won.
            evidence: what the judge wrote.
        """
        orders = (first, None if second is None else SWAPPED[second])
        if None in orders:
            return Judgment(None, orders, evidence or {})
        return Judgment(orders[0] if orders[0] == orders[1] else "tie", orders, evidence or {})

    @staticmethod
    def of_scores(score_a: float, score_b: float) -> "Judgment":
        """Return the judgment of a judge that scores each completion alone."""
        verdict: Verdict = "tie" if score_a == score_b else "A" if score_a > score_b else "B"
        return Judgment(verdict, None, {"scores": [score_a, score_b]})


class PairJudge(Protocol):
    """Compares completions: a model at an endpoint, a reward run, or a Python function."""

    @property
    def label(self) -> str:
        """Return its name for people."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """Return what decides its judgments."""

    def compare(self, pairs: Sequence[Pair], *, progress: Progress | None = None) -> list[Judgment]:
        """Return the judgment of each pair.

        Raises:
            UserError: the judge fails, or too many of its answers are unusable.
        """


@dataclass(frozen=True)
class JudgeReport:
    """Counts of judgments.

    Attributes:
        pairs: all pairs.
        a_wins: pairs in which A is better.
        b_wins: pairs in which B is better.
        ties: pairs without a winner; ``changed`` are among them.
        changed: pairs whose verdict changes with the order.
        unusable: pairs without a usable answer in one of the orders.
        both_orders: pairs with usable answers in both orders; 0 for judges that score completions alone.
        first_position: answers that prefer the completion shown first, in either order.
        second_position: answers that prefer the one shown second.
    """

    pairs: int
    a_wins: int
    b_wins: int
    ties: int
    changed: int
    unusable: int
    both_orders: int
    first_position: int
    second_position: int

    @staticmethod
    def of(judgments: Sequence[Judgment]) -> "JudgeReport":
        """Count judgments."""
        verdicts = Counter(judgment.verdict for judgment in judgments)
        orders = [
            judgment.by_order for judgment in judgments if judgment.by_order and None not in judgment.by_order
        ]
        return JudgeReport(
            pairs=len(judgments),
            a_wins=verdicts["A"],
            b_wins=verdicts["B"],
            ties=verdicts["tie"],
            changed=sum(first != second for first, second in orders),
            unusable=verdicts[None],
            both_orders=len(orders),
            # A is shown first in the first order, B in the second one.
            first_position=sum((first == "A") + (second == "B") for first, second in orders),
            second_position=sum((first == "B") + (second == "A") for first, second in orders),
        )

    @property
    def agreement(self) -> float | None:
        """Return the fraction of pairs with the same verdict in both orders; None if there is only one."""
        return (self.both_orders - self.changed) / self.both_orders if self.both_orders else None

    @property
    def position_bias(self) -> float | None:
        """Return how much the judge prefers a position: 1 always the first, -1 always the second, 0 none.

        It is (first - second) / (first + second) over all answers that prefer a completion.
        """
        decided = self.first_position + self.second_position
        return (self.first_position - self.second_position) / decided if decided else None

    def record(self) -> dict[str, Any]:
        """Return counts and rates for result files."""
        return {**asdict(self), "agreement": self.agreement, "position_bias": self.position_bias}

    def lines(self) -> list[str]:
        """Return the report as lines of text."""
        lines = [
            f"{self.pairs:,} pairs: A better in {self.a_wins:,}, B in {self.b_wins:,}, ties {self.ties:,}"
        ]
        if self.agreement is not None:
            low, high = wilson_interval(self.agreement, self.both_orders)
            line = f"same verdict in both orders: {self.agreement:.1%} ({low:.1%} to {high:.1%})"
            lines.append(f"{line}; {self.changed:,} changed with the order and count as ties")
        if self.position_bias is not None:
            counts = f"first {self.first_position:,}, second {self.second_position:,}"
            lines.append(f"position bias: {self.position_bias:+.2f} (answers that prefer the {counts})")
        if self.unusable:
            lines.append(f"unusable: {self.unusable:,} pairs, which count nowhere")
        return lines


@dataclass(frozen=True)
class HumanAgreement:
    """How often a judge agrees with human labels of the same pairs.

    Attributes:
        count: pairs with a usable judgment.
        agreement: fraction of them with the same verdict.
        interval: its 95 % Wilson interval.
        kappa: Cohen's kappa: 0 is the agreement of chance, 1 complete agreement.
        decided: pairs in which neither judge nor human says tie.
        decided_agreement: fraction of them with the same verdict; None if there are none.
        unusable: pairs without a usable judgment.
    """

    count: int
    agreement: float
    interval: tuple[float, float]
    kappa: float
    decided: int
    decided_agreement: float | None
    unusable: int


def human_agreement(judgments: Sequence[Judgment], labels: Sequence[Verdict]) -> HumanAgreement:
    """Compare judgments with human labels; ties count as a third verdict.

    Kappa is (p - e) / (1 - e) of the observed agreement p and the agreement e of independent labels with the
    same frequencies (Cohen 1960, "A coefficient of agreement for nominal scales").

    Raises:
        ValueError: no judgment is usable.
    """
    both = [
        (judgment.verdict, label)
        for judgment, label in zip(judgments, labels, strict=True)
        if judgment.verdict is not None
    ]
    if not both:
        raise ValueError("no usable judgment to compare with labels")
    agreement = sum(verdict == label for verdict, label in both) / len(both)
    of_judge, of_human = (Counter(column) for column in zip(*both, strict=True))
    by_chance = sum(of_judge[verdict] * of_human[verdict] for verdict in VERDICTS) / len(both) ** 2
    decided = [(verdict, label) for verdict, label in both if "tie" not in (verdict, label)]
    return HumanAgreement(
        count=len(both),
        agreement=agreement,
        interval=wilson_interval(agreement, len(both)),
        # Both give one and the same verdict throughout: chance explains all of it.
        kappa=(agreement - by_chance) / (1 - by_chance) if by_chance < 1 else 0.0,
        decided=len(decided),
        decided_agreement=(
            sum(verdict == label for verdict, label in decided) / len(decided) if decided else None
        ),
        unusable=len(judgments) - len(both),
    )


def conversation_text(turns: Sequence[Message]) -> str:
    """Return a prompt as text: a single user turn as it is, several with their roles."""
    if [turn.role for turn in turns] == ["user"]:
        return with_context(turns[0])
    return "\n\n".join(f"{turn.role.capitalize()}: {with_context(turn)}" for turn in turns)

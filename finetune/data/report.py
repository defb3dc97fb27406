"""Data report: rows, tokens, sources, and a count with a first example of everything dropped or truncated."""

from dataclasses import dataclass, field


@dataclass
class SourceReport:
    """One source: rows read, usable rows, requested mixing rate, and its rows and tokens in one epoch."""

    source: str
    layout: str
    num_read: int
    num_usable: int
    target_rate: float = 1.0
    rows: int = 0
    tokens: int = 0
    trained_tokens: int = 0


@dataclass
class DataReport:
    """Counts of the data; no row is dropped or truncated without a count here.

    ``num_too_long`` is the number of training rows above the maximum length, ``lost_tokens`` the number of
    trained tokens that they lost. ``prompts``: the rows are prompts without replies (RL).
    """

    layout: str = ""
    rows: int = 0
    held_out: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    longest: int = 0
    num_too_long: int = 0
    lost_tokens: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)
    from_cache: bool = False
    sources: list[SourceReport] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    prompts: bool = False

    def count(self, label: str, example: str, *, rows: int = 1) -> None:
        """Count rows under a label, and store the first one as its example."""
        self.counts[label] = self.counts.get(label, 0) + rows
        self.examples.setdefault(label, example)

    def merge(self, other: "DataReport", prefix: str = "") -> None:
        """Add the counts of another report, each label with a prefix."""
        for label, number in other.counts.items():
            self.count(f"{prefix}{label}", other.examples[label], rows=number)

    def lines(self) -> list[str]:
        """Return the report as lines for the terminal."""
        share = self.trained_tokens / max(self.tokens, 1)
        unit, loss = ("prompts", "") if self.prompts else ("rows", f"{share:.0%} carry loss, ")
        lines = [
            f"{self.rows} {unit} ({self.layout}), {self.held_out} held out; {self.tokens} tokens, "
            f"{loss}longest {unit[:-1]} {self.longest}{self.from_cache * ', from the cache'}"
        ]
        if len(self.sources) > 1:
            lines += [self._source_line(source) for source in self.sources]
        lines += self.notes
        return lines + [
            f"rows {label}: {n} (first: {self.examples[label]})" for label, n in self.counts.items()
        ]

    def _source_line(self, source: SourceReport) -> str:
        row_share = source.rows / max(self.rows, 1)
        token_share = source.trained_tokens / max(self.trained_tokens, 1)
        loss = "" if self.prompts else f", {token_share:.1%} of trained tokens"
        return (
            f"  {source.target_rate:.1%} requested, {row_share:.1%} of rows{loss}: "
            f"{source.rows} from {source.num_usable} usable rows of {source.source} ({source.layout})"
        )

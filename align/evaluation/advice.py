"""The next action after a verdict: one, and only what the numbers of evaluation and run support."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.evaluation.changes import OTHER_ITEMS, SuiteChange
from finetune.evaluation.comparison import more_items_needed
from finetune.recipe import yaml_file
from finetune.recipe.runs import RECIPE_FILE, read_finished_record
from finetune.recipe.terminal import command_line

MOST_MORE = 20
"""More items than so many times those evaluated are no advice: nobody writes them."""


@dataclass(frozen=True)
class TrainedRun:
    """What advice reads of a run.

    Attributes:
        folder: the run's folder.
        settings: its resolved recipe, by section.
        findings: the findings on its curves that need an action (``diagnostics`` of run.json).
    """

    folder: Path
    settings: Mapping[str, Mapping[str, Any]]
    findings: Sequence[Mapping[str, Any]] = ()

    @classmethod
    def of(cls, folder: Path) -> "TrainedRun":
        """Read a finished run; an adapter of PEFT has neither recipe nor findings.

        Raises:
            UserError: the folder is not a finished run.
        """
        file = folder / RECIPE_FILE
        settings = yaml_file.read_yaml(file)[0] if file.is_file() else {}
        findings = [entry for entry in read_finished_record(folder).get("diagnostics", []) if entry["warned"]]
        sections = {name: values for name, values in settings.items() if isinstance(values, dict)}
        return cls(folder, sections, findings)

    def value(self, section: str, key: str) -> Any:
        """Return a setting; None if there is none."""
        return self.settings.get(section, {}).get(key)


def next_action(changes: Sequence[SuiteChange], status: str, run: TrainedRun | None = None) -> str:
    """Return what to do next, in one sentence.

    Args:
        changes: of all suites.
        status: the verdict on the task.
        run: the model's run; None for a base or an endpoint.
    """
    losses = [change for change in changes if change.purpose != "task" and change.is_loss]
    if status == "not compared" and any(change.reason == OTHER_ITEMS for change in changes):
        return "Evaluate both models with the same suites and the same --limit and seed."
    if status == "not compared":
        return "Evaluate both models with a suite of the task (`llm-align list suites`)."
    if losses:
        return _against_losses(losses, run)
    if status in ("worse", "mixed"):
        return _against_worse(changes, run)
    if status == "not shown":
        return _more_items([change for change in changes if change.purpose == "task"])
    if all(change.purpose == "task" for change in changes):
        return "Measure what it may have forgotten: suites of retention and safety (`llm-align list suites`)."
    return f"Use it: `{command_line('merge', run.folder)}` writes the model without adapter." if run else ""


def _against_losses(losses: Sequence[SuiteChange], run: TrainedRun | None) -> str:
    names = ", ".join(change.suite for change in losses)
    if run is not None and run.findings:
        return f"Train again: {_finding(run)}. Then see whether {names} recovers."
    ways = []
    if run is not None and (epochs := run.value("train", "epochs") or 0) > 1 and not _max_steps(run):
        ways.append(f"fewer train.epochs (now {epochs:g})")
    rate = run.value("train", "learning_rate") if run is not None else None
    ways.append("a lower train.learning_rate" + (f" (now {rate:g})" if isinstance(rate, float) else ""))
    if run is None or not run.value("data", "mix"):
        ways.append("general rows in the training data (data.mix)")
    return f"Train again with {' or '.join(ways)}, so that less is lost on {names}."


def _max_steps(run: TrainedRun) -> bool:
    return run.value("train", "max_steps") is not None


def _finding(run: TrainedRun) -> str:
    first = run.findings[0]
    return f"{first['action']} ({first['name']}: {first['evidence']})"


def _against_worse(changes: Sequence[SuiteChange], run: TrainedRun | None) -> str:
    if run is not None and run.findings:
        return f"Train again: {_finding(run)}."
    worst = next(change for change in changes if change.purpose == "task" and change.status == "worse")
    assert worst.decision is not None
    return (
        f"Read the answers to the {worst.decision.difference.changed:,} changed items of {worst.suite} "
        "before you train again; do not use this model for it."
    )


def _more_items(task: Sequence[SuiteChange]) -> str:
    """Return how many more items would show the observed difference, or that too many would be needed."""
    needed = [
        (more, change)
        for change in task
        if change.decision is not None and (more := more_items_needed(change.decision.difference))
    ]
    if needed:
        more, change = min(needed, key=lambda entry: entry[0])
        assert change.decision is not None
        if more <= MOST_MORE * change.decision.difference.count:
            return (
                f"About {more:,} more prompts of {change.suite} would show a difference of "
                f"{change.difference_text}, if it is real."
            )
    change = max((change for change in task if change.decision), key=lambda change: change.after.count)
    assert change.decision is not None
    return (
        f"Change the training rather than the number of prompts: with {change.decision.difference.count:,}, "
        f"the difference on {change.suite} is within {change.interval_text}."
    )

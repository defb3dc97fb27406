"""Train a run longer in its folder: the same recipe with more steps, from the last checkpoint.

This is allowed where the result is that of the longer run from its start: the steps done so far must have had
the same batches and the same learning rates.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finetune.recipe import yaml_file
from finetune.recipe.checkpoint_folder import checkpoint_steps
from finetune.recipe.discovery import adapter_traits, verb_of
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.limits import setting, with_values
from finetune.recipe.recipe import Recipe
from finetune.recipe.runs import RECIPE_FILE
from finetune.recipe.settings import StageSettings
from finetune.recipe.terminal import command_line

LENGTH_KEYS = ("train.max_steps", "train.epochs", "train.warmup", "train.batch_size")
"""Settings in which a longer run may differ: warm-up and batch may be limits that scale with the steps."""
SAME_STEPS = "the steps done so far as the longer run would have done them"


@dataclass(frozen=True)
class LongerRun:
    """A recipe that trains a run longer.

    Attributes:
        path: the run's folder.
        record: its run.json.
        recipe: the recipe of the longer run.
        before: the run's values of the settings that differ, by key.
    """

    path: Path
    record: Mapping[str, Any]
    recipe: Recipe
    before: Mapping[str, Any]

    @property
    def steps_done(self) -> int:
        """Return the step of the newest complete checkpoint, 0 without one."""
        return max(checkpoint_steps(self.path), default=0)

    def early_problem(self) -> Problem | None:
        """Return why the run cannot be trained longer, as far as its files say it; None if they do not."""
        train, schedule = self.recipe.settings.train, self.record.get("schedule")
        method = self.recipe.settings.adapter.method
        if not self.steps_done:
            return self._problem("it has no checkpoint to continue from")
        if schedule is None:
            return self._problem(f"a run of stage {verb_of(self.recipe.stage)} has a fixed number of steps")
        if adapter_traits(method).depends_on_steps:
            return self._problem(f"adapter '{method}' has a schedule of its own over all steps")
        if train.max_steps is not None and train.max_steps <= self.steps_done:
            return self._problem(f"it has {self.steps_done} steps already")
        is_decaying = schedule["decay"] != "constant" and self.steps_done > schedule["warmup"]
        if is_decaying and train.max_steps != schedule["steps"]:
            return self._problem(_decay_reason(schedule))
        return None

    def check(self, now: Mapping[str, Any]) -> None:
        """Check the longer run once its rows are known.

        Args:
            now: its schedule, as in run.json.

        Raises:
            UserError: the steps done so far would have been others, or there are none to add.
        """
        before, num_steps, done = self.record["schedule"], now["steps"], self.steps_done
        if num_steps <= done:
            raise UserError(self._problem(f"it has {done} steps already, and would have {num_steps}"))
        for key in ("batch_size", "warmup"):
            if before[key] != now[key] and (key == "batch_size" or before["decay"] == "constant"):
                reason = f"train.{key} was {before[key]}, and would be {now[key]}"
                raise UserError(self._problem(reason, repair=f"train.{key}={before[key]} keeps it"))
        # Up to the end of warm-up the rates do not depend on the decay.
        is_equal = before["warmup"] == now["warmup"] and (
            before["decay"] == "constant" or before["steps"] == num_steps or done <= before["warmup"]
        )
        if not is_equal:
            raise UserError(self._problem(_decay_reason(before)))

    def record_entry(self) -> dict[str, Any]:
        """Return the entry of run.json on the training so far."""
        early = self.record.get("finished_early", {})
        planned = early.get("of", self.record.get("steps"))
        return {"step": self.steps_done, "planned_steps": planned, "digest_before": self.record["digest"]}

    def _problem(self, reason: str, *, repair: str = "") -> Problem:
        differences = ", ".join(
            f"{key}={yaml_file.format_value(old)} (here {yaml_file.format_value(_now(self.recipe, key))})"
            for key, old in self.before.items()
        )
        actual = f"a run with {differences}, which cannot be trained longer: {reason}"
        further = f"`{self._further_command()}` trains on from its weights, in a new run"
        return Problem(str(self.path), actual, SAME_STEPS, f"{repair}; or {further}" if repair else further)

    def _further_command(self) -> str:
        """Return the command that continues from the run's weights with as many steps as are added."""
        train, settings = self.recipe.settings.train, []
        if train.max_steps is not None:
            settings = [f"train.max_steps={max(1, train.max_steps - self.steps_done)}"]
        elif (more := train.epochs - float(self.before.get("train.epochs", train.epochs))) > 0:
            settings = [f"train.epochs={more:g}"]
        return command_line(verb_of(self.recipe.stage), self.path, "--from", self.path, *settings)


def find_longer_run(
    path: Path, recipe: Recipe, record: Mapping[str, Any], fingerprint: str
) -> LongerRun | None:
    """Return how a recipe trains a run longer, None if they differ in anything but the length.

    Args:
        path: the run's folder.
        recipe: the recipe, with another digest than the run.
        record: the run's run.json.
        fingerprint: that of the recipe's inputs.
    """
    file = path / RECIPE_FILE
    if not file.is_file() or "digest" not in record:
        return None
    values = yaml_file.read_yaml(file)[0].get("train") or {}
    before = {key: values.get(key.partition(".")[2]) for key in LENGTH_KEYS}
    settings = with_values(recipe.settings, before)
    if replace(recipe, settings=settings).digest(fingerprint) != record["digest"]:
        return None
    changed = {key: old for key, old in before.items() if old != _now(recipe, key)}
    return LongerRun(path, record, recipe, changed)


def rest_command(path: Path, record: Mapping[str, Any], settings: StageSettings) -> str:
    """Return the command that trains the rest of a run that was finished early.

    Args:
        path: the run's folder.
        record: its run.json.
        settings: its settings.
    """
    verb, schedule = verb_of(record["stage"]), record.get("schedule")
    traits = adapter_traits(settings.adapter.method)
    if schedule is None or traits.depends_on_steps or settings.train.max_steps == schedule["steps"]:
        return command_line(verb, path, "--from", path)
    words = [f"train.max_steps={schedule['steps']}"]
    if settings.train.batch_size != schedule["batch_size"]:
        words.append(f"train.batch_size={schedule['batch_size']}")
    return command_line(verb, path, *words)


def _now(recipe: Recipe, key: str) -> Any:
    return setting(recipe.settings, key)


def _decay_reason(schedule: Mapping[str, Any]) -> str:
    return (
        f"its {schedule['decay']} schedule was that of {schedule['steps']} steps, so its rates were others "
        "(train.lr_schedule=constant allows it)"
    )

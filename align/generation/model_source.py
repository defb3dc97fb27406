"""The model of ``generate``: a run or a base, what identifies it, and what its run knows of its rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.recipe.bases import load_bases, resolve_base
from finetune.recipe.checkpoint_folder import run_of_checkpoint
from finetune.recipe.errors import Problem, UserError, did_you_mean
from finetune.recipe.runs import RECIPE_FILE, RUNS_FOLDER, find_run, list_runs, read_generative_record
from finetune.recipe.yaml_file import read_yaml

if TYPE_CHECKING:
    from finetune.training.loaded_model import LoadedModel


@dataclass(frozen=True)
class ModelSource:
    """A run or a base, not loaded yet.

    Attributes:
        name: the base's name; "" for a run.
        run: the run's folder; None for a base.
        template: template of a base; None: the tokenizer's chat template, or ``plain`` without one.
        note: which of several runs was taken, or "".
    """

    name: str = ""
    run: Path | None = None
    template: str | None = None
    note: str = ""

    @classmethod
    def of(cls, name: str, *, template: str | None = None) -> "ModelSource":
        """Return the run or the base of a name: a run's folder, name or prefix, else what ``--base`` takes.

        Raises:
            UserError: there is neither; or a run with a template that is not its own.
        """
        if name not in load_bases() and _names_run(name):
            folder, note = find_run(name, where="MODEL", recipes=False)
            read_generative_record(folder)
            if template is not None:
                actual = f"{template}, for a run, which has the template of its training"
                raise UserError(Problem("--template", actual, "no template, or a base", "leave it out"))
            return cls(run=folder, note=note)
        try:
            resolve_base(name)
        except UserError as error:
            if Path(name).expanduser().exists() or name.startswith((".", "/", "~")):
                raise
            expected = "a run (its folder, name or prefix) or a base (short name, Hub id, folder)"
            known = [*load_bases(), *(run.path.name for run in list_runs())]
            hint = did_you_mean(name, known) or "see `llm-align list runs` and `llm-align list bases`"
            raise UserError(Problem("MODEL", f"no run or base '{name}'", expected, hint)) from error
        return cls(name=name, template=template)

    def load(self) -> "LoadedModel":
        """Load the model; raises UserError."""
        from finetune.training.loaded_model import load_base_model, load_finished_run

        if self.run is not None:
            return load_finished_run(self.run)
        return load_base_model(self.name, template=self.template)

    @property
    def label(self) -> str:
        """Return its name for messages and file names."""
        if self.run is None:
            return Path(self.name).name
        run = run_of_checkpoint(self.run)
        return self.run.name if run is None else f"{run.name}-{self.run.name}"

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Return what identifies the weights: another training in the same folder is another model."""
        if self.run is not None:
            record = read_generative_record(self.run)
            return {"run": self.run.name, "digest": record["digest"], "finished": record.get("finished")}
        folder = Path(resolve_base(self.name))
        files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
        sizes = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
        return {"base": self.name, "template": self.template, "files": sizes}

    @cached_property
    def columns(self) -> Mapping[str, str]:
        """Return the mapping of columns in a run's recipe, {} without one."""
        recipe = (run_of_checkpoint(self.run) or self.run) / RECIPE_FILE if self.run is not None else None
        if recipe is None or not recipe.is_file():
            return {}
        content, _ = read_yaml(recipe)
        columns: dict[str, str] = content.get("data", {}).get("columns") or {}
        return columns

    @cached_property
    def labels(self) -> Sequence[str] | None:
        """Return the labels that a run was trained to choose from; None for other models."""
        if self.run is None:
            return None
        labels: list[str] | None = read_generative_record(self.run).get("classification", {}).get("labels")
        return labels


def _names_run(name: str) -> bool:
    folder = Path(name).expanduser()
    if any((path / "run.json").is_file() for path in (folder, RUNS_FOLDER / name)):
        return True
    prefix = name.removeprefix(f"{RUNS_FOLDER}/")
    return not folder.is_dir() and any(run.path.name.startswith(prefix) for run in list_runs())

"""Loading a finished run: base, adapter, and the template that it was trained with."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoTokenizer

from finetune.adapters._load import open_adapter
from finetune.data.tokens import Encoder
from finetune.planning.hardware import detect
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.settings import ModelSettings
from finetune.training.model import context_length, load_base
from finetune.training.run_directory import read_record


@dataclass(frozen=True)
class Tuned:
    """A tuned model, ready to answer."""

    model: nn.Module
    encoder: Encoder
    context: int


def finished_record(run: Path) -> dict[str, Any]:
    """Return a finished run's run.json.

    Raises:
        UserError: the folder is no finished run.
    """
    record = read_record(run)
    if record.get("status") != "finished":
        found = f"a run that is {record['status']}" if record else "no run"
        raise UserError(Problem(str(run), found, "the folder of a finished run", _way_on(record)))
    return record


def record_of_writer(run: Path) -> dict[str, Any]:
    """Return the run.json of a finished run whose model writes text.

    Raises:
        UserError: the folder is no finished run, or its model scores texts.
    """
    record = finished_record(run)
    if "heads" in record["load"]:
        repair = f"`llm-align score {run} FILE` scores the completions of a file"
        raise UserError(
            Problem(str(run), "a reward model, which writes no text", "a model that does", repair)
        )
    return record


def load_tuned(run: Path) -> Tuned:
    """Load a finished run's model in the precision that it was trained in.

    Raises:
        UserError: the folder is no finished run.
    """
    load: dict[str, Any] = record_of_writer(run)["load"]
    settings = ModelSettings(**load["model"])
    whole = run / "model"
    if whole.is_dir():
        settings = settings.model_copy(update={"base": str(whole), "revision": None, "rope": None})
    hardware = detect()
    base = load_base(
        settings, precision=load["precision"], quantization=load["quantization"], hardware=hardware
    )
    adapter = run / "adapter"
    model: nn.Module = base
    if not whole.is_dir():
        model = open_adapter(base, adapter)
    model.eval()
    tokenizer = AutoTokenizer.from_pretrained(str(whole if whole.is_dir() else adapter))
    encoder = Encoder(tokenizer, load["template"], system=load["system"])
    return Tuned(model, encoder, context_length(settings) - load["virtual_tokens"])


def _way_on(record: dict[str, Any]) -> str:
    """Return what to do about a run that is not finished."""
    ways = {
        "interrupted": "`{}` goes on from its checkpoint",
        "running": "wait for its end; if it was killed, `{}` goes on from its last checkpoint",
    }
    if record.get("status") in ways and "command" in record:
        return ways[record["status"]].format(record["command"])
    return "`llm-align list runs` shows them"

"""Weights of a run that is not finished: its checkpoints, their steps, and what run.json says of them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.recipe.errors import Problem, UserError
from finetune.recipe.terminal import command_line

CHECKPOINTS, CHECKSUM_FILE = "checkpoints", "checksums.json"
"""Folder of a run's checkpoints; the file that a complete checkpoint has."""
MERGED, MERGED_FROM = "merged", "merged_from.json"
"""Folder of merged weights; its file that says which weights were merged."""
RUN_FILE, ADAPTER_CONFIG, MODEL_CONFIG = "run.json", "adapter_config.json", "config.json"
MODEL_WEIGHTS = ("adapter_model", "model")
"""How the names of weight files begin; other files of a checkpoint are optimizer and stage state."""
HEAD_STAGES = ("reward", "ppo")
"""Stages whose heads are not in the files of a checkpoint that PEFT or transformers load."""


def run_of_checkpoint(folder: Path) -> Path | None:
    """Return the run of a checkpoint's folder, None for any other folder."""
    run = folder.parent.parent
    return run if folder.parent.name == CHECKPOINTS and (run / RUN_FILE).is_file() else None


def is_checkpoint(folder: Path) -> bool:
    """Return whether a folder is a checkpoint of a run, with an adapter or a model."""
    has_weights = (folder / ADAPTER_CONFIG).is_file() or (folder / MODEL_CONFIG).is_file()
    return has_weights and run_of_checkpoint(folder) is not None


def checkpoint_steps(run: Path) -> list[int]:
    """Return the steps of a run's complete checkpoints."""
    files = (run / CHECKPOINTS).glob(f"checkpoint-*/{CHECKSUM_FILE}")
    steps = (file.parent.name.removeprefix("checkpoint-") for file in files)
    return sorted(int(step) for step in steps if step.isdigit())


def last_checkpoint(run: Path) -> Path | None:
    """Return a run's newest complete checkpoint, None without one; its files are not verified."""
    steps = checkpoint_steps(run)
    return run / CHECKPOINTS / f"checkpoint-{steps[-1]}" if steps else None


def checkpoint_step(checkpoint: Path) -> int:
    """Return a checkpoint's optimizer step; the user may have given its folder another name."""
    number = checkpoint.name.removeprefix("checkpoint-")
    if number.isdigit():
        return int(number)
    return int(json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["global_step"])


def adapter_folder(run: Path) -> Path:
    """Return the folder of a run's adapter: a checkpoint, or an adapter of PEFT, is that folder itself."""
    return run if (run / ADAPTER_CONFIG).is_file() else run / "adapter"


def model_folder(run: Path) -> Path | None:
    """Return the folder of a run's model after full fine-tuning, also of a checkpoint's; None without one."""
    if is_checkpoint(run):
        return None if (run / ADAPTER_CONFIG).is_file() else run
    return run / "model" if (run / "model").is_dir() else None


def checkpoint_record(checkpoint: Path) -> dict[str, Any]:
    """Return what run.json would say if a run had finished at a checkpoint.

    Raises:
        UserError: the checkpoint is incomplete, or its files lack a head that the stage trains.
    """
    run = run_of_checkpoint(checkpoint)
    assert run is not None, "the folder is a checkpoint"
    record: dict[str, Any] = json.loads((run / RUN_FILE).read_text(encoding="utf-8"))
    if has_heads(record):
        actual = f"a checkpoint of stage {record['stage']}, whose head is not in its files"
        repair = f"`{command_line('finish', run)}` makes a finished run of the last checkpoint"
        raise UserError(Problem(str(checkpoint), actual, "a checkpoint of another stage", repair))
    files = weight_checksums(checkpoint)
    step = checkpoint_step(checkpoint)
    return record | {
        "status": "finished",
        "digest": f"{record['digest']}-{step}",
        "files": files,
        "steps": step,
        "finished_early": {"at": step, "of": record.get("steps", step), "unit": "step"},
        # Those of the run are of its end, or of none.
        "summary": {},
        "metrics": {},
    }


def has_heads(record: Mapping[str, Any]) -> bool:
    """Return whether a run trains a value or score head, which its checkpoints keep in files of our own."""
    return record.get("stage") in HEAD_STAGES or "heads" in record.get("reload", {})


def weight_checksums(checkpoint: Path) -> dict[str, str]:
    """Return the SHA-256 of a checkpoint's weight files, as they were written.

    Raises:
        UserError: the checkpoint is incomplete.
    """
    file = checkpoint / CHECKSUM_FILE
    if not file.is_file():
        expected = f"a complete checkpoint (with {CHECKSUM_FILE})"
        raise UserError(Problem(str(checkpoint), "an incomplete checkpoint", expected, "use an earlier one"))
    checksums: dict[str, str] = json.loads(file.read_text(encoding="utf-8"))
    is_weights = {
        name: name.startswith(MODEL_WEIGHTS) and name.endswith(".safetensors") for name in checksums
    }
    return {name: checksum for name, checksum in checksums.items() if is_weights[name]}


def describe_steps(record: Mapping[str, Any]) -> str:
    """Return a run's steps (or rounds) as text, "40 of 100" if it was finished early; "" without any."""
    early = record.get("finished_early")
    return f"{early['at']} of {early['of']}" if early else str(record.get("steps", ""))


def write_merged_from(folder: Path, record: Mapping[str, Any]) -> None:
    """Write which weights a folder of merged weights has.

    Args:
        folder: the merged weights.
        record: the run's record, or a checkpoint's.
    """
    source = {"step": record.get("steps"), "files": record["files"]}
    (folder / MERGED_FROM).write_text(json.dumps(source, indent=1) + "\n", encoding="utf-8")


def outdated_merge(run: Path) -> str:
    """Return how a run's merged weights differ from the run as it is now; "" if they do not."""
    file = run / MERGED / MERGED_FROM
    if not file.is_file():
        return ""
    source = json.loads(file.read_text(encoding="utf-8"))
    record = json.loads((run / RUN_FILE).read_text(encoding="utf-8"))
    step, files = record.get("steps"), record.get("files", {})
    if record["status"] != "finished":
        last = last_checkpoint(run)
        step, files = (checkpoint_step(last), weight_checksums(last)) if last else (0, {})
    if set(source["files"].values()) == set(files.values()):
        return ""
    return f"{MERGED}/ has the weights of step {source['step']}, and the run is at step {step}"

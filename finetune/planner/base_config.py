"""A base model's config.json without a download: from our table, a folder, or the Hugging Face cache."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from finetune.recipe import yaml_file
from finetune.recipe.bases import load_bases, resolve_base
from finetune.recipe.discovery import PROJECT
from finetune.recipe.errors import Problem, UserError

ARCHITECTURES = PROJECT / "recipes" / "architectures.yaml"


def load_base_config(base: str, revision: str | None = None) -> dict[str, Any]:
    """Return a base model's config.json; known bases are in our table.

    Args:
        base: short name, Hub id or folder.
        revision: branch, tag or commit of a Hub model.

    Raises:
        UserError: the base does not exist, or its config.json is not on this machine.
    """
    base_id = resolve_base(base)
    if Path(base_id).is_dir():
        return _read_config(Path(base_id) / "config.json")
    known = {entry.id: name for name, entry in load_bases().items()}
    # The table has the configs of the default branches; another revision may differ.
    if base_id in known and revision is None:
        config: dict[str, Any] = yaml_file.read_yaml(ARCHITECTURES)[0][known[base_id]]["config"]
        return config
    cached = try_to_load_from_cache(base_id, "config.json", revision=revision)
    # Neither None (unknown) nor the sentinel of a file that the repository is known to lack.
    if isinstance(cached, str):
        return _read_config(Path(cached))
    raise UserError(_unknown_base(base, base_id, revision, len(known)))


def _unknown_base(base: str, base_id: str, revision: str | None, known: int) -> Problem:
    at = f" at revision '{revision}'" if revision else ""
    text = f"'{base}'{at} is not a known base, and its config.json is not on this machine"
    expected = f"one of {known} short names (`llm-align list bases`), a folder, or a model in the hub's cache"
    option = f" --revision {revision}" if revision else ""
    return Problem("model.base", text, expected, f"hf download {base_id} config.json{option}   (no weights)")


def _read_config(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(Problem("model.base", f"{file}: {error}", "the JSON of a config.json")) from error
    if not isinstance(content, dict):
        raise UserError(Problem("model.base", f"{file} is not a JSON object", "the JSON of a config.json"))
    return content

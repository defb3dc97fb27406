"""Where a path of a recipe lies: beside the user, or in the shipped recipes."""

from pathlib import Path

from finetune.recipe.discovery import PROJECT

DATA_SUFFIXES = (".json", ".jsonl", ".jsonl.gz", ".json.gz", ".csv", ".csv.gz", ".tsv", ".parquet")
TEXT_SUFFIXES = (".txt", ".txt.gz", ".md", ".md.gz")


def local_path(text: str) -> Path | None:
    """Return the existing file or folder that ``text`` names, here or in the project's folder, else None."""
    for path in (Path(text).expanduser(), PROJECT / text):
        if path.exists():
            return path
    return None


def looks_local(text: str) -> bool:
    """Tell whether ``text`` can only mean a file or folder, and not the hub id ``owner/name``."""
    known = (*DATA_SUFFIXES, *TEXT_SUFFIXES)
    return text.lower().endswith(known) or text.startswith((".", "/", "~")) or text.count("/") != 1

"""Resolve paths of a recipe: from the working directory, then from the project folder."""

from pathlib import Path

from finetune.recipe.discovery import PROJECT

DATA_SUFFIXES = (".json", ".jsonl", ".jsonl.gz", ".json.gz", ".csv", ".csv.gz", ".tsv", ".parquet")
TEXT_SUFFIXES = (".txt", ".txt.gz", ".md", ".md.gz")


def local_path(text: str) -> Path | None:
    """Return the existing path of ``text``, in the working directory or the project folder, or None."""
    for path in (Path(text).expanduser(), PROJECT / text):
        if path.exists():
            return path
    return None


def looks_local(text: str) -> bool:
    """Return True if ``text`` can only be a file or folder, and not a Hub id ``owner/name``."""
    known = (*DATA_SUFFIXES, *TEXT_SUFFIXES)
    return text.lower().endswith(known) or text.startswith((".", "/", "~")) or text.count("/") != 1

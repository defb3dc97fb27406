"""One request to the Hub before libraries use it, so that a wrong name or no network fails at once.

The libraries retry each of their requests for half a minute, and look for many files.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from huggingface_hub import get_hf_file_metadata, hf_hub_url, is_offline_mode, try_to_load_from_cache
from huggingface_hub.constants import ENDPOINT, HF_HUB_CACHE
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import httpx  # type: ignore[attr-defined]  # exported, whatever its version

from finetune.recipe.bases import load_bases, resolve_base
from finetune.recipe.discovery import local_path, looks_local
from finetune.recipe.errors import Problem, UserError, did_you_mean
from finetune.recipe.settings import ModelSettings, StageSettings

Kind = Literal["model", "dataset"]
FILES: dict[Kind, str] = {"model": "config.json", "dataset": "README.md"}
"""The file that is asked for; every repository that can be loaded has it, or can do without."""
OPTIONS: dict[Kind, str] = {"model": "--base FOLDER", "dataset": "--data my.jsonl"}


@dataclass(frozen=True, slots=True)
class HubRepository:
    """A model or dataset of the Hub: ``owner/name``, and the revision or None for its newest one."""

    kind: Kind
    name: str
    revision: str | None = None

    def problem(self, actual: str, repair: str, *, hint: str = "") -> UserError:
        """Return the error that the repository cannot be used."""
        where = f"model.base '{self.name}'" if self.kind == "model" else f"dataset '{self.name}'"
        expected = f"a {self.kind} on the Hub or in its cache, or a local path"
        return UserError(Problem(where, actual, expected, f"{hint} {repair}".strip()))

    def download(self) -> str:
        """Return the command that downloads it into the cache."""
        dataset = " --repo-type dataset" if self.kind == "dataset" else ""
        revision = f" --revision {self.revision}" if self.revision else ""
        return f"hf download {self.name}{dataset}{revision}"


def check_hub(settings: StageSettings) -> None:
    """Ask the Hub for a recipe's base and data, before slow libraries are imported.

    Raises:
        UserError: the Hub or its cache does not have one of them.
    """
    reads_base_offline(settings.model)
    data = settings.data
    sources = [(data.source, data.revision), *((entry.source, entry.revision) for entry in data.mix or [])]
    for source, revision in [*sources, (data.held_out, None)]:
        if isinstance(source, str) and not looks_local(source) and local_path(source) is None:
            reach_hub(HubRepository("dataset", source.partition(":")[0], revision))


def reads_base_offline(settings: ModelSettings) -> bool:
    """Return whether the base is a folder, or the Hub cannot be reached and its files are in the cache.

    Raises:
        UserError: the Hub does not have the base, or cannot be reached and the cache does not have it.
    """
    base = resolve_base(settings.base)
    return Path(base).is_dir() or not reach_hub(HubRepository("model", base, settings.revision))


@cache  # a run asks for the tokenizer, the config, the weights
def reach_hub(repository: HubRepository) -> bool:
    """Ask the Hub for a repository, once; return whether it can be reached. If not, the cache has the files.

    Raises:
        UserError: there is no such repository or revision, it is gated or private, the Hub refuses or fails,
            or it cannot be reached (or HF_HUB_OFFLINE is set) and the cache does not have the files.
    """
    if is_offline_mode():
        if _is_cached(repository):
            return False
        actual = f"HF_HUB_OFFLINE is set, and the cache has no such {repository.kind} ({HF_HUB_CACHE})"
        repair = f"unset HF_HUB_OFFLINE, or first run: {repository.download()}"
        raise repository.problem(actual, f"{repair}; or {OPTIONS[repository.kind]}", hint=_nearby(repository))
    file = FILES[repository.kind]
    try:
        url = hf_hub_url(
            repository.name,
            file,
            repo_type=repository.kind,
            revision=repository.revision or "main",
            endpoint=ENDPOINT,
        )
        get_hf_file_metadata(url)  # without retries
    except HFValidationError as error:
        raise repository.problem(
            f"is no name of the Hub: {error}", "write owner/name", hint=_nearby(repository)
        ) from error
    except httpx.HTTPError as error:
        problem = _refusal(repository, error)
        if problem is not None:
            raise problem from error
        # Unreachable, or a fault of the server: what the cache has can be used.
        if not _is_cached(repository) and not _lacks_file_only(error, repository.kind):
            raise _unreachable(repository, error) from error
        return _lacks_file_only(error, repository.kind)
    return True


def _refusal(repository: HubRepository, error: Exception) -> UserError | None:
    """Return the problem if the Hub was reached, and does not have or give the repository."""
    kind = repository.kind
    page = f"{ENDPOINT}/{'datasets/' * (kind == 'dataset')}{repository.name}"
    # The order matters: gated is a kind of not found.
    if isinstance(error, GatedRepoError):
        actual, repair = f"a gated {kind} (HTTP {error.response.status_code})", f"accept its terms on {page}"
        return repository.problem(actual, f"{repair} and log in: hf auth login")
    if isinstance(error, RevisionNotFoundError):
        actual = f"has no revision '{repository.revision or 'main'}'"
        return repository.problem(actual, f"its branches and tags are listed on {page}")
    if isinstance(error, RepositoryNotFoundError):
        actual = f"there is no such {kind} on the Hub, or it is private (HTTP {error.response.status_code})"
        hint = _nearby(repository, known=True)
        return repository.problem(actual, "check the name; a private one needs: hf auth login", hint=hint)
    if isinstance(error, RemoteEntryNotFoundError) and kind == "model":
        actual = f"has no {FILES[kind]}: not in the format of transformers"
        return repository.problem(actual, "choose a repository with config.json and safetensors", hint="")
    if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
        actual = f"the Hub refuses access (HTTP {error.response.status_code})"
        return repository.problem(actual, f"log in with a token that may read {page}: hf auth login")
    return None


def _lacks_file_only(error: Exception, kind: Kind) -> bool:
    """Return True for a dataset without a README.md, which can be loaded."""
    return isinstance(error, RemoteEntryNotFoundError) and kind == "dataset"


def _unreachable(repository: HubRepository, error: Exception) -> UserError:
    if isinstance(error, HfHubHTTPError):
        actual = f"the Hub ({ENDPOINT}) fails with HTTP {error.response.status_code}"
        repair = "try again later"
    else:
        reason = " ".join(str(error).split()) or type(error).__name__
        actual = f"the Hub ({ENDPOINT}) cannot be reached: {reason[:200]}"
        repair = f"check the network; or where there is one: {repository.download()}"
    text = f"{repair}; or {OPTIONS[repository.kind]}"
    return repository.problem(f"{actual}, and the cache does not have it", text, hint=_nearby(repository))


def _is_cached(repository: HubRepository) -> bool:
    # Neither None (unknown) nor the sentinel of a file that the repository is known to lack.
    file = try_to_load_from_cache(
        repository.name, FILES[repository.kind], repo_type=repository.kind, revision=repository.revision
    )
    if isinstance(file, str) or repository.kind == "model":
        return isinstance(file, str)
    from datasets import config  # noqa: PLC0415 - slow to import, and only datasets need it

    return (Path(config.HF_DATASETS_CACHE) / repository.name.replace("/", "___")).is_dir()


def _nearby(repository: HubRepository, *, known: bool = False) -> str:
    """Suggest a local path of a similar name, and with ``known`` a base of the table."""
    names = list(_local_paths(repository.name))
    if known and repository.kind == "model":
        names += [base.id for base in load_bases().values()]
    return did_you_mean(repository.name, names)


def _local_paths(name: str) -> Iterator[str]:
    """Yield local paths with the name's first or second part."""
    path = Path(name)
    if path.parent.is_dir():
        yield from (str(child) for child in path.parent.iterdir())
    yield from (str(folder / path.name) for folder in Path().iterdir() if (folder / path.name).exists())

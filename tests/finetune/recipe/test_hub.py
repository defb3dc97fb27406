"""The Hub: one request, one message, and which of its answers it is; served by a local endpoint."""

import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub.constants
import pytest

from finetune.recipe import hub
from finetune.recipe.errors import UserError
from finetune.recipe.hub import HubRepository, reach_hub

MODEL, DATASET = HubRepository("model", "some-org/some-model"), HubRepository("dataset", "some-org/rows")


@dataclass
class Endpoint:
    """A Hub that gives one answer, and the paths that were asked for."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    paths: list[str] = field(default_factory=list)


@pytest.fixture
def endpoint(monkeypatch, tmp_path) -> Iterator[Endpoint]:
    answer = Endpoint()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):  # noqa: N802 - the library's name
            answer.paths.append(self.path)
            self.send_response(answer.status)
            for name, value in ({"X-Repo-Commit": "a" * 40, "ETag": '"b"'} | answer.headers).items():
                self.send_header(name, value)
            self.send_header("Content-Length", "2")
            self.end_headers()

        def log_message(self, *arguments):
            """Print nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    online(monkeypatch, tmp_path, server.server_port)
    yield answer
    server.shutdown()
    server.server_close()


def online(monkeypatch, tmp_path, port: int) -> None:
    reach_hub.cache_clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setattr(hub, "ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.chdir(tmp_path)


def message(repository: HubRepository) -> str:
    with pytest.raises(UserError) as caught:
        reach_hub(repository)
    [problem] = caught.value.problems
    return str(problem)


REFUSALS = {
    "not found": (404, "RepoNotFound", "there is no such {kind} on the Hub, or it is private (HTTP 404)"),
    "not found without a login": (401, "RepoNotFound", "or it is private (HTTP 401)"),
    "not logged in": (401, "", "the Hub refuses access (HTTP 401)"),
    "gated, not logged in": (401, "GatedRepo", "a gated {kind} (HTTP 401)"),
    "gated, not accepted": (403, "GatedRepo", "a gated {kind} (HTTP 403)"),
    "forbidden": (403, "", "the Hub refuses access (HTTP 403)"),
    "no such revision": (404, "RevisionNotFound", "has no revision 'main'"),
    "overloaded": (503, "", "fails with HTTP 503, and the cache does not have it"),
    "a broken server": (500, "", "fails with HTTP 500, and the cache does not have it"),
    "a broken gateway": (502, "", "fails with HTTP 502"),
    "too many requests": (429, "", "fails with HTTP 429"),
}


@pytest.mark.parametrize("repository", [MODEL, DATASET], ids=lambda repository: repository.kind)
@pytest.mark.parametrize("name", REFUSALS)
def test_each_answer_of_the_hub_is_one_request_and_its_own_message(endpoint, name, repository):
    endpoint.status, code, expected = REFUSALS[name]
    endpoint.headers = {"X-Error-Code": code} if code else {}
    text = message(repository)
    assert expected.format(kind=repository.kind) in text
    assert repository.name in text.splitlines()[0] and "repair:" in text
    assert len(endpoint.paths) == 1


def test_a_repository_that_exists_is_asked_for_once(endpoint):
    assert [reach_hub(MODEL) for _ in range(3)] == [True] * 3
    assert endpoint.paths == ["/some-org/some-model/resolve/main/config.json"]


def test_a_dataset_without_a_readme_can_be_loaded_and_a_model_without_a_config_cannot(endpoint):
    endpoint.status, endpoint.headers = 404, {"X-Error-Code": "EntryNotFound"}
    assert reach_hub(DATASET)
    assert "has no config.json: not in the format of transformers" in message(MODEL)


def test_the_revision_is_asked_for(endpoint):
    endpoint.status, endpoint.headers = 404, {"X-Error-Code": "RevisionNotFound"}
    assert "has no revision 'v9'" in message(HubRepository("model", "some-org/some-model", "v9"))
    assert endpoint.paths == ["/some-org/some-model/resolve/v9/config.json"]


def closed_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.mark.parametrize("repository", [MODEL, DATASET], ids=lambda repository: repository.kind)
def test_pain_24_an_unreachable_hub_is_one_clear_message(monkeypatch, tmp_path, caplog, capfd, repository):
    online(monkeypatch, tmp_path, closed_port())
    text = message(repository)
    assert "cannot be reached: " in text and "and the cache does not have it" in text
    assert f"hf download {repository.name}" in text and "; or --" in text
    assert len(text.splitlines()) == 3
    # The library's retries would be in its log and on standard error.
    assert (caplog.records, capfd.readouterr().err) == ([], "")


def fill_cache(tmp_path) -> None:
    folder = tmp_path / "cache" / "models--some-org--some-model"
    for path, text in (("refs/main", "a" * 40), (f"snapshots/{'a' * 40}/config.json", "{}")):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    (tmp_path / "datasets" / "some-org___rows").mkdir(parents=True)


@pytest.mark.parametrize("repository", [MODEL, DATASET], ids=lambda repository: repository.kind)
@pytest.mark.parametrize("offline", [False, True])
def test_what_the_cache_has_is_used_without_the_hub(monkeypatch, tmp_path, repository, offline):
    online(monkeypatch, tmp_path, closed_port())
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    fill_cache(tmp_path)
    assert not reach_hub(repository)


def test_offline_nothing_is_asked(endpoint, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for repository in (MODEL, DATASET):
        assert "HF_HUB_OFFLINE is set, and the cache has no such" in message(repository)
    assert endpoint.paths == []


@pytest.mark.parametrize(
    ("created", "name"),
    [
        ("models/my-base", "models/my-bas"),
        ("models/my-base", "modles/my-base"),
        ("some-org/some-modle", "some-org/some-model"),
    ],
)
def test_a_typo_of_a_folder_is_suggested(monkeypatch, tmp_path, created, name):
    online(monkeypatch, tmp_path, closed_port())
    (tmp_path / created).mkdir(parents=True)
    assert f"did you mean '{created}'?" in message(HubRepository("model", name))


def test_a_typo_of_a_known_base_is_suggested_if_the_hub_does_not_have_it(endpoint):
    endpoint.status, endpoint.headers = 404, {"X-Error-Code": "RepoNotFound"}
    assert "did you mean 'Qwen/Qwen3-4B-Base'?" in message(HubRepository("model", "Qwen/Qwen3-4B-Bas"))


@pytest.mark.parametrize("name", ["a b/c", "a/b--c", "-a/b", "a/" + "b" * 100])
def test_an_impossible_name_is_not_asked_for(endpoint, name):
    assert "is no name of the Hub" in message(HubRepository("model", name))
    assert endpoint.paths == []

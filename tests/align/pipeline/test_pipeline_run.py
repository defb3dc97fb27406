"""A pipeline as a user meets it: what runs, what is not repeated, how it stops, the report of the whole."""

import json
import os
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
from small_pipelines import Call, record, weights

from align import load_pipeline, run_pipeline
from finetune.training.job import Job

NAMES = ("sft", "taste", "dpo")


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(Job, "train", lambda *_: pytest.fail("it trains again"))
    return monkeypatch


class Page(HTMLParser):
    """A page's tags, and whether each one that was opened is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.ids += [given["id"]] if given.get("id") else []
        self.links += [given["href"]] if tag in ("a", "link") and given.get("href") else []
        assert tag != "script" and not (given.get("src") or "").startswith("http"), "a page that stands alone"
        if tag not in ("meta", "link", "br", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_every_stage_goes_on_from_the_one_that_it_names(call: Call, here: Path) -> None:
    status, out, err = call("run", "three")
    assert status == 0, err
    stages = record(here)["stages"]
    assert record(here)["status"] == "finished" and list(stages) == list(NAMES)
    runs = {name: json.loads((here / stages[name]["run"] / "run.json").read_text()) for name in NAMES}
    assert [runs[name]["recipe"] for name in NAMES] == ["small"] * 3
    assert runs["taste"]["start"]["files"] == runs["dpo"]["start"]["files"] == runs["sft"]["files"]
    assert len((here / stages["dpo"]["run"] / "metrics.jsonl").read_text().splitlines()) == 3
    heads = [out.index(f"[{number}/3] {name}: ") for number, name in enumerate(NAMES, 1)]
    assert heads == sorted(heads) and f"llm-align chat {stages['dpo']['run']}" in out


def test_a_finished_pipeline_answers_at_once(
    call: Call, here: Path, no_training: pytest.MonkeyPatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_training.undo()
    monkeypatch.chdir(here)
    assert call("run", "three")[0] == 0
    before = {file: file.stat().st_mtime_ns for file in here.glob("runs/*/*") if file.suffix != ".json"}
    monkeypatch.setattr(Job, "train", lambda *_: pytest.fail("it trains again"))
    program = "import sys; from align import cli; sys.argv[1:] = ['run', 'three']; cli.main(); "
    program += "print('HEAVY', sorted({'torch', 'transformers', 'matplotlib'} & set(sys.modules)))"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.returncode == 0 and ended.stdout.endswith("HEAVY []\n"), ended.stderr
    assert ended.stdout.count("finished before: runs/") == 3
    after = {file: file.stat().st_mtime_ns for file in here.glob("runs/*/*") if file.suffix != ".json"}
    assert {name: time for name, time in after.items() if "pipeline.yaml" not in name.name} == {
        name: time for name, time in before.items() if "pipeline.yaml" not in name.name
    }


def test_a_stage_that_was_run_alone_is_not_repeated_and_the_other_way_round(call: Call, here: Path) -> None:
    assert call("sft", "small")[0] == 0
    (alone,) = (here / "runs").iterdir()
    assert call("dpo", "small", "--from", "sft-small", "train.max_steps=3")[0] == 0
    made = sorted(path.name for path in (here / "runs").iterdir())
    status, out, _ = call("run", "three")
    assert status == 0 and f"finished before: runs/{alone.name}" in out
    assert out.count("finished before: ") == 2
    stages = record(here)["stages"]
    assert sorted(Path(stages[name]["run"]).name for name in ("sft", "dpo")) == sorted(made)

    command = json.loads((here / stages["taste"]["run"] / "run.json").read_text())["command"].split()
    assert command == ["llm-align", "reward", "small", "--from", f"runs/{alone.name}"]
    before = len(list((here / "runs").iterdir()))
    assert call(*command[1:])[0] == 0
    assert len(list((here / "runs").iterdir())) == before, "the recorded command means the same run"


def test_what_is_changed_runs_again_and_nothing_else(call: Call, here: Path) -> None:
    assert call("run", "three")[0] == 0
    status, out, _ = call("run", "three", "dpo.train.learning_rate=2e-3")
    assert status == 0 and out.count("finished before: ") == 2
    assert len(list(here.glob("runs/dpo-small-*"))) == 2 and len(list(here.glob("runs/three-*"))) == 2
    changed = (here / "runs" / "sft-small").parent.glob("three-*/pipeline.yaml")
    assert any("train.learning_rate: 0.002" in file.read_text() for file in changed)


def test_force_starts_every_stage_over(call: Call, here: Path) -> None:
    assert call("run", "three")[0] == 0
    first, files = record(here)["stages"], weights(here)
    adapter = here / first["sft"]["run"] / "adapter" / "adapter_model.safetensors"
    before = adapter.stat().st_mtime_ns
    status, out, _ = call("run", "three", "--force")
    assert status == 0 and "finished before" not in out
    assert adapter.stat().st_mtime_ns > before and weights(here) == files


def test_python_gives_results_by_name(here: Path) -> None:
    result = run_pipeline(load_pipeline("three", out="whole", settings={"dpo.train.max_steps": 2}))
    assert result.directory == Path("whole") and result.record["status"] == "finished"
    assert list(result.stages) == list(NAMES) and result.last is result.stages["dpo"]
    assert [line["step"] for line in result.last.metrics if "loss" in line] == [1, 2]
    assert [list(line["replies"]) for line in result.samples] == [["sft", "dpo"]] * 2
    for line in result.samples:
        assert list(line["rewards"]) == ["taste"] and list(line["rewards"]["taste"]) == ["sft", "dpo"]
    said = {sample["prompt"]: sample for sample in result.last.samples}
    for line in result.samples:
        own = said[line["prompt"]]
        assert line["replies"] == {"sft": own["before"], "dpo": own["after"]}


def test_the_report_holds_every_stage(call: Call, here: Path) -> None:
    assert call("run", "three")[0] == 0
    (file,) = here.glob("runs/three-*/report.html")
    text = file.read_text()
    page = Page(text)
    assert page.open == []
    assert {f"stage-{name}" for name in NAMES} <= set(page.ids)
    for link in page.links:
        assert link[1:] in page.ids if link.startswith("#") else (file.parent / link).is_file()
    for sample in [json.loads(line) for line in (file.parent / "samples.jsonl").read_text().splitlines()]:
        assert f"{sample['rewards']['taste']['dpo']:+.2f}" in text
    for part in ("held-out accuracy", "Held-out comparisons", "training loss (nats", "three small stages"):
        assert part in text
    assert text.count("<svg") == sum(
        own.read_text().count("<svg") for own in here.glob("runs/*-small-*/report.html")
    )


def test_a_stage_that_is_refused_tells_which_one(call: Call, here: Path) -> None:
    rows = (here / "pairs.jsonl").read_text()
    (here / "pairs.jsonl").write_text(rows.replace('"chosen"', '"liked"'))
    status, _, err = call("run", "three")
    assert status == 2 and "stage taste: " in err and "pairs.jsonl" in err
    assert record(here)["status"] == "failed" and record(here)["stages"]["sft"]["status"] == "finished"
    assert record(here)["stages"]["taste"]["status"] == "failed"
    assert record(here)["stages"]["dpo"]["status"] == "waiting"


def test_the_first_stage_refused_leaves_nothing(call: Call, here: Path) -> None:
    (here / "bad.jsonl").write_text('{"instruct": "a"}\n' * 20)
    before = sorted(here.rglob("*"))
    status, _, err = call("run", "three", f"sft.data.source={here / 'bad.jsonl'}")
    assert status == 2 and "stage sft: " in err and "bad.jsonl" in err
    assert sorted(here.rglob("*")) == before


def test_nan_names_the_stage_and_ends_with_status_1(call: Call, here: Path) -> None:
    status, _, err = call("run", "three", "dpo.train.learning_rate=1e30", "dpo.train.warmup=0")
    assert status == 1 and "three, stage dpo (dpo/small): " in err and "train.learning_rate" in err
    assert record(here)["stages"]["dpo"]["status"] == "failed" and "Traceback" not in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_with_status_130_and_the_same_command_goes_on(here: Path, number: int) -> None:
    command = [sys.executable, "-m", "align", "run", "three"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not list(here.glob("runs/reward-small-*/metrics.jsonl")):
        assert process.poll() is None
        time.sleep(0.002)
    os.kill(process.pid, number)
    _, err = process.communicate()
    assert process.returncode == 130 and "stage taste" in err and "the same command goes on" in err, err
    assert record(here)["status"] == record(here)["stages"]["taste"]["status"] == "interrupted"
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert record(here)["status"] == "finished"


def test_a_foreign_folder_is_left_alone(call: Call, here: Path) -> None:
    (here / "mine").mkdir()
    (here / "mine" / "letter.txt").write_text("a")
    status, _, err = call("run", "three", "--out", "mine")
    assert status == 2 and "nothing in that folder was touched" in err
    assert not (here / "runs").exists() and len(list((here / "mine").iterdir())) == 1

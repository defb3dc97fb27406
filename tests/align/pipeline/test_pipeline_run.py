"""Pipelines end to end: execution, reuse of finished stages, interruption, report."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import warm
from small_pipelines import COMMAND, Call, record, weights

from align import load_pipeline, load_reward, run_pipeline
from align.pipeline.compare import compare_stages
from align.pipeline.directory import PipelineDirectory

NAMES = ("sft", "taste", "dpo")


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


def test_every_stage_is_initialized_from_its_parent(done: Path) -> None:
    pipeline_record = record(done)
    stages = pipeline_record["stages"]
    assert pipeline_record["status"] == "finished" and list(stages) == list(NAMES)
    runs = {name: json.loads((done / stages[name]["run"] / "run.json").read_text()) for name in NAMES}
    assert [runs[name]["recipe"] for name in NAMES] == ["small"] * 3
    assert runs["taste"]["init_from"]["files"] == runs["dpo"]["init_from"]["files"] == runs["sft"]["files"]
    assert len((done / stages["dpo"]["run"] / "metrics.jsonl").read_text().splitlines()) == 3, "it is set"
    began = [runs[name]["started"] for name in NAMES]
    assert began == sorted(began)


def test_a_finished_pipeline_returns_at_once(done: Path) -> None:
    def files() -> dict[Path, int]:
        return {
            file: file.stat().st_mtime_ns for file in done.glob("runs/*/*") if "pipeline" not in file.name
        }

    before = files()
    program = "import sys; from align import cli; sys.argv[1:] = ['run', 'three']; cli.main(); "
    program += "print('HEAVY', sorted({'torch', 'transformers', 'matplotlib'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout.endswith("HEAVY []\n"), result.stderr
    assert result.stdout.count("already finished: runs/") == 3
    assert f"llm-align chat {record(done)['stages']['dpo']['run']}" in result.stdout
    assert files() == before


def test_standalone_runs_and_pipeline_runs_are_shared(call: Call, here: Path) -> None:
    assert call("sft", "small")[0] == 0
    (standalone_run,) = (here / "runs").iterdir()
    assert call("dpo", "small", "--from", "sft-small", "train.max_steps=3")[0] == 0
    run_names = sorted(path.name for path in (here / "runs").iterdir())
    status, out, _ = call("run", "three")
    assert status == 0 and f"already finished: runs/{standalone_run.name}" in out
    assert out.count("already finished: ") == 2
    stages = record(here)["stages"]
    assert sorted(Path(stages[name]["run"]).name for name in ("sft", "dpo")) == sorted(run_names)

    command = json.loads((here / stages["taste"]["run"] / "run.json").read_text())["command"].split()
    assert command == ["llm-align", "reward", "small", "--from", f"runs/{standalone_run.name}"]
    before = len(list((here / "runs").iterdir()))
    assert call(*command[1:])[0] == 0
    assert len(list((here / "runs").iterdir())) == before, "the recorded command means the same run"


def test_only_changed_stages_run_again(call: Call, done: Path) -> None:
    status, out, _ = call("run", "three", "dpo.train.max_steps=1")
    assert status == 0 and out.count("already finished: ") == 2
    titles = [f"[{number}/3] {name}: " for number, name in enumerate(NAMES, 1)]
    assert len(titles) == 3 and [title for title in titles if title not in out] == []
    assert len(list(done.glob("runs/dpo-small-*"))) == 2
    resolved = [file.read_text() for file in done.glob("runs/three-*/pipeline.yaml")]
    assert len(resolved) == 2 and sum("train.max_steps: 1" in text for text in resolved) == 1


def test_force_starts_every_stage_over(call: Call, done: Path) -> None:
    stages, files = record(done)["stages"], weights(done)
    adapters = [done / stages[name]["run"] / "adapter" / "adapter_model.safetensors" for name in NAMES]
    before = [adapter.stat().st_mtime_ns for adapter in adapters]
    status, out, _ = call("run", "three", "--force")
    assert status == 0 and "already finished" not in out
    after = [adapter.stat().st_mtime_ns for adapter in adapters]
    assert all(new > old for old, new in zip(before, after, strict=True)) and weights(done) == files


def test_python_returns_results_by_name(done: Path) -> None:
    result = run_pipeline(load_pipeline("three", out="whole"))
    assert result.directory == Path("whole") and result.record["status"] == "finished"
    assert list(result.stages) == list(NAMES) and result.last is result.stages["dpo"]
    assert [line["step"] for line in result.last.metrics] == [1, 2, 3]
    assert [list(line["replies"]) for line in result.samples] == [["sft", "dpo"]] * 2
    samples_by_prompt = {sample["prompt"]: sample for sample in result.last.samples}
    judge = load_reward(result.stages["taste"].directory)
    for line in result.samples:
        stage_sample = samples_by_prompt[line["prompt"]]
        assert line["replies"] == {"sft": stage_sample["before"], "dpo": stage_sample["after"]}
        assert list(line["rewards"]) == ["taste"] and list(line["rewards"]["taste"]) == ["sft", "dpo"]
        for name, reply in line["replies"].items():
            [score] = judge.score([line["prompt"]], [reply])["total"]
            assert line["rewards"]["taste"][name] == pytest.approx(score, abs=1e-4)


def test_missing_completions_are_generated(done: Path) -> None:
    result = run_pipeline(load_pipeline("three"))
    pipeline = load_pipeline("three")
    detached = replace(pipeline, entries=[replace(entry, init_from=None) for entry in pipeline.entries])
    entries = compare_stages(detached, PipelineDirectory(pipeline), result.stages)
    assert entries == result.samples, "the start's own greedy replies are what dpo has found before training"


def test_the_report_contains_every_stage(done: Path) -> None:
    (file,) = done.glob("runs/three-*/report.html")
    text = file.read_text()
    page = Page(text)
    assert page.open == []
    assert {f"stage-{name}" for name in NAMES} <= set(page.ids)
    for link in page.links:
        assert link[1:] in page.ids if link.startswith("#") else (file.parent / link).is_file()
    for sample in [json.loads(line) for line in (file.parent / "samples.jsonl").read_text().splitlines()]:
        assert f"{sample['rewards']['taste']['dpo']:+.2f}" in text
    for fragment in (
        "held-out accuracy",
        "Held-out comparisons",
        "training loss (nats",
        "three small stages",
    ):
        assert fragment in text
    stage_reports = [page.read_text() for page in done.glob("runs/*-small-*/report.html")]
    assert (
        len(stage_reports) == 3
        and text.count("<svg") == sum(page.count("<svg") for page in stage_reports) > 5
    )


def test_a_rejected_stage_is_named(call: Call, here: Path) -> None:
    # Found by the tokenizer: what the rows themselves show is reported before the first stage starts.
    too_long = ["taste.data.max_length=16", "taste.data.overflow=drop"]
    status, _, err = call("run", "three", *too_long)
    assert status == 2 and "stage taste: data.source" in err and "no rows to train on" in err
    assert record(here)["status"] == "failed" and record(here)["stages"]["sft"]["status"] == "finished"
    assert record(here)["stages"]["taste"]["status"] == "failed"
    assert record(here)["stages"]["dpo"]["status"] == "waiting"


def test_a_run_without_weights_is_reported_once(call: Call, done: Path) -> None:
    adapter = done / record(done)["stages"]["sft"]["run"] / "adapter" / "adapter_model.safetensors"
    adapter.unlink()
    status, _, err = call("run", "three", "dpo.train.max_steps=1")
    assert status == 2 and err.count("stage taste: ") == 1 and "lacks adapter/" in err
    assert "llm-align sft small --out " in err and "-again`" in err and "--force" not in err


def test_a_stage_killed_while_its_report_is_written_is_not_finished(
    call: Call, done: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for made in ("three", "dpo"):
        shutil.rmtree(next(done.glob(f"runs/{made}-*")))
    with monkeypatch.context() as patch:
        patch.setattr(
            "finetune.training.context.write_report", lambda *_: os.kill(os.getpid(), signal.SIGTERM)
        )
        patch.setattr("finetune.distributed.interrupts.SignalFlag.handle", _killed)
        with pytest.raises(Killed):
            call("run", "three")
    (run,) = done.glob("runs/dpo-small-*/run.json")
    assert json.loads(run.read_text())["status"] == "running" and "summary" not in run.read_text()
    assert call("run", "three")[0] == 0
    assert weights(done) == weights(finished) and (run.parent / "report.html").is_file()


class Killed(BaseException):
    """Ends a test's run where kill -9 would: nobody catches it."""


def _killed(*_: object) -> None:
    raise Killed


def test_a_rejected_first_stage_leaves_no_files(call: Call, here: Path) -> None:
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
def test_a_signal_exits_with_130_and_the_same_command_resumes(
    call: Call, done: Path, finished: Path, number: int
) -> None:
    for made in ("three", "reward", "dpo"):
        shutil.rmtree(next(done.glob(f"runs/{made}-*")))
    process = warm.Popen(COMMAND, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not list(done.glob("runs/reward-small-*/metrics.jsonl")):
        assert process.poll() is None
        time.sleep(0.002)
    os.kill(process.pid, number)
    _, err = process.communicate()
    assert process.returncode == 130 and "stage taste" in err and "the same command" in err, err
    assert record(done)["status"] == record(done)["stages"]["taste"]["status"] == "interrupted"
    status, out, _ = call("run", "three")
    assert status == 0 and out.count("already finished: ") == 1
    assert record(done)["status"] == "finished" and weights(done) == weights(finished)


def test_a_foreign_folder_is_not_changed(call: Call, here: Path) -> None:
    (here / "mine").mkdir()
    (here / "mine" / "letter.txt").write_text("a")
    status, _, err = call("run", "three", "--out", "mine")
    assert status == 2 and "nothing in this folder was changed" in err
    assert not (here / "runs").exists() and len(list((here / "mine").iterdir())) == 1


def test_a_pipeline_rejects_a_launcher(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    status, _, err = call("run", "three")
    assert status == 2 and "a launcher with 2 processes" in err
    assert "run `llm-align run` without a launcher" in err

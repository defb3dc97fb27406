"""Runs that the pre-flight stops, before anything is written if possible, always with a repair."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fixture_types import Tune
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file, save_file
from tokenizers import processors
from torch import nn
from transformers import AutoTokenizer, TrainerCallback

from data_templates import alpaca
from data_templates.segments import BOS, Message, Segment, Template, markup
from finetune.adapters import lora
from finetune.data import collate
from finetune.recipe.errors import UserError
from finetune.recipe.recipe import read_recipe
from finetune.stages.sft import SFT
from finetune.training import fit, save
from finetune.training.loaded_model import load_finished_run
from finetune.training.recorder import Recorder
from finetune.training.result import Result
from finetune.training.stage import run_stage

ENGINES = ("native", "trl")
BEFORE = [
    "environment",
    "causality",
    "stop token",
    "loss mask",
    "BOS",
    "truncation",
    "replies",
    "vocabulary",
    "gradient",
    "accumulation",
]
AFTER = ["first steps", "base", "saved", "learning"]
QUICK = {"evaluate__samples": 0, "data__cache": False}


@pytest.fixture(scope="module")
def earlier(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """Return a short finished run."""
    shortcuts = {"train.max_steps": 1, "evaluate.samples": 0}
    out = tmp_path_factory.mktemp("earlier") / "run"
    recipe = read_recipe("sft", str(recipe_file), shortcuts=shortcuts, out=out)
    return run_stage(recipe, Console(quiet=True))


@pytest.fixture
def stopped(tune: Tune, earlier: Result, tmp_path: Path) -> Callable[..., UserError]:
    """Return a function that runs a recipe with --force over an earlier run, which must survive."""
    shutil.copytree(earlier.directory, tmp_path / "run")
    before = earlier.record["files"]

    def run(**settings) -> UserError:
        with pytest.raises(UserError) as error:
            tune("run", force=True, **QUICK, **settings)
        record = json.loads((tmp_path / "run" / "run.json").read_text())
        assert record["status"] == "finished" and record["files"] == before
        assert save.file_sha256(tmp_path / "run" / "adapter" / save.ADAPTER_WEIGHTS) in before.values()
        assert all(problem.repair for problem in error.value.problems)
        return error.value

    return run


def change_template(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[list[Segment]], list[Segment]]
) -> None:
    """Change the segments that the template alpaca renders."""

    def render(messages: Sequence[Message]) -> list[Segment]:
        return change(alpaca.render(messages))

    monkeypatch.setattr(alpaca, "TEMPLATE", Template(render, markers=alpaca.TEMPLATE.markers))


@pytest.mark.parametrize("engine", ENGINES)
def test_pain_01_a_template_without_an_end_stops_the_run(stopped, monkeypatch, engine: str) -> None:
    change_template(monkeypatch, lambda segments: [piece for piece in segments if piece.kind != "eos"])
    error = stopped(train__engine=engine)
    assert "100% of the rows do not end with a trained </s>" in str(error)
    assert "sums.jsonl:" in str(error) and "data.template" in str(error)


def test_pain_01_a_masked_end_stops_the_run(stopped, monkeypatch) -> None:
    change_template(
        monkeypatch,
        lambda segments: [
            replace(piece, trained=False) if piece.kind == "eos" else piece for piece in segments
        ],
    )
    assert "it is in the row, but carries no loss" in str(stopped())


@pytest.mark.parametrize("too_long", ["truncate", "drop"])
def test_pain_17_rows_truncated_to_nothing_stop_the_run(stopped, too_long: str) -> None:
    error = stopped(data__max_length=12, data__held_out=0, data__overflow=too_long)
    assert "no row to train on" in str(error) and "raise data.max_length" in str(error)


def test_pain_02_masks_without_a_reply_stop_the_run(stopped, monkeypatch) -> None:
    change_template(monkeypatch, lambda segments: [replace(piece, trained=False) for piece in segments])
    error = stopped(data__held_out=0)
    assert "no row to train on" in str(error) and "sums.jsonl:" in str(error)


def test_pain_16_a_doubled_bos_stops_the_run(stopped, monkeypatch) -> None:
    change_template(monkeypatch, lambda segments: [markup("<s>"), markup("<s>"), *segments])
    assert "42 rows begin with <s> twice" in str(stopped())


def test_pain_16_a_missing_bos_stops_the_run(stopped, monkeypatch, base_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(base_folder, tmp_path / "with_bos"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    bos = ("<s>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[bos]
    )
    tokenizer.save_pretrained(folder)
    change_template(monkeypatch, lambda segments: [piece for piece in segments if piece is not BOS])
    assert "42 rows begin without <s>" in str(stopped(model__base=str(folder)))


def larger(base: Path, folder: Path) -> Path:
    """Return a copy of a base whose tokenizer has more tokens than the model has embeddings."""
    shutil.copytree(base, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([*(f"word{index}" for index in range(600 - len(tokenizer))), "Please"])
    tokenizer.save_pretrained(folder)
    return folder


def test_pain_11_a_tokenizer_larger_than_the_embeddings_stops_the_run(
    stopped, base_folder: Path, tmp_path: Path
) -> None:
    error = stopped(model__base=str(larger(base_folder, tmp_path / "larger")))
    assert "512 embeddings for 601 tokens of the tokenizer; the data uses Please" in str(error)
    assert "model.resize_token_embeddings(601)" in str(error)


def test_pain_11_the_tokenizer_is_saved_with_the_adapter(tune: Tune, base_folder: Path) -> None:
    result = tune("run", evaluate__samples=0, train__max_steps=1, data__template="chatml")
    saved, base = (AutoTokenizer.from_pretrained(folder) for folder in (result.adapter, base_folder))
    assert saved.get_vocab() == base.get_vocab(), "no marker was added to the vocabulary"
    assert load_finished_run(result.directory).encoder.stop_ids == [base.eos_token_id]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_pain_13_contaminated_packing_stops_the_run(stopped, monkeypatch, attention: str) -> None:
    monkeypatch.setattr(collate, "_restarting_positions", lambda row, width: torch.arange(width))
    error = stopped(data__packing=True, model__attention=attention)
    [problem] = [problem for problem in error.problems if problem.where == "data.packing"]
    assert problem.expected == "no change: rows are separate"


def spoiled(monkeypatch: pytest.MonkeyPatch, spoil: Callable[[nn.Module], None]) -> None:
    """Build the adapter with a fault in its second layer."""
    build = lora.build

    def with_mistake(*args) -> nn.Module:
        model = build(*args)
        spoil(model.base_model.model.model.layers[1])
        return model

    monkeypatch.setattr(lora, "build", with_mistake)


@pytest.mark.parametrize("engine", ENGINES)
def test_pain_24_a_frozen_adapter_layer_stops_the_run(stopped, monkeypatch, engine: str) -> None:
    spoiled(monkeypatch, lambda layer: layer.requires_grad_(False))
    error = stopped(train__engine=engine)
    assert "14 tensors are frozen, unlike the same parameter in other layers" in str(error)
    assert "layers.1." in str(error)


def test_pain_24_a_layer_that_passes_its_adapter_by_stops_the_run(stopped, monkeypatch) -> None:
    def pass_by(layer: nn.Module) -> None:
        layer.self_attn.q_proj.forward = layer.self_attn.q_proj.base_layer.forward

    spoiled(monkeypatch, pass_by)
    assert "2 tensors are without a gradient" in str(stopped())


def test_pain_12_a_model_that_mixes_the_rows_of_a_batch_stops_the_run(stopped, monkeypatch) -> None:
    def mix(layer: nn.Module) -> None:
        layer.mlp.register_forward_hook(lambda module, args, output: output - output.mean(0, keepdim=True))

    spoiled(monkeypatch, mix)
    [problem] = stopped().problems
    assert problem.where == "train.micro_batch_size" and "one batch and one by one" in problem.actual


def break_before_training(monkeypatch: pytest.MonkeyPatch, spoil: Callable[[nn.Module], None]) -> None:
    """Break the model after the checks, before step 0."""
    evaluate = SFT.evaluate

    def evaluate_and_break(self: SFT, trainer, when: str) -> dict[str, float]:
        metrics = evaluate(self, trainer, when)
        if when == "before":
            spoil(self.policy.model.base_model.model.model.layers[1])
        return metrics

    monkeypatch.setattr(SFT, "evaluate", evaluate_and_break)


@pytest.mark.parametrize("engine", ENGINES)
def test_pain_24_a_layer_that_is_lost_later_is_found_at_step_1(
    tune: Tune, monkeypatch, tmp_path: Path, engine: str
) -> None:
    def lose(layer: nn.Module) -> None:
        layer.self_attn.q_proj.forward = layer.self_attn.q_proj.base_layer.forward

    break_before_training(monkeypatch, lose)
    with pytest.raises(UserError, match="2 tensors are without a gradient"):
        tune("run", train__engine=engine, **QUICK)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["status"] == "failed" and "without a gradient" in record["error"]
    assert record["preflight"][-1]["passed"] is False and not (tmp_path / "run" / "adapter").exists()


def test_pain_24_a_tensor_that_stays_at_zero_is_reported(tune: Tune, monkeypatch) -> None:
    def block(model: nn.Module) -> None:
        for name, weight in model.named_parameters():
            if "q_proj.lora_A" in name:
                weight.register_hook(torch.zeros_like)

    build = lora.build
    monkeypatch.setattr(lora, "build", lambda *args: [model := build(*args), block(model)][0])
    results = tune("run", train__max_steps=6, **QUICK).record["preflight"]
    [result] = [result for result in results if result["name"] == "first steps"]
    assert result["warned"] and "2 trained tensors had zero gradients for 5 steps" in result["detail"]


def test_a_base_changed_by_training_stops_the_run(tune: Tune, monkeypatch, tmp_path: Path) -> None:
    step = Recorder.on_step_end

    def disturb(self, args, state, control, **kwargs) -> None:
        step(self, args, state, control, **kwargs)
        with torch.no_grad():
            kwargs["model"].base_model.model.model.layers[0].mlp.up_proj.base_layer.weight.mul_(1.01)

    monkeypatch.setattr(Recorder, "on_step_end", disturb)
    with pytest.raises(UserError, match=r"1 of \d+ frozen tensors changed during training: .*up_proj"):
        tune("run", **QUICK)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"


@pytest.mark.parametrize("engine", ENGINES)
def test_pain_10_an_empty_save_stops_the_run(tune: Tune, monkeypatch, tmp_path: Path, engine: str) -> None:
    save_pretrained = PeftModel.save_pretrained

    def save_zeros(model: PeftModel, folder: str, **arguments: object) -> None:
        save_pretrained(model, folder, **arguments)
        if "checkpoint" not in folder:
            save_file({}, Path(folder) / save.ADAPTER_WEIGHTS)

    monkeypatch.setattr(PeftModel, "save_pretrained", save_zeros)
    with pytest.raises(UserError, match="holds 0 tensors of the adapter's 28") as error:
        tune("run", train__engine=engine, **QUICK)
    assert "resume from the last checkpoint" in str(error.value)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"
    assert not (tmp_path / "run" / "adapter").exists()


@pytest.mark.parametrize(
    ("engine", "method"),
    [
        ("native", "lora"),
        ("trl", "lora"),
        ("native", "full"),
        ("native", "adamix"),
        *(
            pytest.param("native", name, marks=pytest.mark.slow)
            for name in ("adalora", "oft", "prefix", "qlora")
        ),
        pytest.param("trl", "full", marks=pytest.mark.slow),
    ],
)
def test_preflight_does_not_change_the_run(tune: Tune, monkeypatch, engine: str, method: str) -> None:
    settings = {"train__engine": engine, "adapter__method": method, "evaluate__samples": 0}
    if method == "lora":
        settings["adapter__dropout"] = 0.3
    checked = tune("checked", **settings)
    monkeypatch.setattr(SFT, "prepare", lambda self: {})
    monkeypatch.setattr(
        fit,
        "FirstStepsCheck",
        lambda report, allows_zero_gradients, engine_takes_gradients: TrainerCallback(),
    )
    unchecked = tune("unchecked", **settings)
    assert checked.record["files"].values() and checked.record["files"] == unchecked.record["files"]
    assert checked.metrics == unchecked.metrics
    assert len(unchecked.record["preflight"]) == 3 < len(checked.record["preflight"])


@pytest.mark.parametrize("engine", ENGINES)
def test_run_json_and_report_hold_every_check(tune: Tune, engine: str) -> None:
    result = tune("run", train__engine=engine, evaluate__samples=0)
    checks = result.record["preflight"]
    assert [check["name"] for check in checks] == BEFORE + AFTER
    assert all(check["passed"] and check["detail"] for check in checks)
    assert [check["name"] for check in checks if check["warned"]] == ["loss mask"], (
        "few tokens of a sum are learnt"
    )
    assert result.record["seconds"]["preflight"] < 10
    html = (result.directory / "report.html").read_text(encoding="utf-8")
    assert "<h2>Checks</h2>" in html and html.count("ok  ") == len(checks) - 1
    assert "!!  loss mask" in html
    assert "100% of the untruncated rows end with a trained &lt;/s&gt;" in html


@pytest.mark.parametrize(
    "settings",
    [{"data__packing": True}, {"train__engine": "trl", "train__engine_args": {"padding_free": True}}],
    ids=["ours", "TRL's"],
)
def test_pain_13_packing_is_checked_where_it_is_asked_for(tune: Tune, settings: dict) -> None:
    checks = tune("run", evaluate__samples=0, **settings).record["preflight"]
    assert [check["name"] for check in checks] == [*BEFORE, "packing", *AFTER]


@pytest.mark.parametrize(
    ("method", "precision"),
    [("qlora", "float32"), ("prompt", "bfloat16"), pytest.param("qlora", "bfloat16", marks=pytest.mark.slow)],
)
def test_every_adapter_passes(tune: Tune, method: str, precision: str) -> None:
    result = tune("run", adapter__method=method, model__precision=precision, evaluate__samples=0)
    checks = result.record["preflight"]
    assert len(checks) == len(BEFORE + AFTER) and all(check["passed"] for check in checks)


def test_pain_05_a_resumed_run_is_checked_again_and_ends_alike(tune: Tune, monkeypatch) -> None:
    uninterrupted = tune("whole", evaluate__samples=0)
    log = Recorder.on_log

    def kill(self: Recorder, args, state, control, logs=None, **kwargs) -> None:
        log(self, args, state, control, logs=logs, **kwargs)
        if state.global_step == 3:
            raise MemoryError

    monkeypatch.setattr(Recorder, "on_log", kill)
    with pytest.raises(MemoryError):
        tune("run", evaluate__samples=0)
    monkeypatch.undo()
    resumed = tune("run", evaluate__samples=0)
    assert [check["name"] for check in resumed.record["preflight"]] == BEFORE + AFTER
    assert resumed.record["files"] == uninterrupted.record["files"]
    assert len(load_file(resumed.adapter / save.ADAPTER_WEIGHTS)) == 28

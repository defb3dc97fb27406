"""Complete runs of continued pretraining: files, every adapter, resuming, SFT after it."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from torch import nn

from align import cli
from finetune.data.tokens import Encoder
from finetune.distributed.interrupts import Interrupted
from finetune.recipe.discovery import ADAPTERS, plugin_names
from finetune.recipe.errors import UserError
from finetune.recipe.recipe import read_recipe
from finetune.training import fit
from finetune.training.context import RunContext
from finetune.training.loaded_model import load_finished_run
from finetune.training.metric_specs import MetricSpec
from finetune.training.result import Result
from finetune.training.stage import run_stage

RECIPE = """\
stage: pretrain
model: {{base: {base}, precision: float32}}
data: {{source: {texts}, separator: "\\n", held_out: 0.2, max_length: 64}}
adapter: {{method: lora, rank: 4, dropout: 0.1}}
train: {{max_steps: 6, batch_size: 4, micro_batch_size: 3, learning_rate: 1e-2, checkpoint_every: 2}}
evaluate: {{samples: 2, max_new_tokens: 4}}
"""
Read = Callable[..., Result]


@pytest.fixture
def read(tmp_path: Path, base_folder: Path) -> Read:
    """Return a function that runs the recipe to its end."""
    texts = tmp_path / "texts.txt"
    texts.write_text(
        "\n".join(f"The number {n} and then {n + 1} and then {n + 2}, add them." for n in range(90))
    )
    recipe = tmp_path / "numbers.yaml"
    recipe.write_text(RECIPE.format(base=base_folder, texts=texts), encoding="utf-8")

    def run(name: str = "run", **settings: Any) -> Result:
        given = {key.replace("__", "."): value for key, value in settings.items()}
        loaded = read_recipe("pretrain", str(recipe), shortcuts=given, out=tmp_path / name)
        return run_stage(loaded, Console(quiet=True), command="a test")

    return run


@pytest.mark.plots
@pytest.mark.parametrize("packing", [False, True])
def test_run_writes_all_files(read: Read, packing: bool) -> None:
    result = read(data__packing=packing, train__max_steps=12)
    names = {path.name for path in result.directory.iterdir()}
    assert {"recipe.yaml", "run.json", "metrics.jsonl", "samples.jsonl", "report.html", "adapter"} <= names
    metrics = result.record["metrics"]
    for when in ("before", "after"):
        loss, perplexity = metrics[f"eval/loss_{when}"], metrics[f"eval/perplexity_{when}"]
        assert perplexity == pytest.approx(math.exp(loss))
    assert metrics["eval/perplexity_after"] < 0.7 * metrics["eval/perplexity_before"]
    summary = result.record["summary"]["held-out perplexity"]
    assert summary == " → ".join(f"{metrics[f'eval/perplexity_{when}']:.1f}" for when in ("before", "after"))
    assert summary in (result.directory / "report.html").read_text()
    assert "text; documents: 72 and 18 held out" in result.record["data"]["lines"][0]
    assert result.record["reload"]["template"] == "plain"


def test_samples_continue_held_out_texts(read: Read, tmp_path: Path) -> None:
    result = read()
    texts = (tmp_path / "texts.txt").read_text().split("\n")
    assert len(result.samples) == 2
    for sample in result.samples:
        assert any(text.startswith(sample["prompt"]) and sample["expected"] in text for text in texts)
        assert sample["before"] != sample["after"]


USUAL = ("full", "lora", "qlora", "prefix", "prompt")
OTHERS = sorted(set(plugin_names(ADAPTERS)) - {*USUAL, "bitfit"})  # this base has no biases


@pytest.mark.parametrize("method", [*USUAL, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_every_adapter_pretrains(read: Read, method: str) -> None:
    result = read(adapter__method=method, train__max_steps=4)
    assert result.record["status"] == "finished" and len(result.metrics) == 4
    assert load_finished_run(result.directory).context > 150


def test_packed_documents_refuse_virtual_tokens(read: Read) -> None:
    with pytest.raises(UserError, match=r"data\.packing.*: true with adapter\.method 'prefix'"):
        read(adapter__method="prefix", data__packing=True)


def test_trl_trains_on_the_same_blocks(read: Read) -> None:
    ways = [
        read(name, train__engine=name, train__micro_batch_size=4, evaluate__samples=0, adapter__dropout=0.0)
        for name in ("native", "trl")
    ]
    before = [way.record["metrics"]["eval/perplexity_before"] for way in ways]
    assert before[0] == pytest.approx(before[1], rel=1e-6)
    assert ways[1].metrics[-1]["loss"] < ways[1].metrics[0]["loss"]


def test_pain_05_an_interrupted_run_ends_like_the_uninterrupted_one(
    read: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    uninterrupted = read("whole", data__packing=True)
    train_to_the_end = fit.fit

    def interrupted_fit(
        ctx: RunContext, trainer: Any, policy: nn.Module, encoder: Encoder, spec: MetricSpec
    ) -> Any:
        step = trainer.training_step

        def first_steps(*args: Any) -> Any:
            if trainer.state.global_step == 3:
                ctx.signal_flag.signal_name = "SIGTERM"
            return step(*args)

        trainer.training_step = first_steps
        return train_to_the_end(ctx, trainer, policy, encoder, spec)

    monkeypatch.setattr(fit, "fit", interrupted_fit)
    with pytest.raises(Interrupted, match="at step 4"):
        read("cut", data__packing=True)
    monkeypatch.undo()
    resumed = read("cut", data__packing=True)
    assert resumed.record["files"] == uninterrupted.record["files"]
    assert [entry["step"] for entry in resumed.metrics] == [entry["step"] for entry in uninterrupted.metrics]


def test_sft_after_pretraining_on_task_prompts(
    read: Read, rows_file: Path, base_folder: Path, tmp_path: Path
) -> None:
    first = read(
        "pcp",
        data__source=str(rows_file),
        data__template="alpaca",
        data__separator=None,
        data__max_length=128,
        adapter__method="full",
        train__learning_rate=3e-3,
        train__max_steps=15,
    )
    recipe = tmp_path / "tune.yaml"
    recipe.write_text(
        f"data: {{source: {rows_file}, held_out: 6, max_length: 128}}\n"
        "train: {max_steps: 2, batch_size: 8}\nevaluate: {samples: 0}\nmodel: {precision: float32}\n"
    )

    def tune(base: str, name: str) -> Result:
        loaded = read_recipe("sft", str(recipe), shortcuts={"model.base": base}, out=tmp_path / name)
        return run_stage(loaded, Console(quiet=True))

    from_base = tune(str(base_folder), "plain")
    after_pretraining = tune(str(first.directory), "behind")
    losses = [run.record["metrics"]["eval/loss_before"] for run in (from_base, after_pretraining)]
    assert losses[1] < losses[0] - 0.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data__loss_on": "assistant"}, "data.loss_on"),
        ({"data__overflow": "drop"}, "data.overflow"),
        ({"data__template": "alpaca"}, "the data is plain text"),
        ({"data__source": "nowhere/a/b.txt"}, "'nowhere/a/b.txt' does not exist"),
        ({"data__held_out": "corpus/held.md"}, "'corpus/held.md' does not exist"),
    ],
)
def test_errors_are_raised_before_anything_is_written(
    read: Read, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as error:
        read(**settings)
    assert message in str(error.value)
    assert not (tmp_path / "run").exists()


def test_the_folder_is_the_registry() -> None:
    assert "pretrain" in cli.cli.commands
    assert "in-house" in str(cli.cli.commands["pretrain"].epilog)

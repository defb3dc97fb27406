"""Complete runs of stage kto in a temporary folder."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from finetune.distributed.interrupts import Interrupted, NotFiniteError
from finetune.recipe.errors import UserError
from finetune.recipe.recipe import read_recipe
from finetune.training.loaded_model import load_finished_run
from finetune.training.recorder import Recorder
from finetune.training.result import Result
from finetune.training.stage import run_stage

ROOT = Path(__file__).parents[3]
DEMO = ROOT / "../shared/data/llamafactory/kto_en_demo.json"
RECIPE = """\
stage: kto
model: {{base: {base}, precision: float32}}
data: {{source: {rows}, held_out: 8, max_length: 64, template: plain, cache: false}}
adapter: {{method: lora, rank: 4, dropout: 0.1}}
train: {{max_steps: 4, batch_size: 8, micro_batch_size: 4, learning_rate: 1e-2, checkpoint_every: 2}}
evaluate: {{samples: 2, max_new_tokens: 4}}
"""
Tune = Callable[..., Result]


@pytest.fixture(scope="module")
def recipe_file(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kto")
    rows = [
        {
            "prompt": f"Add {index // 2} and {index % 7}",
            "completion": "the numbers" * (index % 3 + 1) if index % 2 else "Response: Input",
            "label": bool(index % 2),
        }
        for index in range(48)
    ]
    data = folder / "judged.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    path = folder / "judged.yaml"
    path.write_text(RECIPE.format(base=base_folder, rows=data), encoding="utf-8")
    return path


@pytest.fixture
def tune(recipe_file: Path, tmp_path: Path) -> Tune:
    """Return a function that runs the recipe to its end, ``train__max_steps=5`` for ``train.max_steps``."""

    def run(name: str = "run", **settings: Any) -> Result:
        given = {key.replace("__", "."): value for key, value in settings.items()}
        recipe = read_recipe("kto", str(recipe_file), shortcuts=given, out=tmp_path / name)
        return run_stage(recipe, Console(quiet=True), command="a test")

    return run


@pytest.mark.plots
def test_run_learns_and_records_metrics(tune: Tune) -> None:
    result = tune(train__max_steps=8, train__evaluate_every=4)
    steps = [line for line in result.metrics if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 9))
    assert steps[0]["loss"] == pytest.approx(0.5, abs=1e-6) and steps[-1]["loss"] < 0.49
    assert {"rewards/chosen", "rewards/rejected", "rewards/margins", "kto/z"} <= steps[-1].keys()
    assert [line["step"] for line in result.metrics if "eval/loss" in line] == [4, 8]
    metrics = result.record["metrics"]
    assert metrics["eval/loss_before"] == pytest.approx(0.5, abs=1e-6)
    assert metrics["eval/rewards/margins_before"] == pytest.approx(0.0, abs=1e-6)
    assert metrics["eval/rewards/margins_after"] > 0.05
    assert "held-out margin" in result.record["summary"]
    checks = {check["name"]: check["detail"] for check in result.record["preflight"]}
    assert checks["start"] == "policy equals reference before step 0: loss 0.5000, expected 0.5000"
    assert checks["balance"] == "21 good completions, 19 bad; weighted 1.11 to 1"
    assert len(result.samples) == 2
    assert [sample for sample in result.samples if not {"before", "after"} <= sample.keys()] == []


def test_saved_adapter_loads_with_peft_and_as_a_run(tune: Tune, base_folder: Path) -> None:
    result = tune()
    assert not (result.adapter / "ref").exists()
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder), result.adapter)
    saved = load_file(result.adapter / "adapter_model.safetensors")
    assert any(value.any() for name, value in saved.items() if "lora_B" in name)
    assert list(model.peft_config) == ["default"]
    assert load_finished_run(result.directory).encoder.name == "plain"


def test_interrupted_run_resumes_bit_for_bit(tune: Tune, monkeypatch: pytest.MonkeyPatch) -> None:
    uninterrupted = tune("whole", train__max_steps=7)
    log = Recorder.on_log

    def interrupt_at_step_2(self: Recorder, args, state, control, logs=None, **kwargs) -> None:
        log(self, args, state, control, logs=logs, **kwargs)
        if state.global_step == 2 and not self.signal_flag.signal_name:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Recorder, "on_log", interrupt_at_step_2)
    with pytest.raises(Interrupted, match="stopped by SIGTERM at step 3; checkpoint saved"):
        tune(train__max_steps=7)
    monkeypatch.undo()
    resumed = tune(train__max_steps=7)
    assert [line["step"] for line in resumed.metrics] == list(range(1, 8)), (
        "the second epoch begins at step 6"
    )
    assert resumed.record["files"] == uninterrupted.record["files"]
    assert resumed.samples == uninterrupted.samples


@pytest.mark.parametrize("method", ["prefix", "prompt", "ia3", "full", "vera", "oft", "dora"])
def test_policy_equals_reference_for_adapters(tune: Tune, method: str) -> None:
    result = tune(adapter__method=method, train__max_steps=2, evaluate__samples=0, data__held_out=0)
    passed = {check["name"]: check["passed"] for check in result.record["preflight"]}
    assert passed == dict.fromkeys(passed, True) and {"start", "base"} <= passed.keys()


def test_pairs_become_labels(tune: Tune) -> None:
    pairs = [{"prompt": f"Add {i}", "chosen": "the numbers", "rejected": "Input"} for i in range(12)]
    result = tune(data__source=pairs, data__held_out=0, train__max_steps=1, evaluate__samples=0)
    assert result.record["data"]["rows"] == 24
    assert any("chosen is good" in line for line in result.record["data"]["lines"])


def test_non_finite_loss_names_step_and_rows(tune: Tune) -> None:
    with pytest.raises(NotFiniteError, match=r"^loss is (nan|inf) at step \d, on \S*judged\.jsonl:\d+(, |$)"):
        tune(train__learning_rate=1e30, train__warmup=0, evaluate__samples=0)


@pytest.mark.parametrize(
    ("settings", "where", "repair"),
    [
        ({"train__engine": "native"}, "train.engine", ""),
        ({"train__micro_batch_size": 1}, "train.micro_batch_size", "train.micro_batch_size=auto"),
        ({"train__neftune_alpha": 5.0}, "train.neftune_alpha", "train.neftune_alpha=null"),
        ({"train__label_smoothing": 0.1}, "train.label_smoothing", "train.label_smoothing=0"),
        ({"adapter__method": "pissa"}, "adapter.method", "adapter.method=lora"),
        ({"data__packing": True}, "data.packing", ""),
        ({"kto__beta": 0.0}, "kto.beta", ""),
        ({"train__engine_args": {"beta": 1.0}}, "train.engine_args.beta", ""),
        ({"train__engine_args": {"max_length": 9}}, "train.engine_args.max_length", ""),
    ],
)
def test_unsupported_recipes_are_refused_before_writing(
    tune: Tune, tmp_path: Path, settings: dict[str, Any], where: str, repair: str
) -> None:
    with pytest.raises(UserError) as error:
        tune(**settings)
    [problem] = [candidate for candidate in error.value.problems if candidate.where.split(" ")[0] == where]
    assert repair in problem.repair
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(not DEMO.is_file(), reason="published data is not here")
def test_llama_factory_labeled_conversations(tune: Tune) -> None:
    result = tune(data__source=str(DEMO), data__template="chatml", train__max_steps=1, evaluate__samples=0)
    assert result.record["data"]["layout"] == "messages with label"
    assert result.record["data"]["rows"] > 200


def test_published_numbers() -> None:
    train = read_recipe("kto", "kto-mix").settings.train
    assert (train.epochs, train.batch_size, train.lr_schedule, train.warmup) == (1, 16, "cosine", 0.1)

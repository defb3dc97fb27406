"""An optimizer step does not depend on micro-batches, packing, gradient checkpointing or engine."""

from pathlib import Path
from typing import Any

import pytest
import torch
from fixture_types import Tune
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from small_models import assert_close, gradients, make, reference_loss_sum, token_rows
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, Trainer, TrainerCallback

from finetune.data.collate import Collator, PackedCollator, PaddedCollator
from finetune.data.dataset import TokenizedRows
from finetune.engines.trl.trainer import TrlSFTTrainer
from finetune.recipe.settings import TrainSettings
from finetune.training.arguments import ExecutionConfig, training_arguments
from finetune.training.result import Result
from finetune.training.trainer import NativeTrainer, TrainerData

LENGTHS = [9, 3, 14, 2, 6, 20, 5, 11]
COLLATORS: dict[str, Collator] = {
    "padded": PaddedCollator(0),
    "packed": PackedCollator(0),
    "one line": PackedCollator(0, single_row=True),
}


class Gradients(TrainerCallback):
    """Records the gradients before each optimizer step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        weights = kwargs["model"].named_parameters()
        self.steps.append({name: weight.grad.clone() for name, weight in weights if weight.grad is not None})


def lora(model: nn.Module) -> nn.Module:
    torch.manual_seed(5)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(model, config)


def settings(**changes: Any) -> TrainSettings:
    defaults = {"batch_size": 8, "max_steps": 1, "learning_rate": 1e-3, "max_grad_norm": 0.0, "warmup": 0}
    return TrainSettings(**{**defaults, **changes})


def trainer(
    model: nn.Module, rows: TokenizedRows, collator: Collator, folder: Path, micro: int, **changes: Any
) -> NativeTrainer:
    train = settings(**changes)
    args = training_arguments(
        train,
        folder=folder,
        execution=ExecutionConfig("cpu", "float32"),
        micro_batch_size=micro,
        checkpoint_every=100,
    )
    return NativeTrainer(
        model,
        args,
        TrainerData(rows, None, collator, train.batch_size, train.group_by_length),
    )


def steps_of(engine: Trainer) -> list[dict[str, torch.Tensor]]:
    seen = Gradients()
    engine.remove_callback(PrinterCallback)
    engine.add_callback(seen)
    engine.train()
    return seen.steps


@pytest.mark.parametrize("collation", COLLATORS)
@pytest.mark.parametrize("micro", [1, 3, 8])
def test_pain_12_accumulation_gives_the_gradient_of_the_full_batch(
    tmp_path: Path, micro: int, collation: str
) -> None:
    rows = token_rows(LENGTHS)  # 3 rows per micro-batch: 3 + 3 + 2; they hold different numbers of labels
    model = lora(make("llama"))
    expected = gradients(model, reference_loss_sum(model, rows) / rows.num_trained)
    engine = trainer(model, rows, COLLATORS[collation], tmp_path, micro)
    [grads] = steps_of(engine)
    assert_close(grads, expected, 1e-5)
    loss = reference_loss_sum(lora(make("llama")), rows).item() / rows.num_trained
    assert engine.state.log_history[0]["loss"] == pytest.approx(loss, abs=1e-4)


@pytest.mark.parametrize("micro", [1, 3, 4, 5])
def test_pain_12_a_smaller_last_batch_is_a_step_of_its_own(tmp_path: Path, micro: int) -> None:
    rows = token_rows([*LENGTHS, 7, 8, 4])  # 11 rows: batches of 5, 5 and 1
    full_batch = steps_of(trainer(lora(make("llama")), rows, COLLATORS["padded"], tmp_path, 5, **FIVE))
    micro_batches = steps_of(trainer(lora(make("llama")), rows, COLLATORS["padded"], tmp_path, micro, **FIVE))
    assert len(full_batch) == len(micro_batches) == 6  # two epochs
    for grads, expected in zip(micro_batches, full_batch, strict=True):
        assert_close(grads, expected, 2e-3)  # rounding differences in the weights grow step by step
    assert_close(micro_batches[0], full_batch[0], 1e-5)


FIVE = {"batch_size": 5, "max_steps": None, "epochs": 2}


def test_gradient_checkpointing_gives_the_same_gradient(tmp_path: Path) -> None:
    rows = token_rows(LENGTHS)
    [expected] = steps_of(trainer(lora(make("llama")), rows, COLLATORS["padded"], tmp_path, 4))
    again = lora(make("llama"))
    again.enable_input_require_grads()
    engine = trainer(again, rows, COLLATORS["padded"], tmp_path, 4, gradient_checkpointing=True)
    [grads] = steps_of(engine)
    assert again.get_base_model().is_activation_checkpointing
    assert_close(grads, expected, 1e-6)


@pytest.mark.parametrize("micro", [8, 4])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_native_and_trl_take_the_same_step(
    tmp_path: Path, base_folder: Path, method: str, micro: int
) -> None:
    rows = token_rows(LENGTHS)
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    engines = []
    for name in ("native", "trl"):
        model = AutoModelForCausalLM.from_pretrained(base_folder)
        model = lora(model) if method == "lora" else model
        if name == "native":
            engines.append(trainer(model, rows, COLLATORS["padded"], tmp_path / name, micro))
        else:
            args = training_arguments(
                settings(engine="trl"),
                folder=tmp_path / name,
                execution=ExecutionConfig("cpu", "float32"),
                micro_batch_size=micro,
                checkpoint_every=100,
            )
            engines.append(TrlSFTTrainer(model, args, tokenizer, train=rows, held_out=None))
    native, trl = engines
    [grads], [expected] = steps_of(native), steps_of(trl)
    assert_close(grads, expected, 1e-5)
    losses = [engine.state.log_history[0]["loss"] for engine in engines]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    after = [dict(engine.model.named_parameters()) for engine in engines]
    for name, weight in after[0].items():
        assert torch.allclose(weight, after[1][name], atol=1e-5), name


def adapter(result: Result) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = load_file(result.directory / "adapter" / "adapter_model.safetensors")
    return weights


def test_micro_batches_and_packing_do_not_change_the_result(tune: Tune) -> None:
    calm = {"train__engine_args": {"adam_epsilon": 1e-3}, "evaluate__samples": 0, "train__max_steps": 6}
    expected = adapter(tune("whole", train__micro_batch_size=8, **calm))
    changed = {
        "one by one": {"train__micro_batch_size": 1},
        "three": {"train__micro_batch_size": 3},
        "packed": {"data__packing": True, "train__micro_batch_size": 8},
        "packed in threes": {"data__packing": True, "train__micro_batch_size": 3},
    }
    assert max(float(value.abs().max()) for key, value in expected.items() if "lora_B" in key) > 1e-3
    for name, change in changed.items():
        actual = adapter(tune(name, **calm, **change))
        for key, value in expected.items():
            assert torch.allclose(actual[key], value, atol=1e-5), f"{name}: {key}"


def test_bfloat16_runs_on_the_cpu_and_stays_near_float32(tune: Tune) -> None:
    # Warm-up keeps the updates small: at the full rate from step 1 on rounding is amplified.
    calm = {"evaluate__samples": 0, "train__max_steps": 6, "train__warmup": 6}
    exact = tune("float32", **calm)
    rough = tune("bfloat16", **calm, model__precision="bfloat16")
    assert rough.record["reload"]["precision"] == "bfloat16"
    assert all(value.dtype == torch.float32 for value in adapter(rough).values())
    for exact_entry, rough_entry in zip(exact.metrics, rough.metrics, strict=True):
        assert rough_entry["loss"] == pytest.approx(exact_entry["loss"], abs=0.03)
    assert [entry["loss"] for entry in exact.metrics] != [entry["loss"] for entry in rough.metrics]


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "adafactor"])
def test_every_optimizer_steps(tune: Tune, optimizer: str) -> None:
    result = tune("run", train__optimizer=optimizer, evaluate__samples=0, train__max_steps=4)
    losses = [entry["loss"] for entry in result.metrics]
    assert len(losses) == 4 and losses[-1] < losses[0]


def test_evaluate_every_writes_the_held_out_loss(tune: Tune) -> None:
    result = tune("run", train__evaluate_every=2, train__max_steps=4, evaluate__samples=0)
    entries = [(entry["step"], entry["eval/loss"]) for entry in result.metrics if "eval/loss" in entry]
    assert [step for step, _ in entries] == [2, 4], "each step is measured once"
    assert entries[1][1] == pytest.approx(result.record["metrics"]["eval/loss_after"], rel=1e-6)
    assert entries[1][1] < result.record["metrics"]["eval/loss_before"]


def test_trl_writes_the_held_out_loss_too(tune: Tune) -> None:
    ways = [
        tune(name, train__engine=name, train__evaluate_every=2, train__max_steps=2, evaluate__samples=0)
        for name in ("native", "trl")
    ]
    native, trl = ([entry["eval/loss"] for entry in way.metrics if "eval/loss" in entry] for way in ways)
    assert len(native) == len(trl) == 1
    before = [way.record["metrics"]["eval/loss_before"] for way in ways]
    assert before[0] == pytest.approx(before[1], rel=1e-6)

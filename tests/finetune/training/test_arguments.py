"""Recipe settings as training arguments of the engines."""

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from fixture_types import MakeRecipe
from rich.console import Console
from transformers import TrainingArguments
from trl import SFTConfig

from finetune.distributed.rank import DistInfo
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.settings import TrainSettings
from finetune.training import loading
from finetune.training.arguments import (
    TRAINER_OPTIMIZERS,
    ExecutionConfig,
    check_engine_args,
    training_arguments,
)
from finetune.training.context import RunContext
from finetune.training.run_directory import RunDirectory


def arguments(tmp_path: Path, *, precision: str = "float32", micro: int = 4, **settings: Any) -> Any:
    return training_arguments(
        TrainSettings(**settings),
        folder=tmp_path,
        execution=ExecutionConfig("cpu", precision),
        micro_batch_size=micro,
        checkpoint_every=7,
    )


def test_every_setting_is_passed_on(tmp_path: Path) -> None:
    actual = arguments(
        tmp_path,
        epochs=2.5,
        batch_size=16,
        learning_rate=3e-4,
        lr_schedule="linear",
        warmup=10,
        betas=[0.8, 0.95],
        weight_decay=0.1,
        max_grad_norm=0.5,
        seed=11,
        keep_checkpoints=3,
        log_every=5,
        evaluate_every=20,
    )
    expected = {
        "num_train_epochs": 2.5,
        "max_steps": -1,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4,
        "learning_rate": 3e-4,
        "lr_scheduler_type": "linear",
        "warmup_steps": 10,
        "adam_beta1": 0.8,
        "adam_beta2": 0.95,
        "weight_decay": 0.1,
        "max_grad_norm": 0.5,
        "seed": 11,
        "save_steps": 7,
        "save_total_limit": 3,
        "logging_steps": 5,
        "eval_steps": 20,
        "eval_strategy": "steps",
        "output_dir": str(tmp_path),
        "use_cpu": True,
        "bf16": False,
        "fp16": False,
    }
    assert {key: getattr(actual, key) for key in expected} == expected


@pytest.mark.parametrize(("batch", "micro", "passes"), [(8, 8, 1), (8, 3, 3), (8, 1, 8), (7, 2, 4)])
def test_forward_passes_of_a_step(tmp_path: Path, batch: int, micro: int, passes: int) -> None:
    assert arguments(tmp_path, micro=micro, batch_size=batch).gradient_accumulation_steps == passes


def test_bfloat16_on_a_cpu(tmp_path: Path) -> None:
    actual = arguments(tmp_path, precision="bfloat16")
    assert (actual.bf16, actual.fp16, actual.use_cpu) == (True, False, True)


@pytest.mark.parametrize("optimizer", TRAINER_OPTIMIZERS)
def test_optimizer_names_are_the_engine_s(tmp_path: Path, optimizer: str) -> None:
    assert arguments(tmp_path, optimizer=optimizer).optim == TRAINER_OPTIMIZERS[optimizer]


@pytest.mark.parametrize(("engine", "kind"), [("native", TrainingArguments), ("trl", SFTConfig)])
def test_engine_args_are_checked_against_the_engine(engine: str, kind: type) -> None:
    engine_args = {"adam_epsilonn": 1, "learning_rate": 1, "adam_epsilon": 1}
    settings = TrainSettings(engine=engine, engine_args=engine_args)
    with pytest.raises(UserError) as error:
        check_engine_args(settings)
    unknown, reserved = error.value.problems
    assert unknown.where == "train.engine_args.adam_epsilonn" and unknown.actual == "unknown to the engine"
    assert kind.__name__ in unknown.expected and unknown.repair == "did you mean 'adam_epsilon'?"
    assert reserved.where == "train.engine_args.learning_rate" and reserved.actual == "set by the recipe"


@pytest.mark.parametrize("engine", ["native", "trl"])
@pytest.mark.parametrize(
    ("name", "value", "key"),
    [
        ("gradient_checkpointing", True, "train.gradient_checkpointing"),
        ("deepspeed", "ds_z2.json", "train.strategy"),
        ("fsdp", "full_shard", "train.strategy"),
        ("fsdp_config", {"version": 2}, "train.strategy"),
    ],
)
def test_arguments_with_a_recipe_key_of_another_name_are_refused(
    tmp_path: Path, engine: str, name: str, value: object, key: str
) -> None:
    with pytest.raises(UserError) as error:
        arguments(tmp_path, engine=engine, engine_args={name: value})
    assert error.value.problems[0].where == f"train.engine_args.{name}"
    assert error.value.problems[0].actual == "set by the recipe"
    assert error.value.problems[0].repair == f"use {key}"


def test_each_engine_has_its_own_arguments(tmp_path: Path) -> None:
    assert arguments(tmp_path, engine="trl", engine_args={"padding_free": True}).padding_free is True
    with pytest.raises(UserError, match="padding_free: unknown to the engine"):
        arguments(tmp_path, engine_args={"padding_free": True})
    with pytest.raises(UserError, match="max_length: set by the recipe"):
        arguments(tmp_path, engine="trl", engine_args={"max_length": 9})


def test_engine_args_are_passed_on(tmp_path: Path) -> None:
    assert arguments(tmp_path, engine_args={"adam_epsilon": 1e-3}).adam_epsilon == 1e-3


def test_a_value_that_the_engine_refuses_is_reported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train\.engine_args: .*sometimes"):
        arguments(tmp_path, engine_args={"hub_strategy": "sometimes"})


@pytest.mark.parametrize(("batch", "micro", "fits"), [(8, 3, 2), (8, 5, 4), (7, 2, 1), (12, 5, 4)])
def test_trl_steps_hold_batch_size_rows(tmp_path: Path, batch: int, micro: int, fits: int) -> None:
    with pytest.raises(UserError, match=f"train.micro_batch_size={fits}$"):
        arguments(tmp_path, engine="trl", batch_size=batch, micro=micro)
    actual = arguments(tmp_path, engine="trl", batch_size=batch, micro=fits)
    assert actual.gradient_accumulation_steps * actual.per_device_train_batch_size == batch


@pytest.mark.parametrize(
    ("batch_size", "micro", "repair"),
    [(7, 1, "train.batch_size=8"), (12, 4, "train.micro_batch_size=3")],
)
def test_trl_steps_divide_by_processes(tmp_path: Path, batch_size: int, micro: int, repair: str) -> None:
    settings = TrainSettings(engine="trl", batch_size=batch_size)
    execution = ExecutionConfig("cpu", "float32", num_processes=2)
    with pytest.raises(UserError) as error:
        training_arguments(
            settings, folder=tmp_path, execution=execution, micro_batch_size=micro, checkpoint_every=7
        )
    assert error.value.problems[0].repair == repair


@pytest.mark.parametrize(
    ("batch_size", "micro", "processes", "repair"),
    [(8, 3, 1, "train.micro_batch_size=2"), (7, "auto", 2, "train.batch_size=8"), (8, "auto", 2, None)],
)
def test_trl_steps_are_checked_before_anything_is_loaded(
    make_recipe: MakeRecipe,
    monkeypatch: pytest.MonkeyPatch,
    batch_size: int,
    micro: int | str,
    processes: int,
    repair: str | None,
) -> None:
    loaded = UserError(Problem("model.base", "loaded", "nothing", "nothing is loaded"))
    monkeypatch.setattr(loading, "build_text_encoding", Mock(side_effect=loaded))
    train = {"train__engine": "trl", "train__batch_size": batch_size, "train__micro_batch_size": micro}
    recipe = make_recipe(**train, train__strategy="single" if processes == 1 else "ddp")
    run, dist = RunDirectory.of(recipe, force=False), DistInfo(0, processes, 0)
    with pytest.raises(UserError) as error:
        loading.load_text_encoding(RunContext(recipe, run, Console(quiet=True), "a test", dist=dist))
    assert error.value.problems[0].repair == (repair or "nothing is loaded")

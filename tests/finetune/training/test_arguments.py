"""Recipe settings as training arguments of the engines."""

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from fixture_types import MakeRecipe
from rich.console import Console

from finetune.distributed.rank import DistInfo
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.settings import TrainSettings
from finetune.training import loading
from finetune.training.arguments import (
    TRAINER_OPTIMIZERS,
    ExecutionConfig,
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


@pytest.mark.parametrize(
    ("engine", "name", "value"),
    [
        ("native", "adam_epsilon", 1e-3),
        ("native", "torch_empty_cache_steps", 5),
        ("trl", "adam_epsilon", 1e-3),
        ("trl", "padding_free", True),
        ("trl", "pad_to_multiple_of", 8),
    ],
)
def test_engine_args_are_passed_on(tmp_path: Path, engine: str, name: str, value: object) -> None:
    actual = arguments(tmp_path, engine=engine, engine_args={name: value})
    assert getattr(actual, name) == value


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

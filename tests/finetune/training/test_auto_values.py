"""Resolution of ``auto`` settings."""

from pathlib import Path
from typing import Any

import pytest
from fixture_types import Tune

from finetune.distributed.hardware import GIB, Hardware, detect_hardware, peak_memory_bytes
from finetune.recipe.base_config import StoredQuantization
from finetune.recipe.discovery import adapter_settings
from finetune.recipe.errors import UserError
from finetune.recipe.recipe import read_recipe
from finetune.recipe.settings import StageSettings
from finetune.training import auto_values

OLD = Hardware("cpu", "an old CPU", bfloat16=False)
NEW = Hardware("cpu", "a new CPU", bfloat16=True)
CPU = Hardware("cpu", "a CPU", bfloat16=False)
GPU = Hardware("cuda", "a GPU", bfloat16=True)
OLD_GPU = Hardware("cuda", "an old GPU", bfloat16=False)


@pytest.mark.parametrize(
    ("requested", "hardware", "expected"),
    [
        ("auto", OLD, "float32"),
        ("auto", NEW, "bfloat16"),
        ("auto", GPU, "bfloat16"),
        ("bfloat16", OLD, "bfloat16"),
        ("float32", GPU, "float32"),
        ("float16", GPU, "float16"),
    ],
)
def test_precision(requested: str, hardware: Hardware, expected: str) -> None:
    value, reason = auto_values.precision(requested, hardware)
    assert value == expected
    assert reason == "as requested" if requested != "auto" else hardware.name in reason


@pytest.mark.parametrize(
    ("requested", "context", "virtual_tokens", "expected"),
    [
        (None, 256, 0, 256),
        (None, 256, 20, 236),
        (None, 131072, 0, 2048),
        (None, 2050, 20, 2030),
        (256, 256, 0, 256),
        (4096, 8192, 0, 4096),
        (236, 256, 20, 236),
        (None, 28, 20, 8),
    ],
)
def test_max_length(requested: int | None, context: int, virtual_tokens: int, expected: int) -> None:
    assert auto_values.max_length(requested, context=context, virtual_tokens=virtual_tokens)[0] == expected


def test_a_length_above_the_context_names_the_length_that_fits() -> None:
    with pytest.raises(UserError) as error:
        auto_values.max_length(256, context=256, virtual_tokens=20)
    text = str(error.value)
    assert "data.max_length: found 256" in text
    assert "at most 236: the model has 256 positions, the adapter takes 20" in text
    assert "data.max_length=236" in text


@pytest.mark.parametrize("requested", [None, 8, 100])
def test_virtual_tokens_leave_room_for_a_row(requested: int | None) -> None:
    with pytest.raises(UserError, match=r"virtual_tokens: 250 of .* 256 positions\n +expected: at most 248"):
        auto_values.max_length(requested, context=256, virtual_tokens=250)


@pytest.mark.parametrize(
    ("requested", "longest", "hardware", "expected"),
    [
        (3, 5000, NEW, 3),
        ("auto", 2048, NEW, 1),
        ("auto", 2049, NEW, 1),
        ("auto", 1024, NEW, 2),
        ("auto", 60, NEW, 32),
        ("auto", 1000, GPU, 16),
        ("auto", 2000, GPU, 8),
    ],
)
def test_micro_batch_size(requested: int | str, longest: int, hardware: Hardware, expected: int) -> None:
    value, _ = auto_values.micro_batch_size(requested, batch_size=32, longest=longest, hardware=hardware)
    assert value == expected


@pytest.mark.parametrize(
    ("batch", "longest", "least", "expected"),
    [(10, 500, 1, 2), (12, 5000, 1, 1), (12, 5000, 2, 2), (9, 5000, 2, 3), (16, 500, 2, 4), (7, 1000, 1, 1)],
)
def test_steps_of_whole_forward_passes(batch: int, longest: int, least: int, expected: int) -> None:
    """2048 tokens per forward pass on a CPU: 4 rows of 500, reduced to 2, which divides 10; 1 row of 5000."""
    value, why = auto_values.micro_batch_size(
        "auto", batch_size=batch, longest=longest, hardware=CPU, must_divide=True, min_rows=least
    )
    assert value == expected and batch % value == 0
    assert ("a divisor of" in why) == (batch % max(least, min(batch, 2048 // longest)) > 0)


@pytest.mark.parametrize(
    ("requested", "steps", "expected"),
    [(7, 100, 7), (None, 100, 10), (None, 109, 10), (None, 5, 1)],
)
def test_checkpoint_every(requested: int | None, steps: int, expected: int) -> None:
    assert auto_values.checkpoint_every(requested, steps=steps)[0] == expected


def test_quantization() -> None:
    assert auto_values.quantization("auto", ("nf4", "int8"))[0] == "nf4"
    assert auto_values.quantization("auto", ("none",))[0] == "none"
    assert auto_values.quantization("int8", ("nf4", "int8")) == ("int8", "as requested")


def test_stored_quantization_is_kept() -> None:
    stored = StoredQuantization("bitsandbytes", "nf4", "nf4")
    assert auto_values.quantization("auto", ("none", "nf4"), stored)[0] == "nf4"
    assert auto_values.quantization("nf4", ("none", "nf4"), stored)[0] == "nf4"


@pytest.mark.parametrize(
    ("requested", "supported", "stored", "where"),
    [
        ("none", ("none", "nf4"), ("bitsandbytes", "nf4"), "model.quantization"),
        ("int8", ("none", "nf4", "int8"), ("bitsandbytes", "nf4"), "model.quantization"),
        ("auto", ("none",), ("bitsandbytes", "nf4"), "model.base"),
        ("auto", ("none", "nf4"), ("bitsandbytes", "int8"), "model.base"),
        ("auto", ("none", "nf4", "int8"), ("gptq", ""), "model.base"),
        ("nf4", ("none", "nf4", "int8"), ("fp8", ""), "model.base"),
    ],
)
def test_contradictions_with_the_stored_quantization_are_refused(
    requested: str, supported: tuple[str, ...], stored: tuple[str, Any], where: str
) -> None:
    with pytest.raises(UserError) as caught:
        auto_values.quantization(requested, supported, StoredQuantization(*stored))
    [problem] = caught.value.problems
    assert problem.where == where and stored[0] in f"{problem.actual} {problem.expected}" and problem.repair


def test_this_machine_is_detected_by_name_and_memory() -> None:
    hardware = detect_hardware()
    assert hardware.device in ("cpu", "cuda") and hardware.name
    if hardware.device == "cpu":
        assert hardware.name.endswith("threads")
        assert 10 * 2**20 < peak_memory_bytes(hardware) < 2**40


@pytest.mark.parametrize(
    ("most", "expected", "reason"),
    [
        (99, 16, "16384 tokens per forward pass saturate the device"),
        (16, 16, "16384 tokens per forward pass saturate the device"),
        (15, 15, "would not fit in memory"),
        (7, 7, "would not fit in memory"),
        (1, 1, "would not fit in memory"),
        (0, 1, "even this may not fit in memory"),
    ],
)
def test_a_forward_pass_has_as_many_rows_as_the_plan_has_memory_for(
    most: int, expected: int, reason: str
) -> None:
    size, why = auto_values.micro_batch_size(
        "auto", batch_size=64, longest=1024, hardware=GPU, fits=lambda rows: rows <= most
    )
    assert size == expected and reason in why


def test_memory_and_whole_steps_go_together() -> None:
    size, why = auto_values.micro_batch_size(
        "auto", batch_size=64, longest=1024, hardware=GPU, must_divide=True, fits=lambda rows: rows <= 7
    )
    assert size == 4 and "a divisor of 64" in why


@pytest.mark.parametrize(
    ("hardware", "method", "expected"),
    [(GPU, "lora", ("bfloat16", "none")), (OLD_GPU, "qlora", ("float32", "nf4"))],
)
def test_auto_precision_and_quantization(hardware: Hardware, method: str, expected: tuple[str, str]) -> None:
    resolved = auto_values.precision_and_quantization(
        StageSettings(adapter=adapter_settings(method).model_validate({"method": method})), hardware
    )
    assert tuple(value for value, _ in resolved.values()) == expected


def largest_batch(stage: str, gpu_bytes: int, *, base: str = "llama-2-7b", processes: int = 1) -> int:
    """Return the largest number of rows of 512 tokens that fit."""
    settings = read_recipe(stage, "quickstart").settings
    model = settings.model.model_copy(update={"base": base, "init_from": None})
    settings = settings.model_copy(update={"model": model})
    strategy = "ddp" if processes > 1 else "single"
    fits = auto_values.batch_fits(
        settings,
        precision="bfloat16",
        quantization="none",
        longest=512,
        num_processes=processes,
        strategy=strategy,
        gpu_bytes=gpu_bytes,
    )
    assert fits is not None
    predicate = [rows for rows in range(1, 200) if fits(rows)]
    assert predicate == list(range(1, len(predicate) + 1)), "more rows never need less"
    return len(predicate)


def test_more_memory_allows_larger_batches() -> None:
    few, more = largest_batch("sft", 24 * GIB), largest_batch("sft", 40 * GIB)
    assert 0 < few < more < 199
    assert largest_batch("sft", 12 * GIB) == 0, "the weights alone have 12.6 GiB"


@pytest.mark.parametrize("stage", ["sft", "dpo", "reward", "kto", "grpo", "rloo", "ppo", "rejection"])
def test_every_stage_has_a_predicate(stage: str) -> None:
    assert 0 < largest_batch(stage, 40 * GIB) < 199


def test_ppo_counts_actor_and_critic() -> None:
    assert largest_batch("ppo", 40 * GIB) < 0.7 * largest_batch("sft", 40 * GIB)


def test_an_unknown_architecture_has_no_predicate(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    settings = read_recipe("sft", "quickstart").settings
    model = settings.model.model_copy(update={"base": str(tmp_path)})
    policy: dict[str, Any] = {"precision": "bfloat16", "quantization": "none"}
    gpu: dict[str, Any] = {"longest": 512, "num_processes": 1, "strategy": "single", "gpu_bytes": 40 * GIB}
    assert auto_values.batch_fits(settings.model_copy(update={"model": model}), **policy, **gpu) is None


def test_a_run_records_why_it_has_one_process(tune: Tune) -> None:
    result = tune(train__max_steps=1)
    assert result.record["auto"]["train.num_processes"] == "1 (a CPU)"
    assert "planner: 1 (a CPU)" in (result.directory / "recipe.yaml").read_text(encoding="utf-8")

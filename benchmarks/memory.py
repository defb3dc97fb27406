"""Accuracy of the memory planner: planned and measured peaks over many shapes, adapters and losses.

python -m benchmarks.memory            all cases, written to benchmarks/results/memory-fake-<date>.json
python -m benchmarks.memory --quick    one of each kind
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import click
import torch

from benchmarks.common import RESULTS_DIR
from benchmarks.fake_memory import MemoryCase, measure_step
from finetune.planner.static_memory import static_memory
from finetune.planner.train_step import simulate_train_step

GIB = 2**30


def config_shape(
    model_type: str, hidden: int, intermediate: int, layers: int, *, heads: int, **options: Any
) -> dict[str, Any]:
    """Return a config.json."""
    config = {"model_type": model_type, "hidden_size": hidden, "intermediate_size": intermediate}
    return config | {"num_hidden_layers": layers, "num_attention_heads": heads} | options


TINY_SHAPE = config_shape("llama", 256, 704, 4, heads=4, vocab_size=4608, tie_word_embeddings=True)
SMALL_SHAPE = config_shape("llama", 512, 1408, 4, heads=8, vocab_size=32000)
SMOLLM_135M = config_shape("llama", 576, 1536, 30, heads=9, num_key_value_heads=3, vocab_size=49152) | {
    "tie_word_embeddings": True
}
LLAMA_7B = config_shape("llama", 4096, 11008, 32, heads=32, vocab_size=32000)
LLAMA_8B = config_shape("llama", 4096, 14336, 32, heads=32, num_key_value_heads=8, vocab_size=128256)
LLAMA_70B = config_shape("llama", 8192, 28672, 80, heads=64, num_key_value_heads=8, vocab_size=32000)
FAMILY_SHAPES = {
    "mistral-7b": config_shape("mistral", 4096, 14336, 32, heads=32, vocab_size=32768, sliding_window=None),
    "qwen3-0.6b": config_shape("qwen3", 1024, 3072, 28, heads=16, num_key_value_heads=8, head_dim=128)
    | {"vocab_size": 151936, "tie_word_embeddings": True},
    "qwen2-0.5b": config_shape("qwen2", 896, 4864, 24, heads=14, num_key_value_heads=2, vocab_size=151936)
    | {"tie_word_embeddings": True},
    "gemma-2-2b": {"model_type": "gemma2"},
    "gemma-3-1b": config_shape(
        "gemma3_text", 1152, 6912, 26, heads=4, num_key_value_heads=1, vocab_size=262144
    ),
    "pythia-1.4b": config_shape("gpt_neox", 2048, 8192, 24, heads=16, vocab_size=50304),
    "polyglot-ko-5.8b": config_shape("gpt_neox", 4096, 16384, 28, heads=16, vocab_size=30080),
}
NARROW_SHAPES = {
    name: config | {"vocab_size": 2000}
    for name, config in {
        "llama": config_shape("llama", 256, 704, 2, heads=4, num_key_value_heads=2),
        "qwen3": config_shape("qwen3", 256, 768, 2, heads=4, num_key_value_heads=2, head_dim=128),
        "gemma2": config_shape("gemma2", 256, 768, 2, heads=2, num_key_value_heads=1, head_dim=128),
        "gemma3": config_shape("gemma3_text", 256, 768, 2, heads=2, num_key_value_heads=1, head_dim=128),
        "smollm3": config_shape("smollm3", 256, 704, 2, heads=4, num_key_value_heads=2, pad_token_id=0),
        "olmo2": config_shape("olmo2", 256, 704, 2, heads=4, num_key_value_heads=4),
        "exaone4": config_shape(
            "exaone4", 256, 704, 2, heads=4, num_key_value_heads=2, layer_types=["full_attention"] * 2
        ),
        "gpt_neox": config_shape("gpt_neox", 256, 1024, 2, heads=4),
    }.items()
}
"""Every family with two layers and few tokens, so that activations weigh more than weights and logits."""
ADAPTER_SETTINGS: tuple[dict[str, Any], ...] = (
    {"method": "full"},
    {"method": "lora", "rank": 8},
    {"method": "lora", "rank": 64},
    {"method": "lora", "rank": 8, "dropout": 0.0, "target": ["q_proj", "v_proj"]},
    {"method": "rslora"},
    {"method": "lora_plus"},
    {"method": "dora", "rank": 8},
    {"method": "dora", "rank": 8, "dropout": 0.0},
    {"method": "adalora"},
    {"method": "vera"},
    {"method": "oft"},
    {"method": "ia3"},
    {"method": "layernorm"},
    {"method": "bottleneck"},
    {"method": "bottleneck", "placement": "houlsby"},
    {"method": "adamix"},
    {"method": "prefix"},
    {"method": "prefix", "projection": True},
    {"method": "ptuning_v2"},
    {"method": "adaptive_prefix"},
    {"method": "prompt"},
    {"method": "ptuning"},
    {"method": "multitask_prompt"},
    {"method": "progressive_prompt"},
    {"method": "llama_adapter", "layers": 3},
    {"method": "trainable_tokens", "tokens": [1, 2]},
)


@dataclass(frozen=True)
class MemoryComparison:
    """A case, measured and planned: bytes of one process, and the plan's error in percent."""

    case: dict[str, Any]
    measured: int
    planned: int
    measured_pass: int
    planned_pass: int
    error: float
    error_of_pass: float


def compare_case(case: MemoryCase) -> MemoryComparison:
    """Measure and plan a case."""
    measured, workload = measure_step(case), case.workload
    # Fake tensors do not accumulate in place, and are planned so.
    static, tape = static_memory(workload), simulate_train_step(workload, in_place=False)
    # With accumulation the gradients of the first micro-batch exist throughout the second.
    pass_peak = tape.peak + (static.gradients if case.accumulation_steps > 1 else 0)
    total = static.base + static.adapter + static.optimizer + pass_peak
    measured_total = measured.loaded + measured.states + measured.pass_peak
    errors = (
        round(100 * (plan / actual - 1), 2)
        for plan, actual in ((total, measured_total), (pass_peak, measured.pass_peak))
    )
    return MemoryComparison(asdict(case), measured_total, total, measured.pass_peak, pass_peak, *errors)


def cases(*, quick: bool = False) -> Iterator[MemoryCase]:
    """Yield all cases."""
    for precision in ("bfloat16", "float32"):
        for checkpointing in (False, True):
            options: dict[str, Any] = {"precision": precision, "checkpointing": checkpointing}
            yield MemoryCase("small", SMALL_SHAPE, **options)
            yield MemoryCase("small", SMALL_SHAPE, rows=8, masked=True, **options)
            yield MemoryCase("small", SMALL_SHAPE, attention="eager", masked=True, **options)
            yield MemoryCase("small", SMALL_SHAPE, {"method": "full"}, accumulation_steps=2, **options)
            for objective in ("comparison", "scores", "ppo"):
                yield MemoryCase("small", SMALL_SHAPE, objective=objective, masked=True, **options)
        for adapter in ADAPTER_SETTINGS:
            masked = "prefix" in adapter["method"] or "prompt" in adapter["method"]
            yield MemoryCase("small", SMALL_SHAPE, adapter, masked=masked, precision=precision)
    yield MemoryCase(*with_layers("pythia-1.4b", FAMILY_SHAPES["pythia-1.4b"], 2), {"method": "bitfit"})
    if not quick:
        yield from _large_cases()


def with_layers(name: str, config: dict[str, Any], layers: int) -> tuple[str, dict[str, Any]]:
    """Return a shape with fewer layers, which are all alike, with their number in its name."""
    return f"{name}, {layers} layers", config | {"num_hidden_layers": layers}


def _large_cases() -> Iterator[MemoryCase]:
    for name, config in FAMILY_SHAPES.items():
        shape_of_family = with_layers(name, config, 3)
        yield MemoryCase(*shape_of_family, masked=True)
        yield MemoryCase(*shape_of_family, {"method": "full"}, checkpointing=True)
        yield MemoryCase(*shape_of_family, precision="float32")
    llama_7b = with_layers("llama-2-7b", LLAMA_7B, 6)
    for rows, seq_len in ((1, 128), (4, 512), (32, 128), (2, 2048)):
        predicted = rows * seq_len // 2
        yield MemoryCase("tiny", TINY_SHAPE, rows=rows, seq_len=seq_len, predicted=predicted)
        for checkpointing in (False, True):
            yield MemoryCase(
                *llama_7b, rows=rows, seq_len=seq_len, predicted=predicted, checkpointing=checkpointing
            )
    llama_8b = with_layers("llama-3.1-8b", LLAMA_8B, 4)
    yield MemoryCase(*llama_8b, rows=2, seq_len=512, predicted=1024)
    yield MemoryCase(*llama_8b, rows=8, seq_len=1024, predicted=8000, checkpointing=True)
    yield MemoryCase(*llama_7b, {"method": "full"}, rows=4, seq_len=512, checkpointing=True)
    yield MemoryCase(*llama_7b, objective="comparison", rows=2, seq_len=1024, masked=True)
    yield MemoryCase(*llama_7b, objective="ppo", rows=4, seq_len=512, masked=True)
    llama_70b = with_layers("llama-2-70b", LLAMA_70B, 3)
    yield MemoryCase(*llama_70b, {"method": "lora", "rank": 64}, rows=1, seq_len=512)
    yield MemoryCase(*llama_70b, rows=16, seq_len=512, checkpointing=True)
    yield MemoryCase("smollm2-135m", SMOLLM_135M, rows=4, seq_len=512, predicted=1024)
    yield MemoryCase("llama-2-7b", LLAMA_7B, rows=4, seq_len=512, predicted=1024)
    yield MemoryCase("llama-2-7b", LLAMA_7B, rows=4, seq_len=512, predicted=1024, checkpointing=True)


def format_comparison(comparison: MemoryComparison) -> str:
    """Return a result as one line."""
    case = comparison.case
    adapter_options = {key: value for key, value in case["adapter"].items() if key != "method"}
    labels = [
        case["name"],
        case["adapter"]["method"],
        *(f"{key}={value}" for key, value in adapter_options.items()),
    ]
    labels += [case["objective"], case["precision"], f"{case['rows']}x{case['seq_len']}"]
    labels += ["recomputed"] * case["checkpointing"] + ["masked"] * case["masked"]
    sizes = f"{comparison.measured / GIB:8.3f} {comparison.planned / GIB:8.3f} GiB"
    return (
        f"{sizes} {comparison.error:6.2f} % (the pass {comparison.error_of_pass:6.2f} %)  {', '.join(labels)}"
    )


@click.command()
@click.option("--quick", is_flag=True, help="One of each kind.")
def main(quick: bool) -> None:
    """Compare plans with steps on fake tensors, and write the errors."""
    comparisons = []
    for case in cases(quick=quick):
        comparisons.append(compare_case(case))
        print(format_comparison(comparisons[-1]), flush=True)
    worst = max(comparisons, key=lambda comparison: abs(comparison.error))
    print(f"{len(comparisons)} cases; the largest error: {format_comparison(worst)}")
    if not quick:
        content = {"torch": torch.__version__, "cases": [asdict(comparison) for comparison in comparisons]}
        file = RESULTS_DIR / f"memory-fake-{datetime.now(UTC):%Y-%m-%d}.json"
        file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

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

from benchmarks.common import RESULTS
from benchmarks.fake_memory import Case, measure
from finetune.planning.resident import resident
from finetune.planning.step import played

GIB = 2**30


def shape(model_type: str, hidden: int, wide: int, layers: int, *, heads: int, **more: Any) -> dict[str, Any]:
    """Return a config.json."""
    found = {"model_type": model_type, "hidden_size": hidden, "intermediate_size": wide}
    return found | {"num_hidden_layers": layers, "num_attention_heads": heads} | more


TINY = shape("llama", 256, 704, 4, heads=4, vocab_size=4608, tie_word_embeddings=True)
SMALL = shape("llama", 512, 1408, 4, heads=8, vocab_size=32000)
SMOL = shape("llama", 576, 1536, 30, heads=9, num_key_value_heads=3, vocab_size=49152) | {
    "tie_word_embeddings": True
}
LLAMA_7B = shape("llama", 4096, 11008, 32, heads=32, vocab_size=32000)
LLAMA_8B = shape("llama", 4096, 14336, 32, heads=32, num_key_value_heads=8, vocab_size=128256)
LLAMA_70B = shape("llama", 8192, 28672, 80, heads=64, num_key_value_heads=8, vocab_size=32000)
FAMILIES = {
    "mistral-7b": shape("mistral", 4096, 14336, 32, heads=32, vocab_size=32768, sliding_window=None),
    "qwen3-0.6b": shape("qwen3", 1024, 3072, 28, heads=16, num_key_value_heads=8, head_dim=128)
    | {"vocab_size": 151936, "tie_word_embeddings": True},
    "qwen2-0.5b": shape("qwen2", 896, 4864, 24, heads=14, num_key_value_heads=2, vocab_size=151936)
    | {"tie_word_embeddings": True},
    "gemma-2-2b": {"model_type": "gemma2"},
    "gemma-3-1b": shape("gemma3_text", 1152, 6912, 26, heads=4, num_key_value_heads=1, vocab_size=262144),
    "pythia-1.4b": shape("gpt_neox", 2048, 8192, 24, heads=16, vocab_size=50304),
    "polyglot-ko-5.8b": shape("gpt_neox", 4096, 16384, 28, heads=16, vocab_size=30080),
}
ADAPTERS: tuple[dict[str, Any], ...] = (
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
class Line:
    """A case, measured and planned: bytes of one process, and the plan's error in percent."""

    case: dict[str, Any]
    measured: int
    planned: int
    measured_pass: int
    planned_pass: int
    error: float
    error_of_pass: float


def compared(case: Case) -> Line:
    """Measure and plan a case."""
    found, work = measure(case), case.workload
    # Fake tensors do not accumulate in place, and are planned so.
    held, tape = resident(work), played(work, in_place=False)
    # With accumulation the gradients of the first micro-batch exist throughout the second.
    own = tape.peak + (held.gradients if case.accumulated > 1 else 0)
    total = held.base + held.adapter + held.optimizer + own
    peak = found.loaded + found.states + found.taken
    errors = (round(100 * (plan / true - 1), 2) for plan, true in ((total, peak), (own, found.taken)))
    return Line(asdict(case), peak, total, found.taken, own, *errors)


def cases(*, quick: bool = False) -> Iterator[Case]:
    """Yield all cases."""
    for precision in ("bfloat16", "float32"):
        for checkpointing in (False, True):
            how: dict[str, Any] = {"precision": precision, "checkpointing": checkpointing}
            yield Case("small", SMALL, **how)
            yield Case("small", SMALL, lines=8, masked=True, **how)
            yield Case("small", SMALL, attention="eager", masked=True, **how)
            yield Case("small", SMALL, {"method": "full"}, accumulated=2, **how)
            for objective in ("comparison", "scores", "ppo"):
                yield Case("small", SMALL, objective=objective, masked=True, **how)
        for adapter in ADAPTERS:
            masked = "prefix" in adapter["method"] or "prompt" in adapter["method"]
            yield Case("small", SMALL, adapter, masked=masked, precision=precision)
    yield Case(*cut("pythia-1.4b", FAMILIES["pythia-1.4b"], 2), {"method": "bitfit"})
    if not quick:
        yield from _large()


def cut(name: str, config: dict[str, Any], layers: int) -> tuple[str, dict[str, Any]]:
    """Return a shape with fewer layers, which are all alike, with their number in its name."""
    return f"{name}, {layers} layers", config | {"num_hidden_layers": layers}


def _large() -> Iterator[Case]:
    for name, config in FAMILIES.items():
        own = cut(name, config, 3)
        yield Case(*own, masked=True)
        yield Case(*own, {"method": "full"}, checkpointing=True)
        yield Case(*own, precision="float32")
    seven = cut("llama-2-7b", LLAMA_7B, 6)
    for lines, columns in ((1, 128), (4, 512), (32, 128), (2, 2048)):
        share = lines * columns // 2
        yield Case("tiny", TINY, lines=lines, columns=columns, predicted=share)
        for again in (False, True):
            yield Case(*seven, lines=lines, columns=columns, predicted=share, checkpointing=again)
    eight = cut("llama-3.1-8b", LLAMA_8B, 4)
    yield Case(*eight, lines=2, columns=512, predicted=1024)
    yield Case(*eight, lines=8, columns=1024, predicted=8000, checkpointing=True)
    yield Case(*seven, {"method": "full"}, lines=4, columns=512, checkpointing=True)
    yield Case(*seven, objective="comparison", lines=2, columns=1024, masked=True)
    yield Case(*seven, objective="ppo", lines=4, columns=512, masked=True)
    seventy = cut("llama-2-70b", LLAMA_70B, 3)
    yield Case(*seventy, {"method": "lora", "rank": 64}, lines=1, columns=512)
    yield Case(*seventy, lines=16, columns=512, checkpointing=True)
    yield Case("smollm2-135m", SMOL, lines=4, columns=512, predicted=1024)
    yield Case("llama-2-7b", LLAMA_7B, lines=4, columns=512, predicted=1024)
    yield Case("llama-2-7b", LLAMA_7B, lines=4, columns=512, predicted=1024, checkpointing=True)


def text_of(line: Line) -> str:
    """Return a result as one line."""
    case = line.case
    own = {key: value for key, value in case["adapter"].items() if key != "method"}
    words = [case["name"], case["adapter"]["method"], *(f"{key}={value}" for key, value in own.items())]
    words += [case["objective"], case["precision"], f"{case['lines']}x{case['columns']}"]
    words += ["recomputed"] * case["checkpointing"] + ["masked"] * case["masked"]
    sizes = f"{line.measured / GIB:8.3f} {line.planned / GIB:8.3f} GiB"
    return f"{sizes} {line.error:6.2f} % (the pass {line.error_of_pass:6.2f} %)  {', '.join(words)}"


@click.command()
@click.option("--quick", is_flag=True, help="One of each kind.")
def main(quick: bool) -> None:
    """Compare plans with steps on fake tensors, and write the errors."""
    lines = []
    for case in cases(quick=quick):
        lines.append(compared(case))
        print(text_of(lines[-1]), flush=True)
    worst = max(lines, key=lambda line: abs(line.error))
    print(f"{len(lines)} cases; the largest error: {text_of(worst)}")
    if not quick:
        content = {"torch": torch.__version__, "cases": [asdict(line) for line in lines]}
        file = RESULTS / f"memory-fake-{datetime.now(UTC):%Y-%m-%d}.json"
        file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Benchmark of prompt sharing: K completions of a prompt in one row against K rows, over their lengths.

    make bench-prompt_share ARGS=--save      or      python -m benchmarks.prompt_share

The 42M-parameter model of the other benchmarks (LoRA on all linear layers), random tokens, forward and
backward pass of all completions' log-probabilities, prompt plus one completion 512 tokens long. Both layouts
alternate in one process; the result is the median ratio of their times, next to the ratio of their tokens.
The shared row has a longer attention with a dense mask (completions do not see each other, but the products
are computed), so time follows tokens only as far as prompts are long.
"""

import statistics
import time
from itertools import product
from pathlib import Path
from typing import Any

import click
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from align.preference.attention import forward_cost
from align.preference.groups import Group, GroupBatch, GroupCollator
from align.preference.logps import token_logps
from benchmarks.common import (
    BENCHMARK_VOCAB_SIZE,
    RESULTS_DIR,
    adapted_llama,
    environment_metadata,
    save_result,
)
from finetune.training.loss import output_head

TOTAL_TOKENS = 512
PROMPT_LENGTHS = (64, 128, 256, 384, 448)
COMPLETION_COUNTS = (2, 4, 8)


def random_group(prompt: int, completions: int, *, total: int = TOTAL_TOKENS) -> Group:
    """Return a random prompt with K completions, each of which extends it to ``total`` tokens."""
    random = torch.Generator().manual_seed(prompt * 100 + completions)
    lengths = [prompt, *[total - prompt] * completions]
    prompt_ids, *completion_ids = (
        torch.randint(5, BENCHMARK_VOCAB_SIZE, (length,), generator=random) for length in lengths
    )
    return Group(prompt_ids, tuple(completion_ids))


def measure_layouts(
    model: nn.Module, prompt: int, completions: int, *, total: int, repeats: int
) -> dict[str, Any]:
    """Return both layouts' seconds and tokens, and the median ratio of the seconds."""
    group = random_group(prompt, completions, total=total)
    layouts = {"shared": GroupCollator(0), "separate": GroupCollator(0, one_per_row=True)}
    batches = {name: collate([group]) for name, collate in layouts.items()}
    logp_difference = _logp_difference(model, batches["shared"], batches["separate"])
    seconds: dict[str, list[float]] = {name: [] for name in layouts}
    for repeat in range(repeats):
        # Alternating order, so that a drift of the machine hits both layouts alike.
        for name in layouts if repeat % 2 == 0 else reversed(layouts):
            seconds[name].append(_timed_pass(model, batches[name]))
    tokens = {name: batch["input_ids"].numel() for name, batch in batches.items()}
    pairs = zip(seconds["separate"], seconds["shared"], strict=True)
    return {
        "prompt": prompt,
        "completions": completions,
        "tokens": tokens,
        "token_ratio": tokens["separate"] / tokens["shared"],
        "time_ratio": statistics.median(separate / shared for separate, shared in pairs),
        "seconds": seconds,
        "logps_differ_by": logp_difference,
        "taken": "separate"
        if "attention_mask" in GroupCollator(0, cost=forward_cost(model))([group])
        else "shared",
    }


def _on_device(model: nn.Module, batch: GroupBatch) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    return {key: value.to(device) for key, value in batch.items() if isinstance(value, Tensor)}


@torch.no_grad()
def _logp_difference(model: nn.Module, shared: GroupBatch, separate: GroupBatch) -> float:
    """Return the largest relative difference of the completions' log-probabilities."""
    head = output_head(model)
    batches = (_on_device(model, batch) for batch in (shared, separate))
    first, second = (token_logps(model, head, batch).sum(1) for batch in batches)
    return float(((first - second) / second).abs().max())


def _timed_pass(model: nn.Module, batch: GroupBatch) -> float:
    inputs = _on_device(model, batch)
    bfloat16 = next(model.parameters()).dtype == torch.bfloat16
    start = time.perf_counter()
    with torch.autocast(inputs["input_ids"].device.type, torch.bfloat16, enabled=bfloat16):
        loss = -token_logps(model, output_head(model), inputs).sum(1).sum()
    loss.backward()
    if inputs["input_ids"].is_cuda:
        # Kernels run asynchronously; without this only launches are timed.
        torch.cuda.synchronize()
    return time.perf_counter() - start


@click.command()
@click.option("--repeats", default=3, show_default=True)
@click.option("--bfloat16", is_flag=True, help="bfloat16 in place of float32.")
@click.option("--small", is_flag=True, help="A model of two narrow layers and 64 tokens, as a smoke test.")
@click.option("--save", is_flag=True, help=f"Write results and plot to {RESULTS_DIR.name}/.")
def main(repeats: int, bfloat16: bool, small: bool, save: bool) -> None:
    """Measure, and print one line per prompt length and number of completions."""
    total = TOTAL_TOKENS // 8 if small else TOTAL_TOKENS
    shape = {"hidden_size": 64, "layers": 2} if small else {}
    model = adapted_llama(bfloat16=bfloat16, positions=TOTAL_TOKENS, **shape)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    _timed_pass(
        model, GroupCollator(0)([random_group(total // 2, 2, total=total)])
    )  # the first pass warms up
    points = []
    for completions, prompt in product(COMPLETION_COUNTS, PROMPT_LENGTHS):
        prompt = prompt * total // TOTAL_TOKENS
        point = measure_layouts(model, prompt, completions, total=total, repeats=repeats)
        points.append(point)
        ratios = f"tokens {point['token_ratio']:.2f}x, time {point['time_ratio']:.2f}x"
        click.echo(
            f"K = {completions}, prompt {prompt} of {total}: {ratios}; training takes {point['taken']}"
        )
    if save:
        result = {
            **environment_metadata(bfloat16=bfloat16),
            "total": total,
            "repeats": repeats,
            "points": points,
        }
        _write_plot(result, save_result("prompt_share", result).with_suffix(".png"))


def _write_plot(result: dict[str, Any], path: Path) -> None:
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for completions, color in zip(COMPLETION_COUNTS, ("#3b5bdb", "#e8590c", "#2b8a3e"), strict=True):
        points_of_count = [point for point in result["points"] if point["completions"] == completions]
        prompt_fractions = [point["prompt"] / result["total"] for point in points_of_count]
        times, tokens = ([point[key] for point in points_of_count] for key in ("time_ratio", "token_ratio"))
        axes.plot(prompt_fractions, times, color=color, marker="o", label=f"time, K = {completions}")
        axes.plot(prompt_fractions, tokens, color=color, linestyle=":", label=f"tokens, K = {completions}")
    axes.axhline(1.0, color="#868e96", linewidth=0.8)
    axes.set(
        xlabel=f"prompt length / {result['total']} tokens",
        ylabel="separate rows / shared prompt",
        title=f"{result['device']}, {result['precision']}",
    )
    axes.legend(frameon=False, fontsize=8)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    click.echo(f"written to {path}")


if __name__ == "__main__":
    main()

"""What the GPU tests run: small runs of the sft stage, and optimizer steps of a random model of any shape."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from align import load_recipe, run
from benchmarks.fake_memory import MemoryCase
from finetune.data.collate import IGNORE_INDEX
from finetune.planner.estimate import estimate
from finetune.recipe.discovery import ADAPTERS, load_plugin
from finetune.training.loss import completion_loss_sum, output_head
from finetune.training.model import DTYPES
from finetune.training.result import Result

NUM_GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
NEEDS_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(NUM_GPUS == 0, reason="no CUDA device; run `make test-gpu` on a machine with one"),
]
RECIPE = """\
stage: sft
model: {{base: {base}}}
data: {{source: {rows}, held_out: 6, max_length: 128}}
adapter: {{method: lora, rank: 4, dropout: 0.0}}
train: {{max_steps: 5, batch_size: 8, micro_batch_size: 4, learning_rate: 1e-3, log_every: 1}}
evaluate: {{samples: 1, max_new_tokens: 4}}
"""
STEP_PHASES = ("forward and backward", "optimizer step")
RunSFT = Callable[..., Result]


def run_sft(folder: Path, base: Path, rows: Path, name: str, **settings: Any) -> Result:
    """Train the sft stage on one process unless ``train__num_processes`` says otherwise."""
    path = folder / "sums.yaml"
    path.write_text(RECIPE.format(base=base, rows=rows), encoding="utf-8")
    overrides = {"train.num_processes": 1} | {
        key.replace("__", "."): value for key, value in settings.items()
    }
    return run(load_recipe(str(path), out=folder / name, settings=overrides))


def losses(result: Result) -> list[float]:
    """Return the loss of each step."""
    return [line["loss"] for line in result.metrics if "loss" in line]


def train_steps(
    case: MemoryCase, device: torch.device, *, before_last_step: Callable[[], None]
) -> list[float]:
    """Take two optimizer steps of a case with random weights, and return their mean losses.

    Args:
        case: base, adapter and sizes; its loss is that of supervised fine-tuning.
        device: where to train.
        before_last_step: called when the optimizer states exist, to reset a peak.
    """
    torch.manual_seed(0)
    model, base = _build_model(case, device)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    batch = _random_batch(case, device)
    mean_losses = []
    for step in range(2):
        if step == 1:
            before_last_step()
        with torch.autocast(device.type, torch.bfloat16, enabled=case.precision == "bfloat16"):
            loss = completion_loss_sum(model, output_head(base), batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean_losses.append(float(loss) / case.predicted)
    return mean_losses


def _build_model(case: MemoryCase, device: torch.device) -> tuple[torch.nn.Module, PreTrainedModel]:
    """Return the model with its adapter, as training prepares it, and the base in it."""
    plugin = load_plugin(ADAPTERS, case.adapter["method"], where="adapter.method")
    # Fully trained weights stay in float32; autocast computes with 16-bit copies.
    dtype = DTYPES["float32" if case.adapter["method"] == "full" else case.precision]
    with device:
        base: PreTrainedModel = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**case.config), dtype=dtype, attn_implementation=case.attention
        )
    base.requires_grad_(False)
    model: torch.nn.Module = plugin.build(base, case.settings).to(device)
    model.train()
    if case.checkpointing:
        base.enable_input_require_grads()
        base.activation_checkpointing_enable()
    return model, base


def _random_batch(case: MemoryCase, device: torch.device) -> dict[str, torch.Tensor]:
    """Return random rows whose last tokens carry loss: ``case.predicted`` of them in all."""
    per_row, rest = divmod(case.predicted, case.rows)
    assert rest == 0 and 0 < per_row < case.seq_len, case
    ids = torch.randint(0, case.config["vocab_size"], (case.rows, case.seq_len), device=device)
    labels = ids.clone()
    labels[:, :-per_row] = IGNORE_INDEX
    return {"input_ids": ids, "labels": labels}


def planned_peak(case: MemoryCase, device: str) -> int:
    """Return the planner's bytes of the tensors of an optimizer step whose states exist."""
    phases = estimate(replace(case.workload, device=device)).phases  # type: ignore[arg-type]
    # The allocator's share is reserved, and not part of the allocated memory.
    return max(phase.total - phase.categories["allocator"] for phase in phases if phase.name in STEP_PHASES)

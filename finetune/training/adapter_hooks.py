"""Lets an adapter act while a trainer runs: after each step, and when a checkpoint is written or read."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune.adapters._traits import Hooks
from finetune.recipe.discovery import ADAPTERS, load_plugin
from finetune.recipe.settings import AdapterSettings

STATE_FILE = "adapter_state.safetensors"


def adapter_hooks(model: nn.Module, settings: AdapterSettings, *, steps: int) -> Hooks:
    """Return what the recipe's adapter does while it trains for ``steps`` optimizer steps."""
    make = vars(load_plugin(ADAPTERS, settings.method, where="adapter.method")).get("hooks")
    hooks: Hooks = make(model, settings, steps=steps) if make else Hooks()
    return hooks


def scale_learning_rates(optimizer: Optimizer, model: nn.Module, hooks: Hooks) -> None:
    """Give some parameters groups of their own, with their factor of the learning rate."""
    factors = {id(weight): hooks.rate_factors.get(name, 1.0) for name, weight in model.named_parameters()}
    for group in list(optimizer.param_groups):
        apart = [weight for weight in group["params"] if factors.get(id(weight), 1.0) != 1.0]
        group["params"] = [weight for weight in group["params"] if factors.get(id(weight), 1.0) == 1.0]
        for factor in sorted({factors[id(weight)] for weight in apart}):
            weights = [weight for weight in apart if factors[id(weight)] == factor]
            optimizer.add_param_group({**group, "params": weights, "lr": group["lr"] * factor})


class AdapterCallback(TrainerCallback):  # type: ignore[misc]
    """Calls an adapter's hooks; it must come before the callback that seals checkpoints."""

    def __init__(self, hooks: Hooks) -> None:
        """Bind the callback to what an adapter does."""
        self.hooks = hooks

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give the adapter back what the checkpoint holds of it."""
        if self.hooks.restore and state.global_step:
            self.hooks.restore(load_file(_checkpoint(args, state) / STATE_FILE))

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let the adapter act on weights and gradients."""
        if self.hooks.after_step:
            self.hooks.after_step(state.global_step + 1)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write what the adapter holds beside its weights."""
        if self.hooks.state and state.is_world_process_zero:
            tensors = {name: value.contiguous() for name, value in self.hooks.state().items()}
            save_file(tensors or {"none": torch.empty(0)}, _checkpoint(args, state) / STATE_FILE)


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"

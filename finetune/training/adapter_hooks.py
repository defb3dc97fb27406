"""Adapter hooks in training: learning-rate factors (LoRA+), a call after each step, checkpoint state."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune.adapters.traits import Hooks
from finetune.recipe.discovery import ADAPTERS, load_plugin
from finetune.recipe.settings import AdapterSettings

ADAPTER_STATE_FILE = "adapter_state.safetensors"


def adapter_hooks(model: nn.Module, settings: AdapterSettings, *, steps: int) -> Hooks:
    """Return the hooks of the recipe's adapter for a run of ``steps`` optimizer steps."""
    # `hooks` is optional in an adapter's file.
    build_hooks = getattr(load_plugin(ADAPTERS, settings.method, where="adapter.method"), "hooks", None)
    hooks: Hooks = build_hooks(model, settings, steps=steps) if build_hooks else Hooks()
    return hooks


def scale_learning_rates(optimizer: Optimizer, model: nn.Module, hooks: Hooks) -> None:
    """Move parameters with a learning-rate factor (LoRA+) to param groups of that rate."""
    # By id: an optimizer's groups hold parameters without their names.
    factors = {id(weight): hooks.lr_factors.get(name, 1.0) for name, weight in model.named_parameters()}
    for group in list(optimizer.param_groups):
        # A param group has one learning rate, so scaled parameters leave their group.
        scaled = [weight for weight in group["params"] if factors.get(id(weight), 1.0) != 1.0]
        group["params"] = [weight for weight in group["params"] if factors.get(id(weight), 1.0) == 1.0]
        for factor in sorted({factors[id(weight)] for weight in scaled}):
            weights = [weight for weight in scaled if factors[id(weight)] == factor]
            optimizer.add_param_group({**group, "params": weights, "lr": group["lr"] * factor})


class AdapterCallback(TrainerCallback):  # type: ignore[misc]
    """Calls an adapter's hooks; must run before the callback that writes checkpoint checksums."""

    def __init__(self, hooks: Hooks) -> None:
        self.hooks = hooks

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restore the adapter's state from the checkpoint."""
        if self.hooks.restore and state.global_step:  # only a resumed run starts at a later step
            self.hooks.restore(load_file(_saved_step_folder(args, state) / ADAPTER_STATE_FILE))

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Call the adapter's hook on weights and gradients."""
        if self.hooks.after_step:
            # The Trainer increments global_step after this event.
            self.hooks.after_step(state.global_step + 1)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the adapter's state other than its weights."""
        if self.hooks.state and state.is_world_process_zero:
            # safetensors refuses tensors that are not contiguous.
            tensors = {name: value.contiguous() for name, value in self.hooks.state().items()}
            # The file exists even if there is no state yet: a resumed run reads it.
            save_file(
                tensors or {"none": torch.empty(0)}, _saved_step_folder(args, state) / ADAPTER_STATE_FILE
            )


def _saved_step_folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"

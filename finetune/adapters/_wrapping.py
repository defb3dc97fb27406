"""Adapters that PEFT lacks, written as its own are: a layer is wrapped, and what it gives is changed.

Importing a file that calls ``register`` is enough for ``PeftModel.from_pretrained`` to know the adapter;
save, load, several adapters on one base, switching and disabling are PEFT's.
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

from peft import PeftConfig
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn


def register(name: str, config: type[PeftConfig], tuner: type["WrappingTuner"]) -> None:
    """Make a kind of adapter known to PEFT under ``peft_type`` NAME."""
    PEFT_TYPE_TO_CONFIG_MAPPING[name] = config
    PEFT_TYPE_TO_TUNER_MAPPING[name] = tuner
    PEFT_TYPE_TO_PREFIX_MAPPING[name] = tuner.prefix


class WrappingLayer(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """A layer of the base with what each adapter adds to it."""

    base_layer: nn.Module
    merged_adapters: list[str]
    active_adapters: list[str]
    bias: Tensor
    set_adapter: Callable[..., None]
    _get_available_adapters: Callable[[], set[str]]
    _move_adapter_to_device_of_base_layer: Callable[..., None]

    def __init__(self, base_layer: nn.Module, adapter_name: str) -> None:
        """Wrap a layer; adapters are added with ``update_layer``."""
        nn.Module.__init__(self)
        self.base_layer = base_layer
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self.merged_adapters = []

    @abstractmethod
    def update_layer(self, adapter_name: str, config: PeftConfig) -> None:
        """Add an adapter's parameters."""

    @abstractmethod
    def changed(self, adapter_name: str, inputs: Tensor, output: Tensor) -> Tensor:
        """Return the layer's output with one adapter's part in it."""

    def forward(self, inputs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the layer's output, changed by the active adapters."""
        output: Tensor = self.base_layer(inputs, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return output
        for name in self.active_adapters:
            if name in self._get_available_adapters():
                output = self.changed(name, inputs, output).to(output.dtype)
        return output

    def _place(self, adapter_name: str, config: PeftConfig) -> None:
        """Put new parameters where the layer is, and make them trainable unless they are for inference."""
        device = next(self.base_layer.parameters()).device
        self._move_adapter_to_device_of_base_layer(adapter_name, device)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)


class WrappingTuner(BaseTuner):  # type: ignore[misc]
    """Wraps every target module in the tuner's kind of layer."""

    prefix = "wrapping_"
    target_module_mapping: dict[str, list[str]] = {}

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, self.tuner_layer_cls):
            target.update_layer(adapter_name, peft_config)
            return
        layer = self.tuner_layer_cls(target, adapter_name)
        layer.update_layer(adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

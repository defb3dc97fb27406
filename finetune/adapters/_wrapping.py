"""Custom PEFT tuners: base classes for layers that wrap a module and change its output.

Importing a module that calls ``register_tuner`` makes its adapter known to ``PeftModel.from_pretrained``.
Saving, loading, several adapters on one base, switching and disabling are PEFT's.
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


def register_tuner(name: str, config: type[PeftConfig], tuner: type["WrappingTuner"]) -> None:
    """Register an adapter type with PEFT as ``peft_type`` NAME."""
    PEFT_TYPE_TO_CONFIG_MAPPING[name] = config
    PEFT_TYPE_TO_TUNER_MAPPING[name] = tuner
    PEFT_TYPE_TO_PREFIX_MAPPING[name] = tuner.prefix


class WrappingLayer(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """A layer of the base, wrapped with the parameters of each adapter."""

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
    def apply_adapter(self, adapter_name: str, inputs: Tensor, output: Tensor) -> Tensor:
        """Return the layer's output with one adapter applied."""

    def forward(self, inputs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the layer's output with the active adapters applied."""
        output: Tensor = self.base_layer(inputs, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return output
        for name in self.active_adapters:
            if name in self._get_available_adapters():
                # A float32 adapter would promote the output, and the base's next layer expects its own dtype.
                output = self.apply_adapter(name, inputs, output).to(output.dtype)
        return output

    def _activate_parameters(self, adapter_name: str, config: PeftConfig) -> None:
        """Move new parameters to the layer's device, and make them trainable unless in inference mode."""
        device = next(self.base_layer.parameters()).device
        self._move_adapter_to_device_of_base_layer(adapter_name, device)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)


class WrappingTuner(BaseTuner):  # type: ignore[misc]
    """PEFT tuner that wraps every target module in its ``tuner_layer_cls``."""

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
        # An adapter that is loaded next to an active one stays frozen, as in PEFT's own tuners.
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

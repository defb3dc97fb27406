"""Custom PEFT tuners: base classes for layers that wrap a module and change its output.

Importing a module that calls ``register_tuner`` makes its adapter known to ``PeftModel.from_pretrained``, and
to ``from_pretrained`` and ``load_adapter`` of transformers. Saving, loading, several adapters on one base,
switching and disabling are PEFT's.
"""

import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from peft import PeftConfig
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class CustomPeftType(str, Enum):  # noqa: UP042  # PEFT prints str(peft_type), "Class.NAME", as does its own enum
    """``peft_type`` of our tuners; PEFT and transformers read its ``value``.

    PEFT's ``register_peft_method`` accepts the names of its own ``PeftType`` only.
    """

    BOTTLENECK = "BOTTLENECK"
    BITFIT = "BITFIT"


@dataclass
class WrappingConfig(PeftConfig):  # type: ignore[misc]
    """PEFT config of our tuners; the fields mean what they mean in ``LoraConfig``."""

    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "names of the wrapped modules, a regular expression, or all-linear"}
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "names of modules that are not wrapped, or a regular expression"}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "indices of the layers that are wrapped; null: all"}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "name of the list of layers, if PEFT does not find it"}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "fully trained modules, saved with the adapter: a head"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise ValueError("`layers_to_transform` needs a list of `target_modules`, not a str")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("`layers_pattern` needs `layers_to_transform`")


def register_tuner(
    peft_type: CustomPeftType, config: type[WrappingConfig], tuner: type["WrappingTuner"]
) -> None:
    """Register an adapter type with PEFT."""
    PEFT_TYPE_TO_CONFIG_MAPPING[peft_type] = config
    PEFT_TYPE_TO_TUNER_MAPPING[peft_type] = tuner
    PEFT_TYPE_TO_PREFIX_MAPPING[peft_type] = tuner.prefix


class WrappingLayer(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """A layer of the base, wrapped with the parameters of each adapter.

    Attributes:
        in_features: size of the layer's input; None if unknown (a block of layers).
        out_features: size of its output; None if unknown.
    """

    adapter_layer_names: tuple[str, ...]
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
        self.in_features, self.out_features = _num_features(base_layer)

    @abstractmethod
    def update_layer(self, adapter_name: str, config: PeftConfig) -> None:
        """Add an adapter's parameters."""

    @abstractmethod
    def apply_adapter(self, adapter_name: str, inputs: Tensor, output: Tensor) -> Tensor:
        """Return the layer's output with one adapter applied."""

    def forward(self, inputs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the layer's output with the active adapters applied."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        output: Tensor = self.base_layer(inputs, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return output
        for name in self.active_adapters:
            if name in self._get_available_adapters():
                # A float32 adapter would promote the output, and the base's next layer expects its own dtype.
                output = self.apply_adapter(name, inputs, output).to(output.dtype)
        return output

    def unmerge(self) -> None:
        """Warn, as PEFT's layers do when no adapter is merged."""
        warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)

    def _activate_parameters(self, adapter_name: str, config: PeftConfig) -> None:
        """Move new parameters to the layer's device, and make them trainable unless in inference mode.

        The adapter is in training mode if the base is: AdaMix, added to a model in evaluation mode, averages.
        """
        self.training = self.base_layer.training
        for layer_name in self.adapter_layer_names:
            adapters: nn.ModuleDict | nn.ParameterDict = getattr(self, layer_name)
            adapter = adapters[adapter_name]
            if isinstance(adapter, nn.Module):
                adapter.train(self.training)
        device = next(self.base_layer.parameters()).device
        self._move_adapter_to_device_of_base_layer(adapter_name, device)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)


def _num_features(layer: nn.Module) -> tuple[int | None, int | None]:
    """Return the sizes of a layer's input and output; None for a norm or a block of layers."""
    if isinstance(layer, Conv1D):
        return layer.nx, layer.nf
    if isinstance(layer, nn.Embedding):
        return layer.num_embeddings, layer.embedding_dim
    if isinstance(layer, CONVOLUTIONS):
        return layer.in_channels, layer.out_channels
    # Linear layers, quantized ones too, have these attributes.
    return getattr(layer, "in_features", None), getattr(layer, "out_features", None)


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
        if isinstance(parent, nn.MultiheadAttention):
            # It reads the weights of its output layer without calling it.
            raise ValueError(f"Target module {current_key} is part of nn.MultiheadAttention: not supported")
        layer = self.tuner_layer_cls(target, adapter_name)
        layer.update_layer(adapter_name, peft_config)
        # An adapter that is loaded next to an active one stays frozen, as in PEFT's own tuners.
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        # PEFT's also assigns the layer's weight, which a block of layers does not have.
        setattr(parent, child_name, new_module)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        # Without this hook PEFT drops the argument, and every row goes through the active adapter.
        if kwargs.get("adapter_names") is not None:
            raise ValueError(f"{type(self).__name__} does not support `adapter_names`: use `set_adapter`")
        yield

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: only LoRA and IA3 define the combination of adapters.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"{type(self).__name__} does not support `add_weighted_adapter`")

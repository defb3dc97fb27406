r"""Bottleneck layers for PEFT: W_up f(W_down x), sequential or parallel; single, or AdaMix's mixture."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from peft import PeftConfig
from torch import Tensor, nn

from finetune.adapters._wrapping import (
    CONVOLUTIONS,
    CustomPeftType,
    WrappingConfig,
    WrappingLayer,
    WrappingTuner,
    register_tuner,
)

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}
NOT_MERGEABLE = "a bottleneck is nonlinear and cannot be merged into the base weights"


@dataclass
class BottleneckConfig(WrappingConfig):
    """PEFT config of a bottleneck adapter: ``experts`` > 1 is AdaMix's mixture."""

    hidden_size: int | None = field(
        default=None, metadata={"help": "size of the wrapped modules' output; null: read from each layer"}
    )
    width: int = field(default=64, metadata={"help": "width of the bottleneck"})
    scale: float = field(default=1.0, metadata={"help": "factor of the bottleneck's output"})
    activation: str = field(default="relu", metadata={"help": "relu, gelu or silu"})
    parallel: bool = field(default=False, metadata={"help": "reads the module's input, not its output"})
    experts: int = field(default=1, metadata={"help": "bottlenecks in the mixture"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = CustomPeftType.BOTTLENECK
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"`activation` is {', '.join(ACTIVATIONS)}, not {self.activation!r}")


class Bottleneck(nn.Module):
    """``experts`` bottlenecks: a random pair of projections in training, their average otherwise."""

    def __init__(self, config: BottleneckConfig, hidden_size: int) -> None:
        """Initialize the down projections randomly, the up projections to zero: no change of the base."""
        super().__init__()
        shape = (config.experts, config.width, hidden_size)
        self.down = nn.Parameter(torch.empty(shape))
        self.down_bias = nn.Parameter(torch.zeros(shape[:2]))
        self.up = nn.Parameter(torch.zeros(shape[0], shape[2], shape[1]))
        self.up_bias = nn.Parameter(torch.zeros(shape[0], shape[2]))
        nn.init.trunc_normal_(self.down, std=0.01, a=-0.02, b=0.02)  # Houlsby et al., section 3.1
        self.activation = ACTIVATIONS[config.activation]
        self.scale = config.scale

    def forward(self, states: Tensor) -> Tensor:
        """Return the bottleneck's output, of the shape of ``states`` (..., hidden_size)."""
        # The base may run in 16 bits, and the bottleneck is float32.
        states = states.to(self.down.dtype)
        # Two samples: AdaMix combines any down projection with any up projection.
        down, down_bias = self._select_expert(self.down, self.down_bias)
        up, up_bias = self._select_expert(self.up, self.up_bias)
        return self.scale * F.linear(self.activation(F.linear(states, down, down_bias)), up, up_bias)

    def _select_expert(self, weights: Tensor, biases: Tensor) -> tuple[Tensor, Tensor]:
        if len(weights) == 1:
            return weights[0], biases[0]
        if not self.training:
            return weights.mean(0), biases.mean(0)
        # From the CPU generator: gradient checkpointing restores it before it recomputes a layer.
        expert = int(torch.randint(len(weights), ()))
        return weights[expert], biases[expert]


class BottleneckLayer(WrappingLayer):
    """A module with bottlenecks after it (sequential) or in parallel to it."""

    adapter_layer_names = ("bottleneck_layers",)
    other_param_names = ("parallel",)

    def __init__(self, base_layer: nn.Module, adapter_name: str) -> None:
        """Wrap a layer, or a block of layers whose input and output have the model's hidden size."""
        super().__init__(base_layer, adapter_name)
        self.bottleneck_layers = nn.ModuleDict()
        self.parallel: dict[str, bool] = {}

    def update_layer(self, adapter_name: str, config: PeftConfig) -> None:
        """Add a bottleneck.

        Raises:
            ValueError: the layer's input or output does not have the bottleneck's size.
        """
        assert isinstance(config, BottleneckConfig)
        self.bottleneck_layers[adapter_name] = Bottleneck(config, self._hidden_size(config))
        self.parallel[adapter_name] = config.parallel
        self._activate_parameters(adapter_name, config)

    def _hidden_size(self, config: BottleneckConfig) -> int:
        layer = f"Target module {self.base_layer} is not supported"
        if isinstance(self.base_layer, CONVOLUTIONS):
            raise ValueError(f"{layer}: the channels of a convolution are not its last dimension")
        if self.out_features is None:  # a block of layers, or a norm
            self.in_features = self.out_features = config.hidden_size
        if self.out_features is None:
            raise ValueError(f"{layer} without `hidden_size`: {type(self.base_layer).__name__} has no size")
        if config.hidden_size not in (None, self.out_features):
            raise ValueError(f"{layer} with `hidden_size={config.hidden_size}`: its output has another size")
        if config.parallel and self.in_features != self.out_features:
            raise ValueError(f"{layer} with `parallel=True`: its input and output have different sizes")
        return self.out_features

    def cast_to_base_dtype(self, adapter_name: str) -> None:
        """Cast the bottleneck to the dtype of a block's weights; nothing if all of them are quantized."""
        weights = (weight for weight in self.base_layer.parameters() if weight.is_floating_point())
        if adapter_name in self.bottleneck_layers and (weight := next(weights, None)) is not None:
            self.bottleneck_layers[adapter_name].to(weight.dtype)

    def apply_adapter(self, adapter_name: str, inputs: Tensor, output: Tensor) -> Tensor:
        """Return h + f(h), or h + f(x) if parallel."""
        states = inputs if self.parallel[adapter_name] else output
        bottleneck_output: Tensor = self.bottleneck_layers[adapter_name](states)
        return output + bottleneck_output

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raise: a nonlinear function cannot be merged into a weight.

        Raises:
            ValueError: always.
        """
        raise ValueError(NOT_MERGEABLE)


class BottleneckTuner(WrappingTuner):
    """PEFT tuner that wraps target modules in BottleneckLayer."""

    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLayer

    def _check_merge_allowed(self) -> None:
        # Before PEFT unloads the first module.
        raise ValueError(NOT_MERGEABLE)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if autocast_adapter_dtype:
            return
        # PEFT has cast the adapters of single layers, by the layer's weight; a block of layers has none.
        for module in self.model.modules():
            if isinstance(module, BottleneckLayer) and not hasattr(module.base_layer, "weight"):
                module.cast_to_base_dtype(adapter_name)


register_tuner(CustomPeftType.BOTTLENECK, BottleneckConfig, BottleneckTuner)

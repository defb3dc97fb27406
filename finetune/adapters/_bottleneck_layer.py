r"""Bottleneck layers for PEFT: W_up f(W_down x), sequential or parallel; single, or AdaMix's mixture."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftConfig
from torch import Tensor, nn

from finetune.adapters._wrapping import WrappingLayer, WrappingTuner, register_tuner

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}


@dataclass
class BottleneckConfig(PeftConfig):  # type: ignore[misc]
    """PEFT config of a bottleneck adapter: ``experts`` > 1 is AdaMix's mixture."""

    target_modules: Any = field(default=None, metadata={"help": "names of the modules that are wrapped"})
    hidden_size: int = field(
        default=0, metadata={"help": "hidden size of the wrapped modules' inputs and outputs"}
    )
    width: int = field(default=64, metadata={"help": "width of the bottleneck"})
    scale: float = field(default=1.0, metadata={"help": "factor of the bottleneck's output"})
    activation: str = field(default="relu", metadata={"help": "relu, gelu or silu"})
    parallel: bool = field(default=False, metadata={"help": "reads the module's input, not its output"})
    experts: int = field(default=1, metadata={"help": "bottlenecks in the mixture"})

    modules_to_save: Any = field(
        default=None, metadata={"help": "fully trained modules, saved with the adapter: a head"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "BOTTLENECK"


class Bottleneck(nn.Module):
    """``experts`` bottlenecks: a random pair of projections in training, their average otherwise."""

    def __init__(self, config: BottleneckConfig) -> None:
        """Initialize the down projections randomly, the up projections to zero: no change of the base."""
        super().__init__()
        shape = (config.experts, config.width, config.hidden_size)
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

    def __init__(self, base_layer: nn.Module, adapter_name: str) -> None:
        """Wrap a module whose input and output have the model's hidden size."""
        super().__init__(base_layer, adapter_name)
        self.bottleneck_layers = nn.ModuleDict()
        self.parallel: dict[str, bool] = {}

    def update_layer(self, adapter_name: str, config: PeftConfig) -> None:
        """Add a bottleneck."""
        assert isinstance(config, BottleneckConfig)
        self.bottleneck_layers[adapter_name] = Bottleneck(config)
        self.parallel[adapter_name] = config.parallel
        self._activate_parameters(adapter_name, config)

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
        raise ValueError("a bottleneck is nonlinear and cannot be merged into the base weights")


class BottleneckTuner(WrappingTuner):
    """PEFT tuner that wraps target modules in BottleneckLayer."""

    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLayer


register_tuner("BOTTLENECK", BottleneckConfig, BottleneckTuner)

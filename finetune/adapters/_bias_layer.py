"""Layers with a trained change of their bias."""

from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from finetune.adapters._in_parts import whole
from finetune.adapters._wrapping import WrappingLayer, WrappingTuner, register


@dataclass
class BitFitConfig(PeftConfig):  # type: ignore[misc]
    """PEFT's record of BitFit."""

    target_modules: Any = field(default=None, metadata={"help": "names of the modules whose bias is trained"})

    modules_to_save: Any = field(default=None, metadata={"help": "modules trained and saved whole: a head"})

    def __post_init__(self) -> None:
        """Name the kind of adapter."""
        super().__post_init__()
        self.peft_type = "BITFIT"


class BiasLayer(WrappingLayer):
    """A linear layer or a norm, and what is added to its bias."""

    adapter_layer_names = ("bitfit_bias",)

    def __init__(self, base_layer: nn.Module, adapter_name: str) -> None:
        """Wrap a layer that has a bias."""
        super().__init__(base_layer, adapter_name)
        self.bitfit_bias = nn.ParameterDict()

    def update_layer(self, adapter_name: str, config: PeftConfig) -> None:
        """Add a change of the bias, zero at the start."""
        with whole(self.bias):
            zeros = torch.zeros(self.bias.shape, dtype=torch.float32, device=self.bias.device)
        self.bitfit_bias[adapter_name] = nn.Parameter(zeros)
        self._place(adapter_name, config)

    def changed(self, adapter_name: str, inputs: Tensor, output: Tensor) -> Tensor:
        """Return W x + b + delta."""
        change: Tensor = self.bitfit_bias[adapter_name]
        return output + change

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters' changes to the base's bias.

        Raises:
            ValueError: with ``safe_merge``, a change is NaN or infinite; the bias is then left as it was.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name in self.bitfit_bias:
                change = self.bitfit_bias[name].data
                if safe_merge and not torch.isfinite(change).all():
                    raise ValueError(f"adapter {name} holds numbers that are none")
                self.bias.data += change.to(self.bias.dtype)
                self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Take the merged changes out again."""
        while self.merged_adapters:
            change = self.bitfit_bias[self.merged_adapters.pop()].data
            self.bias.data -= change.to(self.bias.dtype)


class BitFitTuner(WrappingTuner):
    """Puts trained changes on biases."""

    prefix = "bitfit_"
    tuner_layer_cls = BiasLayer


register("BITFIT", BitFitConfig, BitFitTuner)

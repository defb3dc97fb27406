"""BitFit layers for PEFT: a trainable offset of each bias."""

from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from finetune.adapters._wrapping import WrappingLayer, WrappingTuner, register_tuner
from finetune.distributed.sharding import gathered_weight


@dataclass
class BitFitConfig(PeftConfig):  # type: ignore[misc]
    """PEFT config of BitFit."""

    target_modules: Any = field(default=None, metadata={"help": "names of the modules whose bias is trained"})

    modules_to_save: Any = field(
        default=None, metadata={"help": "fully trained modules, saved with the adapter: a head"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "BITFIT"


class BiasLayer(WrappingLayer):
    """A linear or norm layer with a trainable bias offset."""

    adapter_layer_names = ("bitfit_bias",)

    def __init__(self, base_layer: nn.Module, adapter_name: str) -> None:
        super().__init__(base_layer, adapter_name)
        self.bitfit_bias = nn.ParameterDict()

    def update_layer(self, adapter_name: str, config: PeftConfig) -> None:
        """Add a bias offset, initialized to zero."""
        # Under ZeRO-3 the bias has its shape only while it is gathered.
        with gathered_weight(self.bias):
            # float32 as in PEFT's own layers: updates of a 16-bit parameter would be rounded away.
            zeros = torch.zeros(self.bias.shape, dtype=torch.float32, device=self.bias.device)
        self.bitfit_bias[adapter_name] = nn.Parameter(zeros)
        self._activate_parameters(adapter_name, config)

    def apply_adapter(self, adapter_name: str, inputs: Tensor, output: Tensor) -> Tensor:
        """Return W x + b + delta."""
        offset: Tensor = self.bitfit_bias[adapter_name]
        return output + offset

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters' offsets to the base's bias.

        Raises:
            ValueError: with ``safe_merge``, an offset is NaN or infinite; the bias is not changed.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name in self.bitfit_bias:
                offset = self.bitfit_bias[name].data
                if safe_merge and not torch.isfinite(offset).all():
                    raise ValueError(f"adapter {name} has NaN or infinite weights")
                self.bias.data += offset.to(self.bias.dtype)
                self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Subtract the merged offsets."""
        while self.merged_adapters:
            offset = self.bitfit_bias[self.merged_adapters.pop()].data
            self.bias.data -= offset.to(self.bias.dtype)


class BitFitTuner(WrappingTuner):
    """PEFT tuner that wraps layers in BiasLayer."""

    prefix = "bitfit_"
    tuner_layer_cls = BiasLayer


register_tuner("BITFIT", BitFitConfig, BitFitTuner)

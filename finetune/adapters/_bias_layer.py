"""BitFit layers for PEFT: a trainable offset of each bias."""

from dataclasses import dataclass

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from finetune.adapters._wrapping import (
    CONVOLUTIONS,
    CustomPeftType,
    WrappingConfig,
    WrappingLayer,
    WrappingTuner,
    register_tuner,
)
from finetune.distributed.sharding import gathered_weight

CHANNEL_NORMS = (nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
"""Norms of (batch, channels, ...)."""


@dataclass
class BitFitConfig(WrappingConfig):
    """PEFT config of BitFit."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = CustomPeftType.BITFIT


class BiasLayer(WrappingLayer):
    """A layer with a trainable offset of its bias."""

    adapter_layer_names = ("bitfit_bias",)

    def __init__(self, base_layer: nn.Module, adapter_name: str) -> None:
        super().__init__(base_layer, adapter_name)
        self.bitfit_bias = nn.ParameterDict()
        self.unmerged_bias: Tensor | None = None

    def update_layer(self, adapter_name: str, config: PeftConfig) -> None:
        """Add a bias offset, initialized to zero.

        Raises:
            ValueError: the layer has no bias.
        """
        bias = getattr(self.base_layer, "bias", None)
        if bias is None:
            raise ValueError(f"Target module {self.base_layer} is not supported: it has no bias")
        # Under ZeRO-3 the bias has its shape only while it is gathered.
        with gathered_weight(bias):
            # float32 as in PEFT's own layers: updates of a 16-bit parameter would be rounded away.
            zeros = torch.zeros(bias.shape, dtype=torch.float32, device=bias.device)
        if self.out_features is None:  # a norm
            self.in_features = self.out_features = len(zeros)
        self.bitfit_bias[adapter_name] = nn.Parameter(zeros)
        self._activate_parameters(adapter_name, config)

    def apply_adapter(self, adapter_name: str, inputs: Tensor, output: Tensor) -> Tensor:
        """Return W x + b + delta."""
        offset: Tensor = self.bitfit_bias[adapter_name]
        return output + offset.view(-1, *(1 for _ in range(self._num_dims_after_channels(output))))

    def _num_dims_after_channels(self, output: Tensor) -> int:
        if isinstance(self.base_layer, CONVOLUTIONS):
            return len(self.base_layer.kernel_size)
        return output.ndim - 2 if isinstance(self.base_layer, CHANNEL_NORMS) else 0

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters' offsets to the base's bias.

        Raises:
            ValueError: with ``safe_merge``, the sum is NaN or infinite; the bias is not changed.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.bitfit_bias:
                continue
            merged = self.bias.data + self.bitfit_bias[name].data.to(self.bias.dtype)
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError(
                    f"NaNs detected in the merged weights. The adapter {name} seems to be broken"
                )
            if self.unmerged_bias is None:
                self.unmerged_bias = self.bias.data.clone()
            self.bias.data.copy_(merged)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Restore the base's bias bit for bit: subtracting the offset would round it."""
        if self.unmerged_bias is None:
            super().unmerge()
            return
        self.bias.data.copy_(self.unmerged_bias)
        self.unmerged_bias = None
        self.merged_adapters.clear()


class BitFitTuner(WrappingTuner):
    """PEFT tuner that wraps layers in BiasLayer."""

    prefix = "bitfit_"
    tuner_layer_cls = BiasLayer


register_tuner(CustomPeftType.BITFIT, BitFitConfig, BitFitTuner)

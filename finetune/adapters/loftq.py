r"""LoftQ: QLoRA whose low-rank product is initialized to the quantization error of each weight.

Li et al. 2023 (arXiv 2310.08659), equation 6: min over A, B of ||W - Q - B A||_F for the 4-bit weight Q. One
step of the alternation: the r largest singular values of W - Q, with Q the loaded NF4 base. The authors' code
takes 5 steps, each of which quantizes W - B A again; here Q stays the base that every other adapter has. The
full-precision weights are read from the base's files, one tensor at a time.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from finetune.adapters import lora
from finetune.adapters.traits import Traits
from finetune.recipe.errors import Problem, UserError

if TYPE_CHECKING:
    from collections.abc import Callable

    from peft import PeftModel
    from torch import Tensor
    from transformers import PreTrainedModel

# Saved as a LoRA adapter for the 4-bit base. Learning rate: the paper's appendix, LLaMA-2: 1e-4 to 7e-4.
TRAITS = Traits(quantization=("nf4",), learning_rate=1e-4, training_only=("dropout",), continues_as="lora")


class Settings(lora.Settings):
    """LoRA's settings."""

    method: Literal["loftq"] = Field(
        "loftq", description="LoRA initialized to the quantization error of the 4-bit base"
    )  # type: ignore[assignment]


def build(model: "PreTrainedModel", settings: Settings) -> "PeftModel":
    """Return the 4-bit base with LoRA initialized to its quantization error.

    Raises:
        UserError: a target matches no layer, or the full-precision weights are not found.
    """
    from bitsandbytes.functional import dequantize_4bit
    from peft.tuners.lora.bnb import Linear4bit

    adapted = lora.with_lora(model, settings)
    read_weight = _weight_reader(model.config.name_or_path)
    # with_lora replaced the layers inside `model`: a LoRA layer has the name of its original.
    names = {id(module): name for name, module in model.named_modules()}
    for module in adapted.modules():
        if isinstance(module, Linear4bit):
            quantized = module.base_layer.weight
            dequantized = dequantize_4bit(quantized.data, quantized.quant_state).float()
            residual = read_weight(f"{names[id(module)]}.weight").to(dequantized) - dequantized
            # PEFT multiplies the product by alpha / r, so it is divided by that here.
            up, down = low_rank_factors(residual / module.scaling["default"], settings.rank)
            module.lora_A["default"].weight.data.copy_(down)
            module.lora_B["default"].weight.data.copy_(up)
    return adapted


def low_rank_factors(matrix: "Tensor", rank: int) -> tuple["Tensor", "Tensor"]:
    """Return B (out, rank) and A (rank, in): the best rank-r approximation of a matrix (out, in), by SVD."""
    import torch

    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    # Each factor gets the square root of the singular values, as in PEFT's LoftQ.
    root = values[:rank].sqrt()
    return left[:, :rank] * root, root[:, None] * right[:rank]


def _weight_reader(base: str) -> "Callable[[str], Tensor]":
    """Return a function that reads a base's full-precision weights by name."""
    from huggingface_hub import snapshot_download
    from safetensors import safe_open

    # local_files_only: the base has been loaded, so its files are in the cache.
    folder = Path(base) if Path(base).is_dir() else Path(snapshot_download(base, local_files_only=True))
    files: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            files |= dict.fromkeys(opened.keys(), file)

    def read(name: str) -> "Tensor":
        if name not in files:
            raise lacking(name)
        with safe_open(files[name], framework="pt") as opened:
            weight: Tensor = opened.get_tensor(name)
        if not weight.is_floating_point():  # a base that is stored in 4 bits
            raise lacking(name)
        return weight

    def lacking(name: str) -> UserError:
        actual = f"the files of '{base}' have no full-precision tensor '{name}'"
        return UserError(
            Problem("adapter.method", actual, "its full-precision weights", "use adapter.method=qlora")
        )

    return read

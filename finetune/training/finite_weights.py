"""Check that no weight of a loaded base is NaN or infinite; without it an adapter is blamed for the base."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from finetune.distributed.collectives import all_gather_object
from finetune.distributed.sharding import is_sharded, local_shard
from finetune.library_internals import quantization_scales
from finetune.recipe.errors import Problem, UserError
from finetune.training.preflight.checks import first_few


def check_finite_weights(model: nn.Module, base: str, *, in_float16: bool) -> None:
    """Check every weight of a base; a collective if the weights are sharded.

    Args:
        model: the base as loaded; of sharded weights each rank reads its own shard.
        base: the base's name in the recipe.
        in_float16: whether it was loaded in float16, whose range is small.

    Raises:
        UserError: weights are NaN or infinite; the message names them.
    """
    names = [name for name, weight in model.named_parameters() if not all(map(_is_finite, _values(weight)))]
    if is_sharded(model):
        # All ranks raise together, or the others would wait in a collective.
        names = list(dict.fromkeys(name for shard in all_gather_object(names) for name in shard))
    if not names:
        return
    total = sum(1 for _ in model.parameters())
    actual = f"{len(names)} of its {total} weights are NaN or infinite: {first_few(names)}"
    repair = "download or save the base again: its files are damaged, or its training diverged"
    if in_float16:
        large = "float16 (and int8, which uses it) has no values above 65504"
        repair = f"model.precision=bfloat16 and model.quantization=none, if its files are intact: {large}"
    raise UserError(Problem(f"model.base '{base}'", actual, "finite weights", repair))


def _values(weight: nn.Parameter) -> Iterator[Tensor]:
    """Yield this rank's values of a weight; of a quantized one, the scales."""
    local = local_shard(weight)
    if local.is_floating_point():
        yield local
    yield from quantization_scales(weight)


def _is_finite(values: Tensor) -> bool:
    if not values.numel():
        return True
    if values.element_size() == 1:  # float8 has no minimum and maximum
        values = values.bfloat16()
    # Minimum and maximum pass NaN on and allocate nothing: `isfinite` takes 16 to 30 times as long on a CPU.
    return bool(torch.isfinite(torch.stack(torch.aminmax(values))).all())

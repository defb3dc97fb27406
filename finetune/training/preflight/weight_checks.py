"""Checks of the weights: finite, frozen ones unchanged, replicas equal, shards that are shards.

* finite: no weight of the base is NaN or infinite; otherwise the adapter would be blamed.
* base: checksums of sampled frozen weights, before and after training.
* replicas: all ranks end with equal trained weights (DDP, ZeRO-1, ZeRO-2).
* sharding (ZeRO, FSDP2): per-rank elements of weights and optimizer states, and distinct rows per rank.
  Libraries have been seen to drop ZeRO silently: every rank then holds the full state and trains on the same
  rows. The check runs after the first step, when the optimizer states exist.
"""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune.distributed.collectives import all_gather_object
from finetune.distributed.sharding import (
    full_numel,
    gathered_params,
    is_sharded,
    local_numel,
    local_shard,
    reshard,
)
from finetune.distributed.strategies import SHARDED_WEIGHTS, ZERO_STAGES
from finetune.library_internals import quantization_scales
from finetune.recipe.errors import Problem, UserError
from finetune.training.preflight.checks import CheckResult, failed, first_few

SAMPLED_TENSORS, SAMPLED_ELEMENTS = 32, 4096
"""Number of frozen tensors that are sampled, and elements of each: some milliseconds for any model."""


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


def frozen_checksums(model: nn.Module) -> dict[str, str]:
    """Return the checksums of up to 32 frozen tensors, evenly spaced over the model."""
    reshard(model)
    frozen = [(name, weight) for name, weight in model.named_parameters() if not weight.requires_grad]
    stride = max(1, -(-len(frozen) // SAMPLED_TENSORS))
    checksums = {}
    for name, weight in frozen[::stride]:
        with gathered_params(weight) as (values,):
            checksums[name] = _tensor_checksum(values)
    return checksums


def _tensor_checksum(weight: Tensor) -> str:
    values = weight.reshape(-1)
    # A strided sample: hashing every weight would read the full model from the device, twice.
    sample = values[:: max(1, len(values) // SAMPLED_ELEMENTS)].contiguous().cpu()
    # Hashed as bytes: NumPy has no bfloat16.
    return hashlib.sha256(sample.view(torch.uint8).numpy().tobytes()).hexdigest()


def check_base_unchanged(before: dict[str, str], after: dict[str, str]) -> CheckResult:
    """Check that training did not change the frozen weights."""
    if not before:
        return CheckResult("base", "full fine-tuning, no weight is frozen")
    changed = [name for name, checksum in before.items() if after.get(name) != checksum]
    if changed:
        actual = (
            f"{len(changed)} of {len(before)} frozen tensors changed during training: {first_few(changed)}"
        )
        expected = "a base unchanged bit for bit: the adapter has to fit other copies of it"
        repair = "train.engine_args={} and train.engine=native; if it persists, this is a bug in llm-align"
        return failed("base", Problem("model.base", actual, expected, repair))
    return CheckResult("base", f"unchanged bit for bit in {len(before)} sampled tensors")


def trained_digest(model: nn.Module) -> str:
    """Return a checksum of all trained weights, which each rank holds in full."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            values = weight.detach().contiguous().cpu().reshape(-1)
            digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
            # As bytes, since NumPy has no bfloat16; with name and shape, so that equal bytes of two tensors
            # differ.
            digest.update(values.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_replicas_equal(digests: Sequence[str]) -> CheckResult:
    """Check that the trained weights are equal bit for bit on all ranks."""
    differing = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if differing:
        actual = f"the trained weights of rank {differing[0]} differ from rank 0's"
        expected = f"equal weights on all {len(digests)} ranks"
        problem = Problem(
            "train.num_processes", actual, expected, "train.num_processes=1; this is a bug in llm-align"
        )
        return failed("processes", problem)
    return CheckResult("processes", f"the trained weights of all {len(digests)} are equal bit for bit")


SHARDING = "sharding"


@dataclass(frozen=True, slots=True)
class RankShare:
    """The elements that one rank stores, and the row ids of its first micro-batch.

    Attributes:
        weights: elements of the model's weights.
        states: elements of the largest optimizer state, such as Adam's first moments.
        rows: row ids of the first micro-batch.
    """

    weights: int
    states: int
    rows: tuple[int, ...] = ()


def count_rank_share(model: nn.Module, optimizer: Optimizer, rows: Sequence[int] = ()) -> RankShare:
    """Count the elements that this rank stores."""
    reshard(model)
    # The largest state: factored ones (Adafactor's) and the step count are smaller than the weights.
    elements_by_state: dict[str, int] = defaultdict(int)
    for state in optimizer.state.values():
        for name, value in state.items():
            if torch.is_tensor(value):
                elements_by_state[name] += _local_tensor_numel(value)
    weights = sum(map(local_numel, model.parameters()))
    return RankShare(weights, max(elements_by_state.values(), default=0), tuple(rows))


def check_sharding(shares: Sequence[RankShare], *, weights: int, trained: int, strategy: str) -> CheckResult:
    """Check that each rank stores only its shard; ranks train on different rows.

    Args:
        shares: the counts of each rank.
        weights: elements of the full model.
        trained: trained elements; each has its optimizer states.
        strategy: ``zero1``, ``zero2``, ``zero3`` or ``fsdp2``.
    """
    expectations = {
        "weights": (strategy in SHARDED_WEIGHTS, max(share.weights for share in shares), weights),
        "optimizer state elements": (strategy in ZERO_STAGES, max(share.states for share in shares), trained),
    }
    held = {name: (largest, total) for name, (sharded, largest, total) in expectations.items() if sharded}
    # Half-way between a shard and the total: shards are padded, so they may exceed 1/N by a little.
    violations = [
        name for name, (largest, total) in held.items() if largest > total * (1 + 1 / len(shares)) / 2
    ]
    if violations:
        actual = "; ".join(
            f"a rank holds {held[name][0]:,} of {held[name][1]:,} {name}" for name in violations
        )
        return failed(
            SHARDING, Problem("train.strategy", f"{strategy}, but {actual}", f"1/{len(shares)} of them")
        )
    row_ids = [row_id for share in shares for row_id in share.rows]
    if len(row_ids) != len(set(row_ids)):
        actual = "ranks train on the same rows in the first micro-batch"
        return failed(SHARDING, Problem("train.strategy", actual, "different rows on each rank"))
    summary = "; ".join(f"at most {largest:,} of {total:,} {name}" for name, (largest, total) in held.items())
    return CheckResult(SHARDING, f"{strategy} is active: each rank holds {summary}")


class ShardingCheck(TrainerCallback):  # type: ignore[misc]
    """Runs the sharding check after the first optimizer step."""

    def __init__(
        self, report: Callable[[CheckResult], None], *, strategy: str, rows: Callable[[], Sequence[int]]
    ) -> None:
        """Bind the callback.

        Args:
            report: prints and records a check result, and raises if the check failed.
            strategy: distributed strategy.
            rows: returns the row ids of this rank's first micro-batch.
        """
        self.report, self.strategy, self.rows = report, strategy, rows
        self.done = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Run the check, once.

        Raises:
            UserError: a rank holds more than its shard, or trains on another rank's rows.
        """
        if self.done:
            return
        self.done = True
        model: nn.Module = kwargs["model"]
        # All ranks raise together, or one would fail while the others wait in a collective.
        shares = all_gather_object(count_rank_share(model, kwargs["optimizer"], self.rows()))
        params = list(model.parameters())
        self.report(
            check_sharding(
                shares,
                weights=sum(map(full_numel, params)),
                trained=sum(full_numel(param) for param in params if param.requires_grad),
                strategy=self.strategy,
            )
        )


def _local_tensor_numel(value: Tensor) -> int:
    return value.to_local().numel() if isinstance(value, DTensor) else value.numel()

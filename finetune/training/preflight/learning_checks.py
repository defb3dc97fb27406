"""Checks after training: the trained weights have moved, and the held-out loss with them.

A run that trained nothing looks like any other: it saves an adapter and reports a loss. Here it fails, with
the tensors that did not move and the likely reason.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from finetune.distributed.collectives import all_gather_object
from finetune.distributed.sharding import is_sharded, local_shard, reshard
from finetune.recipe.errors import Problem
from finetune.training.metrics import EVAL_PREFIX
from finetune.training.preflight.checks import CheckResult, failed, first_few

LEARNING = "learning"
CONTINUOUS_METRICS = ("loss", "policy/entropy")
"""Held-out metrics that change with any change of the weights; rewards and accuracies of few rows may not."""
INTEGER_DTYPES = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
CHUNK = 1 << 22
"""Elements that are summed at once: their weights take 32 MB."""


@dataclass(frozen=True, slots=True)
class TrainedChecksums:
    """Checksums of the trained tensors.

    Attributes:
        by_name: checksum of each trained tensor.
        layers: name of an adapted layer (or of a tensor outside of them) -> its trained tensors.
        policy: the tensors of the policy; PPO trains a value model too.
    """

    by_name: Mapping[str, int]
    layers: Mapping[str, Sequence[str]]
    policy: frozenset[str]


def trained_checksums(model: nn.Module, policy: nn.Module) -> TrainedChecksums:
    """Return the checksums of all trained tensors; a collective, every rank must call it.

    Args:
        model: the trained module.
        policy: the model that is saved, the same module or a part of it.
    """
    reshard(model)
    tuner_layers = {name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    policy_ids = {id(weight) for weight in policy.parameters()}
    by_name: dict[str, int] = {}
    layers: dict[str, list[str]] = defaultdict(list)
    in_policy = set()
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            by_name[name] = _checksum(local_shard(weight))
            layers[_layer_name(name, tuner_layers)].append(name)
            if id(weight) in policy_ids:
                in_policy.add(name)
    if is_sharded(model):
        # Shards are not gathered: ZeRO-3 may hold parameters that it prefetched, and cannot release them.
        of_ranks = all_gather_object(by_name)
        by_name = {name: sum(checksums[name] for checksums in of_ranks) for name in by_name}
    return TrainedChecksums(by_name, dict(layers), frozenset(in_policy))


def _layer_name(name: str, tuner_layers: set[str]) -> str:
    """Return the adapted layer of a tensor, or the tensor's own name."""
    parent = name
    while parent and parent not in tuner_layers:
        parent = parent.rpartition(".")[0]
    return parent or name


def _checksum(values: Tensor) -> int:
    """Return a sum of the bits of all elements, each weighted by its position, modulo 2^64."""
    # On the device and in chunks: no copy of a full model. Weighted, since equally many steps up and down of
    # one unit in the last place would cancel in a plain sum.
    bits = values.detach().reshape(-1).view(INTEGER_DTYPES[values.element_size()])
    total = 0
    for offset in range(0, len(bits), CHUNK):
        chunk = bits[offset : offset + CHUNK].long()
        weights = torch.arange(offset, offset + len(chunk), device=chunk.device) * 0x9E3779B1 + 1
        total += int((chunk * weights).sum())
    return total


def unmoved_layers(before: TrainedChecksums, after: TrainedChecksums) -> dict[str, Sequence[str]]:
    """Return the layers of which no tensor has changed, with their tensors.

    One tensor per layer suffices: LoRA's A has no gradient while B is zero.
    """
    return {
        layer: names
        for layer, names in before.layers.items()
        if all(after.by_name.get(name) == before.by_name[name] for name in names)
    }


def check_learning(
    before: TrainedChecksums,
    unmoved: Mapping[str, Sequence[str]],
    *,
    metrics: Mapping[str, float],
    entries: Sequence[Mapping[str, float]],
) -> CheckResult:
    """Check that training moved the trained weights, and with them the held-out loss.

    Args:
        before: the checksums before training.
        unmoved: layers of which no tensor has changed, with their tensors.
        metrics: the metrics of run.json.
        entries: the entries of metrics.jsonl.
    """
    unmoved_names = [name for names in unmoved.values() for name in names]
    num_tensors, expected = len(before.by_name), "a run that changes the model"
    if before.policy.issubset(unmoved_names):
        part = "tensors" if len(before.policy) == num_tensors else "tensors of the policy"
        actual = f"nothing was learned: none of the {len(before.policy)} trained {part} changed"
        actual = f"{actual} ({first_few(sorted(before.policy))}); {_describe_steps(entries)}"
        return failed(LEARNING, Problem("train", actual, expected, _unmoved_repair(entries)))
    equal = _equal_metrics(metrics)
    if equal:
        names = ", ".join(f"{EVAL_PREFIX}{name}" for name in equal)
        actual = f"nothing was learned: the held-out rows give the same {names}, bit for bit"
        repair = (
            "raise train.learning_rate, train longer, or check that adapter.target affects the held-out rows"
        )
        return failed(LEARNING, Problem("train", f"{actual}; {_describe_steps(entries)}", expected, repair))
    if unmoved:
        detail = f"{len(unmoved_names)} of {num_tensors} trained tensors did not change: "
        return CheckResult(LEARNING, detail + first_few(sorted(unmoved_names)), warned=True)
    num_layers = len(before.layers)
    layers = f"{num_layers} layers with " if num_layers < num_tensors else ""
    return CheckResult(LEARNING, f"training changed all {layers}{num_tensors} trained tensors")


def _equal_metrics(metrics: Mapping[str, float]) -> list[str]:
    """Return the continuous held-out metrics if all of them are equal before and after training."""
    pairs = {
        name: (metrics[f"{EVAL_PREFIX}{name}_before"], metrics[f"{EVAL_PREFIX}{name}_after"])
        for name in CONTINUOUS_METRICS
        if f"{EVAL_PREFIX}{name}_before" in metrics and f"{EVAL_PREFIX}{name}_after" in metrics
    }
    return list(pairs) if all(before == after for before, after in pairs.values()) else []


def _describe_steps(entries: Sequence[Mapping[str, float]]) -> str:
    """Return the number of steps, the largest learning rate and the largest gradient norm, as logged."""
    rates, norms = _logged(entries, "learning_rate"), _logged(entries, "grad_norm")
    steps = max(_logged(entries, "step"), default=0)
    return (
        f"{steps:.0f} steps, learning rate at most {max(rates, default=0.0):.3g}, gradient norm at most "
        + (f"{max(norms):.3g}" if norms else "unknown")
    )


def _unmoved_repair(entries: Sequence[Mapping[str, float]]) -> str:
    if not any(_logged(entries, "grad_norm")):
        return (
            "every gradient was 0: rows whose loss depends on what is trained; in RL, rewards that differ "
            "between the completions of a prompt (a finer reward, or raise sampling.temperature)"
        )
    return "the updates are smaller than the precision of the weights: raise train.learning_rate"


def _logged(entries: Sequence[Mapping[str, float]], name: str) -> list[float]:
    return [entry[name] for entry in entries if name in entry]

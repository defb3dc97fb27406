"""Memory of the real training step under FakeTensorMode, as the planner's reference.

Models are built from a config by transformers' classes, adapters by finetune/adapters, losses by our own
functions; ``FakeTensorMode`` runs them without data, and ``StorageLedger`` counts the storage of every tensor
that an operation returns, gradients and optimizer states included, until it is freed. Temporaries inside a
kernel are not counted.
"""

import gc
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from align.ppo.actor_critic import ActorCritic
from align.preference.logps import token_logps
from align.preference.reference_policy import ReferencePolicy
from align.reward.model import replace_score_head, token_scores
from align.reward.shared_base import scorer_sharing_base
from finetune.adapters import _lora_input
from finetune.adapters._lora_input import optimize_lora_inputs
from finetune.planner.architecture import Architecture
from finetune.planner.from_recipe import planned_adapter
from finetune.planner.workload import ObjectiveKind, Precision, Workload
from finetune.recipe.discovery import ADAPTERS, load_plugin
from finetune.recipe.settings import AdapterSettings
from finetune.training.loss import completion_loss_sum, output_head
from finetune.training.model import DTYPES, configure_score_heads, unwrap_model

aten = torch.ops.aten
BaseConfig = Mapping[str, Any]
FREED = -1


class StorageLedger(TorchDispatchMode):
    """Counts the bytes of all live storages, and records their allocation and release in order.

    ``events`` has (number of the storage, its bytes) for an allocation and (number, FREED) for a release.

    A number that depends on data (the count of true elements of a mask) is always ``num_true``.
    """

    def __init__(self, num_true: int) -> None:
        super().__init__()
        self.num_true = num_true
        self.live = self.peak = 0
        self.storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self.random_keys: set[int] = set()
        self.events: list[tuple[int, int]] = []
        self.num_storages = 0

    def reset_peak(self) -> None:
        """Reset the peak."""
        self.peak = self.live

    def add(self, tensor: Tensor) -> None:
        """Count a tensor's storage until it is freed."""
        storage = tensor.untyped_storage()
        key, nbytes = storage._cdata, storage.nbytes()
        # Views share a storage; meta tensors have none.
        if key in self.storages or tensor.device.type == "meta":
            return

        self.num_storages += 1
        number = self.num_storages

        def on_free(_: object) -> None:
            self.events.append((number, FREED))
            if self.storages.pop(key, None) is not None:
                self.live -= nbytes
                self.random_keys.discard(key)

        # A weak reference does not prolong the storage's life and reports its end.
        self.storages[key] = weakref.ref(storage, on_free)
        self.events.append((number, nbytes))
        self.live += nbytes
        self.peak = max(self.peak, self.live)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation and count its outputs."""
        # Tensor.item(): a random index (AdaMix's expert) must be valid, other numbers count mask elements.
        if func is aten._local_scalar_dense.default:
            return 0 if args[0].untyped_storage()._cdata in self.random_keys else self.num_true
        outputs = (
            self._masked(func, args) if func in MASKED_OPERATIONS and _has_boolean_index(args[1]) else None
        )
        if outputs is None:
            outputs = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(outputs):
            if isinstance(leaf, Tensor):
                self.add(leaf)
                if func is aten.randint.default:
                    self.random_keys.add(leaf.untyped_storage()._cdata)
        return outputs

    def _masked(self, func: Any, args: tuple[Any, ...]) -> Tensor:
        """Return the output of an operation with a boolean mask: its size is data-dependent."""
        states, (mask,) = args[0], args[1]
        if func is aten.index.Tensor:
            output: Tensor = states.new_empty((self.num_true, *states.shape[mask.dim() :]))
            return output
        return torch.empty_like(states) if func is aten.index_put.default else states


MASKED_OPERATIONS = (
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
)


def _has_boolean_index(indices: Sequence[Tensor | None]) -> bool:
    return any(index is not None and index.dtype == torch.bool for index in indices)


@dataclass(frozen=True)
class MemoryCase:
    """A step to measure and to plan.

    Attributes:
        name: of the shape.
        config: config.json of the base.
        adapter: the recipe's section.
        objective: the loss.
        precision: of the forward pass.
        rows: of a micro-batch.
        seq_len: of a row.
        predicted: states before a label.
        masked: whether rows are padded.
        checkpointing: whether activations are recomputed.
        attention: its implementation.
        accumulation_steps: micro-batches per optimizer step.
    """

    name: str
    config: BaseConfig
    adapter: BaseConfig = field(default_factory=lambda: {"method": "lora"})
    objective: ObjectiveKind = "likelihood"
    precision: Precision = "bfloat16"
    rows: int = 4
    seq_len: int = 256
    predicted: int = 500
    masked: bool = False
    checkpointing: bool = False
    attention: str = "sdpa"
    accumulation_steps: int = 1

    @property
    def settings(self) -> AdapterSettings:
        """Return the adapter's settings."""
        plugin = load_plugin(ADAPTERS, self.adapter["method"], where="adapter.method")
        settings: AdapterSettings = plugin.Settings.model_validate(self.adapter)
        return settings

    @property
    def workload(self) -> Workload:
        """Return the planner's input; for a CPU, as fake tensors are."""
        return Workload(
            architecture=Architecture.from_config(self.config),
            adapter=planned_adapter(self.settings),
            objective=self.objective,
            precision=self.precision,
            rows=self.rows,
            seq_len=self.seq_len,
            predicted=self.predicted,
            masked=self.masked,
            checkpointing=self.checkpointing,
            attention=self.attention,  # type: ignore[arg-type]
            accumulation_steps=self.accumulation_steps,
            heads=1 if self.objective in ("scores", "ppo") else 0,
            device="cpu",
        )


@dataclass(frozen=True)
class MeasuredMemory:
    """Bytes of an optimizer step.

    Attributes:
        loaded: base and adapter.
        states: the optimizer's, from the second step on.
        pass_peak: peak of the forward and backward passes in addition to both.
    """

    loaded: int
    states: int
    pass_peak: int


def measure_step(case: MemoryCase) -> MeasuredMemory:
    """Run an optimizer step of a case on fake tensors; return its memory."""
    model = _build_model(case)
    ledger = StorageLedger(case.predicted)
    # Library code creates real constant tensors, which FakeTensorMode rejects by default.
    with FakeTensorMode(allow_non_fake_inputs=True), ledger, fake_masks():
        materialize(model)
        reference = ReferencePolicy(model.policy) if isinstance(model, ActorCritic) else None
        # Garbage in reference cycles would count as live.
        gc.collect()
        loaded = ledger.live
        _prepare_training(model, case)
        trained_weights = [weight for weight in model.parameters() if weight.requires_grad]
        # Without foreach: the planner counts its temporaries on CUDA alone.
        optimizer = torch.optim.AdamW(trained_weights, lr=1e-3, foreach=False)
        ledger.reset_peak()
        for _ in range(case.accumulation_steps):
            _compute_loss(model, case).backward()
        pass_peak = ledger.peak - loaded
        optimizer.step()
        optimizer.zero_grad()
        states = ledger.live - loaded
        # Alive up to here: its copies of the weights are part of the measured memory.
        del reference
    return MeasuredMemory(loaded, states, pass_peak)


def _build_model(case: MemoryCase) -> nn.Module:
    """Return base and adapter on the meta device."""
    config = AutoConfig.for_model(**case.config)
    # Fully trained weights stay in float32; autocast computes with 16-bit copies.
    dtype = DTYPES["float32" if case.adapter["method"] == "full" else case.precision]
    model_class = AutoModelForSequenceClassification if case.objective == "scores" else AutoModelForCausalLM
    if case.objective == "scores":
        configure_score_heads(config, ["score"])
    with torch.device("meta"), answer_zero_for_meta():
        # Softcapped attention scores (Gemma 2) need the eager implementation, as in the plan.
        attention = "eager" if Architecture.from_config(case.config).eager else case.attention
        base: PreTrainedModel = model_class.from_config(config, dtype=dtype, attn_implementation=attention)
        if case.objective == "scores":
            replace_score_head(base, 1, pad_id=0)
        # Adapters expect a frozen base, as finetune/training loads it.
        base.requires_grad_(False)
        if case.objective != "ppo":
            return _with_adapter(base, case)
        value = _with_adapter(scorer_sharing_base(base, ["value"], pad_id=0), case)
        return ActorCritic(_with_adapter(base, case), value, head_index=0, temperature=1.0)


def _with_adapter(base: PreTrainedModel, case: MemoryCase) -> nn.Module:
    plugin = load_plugin(ADAPTERS, case.adapter["method"], where="adapter.method")
    model: nn.Module = plugin.build(base, case.settings)
    optimize_lora_inputs(model)
    return model


def fake_masks() -> Any:
    """Replace numpy's part of dropout on a CPU by tensors of the same sizes: numpy has no fake arrays."""

    def draw_mask(inputs: Tensor, p: float) -> tuple[Tensor, float]:
        return torch.empty(inputs.shape, dtype=torch.bool), 1 / (1 - p)

    def pack_mask(keep: Tensor) -> Tensor:
        return torch.empty(-(-keep.numel() // 8), dtype=torch.uint8)

    def unpack_mask(packed: Tensor, like: Tensor) -> Tensor:
        return torch.empty(like.shape, dtype=torch.bool)

    return mock.patch.multiple(_lora_input, draw_mask=draw_mask, pack_mask=pack_mask, unpack_mask=unpack_mask)


@contextmanager
def answer_zero_for_meta() -> Iterator[None]:
    """Return 0 where library code reads a number from a meta tensor, which has no data."""

    class ZeroForMeta(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            reads_number = func is aten._local_scalar_dense.default and args[0].device.type == "meta"
            return 0 if reads_number else func(*args, **(kwargs or {}))

    with ZeroForMeta():
        yield


def materialize(model: nn.Module) -> None:
    """Allocate parameters and buffers on the CPU; shared ones stay shared."""
    weights: dict[int, nn.Parameter] = {}
    for name, weight in list(model.named_parameters(remove_duplicate=False)):
        if id(weight) not in weights:
            empty = torch.empty(weight.shape, dtype=weight.dtype, device="cpu")
            weights[id(weight)] = nn.Parameter(empty, requires_grad=weight.requires_grad)
        _set_tensor(model, name, weights[id(weight)])
    buffers: dict[int, Tensor] = {}
    for name, buffer in list(model.named_buffers(remove_duplicate=False)):
        if id(buffer) not in buffers:
            buffers[id(buffer)] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")
        _set_tensor(model, name, buffers[id(buffer)])


def _set_tensor(model: nn.Module, name: str, value: Tensor) -> None:
    module_path, _, attribute = name.rpartition(".")
    module = model.get_submodule(module_path)
    if isinstance(module, (nn.ParameterDict,)) or type(module).__name__ == "BufferDict":
        module[attribute] = value  # type: ignore[operator]
    elif isinstance(value, nn.Parameter):
        module.register_parameter(attribute, value)
    else:
        module.register_buffer(
            attribute, value, persistent=attribute not in module._non_persistent_buffers_set
        )


def _decoders(model: nn.Module) -> list[PreTrainedModel]:
    return [
        module for module in model.modules() if isinstance(module, PreTrainedModel) and _has_layers(module)
    ]


def _has_layers(model: PreTrainedModel) -> bool:
    return any(name == "layers" for name, _ in model.named_children())


def _prepare_training(model: nn.Module, case: MemoryCase) -> None:
    """Prepare the model as the Trainer does: checkpointing, autocast, float32 outputs."""
    model.train()
    if case.checkpointing:
        for module in model.modules():
            if isinstance(module, PreTrainedModel) and not _has_layers(module):
                module.enable_input_require_grads()
                module.activation_checkpointing_enable()
    for decoder in _decoders(model):
        # A prefix has keys before the first query, which need a mask in any case.
        if not case.masked and case.objective != "comparison" and not case.workload.adapter.prefix_tokens:
            for layer in decoder.get_submodule(
                "layers"
            ):  # under tracing transformers builds a mask that a run skips
                layer.register_forward_pre_hook(_without_mask, with_kwargs=True)
    if case.precision == "bfloat16":
        forward: Callable[..., Any] = torch.autocast("cpu", dtype=torch.bfloat16)(model.forward)
        model.forward = convert_outputs_to_fp32(forward)  # type: ignore[assignment]


def _without_mask(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args, {**kwargs, "attention_mask": None}


def _compute_loss(model: nn.Module, case: MemoryCase) -> Tensor:
    ids = torch.zeros(case.rows, case.seq_len, dtype=torch.long)
    if case.objective == "likelihood":
        batch = {"input_ids": ids, "labels": ids.clone(), "rows": torch.zeros(case.rows)}
        if case.masked:
            batch["attention_mask"] = torch.ones_like(ids)
        passes = planned_adapter(case.settings).forward_passes
        return completion_loss_sum(model, output_head(unwrap_model(model)), batch, num_passes=passes)
    batch = _group_batch(case, ids)
    if case.objective == "comparison":
        return token_logps(model, output_head(unwrap_model(model)), batch).sum()
    if case.objective == "scores":
        return token_scores(model, batch).sum()
    output = model(batch, with_entropy=False)
    return (output.logps + output.values).sum()


def _group_batch(case: MemoryCase, ids: Tensor) -> dict[str, Tensor]:
    """Return a batch of groups: prompt and completions in one row, or in PPO one row per completion."""
    indices = torch.zeros(case.predicted, dtype=torch.long)
    batch = {
        "input_ids": ids,
        "position_ids": ids.clone(),
        "group_ids": ids.clone(),
        "segment_ids": ids.clone(),
    }
    batch |= {"state_index": indices, "targets": indices.clone(), "completion_index": indices.clone()}
    batch |= {"token_offset": indices.clone(), "lengths": torch.zeros(case.rows, dtype=torch.long)}
    batch["predict_mask"] = torch.zeros(case.rows, case.seq_len, dtype=torch.bool)
    if case.objective == "ppo":
        batch["attention_mask"] = torch.ones_like(ids)
    return batch

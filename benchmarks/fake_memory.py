"""Memory of the real training step under FakeTensorMode, as the planner's reference.

Models are built from a config by transformers' classes, adapters by finetune/adapters, losses by our own
functions; ``FakeTensorMode`` runs them without data, and ``Ledger`` counts the storage of every tensor that
an operation returns, gradients and optimizer states included, until it is freed. Temporaries inside a kernel
are not counted.
"""

import gc
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

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

from align.ppo.roles import Roles
from align.preference.logps import token_logps
from align.preference.starting_policy import StartingPolicy
from align.reward.model import all_scores, put_head
from align.reward.shared_base import scorer_on
from finetune.planning.architecture import Architecture
from finetune.planning.from_recipe import adapter_of
from finetune.planning.workload import Objective, Precision, Workload
from finetune.recipe.discovery import ADAPTERS, load_plugin
from finetune.recipe.settings import AdapterSettings
from finetune.training.completion import completion_loss_sum
from finetune.training.head import output_head
from finetune.training.model import DTYPES, label_scores

aten = torch.ops.aten
Values = Mapping[str, Any]


class Ledger(TorchDispatchMode):
    """Counts the bytes of all live storages.

    Data-dependent numbers (how many elements of a mask are true) are answered with ``count``.
    """

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count
        self.live = self.peak = 0
        self.alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self.drawn: set[int] = set()

    def begin(self) -> None:
        """Reset the peak."""
        self.peak = self.live

    def add(self, tensor: Tensor) -> None:
        """Count a tensor's storage until it is freed."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        # Views share a storage; meta tensors have none.
        if key in self.alive or tensor.device.type == "meta":
            return

        def gone(_: object) -> None:
            if self.alive.pop(key, None) is not None:
                self.live -= size
                self.drawn.discard(key)

        # A weak reference does not prolong the storage's life and reports its end.
        self.alive[key] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation and count its outputs."""
        # Tensor.item(): a random index (AdaMix's expert) must be valid, other numbers count mask elements.
        if func is aten._local_scalar_dense.default:
            return 0 if args[0].untyped_storage()._cdata in self.drawn else self.count
        made = self._masked(func, args) if func in MASKED and _by_mask(args[1]) else None
        if made is None:
            made = func(*args, **(kwargs or {}))
        for one in tree_leaves(made):
            if isinstance(one, Tensor):
                self.add(one)
                if func is aten.randint.default:
                    self.drawn.add(one.untyped_storage()._cdata)
        return made

    def _masked(self, func: Any, args: tuple[Any, ...]) -> Tensor:
        """Return the output of an operation with a boolean mask: its size is data-dependent."""
        states, (mask,) = args[0], args[1]
        if func is aten.index.Tensor:
            made: Tensor = states.new_empty((self.count, *states.shape[mask.dim() :]))
            return made
        return torch.empty_like(states) if func is aten.index_put.default else states


MASKED = (
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
)


def _by_mask(indices: Sequence[Tensor | None]) -> bool:
    return any(one is not None and one.dtype == torch.bool for one in indices)


@dataclass(frozen=True)
class Case:
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
    config: Values
    adapter: Values = field(default_factory=lambda: {"method": "lora"})
    objective: Objective = "likelihood"
    precision: Precision = "bfloat16"
    lines: int = 4
    columns: int = 256
    predicted: int = 500
    masked: bool = False
    checkpointing: bool = False
    attention: str = "sdpa"
    accumulated: int = 1

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
            architecture=Architecture.of(self.config),
            adapter=adapter_of(self.settings),
            objective=self.objective,
            precision=self.precision,
            lines=self.lines,
            columns=self.columns,
            predicted=self.predicted,
            masked=self.masked,
            checkpointing=self.checkpointing,
            attention=self.attention,  # type: ignore[arg-type]
            accumulated=self.accumulated,
            heads=1 if self.objective in ("scores", "ppo") else 0,
            device="cpu",
        )


@dataclass(frozen=True)
class Measured:
    """Bytes of an optimizer step.

    Attributes:
        loaded: base and adapter.
        states: the optimizer's, from the second step on.
        pass_peak: peak of the forward and backward passes in addition to both.
    """

    loaded: int
    states: int
    taken: int


def measure(case: Case) -> Measured:
    """Run an optimizer step of a case on fake tensors; return its memory."""
    model = _built(case)
    ledger = Ledger(case.predicted)
    with FakeTensorMode(allow_non_fake_inputs=True), ledger:
        _materialise(model)
        start = StartingPolicy(model.policy) if isinstance(model, Roles) else None
        # Garbage in reference cycles would count as live.
        gc.collect()
        loaded = ledger.live
        _prepare(model, case)
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        # Without foreach: the planner counts its temporaries on CUDA alone.
        optimizer = torch.optim.AdamW(trained, lr=1e-3, foreach=False)
        ledger.begin()
        for _ in range(case.accumulated):
            _loss(model, case).backward()
        taken = ledger.peak - loaded
        optimizer.step()
        optimizer.zero_grad()
        states = ledger.live - loaded
        del start
    return Measured(loaded, states, taken)


def _built(case: Case) -> nn.Module:
    """Return base and adapter on the meta device."""
    config = AutoConfig.for_model(**case.config)
    plugin = load_plugin(ADAPTERS, case.adapter["method"], where="adapter.method")
    stored = DTYPES["float32" if case.adapter["method"] == "full" else case.precision]
    kind = AutoModelForSequenceClassification if case.objective == "scores" else AutoModelForCausalLM
    if case.objective == "scores":
        label_scores(config, ["score"])
    with torch.device("meta"), _zeros():
        attention = "eager" if Architecture.of(case.config).eager else case.attention
        base: PreTrainedModel = kind.from_config(config, dtype=stored, attn_implementation=attention)
        if case.objective == "scores":
            put_head(base, 1, pad_id=0)
        # Adapters expect a frozen base, as finetune/training loads it.
        base.requires_grad_(False)
        if case.objective != "ppo":
            model: nn.Module = plugin.build(base, case.settings)
            return model
        value = plugin.build(scorer_on(base, ["value"], pad_id=0), case.settings)
        return Roles(plugin.build(base, case.settings), value, column=0, temperature=1.0)


@contextmanager
def _zeros() -> Iterator[None]:
    """Answer 0 where library code reads a number from a meta tensor."""

    class Answers(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            asked = func is aten._local_scalar_dense.default and args[0].device.type == "meta"
            return 0 if asked else func(*args, **(kwargs or {}))

    with Answers():
        yield


def _materialise(model: nn.Module) -> None:
    """Allocate parameters and buffers on the CPU; shared ones stay shared."""
    weights: dict[int, nn.Parameter] = {}
    for name, weight in list(model.named_parameters(remove_duplicate=False)):
        if id(weight) not in weights:
            empty = torch.empty(weight.shape, dtype=weight.dtype, device="cpu")
            weights[id(weight)] = nn.Parameter(empty, requires_grad=weight.requires_grad)
        _put(model, name, weights[id(weight)])
    buffers: dict[int, Tensor] = {}
    for name, buffer in list(model.named_buffers(remove_duplicate=False)):
        if id(buffer) not in buffers:
            buffers[id(buffer)] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")
        _put(model, name, buffers[id(buffer)])


def _put(model: nn.Module, name: str, value: Tensor) -> None:
    place, _, own = name.rpartition(".")
    module = model.get_submodule(place)
    if isinstance(module, (nn.ParameterDict,)) or type(module).__name__ == "BufferDict":
        module[own] = value  # type: ignore[operator]
    elif isinstance(value, nn.Parameter):
        module.register_parameter(own, value)
    else:
        module.register_buffer(own, value, persistent=own not in module._non_persistent_buffers_set)


def _bases(model: nn.Module) -> list[PreTrainedModel]:
    return [one for one in model.modules() if isinstance(one, PreTrainedModel) and _has_layers(one)]


def _has_layers(model: PreTrainedModel) -> bool:
    return any(name == "layers" for name, _ in model.named_children())


def _prepare(model: nn.Module, case: Case) -> None:
    """Prepare the model as the Trainer does: checkpointing, autocast, float32 outputs."""
    model.train()
    if case.checkpointing:
        for one in model.modules():
            if isinstance(one, PreTrainedModel) and not _has_layers(one):
                one.enable_input_require_grads()
                one.activation_checkpointing_enable()
    for decoder in _bases(model):
        if not case.masked and case.objective != "comparison":
            for layer in decoder.get_submodule(
                "layers"
            ):  # under tracing transformers builds a mask that a run skips
                layer.register_forward_pre_hook(_without_mask, with_kwargs=True)
    if case.precision == "bfloat16":
        forward: Callable[..., Any] = torch.autocast("cpu", dtype=torch.bfloat16)(model.forward)
        model.forward = convert_outputs_to_fp32(forward)  # type: ignore[assignment]


def _without_mask(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args, {**kwargs, "attention_mask": None}


def _loss(model: nn.Module, case: Case) -> Tensor:
    ids = torch.zeros(case.lines, case.columns, dtype=torch.long)
    if case.objective == "likelihood":
        batch = {"input_ids": ids, "labels": ids.clone(), "rows": torch.zeros(case.lines)}
        if case.masked:
            batch["attention_mask"] = torch.ones_like(ids)
        passes = adapter_of(case.settings).passes
        return completion_loss_sum(model, output_head(_causal(model)), batch, passes=passes)
    batch = _groups(case, ids)
    if case.objective == "comparison":
        return token_logps(model, output_head(_causal(model)), batch).sum()
    if case.objective == "scores":
        return all_scores(model, batch).sum()
    found = model(batch, spread=False)
    return (found.logps + found.values).sum()


def _causal(model: nn.Module) -> PreTrainedModel:
    return next(one for one in model.modules() if isinstance(one, PreTrainedModel))


def _groups(case: Case, ids: Tensor) -> dict[str, Tensor]:
    """Return a batch of groups: prompt and completions in one row, or in PPO one row per completion."""
    numbers = torch.zeros(case.predicted, dtype=torch.long)
    batch = {"input_ids": ids, "position_ids": ids.clone(), "groups": ids.clone(), "parts": ids.clone()}
    batch |= {"sources": numbers, "targets": numbers.clone(), "owners": numbers.clone()}
    batch |= {"offsets": numbers.clone(), "lengths": torch.zeros(case.lines, dtype=torch.long)}
    batch["predicts"] = torch.zeros(case.lines, case.columns, dtype=torch.bool)
    if case.objective == "ppo":
        batch["attention_mask"] = torch.ones_like(ids)
    return batch

"""Toy models with each of our tuners, for the tests of what PEFT and transformers require of a tuner."""

import copy
import functools
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig
from transformers.pytorch_utils import Conv1D

from finetune.adapters._bias_layer import BitFitConfig
from finetune.adapters._bottleneck_layer import BottleneckConfig

SIZE, WORDS = 16, 40
IDS = torch.tensor([[1, 5, 9, 6, 30], [2, 7, 8, 5, 39]])


class MLP(nn.Module):
    """Linear layers, one of them with input and output of the same size, and norms."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(10, SIZE)
        self.lin1 = nn.Linear(SIZE, SIZE)
        self.norm = nn.LayerNorm(SIZE)
        self.head = nn.Linear(SIZE, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(torch.relu(self.lin1(torch.relu(self.lin0(x))))))


class Embedded(nn.Module):
    """An embedding, and transformers' Conv1D."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(WORDS, SIZE)
        self.conv1d = Conv1D(SIZE, SIZE)
        self.head = nn.Linear(SIZE, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv1d(self.emb(x)))


class Images(nn.Module):
    """A convolution and a norm whose channels are the second dimension; 4 channels, 4 columns."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.GroupNorm(2, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


TRANSFORMERS = {
    "llama": LlamaConfig(
        vocab_size=WORDS,
        hidden_size=SIZE,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        attention_bias=True,
        mlp_bias=True,
    ),
    "gpt2": GPT2Config(
        vocab_size=WORDS, n_embd=SIZE, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0
    ),
}


@functools.cache
def saved_base(family: str) -> Path:
    """Save a transformers model with random weights, also in biases and norms."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(TRANSFORMERS[family]))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    folder = Path(tempfile.mkdtemp(prefix=f"contract-{family}-"))
    model.save_pretrained(folder)
    return folder


@functools.cache
def _base(kind: str) -> nn.Module:
    if kind in TRANSFORMERS:
        return AutoModelForCausalLM.from_pretrained(saved_base(kind)).eval()
    torch.manual_seed(0)
    return {"mlp": MLP, "embedded": Embedded, "images": Images}[kind]().eval()


@functools.cache
def inputs_of(kind: str) -> Tensor:
    torch.manual_seed(1)
    shapes = {"mlp": (4, 10), "images": (2, 3, 4, 4)}
    return torch.randn(shapes[kind]) if kind in shapes else IDS


@dataclass(frozen=True)
class Case:
    """A tuner's config on a toy model."""

    base_kind: str
    config_class: type[PeftConfig]
    settings: dict[str, object]
    second_targets: tuple[str, ...] = ()
    """Target modules of a second adapter, which the first one does not have."""

    def base(self) -> nn.Module:
        return copy.deepcopy(_base(self.base_kind))

    def config(self, **changed: object) -> PeftConfig:
        task = {"task_type": "CAUSAL_LM"} if self.is_language_model else {}
        return self.config_class(**(task | self.settings | changed))

    def adapted(self, seed: int = 2, **changed: object) -> PeftModel:
        """Return the base with an adapter of random weights."""
        model = get_peft_model(self.base(), self.config(**changed)).eval()
        perturb(model, seed)
        return model

    def output(self, model: nn.Module, *, grad: bool = False) -> Tensor:
        inputs = inputs_of(self.base_kind)
        if inputs.is_floating_point():
            inputs = inputs.to(next(p.dtype for p in model.parameters() if p.is_floating_point()))
        with torch.set_grad_enabled(grad):
            result = model(input_ids=inputs).logits if self.is_language_model else model(inputs)
        assert isinstance(result, Tensor)
        return result

    @property
    def is_language_model(self) -> bool:
        return self.base_kind in TRANSFORMERS

    @property
    def merges(self) -> bool:
        return self.config_class is BitFitConfig

    @property
    def prefix(self) -> str:
        return "bitfit_" if self.merges else "bottleneck_"


def _bottleneck(kind: str, targets: list[str], second: tuple[str, ...] = (), **settings: object) -> Case:
    settings = {"target_modules": targets, "hidden_size": SIZE, "width": 3} | settings
    return Case(kind, BottleneckConfig, settings, second)


def _bitfit(kind: str, targets: list[str], second: tuple[str, ...] = ()) -> Case:
    return Case(kind, BitFitConfig, {"target_modules": targets}, second)


CASES = {
    "mlp, bottleneck": _bottleneck("mlp", ["lin0", "lin1"], ("norm",)),
    "mlp, parallel bottleneck": _bottleneck("mlp", ["lin1"], ("norm",), parallel=True, activation="silu"),
    "mlp, AdaMix": _bottleneck("mlp", ["lin0", "lin1"], ("norm",), experts=3, activation="gelu"),
    "mlp, BitFit": _bitfit("mlp", ["lin0", "lin1"], ("norm",)),
    "embedding and Conv1D, bottleneck": _bottleneck("embedded", ["emb", "conv1d"]),
    "Conv1D, BitFit": _bitfit("embedded", ["conv1d"], ("head",)),
    "convolution and norm, BitFit": _bitfit("images", ["conv", "norm"], ("head",)),
    "llama, parallel bottleneck": _bottleneck("llama", ["mlp"], ("o_proj",), parallel=True, scale=4.0),
    "llama, bottleneck": _bottleneck("llama", ["o_proj", "down_proj"]),
    "llama, AdaMix": _bottleneck("llama", ["down_proj"], ("o_proj",), experts=3),
    "llama, BitFit": _bitfit("llama", ["q_proj", "o_proj", "down_proj"], ("up_proj",)),
    "gpt2, parallel bottleneck": _bottleneck("gpt2", ["mlp"], parallel=True),
    "gpt2, bottleneck": _bottleneck("gpt2", ["c_proj"]),
    "gpt2, BitFit": _bitfit("gpt2", ["c_attn", "c_fc", "ln_1", "ln_f"], ("c_proj",)),
}


@torch.no_grad()
def perturb(model: nn.Module, seed: int, adapter: str = "default") -> None:
    """Set an adapter's weights, initially without effect, to random values."""
    torch.manual_seed(seed)
    for layer in tuner_layers(model):
        for name in layer.adapter_layer_names:
            adapters = getattr(layer, name)
            if adapter in adapters:
                entry = adapters[adapter]
                for weight in [entry] if isinstance(entry, nn.Parameter) else entry.parameters():
                    weight.copy_(torch.randn_like(weight))


def tuner_layers(model: nn.Module) -> list[BaseTunerLayer]:
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of the base's weights, by their names in the base."""
    adapters = ("bitfit_", "bottleneck_")
    return {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): weight.detach().clone()
        for name, weight in model.named_parameters()
        if not any(prefix in name for prefix in adapters)
    }


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@contextmanager
def saved(model: nn.Module) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, save_embedding_layers=False)
        yield Path(folder)


@contextmanager
def no_error() -> Iterator[None]:
    yield


@contextmanager
def language_model_folder(case: Case) -> Iterator[tuple[Path, Tensor]]:
    """Save a language model's adapter; yield the folder and the expected logits."""
    base = AutoModelForCausalLM.from_pretrained(saved_base(case.base_kind))
    model = get_peft_model(base, case.config()).eval()
    perturb(model, 2)
    with saved(model) as folder:
        yield folder, case.output(model)


def close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, atol=1e-5, rtol=1e-4)


FAST = ("mlp, AdaMix", "mlp, BitFit")
FAST_LANGUAGE_MODELS = ("llama, parallel bottleneck", "gpt2, BitFit")
MERGEABLE = tuple(name for name, case in CASES.items() if case.merges)
LANGUAGE_MODELS = tuple(name for name, case in CASES.items() if case.is_language_model)
TWO_TARGETS = tuple(name for name, case in CASES.items() if case.second_targets)


def each_case(*, only: Sequence[str] = tuple(CASES), fast: Sequence[str] = FAST) -> pytest.MarkDecorator:
    """Run a test on each case of ``only``; those that are not in ``fast`` are slow."""
    return pytest.mark.parametrize(
        "case",
        [pytest.param(CASES[name], id=name, marks=() if name in fast else pytest.mark.slow) for name in only],
    )

"""Property matrix of all adapters on all model families: one function per property.

A property returns None if it holds, or the reason why the adapter (or the model) does not support it; it
raises AssertionError if it is violated. No cell of the matrix is skipped silently.
"""

import copy
import functools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft import PeftModel
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig, PreTrainedModel, Qwen2Config

from finetune.adapters._load import load_saved_adapter
from finetune.data.collate import LMExample, PackedCollator, PaddedCollator
from finetune.distributed.hardware import detect_hardware
from finetune.recipe.discovery import ADAPTERS, load_plugin, plugin_names
from finetune.recipe.settings import ModelSettings
from finetune.training.loss import completion_loss_sum, output_head
from finetune.training.model import load_base

WIDTH, WORDS = 64, 96
SIZES = {
    "vocab_size": WORDS,
    "hidden_size": WIDTH,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, num_key_value_heads=2),
    "qwen2": Qwen2Config(**SIZES, num_key_value_heads=2),
    "gpt-neox": GPTNeoXConfig(**SIZES, hidden_dropout=0.0, attention_dropout=0.0),
}
FAMILIES = list(CONFIGS)
METHODS = [
    name
    for name in plugin_names(ADAPTERS)
    if not load_plugin(ADAPTERS, name, where="test").TRAITS.full_finetuning
]
SETTINGS = {
    "trainable_tokens": {"tokens": [5, 6, 7]},
    "multitask_prompt": {"virtual_tokens": 6},
    "vera": {"rank": 8},
}
SHORT = {"virtual_tokens": 6, "dropout": 0.0, "rank": 4}
IDS = torch.tensor([[1, 5, 9, 6, 30, 31, 32, 7], [2, 7, 8, 5, 40, 41, 42, 6]])


@functools.cache
def _folder(family: str) -> Path:
    """Save a base with random weights, also in biases and norms, so that none is exactly zero or one."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[family]))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:
                weight.add_(0.02 * torch.randn_like(weight))
    folder = Path(tempfile.mkdtemp(prefix=f"base-{family}-"))
    model.save_pretrained(folder)
    return folder


def base_of(family: str, quantization: str = "none") -> PreTrainedModel:
    """Return a base of its own, copied from the loaded one."""
    return copy.deepcopy(_base(family, quantization))


@functools.cache
def _base(family: str, quantization: str) -> PreTrainedModel:
    settings = ModelSettings(base=str(_folder(family)))
    return load_base(settings, precision="float32", quantization=quantization, hardware=detect_hardware())


def build(method: str, base: PreTrainedModel, **changed: object) -> PeftModel:
    module = load_plugin(ADAPTERS, method, where="test")
    fields = module.Settings.model_fields
    short = {key: value for key, value in SHORT.items() if key in fields}
    torch.manual_seed(1)
    adapted = module.build(base, module.Settings(**(short | SETTINGS.get(method, {}) | changed)))
    assert isinstance(adapted, PeftModel)
    return adapted


def default_quantization(method: str) -> str:
    quantization: str = load_plugin(ADAPTERS, method, where="test").TRAITS.quantization[0]
    return quantization if quantization != "int8" else "none"


def build_adapter(method: str, family: str) -> PeftModel:
    return build(method, base_of(family, default_quantization(method)))


def train(model: PeftModel, steps: int = 5, seed: int = 3) -> None:
    torch.manual_seed(seed)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=0.02, weight_decay=0.0)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    model.eval()


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    model.eval()
    return model(input_ids=IDS).logits[:, -IDS.shape[1] :]


def is_close(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.allclose(actual, expected, atol=1e-5, rtol=1e-4)


@dataclass(frozen=True)
class Trained:
    """An adapter trained five steps, what it was before, and which weights had a gradient."""

    model: PeftModel
    base_weights: dict[str, torch.Tensor]
    """The base's weights before training, by their names in ``model``."""
    adapter_weights: dict[str, torch.Tensor]
    """The trainable weights before training."""
    with_gradient: set[str]

    def copied(self) -> PeftModel:
        """Return a copy for a property that changes the model."""
        return copy.deepcopy(self.model)


@functools.lru_cache(maxsize=len(FAMILIES))
def trained(method: str, family: str) -> Trained:
    """Return the trained adapter of a cell; the properties share it, and leave it as it is."""
    base = base_of(family, default_quantization(method))
    of_base = {id(weight) for weight in base.parameters()}
    model = build(method, base)
    before = {name: copy.deepcopy(weight.data) for name, weight in model.named_parameters()}
    frozen = {name for name, weight in model.named_parameters() if id(weight) in of_base}
    trainable = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trainable and not trainable & frozen
    train(model)
    return Trained(
        model,
        {name: before[name] for name in frozen},
        {name: before[name] for name in trainable},
        {name for name, weight in model.named_parameters() if weight.grad is not None},
    )


def trains_alone(method: str, family: str) -> str | None:
    """Only the adapter trains: each of its weights gets a gradient and changes, the base is bit-identical."""
    cell = trained(method, family)
    after = {name: weight.data for name, weight in cell.model.named_parameters()}
    assert cell.with_gradient == cell.adapter_weights.keys()
    assert [name for name, value in cell.adapter_weights.items() if torch.equal(after[name], value)] == []
    assert [name for name, value in cell.base_weights.items() if not torch.equal(after[name], value)] == []
    assert cell.base_weights
    return None


def starts_near_the_base(method: str, family: str) -> str | None:
    """An untrained adapter does not change the output, unless it consists of virtual tokens."""
    adapted = build_adapter(method, family)
    if adapted.active_peft_config.is_prompt_learning:
        return "virtual tokens change the output from the first step on"
    expected = logits(base_of(family, default_quantization(method)))
    if method == "loftq":
        exact = logits(base_of(family))
        assert (logits(adapted) - exact).norm() < (expected - exact).norm()
        return "its initialization is closer to the unquantized base than the 4-bit base is"
    assert is_close(logits(adapted), expected)
    return None


def saves_and_loads(method: str, family: str) -> str | None:
    """A saved and reloaded adapter gives the same logits."""
    adapted = trained(method, family).model
    with tempfile.TemporaryDirectory() as folder:
        adapted.save_pretrained(folder, save_embedding_layers=False)
        opened = load_saved_adapter(base_of(family, default_quantization(method)), Path(folder))
    assert (logits(opened) - logits(adapted)).abs().max() < 2e-5
    return None


def merges(method: str, family: str) -> str | None:
    """Merging the adapter into the base gives the same logits."""
    adapted = trained(method, family).copied()
    expected = logits(adapted)
    reason: str = load_plugin(ADAPTERS, method, where="test").TRAITS.merge_unsupported
    if reason:
        if not adapted.active_peft_config.is_prompt_learning:
            try:
                adapted.merge_and_unload()
            except (ValueError, NotImplementedError, AttributeError):
                return reason
            raise AssertionError("merging is declared unsupported, but succeeded")
        return reason
    if default_quantization(method) == "nf4":
        return "4-bit weights round the sum; merge on the unquantized base"
    merged = adapted.merge_and_unload()
    assert not [name for name, _ in merged.named_parameters() if "lora" in name or "bottleneck" in name]
    assert (logits(merged) - expected).abs().max() < 5e-5
    return None


def switches_off(method: str, family: str) -> str | None:
    """With the adapter disabled the logits are the base's, bit for bit."""
    adapted = trained(method, family).model
    expected = logits(base_of(family, default_quantization(method)))
    assert not is_close(logits(adapted), expected)
    with adapted.disable_adapter():
        base_logits = logits(adapted)
    if load_plugin(ADAPTERS, method, where="test").TRAITS.changes_base:
        assert not is_close(base_logits, expected)
        return "the base in memory is the residual; the initial adapter has the rest"
    assert torch.equal(base_logits, expected)
    return None


def takes_four_bits(method: str, family: str) -> str | None:
    """It trains on an NF4 base, whose bytes do not change."""
    allowed = load_plugin(ADAPTERS, method, where="test").TRAITS.quantization
    if "nf4" not in allowed:
        return "it requires an unquantized base"
    base = base_of(family, "nf4")
    assert any(isinstance(module, Linear4bit) for module in base.modules())
    codes = {name: w.data.clone() for name, w in base.named_parameters() if w.dtype == torch.uint8}
    assert codes
    adapted = build(method, base)
    train(adapted, steps=2)
    packed = {id(w): w for w in adapted.parameters() if w.dtype == torch.uint8}
    assert len(packed) == len(codes)
    assert all(any(torch.equal(weight.data, code) for weight in packed.values()) for code in codes.values())
    assert torch.isfinite(logits(adapted)).all()
    return None


def takes_eight_bits(method: str, family: str) -> str | None:
    """It trains on an 8-bit base."""
    allowed = load_plugin(ADAPTERS, method, where="test").TRAITS.quantization
    if "int8" not in allowed:
        kinds = ["unquantized" if kind == "none" else kind for kind in allowed]
        return f"it supports only bases that are {' or '.join(kinds)}"
    base = base_of(family, "int8")
    assert any(isinstance(module, Linear8bitLt) for module in base.modules())
    adapted = build(method, base)
    before = logits(adapted)
    train(adapted, steps=3)
    assert torch.isfinite(logits(adapted)).all() and not torch.equal(logits(adapted), before)
    return None


def packs_rows(method: str, family: str) -> str | None:
    """Packed rows give the same loss as padded rows."""
    if not load_plugin(ADAPTERS, method, where="test").TRAITS.packing:
        return "each row needs its own virtual tokens, but packed rows would share one set"
    adapted = trained(method, family).model
    head = output_head(adapted.get_base_model())
    rows = [
        LMExample(input_ids=torch.arange(3, 3 + size), labels=torch.arange(3, 3 + size), row=size)
        for size in (9, 3, 14, 6)
    ]
    collators = (PaddedCollator(0), PackedCollator(0), PackedCollator(0, single_row=True))
    with torch.no_grad():
        padded, *packed = (float(completion_loss_sum(adapted, head, one(rows))) for one in collators)
    assert all(abs(loss / padded - 1) < 1e-5 for loss in packed)
    return None


def switches_between_two(method: str, family: str) -> str | None:
    """Two trained adapters on one base give the same logits as each one alone."""
    if load_plugin(ADAPTERS, method, where="test").TRAITS.changes_base:
        return "each adapter would subtract its components from the same base"
    other = build_adapter(method, family)
    train(other, steps=4, seed=2)
    expected = []
    with tempfile.TemporaryDirectory() as folder:
        for index, adapted in enumerate((trained(method, family).model, other), 1):
            adapted.save_pretrained(f"{folder}/{index}", save_embedding_layers=False)
            expected.append(logits(adapted))
        both = load_saved_adapter(base_of(family, default_quantization(method)), Path(folder) / "1")
        both.load_adapter(f"{folder}/2", "second")
    assert not is_close(*expected)
    assert (logits(both) - expected[0]).abs().max() < 2e-5
    both.set_adapter("second")
    assert (logits(both) - expected[1]).abs().max() < 2e-5
    both.set_adapter("default")
    assert (logits(both) - expected[0]).abs().max() < 2e-5
    return None


def checkpoints_gradients(method: str, family: str) -> str | None:
    """Gradient checkpointing gives the same gradients."""
    if not load_plugin(ADAPTERS, method, where="test").TRAITS.gradient_checkpointing:
        return "a prefix is in the key-value cache, which gradient checkpointing disables"
    gradients = []
    for recompute in (False, True):
        adapted = trained(method, family).copied()
        adapted.train()
        if recompute:
            base = adapted.get_base_model()
            base.enable_input_require_grads()
            base.gradient_checkpointing_enable({"use_reentrant": False})
        adapted.zero_grad()
        torch.manual_seed(5)
        adapted(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append([w.grad.clone() for w in adapted.parameters() if w.requires_grad])
    assert all(is_close(one, other) for one, other in zip(*gradients, strict=True))
    assert any(gradient.abs().sum() > 0 for gradient in gradients[0])
    return None


def generates_with_cache(method: str, family: str) -> str | None:
    """Generation with the key-value cache gives the same tokens as full forward passes."""
    adapted = trained(method, family).model
    prompt = IDS[:1, :4]
    greedy = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": None}
    cached = adapted.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **greedy)
    ids = prompt
    with torch.no_grad():
        for _ in range(6):
            ids = torch.cat([ids, adapted(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(cached[:, -6:], ids[:, -6:])
    return None


PROPERTIES: dict[str, Callable[[str, str], str | None]] = {
    "trains alone": trains_alone,
    "starts at the base": starts_near_the_base,
    "save = load": saves_and_loads,
    "merge": merges,
    "off = base": switches_off,
    "4-bit base": takes_four_bits,
    "8-bit base": takes_eight_bits,
    "packed = padded": packs_rows,
    "two on one base": switches_between_two,
    "checkpointing": checkpoints_gradients,
    "cache": generates_with_cache,
}

"""Reopen what was saved with the libraries' own loaders, and compare its logits with the model in memory.

Equal tensors do not show that a library finds them again under their names: experts are fused in memory and
not in the files, tied heads are saved once, wrappers add prefixes. The logits on rows of the run do.

Memory: an adapter is reopened as a second one on the base in memory. A full model is reopened on its own,
in place of its gradients, which have its size and are dropped first.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    PromptTuningConfig,
    PromptTuningInit,
    TrainableTokensConfig,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from finetune.adapters import register_peft_types
from finetune.adapters._prompt_model import ENCODER_WEIGHTS_FILE
from finetune.library_internals import attention_implementation
from finetune.recipe.errors import Problem, UserError
from finetune.training.model import DTYPES, preserve_state
from finetune.training.preflight.checks import first_few

REOPENED = "reopened"
"""Name of the saved adapter as a second one on the trained one's base."""
ENCODER_BOUND = {"float32": 1e-3, "bfloat16": 2e-1, "float16": 5e-2}
"""A prompt that an encoder computes in the precision of the run is saved in float32."""

Logits = list[Tensor]


@dataclass(frozen=True)
class Probe:
    """Rows of token ids and the precision of the forward pass: what two models are compared on."""

    rows: Sequence[Sequence[int]]
    precision: str

    @torch.no_grad()
    def logits(self, model: nn.Module) -> Logits:
        """Return the logits of each row, on the CPU; the model is not changed, but drops its gradients."""
        device = next(model.parameters()).device
        dtype = DTYPES[self.precision]
        autocast = torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)
        with preserve_state(model), autocast:
            # Row by row: padding would be another difference between two models.
            return [
                model(input_ids=torch.tensor([row], device=device), use_cache=False).logits.float().cpu()
                for row in self.rows
            ]


@dataclass(frozen=True, slots=True)
class Difference:
    """The RMS difference of two models' logits, and its bound, in standard deviations of the logits."""

    size: float
    bound: float

    @property
    def accepted(self) -> bool:
        """Return whether the difference is within its bound (NaN is not)."""
        return self.size <= self.bound

    def require(self, where: Path, *, expected: str = "the model in memory") -> None:
        """Raise UserError if the difference exceeds its bound."""
        if not self.accepted:
            raise reopen_error(where, f"logits of the reopened files {self}", expected)

    def __str__(self) -> str:
        if self.size == 0:
            return "equal bit for bit"
        return f"differ by {self.size:.1e} standard deviations (rounding explains {self.bound:.1e})"


def logits_difference(actual: Logits, expected: Logits) -> float:
    """Return the RMS difference of logits, relative to the standard deviation of the expected ones.

    0 only if they are equal bit for bit, where NaN equals NaN: held-out metrics stop a run with NaN weights.
    """
    pairs = list(zip(actual, expected, strict=True))
    if any(a.shape != b.shape for a, b in pairs):
        return float("inf")
    if all(torch.allclose(a, b, rtol=0, atol=0, equal_nan=True) for a, b in pairs):
        return 0.0
    actual_all, expected_all = (torch.cat([row.flatten() for row in rows]) for rows in (actual, expected))
    difference: float = ((actual_all - expected_all).square().mean().sqrt() / expected_all.std()).item()
    return difference


def reopening_unsupported(model: nn.Module) -> str:
    """Return why an adapter cannot be loaded as a second one, or ""."""
    if isinstance(model, PeftModel) and isinstance(model.active_peft_config, TrainableTokensConfig):
        return "PEFT does not load a second set of trained tokens"
    return ""


def reopen_adapter(model: PeftModel, folder: Path, probe: Probe) -> Difference:
    """Load a saved adapter as a second one on the trained one's base, and compare their logits.

    Raises:
        UserError: PEFT does not find the adapter's tensors in the files.
    """
    register_peft_types()
    expected = probe.logits(model)
    bound = _bound(model, folder, probe, noise=logits_difference(probe.logits(model), expected))
    with _second_adapter(model, folder):
        return Difference(logits_difference(probe.logits(model), expected), bound)


def _bound(model: PeftModel, folder: Path, probe: Probe, *, noise: float) -> float:
    """Return how much logits may differ: not at all, unless two passes of one model do."""
    is_float32 = all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    # PEFT loads adapters in float32. An engine may have trained them in 16 bits.
    if not is_float32:
        return 2 * noise + max(ENCODER_BOUND[precision] for precision in ("bfloat16", probe.precision))
    return 2 * noise + (ENCODER_BOUND[probe.precision] if (folder / ENCODER_WEIGHTS_FILE).is_file() else 0.0)


@contextmanager
def _second_adapter(model: PeftModel, folder: Path) -> Iterator[None]:
    """Make a saved adapter the active one inside the block; then delete it."""
    trained = model.active_adapter
    requires_grad = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    with preserve_state(model):  # a new adapter draws random weights
        try:
            model.add_adapter(REOPENED, _loading_config(folder))
            loaded = model.load_adapter(str(folder), REOPENED)
            if not model.peft_config[REOPENED].is_prompt_learning:  # its keys are not those of the model
                missing = _without_tied(model, loaded.missing_keys)
                _check_keys(folder, missing=missing, unexpected=loaded.unexpected_keys)
            model.set_adapter(REOPENED)
            yield
        finally:
            model.set_adapter(trained)
            model.delete_adapter(REOPENED)
            for parameter, value in requires_grad:
                parameter.requires_grad_(value)


def _without_tied(model: nn.Module, missing: Sequence[str]) -> list[str]:
    """Return the missing names whose parameter was not loaded by another name (a tied head's)."""
    named = dict(model.named_parameters(remove_duplicate=False))
    loaded = {id(parameter) for name, parameter in named.items() if name not in missing}
    return [name for name in missing if name not in named or id(named[name]) not in loaded]


def _loading_config(folder: Path) -> PeftConfig:
    """Return the saved config without its initialization, which may change the base or read other files."""
    config = PeftConfig.from_pretrained(str(folder))
    config.inference_mode = True
    if isinstance(config, LoraConfig):
        config.init_lora_weights = True  # PiSSA would subtract its product from the base once more
    if isinstance(config, PromptTuningConfig):
        config.prompt_tuning_init = PromptTuningInit.RANDOM
    return config


@dataclass(frozen=True, slots=True)
class Loading:
    """How a saved model is loaded to be comparable: dtype, device and kernels of the model in memory."""

    dtype: torch.dtype
    device: str
    attention: str | None
    generates: bool
    trust_remote_code: bool

    @classmethod
    def of(cls, model: PreTrainedModel, *, trust_remote_code: bool) -> "Loading":
        """Return the loading of a model in memory."""
        attention = attention_implementation(model.config)
        return cls(model.dtype, str(model.device), attention, model.can_generate(), trust_remote_code)


def reopen_model(folder: Path, loading: Loading, probe: Probe) -> Logits:
    """Load a saved model as users do, and return its logits.

    Raises:
        UserError: transformers does not find all weights in the files, or not all of the files' weights.
    """
    auto_class = AutoModelForCausalLM if loading.generates else AutoModelForSequenceClassification
    model, loaded = auto_class.from_pretrained(
        str(folder),
        dtype=loading.dtype,
        device_map={"": loading.device},
        attn_implementation=loading.attention,
        trust_remote_code=loading.trust_remote_code,
        use_safetensors=True,
        output_loading_info=True,
    )
    missing = [*loaded["missing_keys"], *(name for name, *_ in loaded["mismatched_keys"])]
    _check_keys(folder, missing=missing, unexpected=list(loaded["unexpected_keys"]))
    return probe.logits(model)


def _check_keys(folder: Path, *, missing: Sequence[str], unexpected: Sequence[str]) -> None:
    if missing or unexpected:
        counts = f"{len(missing)} tensors are missing, {len(unexpected)} unexpected"
        names = first_few([*missing, *unexpected])
        raise reopen_error(folder, f"when its files are loaded {counts}: {names}")


def reopen_error(where: Path, actual: str, expected: str = "the model in memory") -> UserError:
    """Return the error for files that do not hold the model in memory."""
    repair = "this is a bug in llm-align or in the library that saved them; the run's other files are kept"
    return UserError(Problem(f"saved weights ({where})", actual, expected, repair))


def check_saveable(model: nn.Module) -> None:
    """Check before training that PEFT saves every trained tensor, and finds it again by its name.

    Raises:
        UserError: a trained tensor would be lost.
    """
    if not isinstance(model, PeftModel) or model.active_peft_config.is_prompt_learning:
        return  # PEFT saves a prompt's values, not the tensors that compute it
    adapter = model.active_adapter
    state = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    saved = {value.data_ptr() for value in state.values()}
    lost = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.data_ptr() not in saved
    ]
    unexpected = set_peft_model_state_dict(model, dict(state), adapter_name=adapter).unexpected_keys
    if lost or unexpected:
        actual = f"PEFT does not save, or does not find again: {first_few([*lost, *unexpected])}"
        expected = "an adapter whose trained tensors are all saved"
        raise UserError(Problem("adapter", actual, expected, "leave these layers out of adapter.target"))

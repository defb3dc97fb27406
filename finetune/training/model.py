"""Load the base model (dtype, quantization, sharding), tokenizer and config, and attach the adapter."""

import random
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bitsandbytes.nn import Linear4bit
from huggingface_hub.constants import HF_HUB_CACHE
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.distributed import DistributedConfig
from transformers.utils import find_adapter_config_file
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from finetune.adapters._lora_input import optimize_lora_inputs
from finetune.data.tokens import Encoder
from finetune.distributed.hardware import Hardware
from finetune.distributed.rank import dist_info
from finetune.distributed.sharding import full_numel, reshard, set_fsdp_root
from finetune.distributed.strategies import SHARDED_WEIGHTS
from finetune.library_internals import base_quantization, disable_4bit_repacking, quant_state
from finetune.recipe.base_config import stored_quantization
from finetune.recipe.bases import foreign_adapter, resolve_base
from finetune.recipe.discovery import load_plugin
from finetune.recipe.disk import is_write_error, storage_error
from finetune.recipe.errors import LibraryError, Problem, UserError
from finetune.recipe.hub import reads_base_offline
from finetune.recipe.settings import AdapterSettings, ModelSettings, StageSettings
from finetune.training import auto_values
from finetune.training.architectures import check_causal_architecture
from finetune.training.library_errors import (
    MAX_MESSAGE,
    adapter_errors,
    describe_cause,
    raised_by_library,
    to_library_error,
)
from finetune.training.preflight.weight_checks import check_finite_weights
from finetune.training.rope import extend_context, max_positions, reset_dynamic_rope

HUB_REPAIR = "accept the license of a gated model and log in (hf auth login); offline: --base FOLDER"
MODEL_CLASSES = re.compile(r"transformers/models/(?!auto/)")
"""Files of the classes of models and their configs."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


SCORE_HEAD = "score"
"""transformers' name for a sequence-classification model's head; PEFT trains it along with an adapter."""
SCORE_WEIGHT = f"{SCORE_HEAD}.weight"


@dataclass(frozen=True, slots=True)
class ParameterCount:
    """Number of trained parameters, and of all."""

    trained: int
    total: int

    def describe(self) -> str:
        """Return both numbers and their ratio in one line."""
        share = self.trained / self.total
        return f"{self.trained:,} of {self.total:,} parameters are trained ({share:.2%})"


@dataclass(frozen=True)
class TextEncoding:
    """Encoder, positions available for tokens, virtual tokens of the adapter, maximum tokens of a row."""

    encoder: Encoder
    context: int
    virtual_tokens: int
    max_length: int


def build_text_encoding(settings: StageSettings) -> tuple[TextEncoding, str]:
    """Load tokenizer and template; return them with the reason for ``max_length``.

    Raises:
        UserError: no such base, no EOS, no chat template, or ``max_length`` exceeds the model's positions.
    """
    virtual_tokens = settings.adapter.positions
    # The config comes first: what is no language model may have no tokenizer either.
    context = context_length(settings.model)
    tokenizer = load_tokenizer(settings.model)
    encoder = Encoder(
        tokenizer,
        settings.data.template,
        system=settings.data.system_prompt,
        template_options=settings.data.template_options,
        reasoning=settings.data.reasoning,
    )
    max_length, reason = auto_values.max_length(
        settings.data.max_length, context=context, virtual_tokens=virtual_tokens
    )
    return TextEncoding(encoder, context - virtual_tokens, virtual_tokens, max_length), reason


@dataclass(frozen=True)
class Policy:
    """The trained model: base with adapter, precision of the forward pass, quantization of the base."""

    model: nn.Module
    precision: str
    quantization: str


def load_tokenizer(settings: ModelSettings) -> PreTrainedTokenizerBase:
    """Return the base's tokenizer.

    Raises:
        UserError: the base has none, or the download failed.
    """
    with _LoadErrors(settings):
        return AutoTokenizer.from_pretrained(
            resolve_base(settings.base),
            revision=settings.revision or "main",
            trust_remote_code=settings.trust_remote_code,
            local_files_only=reads_base_offline(settings),
        )


def load_config(settings: ModelSettings) -> PretrainedConfig:
    """Return the base's config, with the recipe's RoPE scaling.

    Raises:
        UserError: the base has none, it is no causal language model, or its RoPE cannot be scaled.
    """
    with _LoadErrors(settings):
        config: PretrainedConfig = AutoConfig.from_pretrained(
            resolve_base(settings.base),
            revision=settings.revision or "main",
            trust_remote_code=settings.trust_remote_code,
            local_files_only=reads_base_offline(settings),
        )
    check_causal_architecture(config, base=settings.base)
    extend_context(config, settings.rope, base=settings.base)
    return config


def context_length(settings: ModelSettings) -> int:
    """Return the base's maximum positions, from its config; ``NO_POSITION_LIMIT`` without a maximum."""
    return max_positions(load_config(settings))


def load_base(
    settings: ModelSettings,
    *,
    precision: str,
    quantization: str,
    hardware: Hardware,
    heads: Sequence[str] = (),
    strategy: str = "single",
) -> PreTrainedModel:
    """Return the frozen base on its device.

    Args:
        settings: the recipe's model section.
        precision: dtype of the forward pass, and of weights that are not quantized.
        quantization: ``none``, ``nf4`` (4-bit NormalFloat, double quantization) or ``int8``.
        hardware: the device.
        heads: names of the scores of a reward model, in place of the LM head; their weights may be missing.
        strategy: ``fsdp2`` shards the weights, ``zero3`` within ``sharding.zero3_init``.

    Raises:
        UserError: there is no such base, its files are corrupt, or a weight is NaN or infinite.
    """
    config = load_config(settings)
    if heads:
        configure_score_heads(config, heads)
        set_verbosity_error()  # the library warns of a newly initialized head, which is intended here
    auto_class = AutoModelForSequenceClassification if heads else AutoModelForCausalLM
    model: PreTrainedModel
    with _LoadErrors(settings):
        _refuse_adapter_on_hub(settings)
        model, loading_info = auto_class.from_pretrained(
            resolve_base(settings.base),
            config=config,
            revision=settings.revision or "main",
            trust_remote_code=settings.trust_remote_code,
            local_files_only=reads_base_offline(settings),
            dtype=DTYPES[precision],
            attn_implementation=None if settings.attention == "auto" else settings.attention,
            quantization_config=_quantization_config(config, quantization, precision, heads=bool(heads)),
            # Sharded weights are placed by the engine.
            device_map=None if strategy in SHARDED_WEIGHTS else {"": hardware.device},
            distributed_config=_fsdp_config(strategy),
            # Pickled weights can execute code.
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # reported below with names and shapes
            output_loading_info=True,
        )
        _check_all_loaded(loading_info, heads=heads)
    if strategy not in SHARDED_WEIGHTS:
        _cast_weights(model, DTYPES[precision])
    check_finite_weights(model, settings.base, in_float16=precision == "float16" or quantization == "int8")
    if hardware.device == "cpu" and base_quantization(model) == "nf4":
        _disable_nf4_repacking(model)
    reset_dynamic_rope(model)
    # Frozen before the adapter is built: what it adds, or unfreezes, is all that trains.
    model.requires_grad_(False)
    if strategy == "fsdp2":
        set_fsdp_root(model)
    return model


def _cast_weights(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast what a stored quantized base has in another dtype, as transformers does for other bases."""
    if base_quantization(model) != "none":
        for weight in model.parameters():
            state = quant_state(weight)
            if state is not None:
                state.dtype = dtype  # of dequantized values, which are rounded to it
            elif weight.is_floating_point():
                weight.data = weight.data.to(dtype)


def _refuse_adapter_on_hub(settings: ModelSettings) -> None:
    """Raise UserError if a Hub model comes with an adapter, which transformers would add to it silently."""
    name = resolve_base(settings.base)  # looks into folders
    file = find_adapter_config_file(
        name, revision=settings.revision or "main", local_files_only=reads_base_offline(settings)
    )
    if file is not None:
        raise UserError(foreign_adapter(name, Path(file)))


def attach_adapter(model: PreTrainedModel, settings: AdapterSettings) -> nn.Module:
    """Return the base with the recipe's adapter, trainable.

    Raises:
        UserError: the adapter does not fit this model.
    """
    plugin = load_plugin("finetune.adapters", settings.method, where="adapter.method")
    with adapter_errors(model, settings):
        adapted: nn.Module = plugin.build(model, settings)
    optimize_lora_inputs(adapted)
    return adapted


def count_parameters(model: nn.Module) -> ParameterCount:
    """Return trained and total parameters; a 4-bit weight counts with its unpacked number of elements."""
    reshard(model)
    trained = total = 0
    for parameter in model.parameters():
        # bitsandbytes packs two 4-bit values into a byte, so numel() is half of the weights.
        state = quant_state(parameter)
        numel = state.shape.numel() if state is not None else full_numel(parameter)
        total += numel
        trained += numel if parameter.requires_grad else 0
    return ParameterCount(trained, total)


def unwrap_model(model: nn.Module) -> PreTrainedModel:
    """Return the transformers model inside all wrappers (PEFT, DDP, FSDP)."""
    return next(module for module in model.modules() if isinstance(module, PreTrainedModel))


@contextmanager
def preserve_state(model: nn.Module) -> Iterator[None]:
    """Disable dropout inside the block; then restore train/eval modes and RNG states, and drop gradients."""
    modes = [(module, module.training) for module in model.modules()]
    python, numpy = random.getstate(), np.random.get_state()
    # Devices are named, because torch's default, all of them, warns where there are many.
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        model.eval()  # dropout masks would make equal forward passes differ
        try:
            yield
        finally:
            model.zero_grad(set_to_none=True)
            for module, mode in modes:
                # Not `.train(mode)`, which would set all submodules too.
                module.training = mode
            random.setstate(python)
            np.random.set_state(numpy)


def configure_score_heads(config: PretrainedConfig, heads: Sequence[str]) -> None:
    """Make a config that of a sequence-classification model with one score per head."""
    config.id2label = dict(enumerate(heads))  # sets num_labels as well
    config.label2id = {name: index for index, name in enumerate(heads)}
    config.problem_type = "regression"


def _fsdp_config(strategy: str) -> DistributedConfig | None:
    return DistributedConfig(fsdp_size=dist_info().world_size) if strategy == "fsdp2" else None


def _check_all_loaded(loading_info: Mapping[str, Any], *, heads: Sequence[str]) -> None:
    """Raise ValueError for weights missing in the files: the library would initialize them at random."""
    mismatched = [
        f"{name}: {saved_shape} instead of {expected_shape}"
        for name, saved_shape, expected_shape in loading_info["mismatched_keys"]
    ]
    missing = [name for name in loading_info["missing_keys"] if not (heads and name == SCORE_WEIGHT)]
    weights = [*missing, *mismatched]
    if weights:
        names = "; ".join(sorted(weights)[:3])
        raise ValueError(f"its files lack {len(weights)} of the weights of config.json ({names})")


def _quantization_config(
    config: PretrainedConfig, quantization: str, precision: str, *, heads: bool
) -> BitsAndBytesConfig | None:
    if stored_quantization(config.to_dict()) is not None:
        return None  # weights that are stored quantized are loaded as they are
    # The score head is trained, so it stays unquantized. None is the library's default: it skips the LM head.
    skip_modules = [SCORE_HEAD] if heads else None
    if quantization == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=DTYPES[precision],
            llm_int8_skip_modules=skip_modules,
        )
    return (
        BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip_modules)
        if quantization == "int8"
        else None
    )


def _disable_nf4_repacking(model: nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights at their first generation on this CPU."""
    # Repacked weights round differently in training: generating samples between steps would change a run.
    for module in model.modules():
        if isinstance(module, Linear4bit):
            disable_4bit_repacking(module)


class _LoadErrors:
    """Translates errors of the hub, of file readers and of model classes into a UserError."""

    def __init__(self, settings: ModelSettings) -> None:
        self.settings = settings

    def __enter__(self) -> None:
        if not sys.stderr.isatty():
            disable_progress_bar()

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, Exception) or isinstance(error, UserError):
            return
        where = f"model.base '{self.settings.base}'"
        expected = "a causal language model in safetensors, with its tokenizer"
        if isinstance(error, (OSError, ValueError, ImportError, SafetensorError)):
            if is_write_error(error):
                repair = "or point HF_HOME to a folder on another disk: the base is downloaded there"
                raise storage_error(error, Path(HF_HUB_CACHE), repair=repair) or error from error
            # Errors of the hub run over many lines.
            actual = " ".join(str(error).split())[:MAX_MESSAGE]
            # The Hub's errors are OSErrors; a ValueError is about the content of a downloaded file.
            from_hub = isinstance(error, OSError) and not Path(resolve_base(self.settings.base)).is_dir()
            problem = Problem(where, actual, expected, HUB_REPAIR if from_hub else "")
            cause = describe_cause(error)
            # Unlike an error on a file, one of a model's class is recorded: it may be the library's fault.
            if MODEL_CLASSES.match(cause["location"]):
                raise LibraryError(problem, cause) from error
            raise UserError(problem) from error
        if raised_by_library(error):
            repair = "check its config.json, or choose another base"
            raise to_library_error(
                error, where=where, step="it cannot be loaded", expected=expected, repair=repair
            ) from error

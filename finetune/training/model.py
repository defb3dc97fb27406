"""Loading a base and putting an adapter on it."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from bitsandbytes.nn import Linear4bit
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
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from finetune.planning.hardware import Hardware
from finetune.planning.world import world
from finetune.recipe.bases import resolve_base
from finetune.recipe.discovery import load_plugin
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.settings import AdapterSettings, ModelSettings
from finetune.training.apart import numbers, root, settle
from finetune.training.rope import forget_lengths, positions, stretch
from finetune.training.strategies import APART

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


SCORE = "score"
"""What the library calls the head of its decoders that score a text, and PEFT trains beside an adapter."""
SCORE_WEIGHT = f"{SCORE}.weight"


@dataclass(frozen=True, slots=True)
class ParameterCount:
    """How many parameters are trained, of how many."""

    trained: int
    total: int


def load_tokenizer(settings: ModelSettings) -> PreTrainedTokenizerBase:
    """Return the base's tokenizer.

    Raises:
        UserError: the base has none, or the hub did not give it.
    """
    with _told(settings):
        return AutoTokenizer.from_pretrained(
            resolve_base(settings.base),
            revision=settings.revision or "main",
            trust_remote_code=settings.trust_remote_code,
        )


def load_config(settings: ModelSettings) -> PretrainedConfig:
    """Return the base's config, with the context that the recipe asks for.

    Raises:
        UserError: the base has none, or its positions cannot be stretched.
    """
    with _told(settings):
        config: PretrainedConfig = AutoConfig.from_pretrained(
            resolve_base(settings.base),
            revision=settings.revision or "main",
            trust_remote_code=settings.trust_remote_code,
        )
        stretch(config, settings.rope, base=settings.base)
    return config


def context_length(settings: ModelSettings) -> int:
    """Return how many positions the base has, from its config alone."""
    return positions(load_config(settings))


def load_base(
    settings: ModelSettings,
    *,
    precision: str,
    quantization: str,
    hardware: Hardware,
    heads: Sequence[str] = (),
    strategy: str = "single",
) -> PreTrainedModel:
    """Return the frozen base on the device, its weights stored as asked.

    Args:
        settings: the recipe's model section.
        precision: type of the forward pass, and of weights that are not quantized.
        quantization: ``none``, ``nf4`` (4-bit NormalFloat, double quantization) or ``int8``.
        hardware: where it goes.
        heads: names of the scores that it gives in place of a next token; their weights may be missing.
        strategy: how processes share it; ``fsdp2`` gives each a part, ``zero3`` within ``apart.loading``.

    Raises:
        UserError: there is no such base, or its files are damaged.
    """
    config = load_config(settings)
    if heads:
        label_scores(config, heads)
        set_verbosity_error()  # the library's report that a head is fresh asks nothing of the user
    kind = AutoModelForSequenceClassification if heads else AutoModelForCausalLM
    with _told(settings):
        model: PreTrainedModel
        model, loading = kind.from_pretrained(
            resolve_base(settings.base),
            config=config,
            revision=settings.revision or "main",
            trust_remote_code=settings.trust_remote_code,
            dtype=DTYPES[precision],
            attn_implementation=None if settings.attention == "auto" else settings.attention,
            quantization_config=_quantization(quantization, precision, heads=bool(heads)),
            device_map=None if strategy in APART else {"": hardware.device},  # theirs to say
            distributed_config=DistributedConfig(fsdp_size=world().size) if strategy == "fsdp2" else None,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # told below with names and shapes
            output_loading_info=True,
        )
        other = [
            f"{name}: {found} in place of {wanted}" for name, found, wanted in loading["mismatched_keys"]
        ]
        missing = [name for name in loading["missing_keys"] if not (heads and name == SCORE_WEIGHT)]
        _refuse_unloaded([*missing, *other])
    if quantization == "nf4" and hardware.device == "cpu":
        _keep_nf4_layout(model)
    forget_lengths(model)
    model.requires_grad_(False)
    if strategy == "fsdp2":
        root(model)
    return model


def attach_adapter(model: PreTrainedModel, settings: AdapterSettings) -> nn.Module:
    """Return the base with the recipe's adapter, trainable.

    Raises:
        UserError: the adapter does not fit this model.
    """
    adapted: nn.Module = load_plugin("finetune.adapters", settings.method, where="adapter.method").build(
        model, settings
    )
    return adapted


def count_parameters(model: nn.Module) -> ParameterCount:
    """Return trained and total parameters; a 4-bit weight counts as the numbers that it stands for."""
    settle(model)
    trained = total = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        size = state.shape.numel() if state is not None else numbers(parameter)
        total += size
        trained += size if parameter.requires_grad else 0
    return ParameterCount(trained, total)


def label_scores(config: PretrainedConfig, heads: Sequence[str]) -> None:
    """Make a config that of a model with one score for each head."""
    config.id2label = dict(enumerate(heads))  # sets num_labels as well
    config.label2id = {name: index for index, name in enumerate(heads)}
    config.problem_type = "regression"


def _refuse_unloaded(weights: list[str]) -> None:
    """Raise ValueError for weights that the files do not hold: the library would draw them at random."""
    if weights:
        some = "; ".join(sorted(weights)[:3])
        raise ValueError(f"its files lack {len(weights)} of the weights that config.json asks for ({some})")


def _quantization(quantization: str, precision: str, *, heads: bool) -> BitsAndBytesConfig | None:
    whole = [SCORE] if heads else None  # a list takes the place of the library's own: the output embeddings
    if quantization == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=DTYPES[precision],
            llm_int8_skip_modules=whole,
        )
    return (
        BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=whole) if quantization == "int8" else None
    )


def _keep_nf4_layout(model: nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights the first time that they generate text on this CPU.

    The repacked weights give other last digits in training, so samples taken between steps would change a
    run.
    """
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


class _told:
    """Turns what the hub and the file readers raise into one message for the user."""

    def __init__(self, settings: ModelSettings) -> None:
        self.settings = settings

    def __enter__(self) -> None:
        if not sys.stderr.isatty():
            disable_progress_bar()

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, (OSError, ValueError, ImportError, SafetensorError)) and not isinstance(
            error, UserError
        ):
            where = f"model.base '{self.settings.base}'"
            found = " ".join(str(error).split())[:300]
            raise UserError(
                Problem(where, found, "a causal language model in safetensors, with its tokenizer")
            ) from error

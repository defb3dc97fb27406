"""What a recipe names, loaded: first the text side, cheap and where most mistakes are, then the model."""

from dataclasses import dataclass
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel, set_seed

from finetune.data.dataset import Prepared
from finetune.data.documents import prepare_any
from finetune.planning import choices
from finetune.recipe.checks import adapter_traits
from finetune.recipe.settings import ModelSettings
from finetune.training.arguments import TrlStage, check_engine_args
from finetune.training.go_on import take_weights
from finetune.training.job import Job
from finetune.training.model import attach_adapter, load_base
from finetune.training.text import Text, text_of


@dataclass(frozen=True)
class Frozen:
    """A base before an adapter is put on it, the precision of its passes, how its weights are stored."""

    base: PreTrainedModel
    precision: str
    quantization: str


@dataclass(frozen=True)
class Policy:
    """The model that is trained: base with adapter, the precision of its passes, how the base is stored."""

    model: nn.Module
    precision: str
    quantization: str


def load_text(job: Job) -> Text:
    """Load tokenizer and template.

    Raises:
        UserError: unknown engine arguments, a precision that is not for this hardware, no such base, no EOS,
            no chat template, or more tokens a row than the model has positions.
    """
    settings = job.recipe.settings
    check_engine_args(settings.train, TrlStage(settings.TRL_CONFIG))
    choices.precision(settings.model.precision, job.hardware)  # refused before anything is loaded
    text, reason = text_of(settings)
    job.choose("data.max_length", (text.max_length, reason))
    return text


def load_data(job: Job, text: Text) -> Prepared:
    """Read and tokenise the recipe's data, and tell what was found.

    Raises:
        UserError: mistakes in the data, with file, line and field.
    """
    settings = job.recipe.settings
    with job.timed("data"):
        data = prepare_any(settings.data, text.encoder, max_length=text.max_length, seed=settings.train.seed)
    for line in data.report.lines():
        job.say(line)
    return data


def adapter_start(settings: ModelSettings) -> Path | None:
    """Return the run whose adapter goes on; None without a start, or where the start became the base."""
    start = Path(settings.start) if settings.start is not None else None
    return start if start is not None and (start / "adapter").is_dir() else None


def load_policy(job: Job) -> Policy:
    """Load the base and put the adapter on it: the start's, or a new one, which the seed decides.

    Raises:
        UserError: the base cannot be loaded, the adapter does not fit it, or the start's files are damaged.
    """
    return put_adapter(job, load_frozen(job))


def load_frozen(job: Job) -> Frozen:
    """Load the base, stored as its adapter asks.

    Raises:
        UserError: the base cannot be loaded.
    """
    settings = job.recipe.settings
    traits = adapter_traits(settings.adapter.method)
    job.join()
    precision = job.choose("model.precision", choices.precision(settings.model.precision, job.hardware))
    quantization = job.choose(
        "model.quantization", choices.quantization(settings.model.quantization, traits.quantization)
    )
    # Trained weights stay in float32 (mixed precision); frozen ones are stored as they are computed with.
    stored = "float32" if traits.whole_model else precision
    with job.timed("load"):
        set_seed(settings.train.seed)
        job.load_in_parts(stored)
        base = load_base(
            settings.model,
            precision=stored,
            quantization=quantization,
            hardware=job.hardware,
            strategy=job.strategy,
        )
    return Frozen(base, precision, quantization)


def put_adapter(job: Job, frozen: Frozen) -> Policy:
    """Put the recipe's adapter on a base: the start's, or a new one, which the seed decides.

    Raises:
        UserError: the adapter does not fit the base, or the start's files are damaged.
    """
    settings = job.recipe.settings
    with job.timed("load"):
        set_seed(settings.train.seed)
        model = attach_adapter(frozen.base, settings.adapter)
        if start := adapter_start(settings.model):
            take_weights(model, start)
    if settings.train.gradient_checkpointing:
        frozen.base.enable_input_require_grads()
    job.let_compute(model, frozen.base)
    return Policy(model, frozen.precision, frozen.quantization)

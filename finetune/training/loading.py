"""Load what a recipe names: tokenizer and data first (cheap, and where most mistakes are), then the model."""

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
    """A base without adapter, the precision of its forward pass, and its quantization."""

    base: PreTrainedModel
    precision: str
    quantization: str


@dataclass(frozen=True)
class Policy:
    """The trained model: base with adapter, precision of the forward pass, quantization of the base."""

    model: nn.Module
    precision: str
    quantization: str


def load_text(job: Job) -> Text:
    """Load tokenizer and template.

    Raises:
        UserError: unknown engine arguments, a precision that this hardware lacks, no such base, no EOS, no
            chat template, or ``max_length`` exceeds the model's positions.
    """
    settings = job.recipe.settings
    check_engine_args(settings.train, TrlStage(settings.TRL_CONFIG))
    choices.precision(settings.model.precision, job.hardware)  # raises before anything is loaded
    text, reason = text_of(settings)
    job.choose("data.max_length", (text.max_length, reason))
    return text


def load_data(job: Job, text: Text) -> Prepared:
    """Read and tokenize the recipe's data, and log the data report.

    Raises:
        UserError: the data are invalid; the message gives file, line and field.
    """
    settings = job.recipe.settings
    with job.timed("data"):
        data = prepare_any(settings.data, text.encoder, max_length=text.max_length, seed=settings.train.seed)
    for line in data.report.lines():
        job.say(line)
    return data


def adapter_start(settings: ModelSettings) -> Path | None:
    """Return the run whose adapter is trained further; None without one, or if its full model is the base."""
    start = Path(settings.start) if settings.start is not None else None
    return start if start is not None and (start / "adapter").is_dir() else None


def load_policy(job: Job) -> Policy:
    """Load the base and add the adapter: the parent run's, or a new one initialized with the seed.

    Raises:
        UserError: the base cannot be loaded, the adapter does not fit it, or the parent's files are corrupt.
    """
    return put_adapter(job, load_frozen(job))


def load_frozen(job: Job) -> Frozen:
    """Load the base in the precision and quantization that its adapter needs.

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
    # Trained weights are float32 master weights (mixed precision); frozen ones have the compute dtype.
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
    """Add the recipe's adapter to a base: the parent run's, or a new one initialized with the seed.

    Raises:
        UserError: the adapter does not fit the base, or the parent's files are corrupt.
    """
    settings = job.recipe.settings
    with job.timed("load"):
        # Seeded again: a new adapter's initialization must not depend on what loading the base consumed.
        set_seed(settings.train.seed)
        model = attach_adapter(frozen.base, settings.adapter)
        if start := adapter_start(settings.model):
            take_weights(model, start)
    if settings.train.gradient_checkpointing:
        # Checkpointed blocks need an input with a gradient, and frozen embeddings give one without.
        frozen.base.enable_input_require_grads()
    job.let_compute(model, frozen.base)
    return Policy(model, frozen.precision, frozen.quantization)

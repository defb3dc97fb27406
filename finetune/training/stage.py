"""The stage skeleton: pre-flight, evaluate, train, save, evaluate again; and the protocol of a method."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from transformers import Trainer

from data_templates.segments import Message
from finetune.distributed import collectives
from finetune.training.context import RunContext
from finetune.training.generation import Completion
from finetune.training.generation_eval import GenerationEval
from finetune.training.loading import load_data, load_policy, load_text_encoding
from finetune.training.samples import Samples
from finetune.training.supervised import SFT


class Method(Protocol):
    """The parts of a stage that differ between methods such as SFT, DPO and PPO."""

    @property
    def samples(self) -> Samples:
        """Return the prompts of samples.jsonl, completed before and after training."""
        ...

    @property
    def generation_eval(self) -> GenerationEval:
        """Return the evaluation of generated completions, before and after training."""
        ...

    def metadata(self) -> dict[str, Any]:
        """Run the pre-flight and return run.json's initial sections; every refusal happens here."""
        ...

    def generate(self, prompts: Sequence[Sequence[Message]]) -> list[Completion]:
        """Generate completions with the current policy."""
        ...

    def build_trainer(self) -> Trainer:
        """Build the engine's trainer."""
        ...

    def evaluate(self, trainer: Trainer, when: str) -> None:
        """Record held-out metrics; ``when`` is ``before`` or ``after`` training."""
        ...

    def save(self) -> None:
        """Save the trained weights."""
        ...


def run_supervised(ctx: RunContext) -> None:
    """Run SFT or continued pretraining.

    Args:
        ctx: context of a run that has not started.

    Raises:
        UserError: the recipe or the data are invalid; nothing was written.
        Interrupted: a signal came; a checkpoint was saved.
        NotFiniteError: loss or gradient became NaN or infinite.
    """
    text = load_text_encoding(ctx)
    data = load_data(ctx, text)
    run_stage(ctx, SFT(ctx, text, data, policy=load_policy(ctx)))


def run_stage(ctx: RunContext, method: Method, *, finalize: Callable[[], None] | None = None) -> None:
    """Evaluate, generate samples, train, save, evaluate and generate again.

    Args:
        ctx: context of a run that has not started.
        method: the method.
        finalize: called with all metrics recorded, before the report is written.

    Raises:
        UserError: a check failed.
        Interrupted: a signal came; a checkpoint was saved.
        NotFiniteError: loss or gradient became NaN or infinite.
    """
    # The pre-flight runs first: a run that is refused leaves no folder.
    with ctx.recorded(**method.metadata()):
        method.samples.record_before(ctx.run, method.generate)
        method.generation_eval.evaluate(ctx.run, method.generate, "before")
        trainer = method.build_trainer()
        method.evaluate(trainer, "before")
        ctx.fit(trainer)
        method.save()
        method.evaluate(trainer, "after")
        method.samples.record_after(ctx.run, method.generate)
        method.generation_eval.evaluate(ctx.run, method.generate, "after")
        if finalize:
            collectives.barrier()  # rank 0 writes the metrics, which every rank reads
            finalize()

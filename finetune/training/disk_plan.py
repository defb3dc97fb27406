"""Disk space of a run's checkpoints and result, from its parameters; it is checked before the first step."""

from collections.abc import Iterable
from dataclasses import dataclass

from peft import PeftModel
from torch import nn
from transformers import TrainingArguments

from finetune.distributed import collectives
from finetune.distributed.sharding import full_numel
from finetune.recipe.disk import StorageError, check_free_space, format_size, free_bytes
from finetune.training.checkpoints import complete_steps, folder_bytes, incomplete_bytes
from finetune.training.run_directory import RUN_FOLDERS, RunDirectory

BNB_8BIT_MIN_NUMEL = 4096
"""bitsandbytes keeps the states of smaller tensors in 32 bits."""


@dataclass(frozen=True, slots=True)
class DiskPlan:
    """Bytes that a run writes; small files such as configs, samples and the report are not counted.

    Attributes:
        checkpoint: trained weights and optimizer states of one checkpoint.
        result: the adapter, or the model after full fine-tuning.
        saves: number of checkpoints that are written in all.
        kept: number of checkpoints that remain.
    """

    checkpoint: int
    result: int
    saves: int
    kept: int

    @classmethod
    def of(cls, model: nn.Module, args: TrainingArguments, *, num_steps: int) -> "DiskPlan":
        """Return the plan of a run that trains ``model`` for ``num_steps`` optimizer steps."""
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        saved = trained if isinstance(model, PeftModel) else list(model.parameters())
        states = 0 if args.save_only_model else optimizer_bytes(trained, args.optim)
        result = _weight_bytes(saved)
        checkpoint = max(_weight_bytes(trained), result if isinstance(model, PeftModel) else 0) + states
        return cls(
            checkpoint, result, -(-num_steps // int(args.save_steps)), args.save_total_limit or num_steps
        )

    def needed(self, complete: int = 0, *, remaining: int | None = None) -> int:
        """Return the most bytes that are needed at once.

        Args:
            complete: checkpoints that are on the disk already.
            remaining: checkpoints still to be written; by default all.
        """
        # The oldest is deleted after the next is written.
        most = min(self.kept + 1, complete + (self.saves if remaining is None else remaining))
        return max(0, most - complete) * self.checkpoint + self.result


def optimizer_bytes(weights: Iterable[nn.Parameter], optimizer: str) -> int:
    """Return the bytes of an optimizer's states, by the engine's name of the optimizer.

    AdamW: two moments in the weight's type; its 8-bit variant: two bytes per element; its paged variant: two
    float32 moments; Adafactor: one float32 value per row and per column of a matrix.
    """
    return sum(_state_bytes(weight, optimizer) for weight in weights)


def check_run_space(run: RunDirectory, plan: DiskPlan, *, num_steps: int, save_every: int) -> None:
    """Raise StorageError on all ranks if a run's disk has no room for its checkpoints and its result.

    Args:
        run: the run directory, which need not exist.
        plan: what the run writes.
        num_steps: optimizer steps of the run.
        save_every: optimizer steps between checkpoints.
    """
    error: StorageError | None = None
    if run.is_writer:
        try:
            _check_run_space(run, plan, num_steps=num_steps, save_every=save_every)
        except StorageError as raised:
            error = raised
    # One rank knows the disk that the run writes to; the others would wait for it forever.
    if error := collectives.broadcast_object(error):
        raise error


def _check_run_space(run: RunDirectory, plan: DiskPlan, *, num_steps: int, save_every: int) -> None:
    steps = [] if run.replaced else complete_steps(run.checkpoints)
    last = max(steps, default=0)
    remaining = -(-num_steps // save_every) - last // save_every if last < num_steps else 0
    needed = plan.needed(len(steps), remaining=remaining)
    # What the run deletes before its first step is room too.
    freed = (
        sum(folder_bytes(run.path / name) for name in RUN_FOLDERS)
        if run.replaced
        else incomplete_bytes(run.checkpoints)
    )
    count = min(plan.kept + 1, len(steps) + remaining)
    what = f"{count} checkpoints of {format_size(plan.checkpoint)}, of which {min(count, plan.kept)} are kept"
    what += f", and the result of {format_size(plan.result)}"
    repair = "free some space, or choose a folder on another disk with --out"
    # Only where it helps.
    if plan.saves > 1 and plan.checkpoint + plan.result <= free_bytes(run.path):
        repair += f"; train.checkpoint_every={num_steps} writes one checkpoint only"
    check_free_space(run.path, needed - freed, what=what, repair=repair)


def _weight_bytes(weights: Iterable[nn.Parameter]) -> int:
    return sum(full_numel(weight) * weight.element_size() for weight in weights)


def _state_bytes(weight: nn.Parameter, optimizer: str) -> int:
    numel = full_numel(weight)
    if "8bit" in optimizer and numel >= BNB_8BIT_MIN_NUMEL:
        return 2 * numel
    if optimizer == "adafactor":
        # A shard's shape says nothing about the matrix: at least one value per row is certain.
        return 4 * (sum(weight.shape[-2:]) if weight.dim() > 1 else numel)
    return 8 * numel if "paged" in optimizer else 2 * numel * weight.element_size()

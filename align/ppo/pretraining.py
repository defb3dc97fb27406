"""PPO-ptx: mix pretraining gradients into the PPO updates (InstructGPT, arXiv 2203.02155, equation 2)."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from align.ppo.rollout_order import rollout_prompt_indices
from align.ppo.settings import Settings
from finetune.data.collate import PaddedCollator
from finetune.data.conversation_rows import load_conversations
from finetune.data.dataset import Conversations, TokenizedRows, tokenize_conversations
from finetune.data.layouts import CONVERSATION_LAYOUTS, DOCUMENT
from finetune.data.load import SourceSpec
from finetune.data.report import DataReport
from finetune.distributed.rank import SINGLE_PROCESS, DistInfo
from finetune.training.context import RunContext
from finetune.training.loss import loss_positions
from finetune.training.model import TextEncoding

PRETRAINING_BATCH, NUM_PRETRAINING_LABELS = "pretraining", "pretraining_labels"


@dataclass(frozen=True)
class PretrainingMix:
    """The rows of the PPO-ptx loss and its weight.

    Attributes:
        rows: conversations with the labels of stage sft.
        collate: collates rows to tensors.
        batch_size: rows per optimizer step.
        weight: gamma, weight of the mean loss over their labels.
        seed: of the row order.
    """

    rows: TokenizedRows
    collate: PaddedCollator
    batch_size: int
    weight: float
    seed: int

    def add_to_batches(
        self, batches: list[dict[str, Any]], *, step: int, dist: DistInfo = SINGLE_PROCESS
    ) -> None:
        """Distribute the rows of an optimizer step over the micro-batches; ``batches`` are this process's."""
        row_ids = rollout_prompt_indices(len(self.rows), self.batch_size, step, seed=self.seed)
        # Round robin: every micro-batch of every process gets a nearly equal number of rows.
        shards = [
            row_ids[offset :: len(batches) * dist.world_size]
            for offset in range(len(batches) * dist.world_size)
        ]
        collated = [
            self.collate([self.rows[row_id] for row_id in shard]) if shard else None for shard in shards
        ]
        # Labels of the whole step, over all processes: the loss is a mean over them, however they are split.
        num_labels = sum(
            len(loss_positions(pretraining_batch["labels"])[1])
            for pretraining_batch in collated
            if pretraining_batch is not None
        )
        for batch, pretraining_batch in zip(batches, collated[dist.rank :: dist.world_size], strict=True):
            if pretraining_batch is not None:
                # A dict within the batch: Trainer moves nested dicts to the device.
                batch[PRETRAINING_BATCH], batch[NUM_PRETRAINING_LABELS] = dict(pretraining_batch), num_labels

    def loss(self, nll: Tensor | float, inputs: dict[str, Any]) -> Tensor | float:
        """Return this micro-batch's part of gamma times the mean loss over the step's labels.

        Args:
            nll: summed NLL of the micro-batch's pretraining rows, ``ActorCriticOutputs.pretraining_nll``.
            inputs: the micro-batch.
        """
        # Without rows in this micro-batch there is nothing to add; `add_to_batches` set no count either.
        return self.weight * nll / inputs[NUM_PRETRAINING_LABELS] if PRETRAINING_BATCH in inputs else 0.0


def load_pretraining_mix(ctx: RunContext[Settings], text: TextEncoding) -> PretrainingMix | None:
    """Read and tokenize the rows of PPO-ptx; None without a source.

    Raises:
        UserError: the rows cannot be read.
    """
    mix, seed = ctx.settings.pretraining, ctx.settings.train.seed
    if mix.source is None:
        return None
    report = DataReport()
    # Texts too: InstructGPT mixes the pretraining distribution.
    layouts = (*CONVERSATION_LAYOUTS, DOCUMENT)
    spec = SourceSpec(
        "pretraining.source",
        mix.source,
        "train",
        None,
        None,
        layouts=layouts,
        ignore_columns=tuple(ctx.settings.data.ignore_columns),
    )
    kind = Conversations(text.encoder, text.max_length)
    data = tokenize_conversations(load_conversations(spec, 0, seed, report).rows, kind, report)
    ctx.log(f"pretraining: {'; '.join(report.lines())}")
    return PretrainingMix(
        data.train, PaddedCollator(text.encoder.stop_ids[0]), mix.batch_size, mix.weight, seed
    )

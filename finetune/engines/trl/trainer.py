"""TRL engine: what all of TRL's trainers share (a NaN loss, held-out metrics), and its SFT trainer.

TRL's SFTTrainer trains on the same tokens and labels as ours, with our held-out loss.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from finetune.data.collate import PaddedCollator
from finetune.data.dataset import TokenizedRows
from finetune.distributed.interrupts import NotFiniteError
from finetune.training.loss import held_out_loss
from finetune.training.schedule import ScheduledTrainer
from finetune.training.trainer import log_held_out


class TrlTrainerMixin(ScheduledTrainer):
    """Our learning rate schedule, held-out metrics, and stop at a NaN loss; before TRL's class in the MRO."""

    def row_locations(self, inputs: Any) -> Sequence[str]:
        """Return the locations (``file:line``) of a micro-batch's rows, after its forward pass."""
        raise NotImplementedError

    def held_out_metrics(self) -> dict[str, float]:
        """Return the metrics of the held-out rows; a run without such rows does not ask for them."""
        raise NotImplementedError

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Log and return the held-out metrics, which the Trainer asks for between steps."""
        return log_held_out(self, self.held_out_metrics())

    def training_step(
        self, model: nn.Module, inputs: Any, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Run one forward and backward pass.

        Raises:
            NotFiniteError: the loss is NaN or infinite; the message names the rows.
        """
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            # A pair's two completions have the same location: it is named once.
            locations = ", ".join(dict.fromkeys(self.row_locations(inputs)))
            raise NotFiniteError(
                f"loss is {loss.item()} at step {self.state.global_step + 1}, on {locations}"
            )
        return loss


def unpadded_token_ids(inputs: Mapping[str, Tensor]) -> list[tuple[int, ...]]:
    """Return the token ids of each batch row without right padding, by which a dataset's row is found."""
    ids_BT, mask_BT = inputs["input_ids"], inputs.get("attention_mask")
    lengths = [ids_BT.shape[1]] * len(ids_BT) if mask_BT is None else mask_BT.sum(1).tolist()
    return [tuple(ids_T[:length].tolist()) for ids_T, length in zip(ids_BT, lengths, strict=True)]


class TrlSFTTrainer(TrlTrainerMixin, SFTTrainer):  # type: ignore[misc]
    """TRL's SFTTrainer with our held-out loss (mean per label) and NaN errors that name their rows."""

    def __init__(
        self,
        model: nn.Module,
        args: SFTConfig,
        tokenizer: PreTrainedTokenizerBase,
        *,
        train: TokenizedRows,
        held_out: TokenizedRows | None,
    ) -> None:
        """Set up TRL's trainer for tokenized rows; the labels are used unchanged."""
        super().__init__(
            model=model,
            args=args,
            train_dataset=_dataset(train),
            eval_dataset=_dataset(held_out) if held_out is not None else None,
            processing_class=tokenizer,
        )
        self.train_rows = train
        self.held_out_rows = held_out
        # The padding id is arbitrary: mask and labels exclude it.
        self.collate = PaddedCollator(int(tokenizer.eos_token_id))

    def row_locations(self, inputs: Mapping[str, Tensor]) -> list[str]:
        """Return the locations of a micro-batch's rows, which TRL may have packed."""
        batch_ids = unpadded_token_ids(inputs)
        lengths, rows = {len(ids) for ids in batch_ids}, self.train_rows
        candidates = [index for index, length in enumerate(rows.lengths) if length in lengths]
        location_of_ids = {
            tuple(rows[index]["input_ids"].tolist()): rows.locations[index] for index in candidates
        }
        locations = [location_of_ids[ids] for ids in batch_ids if ids in location_of_ids]
        return locations or ["rows that TRL packed"]

    def held_out_metrics(self) -> dict[str, float]:
        """Return the mean loss per label on the held-out rows."""
        assert self.held_out_rows is not None, "evaluate_every is set with held-out rows only"
        size = self.args.per_device_train_batch_size
        return {"loss": held_out_loss(self.model, self.held_out_rows, self.collate, batch_size=size)}


def _dataset(rows: TokenizedRows) -> Dataset:
    examples = [rows[index] for index in range(len(rows))]
    columns = {key: [example[key].tolist() for example in examples] for key in ("input_ids", "labels")}
    return Dataset.from_dict(columns)

"""TRL engine for SFT: TRL's SFTTrainer on the same tokens and labels, with our held-out loss."""

from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from finetune.data.collate import PaddedCollator
from finetune.data.dataset import TokenizedRows
from finetune.distributed.interrupts import NotFiniteError
from finetune.training.batch_loss import held_out_loss
from finetune.training.trainer import log_held_out


class TrlSFTTrainer(SFTTrainer):  # type: ignore[misc]
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

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Run one forward and backward pass.

        Raises:
            NotFiniteError: the loss is NaN or infinite; the message names the rows.
        """
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            locations = ", ".join(_row_locations(self.train_rows, ids, mask)) or "rows that TRL packed"
            raise NotFiniteError(
                f"loss is {loss.item()} at step {self.state.global_step + 1}, on {locations}"
            )
        return loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Log and return the mean loss per label on the held-out rows."""
        assert self.held_out_rows is not None, "evaluate_every is set with held-out rows only"
        size = self.args.per_device_train_batch_size
        loss = held_out_loss(self.model, self.held_out_rows, self.collate, batch_size=size)
        return log_held_out(self, {"eval/loss": loss})


def _row_locations(rows: TokenizedRows, ids_BT: Tensor, mask: Tensor | None) -> list[str]:
    """Return the locations (``file:line``) of a batch's rows."""
    # TRL drops our row ids from the batch, so the rows are looked up by their tokens.
    row_lengths = [ids_BT.shape[1]] * len(ids_BT) if mask is None else mask.sum(1).tolist()
    row_ids = [
        tuple(ids_T[:row_length].tolist()) for ids_T, row_length in zip(ids_BT, row_lengths, strict=True)
    ]
    lengths = set(row_lengths)
    candidates = [index for index, length in enumerate(rows.lengths) if length in lengths]
    location_of_ids = {
        tuple(rows[index]["input_ids"].tolist()): rows.locations[index] for index in candidates
    }
    return [location_of_ids[ids] for ids in row_ids if ids in location_of_ids]


def _dataset(rows: TokenizedRows) -> Dataset:
    examples = [rows[index] for index in range(len(rows))]
    columns = {key: [example[key].tolist() for example in examples] for key in ("input_ids", "labels")}
    return Dataset.from_dict(columns)

"""TRL engine for SFT: TRL's SFTTrainer on the same tokens and labels, with our held-out loss."""

from collections.abc import Mapping
from typing import Any

from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from finetune.data.collate import PaddedCollator
from finetune.data.dataset import TokenizedRows
from finetune.engines.trl.not_finite import NotFiniteLossMixin, unpadded_token_ids
from finetune.training.batch_loss import held_out_loss
from finetune.training.trainer import log_held_out


class TrlSFTTrainer(NotFiniteLossMixin, SFTTrainer):  # type: ignore[misc]
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

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Log and return the mean loss per label on the held-out rows."""
        assert self.held_out_rows is not None, "evaluate_every is set with held-out rows only"
        size = self.args.per_device_train_batch_size
        loss = held_out_loss(self.model, self.held_out_rows, self.collate, batch_size=size)
        return log_held_out(self, {"eval/loss": loss})


def _dataset(rows: TokenizedRows) -> Dataset:
    examples = [rows[index] for index in range(len(rows))]
    columns = {key: [example[key].tolist() for example in examples] for key in ("input_ids", "labels")}
    return Dataset.from_dict(columns)

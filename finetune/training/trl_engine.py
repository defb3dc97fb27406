"""The TRL engine: TRL's own SFT trainer, fed the same tokens and labels."""

from typing import Any

from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from finetune.data.collate import PaddedCollator
from finetune.data.dataset import TokenizedRows
from finetune.training.completion import held_out_loss
from finetune.training.trainer import log_held_out_loss


class MeasuredSFTTrainer(SFTTrainer):  # type: ignore[misc]
    """TRL's trainer; its held-out loss is the mean per label, as with the native engine."""

    held_out_rows: TokenizedRows
    collate: PaddedCollator

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Log and return the mean loss per label on the held-out rows; no logits are kept."""
        size = self.args.per_device_train_batch_size
        loss = held_out_loss(self.model, self.held_out_rows, self.collate, lines=size)
        return log_held_out_loss(self, loss)


def trl_trainer(
    model: nn.Module,
    args: SFTConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    train_rows: TokenizedRows,
    held_out_rows: TokenizedRows | None,
) -> SFTTrainer:
    """Return TRL's SFTTrainer for rows that are already tokenised; the labels are used as they are."""
    trainer = MeasuredSFTTrainer(
        model=model,
        args=args,
        train_dataset=_dataset(train_rows),
        eval_dataset=_dataset(held_out_rows) if held_out_rows is not None else None,
        processing_class=tokenizer,
    )
    if held_out_rows is not None:
        trainer.held_out_rows = held_out_rows
        trainer.collate = PaddedCollator(int(tokenizer.eos_token_id))
    return trainer


def _dataset(rows: TokenizedRows) -> Dataset:
    examples = [rows[index] for index in range(len(rows))]
    columns = {key: [example[key].tolist() for example in examples] for key in ("input_ids", "labels")}
    return Dataset.from_dict(columns)

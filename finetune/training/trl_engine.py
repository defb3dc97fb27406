"""The TRL engine: TRL's own SFT trainer, fed the same tokens and labels."""

from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from finetune.data.dataset import TokenizedRows


def trl_trainer(
    model: nn.Module,
    args: SFTConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    train_rows: TokenizedRows,
    held_out_rows: TokenizedRows | None,
) -> SFTTrainer:
    """Return TRL's SFTTrainer for rows that are already tokenised; the labels are used as they are."""
    return SFTTrainer(
        model=model,
        args=args,
        train_dataset=_dataset(train_rows),
        eval_dataset=_dataset(held_out_rows) if held_out_rows is not None else None,
        processing_class=tokenizer,
    )


def _dataset(rows: TokenizedRows) -> Dataset:
    examples = [rows[index] for index in range(len(rows))]
    columns = {key: [example[key].tolist() for example in examples] for key in ("input_ids", "labels")}
    return Dataset.from_dict(columns)

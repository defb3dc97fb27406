"""The pre-flight checks of SFT and continued pretraining: rows, vocabulary, model."""

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finetune.data.collate import Collator, PackedCollator
from finetune.data.dataset import TokenizedRows
from finetune.data.report import DataReport
from finetune.data.tokens import Encoder
from finetune.distributed import sharding
from finetune.training.batch_loss import completion_loss_sum
from finetune.training.head import output_head
from finetune.training.model import DTYPES
from finetune.training.preflight import data_checks, invariance_checks, vocab_check
from finetune.training.preflight.checks import CheckResult

TOLERANCE = {"float32": 1e-2, "float16": 5e-2, "bfloat16": 1e-1, "int8": 2e-1}
"""Relative differences that rounding explains (float32 may be TF32 on a GPU). The embedded base on a CPU has
3e-6 in float32, 2e-3 in bfloat16, 4e-2 in int8; attention to a neighboring row makes 0.4."""
SCALE = {"float16": 1024.0}
"""Loss scale of the probe: without it float16 gradients of a mean loss underflow (arXiv 1710.03740)."""


def check_rows(
    data: TokenizedRows, report: DataReport, encoder: Encoder, *, max_length: int, blocks: bool
) -> list[CheckResult]:
    """Check the tokenized training rows; ``blocks`` of documents may begin and end within a text."""
    tokenizer = encoder.tokenizer
    name_of = tokenizer.convert_ids_to_tokens
    # A model's own chat template decides whether a row begins with BOS; blocks are cut out of a text.
    bos_required = encoder.name != "tokenizer" and not blocks and _adds_bos(tokenizer)
    eos_check = data_checks.check_eos_trained(data, encoder.stop_ids, max_length=max_length, name_of=name_of)
    return [
        *([] if blocks else [eos_check]),
        data_checks.check_loss_mask(data),
        data_checks.check_single_bos(data, tokenizer.bos_token_id, required=bos_required, name_of=name_of),
        data_checks.report_truncation(
            num_rows=report.rows,
            num_too_long=report.num_too_long,
            trained_tokens=report.trained_tokens,
            lost_tokens=report.lost_tokens,
            max_length=max_length,
        ),
    ]


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    # A tokenizer may define BOS and not add it (GPT-2): only encoding a text shows it.
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a")["input_ids"][:1] == [bos]


def check_vocabulary(model: PreTrainedModel, data: TokenizedRows, encoder: Encoder) -> CheckResult:
    """Check the embeddings; a token without one would crash the model checks."""
    embedding = model.get_input_embeddings()
    with sharding.gathered_params(embedding.weight) as (weight,):
        return vocab_check.check_vocab_size(
            vocab_check.used_tokens(data.arrays["input_ids"], encoder.stop_ids),
            weight,
            trained=any(param.requires_grad for param in embedding.parameters()),
            added=encoder.tokenizer.get_added_vocab(),
            num_tokens=len(encoder.tokenizer),
        )


def check_model(
    model: PreTrainedModel,
    data: TokenizedRows,
    collate: Collator,
    *,
    precision: str,
    quantization: str,
) -> list[CheckResult]:
    """Run the numeric checks on the model, without changing it.

    Args:
        model: base with adapter, on its device.
        data: the tokenized training rows.
        collate: the run's collator.
        precision: dtype of the forward pass.
        quantization: quantization of the base.
    """
    head = output_head(model)
    # Entered by hand: Accelerate, which wraps the forward pass in autocast, has not prepared the model yet.
    autocast = torch.autocast(model.device.type, dtype=DTYPES[precision], enabled=precision != "float32")

    def loss_sum(batch: Mapping[str, Tensor]) -> Tensor:
        with autocast:
            return completion_loss_sum(model, head, batch)

    # LLM.int8 (arXiv 2208.07339) selects its outlier columns from the full batch.
    tolerance = TOLERANCE["int8" if quantization == "int8" else precision]
    results = invariance_checks.check_batch_invariance(
        model,
        loss_sum,
        invariance_checks.select_probe_rows(data),
        collate,
        tolerance=tolerance,
        scale=SCALE.get(precision, 1.0),
    )
    if isinstance(collate, PackedCollator):
        with autocast:
            results.append(
                invariance_checks.check_packing_isolation(model, data, collate, tolerance=tolerance)
            )
    return results

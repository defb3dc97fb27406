"""Classification of held-out rows whose replies are labels, by the likelihood of each label.

Prompts and labels are the tokens of the training rows: a label is the last reply of a row, with its stop
token.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from torch import nn

from finetune.data.dataset import TokenizedRows
from finetune.data.tokens import Encoder
from finetune.distributed.collectives import all_gather_object, shard, unshard
from finetune.distributed.sharding import is_sharded
from finetune.evaluation.calibration import FloatArray
from finetune.evaluation.classification import Classification, classification_metrics, label_probabilities
from finetune.evaluation.classification_tables import classification_tables, confusion_figure
from finetune.generation.label_likelihoods import label_logps
from finetune.recipe.errors import Problem, UserError
from finetune.training.generation import generation_tokens
from finetune.training.held_out_file import write_graded
from finetune.training.metric_specs import Diagnostics, When
from finetune.training.run_directory import RunDirectory

MAX_LABELS = 1000
"""Labels at most: more are texts, and each costs a pass over its tokens for every row."""
KEY = "evaluate.classification"
TokenTuple = tuple[int, ...]


@dataclass(frozen=True)
class LabelEval:
    """Classifies held-out rows: the most likely of the labels of the training rows.

    Attributes:
        train: the training rows, which have the labels.
        held_out: the rows to classify.
        encoder: decodes labels.
    """

    train: TokenizedRows
    held_out: TokenizedRows
    encoder: Encoder

    @classmethod
    def of(cls, train: TokenizedRows, held_out: TokenizedRows | None, encoder: Encoder) -> "LabelEval":
        """Return the evaluation of a run's rows.

        Raises:
            UserError: there are no held-out rows, or the replies are no labels.
        """
        if held_out is None:
            expected = "held-out rows, which are classified before and after training"
            raise UserError(Problem(KEY, "true, without held-out rows", expected, "data.held_out=0.2"))
        evaluation = cls(train, held_out, encoder)
        labels = evaluation.labels
        if not 2 <= len(labels) <= MAX_LABELS:
            examples = ", ".join(repr(label[:40]) for label in labels[:3])
            actual = f"{len(labels):,} different replies in the training rows: {examples}, ..."
            expected = f"replies that are one of 2 to {MAX_LABELS:,} labels"
            raise UserError(Problem(KEY, actual, expected, f"{KEY}=false"))
        return evaluation

    @cached_property
    def labels(self) -> list[str]:
        """Return the labels, the most frequent first."""
        return [self.encoder.decode_reply(ids) for ids in self._label_ids]

    @cached_property
    def _label_ids(self) -> list[TokenTuple]:
        counts: dict[TokenTuple, int] = {}
        for _, label in _prompts_and_labels(self.train):
            counts[label] = counts.get(label, 0) + 1
        # A label that max_length has cut has no stop token.
        complete = {label: count for label, count in counts.items() if label[-1] in self.encoder.stop_ids}
        return sorted(complete, key=lambda label: (-complete[label], label))

    def notes(self) -> list[str]:
        """Return lines on the labels: how many there are, and which look like two spellings of one."""
        labels = self.labels
        by_key: dict[str, list[str]] = {}
        for label in labels:
            by_key.setdefault("".join(label.casefold().split()), []).append(label)
        unseen = {self.encoder.decode_reply(label) for _, label in self._held_out} - {*labels}
        shown = ", ".join(labels[:8]) + (f" and {len(labels) - 8} more" if len(labels) > 8 else "")
        lines = [f"labels: {len(labels)} in the training rows ({shown})"]
        lines += [
            f"  !! labels that differ only in case or spaces: {', '.join(map(repr, similar))}"
            for similar in by_key.values()
            if len(similar) > 1
        ]
        if unseen:
            names = ", ".join(sorted(unseen)[:5])
            lines.append(f"  !! held-out labels without a training row, always wrong: {names}")
        return lines

    @cached_property
    def _held_out(self) -> list[tuple[TokenTuple, TokenTuple]]:
        return list(_prompts_and_labels(self.held_out))

    def record(self, run: RunDirectory, model: nn.Module, when: When) -> dict[str, float]:
        """Classify the held-out rows and record the metrics in detail; return those of metrics.jsonl.

        ``held_out.jsonl`` gets each row's label, the chosen one and its probability.
        """
        probabilities_NL = self._probabilities(model)
        gold = [self.encoder.decode_reply(label) for _, label in self._held_out]
        metrics = classification_metrics(gold, probabilities_NL, self.labels)
        run.update(classification={"labels": self.labels, when: metrics})
        choices = probabilities_NL.argmax(axis=1)
        rows = zip(self.held_out.locations, gold, choices, probabilities_NL.max(axis=1), strict=True)
        entries = [
            {
                "location": row,
                "expected": label,
                "completion": self.labels[choice],
                "probability": round(p, 6),
            }
            for row, label, choice, p in rows
        ]
        write_graded(run, "classification", when, entries)
        return {
            "classification/accuracy": metrics["accuracy"],
            "classification/macro_f1": metrics["macro_f1"],
            "classification/calibration_error": metrics["calibration_error"],
        }

    def _probabilities(self, model: nn.Module) -> FloatArray:
        """Return the probability of each label for each held-out row; ranks classify a shard each."""
        prompts = [prompt for prompt, _ in self._held_out]
        # With sharded weights a forward pass is a collective: all ranks classify all rows.
        sharded = is_sharded(model)
        budget = generation_tokens(next(model.parameters()).device)
        local = prompts if sharded else shard(prompts)
        logps = label_logps(model, local, self._label_ids, tokens_per_batch=budget).tolist() if local else []
        rows = logps if sharded else unshard(all_gather_object(logps))
        return label_probabilities(np.asarray(rows, dtype=np.float64))


def _prompts_and_labels(rows: TokenizedRows) -> Iterator[tuple[TokenTuple, TokenTuple]]:
    """Yield the tokens of each row before its last reply, and those of the reply: its last run of loss."""
    for start, end in zip(rows.arrays["offsets"][:-1], rows.arrays["offsets"][1:], strict=True):
        mask, ids = rows.arrays["loss_mask"][start:end], rows.arrays["input_ids"][start:end].tolist()
        last = int(np.flatnonzero(mask)[-1]) + 1
        before = np.flatnonzero(~mask[:last])
        first = int(before[-1]) + 1
        yield tuple(ids[:first]), tuple(ids[first:last])


def classification_diagnostics(record: Mapping[str, Any]) -> Diagnostics:
    """Return the report's tables and picture of a run's classification; empty without one."""
    metrics: Classification | None = record.get("classification", {}).get("after")
    if metrics is None:
        return Diagnostics()
    tables: dict[str, Sequence[Sequence[str]]] = {
        f"Classification of held-out rows: {title}": table
        for title, table in classification_tables(metrics).items()
    }
    return Diagnostics(tables, {"confusion matrix": confusion_figure(metrics)})

"""Metrics of a classifier: accuracy, macro-F1, per class, confusion matrix, calibration.

The definitions are those of scikit-learn 1.7 (``precision_recall_fscore_support``, ``confusion_matrix``).
"""

from collections.abc import Sequence
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

from finetune.evaluation.calibration import FloatArray, calibration_error
from finetune.evaluation.small_samples import wilson_interval


class ClassMetrics(TypedDict):
    """Metrics of one class; ``support`` is its number of rows, ``predicted`` how often it was chosen."""

    label: str
    precision: float
    recall: float
    f1: float
    support: int
    predicted: int


class Classification(TypedDict):
    """Metrics of a classifier on N rows.

    Attributes:
        rows: N.
        accuracy: share of rows whose most likely label is the row's own.
        interval: 95 % Wilson interval of the accuracy.
        majority: share of the most frequent class, the accuracy of always choosing it.
        macro_f1: mean F1 of the classes that occur, as labels of rows or as predictions.
        calibration_error: ECE of the probability of the chosen label.
        reliability: its bins.
        classes: metrics of each class, those of the choices first.
        confusion: rows by class (axis 0) and choice (axis 1).
    """

    rows: int
    accuracy: float
    interval: list[float]
    majority: float
    macro_f1: float
    calibration_error: float
    reliability: list[dict[str, float]]
    classes: list[ClassMetrics]
    confusion: list[list[int]]


def label_probabilities(logps_NL: FloatArray) -> FloatArray:
    """Return P(label | prompt, one of the labels), (N, L): the softmax over the labels' log-probabilities.

    >>> label_probabilities(np.log(np.array([[0.1, 0.3]]))).round(2).tolist()
    [[0.25, 0.75]]
    """
    shifted = np.exp(logps_NL - logps_NL.max(axis=1, keepdims=True))
    probabilities: FloatArray = shifted / shifted.sum(axis=1, keepdims=True)
    return probabilities


def classification_metrics(
    gold: Sequence[str], probabilities_NL: FloatArray, labels: Sequence[str]
) -> Classification:
    """Return the metrics of a classifier that chooses the most likely label.

    Args:
        gold: the label of each row, (N,); one that is no choice is always wrong, and a class of its own.
        probabilities_NL: probability of each choice, (N, L).
        labels: the choices, (L,).

    >>> metrics = classification_metrics("aab", np.array([[0.9, 0.1], [0.4, 0.6], [0.2, 0.8]]), "ab")
    >>> metrics["confusion"], round(metrics["accuracy"], 3), round(metrics["macro_f1"], 3)
    ([[1, 1], [0, 1]], 0.667, 0.667)
    """
    classes = list(dict.fromkeys([*labels, *gold]))
    index_of = {label: index for index, label in enumerate(classes)}
    gold_N = np.array([index_of[label] for label in gold])
    chosen_N = probabilities_NL.argmax(axis=1)
    confusion = np.zeros((len(classes), len(labels)), dtype=np.int64)
    np.add.at(confusion, (gold_N, chosen_N), 1)
    correct = (gold_N == chosen_N).astype(np.float64)
    accuracy = float(correct.mean())
    per_class = [_class_metrics(label, index, confusion) for index, label in enumerate(classes)]
    occurring = [metrics["f1"] for metrics in per_class if metrics["support"] or metrics["predicted"]]
    confidence = probabilities_NL.max(axis=1)
    # The most likely of L labels has at least 1/L.
    error, curve = calibration_error(confidence, correct, np.ones(len(gold)))
    return {
        "rows": len(gold),
        "accuracy": accuracy,
        "interval": list(wilson_interval(accuracy, len(gold))),
        "majority": float(np.bincount(gold_N).max() / len(gold)),
        "macro_f1": float(np.mean(occurring)),
        "calibration_error": error,
        "reliability": curve,
        "classes": per_class,
        "confusion": confusion.tolist(),
    }


def _class_metrics(label: str, index: int, confusion: NDArray[np.int64]) -> ClassMetrics:
    support = int(confusion[index].sum())
    # A class that is no choice is never predicted.
    is_choice = index < confusion.shape[1]
    predicted = int(confusion[:, index].sum()) if is_choice else 0
    hits = int(confusion[index, index]) if is_choice else 0
    # 0 where the denominator is 0, as scikit-learn has it.
    return {
        "label": label,
        "precision": hits / predicted if predicted else 0.0,
        "recall": hits / support if support else 0.0,
        "f1": 2 * hits / (support + predicted) if hits else 0.0,
        "support": support,
        "predicted": predicted,
    }


def most_confused(metrics: Classification, limit: int) -> list[tuple[str, str, int]]:
    """Return the most frequent confusions: class, the label chosen instead, number of rows.

    >>> most_confused(classification_metrics("aab", np.array([[0.9, 0.1], [0.4, 0.6], [0.2, 0.8]]), "ab"), 3)
    [('a', 'b', 1)]
    """
    names = [entry["label"] for entry in metrics["classes"]]
    pairs = [
        (names[row], names[column], count)
        for row, counts in enumerate(metrics["confusion"])
        for column, count in enumerate(counts)
        if row != column and count
    ]
    return sorted(pairs, key=lambda pair: -pair[2])[:limit]

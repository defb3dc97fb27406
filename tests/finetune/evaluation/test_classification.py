"""Metrics of a classifier: a closed form, scikit-learn's published example, and the edges."""

import numpy as np
import pytest

from finetune.evaluation.calibration import calibration_error
from finetune.evaluation.classification import (
    classification_metrics,
    label_probabilities,
    most_confused,
)
from finetune.evaluation.classification_tables import classification_summary, classification_tables


def chosen(choices: str, labels: str, confidence: float = 0.9) -> np.ndarray:
    """Return probabilities by which these labels are chosen."""
    rest = (1 - confidence) / (len(labels) - 1)
    return np.array([[confidence if label == choice else rest for label in labels] for choice in choices])


def test_values_of_scikit_learn_s_documentation() -> None:
    """Its example of ``classification_report``: y_true 0 1 2 2 2, y_pred 0 0 2 2 1."""
    metrics = classification_metrics("01222", chosen("00221", "012"), "012")
    by_label = {entry["label"]: entry for entry in metrics["classes"]}
    assert by_label["0"]["precision"] == 0.5 and by_label["0"]["recall"] == 1.0
    assert by_label["0"]["f1"] == pytest.approx(2 / 3) and by_label["2"]["f1"] == pytest.approx(0.8)
    assert (by_label["1"]["precision"], by_label["1"]["recall"], by_label["1"]["f1"]) == (0.0, 0.0, 0.0)
    assert [by_label[label]["support"] for label in "012"] == [1, 1, 3]
    assert metrics["macro_f1"] == pytest.approx((2 / 3 + 0 + 0.8) / 3)
    assert metrics["accuracy"] == 0.6 and metrics["majority"] == 0.6
    assert metrics["confusion"] == [[1, 0, 0], [1, 0, 0], [0, 1, 2]]


def test_a_label_that_is_no_choice_is_a_class_that_is_always_wrong() -> None:
    metrics = classification_metrics("abx", chosen("aba", "ab"), "ab")
    assert metrics["accuracy"] == pytest.approx(2 / 3)
    assert [entry["label"] for entry in metrics["classes"]] == ["a", "b", "x"]
    assert metrics["classes"][2]["recall"] == 0.0 and metrics["confusion"][2] == [1, 0]
    # a: precision 1/2, recall 1; b: 1; x: 0
    assert metrics["macro_f1"] == pytest.approx((2 / 3 + 1 + 0) / 3)


def test_a_class_without_rows_and_choices_does_not_count() -> None:
    metrics = classification_metrics("aab", chosen("aab", "abc"), "abc")
    assert metrics["macro_f1"] == 1.0 and metrics["classes"][2]["support"] == 0


def test_calibration_is_that_of_the_chosen_label() -> None:
    metrics = classification_metrics("aaab", chosen("aaaa", "ab", confidence=0.85), "ab")
    assert metrics["calibration_error"] == pytest.approx(0.85 - 0.75)
    assert metrics["reliability"] == [{"confidence": pytest.approx(0.85), "accuracy": 0.75, "fraction": 1.0}]


def test_bins_are_of_equal_width_and_the_last_one_is_closed() -> None:
    confidence = np.array([0.0, 0.05, 0.1, 0.999, 1.0])
    _, curve = calibration_error(confidence, np.ones(5), np.ones(5))
    assert [entry["fraction"] for entry in curve] == pytest.approx([0.4, 0.2, 0.4])


def test_probabilities_of_labels_do_not_underflow() -> None:
    probabilities = label_probabilities(np.array([[-2000.0, -2000.0 + np.log(3)]]))
    assert probabilities == pytest.approx(np.array([[0.25, 0.75]]))


def test_tables_of_few_and_of_many_classes() -> None:
    few = classification_metrics("aab", chosen("abb", "ab"), "ab")
    assert classification_tables(few)["Confusion matrix"] == [
        ("class \\ chosen", "a", "b"),
        ("a", "1", "1"),
        ("b", "·", "1"),
    ]
    labels = [f"제품 {index:02}" for index in range(40)]
    gold = labels + ["제품 00"]
    probabilities = np.eye(40)[[*range(39), 0, 5]]
    many = classification_metrics(gold, probabilities, labels)
    confusions = classification_tables(many)["Most frequent confusions"]
    assert list(confusions[1:]) == [("제품 00", "제품 05", "1"), ("제품 39", "제품 00", "1")]
    assert most_confused(many, 1) == [("제품 00", "제품 05", 1)]
    assert classification_tables(many)["Classes"][40] == ("제품 39", "1", "0", "–", "0.0%", "0.000")
    assert classification_summary(few).startswith("accuracy 66.7% (95 % interval 21 to 94%, 3 rows;")

"""Metrics against figures worked out by hand."""

import numpy as np
import pytest

from engine.metrics import classification_metrics, ranks, regression_metrics


def test_figures_of_two_labels() -> None:
    """TP 2, TN 3, FP 1, FN 2: F1 is 4 / 7, Matthews (6 - 2) / sqrt(3 * 4 * 4 * 5)."""
    expected, predicted = [1, 1, 1, 1, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0, 1]
    figures = classification_metrics(predicted, expected, 2)
    assert list(figures) == ["accuracy", "f1", "matthews"]
    assert figures == pytest.approx({"accuracy": 5 / 8, "f1": 4 / 7, "matthews": 4 / 240**0.5})


def test_matthews_of_more_labels_is_the_correlation_of_the_one_hot_matrices() -> None:
    rng = np.random.default_rng(0)
    expected, predicted = rng.integers(0, 3, 50), rng.integers(0, 3, 50)
    left, right = (np.eye(3)[each] - np.eye(3)[each].mean(0) for each in (expected, predicted))
    wanted = (left * right).sum() / np.sqrt((left**2).sum() * (right**2).sum())
    figures = classification_metrics(predicted, expected, 3)
    assert figures["matthews"] == pytest.approx(wanted)
    assert "f1" not in figures


def test_correlations_of_numbers() -> None:
    left, right = [1.0, 2.0, 3.0, 4.0], [1.0, 4.0, 9.0, 100.0]
    figures = regression_metrics(left, right)
    assert figures["spearman"] == pytest.approx(1.0)
    assert figures["pearson"] == pytest.approx(np.corrcoef(left, right)[0, 1])
    assert ranks(np.array([3.0, 1.0, 3.0, 2.0])).tolist() == [3.5, 1.0, 3.5, 2.0]


def test_one_answer_for_all_has_no_correlation() -> None:
    assert classification_metrics([0, 0, 0], [0, 1, 0], 2)["matthews"] == 0.0
    assert classification_metrics([0, 0], [0, 0], 2)["f1"] == 0.0
    assert regression_metrics([1.0, 1.0], [0.0, 2.0]) == {"pearson": 0.0, "spearman": 0.0}
    assert classification_metrics([], [], 2) == regression_metrics([], []) == {}

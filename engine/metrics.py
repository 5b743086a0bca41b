"""Figures of a classification or a regression, as GLUE reports them. Four short formulas, so no library for them.

Classification: accuracy, F1 of label 1 where there are two labels (MRPC, QQP), Matthews' correlation (CoLA).
Regression: Pearson's and Spearman's correlation (STS-B). A correlation with a constant is 0 here.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

WORDS = {
    "accuracy": "Accuracy",
    "f1": "F1 of label 1",
    "matthews": "Matthews' correlation",
    "pearson": "Pearson's correlation",
    "spearman": "Spearman's correlation",
}


def classification_metrics(predicted: ArrayLike, expected: ArrayLike, num_labels: int) -> dict[str, float]:
    """Return accuracy, Matthews' correlation and, of two labels, F1; empty without rows.

    Args:
        predicted: (rows,) class numbers.
        expected: (rows,) class numbers.
        num_labels: of the dataset, 2 or more.
    """
    given, true = np.asarray(predicted, np.int64), np.asarray(expected, np.int64)
    if not len(true):
        return {}
    figures = {"accuracy": float((given == true).mean())}
    if num_labels == 2:
        figures["f1"] = f1(given, true)
    return figures | {"matthews": matthews(given, true, num_labels)}


def regression_metrics(predicted: ArrayLike, expected: ArrayLike) -> dict[str, float]:
    """Return Pearson's and Spearman's correlation of (rows,) numbers; empty without rows."""
    given, true = np.asarray(predicted, np.float64), np.asarray(expected, np.float64)
    if not len(true):
        return {}
    return {"pearson": pearson(given, true), "spearman": pearson(ranks(given), ranks(true))}


def f1(predicted: NDArray[np.int64], expected: NDArray[np.int64]) -> float:
    """Return 2 TP / (2 TP + FP + FN) of label 1; 0 where neither side has it."""
    hits = int(((predicted == 1) & (expected == 1)).sum())
    wanted = int((predicted == 1).sum() + (expected == 1).sum())
    return 2 * hits / wanted if wanted else 0.0


def matthews(predicted: NDArray[np.int64], expected: NDArray[np.int64], num_labels: int) -> float:
    """Return Matthews' correlation, for any number of labels (Gorodkin 2004): Pearson's of the two one-hot matrices."""
    given, true = (np.bincount(each, minlength=num_labels).astype(np.float64) for each in (predicted, expected))
    rows, hits = len(expected), float((predicted == expected).sum())
    spread = (rows**2 - given @ given) * (rows**2 - true @ true)
    return float((hits * rows - given @ true) / np.sqrt(spread)) if spread > 0 else 0.0


def pearson(left: NDArray[np.float64], right: NDArray[np.float64]) -> float:
    """Return the correlation of two series; 0 where one is constant."""
    left, right = left - left.mean(), right - right.mean()
    spread = np.sqrt((left @ left) * (right @ right))
    return float(left @ right / spread) if spread > 0 else 0.0


def ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the rank of each value from 1; equal values share the mean of theirs."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    mean: NDArray[np.float64] = (np.cumsum(count) - (count - 1) / 2)[place]
    return mean

"""Scores of predictions, all vectorised over bootstrap weights.

Accuracy, mean per-class accuracy, macro F1 and average precision. Every count may carry leading axes (a confusion table
per place, or per bootstrap sample), so that a resampled score is the same function of a weighted sum and not a second
implementation.
"""

from __future__ import annotations

import numpy as np

SINGLE_LABEL = ("accuracy", "mean_class_accuracy", "macro_f1")


def confusion(truth: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Counts truths against predictions.

    Args:
        truth: int [N] in 0..K-1.
        predicted: int [N] in 0..K-1.
        classes: K.

    Returns:
        float64 [K, K], rows = truth, columns = prediction.
    """
    flat = np.bincount(np.asarray(truth) * classes + np.asarray(predicted), minlength=classes * classes)
    return flat.reshape(classes, classes).astype(np.float64)


def confusion_per_place(
    truth: np.ndarray, predicted: np.ndarray, place: np.ndarray, classes: int, places: int
) -> np.ndarray:
    """Counts truths against predictions of the rows of every place.

    Args:
        truth: int [N] in 0..K-1.
        predicted: int [N] in 0..K-1.
        place: int [N] in 0..P-1.
        classes: K.
        places: P.

    Returns:
        float64 [P, K, K].
    """
    index = (np.asarray(place) * classes + truth) * classes + predicted
    return np.bincount(index, minlength=places * classes * classes).reshape(places, classes, classes).astype(np.float64)


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.divide(above, below, out=np.full(np.broadcast(above, below).shape, np.nan), where=below > 0)


def _mean_defined(values: np.ndarray) -> np.ndarray:
    """Mean over the last axis of the entries that are not NaN; NaN where there is none."""
    defined = ~np.isnan(values)
    return _ratio(np.where(defined, values, 0.0).sum(-1), defined.sum(-1))


def from_confusion(table: np.ndarray) -> dict[str, np.ndarray]:
    """The single-label scores of counts [..., K, K]; each of shape [...].

    accuracy: share of the rows. mean_class_accuracy: mean recall of the classes that occur in the truth. macro_f1:
    mean F1 of the classes that occur in truth or prediction (scikit-learn's convention). NaN for an empty table.
    """
    hit = np.diagonal(table, axis1=-2, axis2=-1)
    truth, predicted = table.sum(-1), table.sum(-2)
    return {
        "accuracy": _ratio(hit.sum(-1), truth.sum(-1)),
        "mean_class_accuracy": _mean_defined(_ratio(hit, truth)),
        "macro_f1": _mean_defined(_ratio(2 * hit, truth + predicted)),
    }


def average_precision(truth: np.ndarray, score: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """The average precision of every class, one against the rest: sum of (R_n - R_(n-1)) P_n over distinct thresholds.

    Equal scores share a threshold.

    Args:
        truth: [N, K], 0/1.
        score: [N, K].
        weights: [B, N], row weights of B bootstrap samples; None = one sample of weight 1.

    Returns:
        float64 [K], or [B, K] with weights; NaN for a class without a positive row in the sample.
    """
    weighted = np.ones((1, len(truth))) if weights is None else np.asarray(weights, np.float64)
    result = np.full((len(weighted), truth.shape[1]), np.nan)
    for label in range(truth.shape[1]):
        order = np.argsort(-score[:, label], kind="stable")
        ranked = score[order, label]
        last = np.append(np.flatnonzero(np.diff(ranked)), len(ranked) - 1)  # last row of every distinct threshold
        mass = weighted[:, order]
        hits = np.cumsum(mass * truth[order, label], axis=1)[:, last]
        counted = np.cumsum(mass, axis=1)[:, last]
        precision = np.divide(hits, counted, out=np.zeros_like(hits), where=counted > 0)
        gained = np.diff(hits, axis=1, prepend=0.0)
        result[:, label] = _ratio((gained * precision).sum(1), hits[:, -1])
    return result[0] if weights is None else result


def macro_map(truth: np.ndarray, score: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """The mean of :func:`average_precision` over the classes with a positive row.

    Args:
        truth: [N, K], 0/1.
        score: [N, K].
        weights: [B, N], or None.

    Returns:
        float64 scalar, or [B] with weights.
    """
    return _mean_defined(average_precision(truth, score, weights))

"""Weighted nearest-neighbour vote on frozen features: k = 20, cosine similarity, weights exp(similarity / 0.07).

The protocol of DINO's evaluation (Caron et al. 2021): features are only normalised to unit length, every neighbour
votes for its own classes with weight ``exp(similarity / temperature)``. Other houses use other rules under the same
name (k = 5 with Euclidean distance, k = 200 with T = 0.1): numbers compare only within one rule.
"""

from __future__ import annotations

import numpy as np

from skysense_jax.evals.unit import unit

_CHUNK = 1024  # test rows scored at once: bounds the similarity matrix, changes nothing in the result


def knn_scores(
    train_features: np.ndarray,
    train_target: np.ndarray,
    test_features: np.ndarray,
    *,
    k: int = 20,
    temperature: float = 0.07,
) -> np.ndarray:
    """Share of the weighted vote each class receives.

    train_features [N, F], test_features [M, F]: any float dtype. train_target [N, K]: 0/1 rows, one-hot or multi-hot.
    k: neighbours; all training rows vote where there are fewer. temperature: of the weights.

    Returns float64 [M, K] in [0, 1]; a one-hot target gives rows that sum to 1. Equal similarities: the lower row
    index is nearer. Raises ValueError for no training row or mismatched shapes.
    """
    if len(train_features) != len(train_target) or train_features.ndim != 2 or test_features.ndim != 2:
        raise ValueError(
            f"kNN: features {train_features.shape} / {test_features.shape} and target {train_target.shape} do not match"
        )
    if not len(train_features):
        raise ValueError("kNN: no training row; the training split holds no labelled place")
    if k < 1 or temperature <= 0:
        raise ValueError(f"kNN: k must be >= 1 and temperature > 0, got k={k}, temperature={temperature}")
    bank, target = unit(train_features), np.asarray(train_target, np.float64)
    k = min(k, len(bank))
    scores = np.empty((len(test_features), target.shape[1]))
    for start in range(0, len(test_features), _CHUNK):
        similarity = unit(test_features[start : start + _CHUNK]) @ bank.T
        nearest = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
        # exp((s - s_max) / T): the same vote, no overflow at small temperatures
        near = np.take_along_axis(similarity, nearest, axis=1)
        weights = np.exp((near - near[:, :1]) / temperature)
        scores[start : start + _CHUNK] = np.einsum(
            "mk,mkc->mc", weights / weights.sum(1, keepdims=True), target[nearest]
        )
    return scores

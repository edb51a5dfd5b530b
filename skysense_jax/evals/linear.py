"""Linear probe on frozen features: L2 logistic regression, its strength chosen on the training part alone.

Features are standardised with the training rows' mean and deviation (inside every fold with that fold's own), the
strength is chosen by cross-validation grouped by place, so that patches of one place never stand on both sides of a
fold. The test part is not an argument of the choice.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from skysense_jax.evals import metrics

STRENGTHS = tuple(10.0**power for power in range(-5, 3))
"""Candidate values of C (inverse L2 strength), strongest regularisation first."""

_ITERATIONS = 2000

# The solver's matrices are small: on a busy machine the threads of BLAS spend their time waiting for each other (60
# times slower, measured on 2 cores), and one thread gives the same numbers whatever the number of cores.
_one_thread = threadpool_limits.wrap(limits=1)


class Probe(NamedTuple):
    """A fitted linear probe.

    Attributes:
        scores: float64 [M, K], class probabilities of the test rows.
        strength: the chosen C.
        cross_validation: C -> score on the folds.
    """

    scores: np.ndarray
    strength: float
    cross_validation: dict[float, float]


def _fit_one(x: np.ndarray, y: np.ndarray, strength: float, test: np.ndarray) -> dict[int, np.ndarray]:
    """Probability of every class that occurs in y for the test rows; one class alone has probability 1."""
    present = np.unique(y)
    if len(present) == 1:
        return {int(present[0]): np.ones(len(test))}
    model = LogisticRegression(C=strength, max_iter=_ITERATIONS).fit(x, y)
    probability = model.predict_proba(test)
    return {int(label): probability[:, i] for i, label in enumerate(model.classes_)}


def _fit_scores(x: np.ndarray, target: np.ndarray, test: np.ndarray, strength: float, multilabel: bool) -> np.ndarray:
    """Scores [M, K] of one fit: multinomial for single labels, one-vs-rest for scenes with several labels."""
    scaler = StandardScaler().fit(x)
    x, test = scaler.transform(x), scaler.transform(test)
    scores = np.zeros((len(test), target.shape[1]))
    if multilabel:
        for label in range(target.shape[1]):
            scores[:, label] = _fit_one(x, target[:, label].astype(int), strength, test).get(1, 0.0)
    else:
        for label, probability in _fit_one(x, target.argmax(1), strength, test).items():
            scores[:, label] = probability
    return scores


@_one_thread
def choose_strength(
    features: np.ndarray, target: np.ndarray, place: np.ndarray, *, multilabel: bool = False, folds: int = 5
) -> tuple[float, dict[float, float]]:
    """Chooses C from :data:`STRENGTHS` by cross-validation grouped by place; it sees training rows only.

    The held-out rows of all folds are scored together: mean per-class accuracy (macro average precision where
    multilabel).
    Ties: the stronger regularisation.

    Args:
        features: [N, F].
        target: [N, K], 0/1.
        place: int [N]; rows of one place stay in one fold.
        multilabel: whether a row may have several labels.
        folds: their number; fewer where there are fewer places.

    Returns:
        (C, {C: score}).

    Raises:
        ValueError: fewer than two places.
    """
    places = np.unique(place)
    if len(places) < 2:
        raise ValueError(
            f"linear probe: {len(places)} labelled training place(s); choosing its regularisation needs at least 2"
        )
    splits = list(GroupKFold(min(folds, len(places))).split(features, groups=place))
    curve: dict[float, float] = {}
    for strength in STRENGTHS:
        held_out = np.zeros(target.shape)
        for fit, score in splits:
            held_out[score] = _fit_scores(features[fit], target[fit], features[score], strength, multilabel)
        if multilabel:
            curve[strength] = float(np.nanmean(metrics.average_precision(target, held_out)))
        else:
            table = metrics.confusion(target.argmax(1), held_out.argmax(1), target.shape[1])
            curve[strength] = float(metrics.from_confusion(table)["mean_class_accuracy"])
    best = max(curve.values())
    return next(strength for strength in STRENGTHS if curve[strength] >= best - 1e-12), curve


@_one_thread
def linear_probe(
    train_features: np.ndarray,
    train_target: np.ndarray,
    train_place: np.ndarray,
    test_features: np.ndarray,
    *,
    multilabel: bool = False,
) -> Probe:
    """Fits the probe on the training rows and scores the test rows.

    A class without a training example scores 0.

    Args:
        train_features: [N, F].
        train_target: [N, K], 0/1.
        train_place: int [N].
        test_features: [M, F].
        multilabel: whether a row may have several labels.

    Returns:
        Scores, C and its cross-validation.

    Raises:
        ValueError: features are not finite, or as :func:`choose_strength`.
    """
    train_features, test_features = np.asarray(train_features, np.float64), np.asarray(test_features, np.float64)
    for name, value in (("training", train_features), ("test", test_features)):
        if not np.isfinite(value).all():
            raise ValueError(
                f"linear probe: {int((~np.isfinite(value).all(1)).sum())} {name} rows hold features that are not finite"
            )
    strength, curve = choose_strength(train_features, train_target, train_place, multilabel=multilabel)
    return Probe(_fit_scores(train_features, train_target, test_features, strength, multilabel), strength, curve)

"""What cells of places are assigned to: prototypes, k-means clusters of the same features, classes of a label map.

Everything here is hard assignment of unit features in numpy; prototypes are numbered from 0 in the order of the bank.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_mutual_info_score
from threadpoolctl import threadpool_limits

from skysense_jax.sensors import UNLABELLED

RESTARTS = 5
"""Beginnings of k-means, of which the best one is kept."""


def shares(assigned: np.ndarray, count: int) -> np.ndarray:
    """Share of the cells that each of `count` clusters has: float64 [count]. assigned: integers."""
    return np.bincount(np.ravel(assigned), minlength=count) / max(np.size(assigned), 1)


def entropy(share: np.ndarray) -> float:
    """Entropy of shares [K] (brought to the sum 1), divided by log K: 1 = all are used alike, 0 = one is used."""
    p = np.asarray(share, np.float64) / np.sum(share)
    return float(-np.sum(p * np.log(np.where(p > 0, p, 1))) / np.log(len(p)))


def best_of_places(cosine: np.ndarray, valid: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """The places nearest to every prototype, by their cell that is most like it.

    cosine: [M, N, P] of the N cells of M places; valid: bool [M, N]. Returns (places int [P, k], cosines [P, k]), k =
    min(most, M), best first; a place without a valid cell has -inf.
    """
    best = np.where(valid[..., None], cosine, -np.inf).max(1).T
    order = np.argsort(-best, axis=1, kind="stable")[:, :most]
    return order, np.take_along_axis(best, order, 1)


def kmeans(features: np.ndarray, clusters: int, seed: int) -> np.ndarray:
    """Cluster of every row by Euclidean k-means, the best of RESTARTS seeded runs: int [M]. features: [M, D].

    Raises ValueError where there are fewer rows than clusters.
    """
    if len(features) < clusters:
        raise ValueError(f"k-means of {clusters} clusters needs as many valid cells, here are {len(features)}")
    with threadpool_limits(limits=1):  # the same sums, hence clusters, whatever the number of cores
        return KMeans(clusters, n_init=RESTARTS, random_state=seed).fit_predict(features)


def agreement(assigned: np.ndarray, label: np.ndarray) -> float | None:
    """Adjusted mutual information of an assignment with a label map over its labelled cells (arithmetic mean of the
    entropies): 1 = the same division, about 0 = no more than by chance. None where fewer than two classes are there.
    """
    labelled = label != UNLABELLED
    if len(np.unique(label[labelled])) < 2:
        return None
    return float(adjusted_mutual_info_score(label[labelled], assigned[labelled]))


def matched(clusters: np.ndarray, to: np.ndarray, count: int) -> np.ndarray:
    """The same clusters, numbered so that as many cells as possible have the number they have in `to`: for pictures.

    clusters, to: int [M] in 0..count-1.
    """
    together = np.bincount(clusters * count + to, minlength=count * count).reshape(count, count)
    return linear_sum_assignment(together, maximize=True)[1][clusters]

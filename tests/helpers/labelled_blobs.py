"""Rows that a linear probe can tell apart: one cloud of points per class."""

import numpy as np


def one_hot(labels: np.ndarray, classes: int) -> np.ndarray:
    return (np.asarray(labels)[:, None] == np.arange(classes)).astype(np.uint8)


def blobs(
    rng: np.random.Generator, n: int, classes: int, features: int, spread: float
) -> tuple[np.ndarray, np.ndarray]:
    centres = np.random.default_rng(99).normal(size=(classes, features))
    labels = rng.integers(classes, size=n)
    return centres[labels] + spread * rng.normal(size=(n, features)), labels

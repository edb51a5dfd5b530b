"""Labelled rows of an evaluation: features of several methods for the same places, or patches of a label map.

Every method sees the same batches in the same order, so that its row i is the same piece of ground as every other
method's row i.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from skysense_jax import sensors
from skysense_jax.core.trees import Tree
from skysense_jax.models.inputs import PLACE

TASKS = ("scene", "patch")
MIN_COVER = 0.5  # share of a patch's labelled pixels its majority class must cover

_TILE = re.compile(r"@-?\d+_-?\d+$")

Method = Callable[[Mapping[str, Any]], Mapping[str, np.ndarray]]
"""PlaceInput, with its "place" -> {"scene": [B, F], "patch": [B, g, g, F]} (the tasks asked for)."""


class Rows(NamedTuple):
    """Labelled rows.

    Attributes:
        features: method -> [N, F].
        target: uint8 [N, K], 0/1.
        place: the catalog's place of every row, N texts: rows of one place stay together in folds and resamples.
    """

    features: dict[str, np.ndarray]
    target: np.ndarray
    place: np.ndarray


def place_of(name: str) -> str:
    """The catalog's place of a record.

    Tiles cut from one place (named PLACE@COLUMN_ROW by the build) are not independent of each other.
    """
    return _TILE.sub("", name)


def patch_majority(label_map: np.ndarray, patch: int) -> np.ndarray:
    """The class of every patch of label maps.

    A patch has the class that covers most of its labelled pixels (the lowest value on a tie), if that is at least half
    of them; patches without a labelled pixel are dropped.

    Args:
        label_map: uint8 [B, N, N].
        patch: pixels along a side of a patch.

    Returns:
        int64 [B, g, g], g = N // patch; -1 where the patch is dropped.

    Raises:
        ValueError: patches are larger than the place.
    """
    b, n, _ = label_map.shape
    g = n // patch
    if g < 1:
        raise ValueError(f"patches of {patch} base pixels do not fit places of {n}; lower config.eval.patch")
    squares = (
        label_map[:, : g * patch, : g * patch]
        .reshape(b, g, patch, g, patch)
        .transpose(0, 1, 3, 2, 4)
        .reshape(-1, patch * patch)
    )
    index = np.arange(len(squares))[:, None] * 256 + squares
    counts = np.bincount(index.ravel(), minlength=len(squares) * 256).reshape(-1, 256)
    counts = np.delete(counts, sensors.UNLABELLED, axis=1)
    best, labelled = counts.argmax(1), counts.sum(1)
    covered = counts[np.arange(len(counts)), best] >= MIN_COVER * labelled
    return np.where((labelled > 0) & covered, best, -1).reshape(b, g, g)


def patch_means(pixel: np.ndarray, patch: int, tile: int) -> np.ndarray:
    """The mean feature of every patch of maps on the base grid.

    Args:
        pixel: [B, h, w, F], h = w = tile.
        patch: base pixels along a side of a patch.
        tile: base pixels along a side of a place.

    Returns:
        float32 [B, g, g, F], g = tile // patch.

    Raises:
        ValueError: the map has another size than the place.
    """
    b, h, w, f = pixel.shape
    if (h, w) != (tile, tile):
        raise ValueError(
            f"the feature map has {h}x{w} cells for a place of {tile}x{tile} base pixels; patches need one cell "
            "per base pixel"
        )
    g = tile // patch
    return pixel[:, : g * patch, : g * patch].reshape(b, g, patch, g, patch, f).mean(axis=(2, 4), dtype=np.float32)


def _targets(batch: Mapping[str, Any], task: str, patch: int) -> np.ndarray:
    """0/1 rows [B, K] of places or [B, g, g, K] of patches; a row of zeros is unlabelled."""
    if task == "scene":
        return np.asarray(batch["label"], np.uint8)
    majority = patch_majority(np.asarray(batch["label_map"]), patch)
    return (majority[..., None] == np.arange(sensors.UNLABELLED)).astype(np.uint8)


def collect(
    batches: Iterable[Tree],
    methods: Mapping[str, Method],
    tasks: Sequence[str],
    *,
    patch: int,
    needs: str | None = None,
) -> dict[str, Rows]:
    """Collects the labelled rows of all methods and tasks in one pass over the batches.

    Args:
        batches: eval batches {"sensors", "label" [B, K], "label_map" [B, N, N], "place": {"name": [B] texts, "lon",
            "lat" [B]}, "weight": [B], 0 = padding}.
        methods: name -> method.
        tasks: some of :data:`TASKS`.
        patch: base pixels of a patch.
        needs: leave out the places where this sensor measured nothing; None = none.

    Returns:
        {task: Rows} of the labelled rows only.

    Raises:
        ValueError: a task has no labelled row.
    """
    features: dict[str, dict[str, list[np.ndarray]]] = {task: {name: [] for name in methods} for task in tasks}
    targets: dict[str, list[np.ndarray]] = {task: [] for task in tasks}
    groups: dict[str, list[np.ndarray]] = {task: [] for task in tasks}
    for batch in batches:
        real = np.asarray(batch["weight"]) > 0
        if needs is not None:
            measured = batch["sensors"].get(needs)
            real &= np.zeros(len(real), bool) if measured is None else np.asarray(measured["valid"]).any(axis=(1, 2, 3))
        place = {name: batch["place"][name] for name in ("lon", "lat")}
        outputs = {name: method({**batch["sensors"], PLACE: place}) for name, method in methods.items()}
        names = np.array([place_of(str(name)) for name in batch["place"]["name"]])
        for task in tasks:
            target = _targets(batch, task, patch)
            labelled = target.any(-1) & real.reshape((-1,) + (1,) * (target.ndim - 2))
            targets[task].append(target[labelled])
            column = names.reshape((-1,) + (1,) * (labelled.ndim - 1))
            groups[task].append(np.broadcast_to(column, labelled.shape)[labelled])
            for name in methods:
                features[task][name].append(np.asarray(outputs[name][task])[labelled])
    result = {}
    for task in tasks:
        if not sum(len(target) for target in targets[task]):
            raise ValueError(
                f"no labelled {task} row" + (f" with a measured {needs!r}" if needs else "") + " in this split"
            )
        joined = {name: np.concatenate(arrays) for name, arrays in features[task].items()}
        result[task] = Rows(joined, np.concatenate(targets[task]), np.concatenate(groups[task]))
    return result

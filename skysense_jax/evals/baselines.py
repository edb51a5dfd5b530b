"""The baseline that has learnt nothing: statistics of every band over the valid pixels of all dates.

A network whose features do not beat these has learnt nothing worth transferring. The other baseline, the same network
untrained, needs no code of its own: it is the network with freshly drawn parameters.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

PERCENTILES = (5.0, 25.0, 50.0, 75.0, 95.0)


def _percentiles(values: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Linear percentiles of the valid entries of [G, V]; [G, len(PERCENTILES)], NaN for a row without one.

    Sorting with invalid entries last does all rows at once; numpy's NaN-aware percentile loops over them in Python.
    """
    count = valid.sum(1)
    ranked = np.sort(np.where(valid, values, np.inf), axis=1)
    ranked[count == 0] = 0.0  # their result is NaN below; inf - inf would only warn
    position = np.asarray(PERCENTILES)[None] / 100 * np.maximum(count - 1, 0)[:, None]
    below = np.floor(position).astype(int)
    above = np.minimum(below + 1, np.maximum(count - 1, 0)[:, None])
    low, high = np.take_along_axis(ranked, below, 1), np.take_along_axis(ranked, above, 1)
    share = position - below
    return np.where(count[:, None] > 0, np.where(share > 0, low + (high - low) * share, low), np.nan)


def band_statistics(image: np.ndarray, valid: np.ndarray, bands: np.ndarray, cells: int) -> np.ndarray:
    """Mean, deviation and percentiles of every band in every one of cells x cells squares of a place, over all dates.

    Args:
        image: [B, T, S, S, C], raw units; S must be a multiple of cells (the caller crops).
        valid: [B, T, S, S], 0/1.
        bands: [B, T, C], 0/1.
        cells: squares along a side.

    Returns:
        float64 [B, cells, cells, C * (2 + len(PERCENTILES))]; NaN where a band has no valid pixel in the square.
    """
    b, t, side, _, c = image.shape
    step = side // cells
    use = (valid[..., None] > 0) & (bands[:, :, None, None, :] > 0)

    def squares(array: np.ndarray) -> np.ndarray:
        array = array.reshape(b, t, cells, step, cells, step, c)
        return array.transpose(0, 2, 4, 6, 1, 3, 5).reshape(-1, t * step * step)

    values, use = squares(image.astype(np.float64)), squares(use)
    count = use.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):  # 0 / 0 is the NaN documented above
        mean = np.where(use, values, 0.0).sum(1) / count
        variance = np.where(use, (values - mean[:, None]) ** 2, 0.0).sum(1) / count
    statistics = np.concatenate([mean[:, None], np.sqrt(variance)[:, None], _percentiles(values, use)], axis=1)
    return statistics.reshape(b, cells, cells, -1)


def image_statistics(
    sensors: Mapping[str, Mapping[str, np.ndarray]], *, tile: int, patch: int | None = None
) -> np.ndarray:
    """The baseline's features of a batch of places.

    Sensors come in alphabetical order; NaN where nothing was measured.

    Args:
        sensors: PlaceInput (image [B, T, S, S, C], valid [B, T, S, S], bands [B, T, C]).
        tile: base pixels of a place.
        patch: base pixels of a patch; None = whole places.

    Returns:
        [B, F] for whole places, [B, g, g, F] for patches, g = tile // patch; pixels beyond the last whole patch are
        left out.

    Raises:
        ValueError: the pixels of a sensor do not divide into the place.
    """
    cells = 1 if patch is None else tile // patch
    used = tile if patch is None else cells * patch
    statistics = []
    for name in sorted(sensors):
        image, valid = np.asarray(sensors[name]["image"]), np.asarray(sensors[name]["valid"])
        side = image.shape[2] // tile * used
        if image.shape[2] % tile:
            raise ValueError(f"{name}: {image.shape[2]} pixels do not divide into a place of {tile} base pixels")
        statistics.append(
            band_statistics(
                image[:, :, :side, :side], valid[:, :, :side, :side], np.asarray(sensors[name]["bands"]), cells
            )
        )
    features = np.concatenate(statistics, axis=-1)
    return features[:, 0, 0] if patch is None else features


def standardise(train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Brings statistics of different units to one scale: minus the training mean, over the training deviation.

    Cosine similarity of raw statistics would compare the unit with the largest numbers only.

    Args:
        train: [N, F], NaN = missing.
        test: [M, F], NaN = missing.

    Returns:
        Both, scaled; what is missing becomes 0.
    """
    measured = ~np.isnan(train)
    count = np.maximum(measured.sum(0), 1)
    mean = np.where(measured, train, 0.0).sum(0) / count
    deviation = np.sqrt(np.where(measured, (train - mean) ** 2, 0.0).sum(0) / count)
    deviation = np.where(deviation > 1e-12, deviation, 1.0)
    scaled_train, scaled_test = ((rows - mean) / deviation for rows in (train, test))
    return np.nan_to_num(scaled_train, nan=0.0), np.nan_to_num(scaled_test, nan=0.0)

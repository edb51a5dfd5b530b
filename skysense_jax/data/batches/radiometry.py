"""Radiometric augmentation of one view of one sensor, in the sensor's raw unit, on planes [T, C, H, W].

A sensor's row names its disturbance. HR gets DINO's optical set; S2 and S1 get what disturbs their radiometry: a gain
of the reflectance (illumination, atmosphere), an offset and residual speckle in decibel. The numbers are configuration
(`config.data.augment`): the paper gives none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from skysense_jax.data.batches import geometry
from skysense_jax.sensors import SENSORS

_LUMA = np.array([0.299, 0.587, 0.114])
_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
_YIQ[1:] -= _YIQ[1:].mean(1, keepdims=True)  # grey has no chroma, exactly
_RGB = np.linalg.inv(_YIQ)
BLUR_SIGMA = (0.1, 2.0)
"""Range of the blur's standard deviation in HR pixels of the view (DINO)."""
SOLARIZE_THRESHOLD = 130.0
"""SkySense++ lib/datasets/utils/transforms.py, MSSSLRandomSolarize."""


def colour_matrix(brightness: float, contrast: float, saturation: float, hue: float, gray: bool) -> np.ndarray:
    """The matrix M of a colour jitter: out = M rgb + (1 - contrast) * brightness * mean luma of rgb.

    Brightness, contrast, saturation and hue keep or scale luma, so they commute and one matrix holds them; the result
    is clipped once, at the end.

    Args:
        brightness: factor, 1 = unchanged.
        contrast: factor, 1 = unchanged.
        saturation: factor, 1 = unchanged.
        hue: part of a full turn about the grey axis (YIQ).
        gray: whether chroma is removed after them.

    Returns:
        float64 [3, 3].
    """
    angle = 2.0 * np.pi * hue
    turn = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
    matrix = _RGB @ turn @ _YIQ
    matrix = saturation * matrix + (1.0 - saturation) * np.outer(np.ones(3), _LUMA)
    if gray:
        matrix = np.outer(np.ones(3), _LUMA) @ matrix
    return contrast * brightness * matrix


def blur_band(sigma: float, size: int) -> geometry.Band:
    """Gaussian blur along one axis, truncated at three sigma and renormalised at the border.

    Args:
        sigma: standard deviation in pixels.
        size: pixels along the axis.

    Returns:
        The banded matrix of the blur.
    """
    reach = max(3.0 * sigma, 0.5)
    return geometry.make_band(
        np.arange(size) + 0.5,
        reach,
        size,
        lambda distance: np.exp(-0.5 * np.square(distance / sigma)) * (np.abs(distance) <= reach),
    )


def optical(
    rng: np.random.Generator, planes: np.ndarray, valid: np.ndarray | None, view: str, cfg: Mapping[str, Any]
) -> np.ndarray:
    """Colour jitter, grayscale, blur and solarize (second global view only) of R, G, B in 0..255, clipped to it.

    Args:
        rng: source of all randomness.
        planes: float32 [T, 3, H, H].
        valid: [T, H, H], 1 = measured; None = all.
        view: "global0", "global1" or "local".
        cfg: the fields `hr_*` of `config.data.augment`.

    Returns:
        float32 [T, 3, H, H].
    """
    chance = rng.random(4)
    bright, contrast, saturation, hue = rng.uniform(-1.0, 1.0, 4) * np.asarray(cfg["hr_jitter_strength"])
    sigma = rng.uniform(*BLUR_SIGMA)
    gray = bool(chance[1] < cfg["hr_gray"])
    if chance[0] >= cfg["hr_jitter"]:
        bright = contrast = saturation = hue = 0.0
    if gray or chance[0] < cfg["hr_jitter"]:
        matrix = colour_matrix(1.0 + bright, 1.0 + contrast, 1.0 + saturation, hue, gray).astype(np.float32)
        if valid is None:
            mean = planes.mean((2, 3), dtype=np.float64)
        else:
            total = np.einsum("tchw,thw->tc", planes, valid, dtype=np.float64)
            mean = total / np.maximum(valid.sum((1, 2)), 1.0)[:, None]
        level = (mean @ _LUMA * -contrast * (1.0 + bright)).astype(np.float32)
        mixed = np.empty_like(planes)
        np.matmul(matrix, planes.transpose(0, 2, 1, 3), out=mixed.transpose(0, 2, 1, 3))
        mixed += level[:, None, None, None]
        planes = np.clip(mixed, 0.0, 255.0, out=mixed)
    if chance[2] < cfg["hr_blur"][("global0", "global1", "local").index(view)]:
        band = blur_band(sigma, planes.shape[-1])
        planes = geometry.weighted(planes, valid, band, band)
    if view == "global1" and chance[3] < cfg["hr_solarize"]:
        planes = np.where(planes >= SOLARIZE_THRESHOLD, 255.0 - planes, planes)
    return planes


def reflectance(
    rng: np.random.Generator, planes: np.ndarray, valid: np.ndarray | None, view: str, cfg: Mapping[str, Any]
) -> np.ndarray:
    """A gain per acquisition times a gain per acquisition and band, uniform in 1 +- `s2_gain` and 1 +- `s2_band_gain`.

    Args:
        rng: source of all randomness.
        planes: float32 [T, C, H, W], digital numbers proportional to reflectance.
        valid: not read.
        view: not read.
        cfg: the fields `s2_*` of `config.data.augment`.

    Returns:
        float32 [T, C, H, W].
    """
    del valid, view
    common = 1.0 + rng.uniform(-1.0, 1.0, (planes.shape[0], 1, 1, 1)) * cfg["s2_gain"]
    band = 1.0 + rng.uniform(-1.0, 1.0, (*planes.shape[:2], 1, 1)) * cfg["s2_band_gain"]
    return planes * (common * band).astype(np.float32)


def backscatter(
    rng: np.random.Generator, planes: np.ndarray, valid: np.ndarray | None, view: str, cfg: Mapping[str, Any]
) -> np.ndarray:
    """A shift per acquisition and band in +-`s1_shift_db`, and normal noise of `s1_speckle_db` per pixel.

    Args:
        rng: source of all randomness.
        planes: float32 [T, C, H, W] in decibel.
        valid: not read.
        view: not read.
        cfg: the fields `s1_*` of `config.data.augment`.

    Returns:
        float32 [T, C, H, W].
    """
    del valid, view
    shift = rng.uniform(-1.0, 1.0, (*planes.shape[:2], 1, 1)).astype(np.float32) * np.float32(cfg["s1_shift_db"])
    noise = rng.standard_normal(planes.shape, dtype=np.float32) * np.float32(cfg["s1_speckle_db"])
    return planes + shift + noise


Disturbance = Callable[[np.random.Generator, np.ndarray, np.ndarray | None, str, Mapping[str, Any]], np.ndarray]
"""(rng, planes, valid, view, cfg) -> planes, as the functions above."""

NONE = "none"
DISTURBANCES: dict[str, Disturbance] = {"optical": optical, "reflectance": reflectance, "backscatter": backscatter}
"""`disturbance` of a sensor's row -> its augmentation; NONE: left as measured."""


def disturb(
    rng: np.random.Generator,
    sensor: str,
    planes: np.ndarray,
    valid: np.ndarray | None,
    view: str,
    cfg: Mapping[str, Any],
) -> np.ndarray:
    """Augments the acquisitions of one sensor in one view, as the sensor's row says.

    Args:
        rng: source of all randomness.
        sensor: name of a row of the table.
        planes: float32 [T, C, H, W] in the sensor's stored unit.
        valid: [T, H, W], 1 = measured; None = all.
        view: "global0", "global1" or "local".
        cfg: `config.data.augment`.

    Returns:
        float32 [T, C, H, W]; pixels that are not valid are 0.
    """
    rule = SENSORS[sensor].disturbance
    if rule == NONE or not len(planes):
        return planes
    planes = DISTURBANCES[rule](rng, planes, valid, view, cfg)
    return planes if valid is None else planes * valid[:, None]

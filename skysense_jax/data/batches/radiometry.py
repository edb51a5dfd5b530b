"""Radiometric augmentation of one view of one sensor, in the sensor's raw unit, on planes [T, C, H, W].

HR gets DINO's optical set; S2 and S1 get what disturbs their radiometry: a gain of the reflectance (illumination,
atmosphere), an offset and residual speckle in decibel. The numbers are configuration (`config.data.augment`): the
paper gives none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from skysense_jax.data.batches import geometry

_LUMA = np.array([0.299, 0.587, 0.114])
_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
_YIQ[1:] -= _YIQ[1:].mean(1, keepdims=True)  # grey has no chroma, exactly
_RGB = np.linalg.inv(_YIQ)
BLUR_SIGMA = (0.1, 2.0)
"""Range of the blur's standard deviation in HR pixels of the view (DINO)."""
SOLARIZE_THRESHOLD = 130.0
"""SkySense++ lib/datasets/utils/transforms.py, MSSSLRandomSolarize."""


def colour_matrix(brightness: float, contrast: float, saturation: float, hue: float, gray: bool) -> np.ndarray:
    """float64 [3, 3] M and the rule out = M rgb + (1 - contrast) * brightness * mean luma of rgb.

    brightness, contrast, saturation: factors, 1 = unchanged; hue: part of a full turn about the grey axis (YIQ). All
    four keep or scale luma, so they commute and one matrix holds them; the result is clipped once, at the end. gray:
    chroma removed after them.
    """
    angle = 2.0 * np.pi * hue
    turn = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
    matrix = _RGB @ turn @ _YIQ
    matrix = saturation * matrix + (1.0 - saturation) * np.outer(np.ones(3), _LUMA)
    if gray:
        matrix = np.outer(np.ones(3), _LUMA) @ matrix
    return contrast * brightness * matrix


def blur_band(sigma: float, size: int) -> geometry.Band:
    """Gaussian blur along an axis of `size` pixels: truncated at three sigma, renormalised at the border."""
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
    """HR: colour jitter, grayscale, blur, solarize (second global view only), on R, G, B in 0..255, clipped to it.

    planes: float32 [T, 3, H, H]; valid: [T, H, H] or None = all; view: "global0", "global1" or "local".
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
    """S2: a gain per acquisition times one per acquisition and band, uniform in 1 +- `s2_gain`, `s2_band_gain`."""
    del valid, view
    common = 1.0 + rng.uniform(-1.0, 1.0, (planes.shape[0], 1, 1, 1)) * cfg["s2_gain"]
    band = 1.0 + rng.uniform(-1.0, 1.0, (*planes.shape[:2], 1, 1)) * cfg["s2_band_gain"]
    return planes * (common * band).astype(np.float32)


def backscatter(
    rng: np.random.Generator, planes: np.ndarray, valid: np.ndarray | None, view: str, cfg: Mapping[str, Any]
) -> np.ndarray:
    """S1, in dB: a shift per acquisition and band in +-`s1_shift_db`, normal noise of `s1_speckle_db` per pixel."""
    del valid, view
    shift = rng.uniform(-1.0, 1.0, (*planes.shape[:2], 1, 1)).astype(np.float32) * np.float32(cfg["s1_shift_db"])
    noise = rng.standard_normal(planes.shape, dtype=np.float32) * np.float32(cfg["s1_speckle_db"])
    return planes + shift + noise


RULES: dict[str, Callable[..., np.ndarray]] = {"hr": optical, "s2": reflectance, "s1": backscatter}
"""Sensor -> its augmentation; a sensor without a rule is left as measured."""


def disturb(
    rng: np.random.Generator,
    sensor: str,
    planes: np.ndarray,
    valid: np.ndarray | None,
    view: str,
    cfg: Mapping[str, Any],
) -> np.ndarray:
    """The sensor's rule applied to planes float32 [T, C, H, W]; pixels with valid [T, H, W] = 0 are 0 afterwards."""
    if sensor not in RULES or not len(planes):
        return planes
    planes = RULES[sensor](rng, planes, valid, view, cfg)
    return planes if valid is None else planes * valid[:, None]

"""What a model does with a PlaceInput before its first layer: check its shapes, bring raw units to what it eats."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from skysense_jax.core.shapes import Mask, Series
from skysense_jax.nn.attention import wide
from skysense_jax.sensors import Contract, SensorRule, pixels_per_base, sensor_rule

PLACE = "place"
"""Entry of a PlaceInput beside its sensors: where the places are."""

SensorInput = Mapping[str, jax.Array]
"""Acquisitions of one sensor: "image" [B, T, H, W, C] raw units, "valid" [B, T, H, W], "bands" [B, T, C] measured or
not, "dates" [B, T] int day of the year, -1 unknown."""

PlaceInput = Mapping[str, SensorInput]
"""A SensorInput for each of some sensors, and PLACE: {"lon", "lat"} [B] degrees, where the locations are known."""


def check_inputs(inputs: PlaceInput, contract: Contract) -> tuple[int, int]:
    """Door check of a PlaceInput's shapes.

    Args:
        inputs: arrays, or anything with their shapes.
        contract: the model's input contract.

    Returns:
        The base grid (h, w).

    Raises:
        ValueError: a shape breaks a rule; the message names the sensor and the rule.
    """
    grids = {}
    for name, sensor in inputs.items():
        if name == PLACE:
            continue
        rule, shape = sensor_rule(contract, name), tuple(sensor["image"].shape)
        if len(shape) != 5 or shape[-1] != len(rule["bands"]):
            raise ValueError(
                f"{name}: image must be [B,T,H,W,{len(rule['bands'])}] with bands {rule['bands']}, got {shape}"
            )
        shapes = {"valid": shape[:4], "bands": shape[:2] + shape[-1:], "dates": shape[:2]}
        for key, expected in shapes.items():
            if tuple(sensor[key].shape) != expected:
                raise ValueError(f"{name}: {key} must have shape {expected}, got {tuple(sensor[key].shape)}")
        cell = pixels_per_base(rule, contract["ratio"])
        if shape[2] % cell or shape[3] % cell:
            raise ValueError(f"{name}: {shape[2]}x{shape[3]} pixels are not multiples of the ratio {cell}")
        grids[name] = (shape[2] // cell, shape[3] // cell)
        if any(np.shape(degrees) != shape[:1] for degrees in inputs.get(PLACE, {}).values()):
            raise ValueError(f"{PLACE}: lon and lat must have shape {shape[:1]}, one location per place")
    if not grids:
        raise ValueError("no sensor given; a place needs at least one")
    if len(set(grids.values())) > 1:
        raise ValueError(f"the sensors of a place must cover the same grid of cells, got {grids}")
    return next(iter(grids.values()))


def normalise(sensor: SensorInput, contract: SensorRule) -> tuple[Series, Mask]:
    """From raw units to what the encoders take.

    Args:
        sensor: acquisitions of one sensor.
        contract: the input contract's entry of this sensor.

    Returns:
        (image [B, T, H, W, C] float32 normalised, 0 where a pixel is invalid or a band unmeasured; valid [B, T, H, W]
        float32, 0 also at dates where no band was measured).
    """
    mean, std = (jnp.asarray(contract[key], jnp.float32) for key in ("mean", "std"))
    valid = sensor["valid"] * jnp.any(sensor["bands"] > 0, axis=-1)[:, :, None, None]
    use = (valid[..., None] > 0) & (sensor["bands"][:, :, None, None, :] > 0)
    image = sensor["image"].astype(wide(sensor["image"].dtype))
    if "datum" in contract:
        image = image - lower_median(image, use)
    image = (image - mean) / std
    return jnp.where(use, image, 0.0), valid.astype(jnp.float32)


def lower_median(image: Series, use: Mask) -> jax.Array:
    """The median over the pixels of each acquisition and band; the lower of two in the middle, as torch.median.

    Args:
        image: [B, T, H, W, C].
        use: [B, T, H, W, C] bool, which pixels count.

    Returns:
        [B, T, 1, 1, C], 0 where no pixel counts.
    """
    b, t, h, w, c = image.shape
    ordered = jnp.sort(jnp.where(use, image, jnp.inf).reshape(b, t, h * w, c), axis=2)
    count = use.sum((2, 3))[:, :, None]
    middle = jnp.take_along_axis(ordered, jnp.maximum(count - 1, 0) // 2, axis=2)
    return jnp.where(count > 0, middle, 0.0)[:, :, None]

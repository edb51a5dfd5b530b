"""Features of a SkySense network: means of its maps over valid cells and dates."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from skysense_jax.core.shapes import FeatureMap, MapSeries, Mask
from skysense_jax.core.trees import Tree
from skysense_jax.models.inputs import PlaceInput
from skysense_jax.models.skysense import Model


def encoder_features(model: Model, encoder: Tree, inputs: PlaceInput) -> dict[str, jax.Array]:
    """Features of places. They need the model only, so that weights without a training configuration have them too.

    Args:
        model: the network's functions.
        encoder: its parameters, with geo-context the bank among them.
        inputs: acquisitions of any of the sensors, with geo-context the locations too.

    Returns:
        float32: "image" [B, E] and "pixel" [B, h, w, E] with a fusion (E + D with geo-context), and for each sensor of
        the inputs "<sensor>_image" [B, D] and "<sensor>_pixel" [B, h, w, D] on the grid of its map.
    """
    out, result = model.apply(encoder, inputs), {}
    if "fused" in out:
        result["pixel"] = out["fused"]
        result["image"] = time_mean(out["fused"][:, None], out["fused_mask"][:, None])[0]
    for name in out["maps"]:
        result[f"{name}_image"], result[f"{name}_pixel"] = time_mean(out["maps"][name], out["mask"][name])
    return {name: value.astype(jnp.float32) for name, value in result.items()}


def time_mean(maps: MapSeries, mask: Mask) -> tuple[jax.Array, FeatureMap]:
    """Masked means over cells and dates, and over dates alone; 0 where nothing is valid.

    Args:
        maps: [B, T, h, w, D].
        mask: [B, T, h, w], 0 = the cell is invalid.

    Returns:
        (over cells and dates [B, D], over dates [B, h, w, D]).
    """
    total, mass = jnp.sum(maps * mask[..., None], axis=1, dtype=jnp.float32), mask.sum(1)
    pixel = total / jnp.maximum(mass, 1.0)[..., None]
    return total.sum((1, 2)) / jnp.maximum(mass.sum((1, 2)), 1.0)[..., None], pixel

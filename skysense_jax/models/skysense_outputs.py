"""Features of a SkySense network: means of its maps over valid cells and dates."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from skysense_jax.models.skysense import Model

Tree = Any


def encoder_features(model: Model, encoder: Tree, inputs: Tree) -> dict[str, jax.Array]:
    """Float32 features of a PlaceInput: "image" [B, E], "pixel" [B, h, w, E] (with a fusion; E + D with geo-context,
    whose bank is part of `encoder` and whose location is inputs["place"]) and, for each sensor given, "<sensor>_image"
    [B, D], "<sensor>_pixel" [B, h, w, D] on the grid of its map. Needs the model only, so that weights without a
    training configuration have them too.
    """
    out, result = model.apply(encoder, inputs), {}
    if "fused" in out:
        result["pixel"] = out["fused"]
        result["image"] = time_mean(out["fused"][:, None], out["fused_mask"][:, None])[0]
    for name in out["maps"]:
        result[f"{name}_image"], result[f"{name}_pixel"] = time_mean(out["maps"][name], out["mask"][name])
    return {name: value.astype(jnp.float32) for name, value in result.items()}


def time_mean(maps: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Masked means of [B, T, h, w, D], mask [B, T, h, w]: over cells and dates [B, D], and over dates [B, h, w, D] (0
    where nothing is valid).
    """
    total, mass = jnp.sum(maps * mask[..., None], axis=1, dtype=jnp.float32), mask.sum(1)
    pixel = total / jnp.maximum(mass, 1.0)[..., None]
    return total.sum((1, 2)) / jnp.maximum(mass.sum((1, 2)), 1.0)[..., None], pixel

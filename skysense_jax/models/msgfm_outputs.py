"""What msGFM makes of images without training: normalised inputs, features of places, reconstructions to look at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from skysense_jax.models import msgfm
from skysense_jax.models.inputs import normalise
from skysense_jax.models.skysense_outputs import time_mean
from skysense_jax.ops.masking import masked_sums, pixel_mask, random_cells
from skysense_jax.sensors import SENSORS, pixels_per_base

Tree = Any


def normalised(contract: Mapping[str, Any], name: str, part: Tree) -> tuple[jax.Array, jax.Array]:
    """(image [B,S,S,C] normalised, 0 where it was not measured; measured [B,S,S,C] float32) of one sensor's part of a
    batch, whose last axis may hold more bands than the sensor has.
    """
    rule = contract["sensors"][name]
    bands = len(rule["bands"])
    given = {
        "image": part["image"][:, None, ..., :bands],
        "valid": part["valid"][:, None],
        "bands": part["bands"][:, None, :bands],
    }
    image, valid = normalise(given, rule)
    return image[:, 0], valid[:, 0, ..., None] * part["bands"][:, None, None, :bands]


def encoder_features(
    cfg: Any, contract: Mapping[str, Any], model: msgfm.Model, encoder: Tree, inputs: Tree
) -> dict[str, jax.Array]:
    """Float32 features of a PlaceInput: "image" [B, D], "pixel" [B, h, w, D] on the base grid, and for each sensor
    given "<sensor>_image", "<sensor>_pixel". cfg: config.model.

    Every acquisition is brought to the image size of training and encoded alone; maps are averaged over the dates of a
    sensor, then over the sensors: what the frozen encoder has seen in training is one sensor at a time. (Fine-tuning,
    as in the paper, may instead add up the sensors' patch embeddings in front of one pass.) The last map, of stride 32
    in the paper's model, is enlarged to the base grid.
    """
    if not set(inputs) & set(contract["sensors"]):
        raise ValueError(f"give at least one of the sensors {', '.join(contract['sensors'])}")
    side, result, maps, masks = int(cfg.img_size), {}, [], []
    for name in (name for name in contract["sensors"] if name in inputs):
        image, valid = normalise(inputs[name], contract["sensors"][name])
        b, t, rows, columns, bands = image.shape
        ratio = pixels_per_base(contract["sensors"][name], contract["ratio"])
        image = at_model_size(image.reshape(b * t, rows, columns, bands), side)
        final = model.encode(encoder, model.embed(encoder, name, image)).final.astype(jnp.float32)
        base = (rows // ratio, columns // ratio)
        shape = (b, t, *final.shape[1:])
        mask = jnp.broadcast_to((valid.mean((2, 3)) > 0)[..., None, None], shape[:-1]).astype(jnp.float32)
        result[f"{name}_image"], pixel = time_mean(final.reshape(shape), mask)
        result[f"{name}_pixel"] = jax.image.resize(pixel, (b, *base, pixel.shape[-1]), "bilinear")
        maps.append(pixel)
        masks.append((mask.sum(1) > 0).astype(jnp.float32))
    result["image"], pixel = time_mean(jnp.stack(maps, 1), jnp.stack(masks, 1))
    result["pixel"] = jax.image.resize(pixel, (b, *base, pixel.shape[-1]), "bilinear")
    return result


def at_model_size(image: jax.Array, side: int) -> jax.Array:
    """[B,H,W,C] -> [B,side,side,C], bilinear, antialiased where it shrinks: what the crops of training are."""
    return jax.image.resize(image, (len(image), side, side, image.shape[-1]), "bilinear")


def reconstructions(
    cfg: Any, contract: Mapping[str, Any], model: msgfm.Model, encoder: Tree, inputs: Tree, rng: jax.Array
) -> dict[str, dict[str, jax.Array]]:
    """What the model makes of a place behind a random mask, sensor by sensor. cfg: the whole configuration; inputs:
    PlaceInput of one place, [1, 1, ...] by sensor.

    {sensor: {"image" [S, S, C], "measured" [S, S], "mask" [S, S] 1 = hidden, "made": {target: [S, S, C]}, "errors":
    {target: [2]}}} for the sensor itself and its pair as targets. Images are float32 in raw units, "made" whole as the
    decoder drew it. errors: mean absolute error of hidden measured pixels in deviations of the target's bands, the
    model's and that of the training mean in its stead; nan where there are no such pixels.
    """
    side, cell, found = int(cfg.model.img_size), int(cfg.objective.mask_cell), {}
    images, measured = {}, {}
    for name in (name for name in contract["sensors"] if name in inputs):
        image, valid = normalise(inputs[name], contract["sensors"][name])
        images[name] = at_model_size(image[:, 0], side)
        whole = at_model_size(valid[:, 0, ..., None], side) > 0.999  # beside a gap a resized pixel is part of the gap
        measured[name] = whole * inputs[name]["bands"][:, 0, None, None]
    for number, (name, image) in enumerate(images.items()):
        cells = random_cells(jax.random.fold_in(rng, number), 1, side // cell, cfg.objective.mask_ratio)
        tokens = model.embed(encoder, name, image, pixel_mask(cells, cell // cfg.model.patch))
        final, mask = model.encode(encoder, tokens).final, pixel_mask(cells, cell)
        made, errors = {}, {}
        for target in (one for one in (name, SENSORS[name].pair) if one in images):
            guess, truth = model.decode(encoder, target, final), images[target]
            counts = measured[target] * mask[..., None]
            made[target] = raw(contract, target, guess[0])
            sums = (masked_sums(one, truth, counts) for one in (guess, jnp.zeros_like(truth)))
            errors[target] = jnp.stack([error / pixels for error, pixels in sums])
        found[name] = {
            "image": raw(contract, name, image[0]),
            "mask": mask[0].astype(jnp.float32),
            "measured": measured[name][0].max(-1),
            "made": made,
            "errors": errors,
        }
    return found


def raw(contract: Mapping[str, Any], name: str, image: jax.Array) -> jax.Array:
    """Normalised values [..., C] in the sensor's unit again; heights above the image's median."""
    mean, std = (jnp.asarray(contract["sensors"][name][key], jnp.float32) for key in ("mean", "std"))
    return image.astype(jnp.float32) * std + mean

"""What msGFM makes of images without training: normalised inputs, features of places, reconstructions to look at."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from ml_collections import config_dict

from skysense_jax.core.shapes import Image, Key
from skysense_jax.core.trees import Tree
from skysense_jax.models import msgfm
from skysense_jax.models.inputs import PlaceInput, normalise
from skysense_jax.models.skysense_outputs import time_mean
from skysense_jax.ops.masking import masked_sums, pixel_mask, random_cells
from skysense_jax.sensors import SENSORS, Contract, pixels_per_base


def normalised(contract: Contract, name: str, images: Mapping[str, jax.Array]) -> tuple[Image, jax.Array]:
    """Normalised images of one sensor's entry of a batch.

    Args:
        contract: the input contract.
        name: of the sensor.
        images: {"image" [B, S, S, C'] raw units, "valid" [B, S, S], "bands" [B, C']}, where C' may be more than the C
            bands that the sensor has.

    Returns:
        (image [B, S, S, C] float32, 0 where it was not measured; measured [B, S, S, C] float32).
    """
    rule = contract["sensors"][name]
    bands = len(rule["bands"])
    acquisition = {
        "image": images["image"][:, None, ..., :bands],
        "valid": images["valid"][:, None],
        "bands": images["bands"][:, None, :bands],
    }
    image, valid = normalise(acquisition, rule)
    return image[:, 0], valid[:, 0, ..., None] * images["bands"][:, None, None, :bands]


def encoder_features(
    cfg: config_dict.ConfigDict, contract: Contract, model: msgfm.Model, encoder: Tree, inputs: PlaceInput
) -> dict[str, jax.Array]:
    """Features of places.

    Every acquisition is brought to the image size of training and encoded alone; maps are averaged over the dates of a
    sensor, then over the sensors, because the frozen encoder has seen one sensor at a time in training. (Fine-tuning,
    as in the paper, may instead add up the sensors' patch embeddings in front of one pass.) The last map, of stride 32
    in the paper's model, is enlarged to the base grid.

    Args:
        cfg: config.model.
        contract: the input contract.
        model: the network's functions.
        encoder: its parameters.
        inputs: acquisitions of any of the sensors.

    Returns:
        float32: "image" [B, D], "pixel" [B, h, w, D] on the base grid, and for each sensor of the inputs
        "<sensor>_image", "<sensor>_pixel".

    Raises:
        ValueError: the inputs have none of the contract's sensors.
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


def at_model_size(image: Image, side: int) -> Image:
    """Images resized as the crops of training are: bilinear, antialiased where they shrink.

    Args:
        image: [B, H, W, C].
        side: of the result in pixels.

    Returns:
        [B, side, side, C].
    """
    return jax.image.resize(image, (len(image), side, side, image.shape[-1]), "bilinear")


def reconstructions(
    cfg: config_dict.ConfigDict, contract: Contract, model: msgfm.Model, encoder: Tree, inputs: PlaceInput, rng: Key
) -> dict[str, Tree]:
    """What the model makes of a place behind a random mask, sensor by sensor.

    Args:
        cfg: the whole configuration.
        contract: the input contract.
        model: the network's functions.
        encoder: its parameters.
        inputs: one acquisition of one place, [1, 1, ...] for each sensor.
        rng: of the mask.

    Returns:
        {sensor: {"image" [S, S, C], "measured" [S, S], "mask" [S, S] 1 = hidden, "made": {target: [S, S, C]}, "errors":
        {target: [2]}}}, where the targets are the sensor itself and its pair. Images are float32 in raw units, "made"
        is all that the decoder drew. errors: mean absolute error of hidden measured pixels in deviations of the
        target's bands, the model's and, in its place, the training mean's; nan where there are no such pixels.
    """
    side, cell, results = int(cfg.model.img_size), int(cfg.objective.mask_cell), {}
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
        drawn, errors = {}, {}
        for target in (sensor for sensor in (name, SENSORS[name].pair) if sensor in images):
            prediction, truth = model.decode(encoder, target, final), images[target]
            hidden = measured[target] * mask[..., None]
            drawn[target] = raw(contract, target, prediction[0])
            sums = (masked_sums(guess, truth, hidden) for guess in (prediction, jnp.zeros_like(truth)))
            errors[target] = jnp.stack([error / pixels for error, pixels in sums])
        results[name] = {
            "image": raw(contract, name, image[0]),
            "mask": mask[0].astype(jnp.float32),
            "measured": measured[name][0].max(-1),
            "made": drawn,
            "errors": errors,
        }
    return results


def raw(contract: Contract, name: str, image: jax.Array) -> jax.Array:
    """Normalised values in the sensor's unit again; heights are those above the image's median.

    Args:
        contract: the input contract.
        name: of the sensor.
        image: [..., C].

    Returns:
        [..., C] float32.
    """
    mean, std = (jnp.asarray(contract["sensors"][name][key], jnp.float32) for key in ("mean", "std"))
    return image.astype(jnp.float32) * std + mean

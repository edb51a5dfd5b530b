"""GFM's distillation: the student's features are compared with a frozen network's, which learnt from other images.

GFM, models/simmim.py and models/teacher.py: an ImageNet Swin-B sees the same image unmasked, at its own size; both
networks are compared at the map after the third merging, averaged over its cells, the student's through a linear layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import config_dict

from skysense_jax.core.shapes import FeatureMap, Image, Key, Scalar
from skysense_jax.core.trees import Tree
from skysense_jax.models import msgfm
from skysense_jax.models.msgfm_outputs import normalised
from skysense_jax.nn.patch import conv_bias, torch_linear
from skysense_jax.sensors import Contract

TAUGHT = "hr"
"""The sensor whose images the teacher knows; batches of others have no such term."""


class Teacher(NamedTuple):
    """The frozen network.

    Attributes:
        init: key -> the frozen parameters.
        width: of the compared features.
        cosine: (projector, teacher, merged, batch) -> (mean cosine over the batch, 0 for a batch of another sensor;
            whether the batch is one of TAUGHT).
    """

    init: Callable[[Key], Tree]
    width: int
    cosine: Callable[[Tree, Tree, FeatureMap, Tree], tuple[Scalar, Scalar]]


def make_teacher(cfg: config_dict.ConfigDict, contract: Contract) -> Teacher:
    """The teacher of config.objective.distill: the student's encoder without experts.

    It has an image size and a window of its own.

    Args:
        cfg: the whole configuration.
        contract: the input contract.

    Returns:
        The teacher.

    Raises:
        ValueError: the contract lacks the sensor TAUGHT, so that no batch has images the teacher knows.
    """
    if TAUGHT not in contract["sensors"]:
        raise ValueError(
            f"config.objective.distill.weight: the teacher knows images of {TAUGHT!r}, the model takes "
            f"{', '.join(contract['sensors'])}"
        )
    o, number = cfg.objective.distill, list(contract["sensors"]).index(TAUGHT)
    settings = cfg.model.copy_and_resolve_references()
    settings.unlock()
    settings.moe.stages, settings.img_size, settings.window = (), int(o.img_size), int(o.window)
    network = msgfm.make_model(settings, {**contract, "sensors": {TAUGHT: contract["sensors"][TAUGHT]}})

    def init(rng: Key) -> Tree:
        params = network.init(rng)
        return {name: params[name] for name in (msgfm.ENCODER, msgfm.EMBED.format(TAUGHT))}

    def cosine(projector: Tree, teacher: Tree, merged: FeatureMap, batch: Tree) -> tuple[Scalar, Scalar]:
        def compared(projector: Tree, merged: FeatureMap) -> Scalar:
            image = stretched(normalised(contract, TAUGHT, batch["own"])[0], settings.img_size)
            target = network.encode(teacher, network.embed(teacher, TAUGHT, image)).merged
            target = jax.lax.stop_gradient(target.mean((1, 2), dtype=jnp.float32))
            student = merged.mean((1, 2), dtype=jnp.float32) @ projector["kernel"] + projector["bias"]
            norms = jnp.linalg.norm(student, axis=-1) * jnp.linalg.norm(target, axis=-1)
            return jnp.mean(jnp.sum(student * target, axis=-1) / jnp.maximum(norms, 1e-8))

        known = batch["sensor"][0] == number
        return jax.lax.cond(known, compared, lambda *_: jnp.float32(0), projector, merged), known

    return Teacher(init, cfg.model.embed_dims * 2 ** (len(cfg.model.depths) - 1), cosine)


def projector(rng: Key, width: int) -> Tree:
    """Parameters of the student's linear layer, started as torch starts a linear layer.

    Args:
        rng: random key.
        width: of the compared features, in and out.

    Returns:
        {"kernel" [width, width], "bias" [width]} float32.
    """
    kernel, bias = jax.random.split(rng)
    return {
        "kernel": torch_linear(kernel, (width, width), jnp.float32),
        "bias": conv_bias(width)(bias, (width,), jnp.float32),
    }


def stretched(image: Image, side: int) -> Image:
    """Square images resized bilinearly with the corner pixels on each other (torch's align_corners=True).

    Args:
        image: [B, H, H, C].
        side: of the result in pixels.

    Returns:
        [B, side, side, C].
    """
    size = image.shape[1]
    positions = jnp.arange(side) * ((size - 1) / max(side - 1, 1))
    weights = jnp.maximum(1.0 - jnp.abs(positions[:, None] - jnp.arange(size)), 0.0)
    return jnp.einsum("ip,jq,bpqc->bijc", weights, weights, image, precision=jax.lax.Precision.HIGHEST)

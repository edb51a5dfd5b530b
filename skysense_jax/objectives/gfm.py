"""GFM's distillation: the student's features beside those of a frozen network that has learnt from other images.

GFM, models/simmim.py and models/teacher.py: an ImageNet Swin-B sees the same image unmasked, at its own size; both
networks are compared at the map after the third merging, averaged over its cells, the student's through a linear layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from skysense_jax.models import msgfm
from skysense_jax.models.msgfm_outputs import normalised
from skysense_jax.nn.patch import conv_bias, torch_linear

TAUGHT = "hr"
"""The sensor whose images the teacher knows; batches of others have no such term."""

Tree = Any


class Teacher(NamedTuple):
    """init(rng) -> the frozen parameters; width: of the compared features; cosine(projector, teacher, merged, batch) ->
    (mean cosine over the batch, 0 for a batch of another sensor; whether it is one of TAUGHT)."""

    init: Callable[[jax.Array], Tree]
    width: int
    cosine: Callable[..., tuple[jax.Array, jax.Array]]


def make_teacher(cfg: Any, contract: Mapping[str, Any]) -> Teacher:
    """The teacher of config.objective.distill: the student's encoder without experts, at its own image size and window.
    ValueError where no batch has images it knows.
    """
    if TAUGHT not in contract["sensors"]:
        raise ValueError(
            f"config.objective.distill.weight: the teacher knows images of {TAUGHT!r}, the model takes "
            f"{', '.join(contract['sensors'])}"
        )
    o, number = cfg.objective.distill, list(contract["sensors"]).index(TAUGHT)
    own = cfg.model.copy_and_resolve_references()
    own.unlock()
    own.moe.stages, own.img_size, own.window = (), int(o.img_size), int(o.window)
    network = msgfm.make_model(own, {**contract, "sensors": {TAUGHT: contract["sensors"][TAUGHT]}})

    def init(rng: jax.Array) -> Tree:
        params = network.init(rng)
        return {name: params[name] for name in (msgfm.ENCODER, msgfm.EMBED.format(TAUGHT))}

    def cosine(projector: Tree, teacher: Tree, merged: jax.Array, batch: Tree) -> tuple[jax.Array, jax.Array]:
        def compared(projector: Tree, merged: jax.Array) -> jax.Array:
            image = stretched(normalised(contract, TAUGHT, batch["own"])[0], own.img_size)
            theirs = network.encode(teacher, network.embed(teacher, TAUGHT, image)).merged
            theirs = jax.lax.stop_gradient(theirs.mean((1, 2), dtype=jnp.float32))
            mine = merged.mean((1, 2), dtype=jnp.float32) @ projector["kernel"] + projector["bias"]
            norms = jnp.linalg.norm(mine, axis=-1) * jnp.linalg.norm(theirs, axis=-1)
            return jnp.mean(jnp.sum(mine * theirs, axis=-1) / jnp.maximum(norms, 1e-8))

        known = batch["sensor"][0] == number
        return jax.lax.cond(known, compared, lambda *_: jnp.float32(0), projector, merged), known

    return Teacher(init, cfg.model.embed_dims * 2 ** (len(cfg.model.depths) - 1), cosine)


def projector(rng: jax.Array, width: int) -> Tree:
    """Parameters of the student's linear layer, started as torch starts one."""
    kernel, bias = jax.random.split(rng)
    return {
        "kernel": torch_linear(kernel, (width, width), jnp.float32),
        "bias": conv_bias(width)(bias, (width,), jnp.float32),
    }


def stretched(image: jax.Array, side: int) -> jax.Array:
    """[B,H,H,C] -> [B,side,side,C] bilinear with the corner pixels on each other (torch's align_corners=True)."""
    size = image.shape[1]
    at = jnp.arange(side) * ((size - 1) / max(side - 1, 1))
    weights = jnp.maximum(1.0 - jnp.abs(at[:, None] - jnp.arange(size)), 0.0)
    return jnp.einsum("ip,jq,bpqc->bijc", weights, weights, image, precision=jax.lax.Precision.HIGHEST)

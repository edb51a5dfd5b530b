"""Parity of the modules behind the encoders: UP head, fusion, DINO head (see tests.parity.command)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from skysense_jax.convert import keymap
from skysense_jax.nn.fusion import Fusion
from skysense_jax.nn.heads import DINOHead, UPHead
from tests.parity.case import Arrays, Case, Variant, differentiate, eps_of, join, load, merged, nchw, nhwc, take
from tests.parity.names import dino_head_entries


def uphead(case: Case) -> Arrays:
    """The UP head."""
    return merged(_uphead(case, variant) for variant in case.variants())


def _uphead(case: Case, variant: Variant) -> Arrays:
    a = take(case.arguments(variant), {}, in_dim=0, out_dim=0, up_scale=4)
    module, entries = UPHead(a["out_dim"], a["up_scale"], case.dtype), keymap.uphead_entries()
    x, name = nhwc(variant.x), variant.name
    params = load(module, entries, case.weights, x.shape)

    def run(p: Any, x: jax.Array) -> jax.Array:
        return module.apply({"params": p}, x)

    if (stored := case.cotangent(name)) is None:
        return {join("y", name): nchw(jax.jit(run)(params, x))}
    g = nhwc(stored)
    y, _, gradients, dx = differentiate(run, lambda y: jnp.sum(y * g), params, x, entries)
    return {join("y", name): nchw(y), join("dx", name): nchw(dx)} | gradients


def fusion_arguments(args: Mapping[str, Any]) -> dict[str, Any]:
    a = take(
        args,
        {
            "with_cls_token": True,
            "output_cls_token": True,
            "final_norm": False,
            "qkv_bias": True,
            "num_fcs": 2,
            "require_two": False,
        },
        input_dims=2816,
        embed_dims=1024,
        num_layers=24,
        num_heads=16,
        mlp_ratio=4,
        norm_cfg=None,
    )
    return {
        "width": a["embed_dims"],
        "depth": a["num_layers"],
        "heads": a["num_heads"],
        "mlp_ratio": a["mlp_ratio"],
        "eps": eps_of(a["norm_cfg"]),
    }


SLICES = {"": np.s_[:, 0], "two": np.s_[:, :2], "tokens": np.s_[:, 1:]}
"""Last word of an output's name -> its tokens."""


def fusion(case: Case) -> Arrays:
    """The fusion transformer: `y` at the extra token, `y_two`, `y_tokens`, and `y_block<i>` of all tokens."""
    return merged(_fusion(case, variant) for variant in case.variants())


def _fusion(case: Case, variant: Variant) -> Arrays:
    module = Fusion(**fusion_arguments(case.arguments(variant)), dtype=case.dtype)
    entries, x, name = keymap.fusion_entries(module.depth), jnp.asarray(variant.x), variant.name
    params = load(module, entries, case.weights, x.shape)
    stored = {word: case.cotangent(name, word) for word in SLICES}
    cotangents = {word: g for word, g in stored.items() if g is not None}

    def run(p: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return module.apply({"params": p}, x, emit=True)

    def weigh(outputs: tuple[jax.Array, jax.Array]) -> Any:
        return sum(jnp.sum(outputs[0][SLICES[word]] * g) for word, g in cotangents.items())

    out: Arrays = {}
    if cotangents:
        (tokens, every), _, gradients, dx = differentiate(run, weigh, params, x, entries)
        out |= gradients | {join("dx", name): dx}
    else:
        tokens, every = jax.jit(run)(params, x)
    out |= {join("y", name, word): tokens[where] for word, where in SLICES.items()}
    return out | {join("y", name, f"block{i}"): every[i] for i in range(module.depth)}


def dino_head(case: Case) -> Arrays:
    """The DINO head: `y` with the stored gain of the last layer, `y_g1` with the gain that training fixes at 1."""
    return merged(_dino_head(case, variant, word) for variant in case.variants() for word in ("", "g1"))


def _dino_head(case: Case, variant: Variant, word: str) -> Arrays:
    if (key := join("y", variant.name, word)) not in case.arrays:
        return {}
    a = take(
        case.arguments(variant),
        {"use_bn": False},
        in_dim=0,
        out_dim=0,
        hidden_dim=2048,
        bottleneck_dim=256,
        nlayers=3,
        norm_last_layer=True,
    )
    gain, x = not word, jnp.asarray(variant.x)
    module = DINOHead(a["hidden_dim"], a["bottleneck_dim"], a["out_dim"], a["nlayers"], gain, case.dtype)
    entries = dino_head_entries(a["nlayers"], gain)
    weights = {k: v for k, v in case.weights.items() if gain or k != "last_layer.weight_g"}
    params = load(module, entries, weights, x.shape)

    def run(p: Any, x: jax.Array) -> jax.Array:
        return module.apply({"params": p}, x)

    if (g := case.cotangent(variant.name, word)) is None:
        return {key: jax.jit(run)(params, x)}
    y, _, gradients, dx = differentiate(run, lambda y: jnp.sum(y * g), params, x, entries)
    return {key: y, join("dx", variant.name): dx} | gradients

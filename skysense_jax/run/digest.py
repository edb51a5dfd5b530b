"""Digests of arrays that do not depend on how they are sharded: what tells a damaged checkpoint from a good one.

Orbax reads flipped bytes back without an error (its zstd has no checksum), so every leaf carries 64 bits of our own.
They are two sums modulo 2**32 of the leaf's words times a weight of the position: computed where the leaf lies, the
same on any mesh. Weights are odd, so a change of any single word changes both sums.
"""
from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from skysense_jax.core import trees


def _words(x: jax.Array) -> jax.Array:
    """The bit pattern as uint32, with a last axis of 2 for 64-bit types."""
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    size = x.dtype.itemsize
    if size == 8:
        return jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jax.lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[size]).astype(jnp.uint32)


def leaf_digest(x: jax.Array) -> jax.Array:
    """uint32 [2] of one array of any shape and of a dtype of 1, 2, 4 or 8 bytes."""
    words = _words(jnp.asarray(x))
    index, stride = jnp.zeros(words.shape, jnp.uint32), 1
    for axis in reversed(range(words.ndim)):
        index = index + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= words.shape[axis]
    first = index * jnp.uint32(2654435761) + jnp.uint32(0x9E3779B9)
    second = (index ^ (index >> 16)) * jnp.uint32(0x85EBCA6B)
    second = (second ^ (second >> 13)) * jnp.uint32(0xC2B2AE35)
    mixed = words ^ (words >> 15)  # invertible, so that the second sum is no multiple of the first
    return jnp.stack([jnp.sum(words * (first | 1), dtype=jnp.uint32), jnp.sum(mixed * (second | 1), dtype=jnp.uint32)])


_digest_leaves = jax.jit(lambda leaves: jnp.stack([leaf_digest(leaf) for leaf in leaves]))


def tree_digests(tree: trees.Tree) -> dict[str, str]:
    """name -> "dtype[shape] 16 hex digits" of every leaf; {} for an empty tree."""
    named = trees.flatten(tree)
    if not named:
        return {}
    sums = jax.device_get(_digest_leaves(list(named.values())))
    pairs = zip(named.items(), sums, strict=True)
    return {name: f"{describe(leaf)} {hexadecimal(pair)}" for (name, leaf), pair in pairs}


def describe(leaf: Any) -> str:
    """dtype and shape of a leaf, as the digests spell it: float32[3,4]."""
    return f"{leaf.dtype}[{','.join(str(n) for n in leaf.shape)}]"


def hexadecimal(pair: Any) -> str:
    """Two uint32 as 16 hex digits."""
    return f"{int(pair[0]):08x}{int(pair[1]):08x}"

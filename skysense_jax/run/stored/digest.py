"""Digests of arrays that do not depend on how they are sharded: what tells a damaged checkpoint from a good one.

Orbax reads flipped bytes back without an error (its zstd has no checksum), so every leaf carries a digest of 64 bits.
They are two sums modulo 2**32 of the leaf's words times a weight of the position: a sum can be taken shard by shard,
wherever the shards lie, and is the same on any mesh. Weights are odd, so a change of any single word changes both sums.

Checkpoints are digested on the host (compiling a reduction for every shape costs far more than the sums); `leaf_digest`
is the same sum inside a jitted step.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from skysense_jax.core import trees

_BLOCK = 2**18  # words digested at once: the temporaries stay in the processor's cache


def _mix(words: Any, index: Any) -> tuple[Any, Any]:
    """The two products whose sums are the digest; words and index are uint32 arrays of numpy or jax."""
    u = np.uint32
    first = index * u(2654435761) + u(0x9E3779B9)
    second = (index ^ (index >> u(16))) * u(0x85EBCA6B)
    second = (second ^ (second >> u(13))) * u(0xC2B2AE35)
    mixed = words ^ (words >> u(15))  # invertible, so that the second sum is no multiple of the first
    return words * (first | u(1)), mixed * (second | u(1))


def leaf_digest(x: jax.Array) -> jax.Array:
    """uint32 [2] of one array of a 4-byte dtype, traceable and on any sharding."""
    words = jax.lax.bitcast_convert_type(x, jnp.uint32)
    index, stride = jnp.zeros(words.shape, jnp.uint32), 1
    for axis in reversed(range(words.ndim)):
        index = index + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= words.shape[axis]
    return jnp.stack([jnp.sum(product, dtype=jnp.uint32) for product in _mix(words, index)])


def _shards(leaf: Any) -> Iterator[tuple[np.ndarray, tuple[int, ...]]]:
    """This process's part of a leaf, each element once over all processes: (values, offset in the whole)."""
    if isinstance(leaf, jax.Array):
        for shard in leaf.addressable_shards:
            if shard.replica_id == 0:
                yield np.asarray(shard.data), tuple(extent.start or 0 for extent in shard.index)
    elif jax.process_index() == 0:
        yield np.asarray(leaf), (0,) * np.ndim(leaf)


def _sums(leaf: Any) -> np.ndarray:
    """uint32 [2] of this process's part of a leaf, of any dtype of 1, 2, 4 or 8 bytes."""
    total = np.zeros(2, np.uint32)
    strides = np.cumprod([1, *leaf.shape[:0:-1]], dtype=np.uint64)[::-1]  # in elements, row-major
    for values, offset in _shards(leaf):
        index = np.zeros((1,) * values.ndim, np.uint32)
        for axis, start in enumerate(offset):
            positions = np.arange(start, start + values.shape[axis], dtype=np.uint64) * strides[axis]
            index = index + positions.astype(np.uint32).reshape(-1, *(1,) * (values.ndim - 1 - axis))
        flat, index = np.ascontiguousarray(values).reshape(-1), index.reshape(-1)
        if flat.itemsize == 8:
            flat, index = flat.view(np.uint32), np.stack([2 * index, 2 * index + 1], -1).reshape(-1)
        words = flat.view({1: np.uint8, 2: np.uint16, 4: np.uint32}[flat.itemsize])
        for begin in range(0, words.size, _BLOCK):
            block = slice(begin, begin + _BLOCK)
            products = _mix(words[block].astype(np.uint32), index[block])
            total = total + np.array([np.sum(product, dtype=np.uint32) for product in products])
    return total


def tree_digests(tree: trees.Tree) -> dict[str, str]:
    """Digests of every leaf of a tree, numpy or jax, over all processes; {} for an empty tree.

    A digest is spelt "dtype[shape] 16 hex digits".
    """
    named = trees.flatten(tree)
    if not named:
        return {}
    sums = np.stack([_sums(leaf) for leaf in named.values()])
    if jax.process_count() > 1:
        sums = multihost_utils.process_allgather(sums).sum(0, dtype=np.uint32)
    pairs = zip(named.items(), sums, strict=True)
    return {name: f"{describe(leaf)} {hexadecimal(pair)}" for (name, leaf), pair in pairs}


def describe(leaf: trees.Shaped) -> str:
    """The dtype and shape of a leaf, as the digests spell them: float32[3,4]."""
    return f"{leaf.dtype}[{','.join(str(n) for n in leaf.shape)}]"


def hexadecimal(pair: np.ndarray | jax.Array) -> str:
    """Two uint32 as 16 hex digits."""
    return f"{int(pair[0]):08x}{int(pair[1]):08x}"

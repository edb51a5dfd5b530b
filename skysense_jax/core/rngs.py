"""Stateless random streams: a key is a function of (seed, name, step), so there is no generator to checkpoint.

Two streams never share a key because the name enters as a hash; adding a stream leaves the others as they were.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import jax


def name_hash(name: str) -> int:
    """31-bit CRC-32 of the name: the same in every process, version and run (Python's own hash() is salted)."""
    return zlib.crc32(name.encode()) & 0x7FFFFFFF


def key(seed: int, name: str, step: int | jax.Array = 0) -> jax.Array:
    """Typed threefry key of the stream `name` at `step`; `step` may be traced (int32)."""
    base = jax.random.key(seed, impl="threefry2x32")
    return jax.random.fold_in(jax.random.fold_in(base, name_hash(name)), step)


def keys(seed: int, names: Sequence[str], step: int | jax.Array = 0) -> dict[str, jax.Array]:
    """One key per stream name, see :func:`key`. Raises ValueError where two names hash alike."""
    if len({name_hash(name) for name in names}) != len(names):
        raise ValueError(f"stream names repeat or collide: {list(names)}")
    return {name: key(seed, name, step) for name in names}

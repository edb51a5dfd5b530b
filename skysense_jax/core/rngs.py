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
    """The key of one stream at one step.

    Args:
        seed: of the run.
        name: of the stream.
        step: of the run; may be traced (int32 scalar).

    Returns:
        A typed threefry key (scalar).
    """
    base = jax.random.key(seed, impl="threefry2x32")
    return jax.random.fold_in(jax.random.fold_in(base, name_hash(name)), step)


def keys(seed: int, names: Sequence[str], step: int | jax.Array = 0) -> dict[str, jax.Array]:
    """One key per stream name, see :func:`key`.

    Args:
        seed: of the run.
        names: of the streams.
        step: of the run; may be traced (int32 scalar).

    Returns:
        Name of a stream -> its key.

    Raises:
        ValueError: a name repeats, or two names have the same hash.
    """
    if len({name_hash(name) for name in names}) != len(names):
        raise ValueError(f"stream names repeat or collide: {list(names)}")
    return {name: key(seed, name, step) for name in names}

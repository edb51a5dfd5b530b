"""Trees of arrays on disk: Orbax checkpointables whose leaves have digests and whose JSON parts have seals.

Orbax reads flipped bytes back without an error, so what is written here carries digests (run.stored.digest), and what
is read is checked against them.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from orbax.checkpoint import v1 as ocp

from skysense_jax.core import paths, trees
from skysense_jax.run.stored import digest

UNREADABLE = (OSError, ValueError, KeyError, TypeError, RuntimeError)
"""What Orbax, tensorstore and json raise on truncated, missing or altered files."""


class Damaged(ValueError):
    """A checkpoint that cannot be trusted; the message names what is wrong with it."""


def seal(value: object) -> str:
    """SHA-256 of a JSON value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def context() -> ocp.Context:
    """Orbax's context for these trees, in which "data" and "meta" are JSON."""
    registry = ocp.handlers.local_registry(include_global_registry=True)
    for name in ("data", "meta"):  # a dict would otherwise be stored as arrays; as JSON it can be read with `cat`
        registry.add(ocp.handlers.JsonHandler, checkpointable_name=name)
    json_context = ocp.Context()
    json_context.checkpointables.registry = registry
    return json_context


def first_line(error: BaseException) -> str:
    """The cause, from the end of the chain: Orbax wraps it in errors that do not say it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"


def read_sealed(path: epath.Path, *names: str) -> dict[str, Any]:
    """Reads JSON parts of a folder and checks the seal of its meta, which it takes off.

    Args:
        path: of the folder.
        *names: of the parts, "meta" among them.

    Returns:
        Name of a part -> its value.

    Raises:
        Damaged: they cannot be read, or the seal does not fit.
    """
    try:
        values = dict(ocp.load_checkpointables(path, dict.fromkeys(names)))
    except UNREADABLE as error:
        raise Damaged(f"{path}: {' or '.join(names)} cannot be read: {first_line(error)}") from error
    values["meta"] = dict(values["meta"])
    if values["meta"].pop("seal", None) != seal(values["meta"]):
        raise Damaged(f"{path}: meta was altered: its seal does not fit")
    return values


def load(
    folder: pathlib.Path | str, step: int | str, shapes: Mapping[str, trees.Tree], meta: Mapping[str, Any]
) -> dict[str, trees.Tree]:
    """Reads trees of a folder and checks every leaf against its digest.

    Args:
        folder: above the folder to read.
        step: name of the folder to read.
        shapes: name of a tree -> shapes with shardings, or numpy arrays to read into.
        meta: of the folder; it has the digests.

    Returns:
        Name of a tree -> the tree.

    Raises:
        Damaged: a tree cannot be read, or a leaf has another digest.
    """
    path = paths.absolute(folder) / str(step)
    try:
        loaded = ocp.load_checkpointables(path, dict(shapes))
    except UNREADABLE as error:
        raise Damaged(f"{', '.join(shapes)} cannot be read: {first_line(error)}") from error
    for name in shapes:
        computed, stored = digest.tree_digests(loaded[name]), meta["digests"][name]
        wrong = [leaf for leaf in stored if computed.get(leaf) != stored[leaf]]
        if wrong:
            first = wrong[0]
            raise Damaged(
                f"{len(wrong)} leaves do not have the digest they were saved with, first {name}/{first}: "
                f"saved {stored[first]}, read {computed.get(first)}"
            )
    return loaded


def write_tree(folder: pathlib.Path | str, name: str, tree: trees.Tree) -> None:
    """Writes one tree alone, FOLDER/NAME, with a digest of every leaf.

    It is for weights that come module by module. An older tree of that name is replaced.

    Args:
        folder: where it goes.
        name: of the tree.
        tree: numpy or jax arrays.
    """
    body = {"digests": {name: digest.tree_digests(tree)}}
    tree = jax.tree.map(jax.device_put, tree)  # no copy on a CPU; Orbax copies numpy arrays once more before it writes
    with context():
        ocp.save_checkpointables(
            paths.absolute(folder) / name, {name: tree, "meta": {**body, "seal": seal(body)}}, overwrite=True
        )


def read_tree(folder: pathlib.Path | str, name: str) -> trees.Tree:
    """Reads the tree that :func:`write_tree` wrote.

    Args:
        folder: as it was written.
        name: of the tree.

    Returns:
        The tree as numpy arrays.

    Raises:
        FileNotFoundError: there is no such tree.
        Damaged: it cannot be trusted.
    """
    path = paths.absolute(folder) / name
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such part of the weights")
    meta = read_sealed(path, "meta")["meta"]
    return load(path.parent, path.name, {name: empty_tree(meta["digests"][name])}, meta)[name]


def empty_tree(digests: Mapping[str, str]) -> trees.Tree:
    """Arrays to read into, from the digests of a tree."""
    return trees.nest({leaf: _empty_like(text.split()[0]) for leaf, text in digests.items()})


def _empty_like(text: str) -> np.ndarray:
    """An array to read into, from digest.describe's spelling."""
    dtype, shape = text.removesuffix("]").split("[")
    return np.empty([int(n) for n in shape.split(",") if n], np.dtype(jax.numpy.dtype(dtype)))

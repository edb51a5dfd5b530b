"""Everything a run remembers, as one tree, and how that tree is made and spread over a mesh."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from skysense_jax.core import mesh as meshes
from skysense_jax.core import rngs, sharding, trees
from skysense_jax.core.hardware import xla_flags
from skysense_jax.run import optim


class TrainState(NamedTuple):
    """The state of a run: arrays, or in their place their shapes or shardings.

    Attributes:
        step: int32, batches consumed.
        params: what the optimiser updates (objectives.base).
        opt: {"count", "mu", "nu"}, Adam's state.
        teacher: an objective's moving average (objectives.base).
        memory: an objective's state without gradient (objectives.base).
        skipped: int32, updates dropped because a gradient was not finite.
    """

    step: trees.Tree
    params: trees.Tree
    opt: trees.Tree
    teacher: trees.Tree
    memory: trees.Tree
    skipped: trees.Tree


class Initialisable(Protocol):
    """What a state needs of an objective (`objectives.base.Objective`, which this module may not import)."""

    @property
    def init(self) -> Callable[[jax.Array, trees.Tree], tuple[trees.Tree, trees.Tree, trees.Tree]]:
        """(key, batch) -> params, teacher, memory."""
        ...

    @property
    def rules(self) -> trees.Rules:
        """Strict sharding rules over the names of the three trees."""
        ...


def batch_shapes(spec: trees.Tree, mesh: Mesh) -> trees.Tree:
    """The global batch as jax will hold it.

    Args:
        spec: tree of leaves with shape and dtype.
        mesh: of the run.

    Returns:
        A tree like it of ShapeDtypeStructs whose leading axis is split over the mesh.

    Raises:
        ValueError: the batch does not divide by the devices.
    """
    placed = meshes.batch_sharding(mesh)

    def leaf(entry: trees.Shaped) -> jax.ShapeDtypeStruct:
        if entry.shape[0] % placed.num_devices:
            raise ValueError(
                f"config.data.batch={entry.shape[0]} does not divide by the {placed.num_devices} devices of the mesh"
            )
        return jax.ShapeDtypeStruct(tuple(entry.shape), jax.dtypes.canonicalize_dtype(entry.dtype), sharding=placed)

    return jax.tree.map(leaf, spec, is_leaf=lambda entry: hasattr(entry, "shape") and hasattr(entry, "dtype"))


def put_batch(batch: trees.Tree, shapes: trees.Tree) -> trees.Tree:
    """Puts a process's local batch into the global arrays; 64-bit integers become jax's 32 bits.

    Args:
        batch: numpy arrays of this process's places.
        shapes: of the global batch, with shardings.

    Returns:
        The global batch.
    """

    def leaf(array: np.ndarray, like: jax.ShapeDtypeStruct) -> jax.Array:
        local = np.ascontiguousarray(array, dtype=like.dtype)
        return jax.make_array_from_process_local_data(like.sharding, local, like.shape)

    return jax.tree.map(leaf, batch, shapes)


def init_state(objective: Initialisable, spec: trees.Tree, seed: int) -> TrainState:
    """The state before the first step, a function of the seed alone; to be jitted or shape-evaluated.

    Args:
        objective: what is trained.
        spec: of the global batch, leaves with shape and dtype.
        seed: of the run.

    Returns:
        The state.
    """
    params, teacher, memory = objective.init(rngs.key(seed, "init"), spec)
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, params, optim.init(params), teacher, memory, zero)


def state_shapes(
    objective: Initialisable, spec: trees.Tree, seed: int, mesh: Mesh, small: int = sharding.SMALL
) -> TrainState:
    """The state as ShapeDtypeStructs with shardings, by the objective's rules; nothing is allocated.

    Args:
        objective: what is trained.
        spec: of the global batch, leaves with shape and dtype.
        seed: of the run.
        mesh: of the run.
        small: bytes below which a leaf stays replicated.

    Returns:
        The shapes.

    Raises:
        ValueError: as core.sharding.
    """
    shapes = jax.eval_shape(lambda: init_state(objective, spec, seed))
    ruled = {"params": shapes.params, "teacher": shapes.teacher, "memory": shapes.memory}
    placed = sharding.shardings(ruled, objective.rules, mesh, small)
    whole = meshes.replicated(mesh)
    opt = {"count": whole, "mu": placed["params"], "nu": placed["params"]}
    all_placed = TrainState(whole, placed["params"], opt, placed["teacher"], placed["memory"], whole)
    return jax.tree.map(lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), shapes, all_placed)


def create(objective: Initialisable, spec: trees.Tree, seed: int, shapes: TrainState) -> TrainState:
    """Makes the state before the first step sharded: no device ever holds more than its shards.

    Args:
        objective: what is trained.
        spec: of the global batch, leaves with shape and dtype.
        seed: of the run.
        shapes: of the state, with shardings (:func:`state_shapes`).

    Returns:
        The state on its mesh.
    """
    placed = jax.tree.map(lambda leaf: leaf.sharding, shapes)
    options = xla_flags.ONCE.get(jax.default_backend())
    return jax.jit(lambda: init_state(objective, spec, seed), out_shardings=placed, compiler_options=options)()

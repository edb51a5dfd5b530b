"""Everything a run remembers, as one tree, and how that tree is made and spread over a mesh."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from skysense_jax.core import mesh as meshes
from skysense_jax.core import rngs, sharding, trees, xla_flags
from skysense_jax.run import optim


class TrainState(NamedTuple):
    """step: int32, batches consumed. params, teacher, memory: an objective's trees (objectives.base). opt: {"count",
    "mu", "nu"}.
    skipped: int32, updates dropped because a gradient was not finite."""

    step: Any
    params: Any
    opt: Any
    teacher: Any
    memory: Any
    skipped: Any


def batch_shapes(spec: trees.Tree, mesh: Mesh) -> trees.Tree:
    """The batch as jax will hold it: ShapeDtypeStructs, leading axis split over the mesh. spec: leaves with shape and
    dtype.

    Raises ValueError where the batch does not divide by the devices.
    """
    placed = meshes.batch_sharding(mesh)

    def leaf(entry: Any) -> jax.ShapeDtypeStruct:
        if entry.shape[0] % placed.num_devices:
            raise ValueError(
                f"config.data.batch={entry.shape[0]} does not divide by the {placed.num_devices} devices of the mesh"
            )
        return jax.ShapeDtypeStruct(tuple(entry.shape), jax.dtypes.canonicalize_dtype(entry.dtype), sharding=placed)

    return jax.tree.map(leaf, spec, is_leaf=lambda entry: hasattr(entry, "shape") and hasattr(entry, "dtype"))


def put_batch(batch: trees.Tree, shapes: trees.Tree) -> trees.Tree:
    """A process's local batch (numpy) as its part of the global arrays `shapes`; 64-bit integers become jax's 32
    bits.
    """

    def leaf(array: np.ndarray, like: jax.ShapeDtypeStruct) -> jax.Array:
        local = np.ascontiguousarray(array, dtype=like.dtype)
        return jax.make_array_from_process_local_data(like.sharding, local, like.shape)

    return jax.tree.map(leaf, batch, shapes)


def init_state(objective: Any, spec: trees.Tree, seed: int) -> TrainState:
    """The state before the first step, a function of the seed alone; meant to be jitted or shape-evaluated."""
    params, teacher, memory = objective.init(rngs.key(seed, "init"), spec)
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, params, optim.init(params), teacher, memory, zero)


def state_shapes(objective: Any, spec: trees.Tree, seed: int, mesh: Mesh, small: int = sharding.SMALL) -> TrainState:
    """The state as ShapeDtypeStructs with shardings, by the objective's rules; nothing is allocated. Errors:
    core.sharding.
    """
    shapes = jax.eval_shape(lambda: init_state(objective, spec, seed))
    ruled = {"params": shapes.params, "teacher": shapes.teacher, "memory": shapes.memory}
    placed = sharding.shardings(ruled, objective.rules, mesh, small)
    whole = meshes.replicated(mesh)
    opt = {"count": whole, "mu": placed["params"], "nu": placed["params"]}
    all_placed = TrainState(whole, placed["params"], opt, placed["teacher"], placed["memory"], whole)
    return jax.tree.map(lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), shapes, all_placed)


def create(objective: Any, spec: trees.Tree, seed: int, shapes: TrainState) -> TrainState:
    """The state before the first step, made sharded: no device ever holds more than its part."""
    placed = jax.tree.map(lambda leaf: leaf.sharding, shapes)
    options = xla_flags.ONCE.get(jax.default_backend())
    return jax.jit(lambda: init_state(objective, spec, seed), out_shardings=placed, compiler_options=options)()

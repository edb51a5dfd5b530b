"""Shardings from rules over parameter names, with an account of what stays replicated.

A rule is ``(pattern, tactic)`` over the names of :mod:`skysense_jax.core.trees`; tactics:

``fsdp``       split the largest dimension that the ``fsdp`` axis divides (of equal ones the first: the last is the one
               a TPU pads to 128). Leaves below 1 MiB are replicated and counted: gathering them costs more latency
               than they weigh. A larger leaf none of whose dimensions divides is an error.
``replicate``  the whole value on every device; an error from 1 MiB on.
``expert``     stacked weights of experts, [layers, experts, ...]: the experts over the ``expert`` axis, the rest as
               ``fsdp``. An error where the axis does not divide their number.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from skysense_jax.core import trees
from skysense_jax.core.mesh import batch_axes

SMALL = 2**20
"""Bytes below which a leaf may stay replicated (issue: no parameter above 1 MiB stays replicated)."""

TACTICS = ("fsdp", "replicate", "expert")


def gathered(weight: jax.Array, user: jax.Array | None = None, experts: bool = False) -> jax.Array:
    """A weight as its layer multiplies with it: whole on every device, gathered where it is used and nowhere else.

    Left to itself the partitioner keeps the weights split and gathers the activations, which are a hundred times larger
    in these models. The cotangent is not constrained: it is reduced straight into the shards of the parameter. Where
    nothing is split (no `jax.set_mesh`, or an fsdp axis of 1) this is the identity.

    Args:
        weight: a parameter; cast it to the computing dtype first, so that half the bytes travel.
        user: the array that the weight is multiplied with, in a layer that is scanned over: the gather then waits for
            that array. Without it, differentiation moves the gathers of all layers in front of the loop, and the whole
            model is in memory at once.
        experts: whether the first axis counts experts and stays split over the mesh's expert axis.

    Returns:
        The same values, constrained to be whole on every device (but for the experts).
    """
    if jax.sharding.get_abstract_mesh().shape.get("fsdp", 1) == 1:
        return weight
    if user is not None:
        weight, _ = jax.lax.optimization_barrier((weight, jax.lax.stop_gradient(user[(0,) * user.ndim])))
    split = experts and jax.sharding.get_abstract_mesh().shape.get("expert", 1) > 1
    return _placed(weight, PartitionSpec("expert" if split else None))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _placed(weight: jax.Array, spec: PartitionSpec) -> jax.Array:
    return jax.lax.with_sharding_constraint(weight, spec)


_placed.defvjp(lambda weight, spec: (_placed(weight, spec), None), lambda spec, _, cotangent: (cotangent,))


def by_expert(x: jax.Array, axis: int) -> jax.Array:
    """Splits an array of experts over the mesh's expert axis, so that tokens travel to their experts.

    Every other axis stays free for the partitioner.

    Args:
        x: an array with an axis of experts.
        axis: number of that axis.

    Returns:
        The same values, constrained; `x` itself where the mesh has no expert axis.
    """
    if jax.sharding.get_abstract_mesh().shape.get("expert", 1) == 1:
        return x
    free = PartitionSpec.UNCONSTRAINED
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*("expert" if i == axis else free for i in range(x.ndim))))


def one_each(weight: jax.Array) -> jax.Array:
    """Copies of a weight, [devices of batch_axes, ...]: a whole copy on each device that has a shard of the batch.

    They are for a loop over the rows of a batch. The gradient that the loop's steps sum up stays on the device, and is
    reduced over the devices once, where the copies become a single weight again. With a weight that all devices share,
    the gradient of every step would be reduced.
    """
    axes = batch_axes()
    copies = jnp.broadcast_to(weight, (math.prod(axes.values()), *weight.shape))
    return jax.lax.with_sharding_constraint(copies, PartitionSpec(tuple(axes)))


class Report(NamedTuple):
    """What a sharding of one tree costs.

    Attributes:
        total: bytes of the whole tree.
        replicated: bytes of the leaves that every device holds whole.
        per_device: bytes that one device holds.
        specs: name of a leaf -> its dtype, shape and PartitionSpec, as text.
    """

    total: int
    replicated: int
    per_device: int
    specs: dict[str, str]


def leaf_spec(
    name: str, leaf: trees.Shaped, tactic: str, mesh_axes: Mapping[str, int], small: int = SMALL
) -> PartitionSpec:
    """The PartitionSpec of one leaf.

    Args:
        name: of the leaf, for the errors.
        leaf: anything with shape and dtype.
        tactic: of TACTICS.
        mesh_axes: name of a mesh axis -> its size.
        small: bytes below which a leaf stays replicated.

    Returns:
        Its PartitionSpec.

    Raises:
        ValueError: names the leaf, where its tactic is unknown or cannot hold.
    """
    if tactic not in TACTICS:
        raise ValueError(f"sharding of {name}: unknown tactic {tactic!r}; tactics are {', '.join(TACTICS)}")
    n, size = mesh_axes.get("fsdp", 1), trees.size_bytes(leaf)
    placed: dict[int, str] = {}
    if tactic == "expert" and mesh_axes.get("expert", 1) > 1:
        if leaf.shape[1] % mesh_axes["expert"]:
            raise ValueError(
                f"sharding of {name}: {leaf.shape[1]} experts do not divide by the expert axis of {mesh_axes['expert']}"
            )
        placed, size = {1: "expert"}, size // mesh_axes["expert"]
    if tactic == "replicate" and n > 1 and size >= SMALL:
        raise ValueError(
            f"sharding of {name}: {size} bytes may not stay replicated on {n} devices; use the tactic fsdp"
        )
    if tactic != "replicate" and n > 1 and size >= small:
        candidates = [axis for axis, length in enumerate(leaf.shape) if length % n == 0 and axis not in placed]
        if not candidates:
            raise ValueError(f"sharding of {name}: no dimension of {tuple(leaf.shape)} divides by the fsdp axis of {n}")
        placed[max(candidates, key=lambda i: (leaf.shape[i], -i))] = "fsdp"
    return PartitionSpec(*(placed.get(i) for i in range(max(placed, default=-1) + 1)))


def shardings(tree: trees.Tree, rules: trees.Rules, mesh: Mesh, small: int = SMALL) -> trees.Tree:
    """The sharding of every leaf of a tree by strict rules.

    Args:
        tree: arrays or shapes.
        rules: (pattern, tactic) over the names of the leaves.
        mesh: the devices.
        small: bytes below which a leaf stays replicated.

    Returns:
        A tree like `tree` of NamedShardings.

    Raises:
        ValueError: as :func:`trees.match` and :func:`leaf_spec`; the errors name the leaf.
    """
    tactics = trees.match(list(trees.flatten(tree)), rules, "sharding")
    axes = dict(mesh.shape)
    return trees.map_named(
        lambda name, leaf: NamedSharding(mesh, leaf_spec(name, leaf, tactics[name], axes, small)), tree
    )


def report(tree: trees.Tree, tree_shardings: trees.Tree) -> Report:
    """What a sharding costs.

    Args:
        tree: arrays or shapes.
        tree_shardings: a tree like it of shardings.

    Returns:
        Its costs; a leaf counts as replicated when every device holds all of it.
    """
    specs, total, replicated, per_device = {}, 0, 0, 0
    for (name, leaf), placed in zip(trees.flatten(tree).items(), jax.tree.leaves(tree_shardings), strict=True):
        size = trees.size_bytes(leaf)
        shard = leaf.dtype.itemsize
        for length in placed.shard_shape(tuple(leaf.shape)):
            shard *= length
        total, per_device = total + size, per_device + shard
        replicated += size if placed.is_fully_replicated else 0
        specs[name] = f"{leaf.dtype}{list(leaf.shape)} {placed.spec}"
    return Report(total, replicated, per_device, specs)

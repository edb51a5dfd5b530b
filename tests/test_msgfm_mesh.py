"""The msGFM step on any mesh is the step of one device."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import numpy as np
import pytest

from skysense_jax import recipes
from skysense_jax.configs import msgfm_tiny
from skysense_jax.core import mesh as meshes
from skysense_jax.core import trees
from skysense_jax.core.hardware import xla_flags
from skysense_jax.objectives import msgfm as msgfm_objective
from skysense_jax.run import optim, state, step
from skysense_jax.run import plan as plans
from skysense_jax.run.log import metrics
from tests.helpers.msgfm_losses import batch_of

MESHES = ((1, 8, 1), (2, 1, 4), (2, 2, 2), (1, 4, 2))
"""data x fsdp x expert of eight devices; four experts."""


def two_sensors() -> Any:
    """The tiny configuration without hr and the surface model: half as much to compile."""
    return msgfm_tiny.get_config("s2,s1")


@functools.cache
def begin() -> state.TrainState:
    """The state before the first step, made once: that a state does not depend on its mesh is test_sharding.py's."""
    c = two_sensors()
    objective = msgfm_objective.make_objective(c, plans.make_contract(c))
    return jax.jit(lambda: state.init_state(objective, {}, c.seed))()


@functools.cache
def on_mesh(shape: tuple[int, int, int]) -> tuple[Any, Any, Any]:
    """(state, metrics, names of leaves that are split over each axis) after one step of a batch of s2."""
    c = two_sensors()
    contract = plans.make_contract(c)
    objective = msgfm_objective.make_objective(c, contract)
    mesh = meshes.make_mesh(
        dict(zip(("data", "fsdp", "expert"), shape, strict=True)), jax.devices()[: math.prod(shape)]
    )
    batch = state.batch_shapes(recipes.recipe_of(c).batch_spec(c, contract), mesh)
    shapes = state.state_shapes(objective, batch, c.seed, mesh, 256)
    advance = step.make_step(objective, c, optim.decay_mask(shapes.params))
    placed = jax.tree.map(lambda leaf: leaf.sharding, shapes)
    with jax.set_mesh(mesh):
        compiled = (
            jax.jit(advance, out_shardings=(placed, meshes.replicated(mesh)))
            .lower(shapes, batch)
            .compile(compiler_options=xla_flags.ONCE["cpu"])
        )
        now, measured = compiled(jax.device_put(begin(), placed), state.put_batch(batch_of(c, "s2"), batch))
    split = {
        axis: {name for name, leaf in trees.flatten(shapes.params).items() if axis in leaf.sharding.spec}
        for axis in ("fsdp", "expert")
    }
    return jax.device_get(now), metrics.plain(measured), split


@pytest.mark.parametrize("shape", MESHES)
def test_a_step_on_every_mesh_is_the_step_of_one_device(shape):
    alone, wanted, _ = on_mesh((1, 1, 1))
    now, measured, split = on_mesh(shape)
    assert (len(split["fsdp"]) > 20) == (shape[1] > 1)
    experts = {f"encoder/encoder/stage1/pairs0/shifted/moe/{name}" for name in ("fc1", "fc1_bias", "fc2", "fc2_bias")}
    assert split["expert"] == (experts if shape[2] > 1 else set())
    for name, value in wanted.items():
        if isinstance(value, float):
            assert abs(measured[name] - value) <= 1e-5 * max(1.0, abs(value)), name
        else:
            assert measured[name] == value, name
    ours, theirs = ([np.asarray(x, np.float64) for x in jax.tree.leaves(one.opt["mu"])] for one in (now, alone))

    def norm(leaves):
        return math.sqrt(sum(float(np.sum(np.square(leaf))) for leaf in leaves))

    assert norm([a - b for a, b in zip(ours, theirs, strict=True)]) < 1e-5 * norm(theirs)


def test_experts_that_do_not_divide_are_named():
    c = two_sensors()
    mesh = meshes.make_mesh({"data": 1, "fsdp": 1, "expert": 8})
    c.model.moe.experts = 6
    with pytest.raises(ValueError, match="shifted/moe/fc1: 6 experts do not divide by the expert axis of 8"):
        plans.make_plan(c, plans.make_contract(c), mesh)

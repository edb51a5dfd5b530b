"""The smallest objective that honours objectives.base: for tests of the run, not of a model. It compiles in a second.

A linear map of the mean S2 spectrum of the global views is pulled to the teacher's; the memory counts what was settled.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from skysense_jax import recipes
from skysense_jax.core import mesh as meshes
from skysense_jax.data.batches import spec
from skysense_jax.objectives.base import Objective
from skysense_jax.ops.ema import ema
from skysense_jax.run import plan as plans
from skysense_jax.run import state
from tests.helpers import toy_config


def config(dataset: str) -> Any:
    """The tiny configuration with the toy objective, for eight devices."""
    c = toy_config.get_config()
    c.data.dir, c.data.batch = dataset, 8
    return c


def recipe(broken: bool = False, width: int = 512) -> recipes.Recipe:
    """The row of the toy objective: SkySense's batches and fields, another objective."""
    return recipes.RECIPES["skysense"]._replace(
        make_objective=functools.partial(make_objective, broken=broken, width=width)
    )


def make_objective(cfg: Any, contract: Mapping[str, Any], broken: bool = False, width: int = 512) -> Objective:
    """broken: the loss is never a number. width: of the kernel, which is split over fsdp from 1 MiB on."""
    bands = len(contract["sensors"]["s2"]["bands"])

    def init(rng, spec):
        layer = {"kernel": 0.1 * jax.random.normal(rng, (bands, width)), "bias": jnp.zeros(width)}
        params = {"encoder": {"layer": layer}}
        return params, jax.tree.map(jnp.copy, params), {"centre": jnp.zeros(width)}

    def project(params, batch):
        image = batch["global"]["sensors"]["s2"]["image"] / 1000.0
        layer = params["encoder"]["layer"]
        return image.mean((1, 2, 3, 4)) @ layer["kernel"] + layer["bias"]

    def loss(params, teacher, memory, batch, keys, schedule):
        target = 1.0 - project(teacher, batch) + 0.01 * jax.random.normal(keys["noise"], (width,))
        value = jnp.mean((project(params, batch) - target) ** 2)
        value = value * (jnp.nan if broken else 1.0)
        return value, ({"loss/only": value}, {"mean": target.mean(0)})

    def settle(params, teacher, memory, settle_inputs, schedule):
        return ema(teacher, params, schedule["teacher_momentum"]), {"centre": memory["centre"] + settle_inputs["mean"]}

    rules = (("(params|teacher)/encoder/.+", "fsdp"), ("memory/centre", "replicate"))
    return Objective(init, loss, settle, rules, lambda spec: 1e6, ("noise",), ("teacher_momentum",))


def small_state(cfg: Any, small: int = 2**20) -> tuple[Objective, Any, state.TrainState, state.TrainState]:
    """(objective, shapes of the batch, shapes of the state, state) on all devices; leaves of `small` bytes and more are
    split.
    """
    contract = plans.make_contract(cfg)
    mesh = meshes.make_mesh({"data": 2, "fsdp": -1})
    objective = make_objective(cfg, contract)
    batch = state.batch_shapes(spec.views_spec(cfg, contract), mesh)
    shapes = state.state_shapes(objective, batch, cfg.seed, mesh, small)
    return objective, batch, shapes, state.create(objective, batch, cfg.seed, shapes)


def same(a: Any, b: Any) -> bool:
    """Bit for bit, so that a NaN equals itself."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)

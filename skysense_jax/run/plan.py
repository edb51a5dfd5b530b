"""A run before anything is allocated: input contract, batch, objective, shapes with shardings, the compiled step."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from ml_collections import config_dict

from skysense_jax import recipes, sensors
from skysense_jax.core import mesh as meshes
from skysense_jax.core import trees
from skysense_jax.data import records as dataset_records
from skysense_jax.data.batches.spec import Leaf
from skysense_jax.objectives.base import Objective
from skysense_jax.run import optim, state, step
from skysense_jax.run.folder import say


class Plan(NamedTuple):
    """A run before anything is allocated: everything the compiler needs, and what the run folder tells about it.

    Attributes:
        contract: the input contract.
        spec: the global batch as nested dict of `spec.Leaf`.
        objective: what is trained.
        state: the state as shapes with shardings.
        batch: the global batch as shapes with shardings.
        step: (state, batch) -> (state, metrics), to be jitted.
        flops: model FLOPs of one step of the global batch.
    """

    contract: dict[str, Any]
    spec: trees.Tree
    objective: Objective
    state: state.TrainState
    batch: trees.Tree
    step: Callable[[state.TrainState, trees.Tree], tuple[state.TrainState, dict[str, jax.Array]]]
    flops: float


def make_contract(cfg: config_dict.ConfigDict) -> sensors.Contract:
    """The model's input contract: the configuration's bands with the sensor table's or the dataset's statistics.

    Raises:
        ValueError: config.data.statistics names neither, or a dataset has no statistics.
    """
    if cfg.data.statistics not in ("table", "dataset"):
        raise ValueError(f"config.data.statistics={cfg.data.statistics!r}: 'table' or 'dataset'")
    statistics: dict[str, Any] | None = None
    if cfg.data.statistics == "dataset":
        statistics = {}
        for where in (*reversed(cfg.data.get("also", ())), cfg.data.dir):  # the first that knows a sensor counts
            if not (stored := dataset_records.read_metadata(where).get("statistics")):
                raise ValueError(f"{where} has no statistics of its own: run `skysense-jax data stats {where}`")
            statistics |= stored
    return sensors.input_contract(cfg.data.bands.to_dict(), cfg.model.ratio, statistics)


def make_plan(cfg: config_dict.ConfigDict, contract: sensors.Contract, mesh: jax.sharding.Mesh) -> Plan:
    """Spec, objective, shapes, shardings and step from the configuration alone: no data is read, no array made.

    Args:
        cfg: the whole configuration.
        contract: the input contract.
        mesh: of the run.

    Returns:
        The plan.

    Raises:
        ValueError: the batch does not divide by the devices, or the places of a device do not divide by
            config.objective.microbatches.
    """
    recipe = recipes.recipe_of(cfg)
    spec = recipe.batch_spec(cfg, contract)
    objective = recipe.make_objective(cfg, contract)
    batch = state.batch_shapes(spec, mesh)
    share = int(cfg.data.batch) // meshes.batch_sharding(mesh).num_devices
    if share % cfg.objective.get("microbatches", 1):
        raise ValueError(
            f"config.objective.microbatches={cfg.objective.microbatches} does not divide the {share} "
            "places of a device, and some would wait for others; 1 always does"
        )
    shapes = state.state_shapes(objective, batch, cfg.seed, mesh)
    update = step.make_step(objective, cfg, optim.decay_mask(shapes.params))
    return Plan(dict(contract), spec, objective, shapes, batch, update, float(objective.flops(batch)))


def jit_step(plan: Plan, mesh: jax.sharding.Mesh) -> jax.stages.Wrapped:
    """The step as jit will compile it.

    Args:
        plan: of the run.
        mesh: of the run.

    Returns:
        The jitted step; it updates the state in place and leaves each leaf on its devices.
    """
    placed = jax.tree.map(lambda leaf: leaf.sharding, plan.state)
    return jax.jit(plan.step, donate_argnums=0, out_shardings=(placed, meshes.replicated(mesh)))


def compile_step(plan: Plan, mesh: jax.sharding.Mesh) -> jax.stages.Compiled:
    """Compiles the step, and prints what it needs per device and what it computes.

    Args:
        plan: of the run.
        mesh: of the run.

    Returns:
        The compiled step: (state, batch) -> (state, metrics).
    """
    jitted = jit_step(plan, mesh)
    say("compiling the training step: minutes on a CPU, once where JAX_COMPILATION_CACHE_DIR is set")
    begin = time.monotonic()
    compiled = jitted.lower(plan.state, plan.batch).compile()
    needs = "unknown to this backend"
    if (memory := compiled.memory_analysis()) is not None:
        sizes = {
            "arguments": memory.argument_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
            "outputs": memory.output_size_in_bytes,
            "of these in place": memory.alias_size_in_bytes,
        }
        needs = ", ".join(f"{name} {size / 2**20:.1f} MiB" for name, size in sizes.items())
    say(f"compiled in {time.monotonic() - begin:.1f} s; per device: {needs}; model FLOPs of a step: {plan.flops:.3e}")
    return compiled


def abstract(config: config_dict.ConfigDict, contract: sensors.Contract) -> dict[str, trees.Tree]:
    """Shapes of everything that a run learns; nothing is allocated.

    Args:
        config: the whole configuration.
        contract: the input contract.

    Returns:
        {"params", "teacher", "memory"}, each a tree of shapes.
    """
    recipe = recipes.recipe_of(config)
    objective = recipe.make_objective(config, contract)
    batch = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype),
        recipe.batch_spec(config, contract),
        is_leaf=lambda node: isinstance(node, Leaf),
    )
    params, teacher, memory = jax.eval_shape(lambda: objective.init(jax.random.key(0), batch))
    return {"params": params, "teacher": teacher, "memory": memory}

"""One step on any mesh is the step of one device; resuming on other hardware goes on as if nothing had changed; and
every leaf of our configurations lies where the golden table says.

The whole step of the real objective on eight fake devices in float32: student and teacher, Sinkhorn and contrastive
terms over the global batch, clipping, AdamW, settling. Nearly every leaf is split (from 256 bytes on instead of 1 MiB).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from skysense_jax import recipes
from skysense_jax.configs import skysense_tiny
from skysense_jax.core import mesh as meshes
from skysense_jax.core import trees
from skysense_jax.core.hardware import xla_flags
from skysense_jax.data.batches import views
from skysense_jax.run import checkpoint, optim, state, step
from skysense_jax.run import plan as plans
from skysense_jax.run.log import metrics
from tests import shardings
from tests.helpers import noise_dataset

BATCH, SMALL = 8, 256
STEPS, FIRST, SECOND = 24, 2, 4  # a run of 24 steps: on 8 devices, from step 2 on 4, from step 4 on 1
MESHES = ((1, 8), (2, 4), (4, 2), (8, 1))  # data x fsdp


class Machine(NamedTuple):
    """The step compiled for one mesh."""

    mesh: jax.sharding.Mesh
    shapes: state.TrainState
    batch: Any
    fresh: Any
    step: Any


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
    """The tiny configuration without local views: a quarter less to compile, the same terms."""
    c = skysense_tiny.get_config("series")
    c.data.dir, c.data.batch, c.data.n_local = (
        noise_dataset.write_dataset(tmp_path_factory.mktemp("places"), 20),
        BATCH,
        0,
    )
    c.steps = STEPS
    return c


@pytest.fixture(scope="module")
def machine(cfg):
    """(data, fsdp) -> Machine, compiled once."""
    contract = plans.make_contract(cfg)
    objective = recipes.recipe_of(cfg).make_objective(cfg, contract)

    @functools.cache
    def make(data: int, fsdp: int) -> Machine:
        mesh = meshes.make_mesh({"data": data, "fsdp": fsdp}, jax.devices()[: data * fsdp])
        batch = state.batch_shapes(recipes.recipe_of(cfg).batch_spec(cfg, contract), mesh)
        shapes = state.state_shapes(objective, batch, cfg.seed, mesh, SMALL)
        advance = step.make_step(objective, cfg, optim.decay_mask(shapes.params))
        placed = jax.tree.map(lambda leaf: leaf.sharding, shapes)
        with jax.set_mesh(mesh):
            compiled = (
                jax.jit(advance, out_shardings=(placed, meshes.replicated(mesh)))
                .lower(shapes, batch)
                .compile(compiler_options=xla_flags.ONCE["cpu"])
            )
        fresh = functools.partial(state.create, objective, batch, cfg.seed, shapes)
        return Machine(mesh, shapes, batch, fresh, compiled)

    return make


def run(machine: Machine, cfg: Any, now: state.TrainState, stop: int) -> tuple[state.TrainState, list[dict]]:
    """From where `now` stands until `stop`; the state and the metrics of every step."""
    begin, lines = int(now.step), []
    batches = views.make_train_iterator(cfg, plans.make_contract(cfg), cfg.seed, begin)
    with jax.set_mesh(machine.mesh):
        for _ in range(begin, stop):
            now, measured = machine.step(now, state.put_batch(next(batches), machine.batch))
            lines.append(metrics.plain(measured))
    batches.close()
    return now, lines


@pytest.fixture(scope="module")
def alone(machine, cfg):
    """(a state that has left its start, the state one step later and its metrics, the metrics of all steps) of one
    device.
    """
    one = machine(1, 1)
    early, first = run(one, cfg, one.fresh(), FIRST)
    then, second = run(one, cfg, early, FIRST + 1)
    _, rest = run(one, cfg, then, STEPS)
    return early, then, second[0], [*first, *second, *rest]


def distance(ours: Any, theirs: Any) -> float:
    """Norm of the difference of two trees relative to the norm of the second."""
    ours, theirs = ([np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)] for tree in (ours, theirs))

    def norm(leaves):
        return np.sqrt(sum(np.sum(np.square(leaf)) for leaf in leaves))

    return norm([a - b for a, b in zip(ours, theirs, strict=True)]) / norm(theirs)


@pytest.mark.parametrize("data, fsdp", MESHES)
def test_a_step_on_every_mesh_is_the_step_of_one_device(data, fsdp, machine, cfg, alone):
    """AdamW's first moment moves by (1 - b1) of the clipped gradient: that is how the gradients are compared."""
    early, then, measured, _ = alone
    many = machine(data, fsdp)
    split = [name for name, leaf in trees.flatten(many.shapes.params).items() if not leaf.sharding.is_fully_replicated]
    assert (len(split) > 20) == (fsdp > 1)
    placed = jax.tree.map(lambda leaf, like: jax.device_put(np.asarray(leaf), like.sharding), early, many.shapes)
    now, [ours] = run(many, cfg, placed, FIRST + 1)
    assert ours.keys() == measured.keys()
    for name, value in measured.items():
        if isinstance(value, float):
            assert abs(ours[name] - value) <= 1e-5 * max(1.0, abs(value)), name
        else:
            assert ours[name] == value, name

    def gradient(new):
        return jax.tree.map(
            lambda mu, before: np.asarray(mu) - cfg.optim.b1 * np.asarray(before), new.opt["mu"], early.opt["mu"]
        )

    assert distance(gradient(now), gradient(then)) < 1e-5
    for name in ("params", "teacher", "memory"):
        assert distance(getattr(now, name), getattr(then, name)) < 1e-5, name


def test_resumed_on_4_devices_and_then_on_1_a_run_goes_on(machine, cfg, alone, tmp_path):
    """8 devices (2 x 4), then 4 (2 x 2), then 1, each from the checkpoint of the one before."""
    lines: list[dict] = []
    for place, stop in (((2, 4), FIRST), ((2, 2), SECOND), ((1, 1), STEPS)):
        here = machine(*place)
        found = checkpoint.restore_latest_valid(tmp_path, here.shapes)
        now = here.fresh() if found is None else found.state
        assert int(now.step) == len(lines)
        pairs = zip(jax.tree.leaves(now), jax.tree.leaves(here.shapes), strict=True)
        assert all(leaf.sharding == like.sharding for leaf, like in pairs)
        now, more = run(here, cfg, now, stop)
        lines += more
        saver = checkpoint.Saver(tmp_path, keep=1)
        saver.save(now, {}, {"config": {}})
        saver.close()
    straight = alone[-1]
    assert [line["places"] for line in lines] == [line["places"] for line in straight]
    worst = [abs(ours["loss"] / theirs["loss"] - 1) for ours, theirs in zip(lines, straight, strict=True)]
    assert max(worst[: FIRST + 1]) < 1e-5 and worst[SECOND] < 1e-5, worst
    assert max(worst[SECOND : SECOND + 20]) < 1e-3, worst
    assert len(lines) == STEPS and len({line["places"] for line in lines}) == STEPS


@pytest.mark.parametrize("name", shardings.CONFIGS)
def test_every_leaf_lies_where_the_golden_table_says(name):
    golden = (shardings.FOLDER / f"shardings_{name}.txt").read_text()
    assert shardings.table(name) == golden, "if that is meant: python -m tests.shardings"

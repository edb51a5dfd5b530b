"""Pretraining with a prototype bank: the step, where a run with a bank begins, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from skysense_jax import recipes, sensors
from skysense_jax.configs import skysense_tiny
from skysense_jax.core import flops, rngs
from skysense_jax.core import mesh as meshes
from skysense_jax.data import records
from skysense_jax.objectives import flops as objective_flops
from skysense_jax.objectives.skysense import make_objective
from skysense_jax.ops import prototypes, regions
from skysense_jax.run import checkpoint, init_from, optim, state
from skysense_jax.run import plan as plans
from skysense_jax.run import start as starts
from skysense_jax.run import step as run_step
from tests.helpers import noise_dataset as tiny_data
from tests.helpers import objective_case, toy_objective
from tests.helpers.geo_places import cells

BANK = ("prototypes", "usage", "visits", "cells", "lon_edges", "lat_edges")


def test_flops_with_a_bank_are_the_products_of_the_traced_step():
    c = objective_case.tiny()
    c.model.geo_context.update({"bank": "on", "regions": 4, "prototypes": 200, "width": 64})
    contract = objective_case.contract_of(c)
    objective = make_objective(c, contract)

    def made():
        batch = objective_case.make_batch(c, contract, places=2)
        return batch | {"place": {"lon": np.zeros(2, np.float32), "lat": np.zeros(2, np.float32)}}

    batch = jax.eval_shape(made)
    values = jax.eval_shape(lambda key: objective.init(key, batch), jax.random.key(0))
    schedule = {name: jax.ShapeDtypeStruct((), jnp.float32) for name in objective.schedule_keys}
    keys = jax.eval_shape(lambda: rngs.keys(0, objective.streams, 0))
    traced = jax.make_jaxpr(jax.value_and_grad(objective.loss, has_aux=True))(*values, batch, keys, schedule)
    parts = objective_flops.skysense_parts(c, contract, batch)
    assert abs(objective.flops(batch) / flops.of_jaxpr(traced.jaxpr) - 1) < 0.02, parts
    assert parts["geo"] > 0.05 * objective.flops(batch)  # enough of it to be missed


@pytest.mark.parametrize("field, value", [("sinkhorn_eps", 0.0), ("prototype_momentum", 1.0)])
def test_an_update_that_means_nothing_is_refused(field, value):
    c = objective_case.tiny()
    c.model.geo_context.bank, c.objective[field] = "on", value
    with pytest.raises(ValueError, match=f"objective.{field}={value}"):
        make_objective(c, objective_case.contract_of(c))


def test_a_step_moves_the_bank_and_one_that_is_not_finite_does_not():
    """The real objective and step, batch and bank split over eight devices."""
    c = skysense_tiny.get_config("series")
    c.data.batch, c.data.n_local, c.schedule.warmup_steps = 8, 0, 0
    c.model.geo_context.update({"bank": "on", "regions": 32, "prototypes": 4, "width": 16})
    recipes.check_config(c)
    contract = sensors.input_contract(c.data.bands.to_dict(), c.model.ratio)
    mesh = meshes.make_mesh({"data": 1, "fsdp": 8})
    objective = make_objective(c, contract)
    shapes = state.batch_shapes(recipes.recipe_of(c).batch_spec(c, contract), mesh)
    placed = state.state_shapes(objective, shapes, 0, mesh, small=256)
    assert placed.memory["bank"]["prototypes"].sharding.spec == jax.P("fsdp")
    assert placed.params["encoder"]["geo"].keys() == placed.teacher["encoder"]["geo"].keys() == {"query"}
    now = state.create(objective, shapes, 0, placed)
    rng = np.random.default_rng(0)
    batch = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), shapes)
    for sensor in batch["global"]["sensors"].values():
        sensor.update({key: np.ones_like(sensor[key]) for key in ("valid", "bands")})
    batch["place"] |= {"lon": np.float32([3, 3, 3, 40, 40, np.nan, 90, 90]), "lat": np.full(8, 48, np.float32)}
    advance = jax.jit(
        run_step.make_step(objective, c, optim.decay_mask(placed.params)),
        out_shardings=(jax.tree.map(lambda leaf: leaf.sharding, placed), meshes.replicated(mesh)),
    )
    with jax.set_mesh(mesh):
        first, seen = advance(now, batch)
        second, later = advance(first, batch)
        batch["global"]["sensors"]["s2"]["image"][0, 0, 0, 0, 0, 0] = np.nan
        third, lost = advance(second, batch)
    bank = {name: [np.asarray(one.memory["bank"][name]) for one in (now, first, second, third)] for name in BANK}
    assert [seen["geo/located"], seen["geo/regions"], later["geo/regions"]] == [7 / 8, 0, 3 / 32]
    assert [visits.tolist() for visits in bank["visits"][:3]] == [[n] * 3 + [0] * 29 for n in (0, 1, 2)]
    assert all((bank["prototypes"][1] != bank["prototypes"][0]).any((1, 2)) == (bank["visits"][1] > 0))
    assert later["geo/fit"] > seen["geo/fit"] and lost["finite"] == 0
    for name in BANK:
        assert bank[name][3].tobytes() == bank[name][2].tobytes(), name
    kernels = [np.asarray(one.params["encoder"]["geo"]["query"]["kernel"]) for one in (first, second)]
    assert np.abs(kernels[1] - kernels[0]).max() > 1e-4  # asked from the second step on: no region was visited before


def test_the_table_of_a_fresh_bank_holds_the_training_places(tmp_path):
    dataset = tiny_data.write_dataset(tmp_path / "data", places=4)
    lon, lat = records.locations(dataset, "train")
    assert lon.tolist() == [3, 4, 5, 6] and lat.dtype == np.float32 and (lat == 48).all()
    c = skysense_tiny.get_config("series")
    c.data.dir, c.model.geo_context.cell = dataset, 65_536.0
    bank = prototypes.empty_bank(jax.random.key(0), c.model.geo_context.regions, 4, 8, 65_536.0)
    filled = init_from.with_regions(c, state.TrainState(0, {}, {}, {}, {"bank": bank}, 0)).memory["bank"]["cells"]
    assert filled[:4].tolist() == np.unique(cells(lon, lat)).tolist() and (filled[4:] == regions.NOWHERE).all()
    c.model.geo_context.regions = 3
    with pytest.raises(ValueError, match="4 cells of the grid, model.geo_context.regions=3"):
        init_from.with_regions(c, state.TrainState(0, {}, {}, {}, {"bank": bank}, 0))


def test_a_second_stage_starts_from_a_run_without_a_bank(tmp_path):
    def made(seed, width, **memory):
        rng = np.random.default_rng(seed)

        def leaf(*shape):
            return jnp.asarray(rng.normal(size=shape), jnp.float32)

        params = {"encoder": {"s2": {"kernel": leaf(3, 3)}}, "heads": {"fused": {"mlp0": {"kernel": leaf(width, 5)}}}}
        return state.TrainState(
            jnp.int32(seed),
            params,
            optim.init(params),
            jax.tree.map(lambda x: x + 1, params),
            {"centre": {"s2": leaf(4)}, **memory},
            jnp.int32(0),
        )

    old = made(7, 4, unused=jnp.zeros(2))
    saver = checkpoint.Saver(tmp_path, keep=1)
    saver.save(old, {}, {"config": {}, "contract": {"ratio": 4, "sensors": {}}})
    saver.wait()
    fresh = made(0, 6, bank={"visits": jnp.zeros(3, jnp.int32)})
    fresh.params["encoder"]["geo"] = {"query": {"kernel": jnp.ones((2, 2))}}
    begun, report = init_from.init_from(tmp_path, fresh, {"ratio": 4, "sensors": {}})
    assert report["new"] == ["params/encoder/geo/query/kernel", "memory/bank/visits"]
    assert report["left"] == ["memory/unused"] and begun.step == 0
    assert report["widened"] == [f"{part}/heads/fused/mlp0/kernel" for part in ("params", "teacher")]
    widened = begun.params["heads"]["fused"]["mlp0"]["kernel"]
    np.testing.assert_array_equal(widened[:4], old.params["heads"]["fused"]["mlp0"]["kernel"])
    assert widened.shape == (6, 5) and (widened[4:] == 0).all()  # the head begins where it stood
    np.testing.assert_array_equal(begun.teacher["encoder"]["s2"]["kernel"], old.teacher["encoder"]["s2"]["kernel"])
    np.testing.assert_array_equal(begun.memory["centre"]["s2"], old.memory["centre"]["s2"])
    assert (begun.params["encoder"]["geo"]["query"]["kernel"] == 1).all()
    with pytest.raises(ValueError, match="input contract"):
        init_from.init_from(tmp_path, fresh, {"ratio": 8, "sensors": {}})
    for number, side in enumerate((65_536.0, 65_537.0)):  # as many edges, and others
        bank = prototypes.empty_bank(jax.random.key(0), 2, 2, 4, side)
        other = made(0, 6, bank=bank)
        if number == 0:
            saver = checkpoint.Saver(tmp_path / "bank", keep=1)
            saver.save(other, {}, {"config": {}, "contract": {"ratio": 4, "sensors": {}}})
            saver.wait()
            init_from.init_from(tmp_path / "bank", other, {"ratio": 4, "sensors": {}})
            continue
        with pytest.raises(ValueError, match="another grid than this run's .*_edges.*geo_context.cell"):
            init_from.init_from(tmp_path / "bank", other, {"ratio": 4, "sensors": {}})
    hashed = made(0, 6, bank=prototypes.empty_bank(jax.random.key(0), 4, 2, 4, 65_536.0, 2))
    saver = checkpoint.Saver(tmp_path / "hashed", keep=1)
    saver.save(hashed, {}, {"config": {}, "contract": {"ratio": 4, "sensors": {}}})
    saver.wait()
    with pytest.raises(ValueError, match="one has config.model.geo_context.table='hashed'"):
        init_from.init_from(
            tmp_path / "hashed",
            made(0, 6, bank=prototypes.empty_bank(jax.random.key(0), 4, 2, 4, 65_536.0)),
            {"ratio": 4, "sensors": {}},
        )
    fresh.params["encoder"]["s2"]["kernel"] = jnp.zeros((3, 4))
    with pytest.raises(ValueError, match=r"params/encoder/s2/kernel is float32\[3, 3\] there, float32\[3, 4\] here"):
        init_from.init_from(tmp_path, fresh, {"ratio": 4, "sensors": {}})


def test_a_frozen_bank_has_learnt_something(tmp_path, monkeypatch):
    """Where a run begins, with the objective of the tests beside a bank."""
    monkeypatch.setitem(recipes.RECIPES, "toy", toy_objective.recipe())
    c = toy_objective.config("unread")
    c.model.geo_context.bank = "frozen"
    contract = sensors.input_contract(c.data.bands.to_dict(), c.model.ratio)
    mesh = meshes.make_mesh({"data": 1, "fsdp": 8})
    plain = toy_objective.make_objective(c, contract)

    def init(rng, spec):
        params, teacher, memory = plain.init(rng, spec)
        return params, teacher, {**memory, "bank": prototypes.empty_bank(rng, 2, 2, 4, 65_536.0)}

    geo = plain._replace(init=init, rules=(*plain.rules, ("memory/bank/.+", "replicate")))
    batch = state.batch_shapes(recipes.recipe_of(c).batch_spec(c, contract), mesh)
    plan = plans.Plan(contract, {}, geo, state.state_shapes(geo, batch, 0, mesh), batch, lambda: None, 0.0)
    now = state.create(geo, batch, 1, plan.state)
    bank = now.memory["bank"]
    learnt = {**bank, "visits": bank["visits"].at[1].set(3)}
    for name, memory in (
        ("plain", {"centre": now.memory["centre"]}),
        ("fresh", now.memory),
        ("learnt", {**now.memory, "bank": learnt}),
    ):
        saver = checkpoint.Saver(tmp_path / name, keep=1)
        saver.save(now._replace(memory=memory), {}, {"config": {}, "contract": contract})
        saver.close()

    def start(given):
        return starts.where_to_start(c, tmp_path / "new", plan, {"dataset_id": "", "code": {}}, given)

    for begin, words in (
        (None, "nothing has learnt; start from"),
        (tmp_path / "plain", "plain holds no bank"),
        (tmp_path / "fresh", "fresh holds no bank"),
    ):
        with pytest.raises(ValueError, match=f"bank='frozen'.*{words}"):
            start(begin)
    for name, leaf in start(tmp_path / "learnt").state.memory["bank"].items():
        np.testing.assert_array_equal(leaf, learnt[name])

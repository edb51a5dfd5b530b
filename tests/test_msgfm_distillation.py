"""GFM's distillation beside the msGFM loss, its teacher, and a run that begins with a network of fewer sensors."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from skysense_jax import recipes, sensors
from skysense_jax.core import mesh as meshes
from skysense_jax.models import msgfm
from skysense_jax.objectives import gfm
from skysense_jax.objectives import msgfm as msgfm_objective
from skysense_jax.run import checkpoint, init_from, optim, state
from skysense_jax.run import plan as plans
from tests.helpers.msgfm_losses import batch_of, config, jit, keys, np_mask, np_normalised, objective_of
from tests.helpers.toy_objective import same


def test_distillation_is_that_of_numpy_and_only_for_the_sensor_the_teacher_knows():
    c = config()
    c.objective.distill.weight, c.objective.distill.img_size = 0.5, 20
    contract = plans.make_contract(c)
    objective, params, teacher, loss = objective_of(c)
    batch, drawn = batch_of(c, "hr"), keys()
    value, (measured, _) = loss(params, teacher, batch, drawn)

    own = c.model.copy_and_resolve_references()
    own.moe.stages, own.img_size = (), 20
    network = msgfm.make_model(own, {**contract, "sensors": {"hr": contract["sensors"]["hr"]}})
    image = np_normalised(contract, "hr", batch["own"])[0].astype(np.float32)
    model = msgfm.make_model(c.model, contract)

    @jit
    def merged(taught: Any, encoder: Any, image: Any, large: Any, hidden: Any, rng: Any) -> tuple[Any, Any]:
        tokens = model.embed(encoder, "hr", image, hidden)
        theirs = network.encode(taught, network.embed(taught, "hr", large)).merged
        return model.encode(encoder, tokens, train=True, rng=rng).merged, theirs

    mine, theirs = merged(
        teacher["encoder"],
        params["encoder"],
        image,
        np_stretched(image, 20),
        np.kron(np_mask(c, drawn), np.ones((1, 2, 2), int)),
        drawn["encoder"],
    )
    a, b = (np.asarray(x, np.float64).mean((1, 2)) for x in (mine, theirs))
    a = a @ np.asarray(params["projector"]["kernel"], np.float64) + params["projector"]["bias"]
    cosine = np.mean((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1))
    np.testing.assert_allclose(measured["distill/cosine"], cosine, rtol=2e-5)
    np.testing.assert_allclose(
        value, measured["loss/mim"] + c.objective.aux_weight * measured["moe/aux"] - 0.5 * cosine, rtol=2e-5
    )

    value, (measured, _) = loss(params, teacher, batch_of(c, "s1"), drawn)
    assert np.isnan(measured["distill/cosine"])
    np.testing.assert_allclose(value, measured["loss/mim"] + c.objective.aux_weight * measured["moe/aux"], rtol=1e-6)


def np_stretched(image: np.ndarray, side: int) -> np.ndarray:
    """Bilinear, corners on corners, one axis after the other."""
    for axis in (1, 2):
        at = np.linspace(0, image.shape[axis] - 1, side)
        low = np.minimum(at.astype(int), image.shape[axis] - 2)
        part = (at - low).reshape([-1 if i == axis else 1 for i in range(4)])
        image = np.take(image, low, axis) * (1 - part) + np.take(image, low + 1, axis) * part
    return image.astype(np.float32)


def test_images_are_stretched_as_torch_does():
    torch = pytest.importorskip("torch")
    image = np.random.default_rng(0).standard_normal((2, 12, 12, 3)).astype(np.float32)
    wanted = torch.nn.functional.interpolate(
        torch.tensor(image.transpose(0, 3, 1, 2)), 14, mode="bilinear", align_corners=True
    )
    np.testing.assert_allclose(gfm.stretched(image, 14), wanted.numpy().transpose(0, 2, 3, 1), atol=1e-5)


def fresh_state(objective: Any, seed: int = 0) -> state.TrainState:
    params, teacher, memory = jit(lambda: objective.init(jax.random.key(seed), None))()
    return state.TrainState(jnp.int32(seed), params, optim.init(params), teacher, memory, jnp.int32(0))


def saved(folder: Any, objective: Any, contract: Any, seed: int) -> state.TrainState:
    """A checkpoint of a fresh state."""
    now = fresh_state(objective, seed)
    saver = checkpoint.Saver(folder, keep=1)
    saver.save(now, {}, {"config": {}, "contract": contract})
    saver.close()
    return now


def test_the_teacher_is_the_network_at_the_given_path(tmp_path):
    c = config()
    dense = config()
    dense.model.moe.stages = ()
    theirs = saved(
        tmp_path / "dense", msgfm_objective.make_objective(dense, plans.make_contract(c)), {"sensors": {}}, 5
    )
    saved(tmp_path / "mixed", msgfm_objective.make_objective(c, plans.make_contract(c)), {"sensors": {}}, 5)
    c.objective.distill.weight = 1.0
    fresh = fresh_state(msgfm_objective.make_objective(c, plans.make_contract(c)))
    with pytest.raises(ValueError, match="give config.objective.distill.path"):
        init_from.with_teacher(c, fresh)
    c.objective.distill.path = str(tmp_path / "dense")
    taught = init_from.with_teacher(c, fresh)
    assert set(taught.teacher["encoder"]) == {"encoder", "embed_hr"} and same(taught.params, fresh.params)
    assert same(taught.teacher["encoder"], {name: theirs.params["encoder"][name] for name in ("encoder", "embed_hr")})
    c.objective.distill.path = str(tmp_path / "mixed")
    with pytest.raises(ValueError, match="lacks teacher/encoder/encoder/stage1/pairs0/shifted/fc1/"):
        init_from.with_teacher(c, fresh)


def test_a_new_row_of_the_table_goes_on_from_old_weights(tmp_path, monkeypatch):
    c = config()
    old = plans.make_contract(c)
    before = saved(tmp_path, msgfm_objective.make_objective(c, old), old, 5)
    row = sensors.SENSORS["s1"]._replace(name="tir_L8", bands=("T10",), aliases={}, mean=(290.0,), std=(10.0,), pair="")
    monkeypatch.setitem(sensors.SENSORS, row.name, row)
    more = config()  # takes what the table has
    recipes.check_config(more)
    contract = plans.make_contract(more)
    mesh = meshes.make_mesh({"data": 1, "fsdp": 1, "expert": 1}, jax.devices()[:1])
    objective = plans.make_plan(more, contract, mesh).objective  # its leaves have sharding and decay rules
    begun, report = init_from.init_from(tmp_path, fresh_state(objective), contract)
    assert {name.split("/")[2] for name in report["new"]} == {"embed_tir_L8", "decoder_tir_L8"}
    assert len(report["new"]) == 6 and not report["left"] and not report["widened"]
    assert all(same(begun.params["encoder"][name], part) for name, part in before.params["encoder"].items())
    with pytest.raises(ValueError, match="input contract"):  # a sensor that is lost is another model
        init_from.init_from(tmp_path, begun, {**old, "sensors": {"hr": old["sensors"]["hr"]}})

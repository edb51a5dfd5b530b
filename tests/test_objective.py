"""The SkySense objective on a real, tiny model: each term's parts, who gets gradient, what is masked, what a collapse
looks like, devices. Its value against loops in numpy: test_skysense_loss_twin.py.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from skysense_jax import sensors
from skysense_jax.configs import skysense_smoke
from skysense_jax.core import flops, mesh, rngs, sharding, trees
from skysense_jax.models import systems
from skysense_jax.objectives import flops as objective_flops
from skysense_jax.objectives import granularity
from skysense_jax.objectives.skysense import make_objective
from tests.helpers.objective_case import PLACES, SCHEDULE, contract_of, hide, make_batch, norm, shared_case, tiny


@pytest.fixture(scope="module")
def case():
    return shared_case()


def test_total_is_the_weighted_sum_and_names_are_stable(case):
    loss, metrics, _, _ = case.run()
    heads, kinds, pairs = ("hr", "s2", "s1", "fused"), ("pixel", "object", "image"), ("hr-s2", "hr-s1", "s2-s1")
    assert abs(sum(metrics[f"loss/{h}/{k}"] for h in heads for k in kinds) - metrics["loss/mgcl"]) < 1e-3
    assert abs(sum(metrics[f"loss/align/{p}"] for p in pairs) - metrics["loss/align"]) < 1e-4
    assert abs(loss - metrics["loss/mgcl"] - metrics["loss/align"]) < 1e-3 and loss == metrics["loss/total"]
    monitors = {
        f"{m}/{h}"
        for h in heads
        for m in ("teacher/entropy", "teacher/kl", "teacher/usage", "teacher/centre", "student/std")
    }
    terms = {f"loss/{h}/{k}" for h in heads for k in kinds} | {f"loss/align/{p}" for p in pairs}
    assert set(metrics) == monitors | terms | {
        "loss/total",
        "loss/mgcl",
        "loss/align",
        "views/overlap_global",
        "views/overlap_local",
    }
    assert all(math.isfinite(value) for value in metrics.values())


# ------------------------------------------------------------------------------------------- objects and correspondence
def test_identical_views_match_cell_by_cell():
    coords = np.stack(np.meshgrid(np.arange(4) + 0.5, np.arange(4) + 0.5), -1)[None].astype(np.float32)
    match = granularity.overlap(coords, coords, np.ones(1, np.float32), np.ones(1, np.float32))
    np.testing.assert_array_equal(match[0], np.eye(16))
    turned = np.rot90(coords, axes=(1, 2)).copy()
    match = granularity.overlap(coords, turned, np.ones(1, np.float32), np.ones(1, np.float32))
    np.testing.assert_array_equal((np.asarray(match[0]) @ turned.reshape(-1, 2)), coords.reshape(-1, 2))


def test_objects_compare_the_same_ground():
    """Where the teacher's map is the student's map seen through other cells, both centres agree; unmatched ground has
    no say.
    """
    rng = np.random.default_rng(0)
    teacher_features = rng.normal(size=(2, 1, 3, 9, 5)).astype(np.float32)
    order = rng.permutation(9)
    match = np.zeros((2, 1, 9, 9), np.float32)
    match[..., np.arange(9), order] = 1
    match[:, :, :4] = 0  # the first four cells of the student have no partner
    student_features = teacher_features[..., order, :].copy()
    student_features[..., :4, :] = 1e3
    ones = jnp.ones((2, 1, 3, 9))
    student = granularity.Cells(jnp.asarray(student_features), ones)
    teacher = granularity.Cells(jnp.asarray(teacher_features), ones)
    assigned = granularity.assignment(teacher, np.array([0, 4, 8]), 0.05, 3)
    a, b, weight = granularity.objects(student, teacher, assigned, jnp.asarray(match), granularity.zip_views)
    assert a.shape == b.shape == (2, 1, 3, 3, 5) and weight.shape == (2, 1, 3, 3)
    np.testing.assert_allclose(a, b, atol=1e-4)
    assert float(weight.max()) <= 1 and float(weight.min()) >= 0
    crossed = granularity.objects(student, teacher, assigned, jnp.asarray(match)[:, :, None], granularity.cross_views)
    for x, y in zip(crossed, (a, b, weight), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)


# ---------------------------------------------------------------------------------------------------- who gets gradient
def test_gradient_reaches_the_student_only(case):
    _, _, _, (params, teacher, memory) = case.run()
    assert norm(teacher) == 0 and norm(memory) == 0
    for part in ("hr", "s2", "s1", "head_s2", "head_s1", "fusion", "ctpe"):
        assert norm(params["encoder"][part]) > 0, part
    for name, grad in params["heads"].items():
        assert norm(grad["last_layer_v"]) > 0 and norm(grad["mlp0"]) > 0, name
    assert all(norm(grad) > 0 for grad in params["align"].values())
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))


def test_last_layer_stands_still_while_frozen(case):
    loss, _, _, (free, _, _) = case.run()
    frozen_loss, _, _, (frozen, _, _) = case.run(schedule={"last_layer_frozen": 1.0})
    assert abs(loss / frozen_loss - 1) < 1e-6
    for grad in frozen["heads"].values():
        assert norm(grad["last_layer_v"]) == 0 and norm(grad["mlp0"]) > 0
    np.testing.assert_allclose(frozen["encoder"]["ctpe"], free["encoder"]["ctpe"], rtol=1e-3, atol=1e-6)


def test_settle_by_hand(case):
    _, _, inputs, _ = case.run()
    schedule = {name: jnp.float32(value) for name, value in SCHEDULE.items()}
    teacher, memory = jax.jit(case.objective.settle)(case.params, case.teacher, case.memory, inputs, schedule)
    for (name, new), old, student in zip(
        trees.flatten(teacher).items(),
        jax.tree.leaves(case.teacher),
        (trees.flatten(case.params)[name] for name in trees.flatten(teacher)),
        strict=True,
    ):
        np.testing.assert_allclose(new, 0.9 * old + 0.1 * student, rtol=1e-5, atol=1e-7, err_msg=name)
    for name, centre in memory["centre"].items():
        np.testing.assert_allclose(
            centre, 0.9 * case.memory["centre"][name] + 0.1 * inputs[name]["logits"], rtol=1e-4, atol=1e-6
        )
        assert np.abs(inputs[name]["logits"]).max() > 0


# -------------------------------------------------------------------------------------------------------------- absence
def test_absent_sensor_gives_exactly_zero(case):
    loss, metrics, settle, (grads, _, _) = case.run(hide(case.batch, "s1"))
    for key in (
        "loss/s1/pixel",
        "loss/s1/object",
        "loss/s1/image",
        "loss/align/hr-s1",
        "loss/align/s2-s1",
        "teacher/entropy/s1",
        "teacher/usage/s1",
        "student/std/s1",
    ):
        assert metrics[key] == 0, key
    assert math.isfinite(loss) and metrics["loss/hr/pixel"] > 0 and metrics["loss/align/hr-s2"] > 0
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(grads))
    assert norm(grads["encoder"]["s1"]) == 0 and norm(grads["heads"]["s1"]) == 0 and norm(grads["align"]["s1"]) == 0
    schedule = {name: jnp.float32(value) for name, value in SCHEDULE.items()}
    _, memory = case.objective.settle(case.params, case.teacher, case.memory, settle, schedule)
    np.testing.assert_array_equal(memory["centre"]["s1"], case.memory["centre"]["s1"])


def test_an_empty_batch_has_no_loss_and_no_nan(case):
    batch = case.batch
    for name in ("hr", "s2", "s1"):
        batch = hide(batch, name)
    loss, metrics, _, (grads, _, _) = case.run(batch)
    assert loss == 0 and norm(grads) == 0 and all(math.isfinite(value) for value in metrics.values())


def test_padded_dates_and_missing_places_have_no_say(case):
    clean = hide(hide(case.batch, "s2", dates=2), "s1", places=slice(0, 3))
    dirty = jax.tree.map(np.copy, clean)
    for views in dirty.values():
        views["sensors"]["s2"]["image"][:, :, 2] = 4321.0
        views["sensors"]["s1"]["image"][:3] = 7.0
    loss, metrics, _, (grads, _, _) = case.run(clean)
    dirty_loss, dirty_metrics, _, (dirty_grads, _, _) = case.run(dirty)
    assert loss == dirty_loss and metrics == dirty_metrics
    jax.tree.map(np.testing.assert_array_equal, grads, dirty_grads)
    assert metrics["loss/s1/image"] > 0 and metrics["loss/align/s2-s1"] > 0


# ------------------------------------------------------------------------------------------------------------- collapse
def test_constant_features_are_seen_as_collapse(case):
    # No weights, equal biases: the same vector in every cell (noise in the UP heads' biases would tell cells apart).
    constant = jax.tree_util.tree_map_with_path(
        lambda path, x: x if path[-1].key == "cls_token" else jnp.full_like(x, 0.1 * (x.ndim == 1)),
        case.teacher["encoder"],
    )
    _, metrics, _, _ = case.run(
        params={**case.params, "encoder": constant}, teacher={**case.teacher, "encoder": constant}
    )
    k = case.cfg.objective.head.prototypes
    for name in ("hr", "s2", "s1", "fused"):
        assert metrics[f"student/std/{name}"] < 1e-3, name
        # every row has the same assignment, so the mean one is no broader than each
        assert abs(metrics[f"teacher/usage/{name}"] - k ** (metrics[f"teacher/entropy/{name}"] - 1)) < 1e-3
    _, healthy, _, _ = case.run()
    assert all(healthy[f"student/std/{name}"] > 0.1 for name in ("hr", "s2", "s1"))


def test_uniform_and_single_prototype_collapse_are_seen(case):
    k = case.cfg.objective.head.prototypes
    same = {
        name: {**head, "last_layer_v": jnp.ones_like(head["last_layer_v"])}
        for name, head in case.teacher["heads"].items()
    }
    memory, case.memory = case.memory, jax.tree.map(jnp.zeros_like, case.memory)
    try:
        _, metrics, _, _ = case.run(teacher={**case.teacher, "heads": same}, params={**case.params, "heads": same})
    finally:
        case.memory = memory
    for name in ("hr", "s2", "s1", "fused"):
        assert abs(metrics[f"teacher/entropy/{name}"] - 1) < 1e-4 and abs(metrics[f"teacher/kl/{name}"]) < 1e-3
        assert abs(metrics[f"loss/{name}/pixel"] - math.log(k)) < 1e-3
    one = {name: centre.at[3].set(-50.0) for name, centre in case.memory["centre"].items()}
    case.memory = {"centre": one}
    try:
        _, metrics, _, _ = case.run()
    finally:
        case.memory = memory
    for name in ("hr", "s2", "s1", "fused"):
        assert abs(metrics[f"teacher/usage/{name}"] - 1 / k) < 1e-4 and metrics[f"teacher/entropy/{name}"] < 1e-4


# -------------------------------------------------------------------------------------------- batch, chunks and devices
def test_order_of_places_does_not_matter(case):
    order = np.random.default_rng(0).permutation(PLACES)
    loss, _, _, (grads, _, _) = case.run()
    permuted, _, _, (permuted_grads, _, _) = case.run(jax.tree.map(lambda x: x[order], case.batch))
    assert abs(permuted / loss - 1) < 1e-6
    assert norm(jax.tree.map(jnp.subtract, grads, permuted_grads)) < 1e-5 * norm(grads)


def test_eight_devices_equal_one(case):
    """Sinkhorn, centres and InfoNCE run over the global batch: places sharded over 8 devices, parameters over fsdp and
    gathered layer by layer; and the rows are scanned in chunks that do not divide them.
    """
    c = tiny()
    c.objective.chunk = 17
    objective = make_objective(c, case.contract)
    devices = mesh.make_mesh({"data": 2, "fsdp": 4})
    trees_ = {"params": case.params, "teacher": case.teacher, "memory": case.memory}
    placed = sharding.shardings(trees_, objective.rules, devices, small=256)
    assert any(not s.is_fully_replicated for s in jax.tree.leaves(placed))
    on_mesh = jax.device_put(trees_, placed)
    batch = jax.device_put(hide(case.batch, "s1", places=2), NamedSharding(devices, PartitionSpec(("data", "fsdp"))))
    schedule = {name: jnp.float32(value) for name, value in SCHEDULE.items()}
    step = jax.jit(jax.value_and_grad(objective.loss, has_aux=True), out_shardings=(None, placed["params"]))
    with jax.set_mesh(devices):  # as training does: layers gather their weights
        (loss, (metrics, _)), grads = step(
            on_mesh["params"], on_mesh["teacher"], on_mesh["memory"], batch, case.keys, schedule
        )
    one_loss, one_metrics, _, (one_grads, _, _) = case.run(hide(case.batch, "s1", places=2))
    assert abs(float(loss) / one_loss - 1) < 1e-5
    for name, value in one_metrics.items():
        assert abs(float(metrics[name]) - value) <= 1e-5 * max(1.0, abs(value)), name
    difference = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), grads, one_grads)
    assert norm(difference) < 1e-5 * norm(one_grads)


def test_a_batch_in_parts_has_the_gradient_of_the_whole(case):
    """Encoded part by part; Sinkhorn, centres and InfoNCE still see all places."""
    c = tiny()
    c.objective.microbatches = 2
    objective = make_objective(c, case.contract)
    schedule = {name: jnp.float32(value) for name, value in SCHEDULE.items()}
    step = jax.jit(jax.value_and_grad(objective.loss, has_aux=True))
    (loss, (metrics, _)), grads = step(case.params, case.teacher, case.memory, case.batch, case.keys, schedule)
    one_loss, one_metrics, _, (one_grads, _, _) = case.run()
    assert abs(float(loss) / one_loss - 1) < 1e-5
    for name, value in one_metrics.items():
        assert abs(float(metrics[name]) - value) <= 1e-5 * max(1.0, abs(value)), name
    assert norm(jax.tree.map(jnp.subtract, grads, one_grads)) < 1e-5 * norm(one_grads)


def test_rules_cover_every_leaf_once_for_any_subset_of_sensors():
    c = tiny()
    c.model.calendar = "none"
    contract = sensors.input_contract({"s2": c.data.bands["s2"]}, c.model.ratio)
    objective = make_objective(c, contract)
    batch = make_batch(c, contract)
    shapes = jax.eval_shape(lambda key: objective.init(key, batch), jax.random.key(0))
    tree = dict(zip(("params", "teacher", "memory"), shapes, strict=True))
    assert set(trees.match(list(trees.flatten(tree)), objective.rules, "sharding").values()) == {"fsdp", "replicate"}
    assert set(shapes[0]["heads"]) == {"s2", "fused"} and set(shapes[0]["align"]) == {"s2"}


# -------------------------------------------------------------------------------------------- features, flops, the door
def test_features_of_student_teacher_and_subsets(case):
    inputs = jax.tree.map(lambda x: jnp.asarray(x[:, 0]), case.batch["global"]["sensors"])
    features = systems.system_of(case.cfg.model).make_features(case.cfg.model, case.contract)
    both = [jax.jit(features)(tree["encoder"], inputs) for tree in (case.params, case.teacher)]
    shapes = {name: value.shape for name, value in both[0].items()}
    assert shapes == {
        "image": (8, 16),
        "pixel": (8, 4, 4, 16),
        **{f"{s}_image": (8, 16) for s in ("hr", "s2", "s1")},
        **{f"{s}_pixel": (8, 4, 4, 16) for s in ("hr", "s2", "s1")},
    }
    assert any(np.abs(a - b).max() > 1e-4 for a, b in zip(both[0].values(), both[1].values(), strict=True))
    np.testing.assert_allclose(both[0]["image"], both[0]["pixel"].mean((1, 2)), atol=1e-5)
    np.testing.assert_allclose(both[0]["s2_image"], both[0]["s2_pixel"].mean((1, 2)), atol=1e-5)
    alone = features(case.params["encoder"], {"s1": inputs["s1"]})
    assert set(alone) == {"image", "pixel", "s1_image", "s1_pixel"}
    np.testing.assert_allclose(alone["s1_image"], both[0]["s1_image"], atol=1e-5)


@pytest.mark.parametrize("size", ["tiny", "smoke"])
def test_flops_equal_the_products_of_the_traced_step(size):
    c = tiny() if size == "tiny" else skysense_smoke.get_config()
    contract = contract_of(c)
    objective = make_objective(c, contract)
    batch = jax.eval_shape(lambda: make_batch(c, contract, places=2))
    state = jax.eval_shape(lambda key: objective.init(key, batch), jax.random.key(0))
    schedule = {name: jax.ShapeDtypeStruct((), jnp.float32) for name in objective.schedule_keys}
    keys = jax.eval_shape(lambda: rngs.keys(0, objective.streams, 0))
    traced = jax.make_jaxpr(jax.value_and_grad(objective.loss, has_aux=True))(*state, batch, keys, schedule)
    counted, analytic = flops.of_jaxpr(traced.jaxpr), objective.flops(batch)
    assert abs(analytic / counted - 1) < 0.02, objective_flops.skysense_parts(c, contract, batch)


@pytest.mark.parametrize(
    "field, value, words",
    [("align_grid", 3, "align_grid"), ("clusters", 7, "clusters"), ("microbatches", 3, "microbatches")],
)
def test_contradictions_are_refused(field, value, words):
    c = tiny()
    c.objective[field] = value
    with pytest.raises(ValueError, match=words):
        make_objective(c, contract_of(c))


def test_other_numbers_of_global_views_are_refused(case):
    wrong = {"global": jax.tree.map(lambda x: np.concatenate([x, x[:, :1]], axis=1), case.batch["global"])}
    with pytest.raises(ValueError, match="3 global views"):
        case.objective.init(jax.random.key(0), wrong)

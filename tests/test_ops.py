"""Every pure function of ops/ against an independent float64 numpy twin, and the self-distillation goldens of the
reference code.
"""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from skysense_jax.evals.unit import unit as np_unit
from skysense_jax.ops import clusters, contrast
from skysense_jax.ops.ema import ema
from skysense_jax.ops.sinkhorn import sinkhorn
from skysense_jax.ops.unit import unit
from tests.helpers.numpy_twins import np_sinkhorn
from tests.parity import reference_forms
from tests.parity.training import Views, assignments, distilled, logits_of, pair_weights

GOLDEN = np.load(pathlib.Path(__file__).parent / "golden" / "dino_loss_sinkhorn.npz")
META = json.loads(str(GOLDEN["meta_json"]))
KINDS_OF_REDUCTION = {"v2": "y64_v2_loss", "v3": "y64_v3_loss", "v3_ignore_diagonal": "y64_v3_loss_ignore_diag"}
"""Member of the DINO family -> its stored loss."""


# ---------------------------------------------------------------------------------------------------------- numpy twins
def np_lse(x, axis=-1):
    top = x.max(axis=axis, keepdims=True)
    return np.squeeze(top + np.log(np.exp(x - top).sum(axis=axis, keepdims=True)), axis)


def np_softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def np_normalise(x):
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def np_distil(zs, zt, w, ps, pt, centre, ts, tt):
    ce, entropy, assigned = np.zeros(w.shape[:2]), np.zeros(w.shape[:2]), np.zeros(ps.shape[1])
    for b in range(w.shape[0]):
        for n in range(w.shape[1]):
            s = zs[b, n] @ ps / ts
            for m in range(w.shape[2]):
                p = np_softmax((zt[b, n, m] @ pt - centre) / tt)
                ce[b, n] += w[b, n, m] * -(p * (s - np_lse(s))).sum()
                entropy[b, n] += w[b, n, m] * -(p * np.log(np.maximum(p, 1e-300))).sum()
                assigned += w[b, n, m] * p
    return ce, entropy, assigned


def np_info_nce(a, b, valid, t):
    losses = []
    for first, second in ((a, b), (b, a)):
        for p, i in zip(*np.nonzero(valid), strict=True):
            logits = [first[p, i] @ second[p, i] / t]
            logits += [first[p, i] @ second[q, j] / t for q, j in zip(*np.nonzero(valid), strict=True) if q != p]
            losses.append(np_lse(np.array(logits)) - logits[0])
    return np.mean(losses) if losses else 0.0


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# ------------------------------------------------------------------------------------------------------------- Sinkhorn
@pytest.mark.parametrize(
    "name, epsilon, iterations",
    [
        ("y_sk_dinov2", None, 3),
        ("y_sk_swav_temp_3", None, 3),
        ("y_sk_swav_005_1", 0.05, 1),
        ("y_sk_swav_005_3", 0.05, 3),
        ("y_sk_swav_005_10", 0.05, 10),
    ],
)
def test_sinkhorn_equals_the_reference(name, epsilon, iterations):
    """swav distributed_sinkhorn and dinov2 sinkhorn_knopp_teacher."""
    epsilon = META["teacher_temp_used"] if epsilon is None else epsilon
    ours = sinkhorn(jnp.asarray(GOLDEN["x_sk"]) / epsilon, iterations)
    assert np.abs(ours - GOLDEN[name]).max() <= META["tol"]["sinkhorn_max_abs"]


def test_sinkhorn_masked_twin():
    scores = normal(3, 20, 6) * 3
    rows = np.random.default_rng(1).random((3, 20)) > 0.3
    columns = np.array([[1, 1, 1, 1, 1, 1], [1, 0, 1, 1, 0, 1], [0, 0, 0, 0, 0, 0]])
    ours = np.asarray(sinkhorn(jnp.asarray(scores), 4, rows, columns))
    twin = np.stack([np_sinkhorn(s, 4, r, c) for s, r, c in zip(scores, rows, columns, strict=True)])
    np.testing.assert_allclose(ours, twin, atol=2e-6)
    assert (ours[~rows] == 0).all() and (ours[2] == 0).all()
    np.testing.assert_allclose(ours[:2].sum(-1), rows[:2], atol=1e-5)


def test_sinkhorn_is_finite_at_any_temperature():
    ours = np.asarray(sinkhorn(jnp.asarray(normal(16, 4)) * 1e6, 3))
    assert np.isfinite(ours).all()
    np.testing.assert_allclose(ours.sum(-1), 1, atol=1e-5)
    with pytest.raises(ValueError, match="iteration"):
        sinkhorn(jnp.zeros((2, 2)), 0)


# ----------------------------------------------------------------------------------------------------------------- DINO
@pytest.mark.parametrize("call", [0, 1])
def test_dino_v1_loss_gradient_and_centre(call):
    """dino main_dino.DINOLoss: the call uses the centre from before its own update. What training runs is compared with
    the stored values, and with the loss as its paper writes it.
    """
    args = META["args"]
    centre = jnp.asarray(GOLDEN["x_center0"] if call == 0 else GOLDEN["y_center_0"])
    temperature = float(GOLDEN["y_teacher_temps"][META["epoch"]])
    batch, k = META["batch"], args["out_dim"]
    rows, student = jnp.asarray(GOLDEN[f"x_teacher_{call}"]), jnp.asarray(GOLDEN[f"x_student_{call}"])

    def trained(student, chunk):
        views = Views(student.reshape(-1, batch, k), rows.reshape(2, batch, k), pair_weights("v1", args["ncrops"], 2))
        return distilled(views, centre, args["student_temp"], temperature, chunk)

    def written(student):
        probs = reference_forms.centred_softmax(rows, centre, temperature).reshape(2, batch, k)
        return reference_forms.dino_reduction(student.reshape(-1, batch, k), probs, args["student_temp"], "v1")

    reference = GOLDEN[f"dx_student_{call}"]
    whole, pieces = (jax.value_and_grad(functools.partial(trained, chunk=chunk))(student) for chunk in (100, 2))
    for value, gradient in (whole, pieces, jax.value_and_grad(written)(student)):
        assert abs(value / GOLDEN[f"y64_loss_{call}"] - 1) <= META["tol"]["loss_rel"]
        assert np.linalg.norm(gradient - reference) <= META["tol"]["grad_rel_l2"] * np.linalg.norm(reference)
    after = contrast.update_centre(centre, rows.mean(0, keepdims=True), jnp.float32(1), args["center_momentum"])
    np.testing.assert_allclose(after, GOLDEN[f"y_center_{call}"], atol=1e-6)


def test_dino_v2_and_v3_reductions():
    """The weights of pairs in what training runs, and the losses as the later versions write them."""
    student, probs = jnp.asarray(GOLDEN["x_v23_student"]), jnp.asarray(GOLDEN["x_v23_teacher_probs"])
    temperature, centre = META["args"]["student_temp"], jnp.zeros(student.shape[-1])

    def trained(student, kind):
        views = Views(student, logits_of(probs), pair_weights(kind, len(student), len(probs)))
        return distilled(views, centre, temperature, 1.0, 4)

    def written(student, kind):
        return reference_forms.dino_reduction(student, probs, temperature, kind)

    reference = GOLDEN["dx_v2_student"]
    for loss in (trained, written):
        for kind, name in KINDS_OF_REDUCTION.items():
            assert abs(loss(student, kind) / GOLDEN[name] - 1) <= META["tol"]["loss_rel"], kind
        gradient = jax.grad(loss)(student, "v2")
        assert np.linalg.norm(gradient - reference) <= META["tol"]["grad_rel_l2"] * np.linalg.norm(reference)
    with pytest.raises(ValueError, match="v3_ignore_diagonal"):
        written(student, "v4")


def test_dino_v2_centre_is_lazy():
    """dinov2 applies a batch's centre only when it is asked again: the same functions, the second call on the updated
    centre.
    """
    t, logits = META["teacher_temp_used"], jnp.asarray(GOLDEN["x_sk"])
    start = jnp.asarray(GOLDEN["x_center0"])
    centre = contrast.update_centre(
        start, logits.mean(0, keepdims=True), jnp.float32(1), META["args"]["center_momentum"]
    )
    np.testing.assert_allclose(centre, GOLDEN["y_v2_center_after"], atol=1e-6)
    for assigned in (assignments, reference_forms.centred_softmax):
        np.testing.assert_allclose(assigned(logits, start, t), GOLDEN["y_v2_softmax_first"], atol=1e-5)
        np.testing.assert_allclose(assigned(logits, centre, t), GOLDEN["y_v2_softmax_second"], atol=1e-5)
    np.testing.assert_array_equal(
        contrast.update_centre(start, logits.mean(0, keepdims=True), jnp.float32(0), 0.9), start
    )


def distil_case():
    zs, zt = np_normalise(normal(2, 11, 8)), np_normalise(normal(2, 11, 3, 8, seed=1))
    w = np.random.default_rng(2).random((2, 11, 3)).astype(np.float32)
    w[0, 3] = 0
    ps, pt = np_normalise(normal(24, 8, seed=3)).T, np_normalise(normal(24, 8, seed=4)).T
    return zs, zt, w, ps, pt, normal(24, seed=5) * 0.1


@pytest.mark.parametrize("chunk", [100, 11, 4, 3, 1])
def test_distil_twin_whatever_the_chunk(chunk):
    case = distil_case()
    ours = contrast.distil(*map(jnp.asarray, case), 0.1, 0.05, chunk)
    for value, twin in zip(ours, np_distil(*(x.astype(np.float64) for x in case), 0.1, 0.05), strict=True):
        np.testing.assert_allclose(value, twin, rtol=2e-5, atol=2e-5)


def test_distil_gradient_is_the_student_s_and_does_not_know_chunks():
    case = tuple(map(jnp.asarray, distil_case()))

    def total(chunk):
        return jax.grad(lambda *x: contrast.distil(*x, 0.1, 0.05, chunk)[0].sum(), argnums=tuple(range(6)))(*case)

    whole, pieces = total(100), total(4)
    for a, b in zip(whole, pieces, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(a).max())
    student, teacher, weight, prototypes, teacher_prototypes, centre = whole
    assert np.abs(student).max() > 0 and np.abs(prototypes).max() > 0
    assert not np.any(teacher) and not np.any(weight) and not np.any(teacher_prototypes) and not np.any(centre)


# -------------------------------------------------------------------------------------------------------------- InfoNCE
def test_info_nce_twin():
    a, b = np_normalise(normal(4, 3, 5)), np_normalise(normal(4, 3, 5, seed=1))
    valid = np.array([[1, 1, 0], [0, 0, 0], [1, 1, 1], [0, 1, 1]])
    ours = contrast.info_nce(jnp.asarray(a), jnp.asarray(b), jnp.asarray(valid), 0.07)
    np.testing.assert_allclose(ours, np_info_nce(a.astype(np.float64), b.astype(np.float64), valid, 0.07), rtol=1e-5)


def test_unit_vectors_say_what_happens_at_zero():
    x, weight = normal(5, 7), normal(5, 7, seed=1)
    x[2] = 0
    for rule, gradient_at_zero in (("zero", 0 * weight[2]), ("clamp", weight[2] / np.float32(1e-12))):
        value, gradient = jax.value_and_grad(lambda x, rule=rule: jnp.sum(unit(x, rule) * weight))(x)
        np.testing.assert_allclose(value, np.sum(np_unit(x) * weight), rtol=1e-5)
        np.testing.assert_allclose(gradient[2], gradient_at_zero, rtol=1e-6)
        np.testing.assert_allclose(unit(x.T, rule, axis=0), np_unit(x).T, rtol=1e-5)
    assert unit(x.astype(jnp.bfloat16), "zero").dtype == jnp.float32
    with pytest.raises(ValueError, match="'zero' and 'clamp'"):
        unit(x, "torch")


def test_info_nce_without_rows_is_zero_and_finite():
    a = jnp.zeros((3, 2, 4))
    value, gradient = jax.value_and_grad(
        lambda x: contrast.info_nce(contrast.normalise(x), contrast.normalise(x), jnp.zeros((3, 2)), 0.07)
    )(a)
    assert value == 0 and np.all(gradient == 0)
    alone = contrast.info_nce(jnp.ones((1, 2, 1)), jnp.ones((1, 2, 1)), jnp.ones((1, 2)), 0.07)
    assert alone == 0  # one place has no negatives


def test_info_nce_ignores_the_other_regions_of_a_place():
    """Making the other regions of the same place identical to the positive changes nothing."""
    a, b = np_normalise(normal(3, 2, 5)), np_normalise(normal(3, 2, 5, seed=1))
    valid = jnp.ones((3, 2)).at[0, 1].set(0)
    base = contrast.info_nce(jnp.asarray(a), jnp.asarray(b), valid, 0.1)
    b[0, 1] = b[0, 0]
    np.testing.assert_allclose(contrast.info_nce(jnp.asarray(a), jnp.asarray(b), valid, 0.1), base, rtol=1e-6)


# ----------------------------------------------------------------------------------------------------- clusters and EMA
@pytest.mark.parametrize(
    "height, width, count, rows", [(8, 8, 8, 2), (16, 16, 16, 4), (4, 8, 8, 2), (8, 8, 1, 1), (2, 16, 16, 1)]
)
def test_seeds_are_a_regular_subset(height, width, count, rows):
    seeds = clusters.seed_cells(height, width, count)
    assert len(set(seeds.tolist())) == count and seeds.min() >= 0 and seeds.max() < height * width
    assert len(set((seeds // width).tolist())) in (rows, count // rows)


def test_seeds_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match="objective.clusters"):
        clusters.seed_cells(4, 4, 17)


def test_clusters_twin():
    features, mask = normal(2, 16, 5), np.random.default_rng(1).random((2, 16)) > 0.3
    seeds = clusters.seed_cells(4, 4, 4)
    mask[0, seeds] = True
    ours = np.asarray(clusters.assign(jnp.asarray(features), jnp.asarray(mask), seeds, 0.05, 3))
    centre, mass = clusters.centres(jnp.asarray(features), jnp.asarray(ours))
    for k in range(2):
        unit = np_normalise(features[k].astype(np.float64))
        twin = np_sinkhorn(unit @ unit[seeds].T / 0.05, 3, mask[k], mask[k][seeds])
        np.testing.assert_allclose(ours[k], twin, atol=1e-5)
        np.testing.assert_allclose(mass[k], twin.sum(0), atol=1e-4)
        held = twin.sum(0) > 0
        np.testing.assert_allclose(
            np.asarray(centre[k])[held], (twin.T @ features[k])[held] / twin.sum(0)[held, None], atol=1e-4
        )
        assert not np.asarray(centre[k])[~held].any()


def test_ema_twin_and_door():
    old, new = (
        {"a": normal(3), "b": {"c": normal(2, 2, seed=1)}},
        {"a": normal(3, seed=2), "b": {"c": normal(2, 2, seed=3)}},
    )
    ours = ema(jax.tree.map(jnp.asarray, old), jax.tree.map(jnp.asarray, new), jnp.float32(0.9))
    np.testing.assert_allclose(ours["b"]["c"], 0.9 * old["b"]["c"] + 0.1 * new["b"]["c"], rtol=1e-6)
    assert ours["a"].dtype == jnp.float32
    unchanged = ema(jax.tree.map(jnp.asarray, old), jax.tree.map(jnp.asarray, new), 1.0)
    np.testing.assert_array_equal(unchanged["a"], old["a"])
    with pytest.raises(ValueError, match="float32"):
        ema({"a": jnp.zeros(2, jnp.bfloat16)}, {"a": jnp.ones(2, jnp.bfloat16)}, 0.9)

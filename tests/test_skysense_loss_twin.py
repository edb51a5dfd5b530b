"""The whole SkySense loss a second time, in numpy, plain loops and float64; to be read beside objectives/skysense.py.

Only the encoder's maps come from the model. Everything behind them is written here from the definitions: the projection
heads, which cells show the same ground, Sinkhorn's clusters, the pixel, object and image terms of global and local
views, the mean logits that the centre follows, and the alignment of sensors.
"""

import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from skysense_jax.models.skysense import make_model
from tests.helpers.objective_case import SCHEDULE, hide, shared_case

SENSORS = ("hr", "s2", "s1")
HEADS = (*SENSORS, "fused")
KINDS = ("pixel", "object", "image")
SEEDS = (5, 7, 13, 15)  # the cells (1, 1), (1, 3), (3, 1), (3, 3) of a 4 x 4 view: a regular grid of 4 clusters


class Maps(NamedTuple):
    """One network's maps of the views of one scope. cells: [B, S, T, N, D] float64; valid: [B, S, T, N] bool."""

    cells: np.ndarray
    valid: np.ndarray


class Mean:
    """A weighted mean that grows: 0 where nothing was added."""

    def __init__(self):
        self.total, self.weight = 0.0, 0.0

    def add(self, value, weight=1.0):
        self.total, self.weight = self.total + weight * value, self.weight + weight

    @property
    def value(self):
        return self.total / self.weight if self.weight > 0 else 0.0


# ------------------------------------------------------------------------------------------------------------ the parts
def logits(head, x):
    """MLP with exact GELU, unit length, then the cosine with each prototype: [..., D] -> [..., K]."""
    layers = sorted(name for name in head if name.startswith("mlp"))
    for i, layer in enumerate(layers):
        x = 0.5 * x * (1 + erf(x / math.sqrt(2))) if i else x
        x = x @ head[layer]["kernel"] + head[layer]["bias"]
    x = x / np.linalg.norm(x, axis=-1, keepdims=True)
    return x @ (head["last_layer_v"] / np.linalg.norm(head["last_layer_v"], axis=0))


def log_softmax(x):
    return x - x.max() - np.log(np.exp(x - x.max()).sum())


def cross_entropy(teacher_logits, student_logits, centre, o):
    p = np.exp(log_softmax((teacher_logits - centre) / SCHEDULE["teacher_temp"]))
    return -(p * log_softmax(student_logits / o.student_temp)).sum()


def matched_cells(student_view, teacher_view):
    """Pairs (n, m): m is the nearest cell of the teacher's view to cell n of the student's, at most half the diagonal
    of the larger of both cells away. A view is (centres of its cells [N, 2], side of a cell).
    """
    (centres, side), (teacher_centres, teacher_side) = student_view, teacher_view
    pairs = []
    for n, centre in enumerate(centres):
        distances = [math.dist(centre, other) for other in teacher_centres]
        m = distances.index(min(distances))
        if distances[m] <= math.sqrt(2) / 2 * max(side, teacher_side):
            pairs.append((n, m))
    return pairs


def sinkhorn_clusters(cells, valid, o):
    """Share [N, C] of each cell in the cluster of each seed: exp(cosine / epsilon), then in turn each cluster to mass 1
    and each cell to mass 1. Invalid cells and clusters with an invalid seed have none.
    """
    share = np.zeros((len(cells), len(SEEDS)))
    for n, cell in enumerate(cells):
        for c, seed in enumerate(SEEDS):
            if valid[n] and valid[seed]:
                cosine = cell @ cells[seed] / (np.linalg.norm(cell) * np.linalg.norm(cells[seed]))
                share[n, c] = math.exp(cosine / o.sinkhorn_eps)
    for _ in range(o.sinkhorn_iters):
        for c in range(len(SEEDS)):
            if share[:, c].sum() > 0:
                share[:, c] /= share[:, c].sum()
        for n in range(len(cells)):
            if share[n].sum() > 0:
                share[n] /= share[n].sum()
    return share


# ------------------------------------------------------------------------------------------------------------ the terms
def distillation(student, teacher, student_head, teacher_head, centre, views, o):
    """One head's terms {kind: mean cross-entropy}, and the mean of its teacher's logits [K].

    student: {"global": Maps, "local": Maps}; teacher: Maps of the global views. views(scope, place, number) -> a view.
    """
    terms = {kind: Mean() for kind in KINDS}
    mean_logits = {kind: Mean() for kind in KINDS}
    numbers = range(student["local"].cells.shape[1])
    pairs = [("global", 0, 1), ("global", 1, 0), *(("local", s, t) for s in numbers for t in (0, 1))]
    places, _, dates = teacher.cells.shape[:3]
    for place, date in itertools.product(range(places), range(dates)):
        shares = [sinkhorn_clusters(teacher.cells[place, t, date], teacher.valid[place, t, date], o) for t in (0, 1)]
        for t in (0, 1):
            cells = teacher.cells[place, t, date][teacher.valid[place, t, date]]
            for cell in cells:
                mean_logits["pixel"].add(logits(teacher_head, cell))
            if len(cells):
                mean_logits["image"].add(logits(teacher_head, cells.mean(0)))

        for scope, s, t in pairs:
            x, x_valid = (array[place, s, date] for array in student[scope])
            y, y_valid = (array[place, t, date] for array in teacher)
            share = shares[t]
            same_ground = [
                (n, m)
                for n, m in matched_cells(views(scope, place, s), views("global", place, t))
                if x_valid[n] and y_valid[m]
            ]
            for n, m in same_ground:
                ce = cross_entropy(logits(teacher_head, y[m]), logits(student_head, x[n]), centre, o)
                terms["pixel"].add(ce, 1 / len(x))

            for c in range(len(SEEDS)):
                student_object, teacher_object = Mean(), Mean()
                for n, m in same_ground:
                    student_object.add(x[n], share[m, c])
                    teacher_object.add(y[m], share[m, c])
                if student_object.weight > 0:
                    weight = min(student_object.weight, 1)
                    object_logits = logits(teacher_head, teacher_object.value)
                    ce = cross_entropy(object_logits, logits(student_head, student_object.value), centre, o)
                    terms["object"].add(ce, weight / len(SEEDS))
                    if scope == "global":
                        mean_logits["object"].add(object_logits, weight)

            if x_valid.any() and y_valid.any():
                image_logits = logits(teacher_head, y[y_valid].mean(0))
                ce = cross_entropy(image_logits, logits(student_head, x[x_valid].mean(0)), centre, o)
                terms["image"].add(ce)

    seen = [mean.value for mean in mean_logits.values() if mean.weight > 0]
    return {kind: mean.value for kind, mean in terms.items()}, sum(seen) / max(len(seen), 1)


def regions(maps, kernel, o):
    """{(place, (view, row, column)): unit vector} of the regions of a sensor that have a valid cell, over all dates."""
    size = math.isqrt(maps.cells.shape[3])
    side = size // o.align_grid
    vectors = {}
    places, views, dates = maps.cells.shape[:3]
    for place, view in itertools.product(range(places), range(views)):
        for row, column in itertools.product(range(o.align_grid), repeat=2):
            mean = Mean()
            for date, y, x in itertools.product(range(dates), range(side), range(side)):
                n = (row * side + y) * size + column * side + x
                if maps.valid[place, view, date, n]:
                    mean.add(maps.cells[place, view, date, n])
            if mean.weight > 0:
                vector = mean.value @ kernel
                vectors[place, (view, row, column)] = vector / np.linalg.norm(vector)
    return vectors


def alignment(a, b, o):
    """InfoNCE in both directions between two sensors' regions: the same region against the regions of other places."""
    both = [key for key in a if key in b]
    loss = Mean()
    for anchors, others in ((a, b), (b, a)):
        for place, region in both:
            anchor = anchors[place, region]
            positive = math.exp(anchor @ others[place, region] / o.align_temp)
            negatives = [math.exp(anchor @ others[key] / o.align_temp) for key in both if key[0] != place]
            loss.add(-math.log(positive / (positive + sum(negatives))))
    return loss.value


def wide(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def whole_loss(case, apply, batch):
    """All "loss/..." metrics, and the mean of the teacher's logits by head. apply: of the model."""
    o = case.cfg.objective

    def encode(encoder, scope):
        b, s, h, w = batch[scope]["coords"].shape[:4]
        out = apply(
            encoder, jax.tree.map(lambda x: jnp.asarray(x).reshape(b * s, *x.shape[2:]), batch[scope]["sensors"])
        )
        maps = {**out["maps"], "fused": out["fused"][:, None]}
        masks = {**out["mask"], "fused": out["fused_mask"][:, None]}
        return {
            name: Maps(
                wide(maps[name]).reshape(b, s, -1, h * w, maps[name].shape[-1]),
                np.asarray(masks[name]).reshape(b, s, -1, h * w) > 0,
            )
            for name in HEADS
        }

    def views(scope, place, number):
        coords, cell = (np.asarray(batch[scope][key], np.float64)[place, number] for key in ("coords", "cell"))
        return coords.reshape(-1, 2), float(cell)

    student = {scope: encode(case.params["encoder"], scope) for scope in ("global", "local")}
    teacher = encode(case.teacher["encoder"], "global")
    metrics, mean_logits = {}, {}
    for name in HEADS:
        terms, mean_logits[name] = distillation(
            {scope: maps[name] for scope, maps in student.items()},
            teacher[name],
            wide(case.params["heads"][name]),
            wide(case.teacher["heads"][name]),
            wide(case.memory["centre"][name]),
            views,
            o,
        )
        metrics |= {f"loss/{name}/{kind}": value for kind, value in terms.items()}
    metrics["loss/mgcl"] = sum(metrics.values())
    vectors = {
        name: regions(student["global"][name], wide(case.params["align"][name]["kernel"]), o) for name in SENSORS
    }
    aligned = {
        f"loss/align/{a}-{b}": alignment(vectors[a], vectors[b], o) for a, b in itertools.combinations(SENSORS, 2)
    }
    metrics |= {**aligned, "loss/align": sum(aligned.values())}
    metrics["loss/total"] = o.alpha * metrics["loss/mgcl"] + o.beta * metrics["loss/align"]
    return metrics, mean_logits


# ------------------------------------------------------------------------------------------------------------ the tests
@pytest.fixture(scope="module")
def case():
    return shared_case()


def with_holes(batch):
    """Padded dates, a sensor without some places, and views with cells without data."""
    batch = hide(hide(batch, "s2", dates=2, places=slice(0, 4)), "s2", places=5)
    batch = hide(hide(batch, "s1", dates=0, places=6), "s1", places=7)
    batch["global"]["sensors"]["s2"]["valid"][1, 0, 0, :2] = 0  # two rows of cells
    batch["global"]["sensors"]["hr"]["valid"][3, 1, 0, :4, :8] = 0  # two cells
    batch["local"]["sensors"]["s1"]["valid"][2, 1, 1, :, 0] = 0  # a column of cells
    return batch


@pytest.fixture(scope="module")
def apply(case):
    return jax.jit(make_model(case.cfg.model, case.contract).apply)


@pytest.fixture(scope="module", params=["all there", "holes"])
def values(request, case, apply):
    """(JAX's metrics, JAX's settle inputs, the twin's metrics, the twin's mean logits) of a batch."""
    batch = case.batch if request.param == "all there" else with_holes(case.batch)
    _, metrics, settle_inputs, _ = case.run(batch)
    return metrics, settle_inputs, *whole_loss(case, apply, batch)


@pytest.mark.parametrize("name", HEADS)
def test_terms_equal_loops(values, name):
    metrics, _, twin, _ = values
    for kind in KINDS:
        key = f"loss/{name}/{kind}"
        assert twin[key] > 0.1 and abs(metrics[key] / twin[key] - 1) < 1e-5, (key, metrics[key], twin[key])


def test_alignment_equals_loops(values):
    metrics, _, twin, _ = values
    for a, b in itertools.combinations(SENSORS, 2):
        key = f"loss/align/{a}-{b}"
        assert twin[key] > 0.1 and abs(metrics[key] / twin[key] - 1) < 1e-5, (key, metrics[key], twin[key])


def test_the_total_and_no_other_loss_equals_loops(values):
    metrics, _, twin, _ = values
    assert {name for name in metrics if name.startswith("loss/")} == set(twin)
    for key in ("loss/total", "loss/mgcl", "loss/align"):
        assert abs(metrics[key] / twin[key] - 1) < 1e-5, (key, metrics[key], twin[key])


@pytest.mark.parametrize("name", HEADS)
def test_what_the_centre_follows_equals_loops(values, name):
    _, settle_inputs, _, mean_logits = values
    difference = np.abs(np.asarray(settle_inputs[name]["logits"]) - mean_logits[name]).max()
    assert difference < 1e-5 * np.abs(mean_logits[name]).max()
    assert settle_inputs[name]["seen"] == len(KINDS)

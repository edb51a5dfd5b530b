"""Rows of an evaluation: which place they belong to, what they hold; and methods compared on them."""

import numpy as np
import pytest

from skysense_jax.evals import compare, rows
from tests.helpers.labelled_blobs import blobs, one_hot


def test_tiles_belong_to_the_place_they_were_cut_from():
    names = ("kampala@12_-3", "kampala@13_-3", "site@2020", "site_1_2", "a@b@0_0")
    assert [rows.place_of(name) for name in names] == ["kampala", "kampala", "site@2020", "site_1_2", "a@b"]


def test_patch_majority_rule():
    maps = np.full((1, 5, 5), 255, np.uint8)
    maps[0, :2, :2] = [[1, 1], [2, 255]]  # two of three labelled pixels
    maps[0, :2, 2:4] = [[1, 2], [3, 4]]  # no class covers half
    maps[0, 2:4, :2] = [[0, 0], [7, 7]]  # a tie at exactly half: the lower value
    np.testing.assert_array_equal(rows.patch_majority(maps, 2), [[[1, -1], [0, -1]]])
    with pytest.raises(ValueError, match="do not fit"):
        rows.patch_majority(maps, 6)


def test_patch_means_are_means_of_the_right_pixels():
    pixel = np.arange(25, dtype=np.float32).reshape(1, 5, 5, 1)
    np.testing.assert_allclose(rows.patch_means(pixel, 2, 5)[..., 0], [[[3, 5], [13, 15]]])
    with pytest.raises(ValueError, match="one cell per base pixel"):
        rows.patch_means(pixel, 2, 10)


def batches_of(names, labels, maps, size=3):
    """Eval batches the way the pipeline pads them: the last one repeats rows with weight 0."""
    for start in range(0, len(names), size):
        index = np.minimum(np.arange(start, start + size), len(names) - 1)
        yield {
            "sensors": {
                "s2": {
                    "value": np.asarray(index),
                    "valid": (index[:, None, None, None] % 4 != 1) * np.ones((size, 1, 2, 2)),
                }
            },
            "label": labels[index],
            "label_map": maps[index],
            "place": {"name": [names[i] for i in index], "lon": index * 1.0, "lat": index * 2.0},
            "weight": (np.arange(start, start + size) < len(names)).astype(np.float32),
        }


def test_collect_keeps_rows_aligned_and_drops_padding_and_the_unlabelled():
    names = [f"p{i}" for i in range(7)]
    labels = one_hot(np.arange(7) % 3, 3)
    labels[2] = 0
    maps = np.repeat(np.arange(7, dtype=np.uint8), 16).reshape(7, 4, 4)
    maps[4, 2:, 2:] = 255
    methods = {
        "first": lambda s: {
            "scene": s["s2"]["value"][:, None],
            "patch": np.broadcast_to(s["s2"]["value"][:, None, None, None], (3, 2, 2, 1)),
        },
        "second": lambda s: {
            "scene": s["place"]["lon"][:, None] - s["place"]["lat"][:, None],
            "patch": np.zeros((3, 2, 2, 5)),
        },
    }
    found = rows.collect(batches_of(names, labels, maps), methods, ("scene", "patch"), patch=2)
    np.testing.assert_array_equal(found["scene"].features["first"][:, 0], [0, 1, 3, 4, 5, 6])
    np.testing.assert_array_equal(found["scene"].features["second"][:, 0], [0, -1, -3, -4, -5, -6])
    assert found["scene"].place.tolist() == ["p0", "p1", "p3", "p4", "p5", "p6"]
    assert len(found["patch"].target) == 7 * 4 - 1
    np.testing.assert_array_equal(found["patch"].target.argmax(1), found["patch"].features["first"][:, 0])
    needed = rows.collect(batches_of(names, labels, maps), methods, ("scene",), patch=2, needs="s2")
    np.testing.assert_array_equal(needed["scene"].features["first"][:, 0], [0, 3, 4, 6])
    with pytest.raises(ValueError, match="no labelled scene row with a measured 'hr'"):
        rows.collect(batches_of(names, labels, maps), methods, ("scene",), patch=2, needs="hr")


def make_rows(rng, n, prefix, per_place, shuffled=False):
    good, y = blobs(rng, n, 4, 12, 0.6)
    if shuffled:
        y = rng.permutation(y)
    return rows.Rows(
        {"trained": good, "untrained": rng.normal(size=(n, 12)), "statistics": good[:, :2] * [1e4, 1e-4]},
        one_hot(y, 6),
        np.array([f"{prefix}{i // per_place}" for i in range(n)]),
    )


def test_compare_ranks_methods_with_paired_intervals():
    rng = np.random.default_rng(16)
    options = dict(k=20, temperature=0.07, resamples=200, seed=1)
    train, test = make_rows(rng, 160, "a", 4), make_rows(rng, 120, "b", 4)
    report = compare.compare(train, test, **options)
    assert report == compare.compare(train, test, **options)  # a pure function of rows and seed
    value = {(r["method"], r["probe"]): r["scores"]["accuracy"]["value"] for r in report["results"]}
    assert value["trained", "knn"] > 0.9 and value["trained", "linear"] > 0.9 and value["untrained", "linear"] < 0.5
    assert report["n"] == {"train_rows": 160, "train_places": 40, "test_rows": 120, "test_places": 30}
    assert report["classes"] == [0, 1, 2, 3]
    against = {(d["second"], d["probe"], d["metric"]): d for d in report["differences"]}
    assert (
        against["untrained", "linear", "accuracy"]["apart"]
        and against["untrained", "linear", "accuracy"]["interval"][0] > 0
    )
    text = compare.table(report, "patch")
    assert "120 test rows of 30 places" in text and "trained - untrained" in text and "*" in text


def test_compare_shuffled_labels_give_chance_and_no_verdict():
    rng = np.random.default_rng(17)
    report = compare.compare(
        make_rows(rng, 160, "a", 1, True),
        make_rows(rng, 160, "b", 1, True),
        k=20,
        temperature=0.07,
        resamples=200,
        seed=1,
    )
    for entry in report["results"]:
        low, high = entry["scores"]["accuracy"]["interval"]
        assert low < 0.33 and high > 0.17


def test_compare_refuses_a_place_on_both_sides():
    rng = np.random.default_rng(18)
    with pytest.raises(ValueError, match="in the training and in the test part"):
        compare.compare(
            make_rows(rng, 20, "a", 1), make_rows(rng, 20, "a", 1), k=5, temperature=0.07, resamples=10, seed=0
        )


def test_compare_several_labels():
    rng = np.random.default_rng(19)

    def several(n, prefix):
        x = rng.normal(size=(n, 5))
        return rows.Rows(
            {"trained": x, "statistics": x[:, :1]},
            (x[:, :3] > 0.3).astype(np.uint8),
            np.array([f"{prefix}{i}" for i in range(n)]),
        )

    report = compare.compare(several(150, "a"), several(100, "b"), k=20, temperature=0.07, resamples=100, seed=0)
    assert report["multilabel"] and set(report["results"][0]["scores"]) == {"macro_map"}
    scores = {(r["method"], r["probe"]): r["scores"]["macro_map"] for r in report["results"]}
    assert scores["trained", "linear"]["value"] > 0.95 > scores["statistics", "linear"]["value"]
    low, high = scores["trained", "knn"]["interval"]
    assert low < scores["trained", "knn"]["value"] < high

"""Frozen-feature evaluation: plain twins of every score, and the leaks that would make a number too good."""

import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

from skysense_jax.evals import baselines, bootstrap, knn, linear, metrics
from tests.helpers.labelled_blobs import blobs, one_hot

# --- kNN ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("multilabel", [False, True])
def test_knn_equals_brute_force(multilabel):
    rng = np.random.default_rng(0)
    bank, asked = rng.normal(size=(37, 5)), rng.normal(size=(11, 5))
    target = rng.integers(0, 2, (37, 4)) if multilabel else one_hot(rng.integers(4, size=37), 4)
    scores = knn.knn_scores(bank, target, asked, k=7, temperature=0.07)
    for row, x in enumerate(asked):
        cosine = [float(x @ b / np.linalg.norm(x) / np.linalg.norm(b)) for b in bank]
        nearest = sorted(range(37), key=lambda i: -cosine[i])[:7]
        vote = sum(np.exp(cosine[i] / 0.07) * target[i] for i in nearest) / sum(
            np.exp(cosine[i] / 0.07) for i in nearest
        )
        np.testing.assert_allclose(scores[row], vote, rtol=1e-9)


def test_knn_ties_go_to_the_lower_index_and_few_rows_all_vote():
    bank = np.ones((5, 3))
    scores = knn.knn_scores(bank, one_hot([2, 1, 0, 0, 0], 3), np.ones((1, 3)), k=2)
    np.testing.assert_allclose(scores, [[0.0, 0.5, 0.5]])
    scores = knn.knn_scores(bank, one_hot([2, 1, 0, 0, 0], 3), np.ones((1, 3)), k=20)
    np.testing.assert_allclose(scores, [[0.6, 0.2, 0.2]])


def test_knn_chunks_change_nothing(monkeypatch):
    rng = np.random.default_rng(1)
    bank, asked, target = rng.normal(size=(20, 4)), rng.normal(size=(13, 4)), one_hot(rng.integers(3, size=20), 3)
    whole = knn.knn_scores(bank, target, asked)
    monkeypatch.setattr(knn, "_CHUNK", 4)
    np.testing.assert_allclose(knn.knn_scores(bank, target, asked), whole, rtol=1e-12)


def test_knn_refuses():
    with pytest.raises(ValueError, match="no training row"):
        knn.knn_scores(np.zeros((0, 3)), np.zeros((0, 2)), np.ones((1, 3)))
    with pytest.raises(ValueError, match="temperature"):
        knn.knn_scores(np.ones((2, 3)), np.ones((2, 2)), np.ones((1, 3)), temperature=0.0)


# --- metrics --------------------------------------------------------------------------------------


def test_single_label_scores_equal_scikit_learn():
    rng = np.random.default_rng(2)
    truth, predicted = rng.integers(5, size=200), rng.integers(5, size=200)
    truth[truth == 4] = 0  # a class that is predicted but never true
    scores = metrics.from_confusion(metrics.confusion(truth, predicted, 6))  # and one that never occurs
    assert scores["accuracy"] == pytest.approx(sklearn_metrics.accuracy_score(truth, predicted))
    assert scores["macro_f1"] == pytest.approx(
        sklearn_metrics.f1_score(truth, predicted, average="macro", zero_division=0)
    )
    recalls = [np.mean(predicted[truth == c] == c) for c in range(4)]
    assert scores["mean_class_accuracy"] == pytest.approx(np.mean(recalls))


def test_confusion_per_place_sums_to_the_whole():
    rng = np.random.default_rng(3)
    truth, predicted, place = rng.integers(3, size=50), rng.integers(3, size=50), rng.integers(7, size=50)
    tables = metrics.confusion_per_place(truth, predicted, place, 3, 7)
    np.testing.assert_array_equal(tables.sum(0), metrics.confusion(truth, predicted, 3))
    np.testing.assert_array_equal(tables[4], metrics.confusion(truth[place == 4], predicted[place == 4], 3))


def test_average_precision_equals_scikit_learn_with_weights_and_ties():
    rng = np.random.default_rng(4)
    truth = (rng.random((60, 3)) < 0.3).astype(np.uint8)
    score = np.round(rng.random((60, 3)), 1)  # many equal scores
    weights = rng.integers(0, 3, (5, 60))
    np.testing.assert_allclose(
        metrics.average_precision(truth, score),
        [sklearn_metrics.average_precision_score(truth[:, c], score[:, c]) for c in range(3)],
    )
    weighted = metrics.average_precision(truth, score, weights)
    for b in range(5):
        np.testing.assert_allclose(
            weighted[b],
            [
                sklearn_metrics.average_precision_score(truth[:, c], score[:, c], sample_weight=weights[b])
                for c in range(3)
            ],
        )


def test_macro_map_leaves_out_classes_without_a_positive_row():
    truth, score = np.array([[1, 0], [0, 0]]), np.array([[0.9, 0.4], [0.1, 0.6]])
    assert metrics.macro_map(truth, score) == pytest.approx(1.0)
    assert np.isnan(metrics.macro_map(np.zeros((2, 2)), score))


# --- bootstrap ------------------------------------------------------------------------------------


def test_bootstrap_is_deterministic_and_draws_whole_places():
    first, second = bootstrap.place_weights(9, 50, seed=3), bootstrap.place_weights(9, 50, seed=3)
    np.testing.assert_array_equal(first, second)
    assert (first.sum(1) == 9).all() and not np.array_equal(first, bootstrap.place_weights(9, 50, seed=4))


def test_interval_covers_the_true_mean():
    """Repeated experiments with 60 places: a 95 % interval holds the true accuracy about 95 times in 100."""
    rng, held = np.random.default_rng(5), 0
    for trial in range(200):
        hits = (rng.random(60) < 0.7).astype(float)
        samples = bootstrap.place_weights(60, 400, seed=trial) @ hits / 60
        low, high = bootstrap.interval(samples)
        held += low <= 0.7 <= high
    assert 0.88 <= held / 200 <= 0.99


def test_intervals_over_places_are_wider_than_over_dependent_patches():
    """Twenty patches of a place are all right or all wrong: the interval must know that there are 30 places."""
    rng = np.random.default_rng(6)
    hits = np.repeat(rng.random(30) < 0.6, 20)
    place, truth = np.repeat(np.arange(30), 20), np.zeros(600, int)
    predicted = np.where(hits, 0, 1)

    def width(groups: np.ndarray) -> float:
        tables = metrics.confusion_per_place(truth, predicted, groups, 2, groups.max() + 1)
        weights = bootstrap.place_weights(groups.max() + 1, 500, seed=0)
        low, high = bootstrap.interval(metrics.from_confusion(np.einsum("bp,pij->bij", weights, tables))["accuracy"])
        return high - low

    assert width(place) > 3 * width(np.arange(600))


def test_paired_difference_is_sharper_than_two_intervals():
    rng = np.random.default_rng(7)
    hard = rng.random(80)
    a, b = (hard < 0.75).astype(float), (hard < 0.65).astype(float)  # a is right wherever b is, and on more places
    weights = bootstrap.place_weights(80, 1000, seed=0) / 80
    result = bootstrap.paired(weights @ a, weights @ b, a.mean(), b.mean())
    assert result["apart"] and result["interval"][0] >= 0
    assert bootstrap.interval(weights @ a)[0] < bootstrap.interval(weights @ b)[1]  # the separate intervals overlap
    same = bootstrap.paired(weights @ a, weights @ a, a.mean(), a.mean())
    assert not same["apart"] and same["difference"] == 0


# --- linear probe ---------------------------------------------------------------------------------


def test_probe_learns_what_is_linear():
    rng = np.random.default_rng(8)
    x, y = blobs(rng, 300, 4, 10, 0.7)
    probe = linear.linear_probe(x[:200], one_hot(y[:200], 4), np.arange(200), x[200:])
    assert np.mean(probe.scores.argmax(1) == y[200:]) > 0.9
    np.testing.assert_allclose(probe.scores.sum(1), 1.0)


def test_strength_does_not_see_the_test_part():
    """The chosen strength and every fold score stay the same whatever the test rows are."""
    rng = np.random.default_rng(9)
    x, y = blobs(rng, 90, 3, 6, 1.5)
    groups = np.arange(90) // 3
    seen = [
        linear.linear_probe(x, one_hot(y, 3), groups, test)
        for test in (rng.normal(size=(10, 6)), 1e3 * rng.normal(size=(4, 6)))
    ]
    assert seen[0].strength == seen[1].strength and seen[0].cross_validation == seen[1].cross_validation
    assert seen[0].cross_validation == linear.choose_strength(x, one_hot(y, 3), groups)[1]


def test_folds_are_grouped_by_place():
    """Rows of one place are copies of one random vector with one random label: only a leaking fold can score above
    chance."""
    rng = np.random.default_rng(10)
    labels = rng.integers(2, size=60)
    x = np.repeat(rng.normal(size=(60, 40)), 5, axis=0)
    target, place = one_hot(np.repeat(labels, 5), 2), np.repeat(np.arange(60), 5)
    _, grouped = linear.choose_strength(x, target, place)
    _, leaking = linear.choose_strength(x, target, np.random.default_rng(0).permutation(300))
    assert max(leaking.values()) > 0.9 and max(grouped.values()) < 0.72


def test_shuffled_labels_give_chance():
    rng = np.random.default_rng(11)
    x, y = blobs(rng, 400, 4, 8, 0.5)
    y = rng.permutation(y)
    probe = linear.linear_probe(x[:200], one_hot(y[:200], 4), np.arange(200), x[200:])
    vote = knn.knn_scores(x[:200], one_hot(y[:200], 4), x[200:])
    for scores in (probe.scores, vote):
        assert abs(np.mean(scores.argmax(1) == y[200:]) - 0.25) < 0.12


def test_probe_handles_rare_classes_and_refuses_what_it_cannot_do():
    rng = np.random.default_rng(12)
    x, y = blobs(rng, 40, 2, 5, 0.3)
    target = one_hot(y, 3)
    target[7] = [0, 0, 1]  # one single row of a third class: absent from the fit of its own fold
    scores = linear.linear_probe(x, target, np.arange(40), x).scores
    assert scores.shape == (40, 3) and np.isfinite(scores).all()
    constant = linear.linear_probe(x, one_hot(np.zeros(40, int), 2), np.arange(40), x).scores
    np.testing.assert_array_equal(constant, one_hot(np.zeros(40, int), 2))
    with pytest.raises(ValueError, match="at least 2"):
        linear.linear_probe(x, target, np.zeros(40), x)
    x[3, 2] = np.nan
    with pytest.raises(ValueError, match="1 training rows hold features that are not finite"):
        linear.linear_probe(x, target, np.arange(40), x)


def test_probe_one_against_the_rest():
    rng = np.random.default_rng(13)
    x = rng.normal(size=(200, 6))
    target = np.stack([x[:, 0] > 0, x[:, 1] + 0.2 * rng.normal(size=200) > 0.5, np.zeros(200)], 1).astype(np.uint8)
    probe = linear.linear_probe(x[:120], target[:120], np.arange(120), x[120:], multilabel=True)
    assert metrics.macro_map(target[120:], probe.scores) > 0.9
    np.testing.assert_array_equal(probe.scores[:, 2], 0.0)


# --- statistics -----------------------------------------------------------------------------------


def test_band_statistics_equal_a_loop_over_valid_pixels():
    rng = np.random.default_rng(14)
    image = rng.normal(size=(2, 3, 6, 6, 2)).astype(np.float32)
    valid = (rng.random((2, 3, 6, 6)) < 0.7).astype(np.float32)
    bands = np.ones((2, 3, 2), np.float32)
    bands[0, 1, 1] = 0
    valid[1, :, :3, :3] = 0
    result = baselines.band_statistics(image, valid, bands, cells=2).reshape(2, 2, 2, 2, 7)
    for b, i, j, c in np.ndindex(2, 2, 2, 2):
        values = [
            image[b, t, y, x, c]
            for t in range(3)
            for y in range(3 * i, 3 * i + 3)
            for x in range(3 * j, 3 * j + 3)
            if valid[b, t, y, x] and bands[b, t, c]
        ]
        if not values:
            assert np.isnan(result[b, i, j, c]).all() and (b, i, j) == (1, 0, 0)
            continue
        expected = [np.mean(values), np.std(values), *np.percentile(values, baselines.PERCENTILES)]
        np.testing.assert_allclose(result[b, i, j, c], expected, rtol=1e-5, atol=1e-6)


def test_statistics_do_not_see_invalid_pixels_or_padded_dates():
    rng = np.random.default_rng(15)
    sensor = {"image": rng.normal(size=(1, 4, 8, 8, 2)), "valid": np.ones((1, 4, 8, 8)), "bands": np.ones((1, 4, 2))}
    sensor["valid"][:, 3] = 0
    before = baselines.image_statistics({"s2": sensor}, tile=8, patch=4)
    sensor["image"][:, 3] = 1e9
    np.testing.assert_array_equal(before, baselines.image_statistics({"s2": sensor}, tile=8, patch=4))
    fine = {"image": np.zeros((1, 1, 32, 32, 3)), "valid": np.ones((1, 1, 32, 32)), "bands": np.ones((1, 1, 3))}
    assert baselines.image_statistics({"hr": fine, "s2": sensor}, tile=8, patch=3).shape == (1, 2, 2, 7 * 5)
    assert baselines.image_statistics({"hr": fine, "s2": sensor}, tile=8).shape == (1, 7 * 5)


def test_standardise_uses_the_training_part_and_fills_what_is_missing():
    train = np.array([[0.0, 5.0], [2.0, np.nan], [4.0, 5.0]])
    scaled, asked = baselines.standardise(train, np.array([[2.0, np.nan], [np.nan, 6.0]]))
    np.testing.assert_allclose(scaled.mean(0), 0.0, atol=1e-12)
    np.testing.assert_allclose(asked, [[0.0, 0.0], [0.0, 1.0]])

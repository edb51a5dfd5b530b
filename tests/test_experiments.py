"""The geo-context experiment: what it shuffles, what it appends, and the table it writes."""

import json

import numpy as np
import pytest

from experiments import geo_context
from skysense_jax.data import records
from skysense_jax.evals import rows
from skysense_jax.models.inputs import PLACE
from tests.helpers import noise_dataset


def test_shuffled_places_have_each_others_locations_and_nothing_else_changes(tmp_path):
    data = noise_dataset.write_dataset(tmp_path / "data")
    geo_context.shuffle_places(tmp_path / "data", tmp_path / "other", seed=1)
    assert records.read_metadata(tmp_path / "other")["dataset_id"] != records.read_metadata(data)["dataset_id"]
    for split, count in (("train", 10), ("test", 5)):
        before, after = (records.open_places(folder, split) for folder in (data, tmp_path / "other"))
        lon = [[float(places[i]["lon"]) for i in range(count)] for places in (before, after)]
        assert lon[0] != lon[1] and sorted(lon[0]) == sorted(lon[1])
        for i in range(count):
            one, other = before[i], after[i]
            assert set(one) == set(other)
            assert all(np.array_equal(one[name], other[name]) for name in one if name not in ("lon", "lat"))


def test_location_is_repeated_for_every_patch():
    inputs = {PLACE: {"lon": np.float32([1, 2]), "lat": np.float32([3, 4])}}
    assert geo_context.location(inputs, "scene", ())["scene"].tolist() == [[1, 3], [2, 4]]
    patches = geo_context.location(inputs, "patch", (2, 2))["patch"]
    assert patches.shape == (2, 2, 2, 2) and (patches[1] == [2, 4]).all()


def test_the_table_has_the_mean_over_seeds_and_students_interval_of_the_paired_gain(tmp_path):
    for seed, gain in ((0, 0.1), (1, 0.3)):
        scores = [
            {"method": name, "probe": probe, "scores": {"accuracy": {"value": 0.5 + gain * (name == "bank")}}}
            for name in geo_context.VARIANTS
            for probe in ("linear", "knn")
        ]
        (tmp_path / f"regional-{seed}").mkdir()
        (tmp_path / f"regional-{seed}" / "scores.json").write_text(
            json.dumps(
                {
                    "results": scores,
                    "region": dict.fromkeys(geo_context.VARIANTS, 0.25),
                    "chosen": geo_context.CHOICE[seed],
                }
            )
        )
    lines = geo_context.table(tmp_path).splitlines()
    assert len(lines) == 3 + len(geo_context.VARIANTS)
    assert "(1 of 2 with it) | 0.550 [" in lines[-1]
    half = 12.7062 * 0.1  # t of one degree of freedom, standard error 0.1
    assert f"| 0.700 [{0.7 - half:.3f}, {0.7 + half:.3f}] | 0.200 [{0.2 - half:.3f}, {0.2 + half:.3f}] |" in lines[4]
    assert lines[2].startswith("| regional, 2 | no geo-context | 0.500 [0.500, 0.500] |  |")
    assert geo_context.mean_and_interval([0.25]) == "0.250"


def test_the_context_is_chosen_where_the_training_rows_need_it():
    rng = np.random.default_rng(0)
    target = np.eye(3, dtype=np.uint8)[np.arange(60) % 3]
    noise, place = rng.normal(size=(60, 20)), np.array([f"place-{n}" for n in range(60)])
    for useful in (True, False):
        context = target + 0.1 * rng.normal(size=(60, 3)) if useful else rng.normal(size=(60, 30))
        own = noise if useful else target + 0.5 * rng.normal(size=(60, 3))
        features = {"bank": np.concatenate([own, context], axis=1), "left out": own}
        fit = rows.Rows(features, target, place)
        assert geo_context.chosen(fit) == ("bank" if useful else "left out")
    assert geo_context.chosen(rows.Rows({"bank": own, "left out": own}, target, place)) == "left out"


@pytest.mark.parametrize("words", [["--world", "real"], ["--world", "regional", "--data", "x"]])
def test_a_dataset_is_given_for_the_real_world_only(words, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["geo_experiment", str(tmp_path), *words])
    with pytest.raises(SystemExit):
        geo_context.main()

"""msGFM end to end: the command trains, is evaluated, and draws what it sees. Killed and stopped: test_resume.py."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from skysense_jax import cli, networks
from tests.helpers import jobs, msgfm_places

CONFIG = str(jobs.ROOT / "configs" / "msgfm_tiny.py")
STEPS = 12


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> str:
    return msgfm_places.write(tmp_path_factory.mktemp("places"))


def arguments(dataset, workdir, *more):
    return [
        "--config",
        CONFIG,
        "--workdir",
        str(workdir),
        f"--config.data.dir={dataset}",
        f"--config.steps={STEPS}",
        *more,
    ]


@pytest.fixture(scope="module")
def run(dataset, tmp_path_factory):
    """The workdir of a run left alone."""
    workdir = tmp_path_factory.mktemp("run")
    said = jobs.finish(jobs.start(arguments(dataset, workdir, "--config.run.picture_every=4")))
    assert f"done: {STEPS} steps" in said
    return workdir


def test_pictures_change_nothing(dataset, run, tmp_path):
    jobs.finish(jobs.start(arguments(dataset, tmp_path)))
    jobs.assert_same(jobs.arrays(tmp_path, STEPS), jobs.arrays(run, STEPS))
    ours, theirs = (jobs.without_clocks(jobs.records(workdir)) for workdir in (tmp_path, run))
    assert [record["step"] for record in ours] == list(range(1, STEPS + 1)) and ours == theirs
    assert len({record["places"] for record in ours}) == STEPS


def test_what_a_run_says(run):
    lines = jobs.records(run)
    assert {"loss/mim", "moe/dropped", "moe/load_entropy", "cross/share", "loss/s2-s1", "loss/hr-hr"} <= set(lines[0])
    assert all(sum(line[f"loss/{a}-{a}"] != "nan" for a in msgfm_places.SENSORS) <= 1 for line in lines)
    assert all(isinstance(line["loss"], float) and line["skipped"] == 0 for line in lines)


def test_it_is_evaluated_as_any_other(dataset, run, tmp_path, capsys):
    for features in ("fused", "dsm"):
        out = tmp_path / f"{features}.json"
        assert cli.main(["eval", str(run), "--data", dataset, "--out", str(out), "--features", features]) == 0
        tasks = json.loads(out.read_text())["tasks"]
        assert set(tasks) == {"scene", "patch"}
    capsys.readouterr()


def test_features_are_means_over_dates_and_sensors(run):
    network = networks.load(run)
    rng, sides = np.random.default_rng(0), {"hr": 32, "s2": 8, "s1": 8, "dsm": 32}
    given = {}
    for name, rule in network.contract["sensors"].items():
        count = 2 if name in ("s2", "s1") else 1
        noise = rng.standard_normal((count, sides[name], sides[name], len(rule["bands"])))
        low = {"s1": -60, "dsm": -500}.get(name, 1)
        image = np.clip(np.array(rule["mean"]) + 0.5 * np.array(rule["std"]) * noise, low, {"hr": 255}.get(name, 9e3))
        given[name] = {"image": image, "dates": ["2020-01-01", "2020-06-01"][:count]}
    every = network.features(given)
    assert every["pixel"].shape == (8, 8, 16) and every["image"].shape == (16,)
    alone = {name: network.features({name: one}) for name, one in given.items()}
    np.testing.assert_allclose(every["image"], np.mean([one["image"] for one in alone.values()], 0), atol=1e-5)
    for name, one in alone.items():
        np.testing.assert_allclose(every[f"{name}_image"], one["image"], atol=1e-5)
        assert one["pixel"].shape == (8, 8, 16)
    first = {"s2": {name: value[:1] for name, value in given["s2"].items()}}
    last = {"s2": {name: value[1:] for name, value in given["s2"].items()}}
    halves = [network.features(part)["image"] for part in (first, last)]
    np.testing.assert_allclose(alone["s2"]["image"], np.mean(halves, 0), atol=1e-5)


def test_pictures_are_drawn_during_training_and_by_the_command(dataset, run, tmp_path, capsys):
    assert sorted(file.name for file in (run / "pictures").iterdir()) == [
        "step-000000.png",
        "step-000004.png",
        "step-000008.png",
        "step-000012.png",
    ]
    first, last = (Image.open(run / "pictures" / f"step-0000{n}.png") for n in ("00", "12"))
    assert first.size == last.size and np.any(np.asarray(first) != np.asarray(last))
    out = tmp_path / "place.png"
    assert cli.main(["reconstruct", str(run), "--data", dataset, "--place", "place-3", "--out", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    assert Image.open(out).size[1] < first.size[1]  # place-3 has neither s1 nor a surface model
    assert cli.main(["reconstruct", str(run), "--data", dataset, "--out", str(tmp_path / "a.jpg")]) == 78
    assert "ends in .png" in capsys.readouterr().err


def test_a_run_and_a_configuration_are_described(run, capsys):
    assert cli.main(["inspect", str(run)]) == 0
    assert "encoder/embed_dsm" in capsys.readouterr().out

"""Pictures of reconstructions: the model's pixels where it was asked for them, and errors as numpy counts them."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from skysense_jax import sensors, train
from skysense_jax.draw import panels, reconstructions
from skysense_jax.models import msgfm
from tests.helpers import jobs
from tests.helpers.msgfm_losses import np_normalised

SIDE = 8


def contract_of(*names):
    bands = {"hr": ("R", "G", "B"), "dsm": ("height",)}
    return sensors.input_contract({name: bands[name] for name in names}, 4)


@pytest.fixture
def drawn():
    """(found, panel(row, column) uint8 [192, 192, 3]) of a place with hr and a surface model, made up."""
    rng = np.random.default_rng(0)
    mask = np.zeros((SIDE, SIDE), np.float32)
    mask[:, :4] = 1
    measured = np.ones((SIDE, SIDE), np.float32)
    measured[-1] = 0
    hr, heights = (rng.uniform(0, high, (SIDE, SIDE, bands)).astype(np.float32) for high, bands in ((255, 3), (40, 1)))
    flat = np.full_like(heights, 20.0)
    common = {"mask": mask, "measured": measured}
    found = {
        "hr": {**common, "image": hr, "made": {"hr": 255 - hr, "dsm": flat}, "errors": {"hr": (1, 2), "dsm": (1, 2)}},
        "dsm": {
            **common,
            "image": heights,
            "made": {"dsm": flat, "hr": 255 - hr},
            "errors": {"dsm": (1, 2), "hr": (1, 2)},
        },
    }
    found = {name: found[name] for name in sorted(found)}  # as jit returns it

    picture = np.asarray(panels.draw(contract_of("hr", "dsm"), found, "a place", False))

    def panel(row, column):
        top, left = 36 + row * 218 + 18, 8 + column * 200
        return picture[top : top + 192, left : left + 192]

    return found, panel


def pixels(panel):
    """The middles of its SIDE x SIDE pixels."""
    return panel[12::24, 12::24]


def test_a_reconstruction_is_the_models_only_where_pixels_were_hidden(drawn):
    found, panel = drawn
    own, made = found["hr"]["image"].astype(np.uint8), found["hr"]["made"]["hr"].astype(np.uint8)
    whole, hidden, rebuilt, _, relief = (pixels(panel(0, column)) for column in range(5))
    np.testing.assert_array_equal(whole[:-1], own[:-1])
    assert (hidden[:, :4] == panels.HIDDEN).all()
    np.testing.assert_array_equal(hidden[:-1, 4:], own[:-1, 4:])
    np.testing.assert_array_equal(rebuilt[:-1, :4], made[:-1, :4])
    np.testing.assert_array_equal(rebuilt[:-1, 4:], own[:-1, 4:])
    np.testing.assert_array_equal(relief, pixels(panel(1, 0)))
    across = pixels(panel(1, 3))
    np.testing.assert_array_equal(across[:-1, :4], made[:-1, :4])
    assert (across[:, 4:] == panels.HIDDEN).all(), "nothing of the pair was given to the network"


def test_what_was_not_measured_is_hatched(drawn):
    _, panel = drawn
    assert set(np.unique(pixels(panel(0, 0))[-1])) <= {90, 130}


def test_heights_are_shown_in_the_range_of_the_measured_ones(drawn):
    """A flat surface keeps the grey of its height: no stretch of its own makes relief of it."""
    found, panel = drawn
    low, high = np.percentile(found["dsm"]["image"][:-1], [1, 99])
    assert (pixels(panel(1, 2))[:-1, :4] == int(255 * (20.0 - low) / (high - low))).all()
    measured = pixels(panel(1, 0))[:-1]
    assert measured.min() == 0 and measured.max() == 255


def test_errors_are_those_of_hidden_measured_pixels():
    config = train.parse(["--config", str(jobs.ROOT / "configs" / "msgfm_tiny.py"), "--workdir", "unused"]).config
    contract = contract_of("hr", "dsm")
    config.data.bands = {name: tuple(rule["bands"]) for name, rule in contract["sensors"].items()}
    rng, side = np.random.default_rng(1), int(config.model.img_size)
    inputs = {}
    for name, bands in (("hr", 3), ("dsm", 1)):
        valid = np.ones((1, 1, side, side), np.float32)
        valid[..., :5, :] = 0
        image = rng.uniform(1, 200, (1, 1, side, side, bands)).astype(np.float32)
        inputs[name] = {"image": image, "valid": valid, "bands": np.ones((1, 1, bands), np.float32)}
    encoder = msgfm.make_model(config.model, contract).init(jax.random.key(0))
    found = jax.tree.map(np.asarray, reconstructions.reconstructor(config, contract, 3)(encoder, inputs))
    for name, one in found.items():
        np.testing.assert_array_equal(one["measured"], inputs[name]["valid"][0, 0])
        assert 0.5 < one["mask"].mean() < 0.7
        for target, made in one["made"].items():
            part = {key: value[:, 0] for key, value in inputs[target].items()}
            truth = np_normalised(contract, target, part)[0][0]
            rule = contract["sensors"][target]
            guess = (made - np.array(rule["mean"])) / np.array(rule["std"])
            counts = (one["mask"] > 0) & (part["valid"][0] > 0)
            wanted = [np.abs(truth - image)[counts].mean() for image in (guess, np.zeros_like(truth))]
            np.testing.assert_allclose(one["errors"][target], wanted, rtol=1e-4)

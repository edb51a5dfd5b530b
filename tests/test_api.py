"""The Python door: every check names the sensor and the rule; loading from a workdir, a checkpoint or an export gives the same features."""
import datetime
import subprocess
import sys

import numpy as np
import pytest

import skysense_jax
from skysense_jax import prepare, sensors

BANDS = {"hr": ("R", "G", "B"), "s2": ("B02", "B03", "B04", "B08"), "s1": ("VV", "VH")}
CONTRACT = sensors.input_contract(BANDS, ratio=4)


def place(batch: int = 0) -> dict:
    """Plausible input of one place of 8 x 8 base pixels, or of `batch` of them."""
    rng = np.random.default_rng(0)
    lead = (batch,) if batch else ()
    dates = {"s2": ["2023-01-05", "2023-06-30", "2023-12-31"], "s1": [4, 180]}
    return {
        "hr": {"image": rng.integers(0, 256, (*lead, 1, 32, 32, 3)).astype(np.uint8)},
        "s2": {"image": rng.integers(300, 3000, (*lead, 3, 8, 8, 4)), "dates": [dates["s2"]] * batch if batch else dates["s2"]},
        "s1": {"image": rng.normal(-14, 3, (*lead, 2, 8, 8, 2)), "dates": [dates["s1"]] * batch if batch else dates["s1"]},
    }


def changed(sensor: str, **fields) -> dict:
    given = place()
    given[sensor] = {**given[sensor], **fields}
    return given


def test_prepare_batches_and_keeps_the_values():
    inputs, batched = prepare.prepare(CONTRACT, place())
    assert not batched
    assert {name: entry["image"].shape for name, entry in inputs.items()} == {
        "hr": (1, 1, 32, 32, 3), "s2": (1, 3, 8, 8, 4), "s1": (1, 2, 8, 8, 2)}
    np.testing.assert_array_equal(inputs["s2"]["image"][0], place()["s2"]["image"])
    np.testing.assert_array_equal(inputs["s2"]["dates"], [[4, 180, 364]])
    np.testing.assert_array_equal(inputs["hr"]["dates"], [[-1]])
    assert all(entry["valid"].all() and entry["bands"].all() for entry in inputs.values())
    assert {entry[key].dtype.name for entry in inputs.values() for key in ("image", "valid", "bands")} == {"float32"}
    inputs, batched = prepare.prepare(CONTRACT, place(batch=3))
    assert batched and inputs["s1"]["image"].shape == (3, 2, 8, 8, 2) and inputs["s1"]["dates"].shape == (3, 2)


def test_prepare_reads_every_kind_of_date():
    kinds = [datetime.date(2024, 12, 31), np.datetime64("2023-03-01T10:00"), datetime.datetime(2024, 3, 1, 5, tzinfo=datetime.timezone.utc)]
    assert prepare.prepare(CONTRACT, changed("s2", dates=kinds))[0]["s2"]["dates"].tolist() == [[364, 59, 60]]
    kinds = ["1965-02-01", "2023-02-01T23:59:59Z", 365]
    assert prepare.prepare(CONTRACT, changed("s2", dates=kinds))[0]["s2"]["dates"].tolist() == [[31, 31, 364]]


def test_prepare_finds_invalid_pixels():
    given = place()
    given["s2"]["image"][1, 2, 3, 0] = 0  # the nodata value of Sentinel-2
    given["s1"]["image"][0, 1, 1, 1] = np.nan
    inputs, _ = prepare.prepare(CONTRACT, given)
    assert inputs["s2"]["valid"][0, 1, 2, 3] == 0 and inputs["s2"]["valid"].sum() == 3 * 64 - 1
    assert inputs["s1"]["valid"][0, 0, 1, 1] == 0 and (inputs["s1"]["image"][0, 0, 1, 1] == 0).all()
    valid = np.ones((3, 8, 8), bool)
    valid[:, :4] = False
    inputs, _ = prepare.prepare(CONTRACT, changed("s2", valid=valid))
    assert inputs["s2"]["valid"].sum() == 3 * 32 and (inputs["s2"]["image"][0, :, :4] == 0).all()


def test_prepare_accepts_names_and_units_that_agree():
    prepare.prepare(CONTRACT, changed("s2", bands=["blue", "b3", "B4", "B08"], unit="dn"))
    prepare.prepare(CONTRACT, {"hr": place()["hr"]})  # any subset of the sensors


S2 = place()["s2"]["image"]
S1 = place()["s1"]["image"]
NORMALISED = (place()["hr"]["image"] - 120.0) / 58.0
REFUSED = {
    "empty": ({}, "at least one of the sensors hr, s2, s1"),
    "unknown sensor": ({"dsm": {"image": np.zeros((1, 8, 8, 1))}}, "takes no 'dsm'"),
    "not a dict": ({"s2": S2}, 's2: give a dict with "image"'),
    "unknown field": (changed("s2", date=["2020-01-01"] * 3), "s2: unknown field 'date'"),
    "channels": (changed("s2", image=S2[..., :3]), "s2: 3 channels given, the model expects 4: B02, B03, B04, B08"),
    "channels first": (changed("s2", image=np.moveaxis(S2, -1, 1)), r"s2: 8 channels given.*bands are the last axis"),
    "axes": (changed("s2", image=S2[0]), r"s2: image of shape \(8, 8, 4\); give \[dates, rows"),
    "text": (changed("s2", image=np.full(S2.shape, "a")), "s2: image of type"),
    "nothing": (changed("s2", image=S2[:0], dates=[]), "s2: image of shape .* holds nothing"),
    "order": (changed("s2", bands=["B04", "B03", "B02", "B08"]), r"s2: bands \['B04', 'B03', 'B02', 'B08'\] given, the model expects"),
    "unknown band": (changed("s2", bands=["B02", "B03", "B04", "B42"]), "band 'B42' is not a band of sensor 's2'"),
    "unit": (changed("s1", unit="linear_power"), "s1: unit 'linear_power' given, the model expects 'db'"),
    "reflectance": (changed("s2", image=S2 / 1e4), r"s2: .*reflectance 0..1\? .*multiply by 10000"),
    "hr scaled": (changed("hr", image=place()["hr"]["image"] / 255), r"hr: .*0..1\? The model expects 0..255"),
    "hr normalised": (changed("hr", image=NORMALISED), "hr: .*outside the plausible 0 .. 255 dn.*normalisation belongs to the model"),
    "linear power": (changed("s1", image=10 ** (S1 / 10)), "s1: .*looks like linear power or amplitude; the model expects decibels"),
    "absurd": (changed("s2", image=S2 * 20), r"s2: .*outside the plausible"),
    "statistics": (changed("s2", image=S2 + 20000), "s2: band B08 has mean .* deviations|s2: band B0. has mean"),
    "nan marked valid": (changed("s1", image=np.where(S1 > -14, np.nan, S1), valid=np.ones((2, 8, 8))), "s1: .* pixels marked valid hold NaN"),
    "valid shape": (changed("s2", valid=np.ones((3, 8, 4))), r"s2: valid of shape \(3, 8, 4\) does not match .*\(3, 8, 8\)"),
    "valid values": (changed("s2", valid=np.full((3, 8, 8), 255)), "s2: valid must hold 0 and 1 only"),
    "nothing valid": (changed("s2", image=np.zeros_like(S2)), "s2: no valid pixel at all"),
    "no dates": ({"s2": {"image": S2}}, 's2: a time series needs "dates"'),
    "number of dates": (changed("s2", dates=["2020-01-01"]), "s2: 1 dates given for 3 acquisitions"),
    "date as text": (changed("s2", dates="2020-01-01"), "s2: give dates as a list"),
    "a missing date": (changed("s2", dates=["2020-01-01", None, "2020-02-01"]), "s2: an acquisition of a time series without a date"),
    "year only": (changed("s2", dates=["2020", "2021", "2022"]), "s2: '2020' is not a full date"),
    "no date": (changed("s2", dates=["2020-13-01"] * 3), "s2: '2020-13-01' is no date"),
    "year as day": (changed("s2", dates=[2020, 2021, 2022]), "s2: 2020 is no day of the year"),
    "float as day": (changed("s2", dates=[1.0, 2.0, 3.0]), "s2: 1.0 is no date"),
    "not a time": (changed("s2", dates=[np.datetime64("NaT")] * 3), "s2: not a date"),
    "ratio": (changed("hr", image=place()["hr"]["image"][:, :30]), "hr: 30x32 pixels; rows and columns must be multiples of the ratio 4"),
    "ground": (changed("hr", image=place()["hr"]["image"][:, :16]), r"do not cover the same ground: .*'hr': \(4, 8\)"),
    "axes differ": ({**place(), "s2": place(batch=1)["s2"]}, "some sensors have a batch axis"),
    "places differ": ({**place(batch=2), "s2": place(batch=3)["s2"]}, "different numbers of places"),
    "dates of a batch": ({"s2": {**place(batch=2)["s2"], "dates": ["2020-01-01"] * 3}}, "s2: dates for 3 places given, the images hold 2"),
    "flat dates of a batch": ({"s2": {**place(batch=3)["s2"], "dates": [1, 2, 3]}}, "s2: a batch needs one list of dates per place"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_prepare_refuses(case):
    given, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        prepare.prepare(CONTRACT, given)


def test_importing_the_package_is_light():
    code = "import sys, skysense_jax; print(skysense_jax.__version__); assert not {'jax', 'numpy', 'flax'} & set(sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert found == skysense_jax.__version__
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        skysense_jax.lode

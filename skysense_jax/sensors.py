"""The table of sensors: what every instrument measures, how it is stored, and every rule that holds for it alone.

A record stores what was measured under the instrument's name; a model's *input contract* (:func:`input_contract`)
selects bands by name and order and carries the statistics it normalises with. The contract is a plain JSON value: it is
stored inside every checkpoint and every exported folder and is checked wherever data meets a model. To add a sensor,
add a row to :data:`SENSORS`: nothing outside of this file asks for the name of a sensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from skysense_jax.sensor_row import ClearMask, Mistake, Offset, Sensor, Unit

SensorRule = Mapping[str, Any]
"""The entry of a sensor in an input contract: bands, unit, grid, statistics."""

Contract = Mapping[str, Any]
"""An input contract (:func:`input_contract`): which sensors a model takes, their bands, grids and normalisation."""

NO_DATE = -1
"""Stored date of an acquisition whose date is unknown (allowed only for sensors with ``dated=False``)."""

UNLABELLED = 255
"""Value of a label-map pixel without a label."""

_S2_STATISTICS = {
    "B01": (1354.40546513, 245.71762908),
    "B02": (884.29673756, 1155.15170768),
    "B03": (1144.16202635, 1183.6292542),
    "B04": (1297.47289228, 1368.11351514),
    "B05": (1624.90992062, 1370.265037),
    "B06": (2194.6423161, 1355.55390699),
    "B07": (2422.21248945, 1416.51487101),
    "B08": (2517.76053101, 1474.78900051),
    "B8A": (2581.64687018, 1439.3086061),
    "B09": (732.08340178, 404.91978886),
    "B10": (12.11327804, 4.77584468),
    "B11": (2368.51236873, 1455.52084939),
    "B12": (1805.06846033, 1343.48379601),
}
_S2_NUMBERS = {f"b{i}": f"B{i:02d}" for i in range(1, 13)}
# STAC common names (eo:common_name) and the short ESA spelling without the zero.
_S2_ALIASES = {
    **_S2_NUMBERS,
    "coastal": "B01",
    "blue": "B02",
    "green": "B03",
    "red": "B04",
    "rededge1": "B05",
    "rededge2": "B06",
    "rededge3": "B07",
    "nir": "B08",
    "nir08": "B8A",
    "b08a": "B8A",
    "nir09": "B09",
    "cirrus": "B10",
    "swir16": "B11",
    "swir22": "B12",
}

SENSORS: dict[str, Sensor] = {
    sensor.name: sensor
    for sensor in (
        Sensor(
            name="hr",
            title="optical imagery",
            bands=("R", "G", "B"),
            aliases={"red": "R", "green": "G", "blue": "B"},
            unit="dn",
            units={"dn": Unit()},
            dtype="uint8",
            grid="fine",
            dated=False,
            gsd=0.3,
            plausible=(0.0, 255.0),
            mean=(123.675, 116.28, 103.53),
            std=(58.395, 57.12, 57.375),
            source="ImageNet statistics on 0..255, as in the SkySense release's iSAID and DIOR configurations",
            disturbance="optical",
            picture="photo",
            words=frozenset({"hr", "rgb", "ortho", "orthophoto", "aerial", "naip", "dop"}),
            colour_bands=("R", "G", "B"),
            mistakes=(
                Mistake(
                    0.0, 1.0, True, "are you passing values scaled to 0..1? The model expects 0..255; multiply by 255"
                ),
            ),
            unstored={"NIR": (123.675, 58.395)},  # four-band encoders start from the red kernel: red's statistics
            pair="dsm",
        ),
        Sensor(
            name="s2",
            title="Sentinel-2",
            bands=tuple(_S2_STATISTICS),
            aliases=_S2_ALIASES,
            unit="dn",
            units={"dn": Unit(), "reflectance": Unit(factor=10000.0)},
            dtype="uint16",
            grid="base",
            dated=True,
            gsd=10.0,
            plausible=(0.0, 32767.0),
            mean=tuple(mean for mean, _ in _S2_STATISTICS.values()),
            std=tuple(std for _, std in _S2_STATISTICS.values()),
            source="SkySense++ dataset_colors.modal_norm_dict for the ten SkySense bands; B01, B09, B10: EuroSAT "
            "all-bands statistics in public use (B10 exists in L1C only; compute your own with `data stats`)",
            disturbance="reflectance",
            picture="true colour",
            words=frozenset("s2 s2a s2b s2c s2l1c s2l2a msil1c msil2a sentinel2 l2a l1c".split()),
            nodata=0.0,
            floor=1.0,  # a dark valid pixel is never taken for nodata
            offset=Offset(
                usual=-1000.0,  # since processing baseline 04.00
                tags=("BOA_ADD_OFFSET", "RADIO_ADD_OFFSET"),
                product_files=("MTD_MSIL2A.xml", "MTD_MSIL1C.xml"),
                quantification=10000.0,
                hint_band="B02",
                clearly_negative=-200.0,  # reflectance -0.02 is rare even over dark water
                lowest=-2000.0,  # an undeclared nodata such as -9999; above it, noise around zero becomes 1
            ),
            band_words=frozenset({*(band.lower() for band in _S2_STATISTICS), *_S2_NUMBERS, "b08a"}),
            mistakes=(
                Mistake(
                    0.0,
                    2.0,
                    False,
                    "are you passing reflectance 0..1? The model expects digital numbers; multiply by 10000",
                ),
            ),
            # vegetation, bare soil and water: the strict set; the user may add 7 (unclassified) or 11 (snow)
            clear=ClearMask(frozenset({"scl"}), "4;5;6", "Sentinel-2 scene classification"),
            pair="s1",
        ),
        Sensor(
            name="s1",
            title="Sentinel-1",
            bands=("VV", "VH"),
            aliases={"vv": "VV", "vh": "VH", "sigma0_vv": "VV", "sigma0_vh": "VH"},
            unit="db",
            units={"db": Unit(), "linear_power": Unit(10.0, decibel=True), "amplitude": Unit(20.0, decibel=True)},
            dtype="float32",
            grid="base",
            dated=True,
            gsd=10.0,
            plausible=(-60.0, 35.0),
            mean=(-12.54847273, -20.19237134),
            std=(5.25697717, 5.91150917),
            source="SkySense++ dataset_colors.modal_norm_dict (decibel)",
            disturbance="backscatter",
            picture="radar",
            words=frozenset("s1 s1a s1b s1c grd grdh rtc s1rtc s1grd sentinel1 vv vh sigma0 gamma0".split()),
            floor=-50.0,  # below the noise floor of the instrument
            band_words=frozenset({"vv", "vh"}),
            mistakes=(
                Mistake(
                    0.0,
                    float("inf"),
                    False,
                    "no value is negative, this looks like linear power or amplitude; the model expects decibels "
                    "(10 log10 of power, 20 log10 of amplitude)",
                ),
            ),
            pair="s2",
        ),
        Sensor(
            name="dsm",
            title="surface model",
            bands=("height",),
            aliases={"dsm": "height", "dem": "height", "elevation": "height"},
            unit="m",
            units={"m": Unit()},
            dtype="float32",
            grid="fine",
            dated=False,
            gsd=0.5,
            plausible=(-500.0, 9000.0),
            mean=(0.0,),
            std=(10.0,),
            source="a choice: 10 m above or below an image's median height is one unit; compute your own with "
            "`data stats`",
            disturbance="none",
            picture="first band",
            words=frozenset({"dsm", "dem", "dtm", "elevation", "srtm"}),
            pair="hr",
            heights=True,
        ),
    )
}

UNITS = tuple(dict.fromkeys(unit for sensor in SENSORS.values() for unit in sensor.units))
"""Units that any sensor of the table accepts."""

SKYSENSE_BANDS: dict[str, tuple[str, ...]] = {
    "hr": ("R", "G", "B"),
    "s2": ("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12"),
    "s1": ("VV", "VH"),
}
"""The released SkySense models' bands and their order (SkySense release, README and loader)."""

DATUM = "the lower median of an image's valid pixels is subtracted first"
"""How models see heights, in contracts and statistics of sensors that hold them."""

_CONTRACT_GRIDS = {"base": "s2", "fine": "hr"}
"""Grid of a row -> its word in contracts; checkpoints, exports and their PyTorch code hold these words."""


def on_fine_grid(sensor: Sensor | SensorRule) -> bool:
    """Whether a sensor lies on the fine grid; `sensor`: its row, or its rule in an input contract."""
    if isinstance(sensor, Sensor):
        return sensor.grid == "fine"
    return sensor["grid"] == _CONTRACT_GRIDS["fine"]


def pixels_per_base(sensor: Sensor | SensorRule, ratio: int) -> int:
    """Number of pixels of a sensor that lie along one base pixel.

    Args:
        sensor: row of the table, or rule of the sensor in an input contract (`contract["sensors"][name]`).
        ratio: fine pixels along one base pixel.

    Returns:
        `ratio` on the fine grid, 1 on the base grid.
    """
    return int(ratio) if on_fine_grid(sensor) else 1


def base_grid_first() -> tuple[str, ...]:
    """Names of all sensors: those on the base grid, then those on the fine grid, each in the table's order."""
    return tuple(sorted(SENSORS, key=lambda name: on_fine_grid(SENSORS[name])))


def band_name(sensor: str, name: str) -> str:
    """Canonical name of a band spelling (``B2``, ``b02``, ``blue`` -> ``B02``).

    Args:
        sensor: name of a row.
        name: the spelling, in any case.

    Returns:
        A name of the row's `bands` or `unstored`.

    Raises:
        ValueError: the sensor has no such band; the message names the known ones.
    """
    row = SENSORS[sensor]
    text = name.strip()
    for canonical in (*row.bands, *row.unstored):
        if text.lower() == canonical.lower():
            return canonical
    if text.lower() in row.aliases:
        return row.aliases[text.lower()]
    raise ValueError(
        f"band {name!r} is not a band of sensor {sensor!r}; known: {', '.join((*row.bands, *row.unstored))}"
    )


def input_contract(
    bands: Mapping[str, Sequence[str]], ratio: int, statistics: Mapping[str, Mapping[str, Any]] | None = None
) -> dict[str, Any]:
    """What a model expects of its input, as a JSON-able dict.

    Args:
        bands: sensor -> band names in the model's order.
        ratio: HR pixels along one base pixel.
        statistics: sensor -> {"mean": per table band, "std": per table band, "source": text, "datum" for heights} in
            the *table's* band order (as `data stats` stores them); the table's own statistics where absent.

    Returns:
        {"format": 1, "ratio": R, "sensors": {name: {"bands": [...], "unit": str, "grid": "hr" (fine) or "s2" (base),
        "gsd": metres, "mean": [...], "std": [...], "statistics_source": str, "missing": rule}}} with mean and std in
        the model's band order; "datum": rule, for heights only. Read the grid with :func:`on_fine_grid`.

    Raises:
        ValueError: an unknown sensor, an unknown or repeated band, a non-positive deviation, or statistics of absolute
            heights.
    """
    contract: dict[str, Any] = {"format": 1, "ratio": int(ratio), "sensors": {}}
    for name, spellings in bands.items():
        if name not in SENSORS:
            raise ValueError(f"unknown sensor {name!r}; the table has {', '.join(SENSORS)}")
        row = SENSORS[name]
        names = [band_name(name, band) for band in spellings]
        if len(set(names)) != len(names) or not names:
            raise ValueError(f"sensor {name!r}: bands must be distinct and not empty, got {names}")
        stated = (statistics or {}).get(name, {})
        if row.heights and stated and "datum" not in stated:
            raise ValueError(
                f"sensor {name!r}: these statistics are of absolute heights, models see them above each "
                "image's median; run `skysense-jax data stats` on the dataset again"
            )
        mean, std = stated.get("mean", row.mean), stated.get("std", row.std)
        columns = {**dict(zip(row.bands, zip(mean, std, strict=True), strict=True)), **row.unstored}
        deviations = [float(columns[band][1]) for band in names]
        if min(deviations) <= 0:
            raise ValueError(
                f"sensor {name!r}: a standard deviation of {min(deviations)} cannot normalise; bands {names}"
            )
        contract["sensors"][name] = {
            "bands": names,
            "unit": row.unit,
            "grid": _CONTRACT_GRIDS[row.grid],
            "gsd": row.gsd,
            "mean": [float(columns[band][0]) for band in names],
            "std": deviations,
            "statistics_source": str(stated.get("source", row.source)),
            "missing": "invalid pixels and unmeasured bands are 0 after normalisation; absent dates are masked",
        }
        if row.heights:
            contract["sensors"][name]["datum"] = DATUM
    return contract


def sensor_rule(contract: Contract, sensor: str) -> SensorRule:
    """Looks a sensor up in an input contract.

    Args:
        contract: the model's input contract.
        sensor: name of the sensor.

    Returns:
        The sensor's entry: bands, unit, grid, statistics.

    Raises:
        ValueError: the contract has no such sensor.
    """
    if sensor not in contract["sensors"]:
        raise ValueError(f"the model takes no {sensor!r}; its input contract has {', '.join(contract['sensors'])}")
    return contract["sensors"][sensor]


def check_contract(contract: Contract, sensor: str, bands: Sequence[str], unit: str) -> None:
    """Checks that images of a sensor are what a model's input contract expects.

    Args:
        contract: the model's input contract.
        sensor: name of the sensor.
        bands: the images' band names, in order.
        unit: the images' unit.

    Raises:
        ValueError: the contract has no such sensor, other bands or another unit; the message says which.
    """
    expected = sensor_rule(contract, sensor)
    if list(bands) != expected["bands"]:
        raise ValueError(f"{sensor}: bands {list(bands)} given, the model expects {expected['bands']} in this order")
    if unit != expected["unit"]:
        raise ValueError(f"{sensor}: unit {unit!r} given, the model expects {expected['unit']!r}")

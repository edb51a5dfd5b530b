"""The table of sensors: what every instrument measures, in which unit it is stored, how a model asks for it. Data only.

A record stores what was measured under the instrument's name; a model's *input contract* (:func:`input_contract`)
selects bands by name and order and carries the statistics it normalises with. The contract is a plain JSON value: it is
stored inside every checkpoint and every exported folder and is checked at every door. Adding a sensor is adding a row
to :data:`SENSORS`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

UNITS = ("dn", "reflectance", "linear_power", "amplitude", "db", "m")
"""Units a catalog may declare; each sensor accepts only those its row lists."""

NO_DATE = -1
"""Stored date of an acquisition whose date is unknown (allowed only for sensors with ``dated=False``)."""

LAST_DAY = 364
"""Last row of the calendar table; 31 December of a leap year is clamped to it."""

UNLABELLED = 255
"""Value of a label-map pixel without a label."""


class Sensor(NamedTuple):
    """One row of the table.

    name: key of the sensor everywhere (records, configs, parameters). bands: canonical names in storage order.
    aliases: other spellings of a band -> canonical name (lower case). unit: unit of the stored values.
    units_accepted: units a catalog may declare for it; the ingest converts them to ``unit``. dtype: storage dtype.
    grid: "s2" = one pixel per base pixel of the tile, "hr" = ratio x ratio pixels under each base pixel.
    dated: a time series, an acquisition without a date is refused. gsd: native pixel size in metres.
    plausible: (low, high) of stored valid values, used to refuse absurd input. nodata: the instrument's customary
    nodata value, or None; it applies on top of the file's own nodata. offset_required: the additive offset must be
    known from metadata or the catalog (Sentinel-2, processing baseline 04.00). mean, std: default statistics per band
    in stored units; source: where they come from. unstored: bands a model may take that records do not hold -> (mean,
    std).
    pair: the sensor that msGFM reconstructs from this one where a place has both; "" = none. heights: values above an
    arbitrary datum, which models see above the median of each image (mean and std are of those).
    """

    name: str
    bands: tuple[str, ...]
    aliases: Mapping[str, str]
    unit: str
    units_accepted: tuple[str, ...]
    dtype: str
    grid: str
    dated: bool
    gsd: float
    plausible: tuple[float, float]
    nodata: float | None
    offset_required: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]
    source: str
    unstored: Mapping[str, tuple[float, float]] = {}
    pair: str = ""
    heights: bool = False


_S2_BANDS = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B10", "B11", "B12")
# STAC common names (eo:common_name) and the short ESA spelling without the zero.
_S2_ALIASES = {
    **{f"b{i}": f"B{i:02d}" for i in range(1, 13)},
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
            bands=("R", "G", "B"),
            aliases={"red": "R", "green": "G", "blue": "B"},
            unit="dn",
            units_accepted=("dn",),
            dtype="uint8",
            grid="hr",
            dated=False,
            gsd=0.3,
            plausible=(0.0, 255.0),
            nodata=None,
            offset_required=False,
            mean=(123.675, 116.28, 103.53),
            std=(58.395, 57.12, 57.375),
            source="ImageNet statistics on 0..255, as in the SkySense release's iSAID and DIOR configurations",
            unstored={"NIR": (123.675, 58.395)},  # four-band encoders start from the red kernel: red's statistics
            pair="dsm",
        ),
        Sensor(
            name="s2",
            bands=_S2_BANDS,
            aliases=_S2_ALIASES,
            unit="dn",
            units_accepted=("dn", "reflectance"),
            dtype="uint16",
            grid="s2",
            dated=True,
            gsd=10.0,
            plausible=(0.0, 32767.0),
            nodata=0.0,
            offset_required=True,
            mean=(
                1354.40546513,
                884.29673756,
                1144.16202635,
                1297.47289228,
                1624.90992062,
                2194.6423161,
                2422.21248945,
                2517.76053101,
                2581.64687018,
                732.08340178,
                12.11327804,
                2368.51236873,
                1805.06846033,
            ),
            std=(
                245.71762908,
                1155.15170768,
                1183.6292542,
                1368.11351514,
                1370.265037,
                1355.55390699,
                1416.51487101,
                1474.78900051,
                1439.3086061,
                404.91978886,
                4.77584468,
                1455.52084939,
                1343.48379601,
            ),
            source="SkySense++ dataset_colors.modal_norm_dict for the ten SkySense bands; B01, B09, B10: EuroSAT "
            "all-bands statistics in public use (B10 exists in L1C only; compute your own with `data stats`)",
            pair="s1",
        ),
        Sensor(
            name="s1",
            bands=("VV", "VH"),
            aliases={"vv": "VV", "vh": "VH", "sigma0_vv": "VV", "sigma0_vh": "VH"},
            unit="db",
            units_accepted=("db", "linear_power", "amplitude"),
            dtype="float32",
            grid="s2",
            dated=True,
            gsd=10.0,
            plausible=(-60.0, 35.0),
            nodata=None,
            offset_required=False,
            mean=(-12.54847273, -20.19237134),
            std=(5.25697717, 5.91150917),
            source="SkySense++ dataset_colors.modal_norm_dict (decibel)",
            pair="s2",
        ),
        Sensor(
            name="dsm",
            bands=("height",),
            aliases={"dsm": "height", "dem": "height", "elevation": "height"},
            unit="m",
            units_accepted=("m",),
            dtype="float32",
            grid="hr",
            dated=False,
            gsd=0.5,
            plausible=(-500.0, 9000.0),
            nodata=None,
            offset_required=False,
            mean=(0.0,),
            std=(10.0,),
            source="a choice: 10 m above or below an image's median height is one unit; compute your own with "
            "`data stats`",
            pair="hr",
            heights=True,
        ),
    )
}

SKYSENSE_BANDS: dict[str, tuple[str, ...]] = {
    "hr": ("R", "G", "B"),
    "s2": ("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12"),
    "s1": ("VV", "VH"),
}
"""The released SkySense models' bands and their order (SkySense release, README and loader)."""


def band_name(sensor: str, name: str) -> str:
    """Canonical name of a band spelling (``B2``, ``b02``, ``blue`` -> ``B02``). ValueError names the known ones."""
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


DATUM = "the lower median of an image's valid pixels is subtracted first"
"""How models see heights, in contracts and statistics of sensors that hold them."""


def input_contract(
    bands: Mapping[str, Sequence[str]],
    ratio: int,
    statistics: Mapping[str, Mapping[str, Sequence[float]]] | None = None,
) -> dict[str, Any]:
    """What a model expects of its input, as a JSON-able dict.

    bands: sensor -> band names in the model's order. ratio: HR pixels along one base pixel. statistics: sensor ->
    {"mean": per table band, "std": per table band, "source": text, "datum" for heights} in the *table's* band order (as
    `data stats` stores them); the table's own statistics where absent.

    Returns {"format": 1, "ratio": R, "sensors": {name: {"bands": [...], "unit": str, "grid": "hr"|"s2", "gsd": metres,
    "mean": [...], "std": [...], "statistics_source": str, "missing": rule}}} with mean/std in the model's band order;
    "datum": rule, for heights only. Raises ValueError for an unknown sensor, an unknown or repeated band, a
    non-positive deviation.
    """
    contract: dict[str, Any] = {"format": 1, "ratio": int(ratio), "sensors": {}}
    for name, wanted in bands.items():
        if name not in SENSORS:
            raise ValueError(f"unknown sensor {name!r}; the table has {', '.join(SENSORS)}")
        row = SENSORS[name]
        wanted = [band_name(name, band) for band in wanted]
        if len(set(wanted)) != len(wanted) or not wanted:
            raise ValueError(f"sensor {name!r}: bands must be distinct and not empty, got {wanted}")
        given = (statistics or {}).get(name, {})
        if row.heights and given and "datum" not in given:
            raise ValueError(
                f"sensor {name!r}: these statistics are of absolute heights, models see them above each "
                "image's median; run `skysense-jax data stats` on the dataset again"
            )
        mean, std = given.get("mean", row.mean), given.get("std", row.std)
        columns = {**dict(zip(row.bands, zip(mean, std))), **row.unstored}
        picked_std = [float(columns[band][1]) for band in wanted]
        if min(picked_std) <= 0:
            raise ValueError(
                f"sensor {name!r}: a standard deviation of {min(picked_std)} cannot normalise; bands {wanted}"
            )
        contract["sensors"][name] = {
            "bands": wanted,
            "unit": row.unit,
            "grid": row.grid,
            "gsd": row.gsd,
            "mean": [float(columns[band][0]) for band in wanted],
            "std": picked_std,
            "statistics_source": str(given.get("source", row.source)),
            "missing": "invalid pixels and unmeasured bands are 0 after normalisation; absent dates are masked",
        }
        if row.heights:
            contract["sensors"][name]["datum"] = DATUM
    return contract


def check_contract(contract: Mapping[str, Any], sensor: str, bands: Sequence[str], unit: str) -> None:
    """ValueError unless `bands` (names, in order) and `unit` are what the contract expects of `sensor`."""
    if sensor not in contract["sensors"]:
        raise ValueError(f"the model takes no {sensor!r}; its input contract has {', '.join(contract['sensors'])}")
    expected = contract["sensors"][sensor]
    if list(bands) != expected["bands"]:
        raise ValueError(f"{sensor}: bands {list(bands)} given, the model expects {expected['bands']} in this order")
    if unit != expected["unit"]:
        raise ValueError(f"{sensor}: unit {unit!r} given, the model expects {expected['unit']!r}")

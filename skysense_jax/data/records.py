"""Records of places: what a record holds, random access to the records of a dataset, and the dataset's metadata.

This file is the one contract between what writes records (`ingest`) and what reads them (`batches`). It also checks
that a dataset fits a model's input contract.
"""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, SupportsIndex

import numpy as np
import tensorflow_datasets as tfds
from ml_collections import config_dict

from skysense_jax import sensors
from skysense_jax.core import paths

METADATA = "places.json"
SYNTHETIC_TAG = "SKYSENSE_SYNTHETIC"
"""Tag of every raster whose pixels were rendered, not measured."""
SPLITS = ("train", "test")
"""Splits of a dataset, in the order in which their places are numbered."""

Record = Mapping[str, Any]
"""What is stored of a place: the fields of :func:`record_features`."""

Meta = Mapping[str, Any]
"""The metadata of a dataset, the content of its places.json."""


def as_text(value: object) -> str:
    """The text of a field of a record, which TFDS may have read as bytes."""
    return value.decode() if isinstance(value, bytes) else str(value)


def record_features(names: Sequence[str], tile: int, ratio: int, n_classes: int) -> tfds.features.FeaturesDict:
    """Features of a record: one place of N x N base pixels (N = tile), S = N (base grid) or N * ratio (fine grid).

    The fields of a record:
        place, crs: text.
        lon, lat: float64 degrees of the centre.
        footprint: float64 [4] left, bottom, right, top in `crs`.
        label: uint8 [K] multi-hot, K = max(n_classes, 1); all 0 = unlabelled.
        label_map: uint8 [N, N], 255 = unlabelled.

    and, for each sensor x with C bands (all bands of its table row) and T dates (T = 0 where the sensor is missing):
        x_image: [T, S, S, C] in the stored dtype and unit, 0 where invalid.
        x_valid, x_clear: uint8 [T, S, S].
        x_measured: uint8 [T, C].
        x_date: int32 [T] days since 1970-01-01, ascending.

    Tensors are stored as raw bytes: encoding a 1 MB series this way costs milliseconds, TFDS's default costs a hundred
    times that.

    Args:
        names: the dataset's sensors.
        tile: base pixels along a tile.
        ratio: HR pixels along a base pixel.
        n_classes: classes of the scene label.

    Returns:
        The features by field name.
    """

    def tensor(shape: tuple[int | None, ...], dtype: str) -> tfds.features.Tensor:
        return tfds.features.Tensor(shape=shape, dtype=np.dtype(dtype), encoding="bytes")

    features = {
        "place": tfds.features.Text(),
        "crs": tfds.features.Text(),
        "lon": tensor((), "float64"),
        "lat": tensor((), "float64"),  # bytes: a TFDS scalar is stored as float32
        "footprint": tensor((4,), "float64"),
        "label": tensor((max(n_classes, 1),), "uint8"),
        "label_map": tensor((tile, tile), "uint8"),
    }
    for name in names:
        row = sensors.SENSORS[name]
        side, count = tile * sensors.pixels_per_base(row, ratio), len(row.bands)
        features[f"{name}_image"] = tensor((None, side, side, count), row.dtype)
        features[f"{name}_valid"] = tensor((None, side, side), "uint8")
        features[f"{name}_clear"] = tensor((None, side, side), "uint8")
        features[f"{name}_measured"] = tensor((None, count), "uint8")
        features[f"{name}_date"] = tensor((None,), "int32")
    return tfds.features.FeaturesDict(features)


class RecordSource(Protocol):
    """Records by random access, as TFDS reads them; an unreadable record raises RuntimeError."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> dict[str, Any]: ...


class Places:
    """One split by random access: `len(places)`, `places[i]` -> record (dict of arrays, its number under "index").

    A record that cannot be read (ArrayRecord keeps a checksum of each) is named on stderr, and the next sound record in
    stored order is read in its place, under the number of that next record: which place is read stays a function of the
    data alone. Indexing raises ValueError once more than `allowed` records are damaged. Can be pickled.
    """

    def __init__(
        self, records: RecordSource, split: str = "", shards: Sequence[tuple[str, int]] = (), allowed: int = 0
    ):
        """Wraps a source of records.

        Args:
            records: the records of the split.
            split: name of the split, for messages.
            shards: (file, number of its records) in order, for messages.
            allowed: damaged records that may be passed over.
        """
        self._records, self._split, self._shards, self._allowed = records, split, tuple(shards), allowed
        self._damaged: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        number = int(index)
        while True:
            try:
                return {**self._records[number], "index": number}
            except RuntimeError as error:  # what array_record raises for a damaged record, shard or missing file
                following = (number + 1) % len(self)
                self._pass_over(number, following, str(error).splitlines()[0])
                number = following

    def _pass_over(self, number: int, following: int, reason: str) -> None:
        new = number not in self._damaged
        self._damaged[number] = reason
        count, where = len(self._damaged), self._where(number)
        if count > min(self._allowed, len(self) - 1):
            raise ValueError(
                f"{count} damaged records, config.data.max_bad_records allows {self._allowed}: "
                f"{', '.join(map(str, sorted(self._damaged)[:10]))}; {where}: {reason}. "
                "Build the dataset again or copy it anew"
            )
        if new:
            sys.stderr.write(
                f"damaged record ({count} of at most {self._allowed}): {where}: {reason}; "
                f"record {following} is read in its place\n"
            )

    def _where(self, number: int) -> str:
        """Record and file in words, for messages."""
        first = 0
        for file, count in self._shards:
            if number < first + count:
                return f"record {number} of split {self._split} (number {number - first} in {file})"
            first += count
        return f"record {number}"


def read_metadata(folder: str | pathlib.Path) -> Meta:
    """The metadata that `skysense-jax data build` wrote beside the records.

    Raises:
        ValueError: the metadata are absent, unreadable, incomplete, or of a format that this version does not read.
    """
    if not str(folder):
        raise ValueError("no dataset given: set config.data.dir to a folder written by `skysense-jax data build`")
    path = paths.path(folder) / METADATA
    if not path.is_file():
        raise ValueError(
            f"{folder} is not a dataset of places: {METADATA} is missing; "
            "write one with `skysense-jax data build --out DIR`"
        )
    try:
        meta = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not readable JSON ({error}); build the dataset again") from error
    missing = [field for field in ("format", "tile", "ratio", "sensors") if field not in meta]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}; build the dataset again")
    if meta["format"] != 1:
        raise ValueError(f"{path}: format {meta['format']} is not known to this version, which reads format 1")
    return meta


def _builder(folder: str | pathlib.Path) -> Any:
    """TFDS's reader of a dataset. Raises ValueError where `folder` is no dataset or its build did not finish."""
    read_metadata(folder)
    if not (paths.path(folder) / "dataset_info.json").is_file():
        raise ValueError(
            f"{folder}: dataset_info.json is missing, the build did not finish; run `skysense-jax data build` again"
        )
    return tfds.builder_from_directory(str(folder))


def open_places(folder: str | pathlib.Path, split: str, allowed: int = 0, only: Sequence[str] | None = None) -> Places:
    """The records of a split by random access.

    Args:
        folder: the dataset's folder.
        split: name of the split.
        allowed: damaged records that may be passed over.
        only: names of the features to decode; None = all.

    Returns:
        The places of the split.

    Raises:
        ValueError: `folder` is no dataset, or the split is absent or empty.
    """
    builder = _builder(folder)
    if split not in builder.info.splits:
        raise ValueError(f"{folder} has no split {split!r}; it has {', '.join(sorted(builder.info.splits)) or 'none'}")
    if not builder.info.splits[split].num_examples:
        raise ValueError(f"{folder}: split {split!r} holds no places")
    info = builder.info.splits[split]
    shards = [(pathlib.Path(path).name, count) for path, count in zip(info.filepaths, info.shard_lengths, strict=True)]
    skipped = [] if only is None else [name for name in builder.info.features if name not in only]
    decoders = {name: tfds.decode.SkipDecoding() for name in skipped}
    return Places(builder.as_data_source(split=split, decoders=decoders or None), split, shards, allowed)


def splits(folder: str | pathlib.Path) -> tuple[str, ...]:
    """The splits of a dataset that hold places, "train" before "test". Raises ValueError: no dataset."""
    infos = _builder(folder).info.splits
    return tuple(name for name in SPLITS if name in infos and infos[name].num_examples)


def locations(folder: str | pathlib.Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Where the places of a split lie. Reads every record once, decodes no image.

    Args:
        folder: the dataset's folder.
        split: name of the split.

    Returns:
        (longitudes, latitudes) of every place, float32 degrees as batches have them, nan where unknown.

    Raises:
        ValueError: as :func:`open_places`.
    """
    places = open_places(folder, split, only=("lon", "lat"))
    records = map(places.__getitem__, range(len(places)))
    lon, lat = np.asarray([(record["lon"], record["lat"]) for record in records], np.float32).T
    return lon, lat


def holdings(folder: str | pathlib.Path, split: str, names: Sequence[str], allowed: int = 0) -> dict[str, np.ndarray]:
    """Which places of a split have which sensors.

    Reads every record once and decodes no image; of a dataset with a single sensor it reads no record, because every
    place has that sensor.

    Args:
        folder: the dataset's folder.
        split: name of the split.
        names: sensors to look for; those that the dataset does not have are left out of the result.
        allowed: damaged records that may be passed over.

    Returns:
        {sensor: bool [places], whether the place has an acquisition of the sensor}.

    Raises:
        ValueError: as :func:`open_places`.
    """
    stored = read_metadata(folder)["sensors"]
    names = [name for name in names if name in stored]
    if len(stored) == 1:
        return {name: np.ones(len(open_places(folder, split)), bool) for name in names}
    places = open_places(folder, split, allowed, [f"{name}_measured" for name in names])
    records = map(places.__getitem__, range(len(places)))
    has = [[len(record[f"{name}_measured"]) > 0 for name in names] for record in records]
    return dict(zip(names, np.asarray(has, bool).T, strict=True))


def check_georeferenced(meta: Meta, folder: str | pathlib.Path) -> None:
    """Refuses a dataset whose images have no position on the ground.

    Args:
        meta: the dataset's metadata (`read_metadata`).
        folder: the dataset's folder, for the message.

    Raises:
        ValueError: the dataset has no georeference.
    """
    if not meta.get("georeferenced", True):
        raise ValueError(
            f"the dataset in {folder} has no georeference; only config.model.name='msgfm' learns from such images"
        )


def check_dataset(meta: Meta, contract: sensors.Contract, cfg: config_dict.ConfigDict) -> None:
    """Refuses a dataset that does not fit the input contract and the configuration.

    Fields that a configuration does not have, as msGFM's views, are not checked.

    Args:
        meta: the dataset's metadata (`read_metadata`).
        contract: the model's input contract (`sensors.input_contract`).
        cfg: the whole configuration; `cfg.data` and `cfg.model.ratio` are read.

    Raises:
        ValueError: dataset, contract and configuration do not fit together; the message names the field and the fix.
    """
    data = cfg.data
    for name, rule in contract["sensors"].items():
        if name not in meta["sensors"]:
            raise ValueError(
                f"the model takes {name!r}, the dataset in {data.dir} holds {', '.join(meta['sensors'])}; "
                f"drop {name!r} from config.data.bands or build a dataset that has it"
            )
        if name not in data.bands or list(data.bands[name]) != list(rule["bands"]):
            configured = list(data.bands[name]) if name in data.bands else "no bands"
            raise ValueError(f"config.data.bands has {configured} for {name!r}, the input contract {rule['bands']}")
        if unstored := [band for band in rule["bands"] if band in sensors.SENSORS[name].unstored]:
            raise ValueError(
                f"the model takes {unstored} of {name!r}, which records do not hold; use `load` with arrays"
            )
        for field in ("dates", "eval_dates"):
            if field in data and (name not in data[field] or data[field][name] < 1):
                raise ValueError(f"config.data.{field} needs a number of acquisitions >= 1 for {name!r}")
    for name in data.bands:
        if name not in contract["sensors"]:
            raise ValueError(f"config.data.bands names {name!r}, which the input contract does not have")
    if contract["ratio"] != cfg.model.ratio:
        raise ValueError(f"config.model.ratio is {cfg.model.ratio}, the input contract says {contract['ratio']}")
    fine = any(sensors.on_fine_grid(rule) for rule in contract["sensors"].values())
    if fine and meta["ratio"] != contract["ratio"]:
        raise ValueError(
            f"the dataset in {data.dir} has {meta['ratio']} HR pixels along a base pixel, "
            f"the model {contract['ratio']}; build the dataset with --ratio {contract['ratio']} or change the model"
        )
    for field in ("global_size", "local_size") if data.get("n_local") else ("global_size",):
        if field in data and not 0 < data[field] <= meta["tile"]:
            raise ValueError(
                f"config.data.{field}={data[field]} must lie in 1..{meta['tile']}, the dataset's tile in base pixels"
            )


def read_place(folder: str | pathlib.Path, place: str) -> tuple[Record, Meta]:
    """One place of a built dataset.

    Args:
        folder: the dataset's folder.
        place: id of the place, or its number: train places first, then test places.

    Returns:
        (record, metadata of the dataset).

    Raises:
        ValueError: `folder` is no dataset of places, or has no such place; the message names the folder.
    """
    meta, before = read_metadata(folder), 0  # places of the splits before this split
    for split in splits(folder):
        source = open_places(folder, split)
        if place.isdigit():
            if int(place) - before < len(source):
                return source[int(place) - before], meta
        else:
            for index in range(len(source)):
                if as_text(source[index]["place"]) == place:
                    return source[index], meta
        before += len(source)
    raise ValueError(f"{folder} has no place {place!r}; it has {before} places: give an id, or a number below that")

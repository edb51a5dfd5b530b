"""Writes one part of a dataset: the records of a fixed group of places in one ArrayRecord file with a JSON sidecar.

Both files are written under a temporary name, synced and renamed, the sidecar last: a part with a sidecar is complete,
whatever happened to the process afterwards.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.core.example_serializer import ExampleSerializer

from skysense_jax.core.files import encode, move, temporary_name, write_atomically
from skysense_jax.data.ingest.catalog import Row
from skysense_jax.data.ingest.places import Settings, ingest_place
from skysense_jax.data.ingest.plain_images import open_picture
from skysense_jax.data.ingest.raster import BrokenFile, Files, gdal_settings
from skysense_jax.data.ingest.report import Report, merge, new_report
from skysense_jax.data.records import record_features

WRITER_OPTIONS = "group_size:1"  # one record per chunk: random access reads one record and no more


class Unit(NamedTuple):
    """The places of one part of a dataset.

    Attributes:
        name: "<split>-<number>", the name of the part's files.
        split: "train" or "test".
        places: (name, catalog rows) of every place, in order.
    """

    name: str
    split: str
    places: tuple[tuple[str, tuple[Row, ...]], ...]


@functools.lru_cache(maxsize=1)
def features_of(settings: Settings) -> tfds.features.FeaturesDict:
    """The features of the dataset's records, made once per process."""
    return record_features(settings.sensors, settings.tile, settings.ratio, len(settings.label_classes))


def _records(unit: Unit, settings: Settings, broken: dict[Path, str], report: Report) -> Iterator[bytes]:
    """The serialised records of a unit; their counts are added to `report`."""
    features = features_of(settings)
    serializer = ExampleSerializer(features.get_serialized_info())
    # a decoded picture is held in memory as a whole, and its place needs no other file but a mask beside it
    files = Files() if settings.georeferenced else Files(2, open_picture)
    with gdal_settings(), contextlib.closing(files):
        for place, rows in unit.places:
            of_place = new_report(settings.sensors)
            for record in ingest_place(place, rows, settings, files, broken, of_place):
                # features.serialize_example writes the same map in an order of its own in every process
                yield serializer.get_tf_example(features.encode_example(record)).SerializeToString(deterministic=True)
            merge(report, of_place)


def run_unit(unit: Unit, settings: Settings, folder: Path | None, key: str) -> dict[str, Any]:
    """Ingests one unit and writes its part and sidecar.

    A file that fails while it is read is left out, and the unit starts over.

    Args:
        unit: the places to ingest.
        settings: the build's settings.
        folder: DIR/parts; None = read everything and write nothing.
        key: the build's key, stored in the sidecar.

    Returns:
        The sidecar's content: {"key", "length": records, "bytes", "sha256" over the records, "places", "report"}.
    """
    broken: dict[Path, str] = {}
    part = None if folder is None else folder / f"{unit.name}.array_record"
    temporary = None if part is None else temporary_name(part)
    while True:
        report, digest, length, size = new_report(settings.sensors), hashlib.sha256(), 0, 0
        writer = ArrayRecordWriter(str(temporary), WRITER_OPTIONS) if temporary else None
        try:
            for record in _records(unit, settings, broken, report):
                digest.update(len(record).to_bytes(8, "little") + record)
                length, size = length + 1, size + len(record)
                if writer:
                    writer.write(record)
            break
        except BrokenFile as error:
            broken[error.path] = error.reason
        finally:
            if writer:
                writer.close()
    done = {
        "key": key,
        "length": length,
        "bytes": size,
        "sha256": digest.hexdigest(),
        "places": len(unit.places),
        "report": report,
    }
    if folder is not None and part is not None and temporary is not None:
        if length:
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            move(temporary, part)
        else:
            temporary.unlink()
        write_atomically(folder / f"{unit.name}.json", encode(done))
    return done

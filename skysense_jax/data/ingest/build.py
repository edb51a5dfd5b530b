"""Builds a dataset from a catalog: parallel over processes or machines, resumable, each part written once and
atomically.

The catalog's places, sorted by name, fall into fixed units of one split each. A unit becomes
DIR/parts/<split>-<number>.array_record plus a JSON sidecar, both written under a temporary name, synced and renamed,
the sidecar last: a unit with a sidecar is done, whatever happened to the process afterwards. At the end the non-empty
parts are renamed to TFDS shard names, TFDS's own metadata are written, and places.json, written last, marks the
dataset as complete. `check` is the same without writing.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tensorflow_datasets as tfds
from tqdm import tqdm

from skysense_jax.core.files import encode, move, write_atomically
from skysense_jax.data.ingest.catalog import SPLITS, Catalog, Row, read_catalog
from skysense_jax.data.ingest.on_processes import in_processes
from skysense_jax.data.ingest.places import Settings
from skysense_jax.data.ingest.raster import MAX_PIXELS
from skysense_jax.data.ingest.report import REFUSED, merge, new_report, summary
from skysense_jax.data.ingest.shards import Unit, features_of
from skysense_jax.data.records import METADATA
from skysense_jax.sensors import SENSORS

FORMAT = 1
NAME = "places"
FILES = "files.jsonl"
PARTS = "parts"


RunUnits = Callable[[Sequence[Unit], Settings, Path, str], Iterator[tuple[Unit, dict[str, Any]]]]
"""(units, settings, DIR/parts, build key) -> every unit with what `run_unit` says of it, in any order."""


class BuildError(ValueError):
    """The build cannot be done as asked: wrong options, or a folder that holds something else."""


class Options(NamedTuple):
    """Options that decide what the records are (workers and progress do not). sensors: () = all of the catalog.
    holdout: share of places that go to the test split by hash of their name, where the catalog does not say.
    georeferenced: False = images without a place on Earth (`pictures`); gsd and max_upsample then mean nothing.
    """

    tile: int = 16
    gsd: float = 10.0
    ratio: int = 16
    sensors: tuple[str, ...] = ()
    holdout: float = 0.2
    shard_places: int = 8
    max_pixels: int = MAX_PIXELS
    max_upsample: float = 8.0
    georeferenced: bool = True


def split_of(place: str, rows: Sequence[Row], holdout: float) -> str:
    """Split "train" or "test": the catalog's word, else by a hash of the place's name (the same for every catalog it
    appears in).
    """
    if rows[0].split:
        return rows[0].split
    draw = int.from_bytes(hashlib.sha256(place.encode()).digest()[:8], "big") / 2**64
    return "test" if draw < holdout else "train"


def plan(catalog: Catalog, options: Options) -> tuple[Settings, list[Unit]]:
    """The settings every worker gets, and the fixed units of the build. Raises BuildError."""
    unknown = [name for name in options.sensors if name not in catalog.sensors]
    if unknown:
        raise BuildError(
            f"--sensors {','.join(unknown)}: no such images in the catalog, which has {','.join(catalog.sensors)}"
        )
    sensors = tuple(name for name in SENSORS if name in (options.sensors or catalog.sensors))
    if not sensors:
        raise BuildError(
            f"{catalog.path}: no usable image row"
            + "".join(f"\n  row {entry['row']}: {entry['path']}: {entry['reason']}" for entry in catalog.refused[:10])
        )
    if (
        options.tile < 1
        or options.ratio < 1
        or options.gsd <= 0
        or options.shard_places < 1
        or not 0 <= options.holdout <= 1
    ):
        raise BuildError(f"tile, ratio, gsd and shard places must be positive and holdout within 0..1, got {options}")
    default = Options()
    if not options.georeferenced and (options.gsd, options.max_upsample) != (default.gsd, default.max_upsample):
        raise BuildError("gsd and max upsample mean nothing where the size of a pixel on the ground is not known")
    settings = Settings(
        options.tile,
        options.gsd,
        options.ratio,
        sensors,
        catalog.label_classes,
        catalog.root,
        options.max_pixels,
        options.max_upsample,
        options.georeferenced,
    )
    by_split: dict[str, list] = {split: [] for split in SPLITS}
    for place, rows in catalog.places.items():
        left_out = set(catalog.sensors) - set(sensors)
        rows = tuple(row for row in rows if row.sensor not in left_out)
        if rows:
            by_split[split_of(place, rows, options.holdout)].append((place, rows))
    step = options.shard_places
    units = [
        Unit(f"{split}-{start // step:05d}", split, tuple(places[start : start + step]))
        for split, places in by_split.items()
        for start in range(0, len(places), step)
    ]
    return settings, units


def _collect(done: Sequence[dict[str, Any]], catalog: Catalog, settings: Settings) -> dict[str, Any]:
    """One report of all units plus the rows the catalog itself refused, files in row order."""
    total = new_report(settings.sensors)
    for part in done:
        merge(total, part["report"])
    total["files"] += [{**entry, "status": REFUSED} for entry in catalog.refused]
    total["files"].sort(key=lambda entry: entry["row"])
    lost = {entry["place"] for entry in catalog.refused} - set(catalog.places)
    total["places"] += len(lost)
    total["places_without_tiles"] = sorted({*total["places_without_tiles"], *lost})
    return total


def _progress(units: Sequence[Unit], finished: Sequence[dict[str, Any]], show: bool) -> tqdm:
    return tqdm(
        total=sum(len(unit.places) for unit in units),
        initial=sum(part["places"] for part in finished),
        unit="place",
        desc="ingest",
        disable=not show,
        mininterval=0.5,
    )


def check(catalog_path: str | Path, options: Options, workers: int = 1, progress: bool = True) -> dict[str, Any]:
    """Reads everything a build would read and returns the report, writing nothing. Raises CatalogError, BuildError."""
    catalog = read_catalog(catalog_path)
    settings, units = plan(catalog, options)
    done: dict[str, dict[str, Any]] = {}
    with _progress(units, (), progress) as bar:
        for unit, result in in_processes(units, settings, None, "", workers):
            done[unit.name] = result
            bar.update(len(unit.places))
    return summary(_collect([done[unit.name] for unit in units], catalog, settings))


@contextlib.contextmanager
def _claimed(out: Path, key: str, described: dict[str, Any]) -> Iterator[Path]:
    """DIR/parts, made or found to belong to the same build, and locked against a second process."""
    folder = out / PARTS
    others = [entry.name for entry in out.iterdir() if entry.name != PARTS] if out.is_dir() else []
    if others and not (folder / "build.json").is_file():
        raise BuildError(
            f"{out} is neither empty nor an unfinished build (it has {', '.join(sorted(others)[:5])}); choose "
            f"another --out"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BuildError(f"another process is building {out}") from error
        stamp = folder / "build.json"
        if stamp.is_file():
            _same(json.loads(stamp.read_bytes()), key, described, out)
        else:
            write_atomically(stamp, encode({"build_key": key} | described))
        for left in folder.glob(".*.tmp-*"):
            left.unlink()
        yield folder


def _same(found: dict[str, Any], key: str, described: dict[str, Any], out: Path) -> None:
    if found.get("build_key") != key:
        theirs = found.get("build", {})
        different = [
            f"{name}: {theirs.get(name)!r} there, {value!r} now"
            for name, value in described["build"].items()
            if theirs.get(name) != value
        ]
        raise BuildError(
            f"{out} was built with another catalog or other options ({'; '.join(different)}); choose another --out"
        )


def build(
    catalog_path: str | Path,
    out: str | Path,
    options: Options = Options(),
    workers: int = 1,
    progress: bool = True,
    run_units: RunUnits | None = None,
) -> tuple[dict[str, Any], bool]:
    """Builds, continues or finds complete the dataset in `out`; returns (content of places.json, whether anything was
    done). run_units: what runs the units; None: `workers` processes of this machine.

    Raises CatalogError (unusable catalog), BuildError (options, or `out` holds something else; also where nothing
    usable came out).
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise BuildError(f"{out} is not a folder")
    catalog = read_catalog(catalog_path)
    settings, units = plan(catalog, options)
    asked = json.loads(json.dumps(options._asdict()))
    if options.georeferenced:
        del asked["georeferenced"]  # datasets from before there was a choice keep their key and id
    described = {"build": {"format": FORMAT, "catalog_sha256": catalog.sha256} | asked}
    key = hashlib.sha256(encode(described)).hexdigest()
    if (out / METADATA).is_file():
        meta = json.loads((out / METADATA).read_bytes())
        _same(meta, key, described, out)
        if (out / PARTS).is_dir():
            shutil.rmtree(out / PARTS)  # the last step of a build that was stopped right there
        return meta, False
    with _claimed(out, key, described) as folder:
        done = {
            unit.name: json.loads((folder / f"{unit.name}.json").read_bytes())
            for unit in units
            if (folder / f"{unit.name}.json").is_file()
        }
        pending = [unit for unit in units if unit.name not in done]
        run_units = run_units or functools.partial(in_processes, workers=workers)
        with _progress(units, list(done.values()), progress) as bar:
            for unit, result in run_units(pending, settings, folder, key):
                done[unit.name] = result
                bar.update(len(unit.places))
        total = _collect([done[unit.name] for unit in units], catalog, settings)
        if not total["tiles"]:
            reasons = "".join(
                f"\n  row {entry['row']}: {entry['path']}: {entry['reason']}"
                for entry in total["files"]
                if entry["status"] == REFUSED
            )
            raise BuildError(
                f"no tile has a single valid pixel, nothing to write; {out}/{PARTS} can be deleted.{reasons[:4000]}"
            )
        meta = _finish(out, folder, units, done, total, catalog, settings, key, described)
    shutil.rmtree(folder)
    return meta, True


def _finish(
    out: Path,
    folder: Path,
    units: Sequence[Unit],
    done: dict[str, dict[str, Any]],
    total: dict[str, Any],
    catalog: Catalog,
    settings: Settings,
    key: str,
    described: dict[str, Any],
) -> dict[str, Any]:
    """Names the parts as TFDS shards and writes the metadata. Every step can be repeated after a crash."""
    infos = []
    for split in SPLITS:
        full = [unit for unit in units if unit.split == split and done[unit.name]["length"]]
        for number, unit in enumerate(full):
            shard, part = (
                out / f"{NAME}-{split}.array_record-{number:05d}-of-{len(full):05d}",
                folder / f"{unit.name}.array_record",
            )
            if part.is_file():
                move(part, shard)
            elif not shard.is_file():
                raise BuildError(f"{part} is gone; delete {folder / (unit.name + '.json')} and build again")
        if full:
            infos.append(
                tfds.core.SplitInfo(
                    name=split,
                    shard_lengths=[done[unit.name]["length"] for unit in full],
                    num_bytes=sum(done[unit.name]["bytes"] for unit in full),
                    filename_template=tfds.core.ShardedFileTemplate(
                        data_dir=str(out),
                        dataset_name=NAME,
                        split=split,
                        filetype_suffix="array_record",
                        template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
                    ),
                )
            )
    # check_data would open every shard through TensorFlow; lengths come from the writers.
    tfds.folder_dataset.write_metadata(
        data_dir=str(out), features=features_of(settings), split_infos=infos, check_data=False
    )
    lines = "".join(json.dumps(entry, sort_keys=True) + "\n" for entry in total["files"])
    write_atomically(out / FILES, lines.encode())
    records = [done[unit.name]["sha256"] for unit in units]
    meta = {
        "format": FORMAT,
        "tile": settings.tile,
        "ratio": settings.ratio,
        "georeferenced": settings.georeferenced,
        "gsd": settings.gsd if settings.georeferenced else None,
        "sensors": list(settings.sensors),
        "label_classes": list(settings.label_classes),
        "label_map_classes": {str(k): v for k, v in catalog.label_map_classes.items()},
        "synthetic": any(entry.get("synthetic", False) for entry in total["files"]),
        "catalog_sha256": catalog.sha256,
        "splits": {info.name: info.num_examples for info in infos},
        "report": summary(total),
        "build_key": key,
        "dataset_id": hashlib.sha256(encode([described, records])).hexdigest(),
    } | described
    write_atomically(out / METADATA, encode(meta))
    return meta

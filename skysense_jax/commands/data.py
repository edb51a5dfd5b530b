"""`skysense-jax data build | check | catalog | stats | preview | synth`: arguments, printed text and exit codes.

The work is in the modules they call. Exit codes: 0 done; 78 the catalog, an option or the target folder cannot be used
(restarting will not help); 1 a worker died (run the command again).
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path

from skysense_jax.core import exits, paths
from skysense_jax.core.files import write_atomically
from skysense_jax.data import statistics
from skysense_jax.data.drafting import layouts, rasters, splits
from skysense_jax.data.ingest import build as dataset_build
from skysense_jax.data.ingest import report
from skysense_jax.data.ingest.catalog import CatalogError
from skysense_jax.data.ingest.on_processes import WorkerDied
from skysense_jax.data.synthetic import rasters as synthetic
from skysense_jax.data.synthetic import world
from skysense_jax.draw import places
from skysense_jax.sensors import SENSORS

AddParser = Callable[..., argparse.ArgumentParser]
"""`add_parser` of the `data` command's subparsers."""


def _guarded(run: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """A command whose refusals become a line on stderr and an exit code."""

    def guarded(args: argparse.Namespace) -> int:
        try:
            return run(args)
        except (CatalogError, dataset_build.BuildError) as error:
            print(f"error: {error}", file=sys.stderr)
            return exits.BAD_INPUT
        except WorkerDied as error:
            print(f"error: {error}", file=sys.stderr)
            return exits.WORKER_DIED

    return guarded


def _options(args: argparse.Namespace) -> dataset_build.Options:
    """The options that decide what the records are."""
    sensors = tuple(name.strip() for name in args.sensors.split(",") if name.strip())
    return dataset_build.Options(
        tile=args.tile,
        gsd=args.gsd,
        ratio=args.ratio,
        sensors=sensors,
        holdout=args.holdout,
        shard_places=args.shard_places,
        max_pixels=args.max_pixels,
        max_upsample=args.max_upsample,
        georeferenced=not args.no_georeference,
    )


def _workers(args: argparse.Namespace) -> int:
    """How many processes: as given, or one per core."""
    if args.workers is not None and args.workers < 1:
        raise dataset_build.BuildError(f"--workers {args.workers}: at least 1")
    return args.workers or len(os.sched_getaffinity(0))


def _run_units(args: argparse.Namespace) -> dataset_build.RunUnits | None:
    """What runs the units of `data build`: a Beam pipeline, or None for processes of this machine."""
    if args.runner == "local":
        if args.beam_options:
            raise dataset_build.BuildError(f"{' '.join(args.beam_options)}: pipeline options need --runner beam")
        return None
    if args.workers is not None:
        raise dataset_build.BuildError("--workers counts local processes; --runner beam takes Beam's options after --")
    if importlib.util.find_spec("apache_beam") is None:
        raise dataset_build.BuildError(
            "--runner beam needs apache-beam, which is not installed here; `launch/setup.sh beam` makes an environment "
            "with it (.venv-beam)"
        )
    from skysense_jax.data.ingest import on_beam  # an extra, in an environment of its own

    return functools.partial(on_beam.run_units, arguments=args.beam_options)


def run_build(args: argparse.Namespace) -> int:
    """Builds or continues a dataset and prints its report."""
    paths.check_local(args.out, "records are built on a disk; copy the folder to the bucket when it is complete")
    run_units = _run_units(args)
    meta, worked = dataset_build.build(
        args.catalog,
        args.out,
        options=_options(args),
        workers=_workers(args),
        progress=run_units is None,  # a pipeline reports its progress itself
        run_units=run_units,
    )
    if not worked:
        print(f"{args.out} is complete (dataset {meta['dataset_id'][:12]}): nothing to do")
        return exits.DONE
    print(report.render(meta["report"]))
    tiles = ", ".join(f"{name} {count}" for name, count in meta["splits"].items())
    print(
        f"\n{'SYNTHETIC ' if meta['synthetic'] else ''}dataset {meta['dataset_id'][:12]} in {args.out}: "
        f"tiles {tiles}; per-file decisions in {Path(args.out) / dataset_build.FILES}"
    )
    return exits.DONE


def run_check(args: argparse.Namespace) -> int:
    """Prints the report a build would give, writing nothing."""
    ingested = dataset_build.check(args.catalog, options=_options(args), workers=_workers(args))
    print(report.render(ingested))
    return exits.DONE if ingested["tiles"] else exits.BAD_INPUT


def _draft(args: argparse.Namespace) -> rasters.Draft:
    """The drafted rows of the folder's layout, with their splits where a file says them.

    Raises:
        CatalogError: an option belongs to another layout, or as the layout's reader.
    """
    belongs = {"place_by": "rasters", "sensor": "images", "bands": "images", "folder_classes": "images"}
    for name, layout in belongs.items():
        if getattr(args, name) and args.layout != layout:
            raise CatalogError(f"--{name.replace('_', '-')} belongs to --layout {layout}, not {args.layout}")
    if args.layout == "images":
        if not args.sensor:
            raise CatalogError(f"--layout images needs --sensor: {', '.join(SENSORS)}")
        draft = layouts.images(args.dir, args.sensor, args.bands, args.folder_classes)
    elif args.layout == "sen12ms":
        draft = layouts.sen12ms(args.dir)
    else:
        draft = rasters.draft(args.dir, args.place_by or "folder")
    file = args.split or (splits.SEN12MS_CR if args.layout == "sen12ms" else "")
    if file:
        split = splits.assign(splits.read_split(file), sorted({row["place"] for row in draft.rows}))
        draft = draft._replace(rows=[row | {"split": split[row["place"]]} for row in draft.rows])
    return draft


def run_catalog(args: argparse.Namespace) -> int:
    """Writes a drafted catalog and prints what is left to fill in.

    Raises:
        CatalogError: the catalog exists already or would lie beside the rasters' folder; as the layout's reader.
    """
    out = Path(args.out) if args.out else Path(args.dir) / "places.csv"
    if out.exists():
        raise CatalogError(f"{out} exists: a draft never overwrites a catalog; choose another --out or delete it")
    if not Path(args.dir).resolve().is_relative_to(out.parent.resolve()):
        raise CatalogError(
            f"{out} must lie in {args.dir} or in a folder above it: paths in a catalog are relative to its folder"
        )
    draft = _draft(args)
    prefix = Path(args.dir).resolve().relative_to(out.parent.resolve())
    rows = [row | {"path": row["path"] and (prefix / row["path"]).as_posix()} for row in draft.rows]
    write_atomically(out, rasters.to_csv(rows).encode())
    print(rasters.render(draft))
    option = " --no-georeference" if args.layout == "images" else ""
    print(
        f"\ndraft written to {out}: check it, fill in what is listed, then run "
        f"`skysense-jax data check --catalog {out}{option}`"
    )
    return exits.DONE


def run_stats(args: argparse.Namespace) -> int:
    """Computes and stores per-band statistics."""
    paths.check_local(args.dir, "statistics are stored on a disk; run this before the folder is copied to the bucket")
    print(statistics.render(statistics.compute(args.dir, args.clear_only)))
    print(f'\nstored in {Path(args.dir) / dataset_build.METADATA} under "statistics"')
    return exits.DONE


def _reading_arguments(parser: argparse.ArgumentParser) -> None:
    default = dataset_build.Options()
    parser.add_argument(
        "--catalog", required=True, help="CSV or GeoParquet, one row per raster; paths relative to its folder"
    )
    parser.add_argument(
        "--tile", type=int, default=default.tile, help=f"side of a place in base pixels (default {default.tile})"
    )
    parser.add_argument(
        "--gsd", type=float, default=default.gsd, help=f"metres of a base pixel (default {default.gsd:g})"
    )
    parser.add_argument(
        "--ratio", type=int, default=default.ratio, help=f"HR pixels along a base pixel (default {default.ratio})"
    )
    parser.add_argument("--sensors", default="", help="comma list; default: all in the catalog")
    parser.add_argument(
        "--holdout",
        type=float,
        default=default.holdout,
        help=f"share of places held out as test where the catalog has no split (default {default.holdout})",
    )
    parser.add_argument(
        "--shard-places",
        type=int,
        default=default.shard_places,
        help=f"catalog places per shard file (default {default.shard_places})",
    )
    parser.add_argument(
        "--max-pixels", type=int, default=default.max_pixels, help="refuse files that declare more width*height*bands"
    )
    parser.add_argument(
        "--max-upsample",
        type=float,
        default=default.max_upsample,
        help=f"refuse pixels this many times coarser than their grid (default {default.max_upsample:g})",
    )
    parser.add_argument(
        "--no-georeference",
        action="store_true",
        help="images without a place on Earth (JPEG, PNG, TIFF), cut by their pixels; for the msGFM objective only",
    )
    parser.add_argument("--workers", type=int, default=None, help="processes (default: all cores)")


def add_parsers(add_parser: AddParser) -> None:
    """Adds build, check, catalog and stats to the `data` commands.

    The parsed namespace carries `run`, a function of the namespace that returns the exit code.
    """

    def add(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        parser = add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        parser.set_defaults(run=_guarded(run))
        return parser

    build = add(
        "build",
        run_build,
        "read the rasters of a catalog into a TFDS dataset of places (continues where it was stopped)",
    )
    _reading_arguments(build)
    build.add_argument("--out", required=True, help="folder of the dataset")
    build.add_argument(
        "--runner",
        choices=("local", "beam"),
        default="local",
        help="processes of this machine (default), or an Apache Beam pipeline for many machines (see docs/data.md)",
    )
    build.add_argument(
        "beam_options",
        nargs="*",
        metavar="-- BEAM_OPTION",
        help="Beam's pipeline options, for example -- --runner=DataflowRunner --region=europe-west4",
    )
    _reading_arguments(
        add("check", run_check, "read all rasters of a catalog and print the ingest report without writing anything")
    )
    catalog = add("catalog", run_catalog, "draft a catalog from a folder of rasters and list what you must fill in")
    catalog.add_argument("dir", help="folder to look through")
    catalog.add_argument("--out", default="", help="catalog to write (default: DIR/places.csv)")
    catalog.add_argument(
        "--layout",
        choices=("rasters", "images", "sen12ms"),
        default="rasters",
        help="georeferenced rasters (default), images without georeference, or SEN12MS as it is unpacked",
    )
    catalog.add_argument(
        "--place-by",
        choices=("folder", "stem"),
        help="rasters: one place per folder (default), or per file name without date, band and sensor words",
    )
    catalog.add_argument("--sensor", choices=tuple(SENSORS), help="images: what they are")
    catalog.add_argument("--bands", default="", help="images: their bands in file order, where the files do not say")
    catalog.add_argument("--folder-classes", action="store_true", help="images: a folder's name is its scene class")
    catalog.add_argument(
        "--split",
        default="",
        help="CSV file place,split (names or patterns; train or test) for the split column; sen12ms: by default the "
        "regions of SEN12MS-CR's validation and test are held out",
    )
    stats = add("stats", run_stats, "compute per-band statistics of a dataset's train split and store them with it")
    stats.add_argument("dir", help="folder that `data build` wrote")
    stats.add_argument("--clear-only", action="store_true", help="only pixels the mask layers call clear")


def _run_preview(args: argparse.Namespace) -> int:
    print(places.preview(args.dir, args.place, args.out))
    return exits.DONE


def add_parsers_preview(add_parser: AddParser) -> None:
    """Adds `preview` to the `data` commands, as :func:`add_parsers` does."""
    parser = add_parser("preview", help="draw one place of a built dataset as a PNG")
    parser.add_argument("dir", help="folder that `data build` wrote")
    parser.add_argument("--place", default="0", help="id of the place, or its number (train places first)")
    parser.add_argument("--out", default="preview.png", help="PNG to write")
    parser.set_defaults(run=_run_preview)


def _run_synth(args: argparse.Namespace) -> int:
    settings = synthetic.Settings(
        seed=args.seed,
        tile=args.tile,
        ratio=args.ratio,
        gsd=args.gsd,
        test_fraction=args.test_fraction,
        kind=args.world,
    )
    catalog = synthetic.synthesise(args.out, args.places, settings, args.workers)
    print(f"SYNTHETIC data: {args.places} places, catalog {catalog}")
    return exits.DONE


def add_parsers_synth(add_parser: AddParser) -> None:
    """Adds `synth` to the `data` commands, as :func:`add_parsers` does."""
    parser = add_parser(
        "synth", help="write synthetic places as GeoTIFFs with a catalog (for testing; says so everywhere)"
    )
    parser.add_argument("--places", type=int, required=True, help="how many places")
    parser.add_argument("--out", required=True, help="folder to write; must not have a catalog yet")
    parser.add_argument("--seed", type=int, default=0, help="the same seed writes the same bytes")
    parser.add_argument("--tile", type=int, default=16, help="side of a place in base pixels")
    parser.add_argument("--ratio", type=int, default=16, help="HR pixels along one base pixel")
    parser.add_argument("--gsd", type=float, default=10.0, help="metres of one base pixel")
    parser.add_argument(
        "--test-fraction", type=float, default=0.25, help="share of held-out places, the same in every scene type"
    )
    parser.add_argument("--workers", type=int, default=None, help="processes (default: all cores)")
    parser.add_argument(
        "--world",
        choices=tuple(world.WORLDS),
        default="plain",
        help="plain: a label is a scene type. regional, permuted: which scene type a label looks like depends on the "
        "region (for tests of geo-context)",
    )
    parser.set_defaults(run=_run_synth)

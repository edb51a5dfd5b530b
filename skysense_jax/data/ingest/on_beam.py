"""Runs the units of a build as an Apache Beam pipeline, so that many machines can read rasters and write parts.

The pipeline only hands out work: DIR/parts/units.jsonl has one line per unit, a worker reads the unit's rasters and
writes part and sidecar with the same `run_unit` as a local build, and the building process finishes the dataset from
the sidecars. Workers need this package, and the rasters and DIR at the paths they have on the building machine.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import apache_beam
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.runner import PipelineState

from skysense_jax.core.files import write_atomically
from skysense_jax.data.ingest.build import BuildError
from skysense_jax.data.ingest.catalog import Row
from skysense_jax.data.ingest.on_processes import WorkerDied
from skysense_jax.data.ingest.places import Settings
from skysense_jax.data.ingest.shards import Unit, run_unit

PLAN = "units.jsonl"
AGAIN = "run the same command again to continue: finished parts are kept"


def to_line(unit: Unit) -> str:
    """One unit as a line of JSON."""
    return json.dumps(unit, default=str)


def from_line(line: str) -> Unit:
    """The unit of a line that `to_line` wrote."""

    def as_row(cells: list[Any]) -> Row:
        row = Row._make(tuple(cell) if isinstance(cell, list) else cell for cell in cells)
        return row._replace(path=row.path and Path(row.path))

    name, split, places = json.loads(line)
    return Unit(name, split, tuple((place, tuple(map(as_row, rows))) for place, rows in places))


def _visible(path: Path) -> Path:
    """`path`. Raises RuntimeError where this worker does not see it: such a file must not be taken for a broken one."""
    if not path.is_file():
        raise RuntimeError(
            f"{path} is on the building machine but not on worker {socket.gethostname()}: the catalog's rasters and "
            "the folder of --out must be mounted at the same paths on every worker"
        )
    return path


def planned(folder: str) -> Iterator[str]:
    """The lines of the plan in DIR/parts. Raises RuntimeError where the worker does not see it."""
    with _visible(Path(folder) / PLAN).open() as file:
        yield from file


def ingest_line(line: str, settings: Settings, folder: str, key: str) -> None:
    """Ingests one unit on a worker, unless it is finished: a runner may hand the same line out again.

    Args:
        line: the unit, as `to_line` wrote it.
        settings: the build's settings.
        folder: DIR/parts.
        key: the build's key.

    Raises:
        RuntimeError: the worker does not see the build's folder or a raster.
    """
    unit = from_line(line)
    _visible(Path(folder) / PLAN)
    if not (Path(folder) / f"{unit.name}.json").is_file():
        for path in (row.path for _, rows in unit.places for row in rows if row.path):
            _visible(path)
        run_unit(unit, settings, Path(folder), key)


def _pipeline(arguments: Sequence[str]) -> apache_beam.Pipeline:
    """An empty pipeline with these options. Raises BuildError where Beam does not take them."""
    try:
        options = PipelineOptions(flags=list(arguments))  # flags=None would be sys.argv
        options.get_all_options()  # reads them now, not when a runner first asks
        return apache_beam.Pipeline(options=options)
    except SystemExit as error:  # its argparse has printed the reason
        raise BuildError("Beam cannot read the options after --, see above") from error
    except ValueError as error:
        raise BuildError(f"Beam refuses the options after --: {error}") from error


def run_units(
    units: Sequence[Unit], settings: Settings, folder: Path, key: str, arguments: Sequence[str]
) -> Iterator[tuple[Unit, dict[str, Any]]]:
    """Runs every unit in a Beam pipeline and yields the results once the pipeline has finished all of them.

    Args:
        units: the units to run.
        settings: the build's settings.
        folder: DIR/parts.
        key: the build's key.
        arguments: Beam's pipeline options, `--runner` among them (Beam's default: DirectRunner).

    Yields:
        (unit, content of its sidecar), in the order of `units`.

    Raises:
        BuildError: Beam does not take the options.
        WorkerDied: the pipeline failed.
    """
    if not units:
        return
    folder = folder.resolve()
    write_atomically(folder / PLAN, "".join(f"{to_line(unit)}\n" for unit in units).encode())
    pipeline = _pipeline(arguments)
    (
        pipeline
        | "folder" >> apache_beam.Create([str(folder)])
        | "units" >> apache_beam.FlatMap(planned)
        | "spread" >> apache_beam.Reshuffle()
        | "ingest" >> apache_beam.Map(ingest_line, settings, str(folder), key)
    )
    try:
        state = pipeline.run().wait_until_finish()
    except RuntimeError as error:
        raise WorkerDied(f"the Beam pipeline failed; {AGAIN}\n{error}") from error
    if state != PipelineState.DONE:
        raise WorkerDied(f"the Beam pipeline ended as {state}; {AGAIN}")
    for unit in units:
        yield unit, json.loads((folder / f"{unit.name}.json").read_bytes())

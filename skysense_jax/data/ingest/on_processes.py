"""Runs the units of a build in processes of this machine (`on_beam` runs them on many machines)."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from skysense_jax.data.ingest.places import Settings
from skysense_jax.data.ingest.shards import Unit, run_unit


class WorkerDied(RuntimeError):
    """A process was killed; finished parts are kept and the same command continues."""


def _leave_with_parent() -> None:
    """Makes a worker end when the building process has ended, however it ended, so that no orphan goes on reading.

    An interrupt from the keyboard is left to the building process.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is None:  # only a process that multiprocessing did not start has no parent
        raise RuntimeError("a worker has no building process")

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def in_processes(
    units: Sequence[Unit], settings: Settings, folder: Path | None, key: str, workers: int
) -> Iterator[tuple[Unit, dict[str, Any]]]:
    """Runs every unit.

    Args:
        units: the units to run.
        settings: the build's settings.
        folder: DIR/parts; None = read everything and write nothing.
        key: the build's key.
        workers: processes; 1 = this process.

    Yields:
        (unit, result of :func:`shards.run_unit`), in the order in which the units end.

    Raises:
        WorkerDied: a process was killed.
    """
    if workers == 1 or len(units) <= 1:
        for unit in units:
            yield unit, run_unit(unit, settings, folder, key)
        return
    pool = ProcessPoolExecutor(min(workers, len(units)), multiprocessing.get_context("spawn"), _leave_with_parent)
    try:
        pending = {pool.submit(run_unit, unit, settings, folder, key): unit for unit in units}
        for future in as_completed(pending):
            yield pending[future], future.result()
    except BrokenProcessPool as error:
        raise WorkerDied(
            "a worker process died (killed, or out of memory: try fewer --workers); run the same command again to "
            "continue"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)

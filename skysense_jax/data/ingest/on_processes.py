"""Runs the units of a build in processes of this machine; on many machines that is the work of data.beam."""

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
    """A process was killed; what was finished is kept and the same command continues."""


def _leave_with_parent() -> None:
    """Worker start: end when the building process has ended, however it ended, so that no orphan goes on reading.

    An interrupt from the keyboard is the building process's to handle.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sentinel = multiprocessing.parent_process().sentinel

    def watch() -> None:
        multiprocessing.connection.wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def in_processes(
    units: Sequence[Unit], settings: Settings, folder: Path | None, key: str, workers: int
) -> Iterator[tuple[Unit, dict[str, Any]]]:
    """Every unit with what :func:`parts.run_unit` says of it, as they end; WorkerDied where a process is killed.
    folder: DIR/parts, None = read and write nothing; key: of the build; workers: 1 = in this process.
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

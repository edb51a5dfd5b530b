"""The file of a run's records, one JSON line each: on a disk appended to, on an object store written whole.

Either way `sync` is called before a checkpoint is saved, and a start drops the records past the step that it continues
from: after any kill the file holds every step of the newest checkpoint exactly once.
"""

from __future__ import annotations

import json
import os

from etils import epath

from skysense_jax.core import paths


def kept(file: epath.Path, step: int) -> tuple[list[str], int]:
    """The records up to a step.

    Args:
        file: of the records; it may be absent.
        step: the last step whose record stays.

    Returns:
        (their lines, how many other lines there are: later records, and a line that a kill cut short).
    """
    if not file.exists():
        return [], 0
    lines = file.read_text().splitlines(keepends=True)
    good = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    return good, len(lines) - len(good)


def truncate(file: epath.Path, step: int) -> int:
    """Drops the records past a step and a line that a kill cut short, atomically.

    Args:
        file: of the records; it may be absent.
        step: the last step whose record stays.

    Returns:
        How many lines were dropped.
    """
    lines, dropped = kept(file, step)
    if dropped:
        temporary = file.with_suffix(".tmp")
        with open(temporary, "w") as out:
            out.writelines(lines)
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, file)
    return dropped


class Appended:
    """A local file: a reader sees a record as soon as it is added, and it is on the disk after `sync`."""

    def __init__(self, file: epath.Path, step: int) -> None:
        truncate(file, step)
        self._file = open(file, "a", buffering=1)  # a line at a time

    def add(self, line: str) -> None:
        """Adds a record: a line with its newline."""
        self._file.write(line)

    def sync(self) -> None:
        """Everything added is on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Nothing more will be added."""
        self._file.close()


class Whole:
    """An object: kept in memory and written whole by `sync`, in one piece, so that a reader sees the old or the new."""

    def __init__(self, file: epath.Path, step: int) -> None:
        self._file = file
        self._lines, dropped = kept(file, step)
        self._changed = dropped > 0

    def add(self, line: str) -> None:
        """Adds a record: a line with its newline."""
        self._lines.append(line)
        self._changed = True

    def sync(self) -> None:
        """Everything added is in the object."""
        if self._changed:
            self._file.write_text("".join(self._lines))
            self._changed = False

    def close(self) -> None:
        """Nothing more will be added."""


def open_records(file: epath.Path, step: int) -> Appended | Whole:
    """Opens the records of a run.

    Args:
        file: local, or an object's.
        step: the step that the run continues from, 0 for a new run.

    Returns:
        The open records.
    """
    return Whole(file, step) if paths.is_remote(file) else Appended(file, step)

"""Files that are written whole or not at all, JSON whose bytes depend on its values alone, and tables in pages."""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import Any


def temporary_name(path: Path) -> Path:
    """A name beside `path` that no other process has, on whatever machine that shares the folder."""
    return path.with_name(f".{path.name}.tmp-{uuid.uuid4().hex}")


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file so that it is either absent (or the old one) or complete, also after a crash."""
    temporary = temporary_name(path)
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    move(temporary, path)


def move(source: Path, target: Path) -> None:
    """Renames within one file system and makes the renaming itself durable."""
    os.replace(source, target)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def encode(value: Any) -> bytes:
    """JSON with sorted keys: equal values are equal bytes."""
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def around(page: Path, marks: tuple[str, str]) -> tuple[str, str]:
    """The text of a page before its first mark and after its second. Raises ValueError unless both are there."""
    before, _, rest = page.read_text().partition(marks[0])
    _, found, after = rest.partition(marks[1])
    if not found:
        raise ValueError(f"{page} has no lines {marks[0]} and {marks[1]} to write the table between")
    return before, after


def write_between(page: Path, marks: tuple[str, str], text: str) -> None:
    """Puts `text` between two marks of a page, in the place of what stood there. ValueError as :func:`around`."""
    before, after = around(page, marks)
    write_atomically(page, f"{before}{marks[0]}\n{text}{marks[1]}{after}".encode())

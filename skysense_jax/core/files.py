"""Files that are written whole or not at all, JSON whose bytes depend only on its values, and tables in pages."""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path


def temporary_name(path: Path) -> Path:
    """A name beside `path` that no other process uses, on any machine that shares the folder."""
    return path.with_name(f".{path.name}.tmp-{uuid.uuid4().hex}")


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file so that it is absent, or the old file, or complete, also after a crash.

    Args:
        path: the file to write; an older one is replaced.
        data: its whole content.
    """
    temporary = temporary_name(path)
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    move(temporary, path)


def move(source: Path, target: Path) -> None:
    """Renames within one file system and makes the renaming itself durable.

    Args:
        source: the file or folder to rename.
        target: its new name, in the same file system.
    """
    os.replace(source, target)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def encode(value: object) -> bytes:
    """JSON with sorted keys: equal values are equal bytes."""
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def around(page: Path, marks: tuple[str, str]) -> tuple[str, str]:
    """The text of a page before its first mark and after its second.

    Args:
        page: a text file.
        marks: the line before the table and the line after it.

    Returns:
        (text before the first mark, text after the second).

    Raises:
        ValueError: the page lacks one of the marks.
    """
    before, _, rest = page.read_text().partition(marks[0])
    _, second_mark, after = rest.partition(marks[1])
    if not second_mark:
        raise ValueError(f"{page} has no lines {marks[0]} and {marks[1]} to write the table between")
    return before, after


def write_between(page: Path, marks: tuple[str, str], text: str) -> None:
    """Replaces what stands between two marks of a page.

    Args:
        page: a text file; it is written atomically.
        marks: the line before the table and the line after it; both stay.
        text: the new table, with its last newline.

    Raises:
        ValueError: as :func:`around`.
    """
    before, after = around(page, marks)
    write_atomically(page, f"{before}{marks[0]}\n{text}{marks[1]}{after}".encode())

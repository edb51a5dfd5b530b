"""Split files: which places are for training and which are held out, by name."""

from __future__ import annotations

import csv
import fnmatch
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from skysense_jax.data.ingest.catalog import SPLITS, CatalogError

SEN12MS_CR = Path(__file__).with_name("sen12ms_cr.csv")
"""The regions of SEN12MS that are held out for SEN12MS-CR."""

_LISTED = 10


class Rules(NamedTuple):
    """A split file. lines: (pattern, split) in order; the first that matches a place decides."""

    path: Path
    lines: tuple[tuple[str, str], ...]


def read_split(path: str | Path) -> Rules:
    """Reads a CSV file with the columns place and split; lines that begin with # are comments.

    place: a name, or a pattern with * ? [abc]; upper and lower case differ. split: train or test.

    Raises:
        CatalogError: the file cannot be used; the message names the line.
    """
    path = Path(path)
    if not path.is_file():
        raise CatalogError(f"{path}: no such split file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise CatalogError(f"{path} is not UTF-8 text: {error}") from error
    lines: list[tuple[str, str]] = []
    stated: dict[str, tuple[int, str]] = {}
    has_header = False
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        cells = [cell.strip() for cell in next(csv.reader([line]))]
        if not has_header:
            has_header = True
            if cells != ["place", "split"]:
                raise CatalogError(f"{path} line {number}: a split file begins with the line place,split")
            continue
        if len(cells) != 2 or not cells[0] or cells[1] not in SPLITS:
            raise CatalogError(f"{path} line {number}: expected a place and {' or '.join(SPLITS)}, got {line!r}")
        first, split = stated.setdefault(cells[0], (number, cells[1]))
        if split != cells[1]:
            raise CatalogError(f"{path} line {number}: {cells[0]} is {cells[1]}, but {split} in line {first}")
        lines.append((cells[0], cells[1]))
    if not lines:
        raise CatalogError(f"{path} has no lines")
    return Rules(path, tuple(lines))


def assign(rules: Rules, places: Iterable[str]) -> dict[str, str]:
    """Puts places into splits, each by the first line that is its name or matches it.

    Args:
        rules: the split file.
        places: their names.

    Returns:
        Place -> "train" or "test".

    Raises:
        CatalogError: no line matches a place: a name the file does not know is never put into training silently.
    """
    names: dict[str, int] = {}
    patterns = []
    for number, (pattern, _) in enumerate(rules.lines):
        names.setdefault(pattern, number)
        if any(character in pattern for character in "*?["):
            patterns.append((number, re.compile(fnmatch.translate(pattern))))
    assigned, unknown = {}, []
    for place in places:
        number = names.get(place, len(rules.lines))
        number = next((other for other, pattern in patterns if other < number and pattern.match(place)), number)
        if number == len(rules.lines):
            unknown.append(place)
        else:
            assigned[place] = rules.lines[number][1]
    if unknown:
        raise CatalogError(
            f"{rules.path}: no line matches {len(unknown)} places: {', '.join(unknown[:_LISTED])}"
            f"{', ...' if len(unknown) > _LISTED else ''}; add lines for them, or a last line *,train (or *,test)"
        )
    return assigned

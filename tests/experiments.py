"""What the experiments have in common: means over seeds with their intervals, tables written into a page."""
from __future__ import annotations

import pathlib
from typing import Sequence

import numpy as np
from scipy import stats

from skysense_jax.data.parts import write_atomically


def mean_and_interval(values: Sequence[float], sign: str = "") -> str:
    """Mean over seeds and its 95 % interval (Student's t); the mean alone of one value. sign: "+" for differences."""
    mean, n = float(np.mean(values)), len(values)
    if n < 2:
        return f"{mean:{sign}.3f}"
    half = stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / n**0.5
    return f"{mean:{sign}.3f} [{mean - half:{sign}.3f}, {mean + half:{sign}.3f}]"


def write_between(file: pathlib.Path, marks: tuple[str, str], text: str) -> None:
    """Puts `text` between two marks of a page, in the place of what stood there. ValueError where they are missing."""
    before, _, rest = file.read_text().partition(marks[0])
    _, found, after = rest.partition(marks[1])
    if not found:
        raise ValueError(f"{file} has no lines {marks[0]} and {marks[1]} to write the table between")
    write_atomically(file, f"{before}{marks[0]}\n{text}{marks[1]}{after}".encode())

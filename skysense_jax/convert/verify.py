"""The frozen batch of an exported folder, computed again in JAX and in plain torch, beside what was stored."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
from collections.abc import Mapping

import numpy as np
import safetensors.numpy

from skysense_jax.convert import layouts, torch_export, torch_import

PARITY = "parity.safetensors"


def in_jax(folder: pathlib.Path) -> dict[str, float]:
    """Computes the frozen batch of a folder with its weights read back into JAX.

    Args:
        folder: an exported folder.

    Returns:
        {output: relative L2 against the stored one}.

    Raises:
        ValueError: the model has other outputs than the stored batch, or its weights do not fit.
    """
    params, cfg, contract, _ = torch_import.load_folder(folder)
    stored = safetensors.numpy.load_file(folder / PARITY)
    inputs: dict[str, dict[str, np.ndarray]] = {}
    for key, value in stored.items():
        kind, *path = key.split(".")
        if kind == "input":
            value = np.moveaxis(value, -3, -1) if path[1] == "image" else value
            inputs.setdefault(path[0], {})[path[1]] = value
    outputs = layouts.frozen_outputs(params, cfg, contract, inputs)
    unpaired = {key for key in stored if key.startswith("output.")} ^ {f"output.{key}" for key in outputs}
    if unpaired:
        raise ValueError(f"{folder}/{PARITY} and the model disagree about the outputs {sorted(unpaired)}")
    return {f"output.{key}": torch_export.relative_l2(value, stored[f"output.{key}"]) for key, value in outputs.items()}


def in_torch(folder: pathlib.Path) -> dict[str, float]:
    """Computes the frozen batch of a folder by its modelling file, in a process without JAX.

    Args:
        folder: an exported folder.

    Returns:
        {output: relative L2 against the stored one}.

    Raises:
        ValueError: the process failed.
    """
    module = f"modeling_{json.loads((folder / 'config.json').read_text())['model_type']}"
    code = f"import json, {module}; print(json.dumps({module}.check('.')))"
    process = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    if process.returncode:
        raise ValueError(f"{folder}/{module}.py failed: {process.stderr.strip().splitlines()[-1]}")
    return json.loads(process.stdout)


def table(results: Mapping[str, Mapping[str, float]], limit: float) -> tuple[str, bool]:
    """Lays out the differences of several implementations.

    Args:
        results: name of an implementation -> {output: relative L2}.
        limit: the tolerance.

    Returns:
        (one line per output with the relative L2 of every implementation, whether all are within the limit).
    """
    names = sorted(next(iter(results.values())))
    lines = [f"{'output':<24}" + "".join(f"{name:>12}" for name in results) + f"    relative L2, tolerance {limit:g}"]
    sound = True
    for name in names:
        values = [result[name] for result in results.values()]
        within = all(value <= limit for value in values)
        sound &= within
        lines.append(
            f"{name.removeprefix('output.'):<24}"
            + "".join(f"{value:>12.2e}" for value in values)
            + ("    ok" if within else "    DIFFERS")
        )
    return "\n".join(lines), sound

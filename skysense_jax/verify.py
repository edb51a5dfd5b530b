"""`skysense-jax verify`: an exported folder against its own frozen batch, in JAX and, where it is there, in torch.

parity.safetensors holds inputs and the outputs they had when the weights were exported; whoever converts, copies or
quantises the folder sees in one table whether it still is the same network. What that batch cannot see (the last bits
of a weight, an expert that none of its tokens chose) the digests of the files do.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
import sys
from collections.abc import Mapping

import numpy as np
import safetensors.numpy

from skysense_jax.convert import frozen, torch_export, torch_import
from skysense_jax.convert.tensor_files import torch_is_there

EXIT_DIFFERS = 1
PARITY = "parity.safetensors"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("path", help="exported folder")


def run(args: argparse.Namespace) -> int:
    """Prints the files that changed and the table; 1 where there is one, or an output differs by more than the folder's
    tolerance.
    """
    folder = pathlib.Path(args.path)
    if absent := [name for name in (PARITY, torch_export.SUMS) if not (folder / name).is_file()]:
        raise ValueError(f"{folder} has no {absent[0]}: it is no folder that export-torch wrote")
    changed = torch_export.changed_files(folder)
    for name in changed:
        print(f"{name}: DIFFERS from the file that was exported ({torch_export.SUMS})")
    if any(name == PARITY or not name.endswith(".safetensors") for name in changed):  # a table would say nothing
        return EXIT_DIFFERS
    limit = json.loads((folder / "config.json").read_text())["parity"]["tolerance_rel_l2"]
    results = {"jax": in_jax(folder)}
    if torch_is_there():
        results["torch"] = in_torch(folder)
    text, sound = table(results, limit)
    print(text)
    if "torch" not in results:
        print("torch is not installed: the plain-torch column is left out (pip extra `torch`)")
    return 0 if sound and not changed else EXIT_DIFFERS


def in_jax(folder: pathlib.Path) -> dict[str, float]:
    """{output: relative L2 against the stored one} of the weights read back into JAX."""
    params, cfg, contract, _ = torch_import.load_folder(folder)
    stored = safetensors.numpy.load_file(folder / PARITY)
    inputs: dict[str, dict[str, np.ndarray]] = {}
    for key, value in stored.items():
        kind, *path = key.split(".")
        if kind == "input":
            value = np.moveaxis(value, -3, -1) if path[1] == "image" else value
            inputs.setdefault(path[0], {})[path[1]] = value
    outputs = frozen.outputs(params, cfg, contract, inputs)
    missing = {key for key in stored if key.startswith("output.")} ^ {f"output.{key}" for key in outputs}
    if missing:
        raise ValueError(f"{folder}/{PARITY} and the model disagree about the outputs {sorted(missing)}")
    return {f"output.{key}": torch_export.relative_l2(value, stored[f"output.{key}"]) for key, value in outputs.items()}


def in_torch(folder: pathlib.Path) -> dict[str, float]:
    """The same from the folder's own modelling file in a process without JAX. Raises ValueError where it fails."""
    module = f"modeling_{json.loads((folder / 'config.json').read_text())['model_type']}"
    code = f"import json, {module}; print(json.dumps({module}.check('.')))"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{folder}/{module}.py failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout)


def table(results: Mapping[str, Mapping[str, float]], limit: float) -> tuple[str, bool]:
    """(one line per output with the relative L2 of every implementation, whether all are within the limit)."""
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

"""`skysense-jax verify`: an exported folder against its own frozen batch, in JAX and, where it is there, in torch.

parity.safetensors holds inputs and the outputs they had when the weights were exported; whoever converts, copies or
quantises the folder sees in one table whether it still is the same network. What that batch cannot see (the last bits
of a weight, an expert that none of its tokens chose) the digests of the files do.
"""

from __future__ import annotations

import argparse
import json
import pathlib

from skysense_jax.convert import torch_export, verify
from skysense_jax.convert.tensor_files import torch_is_there
from skysense_jax.core import exits


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("path", help="exported folder")


def run(args: argparse.Namespace) -> int:
    """Prints the files that changed and the table; 1 where there is one, or an output differs by more than the folder's
    tolerance.
    """
    folder = pathlib.Path(args.path)
    if absent := [name for name in (verify.PARITY, torch_export.SUMS) if not (folder / name).is_file()]:
        raise ValueError(f"{folder} has no {absent[0]}: it is no folder that export-torch wrote")
    changed = torch_export.changed_files(folder)
    for name in changed:
        print(f"{name}: DIFFERS from the file that was exported ({torch_export.SUMS})")
    if any(name == verify.PARITY or not name.endswith(".safetensors") for name in changed):  # a table would say nothing
        return exits.DIFFERS
    limit = json.loads((folder / "config.json").read_text())["parity"]["tolerance_rel_l2"]
    results = {"jax": verify.in_jax(folder)}
    if torch_is_there():
        results["torch"] = verify.in_torch(folder)
    text, sound = verify.table(results, limit)
    print(text)
    if "torch" not in results:
        print("torch is not installed: the plain-torch column is left out (pip extra `torch`)")
    return 0 if sound and not changed else exits.DIFFERS

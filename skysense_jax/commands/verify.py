"""`skysense-jax verify`: an exported folder against its own frozen batch, in JAX and, where it is installed, in torch.

parity.safetensors holds inputs and the outputs they had when the weights were exported; whoever converts, copies or
quantises the folder sees in one table whether it still is the same network. The digests of the files tell what that
batch cannot show: the last bits of a weight, or an expert that none of its tokens chose.
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
    """Prints the files that changed and the table of outputs.

    The exit code is exits.DIFFERS where a file changed, or an output differs by more than the folder's tolerance.

    Raises:
        ValueError: export-torch did not write the folder.
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
    return exits.DONE if sound and not changed else exits.DIFFERS

"""The command `skysense-jax`: names, one-line helps, dispatch and exit codes.

The options and the text of every command live in its own module. A module is imported only when its command is asked
for, so that `--help` answers at once. A command module gives `add_arguments(parser)` and `run(args) -> int`; those of
`data` register themselves with `add_parsers*(add_parser)`.
"""

from __future__ import annotations

import argparse
import importlib
import pathlib
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from skysense_jax.core import exits

COMMANDS = {
    "data": "build, check and look at datasets of places",
    "compile-check": "compile the training step with the TPU compiler for a described pod: memory, traffic, roofline",
    "pods": "the table of compile checks: runs the rows that are missing, writes docs/pods.md",
    "train": "pretrain from a configuration; continues a workdir that has begun",
    "reconstruct": "draw what a trained msGFM makes of a place behind a mask, and of its other sensor",
    "eval": "score frozen features (kNN, linear probe) beside two baselines, with intervals over places",
    "prototypes": "look at a network's prototype bank: a region's prototypes, and maps of them over a place",
    "export-torch": "write a network's weights for PyTorch: safetensors with official names, config.json, code",
    "import-torch": "read released weights, strictly: SkySense and SkySense++; for msGFM GFM, SimMIM, Swin-B, Swin-MoE",
    "verify": "run an exported folder's frozen batch in JAX and in plain torch, and print the differences",
    "inspect": "print what a dataset, a checkpoint, an exported folder or a configuration is and what input it expects",
}
_CONFIGURED = {  # commands with a configuration read absl's and ml_collections' flags themselves, --help included
    "train": "skysense_jax.train",
    "compile-check": "skysense_jax.commands.compile_check",
}
_MODULES = {
    "pods": "skysense_jax.commands.pods",
    "eval": "skysense_jax.commands.evaluate",
    "prototypes": "skysense_jax.commands.prototypes",
    "reconstruct": "skysense_jax.commands.reconstruct",
    "export-torch": "skysense_jax.commands.export_torch",
    "import-torch": "skysense_jax.commands.import_torch",
    "verify": "skysense_jax.commands.verify",
    "inspect": "skysense_jax.commands.inspect",
}
_REGISTER = {  # data action -> (module, its function that registers the action)
    **dict.fromkeys(("build", "check", "catalog", "stats"), ("skysense_jax.commands.data", "add_parsers")),
    "synth": ("skysense_jax.commands.data", "add_parsers_synth"),
    "preview": ("skysense_jax.commands.data", "add_parsers_preview"),
    "bench": ("skysense_jax.commands.data_bench", "add_parsers_bench"),
}


class _Parser(argparse.ArgumentParser):
    """A parser whose usage errors leave with exits.BAD_INPUT too; argparse's own 2 means nothing to a scheduler."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(exits.BAD_INPUT, f"{self.prog}: {message}\n")


def _parser(words: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of every command's name, with the options of the command in `words` only.

    Importing the other commands would cost seconds.
    """
    command, action = (*words, "", "")[:2]
    parser = _Parser(prog="skysense-jax", description="Remote-sensing foundation models: from GeoTIFFs to weights.")
    parser.add_argument("--version", action="version", version=_version())
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in COMMANDS.items():
        child = subparsers.add_parser(
            name, help=text, description=text[0].upper() + text[1:] + ".", add_help=name not in _CONFIGURED
        )
        if name != command:
            continue
        if name == "data":
            actions = child.add_subparsers(dest="action", required=True, metavar="ACTION")
            registered = [_REGISTER[action]] if action in _REGISTER else list(dict.fromkeys(_REGISTER.values()))
            for module_name, function in registered:
                getattr(importlib.import_module(module_name), function)(actions.add_parser)
        elif name in _MODULES:
            module = importlib.import_module(_MODULES[name])
            module.add_arguments(child)
            child.set_defaults(run=module.run)
    return parser


def _version() -> str:
    from skysense_jax import __version__

    return f"skysense-jax {__version__}"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code: for bad input 78 with the message on stderr, else the command's own.

    Raises:
        ValueError, FileNotFoundError: from the depths of a library, which is a bug and keeps its traceback.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    words = [word for word in argv if not word.startswith("-")]
    try:
        if argv and argv[0] in _CONFIGURED:
            return importlib.import_module(_CONFIGURED[argv[0]]).main(argv[1:])
        args = _parser(words).parse_args(argv)
        return int(args.run(args))
    except (ValueError, FileNotFoundError) as error:
        if not _is_refusal(error):
            raise
        print(f"skysense-jax {' '.join(words[:1])}: {error}", file=sys.stderr)
        return exits.BAD_INPUT


def _is_refusal(error: Exception) -> bool:
    """Whether an error is the user's to mend: a missing file, or a ValueError that this package raised."""
    last = traceback.extract_tb(error.__traceback__)[-1].filename
    return isinstance(error, FileNotFoundError) or pathlib.Path(__file__).parent in pathlib.Path(last).parents


if __name__ == "__main__":
    sys.exit(main())

"""`skysense-jax import-torch`: PyTorch weights as a folder that the other commands read.

`load`, `eval`, `inspect`, `export-torch` and `train --init_from` read it. The weights are those of SkySense and
SkySense++, or, with a configuration of msGFM, those of a Swin-V1 (GFM, SimMIM, ImageNet, Swin-MoE). What is written:
run/imported.py.
"""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Mapping, Sequence

from ml_collections import config_dict

from skysense_jax import sensors
from skysense_jax.configs import skysense_full
from skysense_jax.convert import keymap
from skysense_jax.core import exits
from skysense_jax.core.config import read_config
from skysense_jax.models import systems
from skysense_jax.run import imported

FULL_SIZE = pathlib.Path(skysense_full.__file__)
"""The released architecture, in a checkout or in an installed package."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument(
        "files",
        nargs="+",
        metavar="FILE",
        help=".pth, .pt, .ckpt, .bin or .safetensors; MODULE=FILE says which module a file of SkySense holds "
        f"({', '.join(keymap.PREFIXES)}). Swin-MoE: FILE.rank0 FILE.rank1 ... FILE.master",
    )
    parser.add_argument("--out", required=True, help="folder to write; must not hold imported weights yet")
    parser.add_argument("--config", default=str(FULL_SIZE), help="configuration of the model (the released size)")
    parser.add_argument(
        "--bands",
        action="append",
        default=[],
        metavar="SENSOR=B,B,...",
        help="other bands than the configuration's, by the reference's kernel rules: hr=R,G,B,NIR, or some of s2's",
    )
    parser.add_argument(
        "--calendar", choices=("s2", "dated", "none"), help="where the calendar table is added (model.calendar)"
    )
    parser.add_argument(
        "--leave-out",
        action="append",
        default=[],
        metavar="PATTERN",
        help="names of tensors (shell patterns) that are not imported, where a file holds more than the model",
    )
    parser.add_argument(
        "--licence",
        help="licence of the files, carried into every export "
        f"(SkySense: {imported.LICENCE}; others: {imported.SWIN_LICENCE})",
    )
    parser.add_argument(
        "--sensor",
        choices=tuple(sensors.SENSORS),
        help="msGFM: the sensor whose patch embedding and decoder a file of one sensor holds (hr)",
    )


def run(args: argparse.Namespace) -> int:
    """Imports and prints what came from where.

    Raises:
        FileNotFoundError: there is no such configuration or file.
        ValueError: as `run.imported`.
    """
    config = read_config(args.config)
    bands = {name: tuple(names) for name, names in config.data.bands.items()} | _bands(args.bands)
    systems.system_of(config.model)
    print(IMPORTERS[config.model.name](args, config.model, bands))
    return exits.DONE


def _skysense(
    args: argparse.Namespace, model: config_dict.ConfigDict, bands: Mapping[str, Sequence[str]]
) -> pathlib.Path:
    if args.sensor is not None:
        raise ValueError(f"--sensor means nothing for a model {model.name!r}")
    if args.calendar:
        model.calendar = args.calendar
    licence = imported.LICENCE if args.licence is None else args.licence
    return imported.import_files(args.files, model, bands, args.out, args.leave_out, licence)


def _msgfm(args: argparse.Namespace, model: config_dict.ConfigDict, bands: Mapping[str, Sequence[str]]) -> pathlib.Path:
    if args.calendar is not None:
        raise ValueError(f"--calendar means nothing for a model {model.name!r}")
    licence = imported.SWIN_LICENCE if args.licence is None else args.licence
    return imported.import_swin(args.files, model, bands, args.sensor, args.out, args.leave_out, licence)


IMPORTERS = {"skysense": _skysense, "msgfm": _msgfm}
"""config.model.name -> what imports its files; keys as in `models.systems.SYSTEMS` (a test)."""


def _bands(options: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Bands by sensor from SENSOR=B,B,... of the command line."""
    bands = {}
    for option in options:
        name, equals, names = option.partition("=")
        if not equals or name not in sensors.SENSORS:
            raise ValueError(
                f"--bands {option}: write SENSOR=BAND,BAND,... with SENSOR one of {', '.join(sensors.SENSORS)}"
            )
        bands[name] = tuple(names.split(","))
    return bands

"""`skysense-jax pods FOLDER [--out docs/pods.md]`: the table of compile checks, one JSON file per row.

Rows whose file exists are not compiled again, so the command can be stopped and repeated; delete a file to redo its
row. Each row is its own process (libtpu takes its flags once): `skysense-jax compile-check`, printed before it runs.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import shlex
import subprocess
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

from skysense_jax.core import exits
from skysense_jax.core.files import around, write_between
from skysense_jax.core.hardware.chips import GIB


class Row(NamedTuple):
    """One compile check.

    Attributes:
        config: name of a configuration of configs/.
        topology: TPU generation and shape.
        slices: how many slices of it.
        fields: further words of the command line, --config.field=value.
    """

    config: str
    topology: str
    slices: int = 1
    fields: tuple[str, ...] = ()

    @property
    def file(self) -> str:
        """Name of the row's JSON."""
        name = [
            self.config,
            self.topology.replace(":", "-"),
            *([f"{self.slices}slices"] if self.slices > 1 else []),
            *(field.removeprefix("--config.").replace("=", "") for field in self.fields),
        ]
        return "_".join(name) + ".json"

    def command(self, configs: pathlib.Path, folder: pathlib.Path) -> list[str]:
        """The command that makes the row.

        Args:
            configs: folder of configurations.
            folder: where the row's JSON goes.

        Returns:
            The words of the command.
        """
        return [
            sys.executable,
            "-m",
            "skysense_jax.cli",
            "compile-check",
            "--config",
            str(configs / f"{self.config}.py"),
            "--topology",
            self.topology,
            "--slices",
            str(self.slices),
            "--json",
            str(folder / self.file),
            *self.fields,
        ]


NO_BANK = "--config.model.geo_context.bank=none"
WHOLE = "--config.objective.microbatches=1"  # with one place per chip there is nothing to encode in parts

ROWS = (
    Row("skysense_full", "v5e:8x8"),
    *(Row("skysense_full", topology, fields=(NO_BANK,)) for topology in ("v5e:8x8", "v5p:4x4x4")),
    *(
        Row("skysense_full", topology, fields=(NO_BANK, WHOLE))
        for topology in ("v5e:16x16", "v5p:8x8x8", "v5p:8x8x16", "v6e:16x16")
    ),
    Row("skysense_base", "v5e:4x4", fields=(NO_BANK,)),
    Row("msgfm_base", "v5e:4x4"),
)

MARKS = "<!-- rows: skysense-jax pods -->", "<!-- end of rows -->"
"""In the file of --out: the table between them is replaced, the text around it stays."""

HEAD = (
    "| configuration | topology | chips | mesh | global batch | peak HBM / limit, GiB | fits "
    "| sent per chip and step, GiB (ICI / DCN) | roofline step, s (bound) | roofline MFU | compile, s |\n"
    + "|---" * 11
    + "|\n"
)


def line(r: Mapping[str, Any]) -> str:
    """One row of the table, from the figures of `run.pod_check.check` and the row's name."""
    chips = r["devices"] // r["devices_per_chip"]
    slices = f" x {r['slices']}" if r["slices"] > 1 else ""
    mesh = " x ".join(f"{name} {size}" for name, size in r["mesh"].items())
    batch = f"{r['global_batch']} in {r['microbatches']} parts" if r["microbatches"] > 1 else str(r["global_batch"])
    peak = "?" if r["peak_hbm_bytes"] is None else f"{r['peak_hbm_bytes'] / GIB:.2f}"
    cells = [
        r["row"],
        r["topology"] + slices,
        str(chips),
        mesh,
        batch,
        f"{peak} / {r['hbm_limit_bytes'] / GIB:.2f}",
        "yes" if r["fits"] else "**no**",
    ]
    if "ici_bytes" in r:
        bound = max(r["roofline_seconds"], key=r["roofline_seconds"].get)
        cells += [
            f"{r['ici_bytes'] / GIB:.1f} / {r['dcn_bytes'] / GIB:.1f}",
            f"{r['roofline_step_seconds']:.3f} ({bound})",
            f"{r['roofline_mfu']:.0%}",
        ]
    else:
        cells += ["", "", ""]
    return "| " + " | ".join([*cells, f"{r['compile_seconds']:.0f}"]) + " |"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("folder", type=pathlib.Path, help="where the rows' JSON files are kept")
    parser.add_argument(
        "--configs", type=pathlib.Path, default=pathlib.Path("configs"), help="folder of configurations"
    )
    parser.add_argument(
        "--out", type=pathlib.Path, help="also put the table between its marks in this file (docs/pods.md)"
    )
    parser.add_argument("--only", default="", help="only rows whose file name contains this")


def run(args: argparse.Namespace) -> int:
    """Makes what is missing and writes the table; exits.ROW_MISSING where a row could not be made.

    Raises:
        ValueError: no row's file contains --only, or the page of --out lacks the marks of the table.
    """
    if not any(args.only in row.file for row in ROWS):
        raise ValueError(f"--only={args.only}: no row's file contains it; files: {', '.join(row.file for row in ROWS)}")
    if args.out:
        around(args.out, MARKS)  # refused now, not after hours of compilation
    args.folder.mkdir(parents=True, exist_ok=True)
    failed, results = [], []
    for row in ROWS:
        file = args.folder / row.file
        if not file.exists() and args.only in row.file:
            command = row.command(args.configs, args.folder)
            print(shlex.join(command), file=sys.stderr, flush=True)
            subprocess.run(command, check=False)
            if not file.exists():
                failed.append(row.file)
        if file.exists():
            name = row.config + (", bank=none" if NO_BANK in row.fields else "")
            results.append(json.loads(file.read_text()) | {"row": name})
    table = HEAD + "\n".join(map(line, results)) + "\n"
    print(table)
    if args.out:
        write_between(args.out, MARKS, table)
    for name in failed:
        print(f"skysense-jax pods: {name} could not be made, see above", file=sys.stderr)
    return exits.ROW_MISSING if failed else exits.DONE

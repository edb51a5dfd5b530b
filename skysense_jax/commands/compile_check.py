"""`skysense-jax compile-check`: the training step through the real TPU compiler, for a described pod, without a TPU.

    skysense-jax compile-check --config FILE --topology v5e:16x16 [--slices 2] [--json FILE] [--config.field=value ...]

Needs libtpu (`launch/setup.sh tpu`), not a TPU. It lowers and compiles what `train` would run: the same plan, mesh,
shardings and flags. What it prints is what the compiler says (memory, collectives, HBM traffic), and a roofline with
its assumptions; nothing of it has run on a TPU. Exit code 0: it fits; 1: it does not; 78: bad input; 70: the compiler
failed.

The JSON always has fits, peak_hbm_bytes, hbm_limit_bytes, model_flops and compile_seconds. Where the compiler refuses
because of memory there is no program to read: collective_bytes, roofline_step_seconds and roofline_mfu are null, and
peak_hbm_bytes is the state with what the compiler says it needs beside it. What the roofline assumes: run/pod_check.py.
"""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from absl import flags
from ml_collections import config_dict

from skysense_jax.core import config, exits
from skysense_jax.core.files import write_atomically
from skysense_jax.core.hardware.chips import GIB
from skysense_jax.run import pod_check


def define_flags(values: flags.FlagValues) -> None:
    """The flags beside --config."""
    flags.DEFINE_string(
        "topology", None, "TPU generation and shape: v5e:16x16, v5p:8x8x16, v6e:16x16, ...", flag_values=values
    )
    flags.DEFINE_integer(
        "slices", 1, "slices of this topology, joined by the data-centre network", flag_values=values, lower_bound=1
    )
    flags.DEFINE_float(
        "effort",
        -1.0,
        "the compiler's optimisation effort, -1 (minutes) to 0 (its default; an hour at full size)",
        flag_values=values,
        lower_bound=-1.0,
        upper_bound=1.0,
    )
    flags.DEFINE_string("json", None, "also write the figures to this file", flag_values=values)


def _gib(size: float) -> str:
    return f"{size / GIB:8.2f} GiB"


def render(r: Mapping[str, Any]) -> str:
    """The figures of `run.pod_check.check` as text."""
    lines = [
        f"{r['config']} on {r['topology']} x {r['slices']}: {r['devices']} devices ({r['device']}), mesh {r['mesh']}, "
        f"global batch {r['global_batch']}, {r['parameters'] / 1e6:.1f} M parameters",
        f"compiled in {r['compile_seconds']:.0f} s at effort {r['effort']:g} by jax {r['jax']}'s libtpu; "
        "nothing was run",
        *([r["note"]] if r["note"] else []),
        "",
        "per device",
        *(
            f"  {name:22s} {_gib(r[key])}"
            for name, key in (
                ("parameters", "params_bytes"),
                ("optimiser", "opt_bytes"),
                ("teacher", "teacher_bytes"),
                ("memory (centres, bank)", "memory_bytes"),
            )
        ),
    ]
    if "temporary_bytes" in r:
        lines.append(f"  {'activations and rest':22s} {_gib(r['temporary_bytes'])}")
    if r["peak_hbm_bytes"] is not None:
        spare = r["hbm_limit_bytes"] - r["peak_hbm_bytes"]
        lines.append(
            f"  {'peak':22s} {_gib(r['peak_hbm_bytes'])} of {r['hbm_limit_bytes'] / GIB:.2f}: "
            + (
                f"FITS, {spare / GIB:.2f} GiB to spare"
                if r["fits"]
                else f"DOES NOT FIT, {-spare / GIB:.2f} GiB too much"
            )
        )
    if "temporary_bytes" not in r:
        return "\n".join([*lines, f"  {r['refusal']}"])
    lines += ["", f"collectives per step and device ({r['collective_bytes'] / GIB:.2f} GiB sent)"]
    lines += [
        f"  {kind:22s} {_gib(sent['wire'])}  in {sent['count']}, the largest {sent['largest'] / 2**20:.1f} MiB"
        for kind, sent in sorted(r["collectives"].items())
    ]
    lines += [
        "",
        f"model FLOPs of a step     {r['model_flops']:.3e} (all devices; rematerialisation not counted)",
        f"executed per device       {r['executed_flops']:.3e} (rematerialisation counted)",
        f"HBM traffic per device    {r['hbm_traffic_bytes'] / GIB:.1f} GiB",
        "roofline, seconds a step: "
        + ", ".join(f"{name} {seconds:.3f}" for name, seconds in r["roofline_seconds"].items()),
        f"  -> {r['roofline_step_seconds']:.3f} s, MFU {r['roofline_mfu']:.1%} at best (an upper bound: the "
        "longest of them, all else hidden)",
    ]
    return "\n".join(lines)


def parse(argv: Sequence[str]) -> tuple[config_dict.ConfigDict, flags.FlagValues]:
    """Reads the command line.

    Args:
        argv: the words behind the command's name.

    Returns:
        (configuration, flags).

    Raises:
        ValueError: as `core.config.read_flags`; no configuration or no topology, or no folder for --json.
    """
    values = config.read_flags("compile-check", argv, define_flags, __doc__)
    if values.config is None or values.topology is None:
        raise ValueError("both --config FILE and --topology NAME are needed")
    if values.json and not pathlib.Path(values.json).absolute().parent.is_dir():  # said now, not after the compilation
        raise ValueError(f"--json={values.json}: there is no folder {pathlib.Path(values.json).parent}; make it first")
    return values.config, values


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns the exit code."""
    try:
        cfg, values = parse(argv)
        result = pod_check.check(cfg, values.topology, values.slices, values.effort)
    except ValueError as error:
        print(f"skysense-jax compile-check: {error}", file=sys.stderr)
        return exits.BAD_INPUT
    except jax.errors.JaxRuntimeError as error:
        print(
            f"skysense-jax compile-check: the compiler failed, which says nothing about memory: {error}",
            file=sys.stderr,
        )
        return exits.COMPILER_FAILED
    print(render(result))
    if values.json:
        write_atomically(pathlib.Path(values.json), (json.dumps(result, indent=1) + "\n").encode())
    return exits.DONE if result["fits"] else exits.TOO_LARGE

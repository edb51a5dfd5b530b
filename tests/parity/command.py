"""Numerical parity with the reference PyTorch code.    python -m tests.parity FILE.npz...

Each file is one case: arrays run through the official module in float64 (`w:` weights, `x` inputs, `y` outputs, `g`
cotangents, `dx` and `d:` gradients) and `meta_json` with the constructor's arguments (`args`). The module is built from
the arguments, the weights go through the importer users use (convert.torch_import.fill), gradients come back through
the exporter, so every transpose is tested. Every output and gradient the file holds must be produced. Prints a row
each; exit code 1 on any failure.

A file may hold several inputs `x_NAME` with outputs `y_NAME_...`. Arguments that one input has instead of those in
`args` stand in `meta_json`: `"inputs": {"NAME": {"pad_small_map": true, "shape": [2, 3, 90, 70]}}`. An unknown argument
is an error, there and in `args`. The command lists the other entries of `meta_json` that a kind does not read.

Outputs are judged in float32. So are gradients; one that float32 cannot reach (a scalar that is a sum of cancelling
terms: torch's own float32 misses there too) is judged by a second run in float64 at the float64 tolerance of 1e-6, and
the row shows both.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from tests.parity import encoders, mim, model, modules, training
from tests.parity.case import Arrays, Case

FLOAT64_REL_L2 = 1e-6
"""The reference's tolerance for a float64 run (its arrays are stored rounded to float32)."""


class Row(NamedTuple):
    """One compared array; note: how the verdict was reached, where not in float32."""

    name: str
    rel_l2: float
    max_abs: float
    max_over_scale: float
    passed: bool
    note: str = ""


class Kind(NamedTuple):
    """A kind of case: what computes its arrays, the entries of meta_json it reads beside the common ones, and the
    widest type the functions under test compute in.
    """

    run: Callable[[Case], Arrays]
    settings: tuple[str, ...] = ()
    widest: str = "float64"


KINDS = {
    "swinv2": Kind(encoders.swinv2),
    "swinv2_block": Kind(encoders.swinv2_block, ("hw",)),
    "vit": Kind(encoders.vit),
    "pos_resize": Kind(encoders.pos_resize, ("grid", "mode", "align_corners", "nocls")),
    "uphead": Kind(modules.uphead),
    "fusion": Kind(modules.fusion),
    "dino_head": Kind(modules.dino_head),
    "assembly": Kind(model.assembly, ("hw",)),
    "factorised": Kind(model.factorised, ("cfg",)),
    "simmim": Kind(mim.simmim, ("encoder_stride",)),
    "dino_loss": Kind(training.dino_loss, ("batch", "epoch", "teacher_temp_used", "center_momentum"), "float32"),
    "adamw": Kind(training.adamw, training.ADAMW_SETTINGS),
}
"""`kind` of a case -> how it is run."""

COMMON = ("kind", "args", "inputs", "tol", "module", "torch", "loss")
"""Entries of meta_json that every kind may have."""


def measure(name: str, ours: Any, reference: np.ndarray, tol: Mapping[str, float], largest_gradient: float) -> Row:
    """Distances of one array and the verdict by the case's tolerances.

    A gradient that is mathematically zero (below 1e-12 of the largest in the file: rounding of the float64 reference)
    is measured against the largest one.
    """
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    if ours.shape != reference.shape:
        raise ValueError(f"{name}: our shape {ours.shape}, the reference's {reference.shape}")
    difference = ours - reference
    norm, scale = float(np.linalg.norm(reference)), float(np.max(np.abs(reference), initial=0.0))
    gradient = name.startswith(("d:", "dx"))
    if gradient and norm <= 1e-12 * largest_gradient:
        norm = scale = largest_gradient
    max_abs = float(np.max(np.abs(difference), initial=0.0))
    rel_l2 = float(np.linalg.norm(difference)) / norm if norm else max_abs
    over = max_abs / scale if scale else max_abs
    limits: list[tuple[float, float | None]]
    if gradient:
        limits = [(rel_l2, tol.get("grad_rel_l2"))]
    elif name.startswith("y_sk_"):
        limits = [(max_abs, tol.get("sinkhorn_max_abs"))]
    elif "loss_rel" in tol:
        limits = [(over, tol["loss_rel"])]
    else:
        limits = [
            (rel_l2, tol.get("out_rel_l2")),
            (over, tol.get("out_max_over_scale")),
            (max_abs, tol.get("out_max_abs")),
            (over, tol.get("float64_rel")),
        ]
    limits = [(value, limit) for value, limit in limits if limit is not None]
    passed = bool(limits) and all(np.isfinite(value) and value <= limit for value, limit in limits)
    return Row(name, rel_l2, max_abs, over, passed, "" if limits else "meta_json.tol has no tolerance for it")


def read(path: str | pathlib.Path) -> Case:
    """The case of a file. Raises ValueError where its meta_json lacks the kind or the tolerances, or has another kind
    than those of :data:`KINDS`.
    """
    with np.load(path) as file:
        if "meta_json" not in file.files:
            raise ValueError("the file holds no meta_json; store it as a 0-d string")
        arrays, meta = {k: file[k] for k in file.files if k != "meta_json"}, json.loads(str(file["meta_json"]))
    if meta.get("kind") not in KINDS:
        raise ValueError(f"kind {meta.get('kind')!r} not supported yet; supported: {', '.join(KINDS)}")
    if not isinstance(meta.get("tol"), dict):
        raise ValueError("meta_json lacks `tol`, the tolerances; write the numbers of the reference's table")
    return Case(arrays, meta)


def unread(meta: Mapping[str, Any]) -> list[str]:
    """Entries of meta_json that the kind does not read: notes of how a file was made, or settings not built here."""
    known = {*COMMON, *KINDS[meta["kind"]].settings}
    return [key for key in meta if key not in known and not key.startswith("fp32_")]


def run_case(path: str | pathlib.Path) -> list[Row]:
    """All rows of one file.

    Raises:
        ValueError: for a kind, an input or an argument that is not built, or an array nothing was computed for; the
            message begins with the file's name.
    """
    try:
        return judged(read(path))
    except ValueError as error:
        raise ValueError(f"{pathlib.Path(path).name}: {error}") from error


def judged(case: Case) -> list[Row]:
    """All rows of a case. Raises ValueError as :func:`run_case` does."""
    arrays, meta = case.arrays, case.meta
    run, tol = KINDS[meta["kind"]].run, meta["tol"]
    with jax.default_matmul_precision("highest"):
        ours = run(case)
    names = [k for k in arrays if k.startswith(("y", "d:", "dx"))]
    absent = [k for k in names if k not in ours]
    if absent or not names:
        hint = f"; meta_json holds {', '.join(unread(meta))}, not read by this kind" if unread(meta) else ""
        raise ValueError(f"nothing computed for {absent or 'this file: it holds no outputs'}{hint}")
    largest = max((float(np.linalg.norm(arrays[k])) for k in names if k.startswith("d")), default=0.0)
    rows = [measure(k, ours[k], arrays[k], tol, largest) for k in names]
    # Gradients, and losses kept in float64: sums that cancel are below float32's noise.
    doubtful = [r.name for r in rows if not r.passed and r.name.startswith(("d:", "dx", "y64_"))]
    if doubtful and "grad_rel_l2" in tol and KINDS[meta["kind"]].widest == "float64":
        wide = {k: v.astype(np.float64) if k[0] in "xg" and v.dtype.kind == "f" else v for k, v in arrays.items()}
        with jax.enable_x64(True):
            ours = run(Case(wide, meta, "float64"))
        tight = {"grad_rel_l2": FLOAT64_REL_L2, "out_rel_l2": FLOAT64_REL_L2}
        again = {k: measure(k, ours[k], arrays[k], tight, largest) for k in doubtful}
        rows = [
            r
            if r.name not in again
            else r._replace(passed=again[r.name].passed, note=f"float64 rel L2 {again[r.name].rel_l2:.2e}")
            for r in rows
        ]
    return rows


def main(paths: Sequence[str]) -> int:
    """Print the table of every file; 0 if all pass."""
    if not paths:
        print(__doc__)
        return 2
    failed = []
    for path in paths:
        print(pathlib.Path(path).name)
        try:
            rows = run_case(path)
        except ValueError as error:
            print(f"  FAIL {error}")
            failed.append(path)
            continue
        for row in rows:
            verdict = "pass" if row.passed else "FAIL"
            print(
                f"  {verdict} {row.name:60s} rel L2 {row.rel_l2:.2e}  max/scale {row.max_over_scale:.2e}  "
                f"max {row.max_abs:.2e}  {row.note}".rstrip()
            )
        if ignored := unread(read(path).meta):
            print(f"  not read in meta_json: {', '.join(ignored)}")
        if not all(row.passed for row in rows):
            failed.append(path)
    print(f"{len(paths) - len(failed)} of {len(paths)} files pass" + "".join(f"\n  failed: {path}" for path in failed))
    return 1 if failed else 0

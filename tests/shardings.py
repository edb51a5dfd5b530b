"""The table of shardings of each configuration: which leaf is split over which mesh axis, and what stays whole.

python -m tests.shardings          writes tests/golden/shardings_<config>.txt (shapes only: no device, no array)
"""

from __future__ import annotations

import pathlib

import jax

from skysense_jax.core import sharding, trees
from skysense_jax.run import plan as plans
from tests import resolved_configs

FOLDER = pathlib.Path(__file__).parent / "golden"
CONFIGS = {
    "skysense_smoke": (1, 8),
    "skysense_small": (1, 8),
    "skysense_base": (1, 16),
    "skysense_full": (2, 32),
    "msgfm_base": (1, 4, 8),
}
"""Configuration -> mesh, data x fsdp (x expert). Swin's first stage, 352 = 11 x 32 wide, divides by 32 and no further:
64 chips are 2 x 32.
"""


def table(name: str) -> str:
    """One line per leaf of params, teacher and memory (the optimiser's moments lie as the parameters do)."""
    cfg = resolved_configs.load(name)
    cfg.data.statistics = "table"
    sizes = CONFIGS[name]
    names = ("data", "fsdp", "expert")[: len(sizes)]
    mesh = jax.sharding.AbstractMesh(sizes, names, axis_types=(jax.sharding.AxisType.Auto,) * len(sizes))
    plan = plans.make_plan(cfg, plans.make_contract(cfg), mesh)
    lines = [f"{name}, {' x '.join(names)} = {' x '.join(map(str, sizes))}; written by: python -m tests.shardings"]
    for part in ("params", "teacher", "memory"):
        shapes = getattr(plan.state, part)
        report = sharding.report(shapes, jax.tree.map(lambda leaf: leaf.sharding, shapes))
        lines.append(f"{part}: {report.total} bytes, {report.per_device} per device, {report.replicated} replicated")
        for leaf, shape in trees.flatten(shapes).items():
            where = ", ".join(f"{axis} over axis {i}" for i, axis in enumerate(shape.sharding.spec) if axis)
            lines.append(f"{part}/{leaf} {shape.dtype}{list(shape.shape)} {where or 'replicated'}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    for config in CONFIGS:
        (FOLDER / f"shardings_{config}.txt").write_text(table(config))

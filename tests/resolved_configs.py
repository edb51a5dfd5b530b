"""Every configuration of configs/ with all its fields resolved: one golden file each, so that a moved default shows.

python -m tests.resolved_configs     writes tests/golden/configs/<name>.json anew; the difference is for the reviewer
"""

from __future__ import annotations

import json
import pathlib
import runpy

from skysense_jax.core import fields

ROOT = pathlib.Path(__file__).resolve().parents[1]
FOLDER = pathlib.Path(__file__).parent / "golden" / "configs"
VARIANTS = {
    "skysense_tiny": ("series",),
    "msgfm_base": ("s2,s1", "dsm"),
    "msgfm_smoke": ("s2,s1", "dsm"),
    "msgfm_tiny": ("s2,s1", "dsm"),
}
"""Configuration -> arguments of get_config (FILE.py:ARGUMENT on a command line) that have a golden file of their own."""


def paths() -> dict[str, str]:
    """Name of the golden file -> FILE.py or FILE.py:ARGUMENT, for every configuration of configs/."""
    names = [file.stem for file in sorted((ROOT / "configs").glob("*.py")) if file.stem != "__init__"]
    spelt = {name: f"{name}.py" for name in names}
    for name, arguments in VARIANTS.items():
        spelt |= {f"{name}-{one.replace(',', '-')}": f"{name}.py:{one}" for one in arguments}
    return {name: str(ROOT / "configs" / path) for name, path in spelt.items()}


def resolved(path: str) -> dict[str, str]:
    """Dotted name -> value as Python writes it, so that a tuple is no list and 1.0 is no 1."""
    file, *argument = path.split(":", 1)
    config = runpy.run_path(file)["get_config"](*argument)
    return {name: repr(value) for name, value in sorted(fields.flatten(config).items())}


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for golden, path in paths().items():
        (FOLDER / f"{golden}.json").write_text(json.dumps(resolved(path), indent=1) + "\n")

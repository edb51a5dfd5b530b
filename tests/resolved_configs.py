"""Every configuration of configs/ with all its fields resolved: one golden file each, so that a moved default shows.

python -m tests.resolved_configs     writes tests/golden/configs/<name>.json anew; the difference is for the reviewer
"""

from __future__ import annotations

import importlib
import json
import pathlib

from ml_collections import config_dict

from skysense_jax.core.config import flatten

ROOT = pathlib.Path(__file__).resolve().parents[1]
FOLDER = pathlib.Path(__file__).parent / "golden" / "configs"
VARIANTS = {
    "skysense_tiny": ("series",),
    "msgfm_base": ("s2,s1", "dsm"),
    "msgfm_smoke": ("s2,s1", "dsm"),
    "msgfm_tiny": ("s2,s1", "dsm"),
}
"""Configuration -> arguments of get_config (FILE.py:ARGUMENT on a command line) with a golden file each."""


def names() -> list[str]:
    """Names of the configurations of configs/."""
    return sorted(file.stem for file in (ROOT / "configs").glob("*.py") if file.stem != "__init__")


def load(name: str, *argument: str) -> config_dict.ConfigDict:
    """The configuration of that name."""
    return importlib.import_module(f"skysense_jax.configs.{name}").get_config(*argument)


def goldens() -> dict[str, tuple[str, ...]]:
    """Name of the golden file -> (configuration,) or (configuration, argument)."""
    variants = [(name, argument) for name, arguments in VARIANTS.items() for argument in arguments]
    return {name: (name,) for name in names()} | {"-".join(v).replace(",", "-"): v for v in variants}


def resolved(config: config_dict.ConfigDict) -> dict[str, str]:
    """Dotted name -> value as Python writes it, so that a tuple is no list and 1.0 is no 1."""
    return {name: repr(value) for name, value in sorted(flatten(config).items())}


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for golden, source in goldens().items():
        (FOLDER / f"{golden}.json").write_text(json.dumps(resolved(load(*source)), indent=1) + "\n")

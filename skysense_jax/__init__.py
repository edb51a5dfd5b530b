"""skysense_jax: remote-sensing foundation models in JAX.

`skysense_jax.load(PATH)` gives features; everything else is a command.

Importing the package imports nothing else: jax comes with the first use of `load`.
"""

import pathlib
from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "load"]

_root = pathlib.Path(__file__).resolve().parents[1]
if not (_root / "skysense_jax" / "configs").is_dir() and (_root / "configs" / "skysense_full.py").is_file():
    # In a checkout configs/ lies beside the package; it is skysense_jax.configs there, whatever else is installed.
    __path__.append(str(_root))


def __getattr__(name: str) -> Any:
    if name == "load":
        from skysense_jax.networks import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

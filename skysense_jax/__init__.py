"""skysense_jax: remote-sensing foundation models in JAX.

`skysense_jax.load(PATH)` gives features; everything else is a command.

Importing the package imports nothing else: jax comes with the first use of `load`.
"""

from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    if name == "load":
        from skysense_jax.networks import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

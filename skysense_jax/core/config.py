"""A configuration: reading it from a file or a command line, its fields by dotted name, and the check of its fields.

The check refuses a field that nothing reads and names every field that is missing: a configuration is a Python file, in
which a misspelt field is silently a new one. The vocabulary of a run is its recipe's
(`skysense_jax.recipes`); "<sensor>" in it stands for every sensor of `data.bands`.
"""

from __future__ import annotations

import difflib
import inspect
import pathlib
import runpy
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from absl import flags
from ml_collections import config_dict, config_flags

from skysense_jax.core import exits

Vocabulary = Mapping[str, tuple[str, ...]]
"""Section of a configuration ("" = top level) -> names of its fields."""


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The fields of a configuration by dotted name.

    Args:
        config: a configuration, or a section of it.
        prefix: put before every name; ends with a dot, or is empty.

    Returns:
        "section.field" -> value.
    """
    flat: dict[str, Any] = {}
    for name, value in config.items():
        flat |= flatten(value, f"{prefix}{name}.") if hasattr(value, "items") else {prefix + name: value}
    return flat


def check_fields(config: config_dict.ConfigDict, known: Vocabulary, of_sensors: Collection[str] = ()) -> None:
    """Refuses a configuration with a field that nothing reads, or without one that is read.

    Args:
        config: the whole configuration.
        known: its vocabulary.
        of_sensors: sections of `known` that describe the encoder of a single sensor, "model.<sensor>": needed where
            config.data.bands has the sensor, ignored elsewhere.

    Raises:
        ValueError: names every field that nothing reads, with the nearest known one, and every missing field.
    """
    present = set(flatten(config))
    sensors = {name.split(".")[-1] for name in present if name.startswith("data.bands.")}
    needed: set[str] = set()
    ignored: set[str] = set()
    for section, fields in known.items():
        names = [name for field in fields for name in (sorted(sensors) if field == "<sensor>" else [field])]
        full = {f"{section}.{name}" if section else name for name in names}
        if section in of_sensors and section.split(".")[-1] not in sensors:
            ignored |= full
        else:
            needed |= full
    problems = []
    for name in sorted(present - needed - ignored):
        similar = difflib.get_close_matches(name, needed, 1)
        problems.append(f"nothing reads config.{name}" + (f"; did you mean config.{similar[0]}?" if similar else ""))
    problems += [f"config.{name} is missing" for name in sorted(needed - present)]
    if problems:
        raise ValueError("the configuration has the wrong fields: " + "; ".join(problems))


def from_json(value: Mapping[str, Any]) -> config_dict.ConfigDict:
    """A configuration read from JSON, where tuples became lists."""
    return config_dict.ConfigDict(_tuples(dict(value)))


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _tuples(part) for name, part in value.items()}
    return tuple(_tuples(part) for part in value) if isinstance(value, list) else value


def read_flags(
    command: str, argv: Sequence[str], define: Callable[[flags.FlagValues], None], text: str
) -> flags.FlagValues:
    """Reads the flags of a command that takes a configuration: --config FILE and --config.section.field=value.

    Args:
        command: its name, for --help.
        argv: the words behind it.
        define: adds the command's further flags.
        text: shown by --help.

    Returns:
        The values of all flags; `.config` is the configuration or None.

    Raises:
        ValueError: an unknown flag or field, a value of a wrong type, or a word that is no flag.
    """
    argv = [f"skysense-jax {command}", *argv]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config",
        None,
        "configuration file; fields: --config.section.field=value",
        flag_values=values,
        sys_argv=argv,
        lock_config=True,
    )
    flags.DEFINE_bool("help", False, "show this text", flag_values=values, short_name="h")
    define(values)
    if "--help" in argv or "-h" in argv:
        print(f"{text}\n{values.get_help()}")
        sys.exit(exits.DONE)
    try:
        rest = values(argv)[1:]
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"the configuration has no such field, or it takes another type: {error}") from error
    except (flags.Error, FileNotFoundError) as error:
        raise ValueError(str(error)) from error
    if rest:
        raise ValueError(f"unexpected {rest}")
    return values


def read_config(path: str | pathlib.Path) -> config_dict.ConfigDict:
    """The configuration of a file, as the commands with configuration flags read it.

    Args:
        path: FILE.py, or FILE.py:ARGUMENT to call its `get_config(ARGUMENT)`.

    Returns:
        What `get_config` returns.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no configuration, takes no argument, or refuses this argument.
    """
    file, *argument = [str(path)] if pathlib.Path(path).is_file() else str(path).rsplit(":", 1)
    if not pathlib.Path(file).is_file():
        raise FileNotFoundError(f"{file}: no such configuration file")
    if pathlib.Path(file).suffix != ".py":
        raise ValueError(f"{file}: a configuration is a Python file with get_config()")
    names = runpy.run_path(file)
    if "get_config" not in names:
        raise ValueError(f"{file}: has no get_config()")
    if argument and not inspect.signature(names["get_config"]).parameters:
        raise ValueError(f"{file}: get_config() takes no argument; leave out :{argument[0]}")
    try:
        return names["get_config"](*argument)
    except ValueError as error:  # raised again by this package, so that a command prints it without a traceback
        raise ValueError(f"{path}: {error}") from error

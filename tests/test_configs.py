"""The configurations are what the golden files say, field by field, types included, however they are loaded."""

import json

import pytest

from skysense_jax import train
from skysense_jax.core.config import read_config
from tests import resolved_configs

GOLDENS = resolved_configs.goldens()


def golden(name):
    return json.loads((resolved_configs.FOLDER / f"{name}.json").read_text())


def path_of(name):
    """What --config takes: FILE.py or FILE.py:ARGUMENT."""
    configuration, *argument = GOLDENS[name]
    return ":".join([str(resolved_configs.ROOT / "configs" / f"{configuration}.py"), *argument])


def test_every_golden_file_has_its_configuration():
    assert sorted(file.stem for file in resolved_configs.FOLDER.glob("*.json")) == sorted(GOLDENS)


@pytest.mark.parametrize("name", GOLDENS)
def test_no_value_changed(name):
    wanted, now = golden(name), resolved_configs.resolved(resolved_configs.load(*GOLDENS[name]))
    moved = [field for field in sorted(wanted | now) if wanted.get(field) != now.get(field)]
    told = [f"{field}: {wanted.get(field)} -> {now.get(field)}" for field in moved]
    assert not moved, "\n".join(["if intended: python -m tests.resolved_configs", *told])


@pytest.mark.parametrize("name", GOLDENS)
def test_a_file_gives_what_the_import_gives(name):
    """The commands take a path, by read_config or, where fields are flags too, by ml_collections."""
    assert resolved_configs.resolved(read_config(path_of(name))) == golden(name)
    flags = train.parse(["--config", path_of(name), "--workdir", "unused"])
    assert resolved_configs.resolved(flags.config) == golden(name)


def test_what_read_config_refuses(tmp_path):
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "fixed.py").write_text("def get_config():\n    return {}\n")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="absent.py: no such configuration file"):
        read_config(tmp_path / "absent.py")
    with pytest.raises(ValueError, match="config.json: a configuration is a Python file"):
        read_config(tmp_path / "config.json")
    with pytest.raises(ValueError, match="empty.py: has no get_config"):
        read_config(tmp_path / "empty.py")
    with pytest.raises(ValueError, match="fixed.py: get_config.. takes no argument; leave out :series"):
        read_config(f"{tmp_path / 'fixed.py'}:series")
    with pytest.raises(ValueError, match="skysense_tiny.py:serie: unknown variant 'serie': all, series"):
        read_config(path_of("skysense_tiny") + ":serie")

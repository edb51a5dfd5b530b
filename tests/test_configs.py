"""The configurations are what the golden files say, field by field, types included."""

import json

import pytest

from tests import resolved_configs

PATHS = resolved_configs.paths()


def test_every_golden_file_has_its_configuration():
    assert sorted(file.stem for file in resolved_configs.FOLDER.glob("*.json")) == sorted(PATHS)


@pytest.mark.parametrize("name", PATHS)
def test_no_value_changed(name):
    golden = json.loads((resolved_configs.FOLDER / f"{name}.json").read_text())
    now = resolved_configs.resolved(PATHS[name])
    moved = [field for field in sorted(golden | now) if golden.get(field) != now.get(field)]
    told = [f"{field}: {golden.get(field)} -> {now.get(field)}" for field in moved]
    assert not moved, "\n".join(["if intended: python -m tests.resolved_configs", *told])

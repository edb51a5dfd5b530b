"""The wheel alone is the whole package: built from this checkout, installed into an empty environment, used there."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import venv
import zipfile

import pytest

from skysense_jax.convert import torch_export
from tests.helpers import tiny_model

ROOT = pathlib.Path(__file__).resolve().parents[1]
FOLDERS = ("skysense_jax", "configs")
SHIPPED = (".py", ".md", ".csv")


def call(*words, cwd):
    """Output of a command that must succeed. What leads Python to a checkout is not handed on."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    done = subprocess.run([str(word) for word in words], cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of a copy of this checkout: a build leaves folders beside what it builds from."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "checkout"
    for name in FOLDERS:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    call(sys.executable, "-c", build, folder, cwd=copy)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """The interpreter of an environment with nothing in it but the wheel, which then borrows the dependencies of the
    environment the tests run in: nothing is downloaded, and the editable installation there stays out, because the
    lines of a .pth file add folders but do not run the .pth files in them.
    """
    folder = tmp_path_factory.mktemp("environment") / "venv"
    venv.create(folder, with_pip=True)
    interpreter = folder / "bin" / "python"
    call(interpreter, "-I", "-m", "pip", "install", "--no-deps", "--no-index", wheel, cwd=folder)
    (site,) = folder.glob("lib/python*/site-packages")
    borrowed = [path for path in sys.path if pathlib.Path(path).name in ("site-packages", "dist-packages")]
    (site / "borrowed.pth").write_text("\n".join(borrowed) + "\n")
    return interpreter


def test_the_wheel_brings_every_file_of_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    wanted = {file.relative_to(ROOT) for folder in FOLDERS for file in (ROOT / folder).rglob("*")}
    wanted = {path.as_posix() for path in wanted if path.suffix in SHIPPED}
    assert names == {name.replace("configs/", "skysense_jax/configs/", 1) for name in wanted}


def test_the_package_and_its_configurations_come_from_the_wheel(python, tmp_path):
    code = """
import skysense_jax
from skysense_jax.commands import import_torch
from skysense_jax.configs import msgfm_tiny, skysense_full
print(skysense_jax.__file__, skysense_full.__file__, import_torch.FULL_SIZE)
print(skysense_full.get_config().model.width, msgfm_tiny.get_config("s2,s1").steps)
"""
    files, values = call(python, "-I", "-c", code, cwd=tmp_path).splitlines()
    environment = python.parents[1]
    assert len(files.split()) == 3 and all(environment in pathlib.Path(file).parents for file in files.split())
    assert values == "2816 6"


def test_the_command_says_what_it_can_do(python, tmp_path):
    said = call(python.with_name("skysense-jax"), "--help", cwd=tmp_path)
    assert "usage: skysense-jax" in said and all(word in said for word in ("train", "data", "import-torch"))


def test_synthetic_data_need_no_checkout(python, tmp_path):
    call(python.with_name("skysense-jax"), "data", "synth", "--places", "2", "--out", tmp_path / "raw", cwd=tmp_path)
    assert (tmp_path / "raw" / "catalog.csv").read_text().count("\n") > 2
    assert list((tmp_path / "raw").rglob("*.tif"))


def test_an_exported_folder_loads(python, tmp_path):
    cfg, contract = tiny_model.config(), tiny_model.contract()
    torch_export.export(tiny_model.params(cfg, contract), contract, cfg, tmp_path / "weights", {})
    code = """
import json, sys
import numpy as np
import skysense_jax
loaded = skysense_jax.load(sys.argv[1])
image = np.full((1, 4, 4, 2), -12, np.float32)
features = loaded.features({"s1": {"image": image, "dates": ["2024-06-01"]}})
print(json.dumps({name: [list(value.shape), bool(np.isfinite(value).all())] for name, value in features.items()}))
"""
    shapes = json.loads(call(python, "-I", "-c", code, tmp_path / "weights", cwd=tmp_path).splitlines()[-1])
    assert shapes["image"] == [[8], True] and shapes["s1_pixel"] == [[4, 4, 16], True]

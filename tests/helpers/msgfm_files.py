"""A small msGFM and its weights in files: the layouts of others, and the folder that `import-torch` writes."""

import json
import sys
import types

import jax
import numpy as np
import pytest

from skysense_jax import sensors
from skysense_jax.convert import tensor_files, torch_import
from skysense_jax.run.stored import sealed
from tests.helpers.msgfm_model import config

NEEDS_TORCH = "needs torch (the extra `torch`) to write .pth files and to run the exported folder"
BANDS = {"hr": ("R", "G", "B"), "s2": sensors.SENSORS["s2"].bands, "s1": ("VV", "VH"), "dsm": ("height",)}
CONTRACT = sensors.input_contract(BANDS, 4)
HR = sensors.input_contract({"hr": BANDS["hr"]}, 4)
SIZES = ((2, 4), 4, (1, 2), 4, 16)
"""depths, width, heads, window, grid of :func:`small`."""


def small(**changes):
    """config.model: maps of 16x16 and 8x8 cells at 32 pixels, experts in the odd blocks of the second stage."""
    moe = {"stages": (1,), "experts": 4, "capacity": 1.25, "group": 2, "gate_noise": 1.0, "aux": "tutel"}
    return config(**{"depths": (2, 4), "img_size": 32, "ratio": 4, "moe": moe, **changes})


def imported(arrays, cfg, sensor=None, contract=HR, **more):
    return torch_import.import_swin(tensor_files.in_memory(arrays), sensor, cfg, contract, **more)


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def config_file(tmp_path, cfg):
    path = tmp_path / "msgfm_config.py"
    path.write_text(
        "from ml_collections import config_dict\n"
        f"def get_config():\n    return config_dict.ConfigDict({{'model': {cfg.to_dict()!r}, "
        f"'data': {{'bands': {BANDS!r}}}}})\n"
    )
    return str(path)


def parts(folder):
    """The tree of a folder of imported weights, and its description."""
    meta = json.loads((folder / "model.json").read_text())
    read = [sealed.read_tree(folder / "parts", name) for name in meta["provenance"]["parts"]]
    return {name: tree for part in read for name, tree in part.items()}, meta


class CfgNode(dict):
    """Stands in for yacs.config.CfgNode, which SimMIM and GFM save beside the tensors."""


def save_simmim(monkeypatch, path, arrays, **more):
    """As SimMIM's utils.save_checkpoint does, configuration included."""
    torch = pytest.importorskip("torch", reason=NEEDS_TORCH)
    CfgNode.__module__, CfgNode.__qualname__ = "yacs.config", "CfgNode"
    module = types.ModuleType("yacs.config")
    module.CfgNode = CfgNode
    node = CfgNode(MODEL=CfgNode(TYPE="swin", DEPTHS=[2, 4]))
    node.__dict__["__immutable__"] = True
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
        patch.setitem(sys.modules, "yacs.config", module)
        torch.save(
            {
                "model": {k: torch.from_numpy(np.array(v)) for k, v in arrays.items()},
                "epoch": 99,
                "config": node,
                "lr_scheduler": {"base_values": [1e-4]},
                "max_accuracy": 0.0,
                **more,
            },
            path,
        )

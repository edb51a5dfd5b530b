"""msGFM in and out of PyTorch: files in the layouts of SimMIM, GFM, Swin and Swin-MoE (random weights stand in for the
real ones), the folder plain torch runs, and back.
"""

import importlib.util
import json
import pathlib
import pickle
import re
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
import safetensors.numpy

import skysense_jax
from skysense_jax import cli, sensors
from skysense_jax.configs import msgfm_base
from skysense_jax.convert import keymap, tensor_files, torch_export, torch_import
from skysense_jax.convert.swin import bias_tables, expert_shards
from skysense_jax.convert.swin import files as swin_files
from skysense_jax.core import trees
from skysense_jax.models import msgfm
from skysense_jax.run import init_from, state
from skysense_jax.run.stored import sealed
from tests.helpers import swin_layouts as layouts
from tests.parity.names import simmim_entries
from tests.test_msgfm import DENSE, config, random_params

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


# -------------------------------------------------------------------------------------------------------- SimMIM, GFM
def test_a_simmim_checkpoint_is_one_sensor_of_the_model():
    cfg, file = small(moe=DENSE), layouts.simmim(*SIZES)
    got, found = imported(file, cfg)
    params, stage1 = got.params, got.params["encoder"]["stage1"]
    block, ours = "encoder.layers.1.blocks.3.", stage1["pairs0"]["shifted"]
    checks = {
        f"{block}attn.qkv.weight": ours["attn"]["qkv"]["kernel"][1].T,
        f"{block}attn.relative_position_bias_table": ours["attn"]["table"][1],
        f"{block}mlp.fc2.bias": ours["fc2"]["bias"][1],
        "encoder.layers.0.blocks.0.norm1.weight": params["encoder"]["stage0"]["pairs0"]["plain"]["norm1"]["scale"][0],
        "encoder.layers.0.downsample.reduction.weight": stage1["downsample"]["reduction"]["kernel"].T,
        "encoder.patch_embed.proj.weight": params["embed_hr"]["proj"]["kernel"].transpose(3, 2, 0, 1),
        "decoder.0.weight": params["decoder_hr"]["proj"]["kernel"].T[:, :, None, None],
        "encoder.norm.bias": params["encoder"]["norm"]["bias"],
        "encoder.mask_token": params["mask_token"],
    }
    for name, value in checks.items():
        np.testing.assert_array_equal(file[name], value)
    buffers = [name for name in file if name.endswith(("attn_mask", "relative_position_index"))]
    assert sum(x.size for x in jax.tree.leaves(params)) == sum(file[k].size for k in file if k not in buffers)
    assert found.modules == ("encoder", "embed_hr", "mask_token", "decoder_hr") and not found.new
    (note,) = found.notes
    assert note.startswith(f"{len(buffers)} tensors left out, recomputed from the sizes: encoder.layers.0.")


def test_gfm_s_teacher_and_projector_are_left_out_by_name():
    cfg, file = small(moe=DENSE), layouts.simmim(*SIZES)
    teacher = {f"teacher.{name}": value for name, value in layouts.swin(*SIZES, seed=5).items()}
    extra = teacher | {"projector.weight": np.zeros((8, 8), np.float32), "projector.bias": np.zeros(8, np.float32)}
    got, found = imported(file | extra, cfg)
    equal(got.params, imported(file, cfg)[0].params)
    buffers = sum("attn_mask" in name or "position_index" in name for name in teacher)
    assert any(note.startswith(f"{len(extra) - buffers} tensors left out, GFM's distillation") for note in found.notes)
    del file["decoder.0.weight"], file["decoder.0.bias"]  # it is not known whether gfm.pth has them
    got, found = imported(file, cfg)
    assert found.new == ("decoder_hr",) and "decoder_hr" not in got.params


@pytest.mark.parametrize("prefix", ["module.", "model.", "module.model."])
def test_what_wrappers_put_before_the_names_is_taken_off(prefix):
    cfg, file = small(moe=DENSE), layouts.simmim(*SIZES)
    wrapped = {prefix + name: value for name, value in file.items()}
    equal(imported(wrapped, cfg)[0].params, imported(file, cfg)[0].params)
    assert swin_files.sensors_in(tensor_files.in_memory(wrapped), None) == (("hr",), False)
    with pytest.raises(ValueError, match=r"encoder\.norm\.bias are both encoder\.norm\.bias once the prefixes are off"):
        imported({**wrapped, "encoder.norm.bias": file["encoder.norm.bias"]}, cfg)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop("encoder.norm.weight"), r"missing: encoder.norm.weight \(8,\)"),
        (lambda s: s.pop("decoder.0.bias"), r"missing: decoder.0.bias \(48,\)"),
        (
            lambda s: s.update({"encoder.absolute_pos_embed": np.zeros((1, 64, 4), np.float32)}),
            r"unexpected: encoder.absolute_pos_embed \(1, 64, 4\)",
        ),
        (
            lambda s: s.update({"encoder.norm.weight": np.zeros(9, np.float32)}),
            r"wrong shape: encoder.norm.weight is \(9,\), the model needs \(8,\)",
        ),
        (
            lambda s: s.update(
                {"encoder.layers.1.blocks.1.attn.relative_position_bias_table": np.zeros((), np.float32)}
            ),
            r"wrong shape: .*blocks\.1\.attn\.relative_position_bias_table is \(\), the model needs \(49, 2\)",
        ),
        (
            lambda s: s.update(
                {"encoder.layers.1.blocks.1.attn.relative_position_bias_table": np.zeros((1, 49, 2), "f4")}
            ),
            r"wrong shape: .*blocks\.1\.attn\.relative_position_bias_table is \(1, 49, 2\), the model needs \(49, 2\)",
        ),
        (
            lambda s: s.update(
                {"encoder.layers.1.blocks.1.attn.relative_position_bias_table": np.zeros((50, 2), np.float32)}
            ),
            r"wrong shape: .*blocks\.1\.attn\.relative_position_bias_table is \(50, 2\), the model needs \(49, 2\)",
        ),
    ],
)
def test_a_tensor_that_does_not_fit_is_refused_by_name(change, message):
    cfg, file = small(moe=DENSE), layouts.simmim(*SIZES)
    change(file)
    with pytest.raises(ValueError, match=message):
        imported(file, cfg)


@pytest.mark.parametrize(
    "sizes, changes, message",
    [
        (
            ((2, 2), 4, (1, 2), 4, 16),
            {},
            r"layers\.1\.blocks\.1\.\S+ \(.*\): the file has model\.depths = \(2, 2\), the "
            r"configuration \(2, 4\)",
        ),
        (((2, 4, 2), 4, (1, 2, 4), 4, 16), {}, r"model\.depths = \(2, 4, 2\)"),
        (
            ((2, 4), 8, (1, 2), 4, 16),
            {},
            r"patch_embed\.proj\.weight \(8, 3, 2, 2\): the file has model\.embed_dims = 8",
        ),
        (((2, 4), 4, (2, 2), 4, 16), {}, r"bias_table \(49, 2\): the file has model\.num_heads\[0\] = 2, the \S+ 1"),
        (SIZES, {"patch": 4}, r"\(4, 3, 4, 4\): the file has model\.patch = 4, the configuration 2"),
        (
            SIZES,
            {"ratio": 4},
            r"layers\.0\.blocks\.0\.mlp\.fc1\.weight \(16, 4\): the file has model\.mlp_ratio = 4\.0",
        ),
        (
            SIZES,
            {"channels": 13},
            r"patch_embed\.proj\.weight \(4, 13, 2, 2\) takes 13 bands, hr has R, G, B; .*--sensor",
        ),
        (SIZES, {"experts": [(1, 1)], "count": 4}, r"_moe_layer\.experts\.batched_fc1_w .*model\.moe\.stages = \(\)"),
    ],
)
def test_another_architecture_is_refused_with_tensor_shape_and_field(sizes, changes, message):
    with pytest.raises(ValueError, match=message):
        imported(layouts.simmim(*sizes, **changes), small(moe=DENSE))


def test_the_sensor_is_one_of_the_model_s_and_takes_the_file_s_bands():
    cfg, file = small(moe=DENSE), layouts.simmim(*SIZES, channels=2)
    assert set(imported(file, cfg, "s1", CONTRACT)[0].params) == {"encoder", "mask_token", "embed_s1", "decoder_s1"}
    with pytest.raises(ValueError, match="takes no 's1'"):
        imported(file, cfg, "s1")
    with pytest.raises(ValueError, match=r"no Swin-V1 with a patch embedding .* first tensors are a"):
        imported({"a": np.zeros(2, np.float32)}, cfg)


# ----------------------------------------------------------------------------------------------- supervised, Swin-MoE
def test_a_supervised_checkpoint_with_another_window():
    cfg = small(moe=DENSE)
    file = layouts.swin((2, 4), 4, (1, 2), 7, 28) | {
        "head.weight": np.zeros((10, 8), np.float32),
        "head.bias": np.zeros(10, np.float32),
    }
    got, found = imported(file, cfg)
    assert found.modules == ("encoder", "embed_hr") and found.new == ("mask_token", "decoder_hr")
    assert "2 tensors left out, the classifier of supervised training: head.weight, ..." in found.notes
    assert "6 bias tables resized from 169 to 49 rows" in found.notes
    table = got.params["encoder"]["stage0"]["pairs0"]["plain"]["attn"]["table"][0]
    np.testing.assert_array_equal(
        table, bias_tables.resized(file["layers.0.blocks.0.attn.relative_position_bias_table"], 4)
    )


def not_a_knot(at, values, wanted):
    """Interpolating cubic spline through (at, values [n, m]), whose first two and last two pieces are one cubic each,
    read at `wanted` (clamped to the ends): by solving for the coefficients of all pieces at once.
    """
    n = len(at) - 1
    rows, right = [], []

    def row(*terms):
        rows.append(np.zeros(4 * n))
        for piece, x, order in terms:
            sign, piece = (1, piece) if piece >= 0 else (-1, -piece - 1)
            powers = [[1, x, x * x, x**3], [0, 1, 2 * x, 3 * x * x], [0, 0, 2, 6 * x], [0, 0, 0, 6]][order]
            rows[-1][4 * piece : 4 * piece + 4] += sign * np.array(powers, float)

    for i in range(n):
        row((i, 0.0, 0)), right.append(values[i])
        row((i, at[i + 1] - at[i], 0)), right.append(values[i + 1])
    for i in range(n - 1):
        for order in (1, 2):
            row((i, at[i + 1] - at[i], order), (-(i + 1) - 1, 0.0, order)), right.append(0 * values[0])
    for i in (0, n - 2):
        row((i, 0.0, 3), (-(i + 1) - 1, 0.0, 3)), right.append(0 * values[0])
    pieces = np.linalg.solve(np.array(rows), np.array(right)).reshape(n, 4, -1)
    wanted = np.clip(wanted, at[0], at[-1])
    piece = np.clip(np.searchsorted(at, wanted) - 1, 0, n - 1)
    x = (wanted - at[piece])[:, None]
    return sum(pieces[piece, k] * x**k for k in range(4))


@pytest.mark.parametrize("source, target", [(6, 7), (7, 6), (6, 4), (4, 6), (6, 16)])
def test_tables_are_resized_as_the_reference_resizes_them(source, target):
    """Against splines solved piece by piece; the ratios are those of the reference's bisection."""
    side, wanted = 2 * source - 1, 2 * target - 1
    known = {(6, 7): 1.09128, (7, 6): 1.01, (6, 4): 1.01, (6, 16): 1.5}
    q = bias_tables.progression(side, wanted)
    assert abs(q - known.get((source, target), q)) < 2e-6 + 1e-5 * ((source, target) in known)
    steps = np.cumsum([q**i for i in range(side // 2)])
    if 1.02 < q < 1.49:
        assert abs(steps[-1] - wanted // 2) < 1e-4  # the ends meet
    at = np.concatenate([-steps[::-1], [0], steps])
    table = np.random.default_rng(0).standard_normal((side**2, 3)).astype(np.float32)
    to = np.arange(-(target - 1.0), target)
    rows = not_a_knot(at, table.astype(np.float64).reshape(side, -1), to).reshape(wanted, side, 3)
    both = not_a_knot(at, rows.transpose(1, 0, 2).reshape(side, -1), to).reshape(wanted, wanted, 3).transpose(1, 0, 2)
    np.testing.assert_allclose(bias_tables.resized(table, target), both.reshape(-1, 3), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="9 rows is too small"):
        bias_tables.resized(np.zeros((9, 1), np.float32), 3)


MOE = {"experts": [(1, 1), (1, 3)], "count": 4, "bias2": False}


def swin_moe(**changes):
    """A Swin-MoE file as one: experts, no second biases, a network in the place of tables."""
    return layouts.with_networks(layouts.swin(*SIZES, **{**MOE, **changes}))


def write_shards(folder, file, ranks, slices):
    torch = pytest.importorskip("torch", reason=NEEDS_TORCH)
    paths = {}
    for name, tensors in layouts.shards(file, ranks, slices).items():
        paths[name] = str(folder / f"moe.pth.{name}")
        torch.save({"model": {k: torch.from_numpy(np.array(v)) for k, v in tensors.items()}}, paths[name])
    return paths


@pytest.mark.parametrize("ranks, slices", [(4, 1), (2, 1), (8, 2), (16, 4)])
def test_the_shards_of_swin_moe_are_one_file(tmp_path, ranks, slices):
    file = swin_moe()
    opened = {path: tensor_files.open_tensors(path) for path in write_shards(tmp_path, file, ranks, slices).values()}
    whole = expert_shards.join(opened, 4, {0: 8, 1: 16})
    assert whole.shapes == {name: value.shape for name, value in file.items()}
    for name, value in file.items():
        np.testing.assert_array_equal(whole[name], value)


@pytest.mark.parametrize("ranks, slices", [(0, 1), (2, 1), (16, 4)])
def test_biases_as_tutel_had_them_when_swin_moe_was_released(ranks, slices):
    """[E,1,n], in one file (0 ranks) and in shards."""
    file = swin_moe()
    parts = layouts.shards(file, ranks, slices) if ranks else {"m": dict(file)}
    files = {f"m.{name}": part for name, part in parts.items()}
    for part in files.values():
        part |= {k: v[:, None] for k, v in part.items() if "experts" in k and k.endswith("_bias")}
    whole = expert_shards.join({k: tensor_files.in_memory(v) for k, v in files.items()}, 4, {0: 8, 1: 16})
    assert whole.shapes == {name: value.shape for name, value in file.items()}
    for name, value in file.items():
        np.testing.assert_array_equal(whole[name], value)


def test_swin_moe_computes_its_tables_and_has_no_second_biases():
    torch = pytest.importorskip("torch", reason=NEEDS_TORCH)
    file = swin_moe()
    got, found = imported(file, small())
    attn = "layers.1.blocks.1.attn."
    steps = torch.arange(-3.0, 4) / 3 * 8
    coords = torch.stack(torch.meshgrid(steps, steps, indexing="ij"), -1)
    coords = torch.sign(coords) * torch.log2(coords.abs() + 1) / 3
    keys = ("0.weight", "0.bias", "2.weight")
    first, second, third = (torch.from_numpy(file[f"{attn}cpb_mlp.{key}"]) for key in keys)
    table = (torch.relu(coords @ first.T + second) @ third.T).reshape(49, 2)
    moe = got.params["encoder"]["stage1"]["pairs0"]["shifted"]
    np.testing.assert_allclose(moe["attn"]["table"][0], table.numpy(), rtol=1e-4, atol=1e-4)
    layer = "layers.1.blocks.3.mlp._moe_layer."
    for name, value in {
        "experts.batched_fc1_w": moe["moe"]["fc1"][1].transpose(0, 2, 1),
        "experts.batched_fc2_w": moe["moe"]["fc2"][1],
        "gates.0.wg.weight": moe["moe"]["gate"][1].T,
        "experts.batched_fc2_bias": moe["moe"]["fc2_bias"][1],
    }.items():
        np.testing.assert_array_equal(file[layer + name], value)
    assert (got.params["encoder"]["stage1"]["pairs0"]["plain"]["fc2"]["bias"] == 0).all()
    assert "4 biases of second layers (mlp.fc2.bias) are zeros: no MLP of the file has one" in found.notes
    assert "6 bias tables computed by the file's cpb_mlp" in found.notes
    old = {name.replace("gates.0.", "gate."): value for name, value in file.items()}
    equal(imported(old, small())[0].params, got.params)
    with pytest.raises(ValueError, match=r"batched_fc1_w \(4, 16, 8\): the file has model.moe.experts = 4, .* 8"):
        imported(file, small(moe={**small().moe, "experts": 8}))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda p: p.pop("rank1"), r"up to rank 3, missing: \S+moe\.pth\.rank1$"),
        (lambda p: p.pop("rank3"), r"in each of 3 files .*model has 4 experts .*missing: \S+moe\.pth\.rank3$"),
        (lambda p: p.pop("master"), r"give \S+moe\.pth\.master too"),
        (lambda p: p.update(again=p["rank0"].replace("moe.pth", "other.pth")), "are both of rank 0"),
    ],
)
def test_shards_that_do_not_make_a_model(tmp_path, change, message):
    paths = write_shards(tmp_path, swin_moe(), 4, 1)
    change(paths)
    opened = {path: tensor_files.open_tensors(path.replace("other", "moe")) for path in paths.values()}
    with pytest.raises(ValueError, match=message):
        expert_shards.join(opened, 4, {0: 8, 1: 16})


def test_shards_that_contradict_each_other():
    files = {f"m.{name}": dict(tensors) for name, tensors in layouts.shards(swin_moe(), 4).items()}
    join = lambda: expert_shards.join({k: tensor_files.in_memory(v) for k, v in files.items()}, 4, {0: 8, 1: 16})
    name = "layers.1.blocks.3.mlp._moe_layer.experts.batched_fc2_bias"
    kept, files["m.rank2"][name] = files["m.rank2"][name], np.zeros((1, 9), np.float32)
    with pytest.raises(ValueError, match=r"batched_fc2_bias is \(1, 8\) in m.rank0 and \(1, 9\) in rank2"):
        join()
    first = name.replace("fc2_bias", "fc1_w")
    held = files["m.rank0"].pop(first)
    with pytest.raises(ValueError, match=r"m\.rank0 holds no layers\.1\.blocks\.3\.\S+\.batched_fc1_w, which other"):
        join()
    files["m.rank0"][first] = held
    del files["m.rank2"][name]
    with pytest.raises(ValueError, match=r"m\.rank2 holds no layers\.1\.blocks\.3\.\S+\.batched_fc2_bias"):
        join()
    files["m.rank2"] |= {name: kept, "norm.weight": np.zeros(8, np.float32)}
    with pytest.raises(ValueError, match="m.rank2 holds another norm.weight|m.master holds another norm.weight"):
        join()


def test_an_mlp_becomes_every_expert():
    """Each expert a copy, so that the layer is the MLP up to the gate's score."""
    cfg, file = small(), layouts.simmim(*SIZES)
    got, found = imported(file, cfg)
    moe = got.params["encoder"]["stage1"]["pairs0"]["shifted"]["moe"]
    mlp = "encoder.layers.1.blocks.1.mlp."
    for e in range(4):
        np.testing.assert_array_equal(moe["fc1"][0, e], file[f"{mlp}fc1.weight"].T)
        np.testing.assert_array_equal(moe["fc2"][0, e], file[f"{mlp}fc2.weight"].T)
        np.testing.assert_array_equal(moe["fc1_bias"][0, e], file[f"{mlp}fc1.bias"])
        np.testing.assert_array_equal(moe["fc2_bias"][0, e], file[f"{mlp}fc2.bias"])
    assert 0.01 < moe["gate"].std() < 0.03 and not np.array_equal(moe["gate"][0], moe["gate"][1])
    equal(imported(file, cfg)[0].params, got.params)
    assert (
        "2 blocks have an MLP in the file and experts in the model: every expert is a copy; new gates (truncated "
        f"normal, 0.02, seed 0): encoder.layers.1.blocks.1.{keymap.EXPERTS}gates.0.wg.weight, ..." in found.notes
    )


# --------------------------------------------------------------------------------------------------------- the command
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


def test_gfm_pth_becomes_a_folder_of_weights(tmp_path, monkeypatch, capsys):
    file, cfg = layouts.simmim(*SIZES), small()
    save_simmim(monkeypatch, tmp_path / "gfm.pth", file)
    command = ["import-torch", str(tmp_path / "gfm.pth"), "--config", config_file(tmp_path, cfg), "--out"]
    assert cli.main([*command, str(tmp_path / "in")]) == 0
    said = capsys.readouterr().out
    assert "recomputed from the sizes" in said and "every expert is a copy" in said
    new = [f"{part}_{sensor}" for part in ("embed", "decoder") for sensor in ("dsm", "s1", "s2")]
    assert f"new in a run that starts from here: {', '.join(new)}" in said
    params, meta = parts(tmp_path / "in")
    equal(params, imported(file, cfg)[0].params)
    assert meta["model_type"] == "msgfm" and list(meta["input_contract"]["sensors"]) == ["hr"]
    assert meta["architecture"]["modules"] == list(params) == list(meta["provenance"]["parts"])
    assert cli.main([*command, str(tmp_path / "in")]) == 78 and "already holds" in capsys.readouterr().err
    for option, message in {
        "--sensor=s1": "takes 3 bands, s1 has VV, VH",
        "--calendar=s2": "--calendar means nothing",
        "--leave-out=encoder.norm.*": "missing: encoder.norm.weight",
    }.items():
        assert cli.main([*command, str(tmp_path / "no"), option]) == 78
        assert message in capsys.readouterr().err


def test_other_code_in_a_pickle_is_still_refused(tmp_path, monkeypatch):
    save_simmim(monkeypatch, tmp_path / "bad.pth", {"a": np.zeros(2, np.float32)}, code=sys.exit)
    with pytest.raises(ValueError, match=r"would run code that its pickle asks for \(sys.exit\)"):
        tensor_files.open_tensors(tmp_path / "bad.pth")
    torch = pytest.importorskip("torch", reason=NEEDS_TORCH)
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "script.pt")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps({"a": sys.exit}))
    for name, why in {"script.pt": ".*TorchScript", "plain.pth": "Unsupported operand"}.items():
        with pytest.raises(ValueError, match=rf"{name}: not a sound PyTorch file of weights: {why}"):
            tensor_files.open_tensors(tmp_path / name)


def test_tensors_are_found_in_any_wrapping_trained_or_half(tmp_path):
    torch = pytest.importorskip("torch", reason=NEEDS_TORCH)
    ones = torch.ones(2)
    inside = {"a": torch.nn.Parameter(ones), "b": ones.bfloat16(), "c": ones.half()}
    for content in ({"model": {"state_dict": inside}}, {"state_dict": {"module": {"model": inside}}}, inside):
        torch.save(content, tmp_path / "x.pth")
        opened = tensor_files.open_tensors(tmp_path / "x.pth")
        assert {name: value.sum() for name, value in opened.items()} == {"a": 2, "b": 2, "c": 2}


def test_a_run_begins_with_imported_weights(tmp_path, monkeypatch, capsys):
    """`train --init_from`: what the file held is taken, other sensors stay new and are named."""
    cfg = small(moe=DENSE)
    save_simmim(monkeypatch, tmp_path / "gfm.pth", layouts.simmim(*SIZES))
    command = ["import-torch", str(tmp_path / "gfm.pth"), "--config", config_file(tmp_path, cfg), "--out"]
    assert cli.main([*command, str(tmp_path / "in")]) == 0
    fresh = {"encoder": jax.tree.map(jax.numpy.asarray, random_params(cfg, CONTRACT, seed=7))}
    begun, report = init_from.init_from(
        tmp_path / "in", state.TrainState(0, fresh, {}, {"encoder": {}}, {}, 0), json.loads(json.dumps(CONTRACT))
    )
    held = parts(tmp_path / "in")[0]
    equal({name: begun.params["encoder"][name] for name in held}, held)
    new = [name for name in report["new"] if name.startswith("params/")]
    others = {f"{part}_{sensor}" for part in ("embed", "decoder") for sensor in ("s2", "s1", "dsm")}
    assert {name.split("/")[2] for name in new} == others
    assert not report["left"]
    for name in new:
        leaf = name.removeprefix("params/")
        np.testing.assert_array_equal(trees.flatten(begun.params)[leaf], trees.flatten(fresh)[leaf])
    other = sensors.input_contract(BANDS | {"hr": ("B", "G", "R")}, 4)
    with pytest.raises(ValueError, match="input contract"):
        init_from.init_from(tmp_path / "in", state.TrainState(0, fresh, {}, {}, {}, 0), json.loads(json.dumps(other)))


# -------------------------------------------------------------------------------------------------------------- export
def modelling(folder):
    """The folder's own modelling file, imported."""
    spec = importlib.util.spec_from_file_location("modeling_msgfm", folder / "modeling_msgfm.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    cfg = small()
    params = random_params(cfg, CONTRACT)
    folder = torch_export.export(params, CONTRACT, cfg, tmp_path_factory.mktemp("export") / "out", {"licence": "none"})
    return cfg, params, folder


def test_an_export_is_read_back_bit_for_bit_and_comes_in_as_a_file(exported, tmp_path, capsys):
    cfg, params, folder = exported
    back, cfg_back, contract, meta = torch_import.load_folder(folder)
    equal(back, params)
    assert cfg_back.to_dict() == cfg.to_dict() and contract == json.loads(json.dumps(CONTRACT))
    assert meta["auto_map"]["AutoModel"] == "modeling_msgfm.MsGFMModel"
    assert "4 experts in the odd blocks of stages [1]" in (folder / "README.md").read_text()
    command = [
        "import-torch",
        str(folder / "model.safetensors"),
        "--config",
        config_file(tmp_path, cfg),
        "--out",
        str(tmp_path / "in"),
    ]
    assert cli.main(command) == 0
    assert "new in a run that starts from here: nothing" in capsys.readouterr().out
    again, described = parts(tmp_path / "in")
    equal(again, params)
    assert described["input_contract"] == json.loads(json.dumps(CONTRACT))
    assert cli.main([*command[:-1], str(tmp_path / "no"), "--sensor", "hr"]) == 78
    assert "its sensors are dsm, hr, s1, s2" in capsys.readouterr().err
    with pytest.raises(ValueError, match="--per-module is for skysense"):
        torch_export.export(params, CONTRACT, cfg, tmp_path / "parts", {}, per_module=True)


def test_exported_names_and_shapes_are_the_reference_s(exported):
    """Those of a SimMIM file with Swin-MoE's experts, but for the patch embeddings and decoders, which are several."""
    _, _, folder = exported
    stored = {k: v.shape for k, v in safetensors.numpy.load_file(folder / "model.safetensors").items()}
    file = layouts.simmim(*SIZES, experts=[(1, 1), (1, 3)], count=4)
    lone = re.compile(r"encoder\.patch_embed\.|decoder\.|.*(attn_mask|position_index|_num_global_experts)$")
    shared = {name: value.shape for name, value in file.items() if not lone.match(name)}
    own = {name: shape for name, shape in stored.items() if name not in shared}
    assert {name: stored.get(name) for name in shared} == shared
    assert own == {
        f"{part}.{sensor}.{name}": shape
        for sensor, bands in BANDS.items()
        for part, name, shape in (
            ("encoder.patch_embeds", "proj.weight", (4, len(bands), 2, 2)),
            ("encoder.patch_embeds", "proj.bias", (4,)),
            ("encoder.patch_embeds", "norm.weight", (4,)),
            ("encoder.patch_embeds", "norm.bias", (4,)),
            ("decoders", "0.weight", (16 * len(bands), 8, 1, 1)),
            ("decoders", "0.bias", (16 * len(bands),)),
        )
    }


def test_plain_torch_is_the_same_network(exported):
    pytest.importorskip("torch", reason=NEEDS_TORCH)
    _, _, folder = exported
    run = subprocess.run([sys.executable, "modeling_msgfm.py"], cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    lines = {line.split()[0]: float(line.split()[3]) for line in run.stdout.splitlines()}
    assert {"output.maps.s2", "output.stages.dsm.0", "output.pixels.s1.s2", "output.mask.hr"} <= lines.keys()
    assert len(lines) == 4 * (1 + 2 + 1 + 4) and max(lines.values()) <= 3e-5
    stored = safetensors.numpy.load_file(folder / "parity.safetensors")
    assert all(np.linalg.norm(value) > 0 for value in stored.values())
    assert stored["input.s2.image"].shape == (2, 1, 13, 24, 24)  # resized to 32 inside, and dsm's 32 stay


def copied(folder, tmp_path):
    """A copy of an exported folder; links would carry a change back."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in filter(pathlib.Path.is_file, folder.iterdir()):
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


def test_verify_sees_a_weight_that_changed(exported, tmp_path, capsys):
    _, _, folder = exported
    copy = copied(folder, tmp_path)
    assert cli.main(["verify", str(copy)]) == 0
    assert "DIFFERS" not in capsys.readouterr().out
    weights = safetensors.numpy.load_file(copy / "model.safetensors")
    weights["decoders.s1.0.bias"] += 0.1
    safetensors.numpy.save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert cli.main(["verify", str(copy)]) == 1
    table = capsys.readouterr().out.splitlines()
    pixels = [f"pixels.{s}.s1" for s in sorted(BANDS)]
    assert [line.split()[0] for line in table if "DIFFERS" in line] == ["model.safetensors:", *pixels]


@pytest.mark.parametrize("name", ["model.safetensors", "parity.safetensors", "config.json", "modeling_msgfm.py"])
def test_verify_sees_any_flipped_byte(exported, tmp_path, capsys, name):
    """The last bit of one weight too, which moves no output by the tolerance."""
    copy = copied(exported[2], tmp_path)
    content = bytearray((copy / name).read_bytes())
    content[-4] ^= 1  # of the last float32, its last bit
    (copy / name).write_bytes(content)
    assert cli.main(["verify", str(copy)]) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"{name}: DIFFERS from the file that was exported (SHA256SUMS)"
    assert [line for line in said if "DIFFERS" in line] == said[:1]
    (copy / "SHA256SUMS").unlink()
    assert cli.main(["verify", str(copy)]) == 78 and "has no SHA256SUMS" in capsys.readouterr().err


def test_a_weight_that_is_no_number_is_a_difference(exported, tmp_path):
    pytest.importorskip("torch", reason=NEEDS_TORCH)
    copy = copied(exported[2], tmp_path)
    with pytest.raises(ValueError, match="differs by nan"):
        torch_export.record_parity(copy, {"output.a": 1e-7, "output.b": float("nan"), "output.c": 0.0})
    weights = safetensors.numpy.load_file(copy / "model.safetensors")
    weights["decoders.s2.0.bias"][0] = np.nan
    safetensors.numpy.save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    run = subprocess.run([sys.executable, "modeling_msgfm.py"], cwd=copy, capture_output=True, text=True)
    assert run.returncode == 1 and run.stdout.count("DIFFERS") == len(BANDS), run.stdout


def test_plain_torch_refuses_masks_of_another_shape(exported):
    torch = pytest.importorskip("torch", reason=NEEDS_TORCH)
    model, image = modelling(exported[2]).load(exported[2]), torch.zeros(1, 2, 1, 32, 32)
    one = torch.ones(1, 2, 1, 1)
    for given, message in (
        ({"valid": one}, r"dsm: valid must be \(1, 2, 32, 32\), got \(1, 2, 1, 1\)"),
        ({"bands": one[..., 0, 0]}, r"dsm: bands must be \(1, 2, 1\), got \(1, 2\)"),
        ({"hidden": one}, r"dsm: hidden must be \(2, 16, 16\), .* got \(2, 1, 1\)"),
    ):
        with pytest.raises(ValueError, match=message):
            model({"dsm": {"image": image, **given}})


def test_plain_torch_routes_as_we_do_in_training_with_drops(exported):
    """In training mode an expert has few places: the same tokens are dropped, over groups of images."""
    torch = pytest.importorskip("torch", reason=NEEDS_TORCH)
    _, params, folder = exported
    moe = {**small().moe, "capacity": 0.5, "gate_noise": 0.0, "aux": "gshard"}
    cfg = small(moe=moe)
    tokens = np.random.default_rng(0).standard_normal((4, 16, 16, 4)).astype(np.float32)
    model = msgfm.make_model(cfg, CONTRACT)
    with jax.default_matmul_precision("highest"):
        ours = jax.jit(lambda p, x: model.encode(p, x, train=True, rng=jax.random.key(0)))(params, tokens)
    assert (np.asarray(ours.moe["stage1"]["dropped"]) > 0.2).all()
    code = modelling(folder)
    meta = json.loads((folder / "config.json").read_text())
    meta["architecture"]["moe"] = json.loads(json.dumps(moe, default=list))
    network = code.MsGFM(meta)
    network.load_state_dict(code.load_file(folder / "model.safetensors"))
    with torch.no_grad():
        stages, final = network.train().encode(torch.from_numpy(tokens))
        roomy = network.eval().encode(torch.from_numpy(tokens))[1]
    for theirs, mine in zip((*stages, final), (*ours.stages, ours.final)):
        assert torch_export.relative_l2(theirs.numpy(), mine) <= 3e-5
    assert torch_export.relative_l2(roomy.numpy(), ours.final) > 1e-3  # the drops were seen
    with pytest.raises(ValueError, match="multiple of moe.group = 2, got 3"):
        network.train().encode(torch.from_numpy(tokens[:3]))


def test_what_is_imported_goes_out_again_without_the_parts_it_lacks(tmp_path):
    """A supervised checkpoint has no decoder and no mask token; neither has its export."""
    cfg = small(moe=DENSE)
    got, found = imported(layouts.swin(*SIZES), cfg)
    with cfg.unlocked():
        cfg.modules = found.modules
    folder = torch_export.export(got.params, HR, cfg, tmp_path / "out", {})
    equal(torch_import.load_folder(folder)[0], got.params)
    stored = safetensors.numpy.load_file(folder / "parity.safetensors")
    assert not [name for name in stored if "pixels" in name or "hidden" in name]
    pytest.importorskip("torch", reason=NEEDS_TORCH)
    assert max(modelling(folder).check(folder).values()) <= 3e-5


def test_full_size_names_are_distinct_and_complete():
    """327 tensors of a dense encoder with RGB, as SimMIM has them; a mixture has one more than an MLP."""
    full = msgfm_base.get_config().model
    names = [e.torch for e in simmim_entries(full, "hr")]
    assert len(set(names)) == len(names) == 327 + 9 + 3
    entries = keymap.msgfm_entries(full, msgfm.module_names(full, CONTRACT))
    assert {e.name for e in entries} == set(trees.flatten(msgfm.param_shapes(full, CONTRACT)))


# -------------------------------------------------------------------------------------------------------- all commands
def test_the_commands_take_imported_weights_and_plain_torch_gives_load_s_features(tmp_path, monkeypatch, capsys):
    torch = pytest.importorskip("torch", reason=NEEDS_TORCH)
    save_simmim(monkeypatch, tmp_path / "gfm.pth", layouts.simmim(*SIZES))
    command = ["import-torch", str(tmp_path / "gfm.pth"), "--config", config_file(tmp_path, small()), "--out"]
    assert cli.main([*command, str(tmp_path / "in")]) == 0
    assert cli.main(["inspect", str(tmp_path / "in")]) == 0
    said = capsys.readouterr().out
    assert "imported weights" in said and "decoder_hr" in said and "embed_s2 " not in said
    image = np.random.default_rng(0).uniform(0, 255, (1, 24, 24, 3)).astype(np.float32)
    features = skysense_jax.load(tmp_path / "in").features({"hr": {"image": image}})
    assert cli.main(["export-torch", str(tmp_path / "in"), "--out", str(tmp_path / "out")]) == 0
    assert "plain torch reproduces the frozen batch" in capsys.readouterr().out
    assert cli.main(["verify", str(tmp_path / "out")]) == 0
    for name, value in skysense_jax.load(tmp_path / "out").features({"hr": {"image": image}}).items():
        np.testing.assert_array_equal(value, features[name])
    meta = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "do not state it" in meta["provenance"]["licence"]
    with torch.no_grad():
        given = {"hr": {"image": torch.from_numpy(image.transpose(0, 3, 1, 2)[None])}}
        maps = modelling(tmp_path / "out").load(tmp_path / "out")(given)["maps"]["hr"]
    assert torch_export.relative_l2(maps.mean((3, 4))[0, 0].numpy(), features["hr_image"]) <= 3e-5

"""msGFM from PyTorch: files in the layouts of SimMIM, GFM and Swin; random weights stand in for the real ones."""

import json
import pickle
import sys

import jax
import numpy as np
import pytest

from skysense_jax import cli, sensors
from skysense_jax.configs import msgfm_base
from skysense_jax.convert import keymap, tensor_files
from skysense_jax.convert.swin import bias_tables
from skysense_jax.convert.swin import files as swin_files
from skysense_jax.core import trees
from skysense_jax.models import msgfm
from skysense_jax.run import init_from, state
from tests.helpers import swin_layouts as layouts
from tests.helpers.msgfm_files import (
    BANDS,
    CONTRACT,
    NEEDS_TORCH,
    SIZES,
    config_file,
    equal,
    imported,
    parts,
    save_simmim,
    small,
)
from tests.helpers.msgfm_model import DENSE, random_params
from tests.parity.names import simmim_entries


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


def test_full_size_names_are_distinct_and_complete():
    """327 tensors of a dense encoder with RGB, as SimMIM has them; a mixture has one more than an MLP."""
    full = msgfm_base.get_config().model
    names = [e.torch for e in simmim_entries(full, "hr")]
    assert len(set(names)) == len(names) == 327 + 9 + 3
    entries = keymap.msgfm_entries(full, msgfm.module_names(full, CONTRACT))
    assert {e.name for e in entries} == set(trees.flatten(msgfm.param_shapes(full, CONTRACT)))

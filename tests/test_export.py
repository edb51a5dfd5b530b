"""Weights both ways: the folder PyTorch reads, the strict import, single-module files with the names real files
carry.
"""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy

from skysense_jax import sensors
from skysense_jax.configs import skysense_full
from skysense_jax.convert import keymap, layouts, tensor_files, torch_export, torch_import
from skysense_jax.core import trees
from skysense_jax.models.skysense import param_shapes
from tests.helpers import tiny_model as tiny

CONTRACT = tiny.contract()
NEEDS_TORCH = "needs torch (the extra `torch`): the exported folder is run by plain PyTorch"


def unusual():
    """Everything the released configuration does not use: odd depths, mixed windows, pretrained windows, padding,
    class token.
    """
    hr = tiny.config().hr.to_dict()
    hr.update(
        {
            "depths": (3, 3),
            "extra_norm_every": 3,
            "window": (3, 4),
            "pretrained_windows": (0, 6),
            "eps": 1e-3,
            "pad_small_map": True,
            "num_heads": 2,
        }
    )
    cfg = tiny.config(calendar="s2", hr=hr)
    cfg.s2.cls_token = True
    cfg.fusion.eps = 1e-3
    cfg.s1.update({"img_size": 12, "mlp_ratio": 3})
    return cfg, tiny.contract({"s1": ("VV", "VH"), "hr": ("R", "G", "B"), "s2": ("B02", "B08")})


def unchanged():
    return tiny.config(), CONTRACT


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("case", [unchanged, unusual])
def test_folder_round_trip_and_plain_torch(case, tmp_path):
    cfg, contract = case()
    params = tiny.params(cfg, contract)
    folder = torch_export.export(params, contract, cfg, tmp_path / "out", {"steps": 3, "licence": "none"})
    back, cfg_back, contract_back, meta = torch_import.load_folder(folder)
    equal(back, params)
    assert cfg_back.to_dict() == cfg.to_dict() and contract_back == contract and meta["provenance"]["steps"] == 3
    stored = safetensors.numpy.load_file(folder / "model.safetensors")
    assert sum(v.size for v in stored.values()) == meta["parameters"]["total"]
    with pytest.raises(ValueError, match="already holds"):
        torch_export.export(params, contract, cfg, folder, {})

    pytest.importorskip("torch", reason=NEEDS_TORCH)
    run = subprocess.run([sys.executable, "modeling_skysense.py"], cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    lines = dict(line.split("relative L2") for line in run.stdout.splitlines())
    assert {"output.fused", "output.maps.hr", "output.hr_stages.0"} <= {k.strip() for k in lines}
    assert max(float(v.split()[0]) for v in lines.values()) <= 3e-5

    stored = safetensors.numpy.load_file(folder / "parity.safetensors")
    stored["output.fused"] *= 1.001
    safetensors.numpy.save_file(stored, folder / "parity.safetensors")
    assert subprocess.run([sys.executable, "modeling_skysense.py"], cwd=folder, capture_output=True).returncode == 1


@pytest.mark.parametrize("per_module", [False, True])
def test_the_folder_is_a_hugging_face_model(tmp_path, per_module):
    reason = "needs transformers (not in our extras): the folder as a Hugging Face PreTrainedModel"
    transformers = pytest.importorskip("transformers", reason=reason)
    torch = pytest.importorskip("torch", reason=NEEDS_TORCH)
    cfg, contract = unusual()
    folder = torch_export.export(tiny.params(cfg, contract), contract, cfg, tmp_path / "out", {}, per_module)
    model = transformers.AutoModel.from_pretrained(str(folder), trust_remote_code=True).eval()
    model.save_pretrained(tmp_path / "again")
    inputs, stored = {}, safetensors.numpy.load_file(folder / "parity.safetensors")
    for key in (key.split(".") for key in stored if key.startswith("input.")):
        inputs.setdefault(key[1], {})[key[2]] = torch.from_numpy(stored[".".join(key)])
    for one in (model, transformers.AutoModel.from_pretrained(str(tmp_path / "again"), trust_remote_code=True).eval()):
        with torch.no_grad():
            fused = one(inputs)["fused"].numpy()
        assert torch_export.relative_l2(fused, stored["output.fused"]) <= 3e-5


def test_torch_state_to_ours_and_back_is_bitwise():
    cfg, contract = unusual()
    entries = layouts.model_entries(cfg, contract)
    state = torch_export.state_from_params(tiny.params(cfg, contract), entries)
    assert all(v.flags["C_CONTIGUOUS"] for v in state.values())
    again = torch_export.state_from_params(torch_import.params_from_torch(state, cfg, contract), entries)
    assert state.keys() == again.keys() and all(np.array_equal(state[k], again[k]) for k in state)


def test_official_names():
    """Names and shapes as the SkySense release has them (a few of each module)."""
    cfg, contract = tiny.config(), CONTRACT
    state = torch_export.state_from_params(tiny.params(cfg, contract), layouts.model_entries(cfg, contract))
    expected = {
        "backbone_hr.patch_embed.projection.weight": (8, 3, 2, 2),
        "backbone_hr.patch_embed.norm.bias": (8,),
        "backbone_hr.stages.1.downsample.reduction.weight": (16, 32),
        "backbone_hr.stages.0.blocks.1.attn.w_msa.logit_scale": (1, 1, 1),
        "backbone_hr.stages.0.blocks.1.attn.w_msa.cpb_mlp.2.weight": (1, 512),
        "backbone_hr.stages.0.blocks.1.attn.w_msa.qkv.weight": (24, 8),
        "backbone_hr.norm0.weight": (8,),
        "backbone_s2.pos_embed": (1, 17, 8),
        "backbone_s2.layers.1.attn.attn.in_proj_weight": (24, 8),
        "backbone_s1.layers.0.ffn.layers.0.0.weight": (16, 8),
        "head_s2.decoder.0.weight": (64, 8, 1, 1),
        "fusion.porj_linear.weight": (8, 16),
        "fusion.cls_token": (1, 1, 8),
        "ctpe": (1, 365, 16),
    }
    assert {k: state[k].shape for k in expected} == expected


def test_strict_import_names_everything_wrong_at_once():
    cfg, contract = tiny.config(), CONTRACT
    state = torch_export.state_from_params(tiny.params(cfg, contract), layouts.model_entries(cfg, contract))
    state["backbone_hr.stages.0.blocks.0.attn.w_msa.relative_coords_table"] = np.zeros((1, 7, 7, 2), np.float32)
    torch_import.params_from_torch(state, cfg, contract)
    del state["fusion.cls_token"]
    state["head_gep.weight"] = np.zeros(3, np.float32)
    state["ctpe"] = state["ctpe"][:, :364]
    state["backbone_s1.cls_token"] = state["backbone_s1.cls_token"].astype(np.int32)
    with pytest.raises(ValueError) as error:
        torch_import.params_from_torch(state, cfg, contract)
    text = str(error.value)
    assert "4 tensors" in text
    assert "missing: fusion.cls_token (1, 1, 8)" in text and "unexpected: head_gep.weight (3,)" in text
    assert "wrong shape: ctpe is (1, 364, 16), the model needs (1, 365, 16)" in text
    assert "wrong type: backbone_s1.cls_token" in text


def test_reading_pytorch_files(tmp_path):
    torch = pytest.importorskip("torch", reason="needs torch (the extra `torch`) to write and read .pth files")
    weights = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}
    wrapped = {"model": weights, "epoch": 3}
    for name, content, legacy in (("flat.pth", weights, False), ("old.pth", weights, True), ("w.ckpt", wrapped, False)):
        torch.save(content, tmp_path / name, _use_new_zipfile_serialization=not legacy)
        read = tensor_files.open_tensors(tmp_path / name)
        assert read["b"].dtype == np.float32
        np.testing.assert_array_equal(read["a"], weights["a"].numpy())
    torch.save({"x": sys.exit}, tmp_path / "code.pth")
    torch.save({"x": sys.exit}, tmp_path / "old_code.pth", _use_new_zipfile_serialization=False)
    for name in ("code.pth", "old_code.pth"):
        with pytest.raises(ValueError, match=r"would run code that its pickle asks for \(sys.exit\)"):
            tensor_files.open_tensors(tmp_path / name)
    (tmp_path / "torn.pth").write_bytes((tmp_path / "old.pth").read_bytes()[:40])
    with pytest.raises(ValueError, match="torn.pth: not a sound PyTorch file"):
        tensor_files.open_tensors(tmp_path / "torn.pth")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    with pytest.raises(ValueError, match="no tensors"):
        tensor_files.open_tensors(tmp_path / "empty.pth")
    (tmp_path / "weights.h5").write_bytes(b"")
    with pytest.raises(ValueError, match="are read from"):
        tensor_files.open_tensors(tmp_path / "weights.h5")


def test_plain_torch_refuses_masks_and_dates_of_another_shape(tmp_path):
    torch = pytest.importorskip("torch", reason=NEEDS_TORCH)
    from skysense_jax.convert import modeling_skysense

    cfg, contract = unchanged()
    folder = torch_export.export(tiny.params(cfg, contract), contract, cfg, tmp_path / "out", {})
    model, ones = modeling_skysense.load(folder), torch.ones(2, 3, 1, 1)
    for field, message in (
        ({"valid": ones}, r"s2: valid must be \(2, 3, 4, 4\), got \(2, 3, 1, 1\)"),
        ({"bands": ones[:, :, 0]}, r"s2: bands must be \(2, 3, 3\), got \(2, 3, 1\)"),
        ({"dates": ones[0, :, 0, 0]}, r"s2: dates must be \(2, 3\), got \(3,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            model({"s2": {"image": torch.zeros(2, 3, 3, 4, 4), **field}})


def test_a_folder_of_another_model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match="not one of 'skysense', 'msgfm'"):
        torch_import.load_folder(tmp_path)


def test_the_key_table_covers_the_full_size_model():
    """435 + 292 + 292 + 291 + 2 + 2 + 1 tensors of the release, with the parameter count of the whole."""
    cfg = skysense_full.get_config()
    contract = sensors.input_contract(cfg.data.bands, cfg.model.ratio)
    entries, shapes = layouts.model_entries(cfg.model, contract), trees.flatten(param_shapes(cfg.model, contract))
    counts = {p: sum(e.torch.startswith(p) for e in entries) for p in (*keymap.PREFIXES.values(), "ctpe")}
    assert list(counts.values()) == [435, 292, 292, 2, 2, 291, 8, 1] and len({e.torch for e in entries}) == len(entries)
    sizes = {e.torch: int(np.prod(keymap.torch_shape(e, shapes[e.name].shape))) for e in entries}
    assert sum(sizes.values()) == sum(int(np.prod(s.shape)) for s in shapes.values())
    assert sum(size for name, size in sizes.items() if not name.startswith("glbank.")) == 1_659_013_072
    assert sizes["glbank.prototypes"] == 4096 * 100 * 512


def test_names_and_shapes_are_the_release_s(shared):
    """Every tensor of the lists of the released files, name and shape; recomputed buffers aside."""
    cfg = skysense_full.get_config()
    contract = sensors.input_contract(cfg.data.bands, cfg.model.ratio)
    entries, shapes = layouts.model_entries(cfg.model, contract), trees.flatten(param_shapes(cfg.model, contract))
    ours = {e.torch: keymap.torch_shape(e, shapes[e.name].shape) for e in entries if not e.name.startswith("geo/")}
    released = {}
    for name in ("hr", "s2", "s1", "fusion"):
        path = shared / "spec" / f"skysense_keys_{name}.txt"
        if not path.is_file():
            pytest.skip(f"needs the list of released names {path}")
        for line in path.read_text().splitlines():
            if line and not line.startswith("#") and "buffer-recomputed" not in line:
                own = [] if name == "fusion" else [f"backbone_{name}"]
                module, key, shape = own + line.split("\t")[: 3 - len(own)]
                key = "ctpe" if key == "ctpe" else f"{module}.{key}"
                released[key] = tuple(json.loads(shape.replace("(", "[").replace(",)", "]").replace(")", "]")))
    assert ours == released

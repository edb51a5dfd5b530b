"""`import-torch`: files in the released layouts (random weights stand in for the real ones) to a folder that loads, and
back to PyTorch names."""

import json
import runpy
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy

import skysense_jax
from skysense_jax import cli, networks, sensors
from skysense_jax.convert import keymap, layouts, released, tensor_files, torch_export, torch_import
from skysense_jax.run import imported
from tests.helpers import tiny_model as tiny

NEEDS_TORCH = "needs torch (the extra `torch`) to write .pth files"
BANDS = sensors.SKYSENSE_BANDS
CONTRACT = sensors.input_contract(BANDS, tiny.contract()["ratio"])
FILES = {
    "hr": "skysense_model_backbone_hr",
    "s2": "skysense_model_backbone_s2",
    "s1": "skysense_model_backbone_s1",
    "fusion": "skysense_model_fusion",
    "head_s2": "skysense_model_head_s2",
    "head_s1": "skysense_model_head_s1",
}


@pytest.fixture(scope="module")
def model():
    cfg = tiny.config(calendar="s2")
    return cfg, tiny.params(cfg, CONTRACT)


@pytest.fixture()
def config(model, tmp_path):
    """A configuration file of the tiny model with the released bands."""
    path = tmp_path / "tiny_config.py"
    path.write_text(
        "from ml_collections import config_dict\n"
        f"def get_config():\n    return config_dict.ConfigDict({{'model': {model[0].to_dict()!r}, "
        f"'data': {{'bands': {dict(BANDS)!r}}}}})\n"
    )
    return path


def in_memory(arrays):
    return tensor_files.Tensors({name: x.shape for name, x in arrays.items()}, arrays.__getitem__)


def tensors_of(params, module, cfg, prefix=""):
    state = torch_export.state_from_params(params[module], keymap.module_entries(module, cfg))
    return {prefix + name: value for name, value in state.items()}


def write(folder, cfg, params, modules=tuple(FILES), save=safetensors.numpy.save_file, ending=".safetensors"):
    """The released layout: one file per module, HR with its prefix and its extras, the calendar in the S2 file."""
    paths = {}
    for module in modules:
        state = tensors_of(params, module, cfg, "backbone." if module == "hr" else "")
        if module == "hr":
            state["backbone.mask_token"] = np.zeros((1, 1, 8), np.float32)
            state["backbone.stages.0.blocks.0.attn.w_msa.relative_coords_table"] = np.zeros((1, 7, 7, 2), np.float32)
        if module == "s2":
            state["ctpe"] = np.asarray(params["ctpe"])
        paths[module] = str(folder / (FILES[module] + ending))
        save(state, paths[module])
    return paths


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def place(contract, side=8):
    rng = np.random.default_rng(0)
    out = {}
    for name, rule in contract["sensors"].items():
        pixels = side * sensors.pixels_per_base(rule, contract["ratio"])
        noise = rng.uniform(-1, 1, (1, pixels, pixels, len(rule["bands"])))
        out[name] = {"image": np.asarray(rule["mean"]) + np.asarray(rule["std"]) * 0.5 * noise, "dates": ["2021-06-01"]}
    return out


def test_released_files_come_in_bit_for_bit_and_go_out_again(model, config, tmp_path, capsys):
    cfg, params = model
    paths = write(tmp_path, cfg, params)
    command = ["import-torch", *paths.values(), "--out", str(tmp_path / "in"), "--config", str(config)]
    assert cli.main(command) == 0
    said = capsys.readouterr().out
    assert "GiB free" in said and "mask_token left out" in said and "1 buffers are recomputed" in said
    network = networks.open_network(tmp_path / "in")
    equal(network.encoder, params)
    assert cli.main(command) == 78 and "already holds" in capsys.readouterr().err
    assert cli.main(["inspect", str(tmp_path / "in")]) == 0 and "imported weights" in capsys.readouterr().out
    assert cli.main(["export-torch", str(tmp_path / "in"), "--out", str(tmp_path / "out")]) == 0
    stored = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    assert stored.keys() == {e.torch for e in layouts.model_entries(cfg, CONTRACT)}
    for module, path in paths.items():
        for name, value in tensor_files.open_tensors(path).items():
            short = name.removeprefix("backbone.")
            if short not in ("mask_token", "ctpe") and "relative" not in short:
                np.testing.assert_array_equal(stored[keymap.PREFIXES[module] + short], value)
    equal(networks.open_network(tmp_path / "out").encoder, params)
    capsys.readouterr()
    assert cli.main(["verify", str(tmp_path / "out")]) == 0
    table = capsys.readouterr().out
    assert "fused" in table and "DIFFERS" not in table
    meta = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "non-commercial" in meta["provenance"]["licence"]
    card = (tmp_path / "out" / "README.md").read_text()
    if tensor_files.torch_is_there():
        assert 0 < max(meta["parity"]["torch_rel_l2"].values()) <= 3e-5 and "plain torch within" in card
        with pytest.raises(ValueError, match="plain torch differs by 1.0e-03"):
            torch_export.record_parity(tmp_path / "out", {"output.fused": 1e-3})
    else:
        assert "nothing, without torch" in card


def test_a_whole_checkpoint_in_a_pytorch_file(model, config, tmp_path, capsys):
    torch = pytest.importorskip("torch", reason=NEEDS_TORCH)
    cfg, params = model
    state = {
        "ctpe": params["ctpe"],
        "backbone_gep.mask_token": np.zeros((1, 1, 8), np.float32),
        "head_gep.weight": np.zeros(3, np.float32),
    }
    for module in FILES:
        state |= tensors_of(params, module, cfg, "backbone_gep." if module == "hr" else keymap.PREFIXES[module])
    file = str(tmp_path / "skysense.pth")
    whole = {"state_dict": {f"module.{k}": torch.from_numpy(np.array(v)) for k, v in state.items()}, "epoch": 3}
    torch.save(whole, file)
    assert cli.main(["import-torch", file, "--out", str(tmp_path / "in"), "--config", str(config)]) == 0
    assert "1 tensors of the file that fit head_gep* left out" in capsys.readouterr().out
    equal(networks.open_network(tmp_path / "in").encoder, params)
    whole["state_dict"]["decoder.weight"] = torch.zeros(2)
    torch.save(whole, file)
    command = ["import-torch", file, "--out", str(tmp_path / "in2"), "--config", str(config)]
    assert cli.main(command) == 78 and "decoder.weight" in capsys.readouterr().err
    assert cli.main([*command, "--leave-out", "decoder.weight", "--licence", "CC-BY-4.0"]) == 0
    assert json.loads((tmp_path / "in2" / imported.DESCRIPTION).read_text())["provenance"]["licence"] == "CC-BY-4.0"


@pytest.mark.parametrize("modules", [("hr",), ("s2",), ("s1", "head_s1"), ("s2", "head_s2", "fusion")])
def test_any_part_loads_alone_in_both_directions(model, config, tmp_path, modules):
    cfg, params = model
    paths = write(tmp_path, cfg, params, modules)
    assert cli.main(["import-torch", *paths.values(), "--out", str(tmp_path / "in"), "--config", str(config)]) == 0
    equal(
        networks.open_network(tmp_path / "in").encoder,
        {name: params[name] for name in (*modules, "ctpe") if name != "ctpe" or "fusion" in modules},
    )
    part = skysense_jax.load(tmp_path / "in")
    given = {name: x for name, x in place(CONTRACT).items() if name in modules}
    features = part.features(given)
    assert ("image" in features) == ("fusion" in modules)
    write(tmp_path, cfg, params)
    everything = [str(tmp_path / f"{name}.safetensors") for name in FILES.values()]
    assert cli.main(["import-torch", *everything, "--out", str(tmp_path / "all"), "--config", str(config)]) == 0
    whole = skysense_jax.load(tmp_path / "all").features(given)
    for name, value in features.items():
        if name in whole and value.shape == whole[name].shape:
            np.testing.assert_allclose(value, whole[name], rtol=1e-5, atol=1e-6)
        else:
            assert modules == ("s2",)  # without its head: the ViT's own map
    assert cli.main(["export-torch", str(tmp_path / "in"), "--out", str(tmp_path / "out")]) == 0
    for name, value in skysense_jax.load(tmp_path / "out").features(given).items():
        np.testing.assert_array_equal(value, features[name])
    pytest.importorskip("torch", reason=NEEDS_TORCH)
    code = runpy.run_path(str(tmp_path / "out" / "modeling_skysense.py"))
    assert max(code["check"](tmp_path / "out").values()) <= 3e-5


@pytest.mark.parametrize("prefix", ["", "backbone.", "module.backbone_gep.", "model.backbone_hr.", "visual."])
def test_every_prefix_of_an_hr_file(model, prefix, tmp_path):
    cfg, params = model
    state = tensors_of(params, "hr", cfg, prefix)
    for key in ("norm0.weight", "norm0.bias"):  # a file that holds the last norm only
        del state[prefix + key]
    (found,) = released.gather({"file.pth": (None, in_memory(state))}).items()
    assert found[0] == "hr"
    imported = torch_import.import_module(found[1].tensors, "hr", cfg, CONTRACT)
    assert imported.filled == ["norm0.weight", "norm0.bias"] and (imported.params["norm0"]["scale"] == 1).all()
    del state[prefix + "norm1.weight"]
    part = released.gather({"file.pth": (None, in_memory(state))})["hr"]
    with pytest.raises(ValueError, match="missing: norm1.weight"):
        torch_import.import_module(part.tensors, "hr", cfg, CONTRACT)


def test_fused_attention_names(model):
    cfg, params = model
    state = tensors_of(params, "s1", cfg)

    def rename(k):
        return k.replace("in_proj_weight", "Wqkv.weight").replace("in_proj_bias", "Wqkv.bias")

    legacy = {rename(k): v for k, v in state.items()}
    assert legacy.keys() != state.keys()
    part = released.gather({"s1.pth": (None, in_memory(legacy))})["s1"]
    equal(torch_import.import_module(part.tensors, "s1", cfg, CONTRACT).params, params["s1"])
    with pytest.raises(ValueError, match="both"):
        released.gather({"s1.pth": (None, in_memory(legacy | state))})


def test_skysense_pp_files(model, config, tmp_path, capsys):
    """Position table without a class row, vocabulary tokens, the HR encoder's in-context attention."""
    cfg, params = model
    s2 = tensors_of(params, "s2", cfg)
    s2["pos_embed"] = np.ascontiguousarray(s2["pos_embed"][:, 1:])
    s2 |= {
        "mask_token": np.zeros((1, 1, 8), np.float32),
        "vocabulary_token": np.zeros((65, 8), np.float32),
        "vocabulary_weight": np.zeros((1, 16), np.float32),
    }
    hr = tensors_of(params, "hr", cfg) | {
        "attn1.proj_in.weight": np.zeros((4, 8), np.float32),
        "norm_attn.weight": np.zeros(8, np.float32),
    }
    safetensors.numpy.save_file(s2, tmp_path / "s2.safetensors")
    safetensors.numpy.save_file(hr, tmp_path / "hr.safetensors")
    command = [
        "import-torch",
        str(tmp_path / "hr.safetensors"),
        str(tmp_path / "s2.safetensors"),
        "--config",
        str(config),
        "--out",
        str(tmp_path / "in"),
    ]
    assert cli.main(command) == 78
    assert "--leave-out 'attn1*' --leave-out 'norm_attn*'" in capsys.readouterr().err
    command += ["--leave-out", "attn1*", "--leave-out", "norm_attn*", "--leave-out", "vocabulary_*"]
    assert cli.main(command) == 0
    assert "no row for the class token" in capsys.readouterr().out
    encoder = networks.open_network(tmp_path / "in").encoder
    equal(encoder["hr"], params["hr"])
    assert (encoder["s2"]["pos_embed"][:, 0] == 0).all()
    np.testing.assert_array_equal(encoder["s2"]["pos_embed"][:, 1:], params["s2"]["pos_embed"][:, 1:])


def test_kernels_for_other_bands(model, config, tmp_path):
    cfg, params = model
    paths = write(tmp_path, cfg, params, ("hr", "s2"))
    assert (
        cli.main(
            [
                "import-torch",
                *paths.values(),
                "--config",
                str(config),
                "--out",
                str(tmp_path / "in"),
                "--bands",
                "hr=R,G,B,NIR",
                "--bands",
                "s2=B02,B03,B04,B08",
            ]
        )
        == 0
    )
    loaded = skysense_jax.load(tmp_path / "in")
    assert loaded.contract["sensors"]["hr"]["bands"] == ["R", "G", "B", "NIR"]
    encoder = networks.open_network(tmp_path / "in").encoder
    red_again = params["hr"]["patch_embed"]["kernel"][:, :, [0, 1, 2, 0]]
    np.testing.assert_array_equal(encoder["hr"]["patch_embed"]["kernel"], red_again)
    scaled = params["s2"]["patch_embed"]["kernel"][:, :, [0, 1, 2, 6]] * np.float32(2.5)
    np.testing.assert_array_equal(encoder["s2"]["patch_embed"]["kernel"], scaled)
    assert np.isfinite(loaded.features(place(loaded.contract))["hr_image"]).all()
    assert (
        cli.main(
            ["import-torch", paths["hr"], "--config", str(config), "--out", str(tmp_path / "no"), "--bands", "hr=B,R"]
        )
        == 78
    )


def test_one_file_per_module_and_a_folder_that_changed(model, config, tmp_path, capsys):
    cfg, params = model
    folder = torch_export.export(params, CONTRACT, cfg, tmp_path / "out", {}, per_module=True)
    names = {path.name for path in torch_export.weight_files(folder)}
    assert names == {f"{name}.safetensors" for name in FILES.values()}
    equal(networks.open_network(folder).encoder, params)
    assert cli.main(["verify", str(folder)]) == 0
    files = [str(folder / name) for name in sorted(names)]
    assert cli.main(["import-torch", *files, "--out", str(tmp_path / "in"), "--config", str(config)]) == 0
    equal(networks.open_network(tmp_path / "in").encoder, params)
    state = safetensors.numpy.load_file(folder / "skysense_model_fusion.safetensors")
    state["fusion.cls_token"] += 0.01
    safetensors.numpy.save_file(state, folder / "skysense_model_fusion.safetensors")
    capsys.readouterr()
    assert cli.main(["verify", str(folder)]) == 1
    table = capsys.readouterr().out.splitlines()
    changed = [line.split()[0] for line in table if "DIFFERS" in line]
    assert changed == ["skysense_model_fusion.safetensors:", "fused"]
    assert cli.main(["verify", str(tmp_path / "in")]) == 78


def test_what_is_refused_says_why(model, config, tmp_path, capsys):
    cfg, params = model
    paths = write(tmp_path, cfg, params)
    other = tmp_path / "up.safetensors"
    safetensors.numpy.save_file(tensors_of(params, "head_s2", cfg), other)
    strange = tmp_path / "strange.safetensors"
    safetensors.numpy.save_file({"a": np.zeros(2, np.float32)}, strange)
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes((tmp_path / "up.safetensors").read_bytes()[:-20])
    no_calendar = tmp_path / "s2_alone.safetensors"
    safetensors.numpy.save_file(tensors_of(params, "s2", cfg), no_calendar)
    cases = {
        "up.safetensors is an UP head": [paths["s2"], str(other)],
        "can be recognised": [str(strange)],
        "not a sound safetensors": [str(torn)],
        "no such file": [str(tmp_path / "absent.pth")],
        "both hold hr": [paths["hr"], shutil.copy(paths["hr"], tmp_path / "again.safetensors")],
        "no encoder among": [paths["fusion"]],
        "lacks": [paths["s2"], paths["fusion"]],
        "no file holds ctpe": [str(no_calendar), paths["head_s2"], paths["fusion"]],
        "unexpected: ": [f"s1={paths['fusion']}"],
    }
    for message, files in cases.items():
        words = ["import-torch", *map(str, files), "--out", str(tmp_path / "in"), "--config", str(config)]
        assert cli.main(words) == 78
        error = capsys.readouterr().err
        assert message in error, (message, error)
    assert not (tmp_path / "in" / "model.json").exists()
    assert (
        cli.main(
            ["import-torch", paths["s2"], f"head_s2={other}", "--out", str(tmp_path / "in"), "--config", str(config)]
        )
        == 0
    )

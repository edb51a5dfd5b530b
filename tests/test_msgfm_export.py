"""msGFM as a folder that plain torch runs: exported, read back bit for bit, verified, and taken by every command."""

import importlib.util
import json
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy

import skysense_jax
from skysense_jax import cli
from skysense_jax.convert import torch_export, torch_import
from skysense_jax.models import msgfm
from tests.helpers import swin_layouts as layouts
from tests.helpers.msgfm_files import (
    BANDS,
    CONTRACT,
    HR,
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
    for theirs, mine in zip((*stages, final), (*ours.stages, ours.final), strict=True):
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

"""Swin-MoE's files: shards joined to one file, computed bias tables, biases left out; what does not make a model."""

import numpy as np
import pytest

from skysense_jax.convert import tensor_files
from skysense_jax.convert.swin import expert_shards
from tests.helpers import swin_layouts as layouts
from tests.helpers.msgfm_files import NEEDS_TORCH, SIZES, equal, imported, small

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

    def join():
        return expert_shards.join({k: tensor_files.in_memory(v) for k, v in files.items()}, 4, {0: 8, 1: 16})

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

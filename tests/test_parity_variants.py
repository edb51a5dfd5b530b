"""The parity command on cases with several inputs, with position tables of both kinds, and of references with settings
of their own: made here, with the plain torch modules or numpy, and judged by the stored cases' tolerances.
"""

import json
import pathlib
import re

import numpy as np
import pytest

from tests.parity import command

GOLDEN = pathlib.Path(__file__).parent / "golden"
STANDARD = {"out_rel_l2": 3e-5, "out_max_over_scale": 1e-4, "grad_rel_l2": 1e-4}
DINO = {"loss_rel": 1e-5, "sinkhorn_max_abs": 1e-5, "grad_rel_l2": 1e-4}


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def write(path, meta, arrays):
    """A case file; float64 arrays are stored as the reference's are, rounded to float32, but for `y64_`."""
    stored = {k: np.asarray(v) if k.startswith("y64_") else np.asarray(v, np.float32) for k, v in arrays.items()}
    np.savez(path, meta_json=np.array(json.dumps(meta)), **stored)
    return path


def verdicts(path):
    return {row.name: row.passed for row in command.run_case(path)}


def failed(path):
    return {name for name, passed in verdicts(path).items() if not passed}


# ------------------------------------------------------------------------------------------------------ several inputs
class Networks:
    """The plain torch Swin-V2 in float64 with one set of random weights, with pad_small_map on or off."""

    ARCHITECTURE = {
        "patch": 4,
        "embed_dims": 8,
        "depths": [2, 2],
        "num_heads": [1, 2],
        "window": 4,
        "pretrained_windows": 0,
        "extra_norm_every": 0,
        "mlp_ratio": 4,
        "eps": 1e-5,
    }

    def __init__(self, torch):
        from skysense_jax.convert.modeling_skysense import SwinTransformerV2

        torch.manual_seed(0)
        self.torch = torch
        self.modules = {
            pad: SwinTransformerV2(3, self.ARCHITECTURE | {"pad_small_map": pad}).double() for pad in (True, False)
        }
        with torch.no_grad():
            for value in self.modules[True].parameters():
                value.copy_((value + 0.2 * torch.randn_like(value)).float())
        self.modules[False].load_state_dict(self.modules[True].state_dict())

    def weights(self, *left_out):
        state = self.modules[True].state_dict()
        return {f"w:{k}": v.numpy() for k, v in state.items() if not k.startswith(left_out)}

    def maps(self, pad, x):
        return [m.detach().numpy() for m in self.modules[pad](self.torch.tensor(x, dtype=self.torch.float64))]

    def gradients(self, pad, x, cotangents):
        """(loss, dx, {"d:<key>": gradient}) of sum(maps * cotangents)."""
        module, image = self.modules[pad], self.torch.tensor(x, dtype=self.torch.float64, requires_grad=True)
        loss = sum((m * self.torch.tensor(g)).sum() for m, g in zip(module(image), cotangents, strict=True))
        loss.backward()
        gradients = {f"d:{k}": v.grad.numpy() for k, v in module.named_parameters()}
        return loss.item(), image.grad.numpy(), gradients


def swin_meta(outputs, inputs):
    arch = {"embed_dims": 8, "depths": [2, 2], "num_heads": [1, 2]}
    args = {"arch": arch, "window_size": 4, "out_indices": outputs}
    return {"kind": "swinv2", "args": args, "inputs": inputs, "tol": STANDARD}


@pytest.fixture(scope="module")
def networks():
    return Networks(pytest.importorskip("torch", reason="needs torch (the extra `torch`), whose modules make the case"))


@pytest.fixture(scope="module")
def two_inputs(networks):
    """(meta, arrays): an input that needs padding in every stage, with gradients, and one of stage 1 = the window."""
    x = {"small": normal(1, 3, 22, 13), "large": normal(2, 3, 32, 32, seed=1)}
    inputs = {
        "small": {"pad_small_map": True, "shape": [1, 3, 22, 13]},
        "large": {"pad_small_map": False, "shape": [2, 3, 32, 32]},
    }
    arrays = networks.weights() | {f"x_{name}": image for name, image in x.items()}
    for name, image in x.items():
        maps = networks.maps(inputs[name]["pad_small_map"], image)
        arrays |= {f"y_{name}_{stage}": m for stage, m in enumerate(maps)}
    cotangents = [normal(*arrays[f"y_small_{stage}"].shape, seed=2 + stage) for stage in range(2)]
    arrays |= {f"g_small_{stage}": g for stage, g in enumerate(cotangents)}
    loss, arrays["dx_small"], gradients = networks.gradients(True, x["small"], cotangents)
    return swin_meta([0, 1], inputs), arrays | gradients | {"y64_loss_small": np.float64(loss)}


def test_several_inputs_with_settings_of_their_own(tmp_path, two_inputs):
    meta, arrays = two_inputs
    rows = verdicts(write(tmp_path / "case.npz", meta, arrays))
    assert all(rows.values()) and {"y_small_0", "y_large_1", "dx_small", "d:norm0.weight", "y64_loss_small"} <= set(
        rows
    )


def test_a_wrong_value_of_one_input_fails(tmp_path, two_inputs, capsys):
    meta, arrays = two_inputs
    large = {k: v for k, v in arrays.items() if k.startswith(("w:", "x_large", "y_large"))}
    meta = meta | {"inputs": {"large": meta["inputs"]["large"]}}
    wrong = write(tmp_path / "case.npz", meta, large | {"y_large_1": large["y_large_1"] * 1.001})
    assert command.main([str(wrong)]) == 1
    assert "FAIL y_large_1" in capsys.readouterr().out


def test_one_array_under_two_settings(tmp_path, networks):
    """Stage 1 is as large as the window: pad_small_map alone decides whether it shifts. Outputs are named by stage."""
    x, inputs = normal(1, 3, 32, 32), {"shifts": {"pad_small_map": True}, "stays": {"pad_small_map": False}}
    arrays = networks.weights("norm0") | {"x": x}
    arrays |= {f"y_{name}_1": networks.maps(settings["pad_small_map"], x)[1] for name, settings in inputs.items()}
    assert not failed(write(tmp_path / "case.npz", swin_meta([1], inputs), arrays))
    exchanged = {"shifts": inputs["stays"], "stays": inputs["shifts"]}
    assert failed(write(tmp_path / "case.npz", swin_meta([1], exchanged), arrays)) == {"y_shifts_1", "y_stays_1"}
    # Where meta_json states no inputs, the words pad and nopad in the names say the same.
    words = {"y_pad_1": arrays.pop("y_shifts_1"), "y_nopad_1": arrays.pop("y_stays_1")}
    assert not failed(write(tmp_path / "case.npz", swin_meta([1], {}), arrays | words))
    named = {"x_pad": x, "x_nopad": arrays.pop("x")}
    assert not failed(write(tmp_path / "case.npz", swin_meta([1], {}), arrays | words | named))


@pytest.mark.parametrize(
    "inputs, message",
    [
        ({"small": {"padding": 1}}, "case.npz: unknown constructor argument padding=1 .*known are .*pad_small_map"),
        ({"small": {"shape": [1, 3, 22, 14]}}, r"case.npz: meta_json.inputs.small.shape is \(1, 3, 22, 14\)"),
        ({"middle": {}}, "case.npz: meta_json.inputs names 'middle', but the file holds neither x_middle nor x"),
        (["small"], "case.npz: meta_json.inputs is .*write"),
    ],
)
def test_what_an_input_may_not_state(tmp_path, two_inputs, inputs, message):
    meta, arrays = two_inputs
    with pytest.raises(ValueError, match=message):
        command.run_case(write(tmp_path / "case.npz", meta | {"inputs": inputs}, arrays))


@pytest.mark.parametrize("name", ["uphead_grad", "fusion_grad", "dino_head", "swin_block_mask_is_minus100"])
def test_every_module_takes_several_inputs(tmp_path, name):
    """A stored case cut into two inputs along its batch: the gradients of its weights are the sum of theirs."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        arrays = {k: file[k] for k in file.files}
    meta, halves = json.loads(str(arrays.pop("meta_json"))), {}
    for key in [k for k in arrays if re.match(r"(x|y|g_y|dx)(_|$)", k)]:
        whole, (start, words) = arrays.pop(key), re.fullmatch(r"(x|y|g_y|dx)(_.*)?", key).groups()
        half = len(whole) // 2
        halves |= {f"{start}_a{words or ''}": whole[:half], f"{start}_b{words or ''}": whole[half:]}
    assert not failed(write(tmp_path / "case.npz", meta, arrays | halves))


def test_entries_that_are_not_read_are_listed(tmp_path, capsys):
    """They may be notes; where something was not computed, they may say why."""
    with np.load(GOLDEN / "uphead_grad.npz") as file:
        arrays = {k: file[k] for k in file.files}
    meta = json.loads(str(arrays.pop("meta_json"))) | {"seed": 3}
    assert command.main([str(write(tmp_path / "case.npz", meta, arrays))]) == 0
    assert "not read in meta_json: seed" in capsys.readouterr().out
    with pytest.raises(ValueError, match="case.npz: nothing computed for .*y_more.*meta_json holds seed, not read"):
        command.run_case(write(tmp_path / "case.npz", meta, arrays | {"y_more": arrays["y"]}))


# ----------------------------------------------------------------------------------------------------- position tables
def resized(torch, table, grid, size):
    """Rows of the grid alone, by torch's bicubic interpolation in float64."""
    rows = torch.tensor(table, dtype=torch.float64).reshape(1, *grid, -1).permute(0, 3, 1, 2)
    rows = torch.nn.functional.interpolate(rows, size=size, mode="bicubic", align_corners=False)
    return rows.flatten(2).transpose(1, 2).numpy()


@pytest.mark.parametrize("inputs", [{"nocls": {"grid": [3, 4]}}, {}])
def test_position_tables_with_and_without_a_class_row(tmp_path, inputs):
    torch = pytest.importorskip("torch", reason="needs torch (the extra `torch`), whose resize makes the case")
    shape = (3, 4) if inputs else (4, 4)  # the other table's grid, unless the file states one
    table, grid_alone = normal(1, 17, 6), normal(1, shape[0] * shape[1], 6, seed=1)
    rows = resized(torch, table[:, 1:], (4, 4), (6, 5))
    arrays = {
        "x_pos_embed": table,
        "x_pos_embed_nocls": grid_alone,
        "y_6x5": np.concatenate([table[:, :1], rows], axis=1),
        "y_nocls_6x5": resized(torch, grid_alone, shape, (6, 5)),
        "y_nocls_2x7": resized(torch, grid_alone, shape, (2, 7)),
    }
    meta = {"kind": "pos_resize", "grid": [4, 4], "mode": "bicubic", "inputs": inputs, "tol": STANDARD}
    assert verdicts(write(tmp_path / "case.npz", meta, arrays)) == dict.fromkeys(
        ("y_6x5", "y_nocls_6x5", "y_nocls_2x7"), True
    )
    one_table = {k: arrays[k] for k in ("x_pos_embed", "y_6x5")} | {"y_nocls_6x5": rows}
    assert not failed(write(tmp_path / "case.npz", meta | {"inputs": {}}, one_table))
    wrong = arrays | {"y_nocls_2x7": arrays["y_nocls_2x7"] * 1.001}
    assert failed(write(tmp_path / "case.npz", meta, wrong)) == {"y_nocls_2x7"}
    with pytest.raises(ValueError, match="case.npz: an output of 15 rows is no resize to 2x7 of a table of"):
        command.run_case(write(tmp_path / "case.npz", meta, arrays | {"y_nocls_2x7": normal(1, 15, 6)}))


def vit_case(torch, class_row):
    """(meta, arrays) of a two-layer ViT on two inputs: with its class token and without where its table has a row for
    it, without on both where the table is the grid alone; gradients of the second input.
    """
    from skysense_jax.convert.modeling_skysense import VisionTransformer

    torch.manual_seed(0)
    settings = {"img_size": 16, "patch": 4, "embed_dims": 12, "depth": 2, "num_heads": 3, "mlp_ratio": 4, "eps": 1e-6}
    flags = {"first": class_row, "second": False}
    modules = {flag: VisionTransformer(2, settings | {"cls_token": flag}).double() for flag in {True, False}}
    with torch.no_grad():
        for value in modules[False].parameters():
            value.copy_((value + 0.3 * torch.randn_like(value)).float())
    modules[True].load_state_dict(modules[False].state_dict())
    x = {"first": normal(2, 2, 16, 16), "second": normal(1, 2, 24, 20, seed=1)}
    arrays = {f"w:{k}": v.numpy() for k, v in modules[False].state_dict().items()} | {f"x_{k}": v for k, v in x.items()}
    images = {k: torch.tensor(v, dtype=torch.float64, requires_grad=True) for k, v in x.items()}
    outputs = {k: modules[flags[k]](images[k]) for k in x}
    arrays["g_second"] = normal(*outputs["second"].shape, seed=2)
    (outputs["second"] * torch.tensor(arrays["g_second"])).sum().backward()
    arrays |= {f"y_{k}": y.detach().numpy() for k, y in outputs.items()} | {"dx_second": images["second"].grad.numpy()}
    gradients = {k: p.grad for k, p in modules[False].named_parameters()}
    arrays |= {f"d:{k}": v.numpy() for k, v in gradients.items() if v is not None}
    if not class_row:
        arrays |= {k: arrays[k][:, 1:] for k in ("w:pos_embed", "d:pos_embed")}
    args = {"img_size": 16, "patch_size": 4, "in_channels": 2, "embed_dims": 12, "num_layers": 2, "num_heads": 3}
    args |= {"out_indices": -1, "norm_cfg": {"type": "LN", "eps": 1e-6}}
    inputs = {k: {"with_cls_token": flag, "shape": list(x[k].shape)} for k, flag in flags.items()}
    return {"kind": "vit", "args": args, "inputs": inputs, "tol": STANDARD}, arrays


@pytest.mark.parametrize("class_row", [True, False])
def test_a_vit_whose_table_has_a_class_row_or_not(tmp_path, class_row):
    torch = pytest.importorskip("torch", reason="needs torch (the extra `torch`), whose modules make the case")
    meta, arrays = vit_case(torch, class_row)
    rows = verdicts(write(tmp_path / "case.npz", meta, arrays))
    assert all(rows.values()) and {"y_first", "y_second", "dx_second", "d:pos_embed"} <= set(rows)
    other = {k: v | {"with_cls_token": not class_row} for k, v in meta["inputs"].items() if k == "first"}
    wrong = write(tmp_path / "case.npz", meta | {"inputs": meta["inputs"] | other}, arrays)
    if class_row:
        assert failed(wrong) == {"y_first"}
    else:
        with pytest.raises(ValueError, match="case.npz: pos_embed has no row for the class token"):
            command.run_case(wrong)


# -------------------------------------------------------------------------------------------------------- DINO momentum
def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def dino_case(momentum, lazy_momentum):
    """(meta, arrays) in numpy's loops: two calls of DINO's loss with `momentum`, dinov2's centre with another."""
    crops, teachers, batch, width, temperature = 5, 2, 3, 8, 0.05
    start = normal(1, width, seed=9) * np.float32(0.1)
    centre = start.astype(np.float64)
    arrays = {"x_center0": start}
    for call in range(2):
        student, teacher = normal(crops * batch, width, seed=call), normal(teachers * batch, width, seed=5 + call)
        probs = softmax((teacher - centre) / temperature).reshape(teachers, batch, width)
        log_q = np.log(softmax(student.astype(np.float64) / 0.1)).reshape(crops, batch, width)
        pairs = [(t, s) for t in range(teachers) for s in range(crops) if t != s]
        loss = np.mean([-(probs[t] * log_q[s]).sum(-1).mean() for t, s in pairs])
        gradient = np.zeros((crops, batch, width))
        for t, s in pairs:
            gradient[s] += (np.exp(log_q[s]) - probs[t]) / 0.1 / batch / len(pairs)
        centre = momentum * centre + (1 - momentum) * teacher.astype(np.float64).mean(0, keepdims=True)
        arrays |= {f"x_student_{call}": student, f"x_teacher_{call}": teacher, f"y64_loss_{call}": loss}
        arrays |= {f"dx_student_{call}": gradient.reshape(-1, width), f"y_center_{call}": centre}
    logits = normal(6, width, seed=3)
    after = lazy_momentum * start + (1 - lazy_momentum) * logits.astype(np.float64).mean(0, keepdims=True)
    arrays |= {"x_sk": logits, "y_v2_center_after": after}
    arrays |= {f"y_v2_softmax_{k}": softmax((logits - c) / 0.06) for k, c in (("first", start), ("second", after))}
    args = {"out_dim": width, "ncrops": crops, "nepochs": 4, "warmup_teacher_temp": 0.05, "teacher_temp": 0.05}
    args |= {"warmup_teacher_temp_epochs": 2, "student_temp": 0.1, "center_momentum": momentum}
    meta = {"kind": "dino_loss", "args": args, "batch": batch, "epoch": 1, "teacher_temp_used": 0.06, "tol": DINO}
    return meta, arrays


@pytest.mark.parametrize(
    "lazy, stated",
    [
        (0.6, {"dinov2": {"center_momentum": 0.6}}),
        (0.6, {"v2_center_momentum": 0.6}),
        (0.9, {}),  # the reference's own default
        (0.8, {}),  # that of the arguments
    ],
)
def test_a_reference_with_a_momentum_of_its_own(tmp_path, lazy, stated):
    meta, arrays = dino_case(0.8, lazy)
    rows = verdicts(write(tmp_path / "case.npz", meta | stated, arrays))
    assert all(rows.values()) and {"y_center_1", "y_v2_center_after", "y_v2_softmax_second", "y64_loss_1"} <= set(rows)


def test_another_momentum_fails(tmp_path):
    meta, arrays = dino_case(0.8, 0.6)
    lazy = {"y_v2_center_after", "y_v2_softmax_second"}
    assert failed(write(tmp_path / "case.npz", meta | {"v2_center_momentum": 0.61}, arrays)) == lazy
    assert failed(write(tmp_path / "case.npz", meta, arrays)) == lazy
    other = meta | {"args": meta["args"] | {"center_momentum": 0.81}, "v2_center_momentum": 0.6}
    assert {"y_center_0", "y_center_1", "y64_loss_1"} <= failed(write(tmp_path / "case.npz", other, arrays))
    twice = meta | {"v2_center_momentum": 0.6, "dinov2": {"center_momentum": 0.5}}
    with pytest.raises(ValueError, match="case.npz: meta_json states the momentum of v2 twice"):
        command.run_case(write(tmp_path / "case.npz", twice, arrays))

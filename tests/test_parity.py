"""Numerical parity with the reference code: the small cases from tests/golden, the large ones from the shared
folder. gfm_simmim_img16_w4 was made as the shared ones are, from GFM at commit 4dd248e: odd depths, a stage as large as
the window and one smaller, two channels.
"""

import json
import pathlib

import numpy as np
import pytest

from tests.parity import command

GOLDEN = pathlib.Path(__file__).parent / "golden"
LARGE = (
    "vit_full_tiny",
    "vit_pos_resize",
    "fusion_input_assembly_official",
    "swin_block_shifted_c88h2w8",
    "swin_block_unshifted_c88h2w8",
    "factorised_hr256x128_s2t3_s1t2",
    "swin_full_c12_w8",
    "gfm_simmim_img64_w4",
)


def failures(path):
    return [str(row) for row in command.run_case(path) if not row.passed]


@pytest.mark.parametrize("name", sorted(p.stem for p in GOLDEN.glob("*.npz")))
def test_small_case(name):
    assert not failures(GOLDEN / f"{name}.npz")


@pytest.mark.parametrize("name", LARGE)
def test_large_case(name, shared):
    path = shared / "parity" / f"{name}.npz"
    if not path.exists():
        pytest.skip(f"needs the reference case {path.name} of the shared parity folder")
    assert not failures(path)


def altered(tmp_path, name, edit):
    """A copy of a golden case with its arrays and meta changed by edit(arrays, meta)."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        arrays = {k: file[k] for k in file.files}
    meta = json.loads(str(arrays.pop("meta_json")))
    edit(arrays, meta)
    path = tmp_path / f"{name}.npz"
    np.savez(path, meta_json=np.array(json.dumps(meta)), **arrays)
    return path


def test_the_command_fails_where_it_should(tmp_path, capsys):
    assert command.main([str(GOLDEN / "uphead_grad.npz")]) == 0
    wrong = altered(tmp_path, "uphead_grad", lambda arrays, meta: arrays.update(y=arrays["y"] * 1.001))
    assert command.main([str(wrong)]) == 1
    assert "FAIL y" in capsys.readouterr().out
    gradient = altered(tmp_path, "fusion_grad", lambda a, m: a.update({"d:cls_token": a["d:cls_token"] * 1.001}))
    assert failures(gradient)


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda arrays, meta: meta.update(kind="other"), "kind 'other' not supported"),
        (lambda arrays, meta: arrays.pop("w:decoder.0.bias"), "missing: decoder.0.bias"),
        (lambda arrays, meta: arrays.update({"w:extra": np.zeros(2, np.float32)}), "unexpected: extra"),
        (lambda arrays, meta: meta["args"].update(out_dim=7), "wrong shape: decoder.0.weight"),
        (lambda arrays, meta: meta["args"].update(act="relu"), "unknown constructor argument act"),
        (lambda arrays, meta: arrays.update(y_more=arrays["y"]), "nothing computed for .*y_more"),
    ],
)
def test_what_a_case_may_not_hold(tmp_path, edit, message):
    with pytest.raises(ValueError, match=message):
        command.run_case(altered(tmp_path, "uphead_grad", edit))

"""What an earlier commit wrote still opens: tests/golden/of_471d03c holds a dataset, checkpoints, exports and imported
weights that the code of commit 471d03c wrote, and what it computed from them (README.md there says how).
"""

import hashlib
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from skysense_jax import cli, networks, train
from skysense_jax.core import exits
from skysense_jax.data import records
from skysense_jax.run import checkpoint
from tests.helpers import jobs

ROOT = pathlib.Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden" / "of_471d03c"
COMMIT = "471d03c75811fe9550a04168bd42fb28a2bc7848"
RUNS = ("skysense", "msgfm")
KINDS = {"workdir": "workdir", "workdir/checkpoints/1": "checkpoint", "export": "export", "imported": "imported"}
DATES = ["2021-03-01", "2021-08-15"]
SETTINGS = json.loads((GOLDEN / "settings.json").read_text())
"""Run -> "config" and the fields that differ from it."""


@pytest.fixture()
def folder(tmp_path) -> pathlib.Path:
    """A copy: runs write into their workdir."""
    return shutil.copytree(GOLDEN, tmp_path / "of_471d03c")


def features_input(run: str) -> tuple[dict, dict[str, np.ndarray]]:
    """The place whose features the earlier commit computed, and these features."""
    with np.load(GOLDEN / run / "features.npz", allow_pickle=False) as stored:
        arrays = dict(stored)
    place: dict = {
        name.removeprefix("input."): {"image": image, "dates": DATES[: len(image)]}
        for name, image in arrays.items()
        if name.startswith("input.")
    }
    if run == "skysense":
        place["place"] = {"lon": 0.55, "lat": 45.1}
    return place, {name.removeprefix("output."): value for name, value in arrays.items() if name.startswith("output.")}


def field_digest(value) -> str:
    """As write.py there: SHA-256 of dtype, shape and bytes, or of the text."""
    array = np.asarray(value)
    if array.dtype.kind in "OS":
        return hashlib.sha256(bytes(array.item())).hexdigest()[:16]
    head = f"{array.dtype.str} {array.shape} ".encode()
    return hashlib.sha256(head + np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


def test_the_files_are_the_bytes_that_were_written():
    """Git keeps them: no pattern ignores one, no line end is changed."""
    lines = (GOLDEN / "SHA256SUMS").read_text().splitlines()
    sums = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
    files = {str(file.relative_to(GOLDEN)) for file in GOLDEN.rglob("*") if file.is_file()}
    assert files - {"README.md", "SHA256SUMS", "write.py", ".gitattributes"} == sums.keys()
    wrong = [name for name in sums if hashlib.sha256((GOLDEN / name).read_bytes()).hexdigest() != sums[name]]
    assert not wrong


def test_a_dataset_reads(capsys):
    dataset, stored = GOLDEN / "dataset", json.loads((GOLDEN / "records.json").read_text())
    assert networks.identify(dataset) == networks.DATASET
    assert records.splits(dataset) == tuple(stored)
    for split, expected in stored.items():
        places = records.open_places(dataset, split)
        assert len(places) == len(expected)
        for number, digests in enumerate(expected):
            record = places[number]
            assert record.pop("index") == number
            assert {name: field_digest(value) for name, value in record.items()} == digests
    assert cli.main(["inspect", str(dataset)]) == exits.DONE
    text = capsys.readouterr().out
    assert records.read_metadata(dataset)["dataset_id"] in text and "bands VV, VH" in text
    assert "its own statistics" in text and "scene labels    even, odd" in text


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("run", RUNS)
def test_a_folder_is_known_and_described(run, name, capsys):
    path, kind = GOLDEN / run / name, KINDS[name]
    assert networks.identify(path) == kind
    description = networks.read_description(path)
    assert description.kind == kind and description.model.name == run
    if kind == "export":
        assert description.provenance["commit"] == COMMIT
    if kind != "imported":
        assert description.step == 1 and description.config.steps == SETTINGS[run]["fields"]["steps"]
    assert cli.main(["inspect", str(path)]) == exits.DONE
    text = capsys.readouterr().out
    assert str(path) in text and "input expected: 2 HR pixels along one base pixel" in text


@pytest.mark.parametrize("run", RUNS)
def test_the_features_are_those_that_the_earlier_commit_computed(run):
    """From the checkpoint; the other kinds of folder open to the same bits, and so to the same function."""
    place, expected = features_input(run)
    outputs = networks.load(GOLDEN / run / "workdir").features(place)
    assert outputs.keys() == expected.keys()
    for output, value in outputs.items():
        assert value.dtype == expected[output].dtype
        np.testing.assert_allclose(value, expected[output], rtol=1e-5, atol=1e-5, err_msg=output)
    trained = networks.open_network(GOLDEN / run / "workdir")
    for name in KINDS:
        network = networks.open_network(GOLDEN / run / name)
        assert network.description.contract == trained.description.contract
        assert jax.tree.structure(network.encoder) == jax.tree.structure(trained.encoder)
        jax.tree.map(np.testing.assert_array_equal, network.encoder, trained.encoder)
        assert networks.load(GOLDEN / run / name).contract == trained.description.contract


@pytest.mark.parametrize("run", RUNS)
def test_a_run_continues(run, folder, capsys):
    """Digests and structure hold, the command's own configuration fits, and the next steps are those that the earlier
    commit took; on eight devices here, on a single one there.
    """
    work = folder / run / "workdir"
    earlier = [json.loads(line) for line in (GOLDEN / run / "metrics.jsonl").read_text().splitlines()]
    shutil.copy(GOLDEN / run / "metrics.jsonl", work)
    fields = SETTINGS[run]["fields"] | {"data.dir": folder / "dataset"}
    flags = [f"--config.{field}={value}" for field, value in fields.items()]
    command = ["--config", str(ROOT / SETTINGS[run]["config"]), "--workdir", str(work), *flags]
    assert train.main(command) == exits.DONE
    said = capsys.readouterr().err
    assert "resuming from step 1" in said and f"done: {fields['steps']} steps" in said
    assert checkpoint.steps(work / checkpoint.FOLDER) == [1, 2, 3]
    assert not (work / checkpoint.REJECTED).exists()
    jobs.assert_close(jobs.records(work), earlier, 1e-5)


@pytest.mark.parametrize("run", RUNS)
def test_an_export_verifies_and_one_without_digests_names_the_command(run, folder, capsys):
    export = folder / run / "export"
    assert cli.main(["verify", str(export)]) == exits.DONE
    table = capsys.readouterr().out
    assert "jax" in table and "DIFFERS" not in table
    (export / "SHA256SUMS").unlink()
    assert cli.main(["verify", str(export)]) == exits.BAD_INPUT
    assert "no folder that export-torch wrote" in capsys.readouterr().err

"""Folders of images without georeference: what is read how, what is refused, cut by pixels, the same records always."""

import csv
import hashlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorflow_datasets as tfds
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from skysense_jax.data import records as dataset_records
from skysense_jax.data import statistics
from skysense_jax.data.drafting import layouts
from skysense_jax.data.drafting.rasters import to_csv
from skysense_jax.data.ingest import build, plain_images
from skysense_jax.data.ingest.raster import Header, RasterRefused
from skysense_jax.draw import places
from tests.helpers.rasters import HR, catalog, run, write

OPTIONS = build.Options(tile=16, ratio=2, shard_places=2, holdout=0.0, georeferenced=False)
SIDE = 32  # pixels of an hr tile with OPTIONS


def pixels(height=SIDE, width=SIDE, seed=0, bands=3):
    return np.random.default_rng(seed).integers(0, 256, (height, width, bands)).astype(np.uint8)


def save(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path, **options)
    return path


def drafted(root, sensor="hr", name="places.csv", **options):
    path = root.parent / name
    found = layouts.images(root, sensor, **options)
    rows = [row | {"path": row["path"] and f"{root.name}/{row['path']}"} for row in found.rows]
    path.write_text(to_csv(rows))
    return path


def built(root, out, options=OPTIONS, **draft):
    """Place -> record, and the metadata."""
    meta, _ = build.build(drafted(root, **draft), out, options, progress=False)
    return records(out), meta


def records(out):
    dataset = tfds.builder_from_directory(str(out))
    return {one["place"].decode(): one for split in dataset.info.splits for one in dataset.as_data_source(split=split)}


def reasons(meta):
    return {entry["place"]: entry["reason"] for entry in meta["report"]["refused"]}


def test_images_become_records_and_stay_as_they_were(tmp_path):
    root = tmp_path / "world"
    save(root / "airport" / "a.png", pixels(seed=1))
    save(root / "airport" / "b.JPG", pixels(seed=2), quality=90)
    save(root / "deep" / "river" / "c.tif", pixels(seed=3))
    save(root / "d.jpeg", pixels(seed=4))
    (root / "notes.txt").write_text("x")
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    found, meta = built(root, tmp_path / "d", folder_classes=True)
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before
    assert set(found) == {"airport:a.png", "airport:b.JPG", "deep:river:c.tif", "d.jpeg"}
    assert meta["georeferenced"] is False and meta["gsd"] is None and meta["label_classes"] == ["airport", "river"]
    for place, labels in (("airport:a.png", [1, 0]), ("deep:river:c.tif", [0, 1]), ("d.jpeg", [0, 0])):
        assert found[place]["label"].tolist() == labels
    for place, one in found.items():
        with Image.open(root / place.replace(":", "/")) as image:
            np.testing.assert_array_equal(one["hr_image"], np.asarray(image)[None])
        assert np.isnan([one["lon"], one["lat"], *one["footprint"]]).all() and one["crs"] == b""
        assert one["hr_date"].tolist() == [-1] and one["hr_valid"].all() and one["hr_measured"].tolist() == [[1, 1, 1]]
        assert (one["label_map"] == 255).all()
    lon, lat = dataset_records.locations(tmp_path / "d", "train")
    assert np.isnan(lon).all() and np.isnan(lat).all() and len(lon) == 4
    assert statistics.compute(tmp_path / "d", progress=False)["hr"]["n"] == [4 * SIDE * SIDE] * 3
    places.preview(tmp_path / "d", "d.jpeg", tmp_path / "p.png")


def test_a_georeferenced_dataset_says_so_and_keeps_the_key_it_always_had(tmp_path):
    write(tmp_path / "hr.tif", np.ones((3, 32, 32), np.uint8), step=5)
    options = OPTIONS._replace(georeferenced=True)
    meta, _ = build.build(catalog(tmp_path, [HR]), tmp_path / "d", options, progress=False)
    assert meta["georeferenced"] is True and meta["gsd"] == 10.0
    asked = {name: value for name, value in options._asdict().items() if name != "georeferenced"}
    described = {"build": {"format": 1, "catalog_sha256": meta["catalog_sha256"]} | asked}
    text = json.dumps(json.loads(json.dumps(described)), indent=1, sort_keys=True) + "\n"
    assert meta["build_key"] == hashlib.sha256(text.encode()).hexdigest()
    with pytest.raises(build.BuildError, match="georeferenced"):
        build.build(tmp_path / "places.csv", tmp_path / "d", OPTIONS, progress=False)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 64))
def test_cuts_fill_the_picture_as_far_as_whole_tiles_can(width, height, size):
    head = Header(pathlib.Path("x"), width, height, 3, np.dtype("uint8"), None, None, (None,) * 3, 0, "")
    if min(width, height) < size:
        with pytest.raises(RasterRefused, match="smaller than one tile"):
            list(plain_images.cuts_of("x", head, size))
        return
    cuts = list(plain_images.cuts_of("x", head, size))
    covered = np.zeros((height, width), int)
    for cut in cuts:
        assert cut.column >= 0 and cut.row >= 0
        part = covered[cut.row : cut.row + size, cut.column : cut.column + size]
        assert part.shape == (size, size)
        part += 1
    assert covered.max() == 1 and covered.sum() == (width // size) * (height // size) * size**2
    rows, columns = covered.any(1), covered.any(0)
    assert abs(rows.argmax() - rows[::-1].argmax()) <= 1 and abs(columns.argmax() - columns[::-1].argmax()) <= 1
    assert len({cut.name for cut in cuts}) == len(cuts) and (len(cuts) > 1 or cuts[0].name == "x")


def test_a_large_image_is_cut_a_small_one_refused(tmp_path):
    image = pixels(3 * SIDE + 5, 2 * SIDE)
    save(tmp_path / "world" / "large.png", image)
    save(tmp_path / "world" / "small.png", pixels(SIDE - 1, 4 * SIDE))
    found, meta = built(tmp_path / "world", tmp_path / "d")
    assert set(found) == {f"large.png@{column}_{row}" for column in range(2) for row in range(3)}
    for column, row in np.ndindex(2, 3):
        part = image[2 + row * SIDE :][:SIDE, column * SIDE :][:, :SIDE]
        np.testing.assert_array_equal(found[f"large.png@{column}_{row}"]["hr_image"][0], part)
    assert "smaller than one tile of 32 x 32" in reasons(meta)["small.png"]


UPRIGHT = {  # EXIF orientation -> how the stored pixels are turned to stand upright (Exif 2.3, tag 274)
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("ending", ["png", "jpg"])
def test_exif_orientation_is_applied(tmp_path, ending):
    image = np.repeat(np.repeat(pixels(4, 8), 8, 0), 8, 1)  # blocks of 8, so that JPEG hardly changes them
    for orientation in UPRIGHT:
        exif = Image.Exif()
        exif[274] = orientation
        save(tmp_path / "world" / f"{orientation}.{ending}", image, exif=exif, quality=100, subsampling=0)
    found, _ = built(tmp_path / "world", tmp_path / "d")
    for orientation, turn in UPRIGHT.items():
        upright = turn(image)
        wide = int(upright.shape[1] > SIDE)
        tiles = [f"{orientation}.{ending}@{k}_0" if wide else f"{orientation}.{ending}@0_{k}" for k in range(2)]
        whole = np.concatenate([found[tile]["hr_image"][0] for tile in tiles], axis=wide)
        assert np.abs(whole.astype(int) - upright).max() <= (0 if ending == "png" else 8), orientation


def bad_images(root):
    """Place -> a part of the reason it must be refused for."""
    image = Image.fromarray(pixels())
    save(root / "cmyk.jpg", image.convert("CMYK"))
    save(root / "grey.png", image.convert("L"))
    save(root / "grey_alpha.png", image.convert("LA"))
    save(root / "bilevel.png", image.convert("1"))
    save(root / "grey16.png", (pixels()[..., 0].astype(np.uint16) * 200))
    write(root / "rgb16.png", np.full((3, SIDE, SIDE), 5000, np.uint16), crs=None, driver="PNG")
    for name in ("a.jpg", "a.png"):
        data = save(root / name, image).read_bytes()
        (root / name).unlink()
        (root / f"cut_{name}").write_bytes(data[: len(data) // 2])
        (root / f"head_{name}").write_bytes(data[:20])
    (root / "hole.png").write_bytes(data[:500] + bytes(300) + data[800:])
    (root / "empty.png").write_bytes(b"")
    (root / "text.jpg").write_text("hello")
    save(root / "gif.png", image, format="GIF")
    save(root / "clear.png", np.dstack([pixels(), np.zeros((SIDE, SIDE), np.uint8)]))
    write(root / "deep.tif", np.full((3, SIDE, SIDE), 4000, np.uint16), crs=None, photometric="RGB")
    image.save(root / "pages.tif", save_all=True, append_images=[image])
    write(root / "four.tif", np.ones((4, SIDE, SIDE), np.uint8), crs=None, photometric="MINISBLACK")
    return {
        "cmyk.jpg": "mode CMYK",
        "grey.png": "has 1 bands whose order nobody states",
        "grey_alpha.png": "whose order nobody states",
        "bilevel.png": "mode 1",
        "grey16.png": "whose order nobody states",
        "rgb16.png": "16-bit colour",
        "cut_a.jpg": "truncated or corrupt",
        "cut_a.png": "truncated or corrupt",
        "head_a.jpg": "truncated or corrupt: its header cannot be read",
        "head_a.png": "truncated or corrupt: Truncated File Read",
        "hole.png": "truncated or corrupt",
        "empty.png": "the file is empty",
        "text.jpg": "not a JPEG, PNG, GeoTIFF or JPEG 2000 file",
        "gif.png": "not a JPEG, PNG, GeoTIFF or JPEG 2000 file",
        "clear.png": "no valid pixel",
        "deep.tif": "16-bit imagery needs a declared scale",
        "pages.tif": "holds 2 images, of which only the first would be read",
        "four.tif": "has 4 bands whose order nobody states",
    }


def test_what_has_no_single_meaning_is_refused_named_and_counted(tmp_path):
    root = tmp_path / "world"
    save(root / "good.png", pixels())
    expected = bad_images(root)
    found, meta = built(root, tmp_path / "d")
    assert set(found) == {"good.png"} and set(reasons(meta)) == set(expected)
    for place, text in expected.items():
        assert text in reasons(meta)[place], place
    assert meta["report"]["files"] == {"used": 1, "refused": len(expected)}
    assert meta["report"]["places_without_tiles"] == sorted(expected)


def test_a_picture_too_large_to_decode_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    save(tmp_path / "world" / "bomb.png", pixels(64, 64))
    save(tmp_path / "world" / "good.png", pixels())
    for limit in (3000, 1500):  # Pillow warns above its limit and raises above twice its limit
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        _, meta = built(tmp_path / "world", tmp_path / f"d{limit}")
        assert f"more than {limit} pixels" in reasons(meta)["bomb.png"] and len(reasons(meta)) == 1


def test_palettes_and_transparency(tmp_path):
    root = tmp_path / "world"
    palette = Image.fromarray(pixels()).quantize(16)
    save(root / "palette.png", palette)
    holes = np.arange(SIDE * SIDE).reshape(SIDE, SIDE) % 3 > 0
    save(root / "alpha.png", np.dstack([pixels(), holes.astype(np.uint8) * 255]))
    image = pixels(seed=5)
    image[:4] = (1, 2, 3)
    save(root / "key.png", Image.fromarray(image), transparency=(1, 2, 3))
    found, _ = built(root, tmp_path / "d")
    np.testing.assert_array_equal(found["palette.png"]["hr_image"][0], np.asarray(palette.convert("RGB")))
    np.testing.assert_array_equal(found["alpha.png"]["hr_valid"][0], holes)
    np.testing.assert_array_equal(found["alpha.png"]["hr_image"][0], pixels() * holes[..., None])
    assert not found["key.png"]["hr_valid"][0, :4].any() and found["key.png"]["hr_valid"][0, 4:].all()


JPEG, PNG = ("JPEG", {"quality": 80}), ("PNG", {})


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from([JPEG, PNG]), st.floats(0, 1), st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=4)
)
def test_damage_is_a_picture_or_a_refusal_and_nothing_else(tmp_path, kind, kept, changes):
    path = tmp_path / "x"
    Image.fromarray(pixels(16, 16)).save(path, format=kind[0], **kind[1])
    data = bytearray(path.read_bytes())
    for where, value in changes:
        data[int(where * (len(data) - 1))] = value
    path.write_bytes(data[: max(1, int(len(data) * min(1.0, 2 * kept)))])
    try:
        with plain_images.open_picture(path) as file:
            assert file.count in (1, 2, 3, 4) and file.read().size
    except RasterRefused as error:
        assert str(error)


def test_bands_of_multi_band_files(tmp_path):
    root = tmp_path / "s2"
    image = np.random.default_rng(0).integers(100, 4000, (13, 16, 16)).astype(np.uint16)
    bands = ",".join(reversed(layouts.SENSORS["s2"].bands))
    write(root / "20200601_a.tif", image, crs=None)
    write(root / "20200601_b.tif", image[:12], crs=None)
    write(root / "nodate.tif", image, crs=None)
    source = drafted(root, "s2", bands=bands)
    asked = [text for _, text in layouts.images(root, "s2", bands=bands).questions]
    assert sorted({text.split(":")[0] for text in asked}) == ["datetime", "offset", "units"]
    rows = list(csv.DictReader(source.open()))
    source.write_text(to_csv([row | {"units": "dn", "offset": "0"} for row in rows]))
    meta, _ = build.build(source, tmp_path / "d", OPTIONS, progress=False)
    [one] = records(tmp_path / "d").values()
    np.testing.assert_array_equal(one["s2_image"][0], np.moveaxis(image[::-1], 0, -1))
    assert "has 12 bands, the catalog names 13" in reasons(meta)["20200601_b.tif"]
    assert "no datetime" in reasons(meta)["nodate.tif"]


def test_a_place_is_one_image_and_a_crs_is_not_used(tmp_path):
    for name in ("a.tif", "b.tif", "m.tif"):
        write(tmp_path / name, np.full((3, SIDE, SIDE), 7, np.uint8), step=5)
    rows = [HR | {"path": "a.tif"}, {"sensor": "dsm", "path": "b.tif"}, {"sensor": "label_map", "path": "m.tif"}]
    meta, _ = build.build(catalog(tmp_path, rows), tmp_path / "d", OPTIONS, progress=False)
    assert [entry["path"] for entry in meta["report"]["refused"]] == ["b.tif", "m.tif"]
    assert all("a place is one image" in entry["reason"] for entry in meta["report"]["refused"])
    assert meta["report"]["notes"] == {"hr: it has a CRS, which is not used": 1}
    assert np.isnan(records(tmp_path / "d")["a"]["lon"])


def test_names_a_catalog_cannot_hold_and_hidden_files_are_left_out(tmp_path):
    for name in ("good.png", ".hidden.png", "two\nlines.png", os.fsdecode(b"latin\xe9.png")):
        save(tmp_path / "world" / name, pixels())
    found = layouts.images(tmp_path / "world", "hr")
    assert [row["path"] for row in found.rows] == ["good.png"] and len(found.questions) == 3
    for path, text in found.questions:
        assert path.isprintable() and text.startswith("left out")
    save(tmp_path / "world" / "a;b" / "x.png", pixels())
    with pytest.raises(layouts.CatalogError, match="semicolon"):
        layouts.images(tmp_path / "world", "hr", folder_classes=True)


PROGRAM = """
import sys
from skysense_jax.data.ingest import build as builder
if __name__ == "__main__":
    options = builder.Options(tile=16, ratio=2, shard_places=1, holdout=0.3, georeferenced=False)
    builder.build(sys.argv[1], sys.argv[2], options, progress=False)
"""


def test_killed_and_continued_gives_the_same_bytes_also_with_processes(tmp_path):
    for i in range(12):
        save(tmp_path / "world" / f"{i}.png", pixels(100, 100, seed=i))
    source, out = drafted(tmp_path / "world"), tmp_path / "d"
    options = OPTIONS._replace(shard_places=1, holdout=0.3)
    build.build(source, tmp_path / "straight", options, workers=2, progress=False)
    (tmp_path / "build.py").write_text(PROGRAM)
    command = [sys.executable, tmp_path / "build.py", source, out]
    env = os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).resolve().parents[1])}
    process, deadline = subprocess.Popen(command, env=env), time.monotonic() + 120
    while len(list(out.glob("parts/*.json"))) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = {path: path.stat().st_mtime_ns for path in out.glob("parts/*.array_record")}
    assert finished and not (out / build.METADATA).exists(), "the build was over before it could be killed"
    assert subprocess.run(command, env=env, timeout=120).returncode == 0
    names = sorted(path.name for path in out.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "straight").iterdir()) and len(names) > 12
    for name in names:
        if name not in ("dataset_info.json", "features.json"):
            assert (out / name).read_bytes() == (tmp_path / "straight" / name).read_bytes(), name


def test_commands(tmp_path, capsys):
    root = tmp_path / "world"
    for i in range(8):
        save(root / f"class{i % 2}" / f"{i}.png", pixels(2 * SIDE, SIDE, seed=i))
    split = tmp_path / "split.csv"
    split.write_text("place,split\nclass0:*,test\n*,train\n")
    draft = ("catalog", root, "--out", tmp_path / "c.csv")
    assert run(*draft, "--layout", "images") == 78 and "--sensor" in capsys.readouterr().err
    assert run(*draft, "--sensor", "hr") == 78 and "belongs to --layout images" in capsys.readouterr().err
    assert run(*draft, "--layout", "sen12ms", "--place-by", "stem") == 78
    images = (*draft, "--layout", "images", "--sensor", "hr", "--folder-classes")
    assert run(*images, "--split", split) == 0 and "--no-georeference" in capsys.readouterr().out
    reading = ("--catalog", tmp_path / "c.csv", "--tile", 16, "--ratio", 2, "--workers", 1)
    assert run("check", *reading) == 78  # the door for georeferenced rasters stays as it is
    assert "neither a GeoTIFF nor a JPEG 2000" in capsys.readouterr().out
    assert run("check", *reading, "--no-georeference") == 0
    assert run("build", *reading, "--no-georeference", "--gsd", 5, "--out", tmp_path / "d") == 78
    assert "mean nothing" in capsys.readouterr().err
    assert run("build", *reading, "--no-georeference", "--out", tmp_path / "d") == 0
    assert json.loads((tmp_path / "d" / "places.json").read_text())["splits"] == {"train": 8, "test": 8}
    dataset = tfds.builder_from_directory(str(tmp_path / "d"))
    for name, prefix in (("test", b"class0:"), ("train", b"class1:")):
        assert all(one["place"].startswith(prefix) for one in dataset.as_data_source(split=name))


def test_without_a_split_file_the_hash_of_the_name_decides(tmp_path):
    for i in range(30):
        save(tmp_path / "world" / f"{i}.png", pixels(SIDE, 2 * SIDE, seed=i))
    options = OPTIONS._replace(holdout=0.3)
    build.build(drafted(tmp_path / "world"), tmp_path / "d", options, progress=False)
    dataset = tfds.builder_from_directory(str(tmp_path / "d"))
    found = {
        name: {one["place"].decode().split("@")[0] for one in dataset.as_data_source(split=name)}
        for name in ("train", "test")
    }
    assert not found["train"] & found["test"] and 2 <= len(found["test"]) <= 17  # no tile parts from its image


def test_real_scene_classification_folders(shared, tmp_path):
    root = shared / "data" / "eurosat_rgb_10"
    if not root.is_dir():
        pytest.skip(f"needs the real data in {root}")
    shutil.copytree(root, tmp_path / "eurosat")
    found, meta = built(tmp_path / "eurosat", tmp_path / "d", OPTIONS._replace(tile=32), folder_classes=True)
    assert len(found) == len(list(root.rglob("*.jpg"))) > 0 and not meta["report"]["refused"]
    assert meta["label_classes"] == sorted(path.name for path in root.iterdir() if path.is_dir())
    for place, one in found.items():
        with Image.open(root / place.replace(":", "/")) as image:
            np.testing.assert_array_equal(one["hr_image"][0], np.asarray(image))
        assert meta["label_classes"][one["label"].argmax()] == place.split(":")[0]

"""SEN12MS folders: pairs and what has no partner, values in their units, and no held-out region in training."""

import csv

import numpy as np
import pytest
import tensorflow_datasets as tfds
from hypothesis import given, settings
from hypothesis import strategies as st

from skysense_jax.data.drafting import layouts, splits
from skysense_jax.data.ingest import build
from skysense_jax.data.ingest.catalog import CatalogError, read_catalog
from skysense_jax.sensors import SENSORS
from tests.helpers.rasters import catalog, run, write

SIDE = 16
SEASONS = ("ROIs1158_spring", "ROIs1868_summer", "ROIs1970_fall", "ROIs2017_winter")
HELD_OUT = {  # SEN12MS-CR's test regions, then its validation regions
    "ROIs1158_spring": {106, 123, 140, 31, 44} | {17},
    "ROIs1868_summer": {119, 73} | {19, 80, 127, 17},
    "ROIs1970_fall": {139} | {65},
    "ROIs2017_winter": {108, 63} | {22, 107, 130, 84},
}


def patch(root, season, region, number, kinds=("s1", "s2", "lc"), flat=False):
    """The files of one patch, as SEN12MS lays them out, 16 px instead of 256."""
    rng = np.random.default_rng([region, number])
    values = {
        "s1": rng.uniform(-30, -3, (2, SIDE, SIDE)).astype(np.float32),
        "s2": rng.integers(1, 10_000, (13, SIDE, SIDE)).astype(np.uint16),
        "lc": rng.integers(1, 18, (4, SIDE, SIDE)).astype(np.uint16),
    }
    values["s2_cloudy"] = values["s2"]
    for kind in kinds:
        folder = root / (f"{season}_{kind}" if flat else season) / f"{kind}_{region}"
        write(folder / f"{season}_{kind}_{region}_p{number}.tif", values[kind], west=286_708.597, north=1_958_546.7)
    return {kind: values[kind] for kind in kinds}


def records(out, split):
    dataset = tfds.builder_from_directory(str(out))
    return {one["place"].decode(): one for one in dataset.as_data_source(split=split)}


def test_pairs_arrive_as_they_were_measured_and_held_out_regions_are_not_in_training(tmp_path, capsys):
    root = tmp_path / "SEN12MS"
    train = {f"ROIs1158_spring_{region}_p30": patch(root, "ROIs1158_spring", region, 30) for region in (1, 10, 310)}
    for region in (31, 17, 106):
        patch(root, "ROIs1158_spring", region, 30)
    train["ROIs1970_fall_106_p7"] = patch(root, "ROIs1970_fall", 106, 7, ("s1", "s2"), flat=True)  # another 106
    train["ROIs1868_summer_5_p1"] = patch(root, "ROIs1868_summer", 5, 1, ("s2",))
    train["ROIs1868_summer_5_p2"] = patch(root, "ROIs1868_summer", 5, 2, ("s1", "lc"))
    patch(root, "ROIs1868_summer", 5, 3, ("lc", "s2_cloudy"))
    assert run("catalog", root, "--layout", "sen12ms") == 0
    text = capsys.readouterr().out
    assert "s1 alone, an unpaired place" in text and "s2 alone, an unpaired place" in text
    assert "a land cover map without s1 or s2" in text and "left out: cloudy" in text
    assert "its middle is drafted" in text
    reading = ("--catalog", root / "places.csv", "--tile", SIDE, "--ratio", 1, "--workers", 1)
    assert run("build", *reading, "--out", tmp_path / "d") == 0
    assert "refused 0" in capsys.readouterr().out
    found = records(tmp_path / "d", "train")
    assert set(found) == set(train)
    assert set(records(tmp_path / "d", "test")) == {f"ROIs1158_spring_{region}_p30" for region in (31, 17, 106)}
    for place, values in train.items():
        one = found[place]
        for kind in ("s1", "s2"):
            assert len(one[f"{kind}_date"]) == (kind in values)
            if kind in values:
                np.testing.assert_array_equal(one[f"{kind}_image"][0], np.moveaxis(values[kind], 0, -1))
                assert one[f"{kind}_measured"].all() and one[f"{kind}_valid"].all()
        expected = values["lc"][0] if "lc" in values else np.full((SIDE, SIDE), 255)
        np.testing.assert_array_equal(one["label_map"], expected)
    day = np.datetime64("1970-01-01") + found["ROIs1970_fall_106_p7"]["s2_date"][0]
    assert str(day) == "2017-10-15" and not np.isnan(found["ROIs1970_fall_106_p7"]["lon"])
    names = read_catalog(root / "places.csv").label_map_classes
    assert len(names) == 17 and names[1] == "evergreen needleleaf forest" and names[17] == "water"


def test_names_that_are_not_sen12ms_are_left_out_and_named(tmp_path):
    patch(tmp_path, "ROIs1158_spring", 1, 1)
    right = "ROIs1158_spring_s2_1_p1.tif"
    for name in ("ROIs0000_validation_s2_1_p1.tif", right.replace("s2", "s3"), "x.txt", right + ".bak"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "ROIs1158_spring" / "s2_2").mkdir()
    (tmp_path / "ROIs1158_spring" / "s2_2" / "ROIs1158_spring_s2_106_p1.tif").write_bytes(b"")  # 106 hidden in folder 2
    found = layouts.sen12ms(tmp_path)
    assert {row["place"] for row in found.rows} == {"ROIs1158_spring_1_p1"} and len(found.rows) == 3
    assert len([text for _, text in found.questions if text.startswith("left out")]) == 5
    assert [path for path, text in found.questions if "another sensor or region" in text] == [
        "ROIs1158_spring/s2_2/ROIs1158_spring_s2_106_p1.tif"
    ]
    (tmp_path / "empty").mkdir()
    with pytest.raises(CatalogError, match="no s1 or s2 file"):
        layouts.sen12ms(tmp_path / "empty")


def test_the_shipped_rule_holds_out_exactly_the_regions_of_sen12ms_cr():
    places = {
        f"{season}_{region}_p{number}": (season, region)
        for season in SEASONS
        for region in range(1, 260)
        for number in (1, 30, 106)
    }
    found = splits.assign(splits.read_split(splits.SEN12MS_CR), places)
    assert {place for place, split in found.items() if split == "test"} == {
        place for place, (season, region) in places.items() if region in HELD_OUT[season]
    }
    assert sum(map(len, HELD_OUT.values())) == 20


@settings(deadline=None)
@given(st.sampled_from(SEASONS), st.integers(0, 10_000), st.integers(0, 10_000))
def test_no_patch_of_a_held_out_region_is_for_training(season, region, number):
    rules = splits.read_split(splits.SEN12MS_CR)
    place = f"{season}_{region}_p{number}"
    assert splits.assign(rules, [place]) == {place: "test" if region in HELD_OUT[season] else "train"}


@pytest.mark.parametrize("name", ["ROIs0000_validation_1_p1", "rois1158_spring_106_p1", "ROIs1158_summer_106_p1", ""])
def test_a_name_the_rule_does_not_know_is_an_error_not_training_data(name):
    with pytest.raises(CatalogError, match=r"no line matches 1 places: .*add lines for them"):
        splits.assign(splits.read_split(splits.SEN12MS_CR), ["ROIs1158_spring_1_p1", name])


def rules(tmp_path, text):
    (tmp_path / "split.csv").write_text(text)
    return splits.read_split(tmp_path / "split.csv")


@settings(deadline=None)
@given(
    st.dictionaries(
        st.text("ab[]*?:.#\"' ,", min_size=1).filter(lambda text: text.strip() == text),
        st.sampled_from(["train", "test"]),
        min_size=1,
    )
)
def test_a_list_of_names_is_taken_literally_whatever_characters_they_have(tmp_path_factory, wanted):
    path = tmp_path_factory.mktemp("split") / "split.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_ALL)
        file.write("place,split\n")
        writer.writerows(wanted.items())
    found = splits.assign(splits.Rules(path, tuple(wanted.items())), wanted)
    assert splits.read_split(path).lines == tuple(wanted.items())
    first = list(wanted)
    for number, name in enumerate(first):  # unless an earlier line is a pattern that matches it too
        if not any(set("*?[") & set(earlier) for earlier in first[:number]):
            assert found[name] == wanted[name]


def test_the_first_matching_line_decides_and_a_name_is_not_a_prefix(tmp_path):
    found = rules(tmp_path, "# facts\nplace,split\n\nimg[1].png,test\na*,test\nab,train\nb,test\n*,train\n")
    places = ["img[1].png", "img1.png", "a", "ab", "b", "bc"]
    assert [splits.assign(found, places)[place] for place in places] == ["test"] * 5 + ["train"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("a,train\n", "line 1: a split file begins with"),
        ("place,split\na,val\n", "line 2: expected a place and train or test"),
        ("place,split\n# x\na\n", "line 3: expected"),
        ("place,split\n,train\n", "line 2: expected"),
        ("place,split\na,train\na,test\n", "line 3: a is test, but train in line 2"),
        ("place,split\n", "has no lines"),
    ],
)
def test_mistakes_in_a_split_file_are_named(tmp_path, text, message):
    with pytest.raises(CatalogError, match=message):
        rules(tmp_path, text)


def test_another_rule_is_asked_for_by_file(tmp_path, capsys):
    root = tmp_path / "SEN12MS"
    patch(root, "ROIs1158_spring", 106, 1)
    patch(root, "ROIs1158_spring", 1, 1)
    assert run("catalog", root, "--layout", "sen12ms", "--split", tmp_path / "no.csv") == 78
    assert "no such split file" in capsys.readouterr().err
    (tmp_path / "split.csv").write_text("place,split\nROIs1158_spring_1_p*,test\n")
    assert run("catalog", root, "--layout", "sen12ms", "--split", tmp_path / "split.csv") == 78
    assert "ROIs1158_spring_106_p1" in capsys.readouterr().err and not (root / "places.csv").exists()
    (tmp_path / "split.csv").write_text("place,split\nROIs1158_spring_1_p*,test\n*,train\n")
    assert run("catalog", root, "--layout", "sen12ms", "--split", tmp_path / "split.csv") == 0
    places = read_catalog(root / "places.csv").places
    assert {name: rows[0].split for name, rows in places.items()} == {
        "ROIs1158_spring_1_p1": "test",
        "ROIs1158_spring_106_p1": "train",
    }


def test_a_label_map_is_one_named_band_of_its_file(tmp_path):
    values = patch(tmp_path, "ROIs1158_spring", 1, 1)
    folder = "ROIs1158_spring"
    image = {
        "sensor": "s2",
        "datetime": "2017-04-15",
        "path": f"{folder}/s2_1/{folder}_s2_1_p1.tif",
        "offset": "0",
        "bands": ",".join(SENSORS["s2"].bands),
    }
    cover = {"sensor": "label_map", "path": f"{folder}/lc_1/{folder}_lc_1_p1.tif"}
    options = build.Options(tile=SIDE, ratio=1, holdout=0.0)

    def built(bands, out):
        source = catalog(tmp_path, [image, cover | {"bands": bands}])
        meta, _ = build.build(source, tmp_path / out, options, progress=False)
        return records(tmp_path / out, "train")["a"], [entry["reason"] for entry in meta["report"]["refused"]]

    record, refused = built("-,-,land_use,-", "third")
    np.testing.assert_array_equal(record["label_map"], values["lc"][2])
    assert not refused
    for number, bands in enumerate(("", "one", "-,one")):
        record, [reason] = built(bands, f"d{number}")
        assert "4 bands: a label_map has one" in reason and "class,-,-,-" in reason
        assert (record["label_map"] == 255).all()
    with pytest.raises(CatalogError, match="must name one band"):
        built("a,b,-,-", "two")

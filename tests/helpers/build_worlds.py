"""A catalog of places made of GeoTIFFs, sound or damaged, and the options it is built with."""

import numpy as np

from skysense_jax.data.ingest import build as dataset_build
from tests.helpers.rasters import catalog, s2, write

OPTIONS = dataset_build.Options(tile=8, ratio=2, shard_places=2)


def world(root, places=6, seed=0):
    """A catalog of `places` places with S2 (two dates), S1 and HR, a label each; every third lacks S1."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(places):
        place, west = f"p{i:02d}", 300_000 + 1000 * i
        common = {"west": west}
        for day in ("2021-05-01", "2021-03-01"):
            name = write(root / place / f"s2_{day}.tif", rng.integers(100, 5000, (2, 8, 8)).astype(np.uint16), **common)
            rows.append(s2(f"{place}/{name.name}", day, place=place, bands="B04,B08"))
        if i % 3:
            write(root / place / "s1.tif", rng.uniform(-25, -5, (2, 8, 8)).astype(np.float32), **common)
            rows.append(
                {
                    "place": place,
                    "sensor": "s1",
                    "datetime": "2021-04-01",
                    "path": f"{place}/s1.tif",
                    "bands": "VV,VH",
                    "units": "db",
                }
            )
        write(root / place / "hr.tif", rng.integers(0, 256, (3, 16, 16)).astype(np.uint8), step=5, **common)
        rows.append({"place": place, "sensor": "hr", "path": f"{place}/hr.tif", "bands": "R,G,B"})
        rows.append({"place": place, "sensor": "label", "classes": ("even", "odd")[i % 2]})
    return rows


def damaged_world(tmp_path):
    """A catalog where one file is cut short behind its first pixels, one is text, one lies outside, one is missing."""
    root = tmp_path / "world"
    root.mkdir()
    rows = world(root)
    image = np.random.default_rng(1).integers(100, 5000, (2, 400, 400)).astype(np.uint16)
    cut = write(root / "p01" / "cut.tif", image, west=301_000, compress="deflate")
    rows.append(s2("p01/cut.tif", "2021-08-01", place="p01", bands="B04,B08"))
    data = cut.read_bytes()
    with cut.open("r+b") as file:  # a hole in the middle of the strips, where no sample window looks
        file.seek(int(len(data) * 0.3))
        file.write(b"\0" * int(len(data) * 0.1))
    (root / "p02" / "hr.tif").write_text("not a raster")
    (tmp_path / "outside.tif").write_bytes(b"")
    rows.append(s2("../outside.tif", "2021-08-01", place="p03", bands="B04"))
    rows.append(s2("p04/nothing.tif", "2021-08-01", place="p04", bands="B04"))
    rows.append(s2("p04/nothing.tif", "2021-08-01", place="lost", bands="B04"))
    return catalog(root, rows)

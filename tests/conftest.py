"""Environment of the suite: CPU, eight fake devices, quick compiles that are kept. Set before jax is imported."""

import gc
import os
import pathlib
import tempfile

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", os.path.join(tempfile.gettempdir(), f"skysense_jax_cache_{os.getuid()}")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# Nearly all the time of the suite was XLA's compiler. The tiny SkySense step takes 25 s of CPU to compile with a run's
# flags, 16 s without optimisation by LLVM, and 8 s where the older emitters write the fusions, without MLIR; the step
# itself then takes 0.12 s instead of 0.10 s. The processes that tests start inherit all of this.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false")
# Traces make millions of objects that live: the collector took 6% of the time.
gc.set_threshold(100_000, 20, 100)


LONGEST = (
    "test_resume.py",
    "test_processes.py",
    "test_sharding.py",
    "test_objective.py",
    "test_models.py",
    "test_msgfm_objective.py",
    "test_survival.py",
    "test_msgfm_mesh.py",
    "test_geo_model.py",
    "test_gs.py",
)
"""Files that take minutes, the longest first: none of them is left alone at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """LONGEST in front, everything else in its order."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
    """Folder with the parity cases and the real data; tests that need it are skipped where it is absent."""
    root = pathlib.Path(__file__).resolve().parents[1]
    folder = pathlib.Path(os.environ.get("SKYSENSE_SHARED", root.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(
            f"needs the shared reference folder (parity cases, real data), looked in {folder}; set SKYSENSE_SHARED"
        )
    return folder

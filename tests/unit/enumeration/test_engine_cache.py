"""Compiled kernels are served from a file system that nobody can write to."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from services.enumeration.warm import warm

ROOT = Path(__file__).parents[3]
# Root may write anywhere; without this capability the modes of files hold for root as well.
OBEY_MODES = ["setpriv", "--bounding-set=-dac_override", "--inh-caps=-dac_override"] if os.getuid() == 0 else []
pytestmark = pytest.mark.skipif(bool(OBEY_MODES) and shutil.which("setpriv") is None, reason="root without setpriv")
RUN = """
import sys
import numpy as np
from services.enumeration import engine, walk
walk.STREAMED_BYTES = 0  # that copies of large results go by as well
for kernel in walk.KERNELS:
    walk.KERNELS = (kernel,)
    for kind in (np.uint8, np.uint16):
        for tag_counts in ([2] * 3, [2, 2, 40_000]):
            for scores in (np.ones((50, 1)), np.full((50, 1), 0.3), np.full((50, 2), np.nan)):
                request = dict(min_count=5, max_depth=3)
                slices = engine.enumerate_slices(np.zeros((50, 3), kind), tag_counts, scores, **request)
                assert len(slices) == 7
            engine.error_slices(np.zeros((50, 3), kind), tag_counts, np.ones((50, 1)), margin=0.1, **request)
try:
    open("probe", "w")
except PermissionError:
    pass
else:
    raise SystemExit("the folder can be written to")
modules = [module for name, module in sys.modules.items() if name.startswith("services.enumeration.")]
compiled = {function for module in modules for function in vars(module).values() if hasattr(function, "stats")}
stats = [function.stats for function in compiled]
print(sum(sum(s.cache_hits.values()) for s in stats), sum(sum(s.cache_misses.values()) for s in stats))
"""


@pytest.fixture
def read_only_copy():
    """The service's code with its warm cache, in a folder that its user may read and not write."""
    warm()
    folder = Path(tempfile.mkdtemp())
    try:
        for part in ("services", "shared"):
            shutil.copytree(ROOT / part, folder / part)
        for path in [folder, *folder.rglob("*")]:
            path.chmod(0o555 if path.is_dir() else 0o444)
        yield folder
    finally:
        for path in [folder, *folder.rglob("*")]:
            if path.is_dir():
                path.chmod(0o755)
        shutil.rmtree(folder)


def run(folder: Path) -> tuple[int, int]:
    """Kernels that were read from the cache, and kernels that were compiled."""
    environment = {"PYTHONPATH": str(folder), "HOME": str(folder), "PATH": os.environ["PATH"]}
    done = subprocess.run(
        [*OBEY_MODES, sys.executable, "-c", RUN],
        env=environment, cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    hits, misses = map(int, done.stdout.split())
    return hits, misses


def test_a_warm_cache_is_read(read_only_copy):
    hits, misses = run(read_only_copy)
    assert hits >= 3 * 2 * 2  # a kernel for each type of codes and of items, at the least
    assert misses == 0


def test_what_cannot_be_stored_is_compiled_all_the_same(read_only_copy):
    """As on a processor other than the one the image was built on."""
    cache = read_only_copy / "services" / "enumeration" / "__pycache__"
    cache.chmod(0o755)
    for stored in cache.glob("encoding._add_to_items*.nb?"):
        stored.unlink()
    cache.chmod(0o555)
    _, misses = run(read_only_copy)
    assert misses == 2 * 2  # types of codes, and of scores

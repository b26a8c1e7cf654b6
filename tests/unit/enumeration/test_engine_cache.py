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
import numpy as np
from services.enumeration import engine, {module}
slices = engine.enumerate_slices(np.zeros((50, 3), np.uint8), [2] * 3, np.ones((50, 1)), min_count=5, max_depth=3)
assert len(slices) == 7
try:
    open("probe", "w")
except PermissionError:
    pass
else:
    raise SystemExit("the folder can be written to")
stats = {module}.{function}.stats
print(sum(stats.cache_hits.values()), sum(stats.cache_misses.values()))
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


def run(folder: Path, module: str, function: str) -> list[int]:
    environment = {"PYTHONPATH": str(folder), "HOME": str(folder), "PATH": os.environ["PATH"]}
    done = subprocess.run(
        [*OBEY_MODES, sys.executable, "-c", RUN.format(module=module, function=function)],
        env=environment, cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [int(number) for number in done.stdout.split()]


def test_a_warm_cache_is_read(read_only_copy):
    assert run(read_only_copy, "emission", "write") == [0, 0]  # called by compiled code, never compiled by itself
    hits, misses = run(read_only_copy, "encoding", "_add_to_items")
    assert (hits, misses) == (1, 0)
    hits, misses = run(read_only_copy, "joint_kernel", "fill")
    assert (hits, misses) == (1, 0)


def test_what_cannot_be_stored_is_compiled_all_the_same(read_only_copy):
    """As on a processor other than the one the image was built on."""
    cache = read_only_copy / "services" / "enumeration" / "__pycache__"
    cache.chmod(0o755)
    for stored in cache.glob("encoding._add_to_items*.nb?"):
        stored.unlink()
    cache.chmod(0o555)
    assert run(read_only_copy, "encoding", "_add_to_items") == [0, 1]

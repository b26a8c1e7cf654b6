import mmap
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from services.enumeration.allocator import as_it_fills, from_arrow

FAULTS = """
import resource
from services.enumeration.allocator import keep_freed_memory

keep_freed_memory()
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = [bytearray(b"1") * (12 << 20) for _ in range(3)]
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    del held
print(faults)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left as they are")
def test_memory_that_was_freed_is_used_again():
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1_000  # new to the process, 36 MB are 9,216 pages


@pytest.mark.parametrize("empty", [from_arrow, as_it_fills])
@pytest.mark.parametrize("shape", [(0,), (3, 0), (5,), (7, 4)])
@pytest.mark.parametrize("dtype", [np.int16, np.float64])
def test_arrays_are_of_the_shape_and_type_that_was_asked_for_and_can_be_written(empty, shape, dtype):
    made = empty(shape, dtype)
    assert made.shape == shape
    assert made.dtype == dtype
    made[...] = 3
    assert (made == 3).all()


@pytest.mark.parametrize("empty", [from_arrow, as_it_fills])
def test_what_no_memory_holds_is_a_memory_error(empty):
    with pytest.raises(MemoryError):
        empty((1 << 60,), np.uint8)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_pages_that_are_not_written_take_no_memory():
    def held() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    before = held()
    large = as_it_fills((1 << 30,), np.uint8)
    large[: 1 << 20] = 1
    assert held() - before < 8 << 20

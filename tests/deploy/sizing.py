"""`make sizing`: measures what one core does and what a million instances take; writes the table in docs/operations.md.

Speeds are per second of processor time, so that what else runs on the machine does not show.
"""

from __future__ import annotations

import io
import multiprocessing
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from deploy.images.build import ROOT
from services.attribute.catalogue import catalogue_measures, measured_attributes
from services.enumeration.engine import enumerate_slices
from services.enumeration.warm import warm
from services.tagging.measured import measured_codes
from shared.images.measures import measure
from shared.images.reader import ImageReader
from shared.schema import Attribute, Category, Schema, Tagger, Task
from shared.store.artifacts import TagTable, tag_table_of, tags_to_arrow
from shared.store.store import Store
from tests.load.shapes import paper_table

PAGE = ROOT / "docs" / "operations.md"
BEGIN, END = "<!-- sizing: begin -->", "<!-- sizing: end -->"
MILLION = 1_000_000


def per_cpu_second(work: Callable[[], int]) -> float:
    """How much of what `work` counts a second of processor time does."""
    started = time.process_time()
    done = work()
    return done / (time.process_time() - started)


def photos(width: int, height: int, kind: str, count: int) -> list[bytes]:
    """Encoded images of seeded gradients and noise, as heavy to decode as photos are."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(count):
        base = np.linspace(0, 200, width)[None, :, None] * rng.random((1, 1, 3)) + rng.normal(
            20, 12, (height, width, 3)
        )
        sink = io.BytesIO()
        Image.fromarray(base.clip(0, 255).astype(np.uint8)).save(sink, kind)
        found.append(sink.getvalue())
    return found


def images_per_core(width: int, height: int, kind: str, count: int) -> float:
    """Images that a core decodes, measures and tags in a second, every measured attribute of the catalogue."""
    encoded = photos(width, height, kind, 100)
    reader = ImageReader(("file:///",))
    names = catalogue_measures(Task.CLASSIFICATION, has_boxes=False)
    values = np.stack([measure(reader.decode(data, "photo"), None, names) for data in encoded])
    attributes = measured_attributes(values, names, Task.CLASSIFICATION, has_boxes=False)

    def work() -> int:
        for i in range(count):
            measured_codes([reader.decode(encoded[i % len(encoded)], "photo")], [None], attributes)
        return count

    return per_cpu_second(work)


def slices_per_core(depth: int) -> tuple[int, float]:
    """(slices of the paper's table, slices a second of one core), sums and output arrays included."""
    codes, tag_counts, scores = paper_table()
    found = 0

    def work() -> int:
        nonlocal found
        found = len(
            enumerate_slices(codes, tag_counts, scores, min_count=10, max_depth=depth, max_slices=30 * MILLION).count
        )
        return found

    work()
    return found, per_cpu_second(work)


def _peak(pipe: Any, depth: int) -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 5, (MILLION, 20), dtype=np.uint16)
    scores = rng.random((MILLION, 1))
    warm()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = _status("VmRSS")
    enumerate_slices(codes, [5] * 20, scores, min_count=10, max_depth=depth)
    pipe.send((_status("VmHWM") - before) * 1024 / 1e6)


def _status(field: str) -> int:
    """A figure of /proc/self/status, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{field}:")).split()[1])


def memory_mb(depth: int) -> float:
    """Memory beyond the table that an enumeration of a million instances with 20 attributes takes at the highest."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_peak, args=(theirs, depth))
    process.start()
    found: float = ours.recv()
    process.join()
    return found


def tag_table_mb() -> tuple[float, float]:
    """(codes in memory, file in the store) of a tag table of a million instances with 20 attributes, read back."""
    tags = tuple("abcde")
    schema = Schema(
        Task.CLASSIFICATION, (), tuple(Attribute(f"a{j}", Category.GLOBAL, tags, Tagger.VLM) for j in range(20))
    )
    rng = np.random.default_rng(0)
    codes = np.column_stack(
        [rng.choice(5, MILLION, p=[0.5, 0.2, 0.15, 0.1, 0.05]).astype(np.uint16) for _ in schema.attributes]
    )
    ids = pa.array([f"{i:06d}" for i in range(MILLION)])
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder).as_uri())
        store.write_table("tags.parquet", tags_to_arrow(TagTable(ids, codes, schema)))
        back = tag_table_of(store.read_table("tags.parquet"), schema)
        return back.codes.nbytes / 1e6, (Path(folder) / "tags.parquet").stat().st_size / 1e6


def page() -> str:
    warm()
    deep, fast = slices_per_core(3)
    deeper, slow = slices_per_core(4)
    in_memory, stored = tag_table_mb()
    rows = [
        (
            "photos (640 x 480, JPEG) that a worker tags, measured attributes",
            f"{images_per_core(640, 480, 'JPEG', 200):,.0f} a second and core",
        ),
        (
            "small images (28 x 28, PNG) that a worker tags, measured attributes",
            f"{images_per_core(28, 28, 'PNG', 3000):,.0f} a second and core",
        ),
        (
            f"slices found, 7,057 instances x 47 attributes, depth 3 ({deep:,} slices)",
            f"{fast / 1e6:,.1f} million a second and core",
        ),
        (f"the same, depth 4 ({deeper:,} slices)", f"{slow / 1e6:,.1f} million a second and core"),
        (
            "memory of an enumeration beyond its table, a million instances x 20 attributes, depth 2",
            f"{memory_mb(2):,.0f} MB",
        ),
        ("codes of a tag table in memory, a million instances x 20 attributes", f"{in_memory:,.0f} MB"),
        ("the same table in the store, with ids of six digits", f"{stored:,.0f} MB"),
    ]
    told = f"{platform.machine()}, Python {platform.python_version()}, {time.strftime('%Y-%m-%d')}"
    lines = [
        f"Written by `make sizing` ({told}); speeds are per second of processor time.",
        "",
        "| what | measured |",
        "|---|---|",
    ]
    return "\n".join([*lines, *(f"| {what} | {figure} |" for what, figure in rows)])


if __name__ == "__main__":
    text = PAGE.read_text()
    head, _, rest = text.partition(BEGIN)
    PAGE.write_text(f"{head}{BEGIN}\n{page()}\n{END}{rest.partition(END)[2]}")
    print(PAGE.read_text().partition(BEGIN)[2].partition(END)[0])

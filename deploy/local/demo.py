"""`make demo`: finds, explains and repairs the error slices of a real model, by the commands that a user types.

The platform runs embedded; a classifier is trained on 2,000 images of Fashion-MNIST, its real mistakes on the
validation images are debugged, pool images are picked, the classifier is trained again with them, and the test images
tell what that brought, beside a random draw of the same size.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
from PIL import Image
from rich.console import Console
from rich.table import Table

from deploy.local.demo_model import predict, train
from deploy.local.stack import Stack
from hibug2 import Client
from shared import logs

FOLDER = Path(".demo")
DATA = Path(__file__).parent / "demo_data" / "fashion_mnist.parquet"
BUDGET, SEED = 500, 0
MODEL, REPAIRED, RANDOM = "logreg", "logreg-hibug2", "logreg-random"
METHODS = {"original": "training images", "lowest_mean": "+ picks by slice", "random": "+ random draw"}
console = Console(highlight=False)


@dataclass(frozen=True)
class Split:
    """Images of one split: ids, (n, 28, 28) uint8 pixels, class names."""

    ids: list[str]
    images: npt.NDArray[np.uint8]
    labels: list[str]


def load() -> tuple[pa.Table, dict[str, Split]]:
    """The committed images, whole and by split."""
    table = pq.read_table(DATA)
    splits = {}
    for name in ("train", "validation", "pool", "test"):
        rows = table.filter(pc.equal(table.column("split"), name))
        images = np.stack([np.asarray(Image.open(BytesIO(png))) for png in rows.column("image").to_pylist()])
        splits[name] = Split(rows.column("id").to_pylist(), images, rows.column("label").to_pylist())
    return table, splits


def write_images(table: pa.Table, folder: Path) -> None:
    """Put the images that are debugged on disk, as a user's are, with a manifest. The pool has no labels."""
    shown = table.filter(pc.not_equal(table.column("split"), "train"))
    (folder / "images").mkdir(parents=True)
    paths = [f"images/{name}.png" for name in shown.column("id").to_pylist()]
    for path, png in zip(paths, shown.column("image").to_pylist(), strict=True):
        (folder / path).write_bytes(png)
    labels = pc.if_else(pc.equal(shown.column("split"), "pool"), "", shown.column("label").cast(pa.string()))
    columns = {"id": shown.column("id"), "uri": paths, "label": labels, "split": shown.column("split")}
    pa.csv.write_csv(pa.table(columns), folder / "manifest.csv")


def write_predictions(model: object, splits: dict[str, Split], names: list[str], path: Path) -> float:
    """Write what the model says about the splits `names` as CSV; returns its accuracy on the last of them."""
    ids: list[str] = []
    said: list[str] = []
    confidence: list[float] = []
    for name in names:
        labels, probabilities = predict(model, splits[name].images)
        ids += splits[name].ids
        said += labels
        confidence += probabilities.max(axis=1).tolist()
    pa.csv.write_csv(pa.table({"id": ids, "predicted": said, "confidence": confidence}), path)
    truth = splits[names[-1]].labels
    return float(np.mean([a == b for a, b in zip(said[-len(truth) :], truth, strict=True)]))


def command(*arguments: str, address: str) -> None:
    """Show and run one `hibug2` command; a failing one ends the demo."""
    console.print(f"\n[bold]$ hibug2 {' '.join(arguments)}[/bold]", soft_wrap=True)
    program = Path(sys.executable).parent / "hibug2"
    result = subprocess.run([program, *arguments], env={**os.environ, "HIBUG2_ADDRESS": address}, check=False)
    if result.returncode:
        sys.exit(result.returncode)


def with_picks(splits: dict[str, Split], picked: set[str]) -> object:
    """The model trained on the training images and the picked ones, which somebody has now labelled."""
    pool, base = splits["pool"], splits["train"]
    keep = np.array([name in picked for name in pool.ids])
    labels = base.labels + [label for label, kept in zip(pool.labels, keep, strict=True) if kept]
    return train(np.concatenate([base.images, pool.images[keep]]), labels)


def debug(address: str) -> None:
    """All that a user does, in their order."""
    table, splits = load()
    write_images(table, FOLDER)
    console.print(f"Training a classifier on {len(splits['train'].ids):,} images of Fashion-MNIST …")
    model = train(splits["train"].images, splits["train"].labels)
    before = write_predictions(model, splits, ["validation", "pool", "test"], FOLDER / "predictions.csv")
    console.print(f"It is right about {before:.1%} of the test images. Where, and why, does it fail?")

    command("dataset", "create", "fashion", "--images", str(FOLDER / "manifest.csv"), address=address)
    command("scores", "add", "fashion", MODEL, str(FOLDER / "predictions.csv"), address=address)
    command("run", "fashion", "--model", MODEL, "--budget", str(BUDGET), address=address)
    command("slices", "latest", "--limit", "10", address=address)
    command("predict", "latest", "--limit", "5", address=address)
    command("repair", "latest", "--limit", "5", address=address)

    console.print("\nTraining again with the picked images, and with a random draw of the same size …")
    with Client(address) as client:
        picks = {m: set(client.picks("latest", m).column("instance_id").to_pylist()) for m in ("lowest_mean", "random")}
    for name, method in ((REPAIRED, "lowest_mean"), (RANDOM, "random")):
        write_predictions(with_picks(splits, picks[method]), splits, ["test"], FOLDER / f"{name}.csv")
        command("scores", "add", "fashion", name, str(FOLDER / f"{name}.csv"), address=address)
    report = FOLDER / "report.html"
    compared = (f"{REPAIRED}=lowest_mean", f"{RANDOM}=random")
    options = [o for c in compared for o in ("--compare", c)]
    command("report", "latest", *options, "--out", str(report), address=address)
    show_repair(address)
    console.print(f"\nThe report: [bold]{report.resolve()}[/bold]")


def show_repair(address: str) -> None:
    """Test accuracy before and after, overall and in the slices that fail."""
    with Client(address) as client:
        outcomes = client.compare_repair("latest", {REPAIRED: "lowest_mean", RANDOM: "random"})
    table = Table(title="Accuracy on the test images", title_justify="left")
    for heading in ("trained on", "added", "overall", "in failing slices", "outside them"):
        table.add_column(heading, justify="left" if heading == "trained on" else "right")
    for row in outcomes.to_pylist():
        figures = ("–" if row[c] is None else f"{row[c]:.4f}" for c in ("overall_mean", "failing_mean", "other_mean"))
        table.add_row(METHODS.get(row["method"], row["method"]), f"{row['added_count']:,}", *figures)
    console.print(table)


async def main() -> None:
    started = time.monotonic()
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    logs.configure("warning")
    async with Stack(FOLDER, (FOLDER.resolve().as_uri(),)) as stack:
        await asyncio.to_thread(debug, f"http://{stack.address}")
    console.print(f"Done in {time.monotonic() - started:.0f} s.")


if __name__ == "__main__":
    asyncio.run(main())

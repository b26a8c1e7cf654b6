"""Makes `fashion_mnist.parquet`, the images of the demo, from Debian's package `dataset-fashion-mnist`.

    apt install dataset-fashion-mnist
    python -m deploy.local.demo_data.make

Run by whoever maintains the demo, not by the demo itself: its output is committed. The same seed gives the same
images, splits and labels; the bytes of the file may differ between versions of Pillow, zlib and pyarrow.
"""

from __future__ import annotations

import argparse
import gzip
import io
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

SOURCE = Path("/usr/share/datasets/fashion-mnist")
OUT = Path(__file__).with_name("fashion_mnist.parquet")
SEED = 20170825

CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip

# The first three are drawn from the 60,000 training images of Fashion-MNIST, the test split from its 10,000 test
# images. A small train split leaves the model something to learn from the pool.
SPLITS = {"train": 2000, "validation": 5000, "pool": 6000, "test": 4000}
TRAIN_PART = 60_000

# Deflate strategies (default, filtered, Huffman only, run length): which is smallest differs from image to image.
_STRATEGIES = (0, 1, 2, 3)


def read_idx(path: Path) -> npt.NDArray[np.uint8]:
    """The array of a gzipped idx file of unsigned bytes: images (n, 28, 28) or labels (n,)."""
    with gzip.open(path) as file:
        data = file.read()
    dimensions = data[3]
    shape = np.frombuffer(data, ">i4", count=dimensions, offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def png(image: npt.NDArray[np.uint8]) -> bytes:
    """`image` (h, w) as the smallest grey PNG that Pillow can be made to write."""
    picture = Image.fromarray(image)
    files = []
    for strategy in _STRATEGIES:
        file = io.BytesIO()
        picture.save(file, "PNG", compress_level=9, compress_type=strategy)
        files.append(file.getvalue())
    return min(files, key=len)


def choose(rng: np.random.Generator) -> dict[str, npt.NDArray[np.int64]]:
    """Positions of each split's images among all 70,000 (the test part follows the training part)."""
    train_part = rng.permutation(TRAIN_PART)
    bounds = np.cumsum([SPLITS["train"], SPLITS["validation"], SPLITS["pool"]])
    train, validation, pool, _ = np.split(train_part, bounds)
    test = TRAIN_PART + rng.permutation(10_000)[: SPLITS["test"]]
    return {"train": train, "validation": validation, "pool": pool, "test": test}


def table(source: Path) -> pa.Table:
    """One row an image: id, split, label, image (PNG bytes), by split and id."""
    images = np.concatenate([read_idx(source / f"{part}-images-idx3-ubyte.gz") for part in ("train", "t10k")])
    labels = np.concatenate([read_idx(source / f"{part}-labels-idx1-ubyte.gz") for part in ("train", "t10k")])
    ids: list[str] = []
    splits: list[str] = []
    names: list[str] = []
    files: list[bytes] = []
    for split, positions in choose(np.random.default_rng(SEED)).items():
        for position in np.sort(positions):
            ids.append(f"fashion-{position:05d}")
            splits.append(split)
            names.append(CLASSES[labels[position]])
            files.append(png(images[position]))
    return pa.table(
        {"id": ids, "split": splits, "label": names, "image": pa.array(files, pa.binary())},
        metadata={"source": "Fashion-MNIST, (c) 2017 Zalando SE, MIT licence", "seed": str(SEED)},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--source", type=Path, default=SOURCE, help="folder of the four idx.gz files")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    made = table(arguments.source)
    # zstd finds the header that all PNG files share, about a tenth of each; statistics of images serve nobody.
    pq.write_table(
        made,
        arguments.out,
        compression="zstd",
        compression_level=19,
        use_dictionary=["split", "label"],
        write_statistics=["id", "split", "label"],
    )
    print(f"{arguments.out}: {made.num_rows} images, {arguments.out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()

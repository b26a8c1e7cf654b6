import io

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from deploy.local import demo_model
from deploy.local.demo_data import make
from shared.errors import InvalidInput

Split = tuple[np.ndarray, list[str]]


@pytest.fixture(scope="module")
def splits() -> dict[str, Split]:
    found = {}
    for split, size in (("train", 800), ("validation", 1500)):
        rows = pq.read_table(make.OUT, filters=[("split", "=", split)]).slice(0, size)
        images = np.stack([np.asarray(Image.open(io.BytesIO(data))) for data in rows["image"].to_pylist()])
        found[split] = (images, rows["label"].to_pylist())
    return found


def test_it_learns_and_its_probabilities_say_what_it_predicts(splits: dict[str, Split]) -> None:
    images, labels = splits["validation"]
    model = demo_model.train(*splits["train"])
    predicted, probabilities = demo_model.predict(model, images)
    assert probabilities.shape == (len(images), 10)
    assert probabilities.dtype == np.float64
    np.testing.assert_allclose(probabilities.sum(axis=1), 1)
    assert predicted == [model.classes_[i] for i in probabilities.argmax(axis=1)]
    assert np.mean(np.array(predicted) == np.array(labels)) > 0.7


def test_it_is_steady(splits: dict[str, Split]) -> None:
    """The same images give the same model; their order moves hardly a prediction."""
    images, labels = splits["train"]
    first = demo_model.predict(demo_model.train(images, labels), splits["validation"][0])
    again = demo_model.predict(demo_model.train(images, labels), splits["validation"][0])
    assert first[0] == again[0]
    np.testing.assert_array_equal(first[1], again[1])
    order = np.random.default_rng(0).permutation(len(images))
    shuffled = demo_model.train(images[order], [labels[i] for i in order])
    moved = np.array(demo_model.predict(shuffled, splits["validation"][0])[0]) != np.array(first[0])
    assert moved.mean() < 0.01


@pytest.mark.parametrize(
    ("images", "labels", "field"),
    [
        (np.zeros((2, 28, 28), np.uint8), ["Bag"], "labels"),
        (np.zeros((2, 28, 28), np.uint8), ["Bag", "Bag"], "labels"),
        (np.zeros((2, 28, 28), np.float64), ["Bag", "Coat"], "images"),
        (np.zeros((2, 784), np.uint8), ["Bag", "Coat"], "images"),
        (np.zeros((0, 28, 28), np.uint8), [], "images"),
    ],
)
def test_what_cannot_be_trained_on_is_refused(images: np.ndarray, labels: list[str], field: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        demo_model.train(images, labels)
    assert refused.value.violations[0].field == field

"""CLIP, through open_clip (the extra `clip`): unit vectors of texts and images, near where one tells the other.

torch is imported when a model is loaded, and never before.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from shared.errors import Precondition

_TEXTS, _IMAGES = 256, 64  # at a time, so that what is held at once stays in the hundreds of MB
_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def weights_digest(weights: str) -> str:
    """What tells `weights` from others: a hash of the file where it is one, else the tag itself. Needs no torch.

    Precondition when it looks like a path and no file is there.
    """
    path = Path(weights)
    try:
        told = path.stat()
    except OSError as error:
        if path.suffix or len(path.parts) > 1:
            raise Precondition(f"the CLIP weights '{weights}' cannot be read here ({error}); mount the file") from error
        return weights
    return _file_digest(str(path), told.st_size, told.st_mtime_ns)


@lru_cache(maxsize=8)
def _file_digest(path: str, size: int, changed_ns: int) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:20]


class Clip:
    """A loaded model. Texts and images may be embedded from any thread."""

    def __init__(self, model: str, weights: str, device: str = "cpu") -> None:
        """Load `model` (open_clip's name of an architecture) with `weights` on `device` (torch's word for it).

        `weights` is the path of a .pt or .safetensors file, or one of open_clip's tags, which it fetches from the hub.
        Precondition when open_clip is not installed, or the model, its weights or the device cannot be had.
        """
        if not weights:
            raise Precondition(f"CLIP model '{model}' has no weights: give a file or one of open_clip's tags")
        try:
            import open_clip
            import torch
        except (ImportError, RuntimeError) as error:  # RuntimeError: torch and torchvision do not fit each other
            raise Precondition(
                f"open_clip cannot be imported ({error}): `pip install 'hibug2-platform[clip]'`, "
                "or do without a CLIP model"
            ) from error
        try:
            self._model = open_clip.create_model(model, pretrained=weights, device=device).eval()
            self._tokenize: Callable[[list[str]], Any] = open_clip.get_tokenizer(model)
            shown = open_clip.get_model_preprocess_cfg(self._model)
        except Exception as error:  # it raises whatever the hub, the file or the architecture made go wrong
            raise Precondition(
                f"CLIP model '{model}' with weights '{weights}' cannot be loaded on {device} ({error}); "
                "check the names, or give the path of a file with the weights"
            ) from error
        self._torch, self._device = torch, device
        side = shown["size"]
        self.side_px: int = side if isinstance(side, int) else max(side)  # an image is shown as a square of this side
        self._mean, self._std = (
            np.array(shown.get(name, usual), np.float32) for name, usual in (("mean", _CLIP_MEAN), ("std", _CLIP_STD))
        )
        self.name = f"open_clip/{model}@{Path(weights).name}"

    def texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Unit-norm rows (n, d) of n texts; what a text has beyond the model's context is cut off."""
        rows = [
            self._embedded(self._model.encode_text, self._tokenize(list(texts[start : start + _TEXTS])))
            # One batch even of nothing, so that the width is the model's.
            for start in range(0, max(len(texts), 1), _TEXTS)
        ]
        return _unit(np.concatenate(rows))

    def images(self, images: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        """Unit-norm rows (n, d) of n > 0 images, each (side_px, side_px, 3) uint8 RGB, as `squared` makes them."""
        rows = []
        for start in range(0, len(images), _IMAGES):
            pixels = np.stack(images[start : start + _IMAGES]).astype(np.float32) / np.float32(255)
            pixels = ((pixels - self._mean) / self._std).transpose(0, 3, 1, 2)
            batch = self._torch.from_numpy(np.ascontiguousarray(pixels))
            rows.append(self._embedded(self._model.encode_image, batch))
        return _unit(np.concatenate(rows))

    def _embedded(self, tower: Callable[[Any], Any], batch: Any) -> NDArray[np.float32]:
        with self._torch.inference_mode():
            rows: NDArray[np.float32] = tower(batch.to(self._device)).float().cpu().numpy()
        return rows


def squared(image: NDArray[np.uint8], side_px: int) -> NDArray[np.uint8]:
    """`image` (H, W, 3) uint8 as (side_px, side_px, 3): nothing is cut off or bent, what is missing is mid-grey."""
    height, width = image.shape[:2]
    scale = side_px / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    fitted = Image.fromarray(np.ascontiguousarray(image)).resize(size, Image.Resampling.BICUBIC)
    whole = Image.new("RGB", (side_px, side_px), tuple(round(255 * mean) for mean in _CLIP_MEAN))
    whole.paste(fitted, ((side_px - size[0]) // 2, (side_px - size[1]) // 2))
    return np.asarray(whole)


def _unit(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), np.float32)

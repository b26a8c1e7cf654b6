"""Text encoders: a unit vector for each text, near when the texts mean something near (paper 4.2)."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from shared.errors import Precondition, Violation, refuse


class TextEncoder(Protocol):
    """What tag substitution needs of an encoder."""

    @property
    def name(self) -> str:
        """Which encoder and which weights; kept with every prediction it was used for."""

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Unit-norm rows (n, d) for n texts; a text's row does not depend on its company (but for rounding).

        InvalidInput names the texts that are blank.
        """


class StaticEncoder:
    """The mean of fixed token vectors: small, without torch, and without the network.

    Reads the token vectors (32,000 x 256) and the tokenizer that the wheel `wordllama` ships. The wheel's own
    loader is not used: it may reach for the network.
    """

    _PACKAGE = "wordllama"
    _VECTORS = "wordllama/weights/l2_supercat_256.safetensors"
    _TOKENIZER = "wordllama/tokenizers/l2_supercat_tokenizer_config.json"
    _BATCH = 4096  # texts at a time, so that the token vectors held at once stay in the tens of MB

    def __init__(self) -> None:
        """Read the files; Precondition when they are not installed."""
        try:
            from safetensors.numpy import load_file
            from tokenizers import Tokenizer

            package = distribution(self._PACKAGE)
            vectors = load_file(Path(str(package.locate_file(self._VECTORS))))["embedding.weight"]
            self._tokenizer = Tokenizer.from_file(str(package.locate_file(self._TOKENIZER)))
        except (ImportError, PackageNotFoundError, OSError) as error:
            raise Precondition(
                f"the small text encoder cannot be read ({error}); install it with "
                "`pip install 'hibug2-platform[prediction]'`"
            ) from error
        self._vectors: NDArray[np.float32] = vectors.astype(np.float32)
        self.name = f"{self._PACKAGE}/l2_supercat_256@{package.version}"

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Unit-norm rows (n, 256) float32; letter case is ignored. InvalidInput names blank texts."""
        _refuse_blank(texts)
        out = np.empty((len(texts), self._vectors.shape[1]), np.float32)
        for start in range(0, len(texts), self._BATCH):
            # The tokenizer tells "Red" from "red"; a tag means the same either way.
            batch = [text.lower() for text in texts[start : start + self._BATCH]]
            tokens = [e.ids for e in self._tokenizer.encode_batch_fast(batch, add_special_tokens=False)]
            starts = np.cumsum([0, *map(len, tokens[:-1])])
            # The direction of the sum is that of the mean.
            out[start : start + len(batch)] = np.add.reduceat(self._vectors[np.concatenate(tokens)], starts)
        return _unit(out)


class ClipEncoder:
    """The text tower of a CLIP model, through open_clip (the extra `clip`)."""

    _BATCH = 256

    def __init__(self, model: str, pretrained: str) -> None:
        """Load `model` (open_clip's name of an architecture) with the weights `pretrained`.

        `pretrained` is the path of a .pt or .safetensors file, or one of open_clip's tags, which downloads.
        Precondition when open_clip is not installed, or the model or its weights cannot be had.
        """
        if not pretrained:
            raise Precondition(f"CLIP model '{model}' has no weights: give a file or one of open_clip's tags")
        try:
            import open_clip
            import torch
        except (ImportError, RuntimeError) as error:  # RuntimeError: torch and torchvision do not fit each other
            raise Precondition(
                f"open_clip cannot be imported ({error}): `pip install 'hibug2-platform[clip]'`, "
                "or use the small text encoder"
            ) from error
        try:
            self._model = open_clip.create_model(model, pretrained=pretrained).eval()
            self._tokenize = open_clip.get_tokenizer(model)
        except Exception as error:  # it raises whatever the hub, the file or the architecture made go wrong
            raise Precondition(
                f"CLIP model '{model}' with weights '{pretrained}' cannot be loaded ({error}); "
                "check both names, or give the path of a file with the weights"
            ) from error
        self._torch = torch
        self.name = f"open_clip/{model}@{Path(pretrained).name}"

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Unit-norm rows (n, d) float32, d as the model has it. InvalidInput names blank texts."""
        _refuse_blank(texts)
        batches: list[NDArray[np.float32]] = []
        with self._torch.inference_mode():
            # One batch even of nothing, so that the width is the model's.
            for start in range(0, max(len(texts), 1), self._BATCH):
                tokens = self._tokenize(list(texts[start : start + self._BATCH]))
                batches.append(self._model.encode_text(tokens).float().numpy())
        return _unit(np.concatenate(batches))


def _refuse_blank(texts: Sequence[str]) -> None:
    refuse(Violation(f"texts[{i}]", "is blank; give a text") for i, t in enumerate(texts) if not t.strip())


def _unit(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows

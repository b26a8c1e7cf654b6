"""Text encoders: a unit vector for each text, near when the texts mean something near (paper 3.2.2, 4.2)."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from shared.clip import Clip
from shared.errors import Precondition, Violation, refuse


class TextEncoder(Protocol):
    """What comparing texts needs of an encoder."""

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
                "`pip install 'hibug2-platform[text]'`"
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

    def __init__(self, model: str, pretrained: str) -> None:
        """Load `model` with the weights `pretrained`, as `shared.clip.Clip` does; raises as it does."""
        self._clip = Clip(model, pretrained)
        self.name = self._clip.name

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Unit-norm rows (n, d) float32, d as the model has it. InvalidInput names blank texts."""
        _refuse_blank(texts)
        return self._clip.texts(texts)


def _refuse_blank(texts: Sequence[str]) -> None:
    refuse(Violation(f"texts[{i}]", "is blank; give a text") for i, t in enumerate(texts) if not t.strip())


def _unit(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows

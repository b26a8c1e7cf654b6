"""How many tokens a request takes before anybody has counted them: what is likely, and what it cannot exceed."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from shared.llm.encoding import size_of

Detail = Literal["auto", "low", "high"]

_BYTES_A_TOKEN = 4  # of English and of JSON; other languages take more tokens, never more than their bytes
_OVERHEAD = 16  # tokens that a chat template puts around a message, and more
_HEADS = (4 * 1024, 64 * 1024)  # characters of a data URL within which an image says its size: mostly, and at most
_UNREADABLE = (2048, 2048)  # the size of an image that does not say it


class Patches(BaseModel):
    """An image costs `factor` tokens for each square of `patch` pixels, of which `most` are counted, and `base`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    patch: int = Field(28, ge=1)
    factor: float = Field(1.0, gt=0)
    most: int | None = Field(None, ge=1)
    base: int = Field(0, ge=0)

    def count(self, width: int, height: int, detail: Detail) -> int:
        """Tokens of an image of `width` x `height` pixels; `detail` changes nothing here."""
        squares = math.ceil(width / self.patch) * math.ceil(height / self.patch)
        return self.base + math.ceil(min(squares, self.most or squares) * self.factor)


class Tiles(BaseModel):
    """An image is fitted into 2048 x 2048 and to a short side of 768 pixels; each 512 x 512 of it costs `tile`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tile: int = Field(ge=1)
    base: int = Field(ge=0)

    def count(self, width: int, height: int, detail: Detail) -> int:
        """Tokens of an image of `width` x `height` pixels; of low detail only the base is paid."""
        if detail == "low":
            return self.base
        scale = min(1.0, 2048 / max(width, height), 768 / min(width, height))
        return self.base + self.tile * math.ceil(width * scale / 512) * math.ceil(height * scale / 512)


ImageRule = Patches | Tiles


class Tokens(NamedTuple):
    """Tokens of a text or request: the likely number, and one that no tokenizer exceeds."""

    likely: int
    most: int


def of_request(body: Mapping[str, Any], rule: ImageRule) -> Tokens:
    """Input tokens of the chat completion request `body`.

    A token stands for at least one byte of UTF-8 in every tokenizer in use, so the bytes of all text (messages and
    JSON schema) bound its tokens. Images are counted by their size in pixels and `rule`, the same in both figures.
    """
    size, images = 0, 0
    for part in _parts(body["messages"]):
        if part["type"] == "text":
            size += len(part["text"].encode())
        elif part["type"] == "image_url":
            shown = part["image_url"]
            images += rule.count(*_size(shown["url"]), shown.get("detail", "auto"))
    if "response_format" in body:
        size += size_of(body["response_format"])
    around = _OVERHEAD * (len(body["messages"]) + 1)
    return Tokens(math.ceil(size / _BYTES_A_TOKEN) + around + images, size + 2 * around + images)


def likely_tokens(text: str) -> int:
    """About how many tokens `text` is."""
    return math.ceil(len(text.encode()) / _BYTES_A_TOKEN)


def with_detail(messages: Sequence[Mapping[str, Any]], detail: Detail) -> list[dict[str, Any]]:
    """`messages` with their images asked for in `detail`; "auto" leaves what each says itself."""
    if detail == "auto":
        return [dict(message) for message in messages]
    changed: list[dict[str, Any]] = []
    for message in messages:
        content = message["content"]
        if isinstance(content, list):
            content = [
                {**part, "image_url": {**part["image_url"], "detail": detail}} if part["type"] == "image_url" else part
                for part in content
            ]
        changed.append({**message, "content": content})
    return changed


def _parts(messages: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    for message in messages:
        if isinstance(message["content"], str):
            yield {"type": "text", "text": message["content"]}
        else:
            yield from message["content"]


def _size(url: str) -> tuple[int, int]:
    """Width and height in pixels of the image in a data URL, read from its head."""
    data = url.partition(",")[2]
    for length in _HEADS:
        head = data[:length]
        try:
            with Image.open(io.BytesIO(base64.b64decode(head[: len(head) // 4 * 4]))) as image:
                return image.size
        except (OSError, ValueError, Image.DecompressionBombError):
            continue
    return _UNREADABLE

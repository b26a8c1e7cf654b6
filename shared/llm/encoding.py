"""Requests as JSON text. What is long in them, images and the schema of the answer, is put in as text that it is
already: to go through its characters again for each call took a fifth of a worker's time.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from shared.prompting import DataURL, Message

_MARK = uuid.uuid4().hex  # stands for a text that is put in afterwards; nobody else can know it, so no message holds it
_COMPACT = (",", ":")


class Form(dict[str, Any]):
    """A JSON schema that nobody changes once it is made, so that its texts are made once."""

    @cached_property
    def text(self) -> str:
        return json.dumps(self, ensure_ascii=False, separators=_COMPACT)

    @cached_property
    def ordered(self) -> str:
        """With all keys in order."""
        return json.dumps(self, ensure_ascii=False, separators=_COMPACT, sort_keys=True)

    @cached_property
    def size(self) -> int:
        """Bytes, as people write JSON."""
        return _bytes(self)


def encoded(body: Mapping[str, Any]) -> bytes:
    """The body of a chat completion request as JSON in UTF-8."""
    messages, long = _without_images(body["messages"])
    light = {**body, "messages": messages}
    wanted = body.get("response_format", {}).get("json_schema")
    if wanted and isinstance(wanted["schema"], Form):
        light["response_format"] = {**body["response_format"], "json_schema": {**wanted, "schema": _MARK}}
        long.append(wanted["schema"].text)
    return _filled(json.dumps(light, ensure_ascii=False, separators=_COMPACT), long)


def ordered(about: Sequence[str], request: Mapping[str, Any]) -> bytes:
    """`about` and `request` (with messages and schema) as a JSON list in UTF-8 with all keys in order: the same text
    for what is the same.
    """
    messages, long = _without_images(request["messages"])
    light = {**request, "messages": messages}
    if isinstance(request["schema"], Form):
        light["schema"] = _MARK
        long.append(request["schema"].ordered)
    return _filled(json.dumps([*about, light], sort_keys=True, ensure_ascii=False, separators=_COMPACT), long)


def size_of(response_format: Mapping[str, Any]) -> int:
    """Bytes of the JSON that tells an endpoint the form of the answer."""
    wanted = response_format.get("json_schema")
    if wanted and isinstance(wanted["schema"], Form):
        return _bytes({**response_format, "json_schema": {**wanted, "schema": 0}}) - 1 + wanted["schema"].size
    return _bytes(response_format)


def _without_images(messages: Sequence[Message]) -> tuple[list[Message], list[str]]:
    """The messages with a mark for each image, and the texts of the images, in the order of the marks."""
    light, images = [], []
    for message in messages:
        if isinstance(message["content"], list):
            parts = []
            for part in message["content"]:
                if part["type"] == "image_url" and isinstance(part["image_url"]["url"], DataURL):
                    images.append(f'"{part["image_url"]["url"]}"')
                    part = {**part, "image_url": {**part["image_url"], "url": _MARK}}
                parts.append(part)
            message = {**message, "content": parts}
        light.append(message)
    return light, images


def _filled(text: str, long: Sequence[str]) -> bytes:
    pieces = text.split(f'"{_MARK}"')
    filled = [part for pair in zip(pieces, long, strict=False) for part in pair]
    return "".join([*filled, pieces[-1]]).encode("utf-8", "replace")


def _bytes(value: Any) -> int:
    return len(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))

"""What an endpoint takes of the chat completions API: the strictest form first, then less."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any

from shared.llm.wire import Rejected
from shared.prompting import Message

_FORMAT_WORDS = re.compile(r"response_format|json_schema|json_object|schema|grammar|structured output", re.IGNORECASE)


class Format(IntEnum):
    """How the endpoint is told the form of the answer, strictest first."""

    JSON_SCHEMA = 0
    JSON_OBJECT = 1
    TEXT = 2


@dataclass(frozen=True)
class Request:
    """One question, in no dialect yet."""

    messages: Sequence[Message]
    schema: Mapping[str, Any]
    name: str
    temperature: float | None
    max_tokens: int | None


@dataclass(frozen=True)
class Dialect:
    """What an endpoint takes."""

    format: Format = Format.JSON_SCHEMA
    limit_name: str = "max_tokens"
    temperature: bool = True

    def body(self, request: Request, model: str) -> dict[str, Any]:
        """The body of the HTTP request that asks `request` of `model`."""
        body: dict[str, Any] = {"model": model, "messages": _told(request, self.format)}
        if self.format is Format.JSON_SCHEMA:
            wanted = {"name": request.name, "schema": request.schema, "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": wanted}
        elif self.format is Format.JSON_OBJECT:
            body["response_format"] = {"type": "json_object"}
        if request.max_tokens is not None:
            body[self.limit_name] = request.max_tokens
        if request.temperature is not None and self.temperature:
            body["temperature"] = request.temperature
        return body

    def simpler(self, error: Rejected, body: Mapping[str, Any]) -> Dialect | None:
        """What to speak next when `error` says that a part of `body` is not taken; None when it says something else."""
        if error.status not in (400, 404, 415, 422, 501):
            return None
        # Some endpoints send back the request, so a named parameter says more than the words, and the first words
        # more than the rest.
        said = error.param or error.message[:300]
        if "max_tokens" in body and "max_completion_tokens" in error.message:
            return replace(self, limit_name="max_completion_tokens")
        if "temperature" in body and "temperature" in said:
            return replace(self, temperature=False)
        if self.format is not Format.TEXT and _FORMAT_WORDS.search(said):
            return replace(self, format=Format(self.format + 1))
        return None


def _told(request: Request, form: Format) -> list[Message]:
    """The messages, and where the endpoint is not told the schema otherwise, the schema in the instructions."""
    if form is Format.JSON_SCHEMA:
        return list(request.messages)
    first, *rest = request.messages
    wish = "Answer with JSON alone. It must fit this JSON schema:\n" + json.dumps(request.schema, ensure_ascii=False)
    return [{**first, "content": f"{first['content']}\n\n{wish}"}, *rest]

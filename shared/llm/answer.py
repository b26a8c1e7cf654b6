"""What a language model answered: the JSON in it, what is wrong with it, what it cost."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NoReturn

from jsonschema import Draft202012Validator

from shared.errors import HiBug2Error

_THINKING = re.compile(r"\A\s*<think>.*?</think>", re.DOTALL)
_OPENING = re.compile(r"[{\[]")
_MAX_PROBLEMS = 20
_MAX_SHOWN = 200  # characters of one problem


@dataclass(frozen=True)
class Usage:
    """What was paid for: answered calls, and tokens as the endpoint counts them.

    `cached` counts answers that were there already and cost nothing. `amount` is in `currency`, None where no price
    is known; what lost calls may have cost is in the account alone.
    """

    calls: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cached: int = 0
    amount: float | None = None
    currency: str = ""

    def __add__(self, other: Usage) -> Usage:
        priced = [usage.amount for usage in (self, other) if usage.amount is not None]
        return Usage(
            self.calls + other.calls,
            self.input_tokens + other.input_tokens,
            self.output_tokens + other.output_tokens,
            self.cached + other.cached,
            sum(priced) if priced else None,
            self.currency or other.currency,
        )


@dataclass(frozen=True)
class Reply:
    """One answer: its `text`, the JSON `value` in it (None when there is none), the `usage` up to it."""

    text: str
    value: Any
    usage: Usage
    model: str  # as the endpoint calls what answered


@dataclass
class WrongAnswer(HiBug2Error):
    """The model answered, and the answer is of no use. `usage` was paid all the same.

    `value` is the last answer where it fits its JSON schema and only the caller's check found `problems`.
    """

    usage: Usage = field(default_factory=Usage)
    value: Any = None
    problems: tuple[str, ...] = ()

    code: ClassVar[str] = "DATA_LOSS"
    reason: ClassVar[str] = "WRONG_ANSWER"


class Refused(WrongAnswer):
    """The model or a filter before it declined to answer."""

    reason = "REFUSED"


class Truncated(WrongAnswer):
    """The answer was cut off at the limit of tokens."""

    reason = "TRUNCATED"


def extract_json(text: str) -> Any:
    """The JSON value that `text` is or holds (in a fence or between prose), None when it holds none.

    Of several the longest is taken: models show fragments before the whole. Thinking aloud is skipped.
    """
    text = _THINKING.sub("", text, count=1)
    try:
        return _DECODER.decode(text)
    except (ValueError, RecursionError):
        found = max(_embedded(text), key=lambda item: item[0], default=None)
        return None if found is None else found[1]


def _embedded(text: str) -> Iterator[tuple[int, Any]]:
    """(length, value) of each JSON object or array in `text`, outermost ones only."""
    at = 0
    while match := _OPENING.search(text, at):
        try:
            value, at = _DECODER.raw_decode(text, match.start())
            yield at - match.start(), value
        except ValueError:
            at = match.end()
        except RecursionError:  # no answer is a thousand levels deep, and trying each level takes for ever
            return


def _not_json(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_not_json)


def problems_of(value: Any, schema: Mapping[str, Any]) -> list[str]:
    """What in `value` does not fit `schema`, a line each, at most 20 lines of at most about 200 characters."""
    found: list[str] = []
    for error in Draft202012Validator(schema).iter_errors(value):
        found.append(f"{error.json_path}: {shortened(error.message)}")
        if len(found) == _MAX_PROBLEMS:
            break
    return found


def shortened(text: str, limit: int = _MAX_SHOWN) -> str:
    """`text`, or where it is longer than `limit` its start and end."""
    return text if len(text) <= limit else f"{text[: limit // 2]} … {text[-(limit // 2) :]}"


def listed(problems: Sequence[str]) -> str:
    """`problems` as they are shown to models and people."""
    shown = [f"- {problem}" for problem in problems[:_MAX_PROBLEMS]]
    if len(problems) > _MAX_PROBLEMS:
        shown.append(f"- and {len(problems) - _MAX_PROBLEMS} more")
    return "\n".join(shown)

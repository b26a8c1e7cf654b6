"""What a model costs: a dated table, and the estimate of a run before it."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from shared.errors import NotFound, Precondition, invalid
from shared.llm.tokens import Detail, ImageRule, Patches, of_request

NANO = 1_000_000_000  # amounts are summed as whole numbers of a billionth of the currency
_BUILT_IN = Path(__file__).with_name("prices.yaml")
_FIELD = "HIBUG2_LLM_PRICES"


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    input: float = Field(ge=0, le=1e6)
    output: float = Field(ge=0, le=1e6)
    cached_input: float | None = Field(None, ge=0, le=1e6)
    image: ImageRule = Patches()


class _Group(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    date: datetime.date
    currency: str = Field(pattern="^[A-Z]{3}$")
    models: dict[str, _Model]


@dataclass(frozen=True)
class Price:
    """What a model costs, in `currency` for a million tokens, as `source` said on `date`."""

    model: str
    currency: str
    input: float
    cached_input: float
    output: float
    image: ImageRule
    date: datetime.date
    source: str

    def nano(self, input_tokens: int, output_tokens: int, cached_input_tokens: int = 0) -> int:
        """Billionths of the currency for so many tokens, rounded up; the cached ones are among the input tokens."""
        cached = min(cached_input_tokens, input_tokens)
        of_each = (
            (input_tokens - cached, self.input),
            (cached, self.cached_input),
            (output_tokens, self.output),
        )
        return -(-sum(tokens * round(price * NANO) for tokens, price in of_each) // 1_000_000)


@dataclass(frozen=True)
class Estimate:
    """What calls will take, as far as can be said before them: likely input, and output as it was assumed."""

    calls: int
    input_tokens: int
    output_tokens: int
    amount: float
    currency: str

    def __add__(self, other: Estimate) -> Estimate:
        """Both together, in the currency of this one; a model has one."""
        return Estimate(
            self.calls + other.calls,
            self.input_tokens + other.input_tokens,
            self.output_tokens + other.output_tokens,
            self.amount + other.amount,
            self.currency,
        )


class Prices:
    """The table of prices."""

    def __init__(self, prices: Mapping[str, Price], where: str) -> None:
        self._prices = prices
        self._where = where

    @classmethod
    def load(cls, path: str | Path | None = None) -> Self:
        """The table in the file `path`, the one that comes with the code when it is None or empty.

        Raises NotFound when there is no such file and InvalidInput naming what is wrong with it.
        """
        source = Path(path) if path else _BUILT_IN
        try:
            groups = _GROUPS.validate_python(yaml.safe_load(source.read_text(encoding="utf-8")))
        except OSError as error:
            raise NotFound(f"the price table {source} cannot be read ({error.strerror}); correct {_FIELD}") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise invalid(_FIELD, f"{source} is not YAML: {error}") from error
        except ValidationError as error:
            first = error.errors()[0]
            at = ".".join(str(part) for part in first["loc"])
            raise invalid(_FIELD, f"{source}: {at or 'the table'}: {first['msg']}") from error
        prices: dict[str, Price] = {}
        for group in groups:
            for name, model in group.models.items():
                if name in prices:
                    raise invalid(_FIELD, f"{source}: the model '{name}' is listed twice")
                cached = model.input if model.cached_input is None else model.cached_input
                prices[name] = Price(
                    name, group.currency, model.input, cached, model.output, model.image, group.date, group.source
                )
        return cls(prices, "the table that comes with the code" if source == _BUILT_IN else str(source))

    def of(self, model: str) -> Price | None:
        """The price of the model of exactly this name, None when none is known."""
        return self._prices.get(model)

    def known(self, model: str) -> Price:
        """The price of `model`; Precondition that says how to give one when none is known."""
        price = self.of(model)
        if price is None:
            raise Precondition(
                f"no price is known for the model '{model}' in {self._where}, so its cost can be neither estimated "
                "nor capped; write a YAML file like shared/llm/prices.yaml that lists it and name the file in "
                f"{_FIELD}"
            )
        return price


def estimate(
    price: Price,
    calls: int,
    messages: Sequence[Mapping[str, Any]],
    *,
    output_tokens: int,
    schema: Mapping[str, Any] | None = None,
    image_px: Sequence[tuple[int, int]] = (),
    detail: Detail = "auto",
) -> Estimate:
    """What `calls` calls like `messages` will take when each is answered in `output_tokens`.

    `messages` is one rendered prompt without its images; `image_px` has the (width, height) in pixels of each image
    as it will be sent, resized. `schema` is the JSON schema of the answer, which is sent as well.
    """
    body: dict[str, Any] = {"messages": list(messages)}
    if schema is not None:
        body["response_format"] = schema
    images = sum(price.image.count(width, height, detail) for width, height in image_px)
    read, written = calls * (of_request(body, price.image).likely + images), calls * output_tokens
    return Estimate(calls, read, written, price.nano(read, written) / NANO, price.currency)


_GROUPS = TypeAdapter(list[_Group])

from __future__ import annotations

import base64
import io
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from shared.errors import InvalidInput, NotFound, Precondition
from shared.llm.answer import Usage
from shared.llm.prices import NANO, Prices, estimate
from shared.llm.tokens import Patches, Tiles, of_request, with_detail

TABLE = """
- source: a page of prices
  date: 2026-01-02
  currency: EUR
  models:
    small: {input: 0.10, cached_input: 0.01, output: 0.40, image: {patch: 32, factor: 1.5, most: 100}}
    large: {input: 2.50, output: 10, image: {tile: 170, base: 85}}
"""
ASKED = [{"role": "system", "content": "Say what you see."}, {"role": "user", "content": "What is it?"}]
SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}}
COUNTS = st.integers(0, 10**7)


@pytest.fixture
def prices(tmp_path):
    (tmp_path / "prices.yaml").write_text(TABLE)
    return Prices.load(tmp_path / "prices.yaml")


def url(width: int, height: int) -> str:
    out = io.BytesIO()
    Image.new("RGB", (width, height)).save(out, "JPEG")
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()


def shown(*sizes: tuple[int, int], detail: str = "auto") -> list[dict]:
    images = [{"type": "image_url", "image_url": {"url": url(*size), "detail": detail}} for size in sizes]
    return [ASKED[0], {"role": "user", "content": [{"type": "text", "text": "What is it?"}, *images]}]


def test_the_table_that_comes_with_the_code_is_whole():
    table = Prices.load()
    for name in ("gpt-4o", "gpt-5-mini", "gemini-2.5-flash", "claude-haiku-4-5"):
        price = table.known(name)
        assert 0 < price.cached_input <= price.input < price.output
        assert price.source
        assert price.date.year >= 2026


def test_a_file_takes_the_place_of_the_table(prices):
    price = prices.of("small")
    assert (price.currency, price.input, price.cached_input, price.output) == ("EUR", 0.1, 0.01, 0.4)
    assert price.image == Patches(patch=32, factor=1.5, most=100)
    assert prices.of("large").cached_input == 2.5  # no discount told
    assert prices.of("large").image == Tiles(tile=170, base=85)
    assert prices.of("gpt-4o") is None


@pytest.mark.parametrize("name", ["gpt-4o-2031-01-01", "small-2", "SMALL", ""])
def test_a_price_is_never_guessed(prices, name):
    assert prices.of(name) is None
    with pytest.raises(Precondition, match="HIBUG2_LLM_PRICES"):
        prices.known(name)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not YAML"),
        ("models: 1", "list"),
        (TABLE.replace("input: 0.10", "input: -1"), r"small\.input"),
        (TABLE.replace("output: 10,", ""), r"large\.output"),
        (TABLE.replace("cached_input", "cache_input"), "cache_input"),
        (TABLE.replace("EUR", "euro"), "currency"),
        (TABLE + TABLE.replace("large", "other"), "'small' is listed twice"),
    ],
)
def test_a_table_that_cannot_be_read_says_where(tmp_path, text, says):
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(InvalidInput, match=says) as caught:
        Prices.load(path)
    assert "wrong.yaml" in str(caught.value)
    with pytest.raises(NotFound, match="HIBUG2_LLM_PRICES"):
        Prices.load(tmp_path / "none.yaml")


@given(read=COUNTS, written=COUNTS, cached=COUNTS)
def test_a_cost_is_the_exact_one_rounded_up(read, written, cached):
    price = Prices.load().known("gpt-4.1-nano")
    cached = min(cached, read)
    exact = (read - cached) * Fraction("0.1") + cached * Fraction("0.025") + written * Fraction("0.4")
    exact *= Fraction(NANO, 10**6)
    assert exact <= price.nano(read, written, cached) < exact + 1


@given(st.text(), st.text(), st.lists(st.text(), max_size=3))
def test_no_tokenizer_needs_more_than_what_is_reserved(system, user, words):
    body = {
        "messages": [{"role": "system", "content": system}, {"role": "user", "content": user}],
        "response_format": {"enum": words},
    }
    tokens = of_request(body, Patches())
    assert tokens.most >= len((system + user + "".join(words)).encode()) >= 0
    assert tokens.likely <= tokens.most


@pytest.mark.parametrize(
    ("rule", "size", "detail", "count"),
    [
        (Tiles(tile=170, base=85), (512, 512), "high", 255),
        (Tiles(tile=170, base=85), (768, 768), "auto", 765),
        (Tiles(tile=170, base=85), (1024, 1024), "high", 765),  # 768 x 768
        (Tiles(tile=170, base=85), (2048, 4096), "high", 1105),  # 768 x 1536
        (Tiles(tile=170, base=85), (4096, 4096), "low", 85),
        (Patches(), (28, 28), "low", 1),
        (Patches(), (29, 28), "low", 2),
        (Patches(patch=32, factor=1.2), (1024, 1024), "auto", 1229),
        (Patches(patch=32, factor=1.62, most=1536), (4000, 4000), "auto", 2489),
        (Patches(base=80), (28, 28), "auto", 81),
    ],
)
def test_an_image_is_counted_as_its_provider_does(rule, size, detail, count):
    assert rule.count(*size, detail) == count
    without = of_request({"messages": shown()}, rule).likely
    if max(size) <= 2048:
        assert of_request({"messages": shown(size, detail=detail)}, rule).likely == without + count


def test_an_image_that_does_not_say_its_size_is_taken_for_a_large_one():
    messages = shown()
    messages[1]["content"].append({"type": "image_url", "image_url": {"url": "data:image/jpeg;base64,????"}})
    assert of_request({"messages": messages}, Patches()).most > 5000


@given(st.integers(0, 40_000))
@settings(max_examples=20, deadline=None)
def test_an_image_says_its_size_wherever_it_does(before):
    out = io.BytesIO()
    Image.new("RGB", (56, 280)).save(out, "JPEG", comment=bytes(before))
    url = "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()
    messages = shown()
    without = of_request({"messages": messages}, Patches()).likely
    messages[1]["content"].append({"type": "image_url", "image_url": {"url": url}})
    assert of_request({"messages": messages}, Patches()).likely == without + 2 * 10


def test_detail_is_set_in_a_copy():
    messages = shown((8, 8))
    low = with_detail(messages, "low")
    assert low[1]["content"][1]["image_url"]["detail"] == "low"
    assert messages[1]["content"][1]["image_url"]["detail"] == "auto"
    assert with_detail(messages, "auto") == messages


def test_an_estimate_is_calls_times_prompt_image_and_answer(prices):
    price = prices.known("large")
    one = estimate(price, 1, ASKED, output_tokens=100, schema=SCHEMA, image_px=[(512, 512)])
    body = {"messages": shown((512, 512)), "response_format": SCHEMA}
    assert one.input_tokens == pytest.approx(of_request(body, price.image).likely, abs=1)
    many = estimate(price, 5000, ASKED, output_tokens=100, schema=SCHEMA, image_px=[(512, 512)])
    assert (many.calls, many.input_tokens, many.output_tokens) == (5000, 5000 * one.input_tokens, 500_000)
    assert many.amount == pytest.approx((many.input_tokens * 2.5 + many.output_tokens * 10) / 1e6)
    assert many.currency == "EUR"
    low = estimate(price, 1, ASKED, output_tokens=100, schema=SCHEMA, image_px=[(512, 512)], detail="low")
    assert one.input_tokens - low.input_tokens == 170


def test_usage_adds_up_with_and_without_prices():
    priced = Usage(1, 10, 5, amount=0.25, currency="USD")
    assert sum([priced, Usage(1, 1, 1), Usage(cached=1)], Usage()) == Usage(2, 11, 6, 1, 0.25, "USD")
    assert (Usage() + Usage(1)).amount is None

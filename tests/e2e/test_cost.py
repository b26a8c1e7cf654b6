"""What a run costs: told before, capped while it runs, summed up after. The model is scripted, over real HTTP."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hibug2 import Client
from hibug2.errors import HiBug2Error, RunStopped
from hibug2.v1 import run_pb2, types_pb2
from tests.scripted_llm import ScriptedLLM

IMAGES = 40
PRICES = """
- source: this test
  date: 2026-01-01
  currency: EUR
  models:
    scripted: {input: 1.0, output: 10.0}
"""


@pytest.fixture
def few(images: Path) -> Path:
    """A manifest of a few validation images, and what a model says about them."""
    lines = (images / "manifest.csv").read_text().splitlines()
    chosen = [line for line in lines if "validation" in line][:IMAGES]
    (images / "forty.csv").write_text("\n".join([lines[0], *chosen]) + "\n")
    ids = {line.split(",")[0] for line in chosen}
    said = (images / "v1.csv").read_text().splitlines()
    (images / "forty-v1.csv").write_text("\n".join([said[0], *(s for s in said if s.split(",")[0] in ids)]) + "\n")
    return images


def begin(client: Client, few: Path) -> None:
    client.create_dataset("forty", few / "forty.csv")
    client.add_scores("forty", "v1", few / "forty-v1.csv")


def test_a_run_is_estimated_capped_and_resumed(start_platform: Callable[..., Any], few: Path, tmp_path: Path) -> None:
    (tmp_path / "prices.yaml").write_text(PRICES)
    with ScriptedLLM() as llm:
        settings = {"llm_base_url": llm.base_url, "llm_model": "scripted", "llm_prices": str(tmp_path / "prices.yaml")}
        with start_platform(few, settings=settings) as platform:
            with platform.client() as client:
                begin(client, few)
                before = client.estimate("forty")
                assert [s.kind for s in before.steps] == [run_pb2.STEP_KIND_SCHEMA, run_pb2.STEP_KIND_TAGGING]
                assert before.total.currency == "EUR"
                assert before.total.amount == pytest.approx(sum(s.cost.amount for s in before.steps))
                assert before.steps[1].cost.call_count == IMAGES
                assert not llm.calls

                whole = client.run("forty", "v1", depth=2, min_count=5, max_cost=1000.0).job.cost
                assert whole.currency == "EUR"
                assert whole.amount == pytest.approx(whole.input_token_count / 1e6 + whole.output_token_count / 1e5)
                assert whole.call_count == len(llm.calls)
                assert not client.estimate("forty").steps  # the schema and the tags are there

            with platform.client(team="others") as client:
                llm.reset()
                begin(client, few)
                cap = whole.amount * 0.8
                with pytest.raises(RunStopped) as stopped:
                    client.run("forty", "v1", depth=2, min_count=5, max_cost=cap)
                paused = stopped.value.run
                assert paused.job.state == types_pb2.JOB_STATE_PAUSED
                assert 0 < paused.job.cost.amount <= cap
                assert str(round(cap, 2)) in paused.job.message
                client.resume(paused, max_cost=1000.0)
                *_, ended = client.watch(paused)
                assert ended.job.state == types_pb2.JOB_STATE_SUCCEEDED
                # What was paid before the pause was not paid again.
                assert len(llm.calls) == whole.call_count


def test_a_model_without_a_price_is_not_guessed(start_platform: Callable[..., Any], few: Path) -> None:
    with ScriptedLLM() as llm:
        settings = {"llm_base_url": llm.base_url, "llm_model": "scripted"}
        with start_platform(few, settings=settings) as platform, platform.client() as client:
            begin(client, few)
            with pytest.raises(HiBug2Error, match="no price is known for the model 'scripted'"):
                client.estimate("forty")
            with pytest.raises((HiBug2Error, RunStopped), match="no price is known"):
                client.run("forty", "v1", depth=2, min_count=5, max_cost=1.0)
            assert not llm.calls


@pytest.mark.parametrize("cap", [0.0, -1.0, float("nan"), 1e9])
def test_a_cap_that_is_none_is_refused(client: Client, images: Path, cap: float) -> None:
    with pytest.raises(HiBug2Error) as caught:
        client.run("nowhere", "m", max_cost=cap)
    assert caught.value.code in ("INVALID_ARGUMENT", "NOT_FOUND")

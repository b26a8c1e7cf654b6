"""Combinations from a language model over real HTTP: what is asked, what is taken, and what goes wrong."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from services.prediction.instruction import (
    MAX_ASKED,
    Instructed,
    Tally,
    ask_combinations,
    confusions,
    load_questions,
)
from shared.errors import HiBug2Error, InvalidInput, NotFound, Precondition, Unavailable
from shared.llm import LLM, LLMSettings, WrongAnswer, retry
from shared.prompting import prompts_root
from shared.schema import MAIN_OBJECT, Attribute, Category, Schema, Tagger, Task
from tests import scripted_answers
from tests.scripted_llm import MODEL, Fault, ScriptedLLM

pytestmark = pytest.mark.timeout(60)

QUESTIONS = {task: load_questions(prompts_root(), task.value) for task in Task}
ATTRIBUTES = (
    Attribute("fur color", Category.MAIN_OBJECT, ("brown", "White", "black"), Tagger.VLM),
    Attribute("place", Category.BACKGROUND, ("forest", "zoo", "house", "not visible"), Tagger.VLM),
    Attribute("is it raining", Category.GLOBAL, ("yes", "no"), Tagger.VLM),
)
CLASSES = ("bear", "cat", "dog")
OFFSET = len(CLASSES)  # of "fur color"


def schema_of(task: Task = Task.CLASSIFICATION, *, with_class: bool = True, main_objects=CLASSES) -> Schema:
    given = Attribute(MAIN_OBJECT, Category.MAIN_OBJECT, tuple(main_objects), Tagger.GIVEN)
    return Schema(task, tuple(main_objects), (given, *ATTRIBUTES) if with_class else ATTRIBUTES)


@pytest.fixture(scope="module")
def running() -> Iterator[ScriptedLLM]:
    with ScriptedLLM() as started:
        yield started


@pytest.fixture
def server(running: ScriptedLLM) -> ScriptedLLM:
    running.reset()
    return running


async def ask(
    server: ScriptedLLM,
    task: Task = Task.CLASSIFICATION,
    *,
    timeout_s: float = 10,
    max_attempts: int = 2,
    **changed: Any,
) -> Instructed:
    given: dict[str, Any] = {
        "questions": QUESTIONS[task],
        "schema": schema_of(task),
        "pair_count": 3,
        "is_unseen": lambda items: True,
        "known_confusions": [("bear", "cat"), ("cat", "dog"), ("dog", "cat")],
    } | changed
    told = {"base_url": server.base_url, "model": MODEL, "timeout_s": timeout_s, "max_attempts": max_attempts}
    async with LLM(LLMSettings.model_validate(told)) as llm:
        return await ask_combinations(llm, **given)


def answering(monkeypatch: pytest.MonkeyPatch, *answers: Any) -> None:
    """The model gives `answers` in their order, the last one again and again; a callable gets the request."""
    left = list(answers)

    def reply(body: dict[str, Any], *_: Any) -> Any:
        answer = left.pop(0) if len(left) > 1 else left[0]
        return answer(body) if callable(answer) else answer

    replies = [(words, reply if "where" in words else other) for words, other in scripted_answers._REPLIES]
    monkeypatch.setattr(scripted_answers, "_REPLIES", replies)


def combination(**tags: str) -> dict[str, Any]:
    return {"pairs": [{"attribute": name.replace("_", " "), "tag": tag} for name, tag in tags.items()]}


def asked(server: ScriptedLLM, i: int = -1) -> str:
    return str([m for m in server.calls[i].body["messages"] if m["role"] == "user"][-1]["content"])


def is_valid(found: Instructed, schema: Schema, pairs: int) -> None:
    attribute_of = [a for a, attribute in enumerate(schema.attributes) for _ in attribute.tags]
    assert found.items.shape == (len(found), pairs)
    assert len({tuple(row) for row in found.items.tolist()}) == len(found)
    for row in found.items.tolist():
        assert row == sorted(row)
        assert len({attribute_of[item] for item in row}) == pairs
    assert (np.diff(found.score) <= 0).all()


async def test_each_class_is_asked_about_with_what_it_is_taken_for(server: ScriptedLLM) -> None:
    told: list[tuple[int, int]] = []
    found = await ask(server, tell=lambda tally: told.append((tally.done, tally.total)))
    is_valid(found, schema_of(), 3)
    assert len(server.calls) == found.usage.calls == found.question_count == 3
    texts = [asked(server, i) for i in range(3)]
    for main_object, target in (("bear", "cat"), ("cat", "dog"), ("dog", "cat")):
        assert any(f"Main object: {main_object}\nIs taken for: {target}\n" in text for text in texts)
    # The class is one of the three pairs, so two are asked for.
    assert all("Pairs in each combination: 2\n" in text and "main object" not in text.lower()[:30] for text in texts)
    assert "- place (background): forest | zoo | house | not visible\n" in texts[0]
    assert {int(row[0]) for row in found.items} == {0, 1, 2}
    targets = dict(zip(found.items[:, 0].tolist(), found.target, strict=True))
    assert targets == {0: "cat", 1: "dog", 2: "cat"}
    assert told[-1] == (3, 3)


async def test_what_is_taken_for_what_is_asked_where_no_predictions_tell(server: ScriptedLLM) -> None:
    found = await ask(server, known_confusions=[("cat", "dog")])
    assert len(server.calls) == found.usage.calls == 4
    assert found.question_count == 3
    assert "All classes of the dataset: bear; cat; dog\nAsked about: bear; dog" in asked(server, 0)
    assert set(found.target) == {"toy bear", "dog", "toy dog"}


@pytest.mark.parametrize("task", [Task.DETECTION, Task.POSE])
async def test_other_tasks_ask_of_each_main_object_in_their_own_words(server: ScriptedLLM, task: Task) -> None:
    found = await ask(server, task)
    is_valid(found, schema_of(), 3)
    assert len(server.calls) == 3
    told = {call.body["messages"][0]["content"] for call in server.calls}
    assert len(told) == 1
    assert ("box" if task is Task.DETECTION else "joints") in told.pop()
    assert all("Is taken for" not in asked(server, i) for i in range(3))
    assert set(found.target) == {""}


async def test_without_the_class_as_attribute_all_pairs_are_asked_for(server: ScriptedLLM) -> None:
    schema = schema_of(Task.POSE, with_class=False, main_objects=["person"])
    found = await ask(server, Task.POSE, schema=schema, pair_count=2)
    is_valid(found, schema, 2)
    assert "Main object: person\nPairs in each combination: 2\n" in asked(server)
    found = await ask(server, Task.POSE, schema=schema_of(Task.POSE, with_class=False, main_objects=[]), pair_count=2)
    assert "Main object: object\n" in asked(server)


async def test_questions_and_results_are_bounded(server: ScriptedLLM) -> None:
    found = await ask(server, max_questions=2, max_per_class=3)
    assert len(server.calls) == found.question_count == 2
    assert "Give 6 combinations" in asked(server)
    classes = found.items[:, 0].tolist()
    assert {c: classes.count(c) for c in classes} == {0: 3, 1: 3}
    assert len(await ask(server, max_predictions=4)) == 4
    await ask(server, max_per_class=500)
    assert f"Give {MAX_ASKED} combinations" in asked(server)


async def test_a_combination_that_does_not_fit_is_sent_back_once_with_what_is_wrong(
    server: ScriptedLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = combination(fur_color="white", place="zoo")
    bad = [
        combination(fur_color="pink", place="zoo"),
        combination(fur_color="black", cage="iron"),
        combination(fur_color="black"),
        {"pairs": combination(place="zoo")["pairs"] * 2},
        combination(main_object="cat", place="zoo"),
        good,
        {"pairs": list(reversed(good["pairs"]))},
    ]
    answering(monkeypatch, {"combinations": [*bad, good]})
    found = await ask(server, known_confusions=[("bear", "cat")], max_questions=1)
    assert len(server.calls) == found.usage.calls == 2
    correction = asked(server)
    for text in (
        "combination 1 names 'pink', which is no tag of 'fur color'",
        "combination 2 names 'cage', which is no attribute of the list",
        "combination 3 has 1 pairs; give exactly 2",
        "combination 4 has 'place' twice",
        "combination 5 names 'main object'",
    ):
        assert text in correction
    # The tag is "White": case does not matter.
    assert found.items.tolist() == [[0, OFFSET + 1, OFFSET + 4]]
    assert found.dropped == {
        "unknown tag": 1,
        "unknown attribute": 2,
        "another number of pairs": 1,
        "an attribute twice": 1,
        "named before": 2,
    }


async def test_a_corrected_answer_leaves_nothing_out(server: ScriptedLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {"combinations": [combination(fur_color="pink", place="zoo")]}
    right = {
        "combinations": [combination(fur_color="black", place="zoo"), combination(place="house", fur_color="brown")]
    }
    answering(monkeypatch, wrong, right)
    found = await ask(server, known_confusions=[("bear", "cat")], max_questions=1)
    assert len(server.calls) == 2
    assert found.dropped == {}
    assert found.items.tolist() == [[0, 5, 7], [0, 3, 8]]
    assert found.score.tolist() == [1.0, 0.5]


async def test_what_is_known_is_no_prediction(server: ScriptedLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    known, fresh = combination(fur_color="black", place="zoo"), combination(fur_color="black", place="house")
    answering(monkeypatch, {"combinations": [known, fresh]})
    given: dict[str, Any] = {"known_confusions": [("bear", "cat")], "max_questions": 1}
    found = await ask(server, is_unseen=lambda items: 7 not in items, **given)
    assert found.items.tolist() == [[0, 5, 8]]
    assert found.dropped == {"known already": 1}
    assert len(server.calls) == 1  # there is something of use, so nothing is sent back
    server.reset()
    found = await ask(server, is_unseen=lambda items: False, **given)
    assert len(found) == 0
    assert found.dropped == {"known already": 2}
    assert len(server.calls) == 2
    assert "none of the combinations is new" in asked(server)


async def test_a_combination_that_several_answers_name_counts_for_more(
    server: ScriptedLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared, own = combination(fur_color="black", place="zoo"), combination(fur_color="brown", place="house")

    def reply(body: dict[str, Any]) -> Any:
        first = "Is taken for: cat" in body["messages"][-1]["content"]
        return {"combinations": [own, shared] if first else [shared]}

    answering(monkeypatch, reply)
    found = await ask(server, known_confusions=[("bear", "cat"), ("bear", "dog")], max_questions=4)
    bears = [(row, score) for row, score in zip(found.items.tolist(), found.score, strict=True) if row[0] == 0]
    assert bears == [([0, 5, 7], 1.5), ([0, 3, 8], 1.0)]


CONTENT = [
    *(Fault.EMPTY, Fault.CUT_JSON, Fault.PROSE, Fault.MISSING, Fault.RENAMED, Fault.FOREIGN_TAG, Fault.WRONG_TYPES),
    *(Fault.DUPLICATE, Fault.MANY_TAGS),
]
FINAL = [Fault.REFUSAL, Fault.TRUNCATED]
PASSING = [
    *(Fault.RATE_LIMIT, Fault.RATE_LIMIT_RETRY_AFTER, Fault.SERVER_ERROR, Fault.GATEWAY_TIMEOUT),
    *(Fault.CUT_CONNECTION, Fault.NO_CHOICES),
]


@pytest.mark.parametrize("fault", [*CONTENT, *FINAL, *PASSING])
@pytest.mark.parametrize("at", [0, 1])
async def test_whatever_goes_wrong_once_the_predictions_are_valid_and_calls_are_counted(
    server: ScriptedLLM, fault: Fault, at: int
) -> None:
    tallies: list[Tally] = []
    server.skip(at)
    server.fail(fault)
    # One of the three questions is about targets.
    found = await ask(server, known_confusions=[("bear", "cat")], max_questions=2, tell=tallies.append)
    is_valid(found, schema_of(), 3)
    assert len(found) > 0
    answered = [
        call for call in server.calls if call.status == 200 and call.fault not in (Fault.HTML, Fault.CUT_CONNECTION)
    ]
    assert found.usage.calls == len(answered)
    assert tallies[-1].done == tallies[-1].total == 3


@pytest.mark.parametrize("fault", [Fault.HANG, Fault.DRIP])
async def test_an_endpoint_that_does_not_answer_in_time_is_asked_again_and_then_given_up(
    server: ScriptedLLM, fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "_backoff", lambda _: 0.01)
    given: dict[str, Any] = {"known_confusions": [("bear", "cat")], "max_questions": 1}
    server.fail(fault)
    found = await ask(server, timeout_s=1, max_attempts=6, **given)
    is_valid(found, schema_of(), 3)
    assert len(found) > 0
    assert found.usage.calls < len(server.calls)
    server.fail(*[fault] * 20)
    with pytest.raises(Unavailable):
        await ask(server, timeout_s=0.2, **given)


async def test_a_cancel_is_heard_in_mid_question(server: ScriptedLLM) -> None:
    server.fail(*[Fault.HANG] * 20)
    asked = asyncio.create_task(ask(server))
    await asyncio.to_thread(server.arrived.wait, 10)
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(asked, 5)
    assert 1 <= len(server.calls) <= 3


@pytest.mark.parametrize("fault", FINAL)
async def test_no_answer_of_use_is_an_error_that_says_what_was_spent(server: ScriptedLLM, fault: Fault) -> None:
    server.fail(*[fault] * 6)
    with pytest.raises(WrongAnswer, match=r"no answer of use to 3 questions.*stronger model") as caught:
        await ask(server)
    assert caught.value.usage.calls == len(server.calls) == 3


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (Fault.BAD_KEY, Precondition),
        (Fault.QUOTA, Precondition),
        (Fault.NO_MODEL, Precondition),
        (Fault.HTML, Precondition),
        (Fault.SERVER_ERROR, Unavailable),
    ],
)
async def test_an_endpoint_that_does_not_serve_is_a_clear_error(
    server: ScriptedLLM, fault: Fault, error: type[HiBug2Error]
) -> None:
    server.fail(*[fault] * 20)
    with pytest.raises(error) as caught:
        await ask(server)
    assert "secret" not in str(caught.value)


def test_confusions_are_counted_by_class_the_most_frequent_first() -> None:
    labels = ["bear"] * 6 + ["cat"] * 3 + ["dog", None, "dog"]
    predicted = ["cat", "cat", "dog", "owl", "owl", "bear", "dog", "dog", "dog", "dog", "cat", None]
    assert confusions(labels, predicted, 1) == [("cat", "dog"), ("bear", "cat")]
    assert confusions(labels, predicted, 2) == [("cat", "dog"), ("bear", "cat"), ("bear", "owl")]
    assert confusions([], [], 2) == []


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"max_questions": 0}, "max_questions"),
        ({"max_per_class": 0}, "max_per_class"),
        ({"pair_count": 1}, "pair_count"),
        ({"pair_count": 5}, "3 attributes to combine"),
    ],
)
async def test_bad_input_asks_nothing(server: ScriptedLLM, given: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidInput, match=text):
        await ask(server, **given)
    assert server.calls == []


def test_a_task_is_what_its_files_say(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no prompt prediction/combinations"):
        load_questions(tmp_path, "pose")
    folder = tmp_path / "prediction"
    folder.mkdir()
    text = "---\nrevision: 1\ndescription: x\n---\nSay.\n\n## Input\n\nx\n"
    (folder / "combinations.md").write_text(text)
    with pytest.raises(InvalidInput, match=r"combinations\.schema\.json"):
        load_questions(tmp_path, "pose")
    for name in ("combinations", "targets"):
        (folder / f"{name}.md").write_text(text)
        (folder / f"{name}.schema.json").write_text(json.dumps({"type": "object"}))
    assert load_questions(tmp_path, "pose").targets is None
    (folder / "targets.pose.md").write_text("---\nrevision: 1\ndescription: x\n---\n")
    assert set(load_questions(tmp_path, "pose").digests) == {"prediction/combinations", "prediction/targets"}

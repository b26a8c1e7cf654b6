"""A schema from a language model over real HTTP: every stage of the process, and what goes wrong in each."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from services.attribute.interview import Tally
from services.attribute.normalise import USER, Candidate
from services.attribute.proposal import Limits, Proposal, propose_schema
from services.attribute.questions import load_questions
from services.attribute.sample import Sample, take_sample
from services.gateway.datasets import check_instances
from shared.errors import HiBug2Error, InvalidInput, NotFound, Precondition, Unavailable
from shared.images.reader import ImageReader
from shared.llm import LLM, LLMSettings, Refused, Truncated, WrongAnswer, retry
from shared.prompting import prompts_root
from shared.schema import Attribute, Category, Measure, Tagger, Task, check_schema
from shared.text import StaticEncoder
from tests.scripted_llm import MODEL, Fault, ScriptedLLM

pytestmark = pytest.mark.timeout(60)

PROMPTS = prompts_root()
QUESTIONS = {task: load_questions(PROMPTS, task.value) for task in Task}
ENCODER = StaticEncoder()
BRIGHTNESS = Attribute(
    "brightness", Category.GLOBAL, ("dark", "bright"), Tagger.MEASURED, measure=Measure("brightness", (0.5,))
)
FEW = Limits(pair_count=2, patience=1, image_count=3, confusion_count=2)
STAGES = {
    "direct": "You list the visual attributes",
    "confusion": "You know how vision models fail. A model takes",
    "comparison": "You compare two images",
    "selfcheck": "You check a list",
    "tags": "You write the tags",
    "look": "You look at one image",
    "settle": "You bring lists of tags",
}


@pytest.fixture(scope="module")
def running() -> Iterator[ScriptedLLM]:
    with ScriptedLLM() as started:
        yield started


@pytest.fixture
def server(running: ScriptedLLM) -> ScriptedLLM:
    running.reset()
    return running


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    """Twelve small images of two classes, from smooth and dark to rough and bright."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(12):
        rough = rng.integers(0, 20 * i + 1, (24, 24, 3)) + 8 * i
        Image.fromarray(np.clip(rough, 0, 255).astype(np.uint8)).save(folder / f"{i}.png")
    table = pa.table(
        {
            "instance_id": [f"i{i}" for i in range(12)],
            "image_uri": [f"{folder.as_uri()}/{i}.png" for i in range(12)],
            "label": ["bag", "coat"] * 6,
        }
    )
    instances = check_instances(table, Task.CLASSIFICATION)
    scores = np.array([1.0, 0.0, 0.0, 1.0] * 3)
    return take_sample(instances, np.arange(12), ["brightness", "noise"], ImageReader((folder.as_uri(),)), scores)


def client(server: ScriptedLLM, **changed: object) -> LLM:
    settings = {"base_url": server.base_url, "model": MODEL, "timeout_s": 10, "max_attempts": 3}
    return LLM(LLMSettings.model_validate(settings | changed))


async def propose(
    server: ScriptedLLM, task: Task = Task.CLASSIFICATION, model: LLM | None = None, **changed: Any
) -> Proposal:
    """What comes of `model`, one of its own by default, with everything else as in `changed`."""
    given: dict[str, Any] = {
        "questions": QUESTIONS[task],
        "main_objects": ["bag", "coat"],
        "encoder": ENCODER,
        "confusions": [("bag", "coat")],
        "limits": FEW,
    }
    if model is not None:
        return await propose_schema(model, task=task, **(given | changed))
    async with client(server) as own:
        return await propose_schema(own, task=task, **(given | changed))


def stages(server: ScriptedLLM) -> list[str]:
    """The stage of each call, in the order in which they came."""
    found = []
    for call in server.calls:
        told = call.body["messages"][0]["content"]
        found.append(next((stage for stage, words in STAGES.items() if told.startswith(words)), "another"))
    return found


def first(server: ScriptedLLM, stage: str) -> str:
    """What the user said in the first call of `stage`."""
    content = server.calls[stages(server).index(stage)].body["messages"][-1]["content"]
    return content if isinstance(content, str) else content[0]["text"]


@pytest.mark.parametrize("task", list(Task))
async def test_a_schema_is_proposed_without_images(server: ScriptedLLM, task: Task) -> None:
    proposal = await propose(server, task, catalogue=[BRIGHTNESS])
    schema = check_schema(proposal.schema)
    assert (schema.task, schema.main_objects) == (task, ("bag", "coat"))
    assert schema.attributes[0] is BRIGHTNESS
    assert {a.category for a in schema.attributes[1:]} == set(Category)
    assert {a.tagger for a in schema.attributes[1:]} == {Tagger.VLM}
    assert {source for a in schema.attributes[1:] for source in a.sources} == {"direct", "difficulty"}
    assert proposal.usage.calls == len(server.calls)
    assert not {"comparison", "look"} & set(stages(server))
    assert "brightness" in first(server, "direct")
    assert (proposal.compared_count, proposal.looked_count) == (0, 0)


async def test_every_stage_has_its_part_in_the_schema(server: ScriptedLLM, sample: Sample) -> None:
    told: list[tuple[str, int, int]] = []

    def tell(tally: Tally) -> None:
        told.append((tally.step, tally.done, tally.total))

    limits = replace(FEW, pair_count=6, patience=2, image_count=12)
    proposal = await propose(server, sample=sample, limits=limits, tell=tell)
    schema, counts = proposal.schema, Counter(stages(server))
    sources = {a.name: a.sources for a in schema.attributes}
    assert sources["object shape"] == ("direct",)
    assert sources["object pose"] == ("direct", "difficulty")  # both named it, and what was merged into it
    assert ("comparison",) in sources.values()
    assert [(m.name, m.into) for m in proposal.merged] == [("object placement", "object pose")]
    assert "object charm" in {out.name for out in proposal.dropped if out.reason == "people would not agree"}
    assert "object charm" not in schema.names()
    # An image that needs "checkered" was seen, and the model decided that "checked" says the same.
    assert schema.attribute("object pattern").tags == ("plain", "striped", "spotted", "checked")
    assert "near: checked / checkered" in first(server, "settle")
    assert "from behind" in schema.attribute("light direction").tags
    assert counts["direct"] == counts["confusion"] == counts["selfcheck"] == counts["tags"] == 1
    assert counts["comparison"] == proposal.compared_count <= 6
    assert counts["look"] == proposal.looked_count == 12
    assert proposal.usage.calls == len(server.calls)
    assert set(proposal.digests) == {f"attribute/{n}" for n in (*STAGES, "similar", "attributes")} - {
        "attribute/direct"
    }
    assert [step for step, _, _ in told][-1] == "settling tags"
    assert told[-1][1:] == (len(server.calls), len(server.calls))
    assert all(done <= total for _, done, total in told)


async def test_pairs_show_a_failing_and_a_passing_image_and_the_list_so_far(
    server: ScriptedLLM, sample: Sample
) -> None:
    limits = replace(FEW, pair_count=6, patience=1)
    await propose(server, sample=sample, limits=limits, catalogue=[BRIGHTNESS])
    shown = {i: (await sample.shown(i) or [b""])[0] for i in range(12)}
    calls = [call for call, stage in zip(server.calls, stages(server), strict=True) if stage == "comparison"]
    listed: list[str] = []
    for call in calls:
        pair = [next(i for i, image in shown.items() if image == part) for part in call.images]
        assert sample.labels[pair[0]] == sample.labels[pair[1]]
        assert sorted(sample.scores[pair]) == [0, 1]
        listed.append(call.body["messages"][-1]["content"][0]["text"].splitlines()[0])
    assert "brightness" in listed[0]
    assert "object shape" in listed[0]
    assert all(len(later) > len(earlier) for earlier, later in itertools.pairwise(listed))


async def test_comparing_ends_after_some_pairs_without_news(server: ScriptedLLM, sample: Sample) -> None:
    same = replace(sample, uris=tuple(sample.uris[:2]) * 6, scores=np.full(12, np.nan))  # each pair differs alike
    proposal = await propose(server, sample=same, limits=replace(FEW, pair_count=6, patience=2))
    assert proposal.compared_count == Counter(stages(server))["comparison"] < 6


def confused(server: ScriptedLLM) -> list[list[str]]:
    """The classes of each question about two that are taken for one another."""
    calls = [c for c, stage in zip(server.calls, stages(server), strict=True) if stage == "confusion"]
    return sorted(call.body["messages"][-1]["content"].splitlines()[:2] for call in calls)


async def test_classes_that_are_taken_for_one_another_are_asked_about(server: ScriptedLLM) -> None:
    await propose(server, confusions=[("bag", "coat"), ("coat", "bag"), ("coat", "hat")])
    assert confused(server) == [
        ["Main object: bag", "Is taken for: coat"],
        ["Main object: coat", "Is taken for: bag"],
    ]


async def test_without_predictions_the_model_names_the_pairs(server: ScriptedLLM) -> None:
    await propose(server, confusions=[])
    assert Counter(stages(server))["another"] == 1
    assert confused(server) == [
        ["Main object: bag", "Is taken for: coat"],
        ["Main object: coat", "Is taken for: toy bag"],
    ]


async def test_what_a_task_asks_is_told_by_files_alone(server: ScriptedLLM, tmp_path: Path) -> None:
    """A folder in which pose asks by pairs of classes too: no code knows."""
    folder = tmp_path / "attribute"
    folder.mkdir()
    for file in (PROMPTS / "attribute").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "confusion.pose.md").write_text((folder / "confusion.classification.md").read_text())
    await propose(server, Task.POSE, questions=load_questions(tmp_path, "pose"))
    assert "confusion" in stages(server)
    server.reset()
    (folder / "difficulty.pose.md").unlink()
    (folder / "confusion.pose.md").unlink()
    await propose(server, Task.POSE, questions=load_questions(tmp_path, "pose"))  # the general question
    [asked] = [c for c, s in zip(server.calls, stages(server), strict=True) if s == "another"]
    assert "joints" not in asked.body["messages"][0]["content"].split("## Input")[0]


async def test_what_the_user_named_gets_its_tags_and_stays(server: ScriptedLLM) -> None:
    own = [
        Candidate("Fabric", Category.MAIN_OBJECT, "", (USER,)),
        Candidate("object charm", Category.MAIN_OBJECT, "", (USER,)),  # the self-check would drop it
        Candidate("brightness", Category.GLOBAL, "", (USER,)),
    ]
    proposal = await propose(server, own=own, catalogue=[BRIGHTNESS], limits=replace(FEW, max_attributes=5))
    assert proposal.schema.names()[0] == "brightness"
    for name in ("Fabric", "object charm"):
        attribute = proposal.schema.attribute(name)
        assert attribute.sources[0] == "user"
        assert attribute.tags == ("low", "medium", "high")
    assert len(proposal.schema.attributes) == 5
    assert [out.reason for out in proposal.dropped if out.name == "brightness"] == ["says the same as 'brightness'"]


async def test_what_can_be_measured_is_not_asked(server: ScriptedLLM) -> None:
    await propose(server, catalogue=[BRIGHTNESS], measurable=["brightness", "color_temperature"])
    assert "brightness; color temperature" in first(server, "direct")


# What each kind of fault may end in, by the stage that it hits. The other stages can do without the one answer.
FATAL = {
    Fault.REFUSAL: ({"direct", "tags"}, Refused),
    Fault.TRUNCATED: ({"direct", "tags"}, Truncated),
    Fault.QUOTA: (set(STAGES), Precondition),
}
UNPAID = {
    Fault.RATE_LIMIT_RETRY_AFTER,
    Fault.RATE_LIMIT,
    Fault.SERVER_ERROR,
    Fault.CUT_CONNECTION,
    Fault.HANG,
}
ONCE_MORE = UNPAID | {Fault.CUT_JSON, Fault.EMPTY, Fault.WRONG_TYPES}


@pytest.fixture(scope="module")
def order(running: ScriptedLLM, sample: Sample) -> list[str]:
    """The stages of the calls when they are made one after the other and nothing goes wrong."""

    async def one_by_one() -> None:
        async with client(running, max_concurrency=1) as model:
            await propose(running, model=model, sample=sample)

    running.reset()
    asyncio.run(one_by_one())
    return stages(running)


@pytest.mark.parametrize(
    "fault",
    [
        *(Fault.RATE_LIMIT_RETRY_AFTER, Fault.RATE_LIMIT, Fault.SERVER_ERROR, Fault.HANG),
        *(Fault.CUT_CONNECTION, Fault.TRUNCATED, Fault.CUT_JSON, Fault.PROSE, Fault.REFUSAL, Fault.RENAMED),
        *(Fault.FOREIGN_TAG, Fault.DUPLICATE, Fault.MANY_TAGS, Fault.WRONG_TYPES, Fault.EMPTY, Fault.MISSING),
    ],
)
async def test_a_fault_in_any_stage_ends_in_a_schema_or_a_clear_error(
    server: ScriptedLLM, sample: Sample, order: list[str], fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "_backoff", lambda _: 0.01)
    fatal, _ = FATAL.get(fault, (set(), HiBug2Error))
    normal = Counter(order)
    async with client(server, max_concurrency=1, timeout_s=0.5 if fault is Fault.HANG else 10) as model:
        # What goes wrong on the way is mended in one place, whatever is asked.
        for stage in ("direct", "look") if fault in UNPAID else STAGES.keys() - fatal:
            server.reset()
            server.retry_after = "0.01"
            server.skip(order.index(stage))
            server.fail(fault)
            proposal = await propose(server, model=model, sample=sample)
            schema = check_schema(proposal.schema)
            assert {a.category for a in schema.attributes} == set(Category)
            assert all(2 <= len(a.tags) <= FEW.max_tags for a in schema.attributes)
            if fault is Fault.HANG:  # on a busy machine other calls may be given up as well
                assert proposal.usage.calls < len(server.calls)
                continue
            assert proposal.usage.calls == len(server.calls) - (fault in UNPAID)
            # A fault costs the one call that it spoils and at most one that mends it; none in an earlier stage.
            made = Counter(stages(server))
            assert made[stage] <= normal[stage] + 1
            if fault in ONCE_MORE:
                assert made[stage] == normal[stage] + 1
            assert all(n <= normal[s] for s, n in made.items() if s not in (stage, "look", "settle"))


@pytest.mark.parametrize(("fault", "stage"), [(f, s) for f, (fatal, _) in FATAL.items() for s in sorted(fatal)])
async def test_what_nothing_comes_of_is_said(sample: Sample, order: list[str], fault: Fault, stage: str) -> None:
    with ScriptedLLM() as server:  # of its own: a call that is given up may still arrive
        server.skip(order.index(stage))
        server.fail(fault)
        async with client(server, max_concurrency=1) as model:
            with pytest.raises(FATAL[fault][1]) as caught:
                await propose(server, model=model, sample=sample)
        assert order.index(stage) + 1 <= len(server.calls) <= order.index(stage) + 2
        if isinstance(caught.value, WrongAnswer):
            assert order.index(stage) + 1 <= caught.value.usage.calls <= len(server.calls)


async def test_an_endpoint_that_goes_away_ends_it(server: ScriptedLLM, sample: Sample, order: list[str]) -> None:
    server.skip(order.index("look"))
    server.fail(*[Fault.HANG] * 20)
    started = time.monotonic()
    with pytest.raises(Unavailable):
        async with client(server, timeout_s=0.2, max_attempts=2) as model:
            await propose(server, model=model, sample=sample)
    assert time.monotonic() - started < 5
    assert len(server.calls) <= order.index("look") + 6


async def test_cancelled_in_mid_question(server: ScriptedLLM, sample: Sample, order: list[str]) -> None:
    server.skip(order.index("look"))
    server.fail(*[Fault.HANG] * 20)
    asked = asyncio.create_task(propose(server, sample=sample))
    deadline = time.monotonic() + 10
    while "look" not in stages(server) and time.monotonic() < deadline:
        server.arrived.clear()
        await asyncio.to_thread(server.arrived.wait, 0.2)
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(asked, 1)


async def test_names_that_break_the_conventions_are_mended_or_left_out(server: ScriptedLLM) -> None:
    server.fail(Fault.RENAMED)
    async with client(server, max_concurrency=1) as model:
        proposal = await propose(server, model=model, main_objects=["teddy bear"])
    assert "object shape" not in proposal.schema.names()
    assert any("overall appearance" in out.name for out in proposal.dropped)


@pytest.mark.parametrize("fault", [Fault.MANY_TAGS, Fault.FOREIGN_TAG, Fault.MISSING])
async def test_tag_lists_that_stay_wrong_cost_no_more_than_their_attribute(server: ScriptedLLM, fault: Fault) -> None:
    async with client(server, max_concurrency=1) as model:
        await propose(server, model=model)
        at = stages(server).index("tags")
        server.reset()
        server.skip(at)
        server.fail(fault, fault)
        proposal = await propose(server, model=model, limits=replace(FEW, max_tags=10))
    assert "'object shape'" in server.calls[at + 1].body["messages"][-1]["content"]
    if fault is Fault.MANY_TAGS:
        assert len(proposal.schema.attribute("object shape").tags) == 10
    else:
        assert "object shape" not in proposal.schema.names()
        assert ("object shape", "has fewer than two tags") in [(out.name, out.reason) for out in proposal.dropped]


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("main_objects", {"main_objects": []}),
        ("main_objects", {"main_objects": [f"class {i}" for i in range(10_000)]}),
        (r"main_objects\[1\]", {"main_objects": ["bag", " "]}),
        ("max_tags", {"limits": Limits(max_tags=1)}),
        ("max_attributes", {"limits": Limits(max_attributes=73)}),
        ("max_attributes", {"limits": Limits(max_attributes=1), "catalogue": [BRIGHTNESS]}),
        ("pair_count", {"limits": Limits(pair_count=0)}),
        ("image_count", {"limits": Limits(image_count=0)}),
        (r"attributes\[0\]", {"own": [Candidate("a=b", Category.GLOBAL, "", (USER,))]}),
        (r"attributes\[1\]", {"own": [Candidate(n, Category.GLOBAL, "", (USER,)) for n in ("Fur", "fur")]}),
    ],
)
async def test_bad_input_costs_no_call(server: ScriptedLLM, field: str, change: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match=field):
        await propose(server, **change)
    assert not server.calls


def test_a_folder_without_prompts_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"attribute/attributes\.md"):
        load_questions(tmp_path, "pose")


@pytest.mark.parametrize("formats", [("json_object", "text"), ("text",)])
async def test_plain_endpoints_give_the_same_schema(sample: Sample, formats: tuple[str, ...]) -> None:
    with ScriptedLLM() as strict, ScriptedLLM(formats=formats) as plain:
        assert (await propose(plain, sample=sample)).schema == (await propose(strict, sample=sample)).schema

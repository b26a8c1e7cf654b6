"""The tagging service and its workers over a real queue, a real store and real images."""

from __future__ import annotations

import asyncio
import io
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import grpc
import numpy as np
import pytest
from PIL import Image

from hibug2.v1 import tagging_pb2 as pb
from hibug2.v1 import tagging_pb2_grpc as rpc
from hibug2.v1 import types_pb2
from services.tagging import board, course, worker
from services.tagging.plan import Part
from services.tagging.tagger import Answer, Tagged
from services.tagging.worker import Worker
from shared.errors import Busy, HiBug2Error, NotFound, Precondition, Unavailable
from shared.llm import Usage
from shared.metrics import JOBS
from shared.names import parse
from shared.queue.stream import Priority, WorkQueue
from shared.rpc import status
from shared.schema import MAIN_OBJECT, UNKNOWN, Attribute, Category, Measure, Schema, Tagger, Task
from shared.store.artifacts import Provenance, TagTable
from tests.integration.fleet import Fleet, Gates, done_count, has_backlog, last
from tests.integration.waiting import eventually
from tests.scripted_llm import Fault, ScriptedLLM

N, PER_PART = 60, 4
PARTS = N // PER_PART
CORRUPT, MISSING = 7, 33
SCHEMA = Schema(
    Task.CLASSIFICATION,
    ("bear", "cat"),
    (
        Attribute(MAIN_OBJECT, Category.MAIN_OBJECT, ("bear", "cat"), Tagger.GIVEN),
        Attribute(
            "brightness",
            Category.GLOBAL,
            ("dark", "bright"),
            Tagger.MEASURED,
            measure=Measure("brightness", (0.5,)),
        ),
        Attribute("error", Category.GLOBAL, ("small", "large"), Tagger.GIVEN),  # a name that parts use as well
    ),
)
LABELS = ["bear" if i % 3 else "cat" for i in range(N)]
BRIGHT = [i % 2 for i in range(N)]
ERRORS = ["small" if i % 5 else "large" for i in range(N)]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for i in range(N):
        Image.new("L", (12, 8), 250 * BRIGHT[i]).save(folder / f"{i}.png")
    (folder / f"{CORRUPT}.png").write_bytes(b"\x89PNG\r\n\x1a\n and nothing more")
    (folder / f"{MISSING}.png").unlink()
    return folder


def instances(images: Path) -> dict[str, list]:
    return {
        "instance_id": [f"i{i}" for i in range(N)],
        "image_uri": [f"{images.as_uri()}/{i}.png" for i in range(N)],
        "label": LABELS,
        "error": ERRORS,
    }


@pytest.fixture
async def fleet(redis_url, tmp_path, images, monkeypatch):
    monkeypatch.setattr(course, "_POLL_S", 0.05)
    monkeypatch.setattr(course, "_RECHECK_S", 0.5)
    monkeypatch.setattr(worker, "_BLOCK_MS", 50)
    async with AsyncExitStack() as exits:
        made = Fleet(redis_url, tmp_path / "store", images, exits, item_rows=PER_PART)
        made.add_dataset("pets", [instances(images)])
        yield made


@pytest.fixture
def gates(monkeypatch) -> Gates:
    made, tag = Gates(), Worker._tag

    async def gated(self, item):
        await made.enter(item.part)
        return await tag(self, item)

    monkeypatch.setattr(Worker, "_tag", gated)
    return made


def assert_all_tagged_once(table: TagTable) -> None:
    assert table.instance_ids.to_pylist() == [f"i{i}" for i in range(N)]
    dead = (CORRUPT, MISSING)
    expected = np.array(
        [
            [
                SCHEMA.attributes[0].code(LABELS[i]),
                UNKNOWN if i in dead else BRIGHT[i],
                SCHEMA.attributes[2].code(ERRORS[i]),
            ]
            for i in range(N)
        ]
    )
    assert table.codes.tolist() == expected.tolist()


async def test_every_instance_is_tagged_once_and_a_bad_image_is_dead_with_its_reason(fleet, redis):
    stub = await fleet.serve()
    fleet.work(3)
    job = await last(stub, await fleet.create(stub, SCHEMA))
    assert (job.state, job.done_count, job.total_count) == (types_pb2.JOB_STATE_SUCCEEDED, N, N)
    assert_all_tagged_once(fleet.table(job))
    told = await stub.GetTagging(pb.GetTaggingRequest(name=job.name))
    assert (told.instance_count, told.dead_count, told.reused_count) == (N, 2, 0)
    assert {c.attribute: c.unknown_count for c in told.coverage} == {MAIN_OBJECT: 0, "brightness": 2, "error": 0}
    dead = (await stub.ListDeadItems(pb.ListDeadItemsRequest(parent=job.name))).dead_items
    assert [item.instance_id for item in dead] == [f"i{CORRUPT}", f"i{MISSING}"]
    assert f"{CORRUPT}.png" in dead[0].reason
    assert "no such file" in dead[1].reason
    assert await has_backlog(stub, 0, 0)
    assert fleet.chunks(job) == []
    assert (await fleet.create(stub, SCHEMA)).reused
    left = {key for key in await redis.keys("hibug2:tagging:*") if not key.endswith(b":cancel")}
    assert left == set()


async def test_progress_and_backlog_are_told_while_parts_are_held(fleet, gates, redis):
    gates.hold(*range(3, PARTS))
    stub = await fleet.serve()
    job = await fleet.create(stub, SCHEMA)
    await eventually(lambda: has_backlog(stub, PARTS, 0))
    queued = await redis.xrange("hibug2:queue:tagging:interactive")
    assert len(queued) == PARTS
    assert all(sum(map(len, fields.values())) < 500 for _, fields in queued)  # bytes: which rows, and no image
    fleet.work(2)
    await eventually(lambda: has_backlog(stub, PARTS - 7, 4))
    await eventually(lambda: has_done(stub, job, 3 * PER_PART))
    gates.release()
    assert (await last(stub, job)).state == types_pb2.JOB_STATE_SUCCEEDED


async def has_done(stub, job, count: int) -> bool:
    return await done_count(stub, job) == count


async def test_redis_wiped_in_mid_run_loses_no_part_that_was_stored(fleet, gates, redis):
    fleet.change(flush_rows=1)
    gates.hold(5)
    stub = await fleet.serve()
    fleet.work()
    job = await fleet.create(stub, SCHEMA)
    await eventually(lambda: has_done(stub, job, N - PER_PART))
    await eventually(lambda: fleet.written(job) == PARTS - 1)
    await redis.flushall()
    gates.release()
    job = await last(stub, job)
    assert job.state == types_pb2.JOB_STATE_SUCCEEDED
    assert job.done_count == N
    assert {part: count for part, count in gates.begun.items() if part != 5} == dict.fromkeys(
        (part for part in range(PARTS) if part != 5), 1
    )
    assert_all_tagged_once(fleet.table(job))


async def test_redis_wiped_loses_no_part_while_work_of_others_is_in_the_queue(fleet, gates, redis):
    gates.hold(5, 999)
    stub = await fleet.serve()
    fleet.work(2)
    job = await fleet.create(stub, SCHEMA)
    await eventually(lambda: gates.begun[5])
    await redis.flushall()
    gone = pb.TaggingItem(team="other", tagging="datasets/d/taggings/gone", part=999, row_count=1)
    queue = WorkQueue(redis, "tagging")
    assert await queue.offer(Priority.BATCH, "other", gone.tagging, [(999, gone.SerializeToString())], 1, 10) == 1
    await eventually(lambda: gates.begun[999])
    gates.release(5)
    assert (await last(stub, job)).state == types_pb2.JOB_STATE_SUCCEEDED
    assert_all_tagged_once(fleet.table(job))
    gates.release(999)
    await eventually(lambda: has_backlog(stub, 0, 0))


async def test_cancelling_stops_the_work_and_what_is_done_is_found_again(fleet, gates):
    gates.hold(4)
    stub = await fleet.serve()
    fleet.work()
    job = await fleet.create(stub, SCHEMA)
    await eventually(lambda: has_done(stub, job, N - PER_PART))
    begun = time.monotonic()
    cancelled = await stub.CancelTagging(pb.CancelTaggingRequest(name=job.name))
    assert cancelled.job.state == types_pb2.JOB_STATE_CANCELLED
    await eventually(lambda: has_backlog(stub, 0, 0))  # the part in hand was dropped: nobody let it go
    assert time.monotonic() - begun < 5
    gates.release()
    again = await last(stub, await fleet.create(stub, SCHEMA))
    assert again.state == types_pb2.JOB_STATE_SUCCEEDED
    assert gates.begun == {part: 2 if part == 4 else 1 for part in range(PARTS)}
    assert_all_tagged_once(fleet.table(again))


@pytest.mark.parametrize(("flush_rows", "remade"), [(1, False), (1, True), (N, False)])
async def test_a_dataset_deleted_while_it_is_tagged_ends_the_work_and_nothing_of_it_comes_back(
    flush_rows, remade, fleet, images, llm, gates
):
    table = small(images, range(8, 20))
    fleet.add_dataset("gone", [table])
    fleet.change(flush_rows=flush_rows, team_items=3)  # so that parts wait with the job until the end
    gates.hold(*range(2, 6))
    stub = await fleet.serve()
    fleet.work()
    job = await fleet.create(stub, asking("size"), "gone")
    await eventually(lambda: has_done(stub, job, 4))
    await eventually(lambda: has_backlog(stub, 0, 3, 1))
    await eventually(lambda: fleet.written(job) == (2 if flush_rows == 1 else 0))
    fleet.artifacts.delete_dataset("gone")
    if remade:
        fleet.add_dataset("gone", [table])
    error = await failure(stub, job)
    assert isinstance(error, NotFound)
    assert str(error) == "dataset 'gone' was deleted while it was tagged"
    await eventually(lambda: has_backlog(stub, 0, 0))  # the parts in hand were dropped: nobody let them go
    gates.release()
    assert len(llm.calls) == 4
    assert fleet.store.names("teams/default/datasets") == (["gone", "pets"] if remade else ["pets"])
    assert "taggings" not in fleet.store.names("teams/default/datasets/gone")
    if not remade:
        fleet.add_dataset("gone", [table])
    again = await last(stub, await fleet.create(stub, asking("size"), "gone"))
    assert (again.name, again.state) == (job.name, types_pb2.JOB_STATE_SUCCEEDED)


async def test_a_dataset_deleted_before_it_is_planned_or_before_its_table_is_written_stays_deleted(
    fleet, images, monkeypatch
):
    known, dead = course.reuse.known_codes, WorkQueue.dead

    def planned(artifacts, dataset, *others):
        found = known(artifacts, dataset, *others)
        artifacts.delete_dataset(dataset)
        return found

    async def ended(self, *about):
        fleet.artifacts.delete_dataset("pets")
        return await dead(self, *about)

    stub = await fleet.serve()
    fleet.work()
    for changed, name, function in ((course.reuse, "known_codes", planned), (WorkQueue, "dead", ended)):
        with monkeypatch.context() as deleting:
            deleting.setattr(changed, name, function)
            assert isinstance(await failure(stub, await fleet.create(stub, SCHEMA)), NotFound)
        assert fleet.store.names("teams/default/datasets") == []
        fleet.add_dataset("pets", [instances(images)])


@pytest.mark.parametrize("whole", [True, False])
async def test_a_worker_that_does_not_find_its_part_ends_the_tagging(whole, fleet, monkeypatch):
    stub = await fleet.serve()
    job = await fleet.create(stub, SCHEMA)
    await eventually(lambda: has_backlog(stub, PARTS, 0))
    monkeypatch.setattr(course, "_RECHECK_S", 60.0)  # nothing but the worker tells
    await asyncio.sleep(0.6)
    if whole:
        fleet.artifacts.delete_dataset("pets")
    else:
        fleet.store.delete(fleet.artifacts.path(parse(job.name, "taggings", "name"), "plan", "000000.parquet"))
    fleet.work()
    error = await failure(stub, job)
    assert isinstance(error, NotFound)
    assert ("'pets' was deleted" if whole else "plan/000000.parquet") in str(error)
    await eventually(lambda: has_backlog(stub, 0, 0))


async def test_parts_that_are_there_are_not_done_again_whatever_the_settings_say_now(fleet, gates):
    gates.hold(*range(6, PARTS))
    stub = await fleet.serve()
    fleet.work(1)
    job = await fleet.create(stub, SCHEMA)
    await eventually(lambda: has_done(stub, job, 6 * PER_PART))
    await fleet.server.stop()
    assert fleet.written(job) == 6  # a service that is stopped leaves nothing behind in Redis alone
    fleet.change(item_rows=7)
    other = await fleet.serve()
    again = await fleet.create(other, SCHEMA)
    assert again.name == job.name
    gates.release()
    again = await last(other, again)
    assert again.state == types_pb2.JOB_STATE_SUCCEEDED
    assert gates.begun == dict.fromkeys(range(PARTS), 1)
    assert_all_tagged_once(fleet.table(again))


async def test_a_replica_that_lost_its_job_does_not_stop_the_one_that_has_it(fleet, gates, redis):
    gates.hold(*range(2, PARTS))
    one, two = await fleet.serve(), await fleet.serve()
    fleet.work()
    job = await fleet.create(one, SCHEMA)
    await eventually(lambda: has_done(one, job, 2 * PER_PART))
    # As if the first had slept past its lease: the second takes the work, then the first wakes up.
    await redis.delete(f"hibug2:job:tagging:default:{job.name}:lease")
    ended = JOBS.labels("tagging", "cancelled")._value
    before = ended.get()
    await fleet.create(two, SCHEMA)
    await eventually(lambda: ended.get() > before)
    gates.release()
    job = await last(two, job)
    assert job.state == types_pb2.JOB_STATE_SUCCEEDED
    assert gates.begun == dict.fromkeys(range(PARTS), 1)
    assert_all_tagged_once(fleet.table(job))


async def failure(stub: rpc.TaggingServiceStub, job: types_pb2.Job) -> HiBug2Error:
    job = await last(stub, job)
    assert job.state == types_pb2.JOB_STATE_FAILED
    return status.error_of_problem(job.problem)


def with_tagger(tagger: Tagger) -> Schema:
    return Schema(SCHEMA.task, (), (Attribute("pose", Category.MAIN_OBJECT, ("sits", "runs"), tagger),))


@pytest.mark.parametrize(("tagger", "text"), [(Tagger.VLM, "HIBUG2_LLM_BASE_URL"), (Tagger.CLIP, "HIBUG2_CLIP_MODEL")])
async def test_a_schema_that_nobody_here_can_tag_fails_the_job_and_says_why(tagger, text, fleet):
    stub = await fleet.serve()
    fleet.work(2)
    error = await failure(stub, await fleet.create(stub, with_tagger(tagger)))
    assert isinstance(error, Precondition)
    assert "'pose'" in str(error)
    assert text in str(error)
    await eventually(lambda: has_backlog(stub, 0, 0))


def failing(monkeypatch, error: Exception, times: int) -> Counter:
    """Let tagging fail; counts how often it was tried."""
    tries: Counter[str] = Counter()
    tag = worker.tag_instances

    async def fail(*arguments):
        tries["all"] += 1
        if tries["all"] <= times:
            raise error
        return await tag(*arguments)

    monkeypatch.setattr(worker, "tag_instances", fail)
    return tries


async def test_a_storage_that_is_away_for_a_while_is_waited_for(fleet, monkeypatch):
    monkeypatch.setattr(worker, "_WAIT_S", (0.01, 0.05))
    tries = failing(monkeypatch, Unavailable("the storage is away"), 30)
    fleet.change(max_deliveries=1)
    stub = await fleet.serve()
    fleet.work(2)
    job = await last(stub, await fleet.create(stub, SCHEMA))
    assert job.state == types_pb2.JOB_STATE_SUCCEEDED
    assert tries["all"] == 30 + PARTS
    assert_all_tagged_once(fleet.table(job))


async def test_a_storage_that_stays_away_fails_the_tagging_which_can_go_on_later(fleet, monkeypatch):
    failing(monkeypatch, Unavailable("the storage is away"), 10**6)
    fleet.change(patience_s=0.1)
    stub = await fleet.serve()
    fleet.work(2)
    error = await failure(stub, await fleet.create(stub, SCHEMA))
    assert isinstance(error, Unavailable)
    assert str(error) == "the storage is away"
    await eventually(lambda: has_backlog(stub, 0, 0))
    monkeypatch.undo()
    assert (await last(stub, await fleet.create(stub, SCHEMA))).state == types_pb2.JOB_STATE_SUCCEEDED


async def test_a_part_that_no_worker_can_finish_is_dead_the_rest_is_done_and_it_can_be_tried_again(fleet, monkeypatch):
    tag, broken = Worker._tag, {3}

    async def stumbles(self, item):
        if item.part in broken:
            raise KeyError("a bug")
        return await tag(self, item)

    monkeypatch.setattr(Worker, "_tag", stumbles)
    fleet.change(max_deliveries=2, lease_s=1.0)
    stub = await fleet.serve()
    fleet.work(2)
    job = await last(stub, await fleet.create(stub, SCHEMA))
    assert job.state == types_pb2.JOB_STATE_SUCCEEDED
    rows = range(3 * PER_PART, 4 * PER_PART)
    dead = await dead_items(stub, job.name)
    assert {f"i{row}" for row in rows} | {f"i{CORRUPT}", f"i{MISSING}"} == dead.keys()
    reason = "2 workers were given it and none finished it: KeyError: 'a bug'"
    assert {dead[f"i{row}"] for row in rows} == {reason}
    codes = fleet.table(job).codes[:, 1]
    assert (codes[rows] == UNKNOWN).all()

    broken.clear()
    again = await stub.RedriveDeadItems(pb.RedriveDeadItemsRequest(parent="datasets/pets"))
    assert again.redriven_count == PER_PART + 2
    mended = await last(stub, again.jobs[0])
    assert mended.name != job.name
    assert_all_tagged_once(fleet.table(mended))
    assert (await stub.GetTagging(pb.GetTaggingRequest(name=mended.name))).reused_count == N - PER_PART - 2
    assert (await dead_items(stub, "")).keys() == {f"i{CORRUPT}", f"i{MISSING}"}
    assert (await fleet.create(stub, SCHEMA)).name == mended.name  # who asks now gets the mended one


async def test_a_dead_part_can_be_tried_again_while_the_rest_is_still_done(fleet, monkeypatch, gates):
    gates.hold(0)
    gated, broken = Worker._tag, {3}

    async def stumbles(self, item):
        if item.part in broken:
            raise KeyError("a bug")
        return await gated(self, item)

    monkeypatch.setattr(Worker, "_tag", stumbles)
    fleet.change(max_deliveries=1, lease_s=2.0)  # long enough that a busy machine lets no other part lapse
    stub = await fleet.serve()
    fleet.work(2)
    job = await fleet.create(stub, SCHEMA)
    rows = {f"i{row}" for row in range(3 * PER_PART, 4 * PER_PART)}
    await eventually(lambda: has_dead(stub, rows))
    broken.clear()
    again = await stub.RedriveDeadItems(pb.RedriveDeadItemsRequest(parent=job.name))
    assert again.redriven_count == PER_PART
    await eventually(lambda: gates.begun[3])
    gates.release()
    assert_all_tagged_once(fleet.table(await last(stub, job)))


async def has_dead(stub, ids: set[str]) -> bool:
    return ids <= (await dead_items(stub, "")).keys()


async def dead_items(stub, parent: str) -> dict[str, str]:
    """Instance id to reason, read in pages of two."""
    found, token = {}, ""
    while True:
        answer = await stub.ListDeadItems(pb.ListDeadItemsRequest(parent=parent, page_size=2, page_token=token))
        found |= {item.instance_id: item.reason for item in answer.dead_items}
        token = answer.next_page_token
        if not token:
            return found


async def test_a_part_that_takes_longer_than_the_lease_is_begun_once(fleet, gates):
    gates.hold(0)
    stub = await fleet.serve()
    fleet.work(3)
    job = await fleet.create(stub, SCHEMA)
    await eventually(lambda: has_done(stub, job, N - PER_PART))
    await asyncio.sleep(1.5 * fleet.settings.lease_s)
    gates.release()
    assert (await last(stub, job)).state == types_pb2.JOB_STATE_SUCCEEDED
    assert gates.begun == dict.fromkeys(range(PARTS), 1)


async def test_a_request_that_cannot_be_served_is_refused_at_once(fleet):
    stub = await fleet.serve()
    fleet.artifacts.write_schema("pets", SCHEMA, Provenance({}))
    schema = f"datasets/pets/schemas/{SCHEMA.schema_id}"
    for parent, named, splits, code in (
        ("datasets/none", "datasets/none/schemas/x", [], grpc.StatusCode.NOT_FOUND),
        ("datasets/pets", "datasets/pets/schemas/x", [], grpc.StatusCode.NOT_FOUND),
        ("datasets/pets", "datasets/other/schemas/x", [], grpc.StatusCode.INVALID_ARGUMENT),
        ("datasets/pets", schema, ["pool"], grpc.StatusCode.INVALID_ARGUMENT),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.CreateTagging(pb.CreateTaggingRequest(parent=parent, schema=named, splits=splits))
        assert refused.value.code() is code


async def test_past_the_depth_limit_new_work_is_refused_with_the_time_to_come_back(fleet):
    fleet.change(max_backlog=PARTS)
    stub = await fleet.serve()
    job = await fleet.create(stub, SCHEMA)
    await eventually(lambda: has_backlog(stub, PARTS, 0))
    other = Schema(SCHEMA.task, (), SCHEMA.attributes[1:])
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await fleet.create(stub, other)
    error = status.error_of(refused.value)
    assert isinstance(error, Busy)
    assert error.retry_s > 0
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert (await fleet.create(stub, SCHEMA)).name == job.name  # what is there already is told
    fleet.work(2)
    await last(stub, job)
    assert (await fleet.create(stub, SCHEMA)).reused
    assert (await last(stub, await fleet.create(stub, other))).state == types_pb2.JOB_STATE_SUCCEEDED


async def test_a_team_keeps_back_what_the_queue_may_not_have_of_it_yet(fleet):
    fleet.change(team_items=4)
    stub = await fleet.serve()
    job = await fleet.create(stub, SCHEMA)
    await eventually(lambda: has_backlog(stub, 4, 0, PARTS - 4))
    fleet.work(2)
    assert_all_tagged_once(fleet.table(await last(stub, job)))
    assert await has_backlog(stub, 0, 0)


async def test_a_service_killed_between_storing_results_and_forgetting_them_stores_none_twice(
    fleet, gates, redis, monkeypatch
):
    async def die(self, parts) -> None: ...

    fleet.change(flush_rows=1)
    gates.hold(*range(6, PARTS))
    with monkeypatch.context() as dying:
        dying.setattr(board.Board, "drop_results", die)
        stub = await fleet.serve()
        fleet.work(1)
        job = await fleet.create(stub, SCHEMA)
        await eventually(lambda: fleet.written(job) == 6)
        await fleet.server.stop()
    (results,) = await redis.keys("*:results")
    assert await redis.hlen(results) == 6
    stub = await fleet.serve()
    await fleet.create(stub, SCHEMA)
    await eventually(lambda: _forgotten(redis, results))
    gates.release(6)
    await eventually(lambda: fleet.written(job) == 7)
    rows = [row for chunk in fleet.chunks(job) for row in fleet.chunk(job, chunk).column("row").to_pylist()]
    assert sorted(rows) == list(range(7 * PER_PART))
    gates.release()
    assert_all_tagged_once(fleet.table(await last(stub, job)))
    assert gates.begun == dict.fromkeys(range(PARTS), 1)


async def _forgotten(redis, results: bytes) -> bool:
    return not await redis.exists(results)


POISON = {
    "corrupt": "cut off",
    "empty": "0 bytes",
    "huge": "10000 x 10000 pixels",
    "text": "not an image",
    "missing": "no such file",
    "outside": "outside",
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
async def test_poison_is_dead_with_its_reason_the_rest_is_done_and_a_mended_file_is_tried_again(fleet, tmp_path):
    folder = tmp_path / "poison"
    folder.mkdir()
    whole = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(whole, "PNG")
    (folder / "corrupt.png").write_bytes(whole.getvalue()[:2000])
    (folder / "empty.png").touch()
    Image.new("1", (10_000, 10_000)).save(folder / "huge.png")
    (folder / "text.png").write_text("just words")
    uris = {kind: f"{folder.as_uri()}/{kind}.png" for kind in POISON} | {"outside": "file:///etc/passwd"}
    for i in range(9):
        Image.new("L", (8, 8), 250 * (i % 2)).save(folder / f"good{i}.png")
        uris[f"good{i}"] = f"{folder.as_uri()}/good{i}.png"
    fleet.change(image_prefixes=(folder.as_uri(),))
    fleet.add_dataset("poison", [{"instance_id": sorted(uris), "image_uri": [uris[k] for k in sorted(uris)]}])
    stub = await fleet.serve()
    fleet.work(2)
    schema = Schema(SCHEMA.task, (), SCHEMA.attributes[1:2])
    job = await last(stub, await fleet.create(stub, schema, "poison"))
    assert job.state == types_pb2.JOB_STATE_SUCCEEDED
    dead = await dead_items(stub, "datasets/poison")
    assert dead.keys() == POISON.keys()
    for kind, reason in POISON.items():
        assert reason in dead[kind], dead[kind]
    tags = dict(zip(sorted(uris), fleet.table(job).codes[:, 0].tolist(), strict=True))
    assert {k: v for k, v in tags.items() if k not in POISON} == {f"good{i}": i % 2 for i in range(9)}

    Image.new("L", (8, 8), 250).save(folder / "empty.png")
    again = await stub.RedriveDeadItems(pb.RedriveDeadItemsRequest(parent=job.name))
    mended = await last(stub, again.jobs[0])
    assert (await dead_items(stub, "")).keys() == POISON.keys() - {"empty"}
    tags = dict(zip(sorted(uris), fleet.table(mended).codes[:, 0].tolist(), strict=True))
    assert tags["empty"] == 1
    assert (await dead_items(stub, job.name)).keys() == POISON.keys()  # what was is not rewritten


def asking(*names: str, tags: tuple[str, ...] = ("low", "high")) -> Schema:
    return Schema(SCHEMA.task, (), tuple(Attribute(n, Category.GLOBAL, tags, Tagger.VLM) for n in names))


@pytest.fixture
def llm(fleet) -> Iterator[ScriptedLLM]:
    with ScriptedLLM() as server:
        fleet.change(llm_base_url=server.base_url, llm_model="scripted", llm_item_rows=2, llm_cache_ttl_s=0)
        yield server


def small(images: Path, rows: range) -> dict[str, list]:
    """Images that can be read."""
    found = [i for i in rows if i not in (CORRUPT, MISSING)]
    return {"instance_id": [f"i{i}" for i in found], "image_uri": [f"{images.as_uri()}/{i}.png" for i in found]}


async def test_only_what_is_not_tagged_yet_is_paid_for(fleet, images, llm):
    """An attribute more, images more, and nothing more."""
    fleet.add_dataset("grows", [small(images, range(7))])
    stub = await fleet.serve()
    fleet.work()
    first = await last(stub, await fleet.create(stub, asking("size", "shape"), "grows"))
    assert len(llm.calls) == 7
    llm.calls.clear()
    second = await last(stub, await fleet.create(stub, asking("size", "shape", "pose"), "grows"))
    assert [list(call.schema["properties"]) for call in llm.calls] == [["pose"]] * 7
    assert fleet.table(second).codes[:, :2].tolist() == fleet.table(first).codes.tolist()
    llm.calls.clear()
    fleet.add_dataset("grows", [small(images, range(7)), small(images, range(20, 25))])
    third = await last(stub, await fleet.create(stub, asking("size", "shape", "pose"), "grows"))
    assert [list(call.schema["properties"]) for call in llm.calls] == [["size", "shape", "pose"]] * 5
    assert fleet.table(third).codes[:7].tolist() == fleet.table(second).codes.tolist()
    assert third.done_count == 12
    told = await stub.GetTagging(pb.GetTaggingRequest(name=third.name))
    assert told.reused_count == 7
    assert told.invalid_answer_share == 0


async def test_where_all_is_tagged_no_worker_is_needed(fleet, images, llm, redis):
    fleet.add_dataset("done", [small(images, range(5))])
    stub = await fleet.serve()
    async with AsyncExitStack() as workers:
        helper = Fleet(fleet.settings.redis_url, Path(fleet.store.url[7:]), images, workers)
        helper.settings = fleet.settings
        helper.work()
        await last(stub, await fleet.create(stub, asking("size", "shape"), "done"))
    paid = len(llm.calls)
    job = await last(stub, await fleet.create(stub, asking("shape"), "done"))
    assert job.state == types_pb2.JOB_STATE_SUCCEEDED
    assert len(llm.calls) == paid
    fleet.add_dataset(
        "words", [{"instance_id": ["a", "b"], "image_uri": ["file:///a", "file:///b"], "error": ["small", "?"]}]
    )
    given = Schema(SCHEMA.task, (), SCHEMA.attributes[2:])
    job = await last(stub, await fleet.create(stub, given, "words"))  # the manifest says it all
    assert fleet.table(job).codes.tolist() == [[0], [UNKNOWN]]


async def test_a_schema_with_more_tags_than_one_answer_takes_is_asked_in_two_calls(fleet, images, llm):
    fleet.add_dataset("wide", [small(images, range(3))])
    stub = await fleet.serve()
    fleet.work()
    many = tuple(f"tag {i}" for i in range(700))
    job = await last(stub, await fleet.create(stub, asking("first", "second", tags=many), "wide"))
    assert sorted(next(iter(call.schema["properties"])) for call in llm.calls) == ["first"] * 3 + ["second"] * 3
    assert (fleet.table(job).codes != UNKNOWN).all()


async def test_answers_that_stay_wrong_are_counted_and_shown_while_it_runs(fleet, images, llm, gates):
    fleet.add_dataset("odd", [small(images, range(4))])
    llm.fail(*[Fault.FOREIGN_TAG] * 4)  # two calls each for the first two images, and the first tag stays wrong
    gates.hold(1)
    stub = await fleet.serve()
    fleet.work()
    job = await fleet.create(stub, asking("size", "shape"), "odd")
    await eventually(lambda: has_share(stub, job, 2 / 4))
    gates.release()
    job = await last(stub, job)
    assert job.cost.invalid_answer_count == 2
    assert job.cost.call_count == 6
    assert await has_share(stub, job, 2 / 8)


async def test_a_watcher_is_told_all_figures_while_the_work_is_done(fleet, images, llm, gates, tmp_path):
    prices = tmp_path / "prices.yaml"
    prices.write_text(
        "- source: tests\n  date: 2026-01-01\n  currency: USD\n  models:\n    scripted: {input: 1.0, output: 2.0}\n"
    )
    fleet.change(llm_prices=str(prices))
    rows = [*range(7), MISSING]
    uris = [f"{images.as_uri()}/{i}.png" for i in rows]
    fleet.add_dataset("seen", [{"instance_id": [f"i{i}" for i in rows], "image_uri": uris}])
    llm.fail(*[Fault.FOREIGN_TAG] * 10)  # two calls each for five images, and one tag of each stays wrong
    gates.hold(2)
    stub = await fleet.serve()
    fleet.work()
    job = await fleet.create(stub, asking("size", "shape"), "seen")
    told = None
    async with asyncio.timeout(30):
        async for answer in stub.WatchTagging(pb.WatchTaggingRequest(name=job.name)):
            if told is None and answer.job.done_count == 6 and answer.job.cost.call_count == 10:
                told = answer
                gates.release()
    assert told is not None
    assert told.job.total_count == 8
    assert told.job.rate_per_second > 0
    assert told.job.HasField("eta")
    assert told.job.eta.seconds == int((8 - 6) / told.job.rate_per_second)
    spent = sum(call.usage["prompt_tokens"] + 2 * call.usage["completion_tokens"] for call in llm.calls[:10]) / 1e6
    assert told.job.cost.amount == pytest.approx(spent)
    assert told.job.cost.currency == "USD"
    assert (told.dead_count, told.invalid_answer_share) == (1, 5 / 10)
    assert (answer.job.state, answer.job.done_count) == (types_pb2.JOB_STATE_SUCCEEDED, 8)
    assert (answer.dead_count, answer.invalid_answer_share) == (1, 5 / 14)
    assert answer.job.cost.call_count == 12


async def test_of_two_workers_that_hand_back_the_same_part_the_first_counts(redis):
    """The second had slept past its lease, and knows nothing of it."""
    told = board.Board(redis, "team", "datasets/d/taggings/t", "plan")
    queue = WorkQueue(redis, "tagging")
    await queue.ensure()
    await queue.offer(Priority.BATCH, "team", "job", [(0, b"0"), (1, b"1")], 2, 10)
    (late,) = await queue.take("sleeper")
    await queue.release("sleeper", late)
    (early,) = await queue.take("other")
    assert early.id == late.id
    results = []
    for entry, code, calls in ((early, 1, 3), (late, 0, 5)):
        answer = Answer(np.array([[code]], np.uint16), Usage(calls=calls), asked=1)
        results.append(await queue.done(entry, told.commit(0, Tagged(answer, ("",)))))
        (found,) = await told.results([Part(0, 0, 0, 0, 0, 1)], [1])
        assert (found.codes.tolist(), found.figures.usage.calls) == ([[1]], 3)
        assert (await told.news(2)).done.tolist() == [True, False]
        assert await queue.in_flight(Priority.BATCH, "team", "job") == {1}
        assert (await queue.backlog()).total == 1
    assert results == [1, 0]
    # It is forgotten once it is stored, and a third result brings nothing back.
    await told.drop_results([0])
    await queue.done(late, told.commit(0, Tagged(answer, ("",))))
    assert (await told.news(2)).results == frozenset()


async def has_share(stub, job, share: float) -> bool:
    told = await stub.GetTagging(pb.GetTaggingRequest(name=job.name))
    return told.invalid_answer_share == share

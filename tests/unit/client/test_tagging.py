# ruff: noqa: N802 - methods are called as the contract calls them
"""Taggings by the client and the command, against a small service on a real socket."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from typer.testing import CliRunner

from hibug2 import Client, HiBug2Error, UserError
from hibug2.command import app
from hibug2.v1 import schema_pb2, schema_pb2_grpc, tagging_pb2, tagging_pb2_grpc, types_pb2

NAME = "datasets/bears/taggings/t"
CHECK = "datasets/bears/checks/c"


class Service(tagging_pb2_grpc.TaggingServiceServicer, schema_pb2_grpc.SchemaServiceServicer):
    def __init__(self):
        self.requests = []
        self.dead = [
            tagging_pb2.DeadItem(tagging=NAME, instance_id=f"i{i}", image_uri=f"file:///{i}.png", reason=f"[bad] {i}")
            for i in range(5)
        ]
        self.ends = types_pb2.JOB_STATE_SUCCEEDED
        self.quality = tagging_pb2.TagQuality(tagging=NAME, sampled_count=100, min_kappa=0.6, model="m-1")
        mood = self.quality.attributes.add(
            attribute="[mood]", tagger=types_pb2.TAGGER_VLM, doubt="tagged again 71% agree"
        )
        mood.unknown_share = 0.125
        mood.retagged.CopyFrom(tagging_pb2.TagAgreement(compared_count=100, share=0.71, kappa=0.417))
        light = self.quality.attributes.add(attribute="light", tagger=types_pb2.TAGGER_CLIP)
        known = light.references.add(reference="brightness", tagger=types_pb2.TAGGER_MEASURED)
        known.agreement.CopyFrom(tagging_pb2.TagAgreement(compared_count=90, share=0.95, kappa=0.881))

    def GetSchema(self, request, context):
        schema = types_pb2.Schema(name="datasets/bears/schemas/s", task=types_pb2.TASK_DETECTION)
        for name in ("[mood]", "light"):
            schema.attributes.add(attribute=name, category=types_pb2.CATEGORY_GLOBAL, tags=["a", "b"], tagger=1)
        return schema_pb2.GetSchemaResponse(schema=schema)

    def CreateTagging(self, request, context):
        self.requests.append(request)
        return tagging_pb2.CreateTaggingResponse(job=types_pb2.Job(name=NAME))

    def GetTagging(self, request, context):
        return tagging_pb2.GetTaggingResponse(job=types_pb2.Job(name=request.name), dead_count=3)

    def WatchTagging(self, request, context):
        for done in (1, 2):
            yield tagging_pb2.WatchTaggingResponse(job=types_pb2.Job(name=request.name, done_count=done))

    def CancelTagging(self, request, context):
        job = types_pb2.Job(name=request.name, state=types_pb2.JOB_STATE_CANCELLED)
        return tagging_pb2.CancelTaggingResponse(job=job)

    def ListDeadItems(self, request, context):
        self.requests.append(request)
        first = int(request.page_token or 0)
        more = str(first + 2) if first + 2 < len(self.dead) else ""
        return tagging_pb2.ListDeadItemsResponse(dead_items=self.dead[first : first + 2], next_page_token=more)

    def RedriveDeadItems(self, request, context):
        self.requests.append(request)
        return tagging_pb2.RedriveDeadItemsResponse(redriven_count=5, jobs=[types_pb2.Job(name=NAME)])

    def CreateTagCheck(self, request, context):
        self.requests.append(request)
        job = types_pb2.Job(name=CHECK, state=types_pb2.JOB_STATE_RUNNING)
        return tagging_pb2.CreateTagCheckResponse(job=job)

    def WatchTagCheck(self, request, context):
        for state in (types_pb2.JOB_STATE_RUNNING, self.ends):
            figures = {"step": "tagging", "done_count": 40, "total_count": 1200}
            job = types_pb2.Job(name=request.name, state=state, message="0.50 of 0.50 USD is spent", **figures)
            yield tagging_pb2.WatchTagCheckResponse(job=job)

    def GetTagCheck(self, request, context):
        return tagging_pb2.GetTagCheckResponse(quality=self.quality)

    def GetTagQuality(self, request, context):
        self.requests.append(request)
        if self.quality is None:
            context.abort(grpc.StatusCode.NOT_FOUND, f"nobody has checked the tags of {request.parent}")
        return tagging_pb2.GetTagQualityResponse(quality=self.quality)

    def GetBacklog(self, request, context):
        return tagging_pb2.GetBacklogResponse(lag_count=1200, pending_count=3, waiting_count=40)


@pytest.fixture
def service():
    served = Service()
    with ThreadPoolExecutor(2) as pool:
        server = grpc.server(pool)
        tagging_pb2_grpc.add_TaggingServiceServicer_to_server(served, server)
        schema_pb2_grpc.add_SchemaServiceServicer_to_server(served, server)
        served.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        server.start()
        yield served
        server.stop(None).wait()


@pytest.fixture
def client(service):
    with Client(service.address, timeout_s=10) as connected:
        yield connected


@pytest.fixture
def command(service):
    def run(*arguments: str, of: str = "tagging", err: bool = False, code: int = 0) -> str:
        result = CliRunner().invoke(app, ["--address", service.address, of, *arguments])
        assert result.exit_code == code, result.output
        return result.stderr if err else result.stdout

    return run


def test_a_tagging_is_asked_for_followed_and_cancelled(client, service):
    job = client.tag("bears", splits=["pool"], priority="batch", budget=2.5, account="runs/r")
    (request,) = service.requests
    assert (request.parent, request.schema) == ("datasets/bears", "datasets/bears/schemas/s")
    assert list(request.splits) == ["pool"]
    assert request.priority == tagging_pb2.PRIORITY_BATCH
    assert request.budget == types_pb2.Budget(account="runs/r", amount=2.5)
    assert request.request_id
    assert client.tagging(job.name).dead_count == 3
    assert [told.job.done_count for told in client.watch_tagging(job.name)] == [1, 2]
    assert client.cancel_tagging(job.name).state == types_pb2.JOB_STATE_CANCELLED


def test_what_is_not_said_is_left_to_the_service(client, service):
    client.tag("bears", "s2")
    (request,) = service.requests
    assert request.schema == "datasets/bears/schemas/s2"
    assert request.priority == tagging_pb2.PRIORITY_UNSPECIFIED
    assert not request.HasField("budget")
    with pytest.raises(UserError, match="urgent"):
        client.tag("bears", "s2", priority="urgent")


@pytest.mark.parametrize(("given", "asked"), [("", ""), ("bears", "datasets/bears"), (NAME, NAME)])
def test_all_pages_of_the_dead_are_read(given, asked, client, service):
    table = client.dead_items(given)
    assert table.column("instance_id").to_pylist() == [f"i{i}" for i in range(5)]
    assert {request.parent for request in service.requests} == {asked}


def test_the_dead_are_shown_with_their_reasons(command):
    told = command("dead", "bears", "--limit", "3")
    assert "[bad] 2" in told
    assert "[bad] 3" not in told
    assert "2 more" in told
    document = json.loads(command("dead", "--json"))
    assert [item["reason"] for item in document["dead_items"]] == [f"[bad] {i}" for i in range(5)]


def test_nothing_dead_is_said(command, service):
    service.dead = []
    assert "nothing is dead" in command("dead")


def test_the_dead_are_tried_again(command, service):
    told = command("redrive", "bears")
    assert "5 tried again" in told
    assert NAME in told
    assert service.requests[-1].parent == "datasets/bears"
    assert json.loads(command("redrive", "--json"))["redriven_count"] == 5


def test_the_backlog_is_told(command):
    assert "3 in hand, 1,200 in the queue, 40 held back" in command("backlog")
    assert json.loads(command("backlog", "--json")) == {"lag_count": 1200, "pending_count": 3, "waiting_count": 40}


@pytest.mark.parametrize(("given", "tagging"), [("bears", ""), (NAME, NAME)])
def test_tags_are_checked_and_what_is_found_is_waited_for(given, tagging, client, service):
    seen = []
    found = client.check_tags(given, sample_count=40, seed=3, budget=0.5, on_progress=seen.append)
    assert found == service.quality
    (request,) = service.requests
    assert (request.parent, request.tagging) == ("datasets/bears", tagging)
    assert (request.sample_count, request.seed, request.budget.amount) == (40, 3, 0.5)
    assert [job.state for job in seen] == [types_pb2.JOB_STATE_RUNNING, types_pb2.JOB_STATE_SUCCEEDED]


def test_a_check_that_pauses_says_why(client, service):
    service.ends = types_pb2.JOB_STATE_PAUSED
    with pytest.raises(HiBug2Error, match=r"0\.50 USD is spent"):
        client.check_tags("bears")


def test_quality_is_shown_and_only_a_check_pays(command, service):
    told = command("quality", "bears")
    assert [type(request).__name__ for request in service.requests] == ["GetTagQualityRequest"]
    mood, light = (next(line for line in told.splitlines() if line.startswith(name)) for name in ("[mood]", "light"))
    assert mood.split() == ["[mood]", "vlm", "12.5%", "0.0%", "71.0%", "0.42", "doubtful"]
    assert light.split() == ["light", "clip", "0.0%", "0.0%", "–", "–", "brightness", "0.88"]
    assert "[mood]: tagged again 71% agree" in told
    assert "100 instances tagged again by m-1" in told
    document = json.loads(command("quality", NAME, "--check", "--sample", "40", "--max-cost", "1", "--json"))
    assert document["attributes"][0]["retagged"] == {"compared_count": 100, "share": 0.71, "kappa": 0.417}
    assert service.requests[-1].sample_count == 40


def test_a_check_shows_its_progress(command):
    assert command("quality", "bears", "--check", err=True) == "tagging: 40 of 1,200\n"


@pytest.mark.parametrize("option", ["--sample", "--seed", "--max-cost"])
def test_what_only_a_check_takes_is_refused_without_one(command, service, option):
    assert command("quality", "bears", option, "3", err=True, code=2).startswith(f"error: {option}: goes with --check")
    assert not service.requests


def test_the_schema_is_shown_with_its_doubts(command, service, client):
    told = command("show", "bears", of="schema")
    assert "[mood] (doubtful)" in told
    assert "light (doubtful)" not in told
    assert "[mood]: tagged again 71% agree" in told
    assert service.requests[-1].schema == "datasets/bears/schemas/s"
    assert json.loads(command("show", "bears", "--json", of="schema"))["doubts"] == {"[mood]": "tagged again 71% agree"}
    service.quality = None
    assert client.doubts("bears", "datasets/bears/schemas/s") == {}
    assert "doubtful" not in command("show", "bears", of="schema")
    assert "doubts" not in json.loads(command("show", "bears", "--json", of="schema"))

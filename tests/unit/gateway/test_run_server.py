"""What is said of a run's report, before and after it is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
from google.protobuf import json_format
from redis.asyncio import Redis

from hibug2.v1 import repair_pb2, types_pb2
from hibug2.v1 import run_pb2 as pb
from services.gateway.config import Settings
from services.gateway.run_server import RunServicer
from shared.errors import Precondition
from shared.store.store import Store

RANKING = "datasets/bears/rankings/r"
HTML = b"<html>"


def servicer(folder: Path, state: types_pb2.JobState.ValueType, *, ranking: str = "", report: bool = False) -> Any:
    store = Store(folder.as_uri())
    run = pb.Run(name="runs/a", job=types_pb2.Job(name="runs/a", state=state), ranking=ranking)
    store.write_json("teams/default/runs/a/run.json", json_format.MessageToDict(run))
    if report:
        store.write("teams/default/runs/a/report.html", HTML)
    return RunServicer(Settings(), Redis(), store, cast("Any", None))


async def read(made: Any, *compared: repair_pb2.ComparedModel) -> bytes:
    request = pb.ReadReportRequest(name="runs/a", compared_models=compared)
    return b"".join([part.html async for part in made.ReadReport(request, None)])


@pytest.mark.parametrize("ranking", ["", RANKING])
@pytest.mark.parametrize("state", [types_pb2.JOB_STATE_FAILED, types_pb2.JOB_STATE_CANCELLED])
async def test_a_run_that_ended_before_its_report_says_so(tmp_path: Path, state: Any, ranking: str) -> None:
    with pytest.raises(Precondition, match="runs/a ended without a report; 'hibug2 resume a' goes on with it"):
        await read(servicer(tmp_path, state, ranking=ranking))


async def test_without_a_ranking_there_is_no_report_beside_other_models_either(tmp_path: Path) -> None:
    with pytest.raises(Precondition, match="ended without a report"):
        await read(servicer(tmp_path, types_pb2.JOB_STATE_FAILED), repair_pb2.ComparedModel())


@pytest.mark.parametrize("state", [types_pb2.JOB_STATE_RUNNING, types_pb2.JOB_STATE_PAUSED])
async def test_a_run_that_goes_on_has_no_report_yet(tmp_path: Path, state: Any) -> None:
    with pytest.raises(Precondition, match="no report yet"):
        await read(servicer(tmp_path, state, ranking=RANKING))


@pytest.mark.parametrize("state", [types_pb2.JOB_STATE_SUCCEEDED, types_pb2.JOB_STATE_FAILED])
async def test_a_report_that_is_there_is_read_however_the_run_ended(tmp_path: Path, state: Any) -> None:
    assert await read(servicer(tmp_path, state, ranking=RANKING, report=True)) == HTML

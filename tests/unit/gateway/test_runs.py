"""A run whose step fails says what the failing service said."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import grpc
import pytest

from hibug2.v1 import run_pb2
from services.gateway.runs import Pipeline
from shared.errors import Unavailable
from shared.jobs import Progress


class Shelf:
    async def save(self, run: run_pb2.Run) -> None: ...

    async def publish(self, run: run_pb2.Run) -> None: ...


class Artifacts:
    def current_schema_id(self, dataset: str) -> str:
        raise grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), grpc.aio.Metadata(), "gone")


async def test_a_service_that_is_away_between_two_jobs_is_named_as_that() -> None:
    run = run_pb2.Run(name="runs/a", dataset="datasets/bears", model="datasets/bears/models/m")
    parts = [cast(Any, part) for part in (SimpleNamespace(), Shelf(), Artifacts())]

    async def no_report(_: run_pb2.Run) -> None: ...

    with pytest.raises(Unavailable, match="gone"):
        await Pipeline(run, *parts, Progress(), no_report).execute()

"""The connection under the client: the channel, calls with their errors, pages, streams, and names of runs."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Self, TypeVar, cast

import grpc
import pyarrow as pa
from google.protobuf.message import Message

from hibug2 import messages, streams, traces
from hibug2.channel import open_channel
from hibug2.errors import HiBug2Error, UserError, from_job, from_rpc
from hibug2.v1 import (
    attribute_pb2_grpc,
    dataset_pb2_grpc,
    enumeration_pb2_grpc,
    model_pb2_grpc,
    prediction_pb2_grpc,
    repair_pb2_grpc,
    run_pb2,
    run_pb2_grpc,
    schema_pb2_grpc,
    slice_pb2_grpc,
    tagging_pb2_grpc,
    types_pb2,
)

DEFAULT_ADDRESS = "localhost:50051"
# Uploads and reads of whole tables: as long as they flow they are well; this only ends what hangs.
_STREAM_S = 3600.0
PAGE = 1000
# A run in one of these is worked on no more before somebody resumes it.
STOPPED = {
    types_pb2.JOB_STATE_FAILED: "failed",
    types_pb2.JOB_STATE_PAUSED: "is paused",
    types_pb2.JOB_STATE_CANCELLED: "was cancelled",
}

_Request = TypeVar("_Request", bound=Message)
_Response = TypeVar("_Response", bound=Message)

RunLike = run_pb2.Run | str


def given_address(address: str | None) -> str | None:
    """The address that was named: the argument, else HIBUG2_ADDRESS; None when neither was."""
    return address or os.environ.get("HIBUG2_ADDRESS") or None


class Connection:
    """What every call stands on; `Client` has the calls themselves."""

    def __init__(
        self,
        address: str | None = None,
        *,
        team: str | None = None,
        token: str | None = None,
        timeout_s: float = 60.0,
    ) -> None:
        """`address` defaults to HIBUG2_ADDRESS, then localhost:50051; `token` to HIBUG2_TOKEN.

        https://host:port is TLS, http://host:port is not, host:port is where HIBUG2_TLS_CA_FILE is set (`channel.py`).
        `timeout_s` bounds each call, and how long `watch` waits for a gateway that went away.
        """
        self.address = given_address(address) or DEFAULT_ADDRESS
        self._team = team
        self._token = token or os.environ.get("HIBUG2_TOKEN")
        self._timeout_s = timeout_s
        self._channel = open_channel(self.address)
        self._datasets = dataset_pb2_grpc.DatasetServiceStub(self._channel)
        self._models = model_pb2_grpc.ModelServiceStub(self._channel)
        self._schemas = schema_pb2_grpc.SchemaServiceStub(self._channel)
        self._attributes = attribute_pb2_grpc.AttributeServiceStub(self._channel)
        self._runs = run_pb2_grpc.RunServiceStub(self._channel)
        self._slices = slice_pb2_grpc.SliceServiceStub(self._channel)
        self._predictions = prediction_pb2_grpc.PredictionServiceStub(self._channel)
        self._repair = repair_pb2_grpc.RepairServiceStub(self._channel)
        self._taggings = tagging_pb2_grpc.TaggingServiceStub(self._channel)
        self._enumeration = enumeration_pb2_grpc.EnumerationServiceStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; calls in flight end."""
        self._channel.close()

    def get_run(self, run: RunLike) -> run_pb2.Run:
        """The run as it is now."""
        return self._call(self._runs.GetRun, run_pb2.GetRunRequest(name=self._run_name(run))).run

    # Calls

    def _metadata(self, request_id: str) -> tuple[tuple[str, str | bytes], ...]:
        found: list[tuple[str, str | bytes]] = [("x-request-id", request_id), *traces.headers()]
        if self._team:
            found.append(("x-hibug2-team", self._team))
        if self._token:
            found.append(("authorization", f"Bearer {self._token}"))
        return tuple(found)

    def _call(
        self,
        method: grpc.UnaryUnaryMultiCallable[_Request, _Response],
        request: _Request,
        request_id: str = "",
    ) -> _Response:
        request_id = request_id or new_id()
        try:
            with traces.span(_call_name(request)):
                return method(request, timeout=self._timeout_s, metadata=self._metadata(request_id))
        except grpc.RpcError as failure:
            raise from_rpc(failure, request_id=request_id, address=self.address) from failure

    def _upload(
        self,
        method: grpc.StreamUnaryMultiCallable[_Request, _Response],
        header: _Request,
        pieces: Iterable[_Request],
        request_id: str,
    ) -> _Response:
        def requests() -> Iterator[_Request]:
            yield header
            yield from pieces

        try:
            with traces.span(_call_name(header)):
                return method(requests(), timeout=_STREAM_S, metadata=self._metadata(request_id))
        except grpc.RpcError as failure:
            raise from_rpc(failure, request_id=request_id, address=self.address) from failure

    def _read(self, method: Callable[..., Any], request: Any) -> Iterator[Any]:
        request_id = new_id()
        call = method(request, timeout=_STREAM_S, metadata=self._metadata(request_id))
        try:
            yield from call
        except grpc.RpcError as failure:
            raise from_rpc(failure, request_id=request_id, address=self.address) from failure
        finally:
            call.cancel()

    def _arrow(self, method: Callable[..., Any], request: Any) -> pa.RecordBatchReader:
        pieces = (response.arrow for response in self._read(method, request))
        try:
            return streams.open_pieces(pieces)
        except pa.ArrowInvalid as error:
            raise HiBug2Error(f"{self.address} sent no readable table: {error}", code="DATA_LOSS") from error

    def _pages(
        self,
        make: Callable[[str], Any],
        method: Callable[..., Any],
    ) -> Iterator[Any]:
        token, call = "", cast("Callable[..., Any]", self._call)
        while True:
            page = call(method, make(token))
            yield page
            token = page.next_page_token
            if not token:
                return

    def _all(self, make: Callable[[str], Any], method: Callable[..., Any], items: Callable[[Any], Any]) -> list[Any]:
        return [item for page in self._pages(make, method) for item in items(page)]

    def _ended(
        self,
        job: types_pb2.Job,
        watch: Callable[..., Any],
        request: Callable[..., Any],
        on_progress: Callable[[types_pb2.Job], object] | None = None,
    ) -> types_pb2.Job:
        """The job when it has succeeded, which is waited for; HiBug2Error when it ended otherwise or is paused.

        `watch` is the call that follows it and `request` the kind of its request.
        """
        if job.state != types_pb2.JOB_STATE_SUCCEEDED:
            for response in self._read(watch, request(name=job.name)):
                job = response.job
                if on_progress is not None:
                    on_progress(job)
        if job.state != types_pb2.JOB_STATE_SUCCEEDED:
            raise from_job(job)
        return job

    # Names

    def _run_name(self, run: RunLike) -> str:
        if isinstance(run, run_pb2.Run):
            return run.name
        if run != "latest":
            return run if run.startswith("runs/") else f"runs/{run}"
        newest = self._call(self._runs.ListRuns, run_pb2.ListRunsRequest(page_size=1)).runs
        if not newest:
            raise UserError("run", "there is no run yet; start one with `hibug2 run DATASET --model MODEL`")
        return newest[0].name

    def _finished(self, run: RunLike, part: str, *, empty_when_skipped: bool = False) -> run_pb2.Run:
        """The run when it has `part`; FAILED_PRECONDITION when it has none (yet)."""
        if isinstance(run, run_pb2.Run) and getattr(run, part):
            return run
        found = self.get_run(run)
        state = found.job.state
        if getattr(found, part) or (empty_when_skipped and state == types_pb2.JOB_STATE_SUCCEEDED):
            return found
        if state in STOPPED:
            why = f": it {STOPPED[state]}; `hibug2 resume {found.name}` goes on with it"
        else:
            word = messages.word(types_pb2.JobState.DESCRIPTOR, state)
            why = f" yet: it is {word}; `hibug2 watch {found.name}` follows it"
        raise HiBug2Error(f"{found.name} has no {part}{why}", code="FAILED_PRECONDITION", reason="PRECONDITION")


def _call_name(request: Message) -> str:
    return str(request.DESCRIPTOR.name).removesuffix("Request")


def new_id() -> str:
    return uuid.uuid4().hex


def dataset_name(dataset: str) -> str:
    return dataset if dataset.startswith("datasets/") else f"datasets/{dataset}"


def full_name(parent: str, collection: str, given: str) -> str:
    """The name of what is `given`, an id in a collection of `parent` or a name already."""
    return given if "/" in given else f"{parent}/{collection}/{given}"


def gather(batches: Iterable[pa.RecordBatch], schema: pa.Schema, limit: int | None = None) -> pa.Table:
    taken: list[pa.RecordBatch] = []
    rows = 0
    for batch in batches:
        taken.append(batch)
        rows += batch.num_rows
        if limit is not None and rows >= limit:
            break
    return pa.Table.from_batches(taken, schema).slice(0, limit)

"""Datasets, models with their scores, and schemas over gRPC: what a team sends in."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import grpc
import pyarrow as pa
import pyarrow.compute as pc
from redis.asyncio import Redis

from hibug2.v1 import dataset_pb2 as pb
from hibug2.v1 import dataset_pb2_grpc, model_pb2, model_pb2_grpc, schema_pb2, schema_pb2_grpc, types_pb2
from services.gateway.config import Settings
from services.gateway.datasets import check_images, check_instances, record_of
from services.gateway.scores import check_scores
from services.gateway.turns import Confirm, turn
from shared.errors import AlreadyExists, HiBug2Error, invalid
from shared.images.reader import ImageReader
from shared.names import check_id, dataset_id, parse
from shared.rpc import context as call
from shared.rpc.arrow import receive_table
from shared.rpc.paging import page, page_bounds
from shared.rpc.provenance import provenance_proto
from shared.rpc.schemas import schema_of, schema_proto, task_of, task_proto
from shared.schema import Schema, Task
from shared.store.artifacts import Artifacts, DatasetRecord, ModelRecord, Provenance, now, table_digest
from shared.store.store import Store

Context = grpc.aio.ServicerContext[Any, Any]
CURRENT = "current"
_METRICS = {
    "accuracy": types_pb2.METRIC_ACCURACY,
    "iou": types_pb2.METRIC_IOU,
    "oks": types_pb2.METRIC_OKS,
    "custom": types_pb2.METRIC_CUSTOM,
}


@dataclass(frozen=True)
class Door:
    """What comes in and where it is kept."""

    store: Store
    redis: Redis
    settings: Settings

    def artifacts(self) -> Artifacts:
        return Artifacts(self.store, call.team.get())

    async def create_dataset(
        self, dataset: str, task: Task, table: pa.Table, request_id: str, skip_image_check: bool
    ) -> DatasetRecord:
        """Check and store a new dataset. AlreadyExists, unless it was made by this very request."""
        check_id(dataset, "dataset_id")
        there = await asyncio.to_thread(self._made_by, dataset, request_id)
        if there is not None:
            return there
        instances = await asyncio.to_thread(self._checked, table, task, skip_image_check)

        def stored() -> tuple[DatasetRecord, bool]:
            there = self._made_by(dataset, request_id)  # the images took a while
            if there is not None:
                return there, False
            part = self.artifacts().write_instances(dataset, instances)
            return record_of(dataset, task, instances, [part], part, [request_id]), True

        return await self._change(dataset, stored)

    def _made_by(self, dataset: str, request_id: str) -> DatasetRecord | None:
        """The dataset when `request_id` made it, None when there is none; AlreadyExists when another did."""
        artifacts = self.artifacts()
        if not artifacts.has_dataset(dataset):
            return None
        there = artifacts.dataset(dataset)
        if request_id and request_id in there.request_ids:
            return there
        raise AlreadyExists(f"dataset '{dataset}' is there already; delete it or take another name")

    async def add_instances(
        self, dataset: str, table: pa.Table, request_id: str, skip_image_check: bool
    ) -> DatasetRecord:
        """Check and add instances; the same request twice adds once."""
        artifacts = self.artifacts()
        record = await asyncio.to_thread(artifacts.dataset, dataset)
        if request_id and request_id in record.request_ids:
            return record
        instances = await asyncio.to_thread(self._checked, table, record.task, skip_image_check, record.instance_count)

        def stored() -> tuple[DatasetRecord, bool]:
            record = artifacts.dataset(dataset)  # others may have added to it while the images were checked
            if request_id and request_id in record.request_ids:
                return record, False
            there = artifacts.instances(record)
            _refuse_known(instances, there)
            part = artifacts.write_instances(dataset, instances)
            whole = pa.concat_tables([there, instances])
            return (
                record_of(
                    dataset,
                    record.task,
                    whole,
                    [*record.parts, part],
                    table_digest(whole),
                    [*record.request_ids, request_id],
                    record.create_time,
                ),
                True,
            )

        return await self._change(dataset, stored)

    async def _change(self, dataset: str, stored: Callable[[], tuple[DatasetRecord, bool]]) -> DatasetRecord:
        """Write the record that `stored` makes, if it says that it is new, while nobody else changes the dataset."""

        async def change() -> DatasetRecord:
            async with self._turn(dataset) as confirm:
                record, is_new = await asyncio.to_thread(stored)
                if is_new:
                    await confirm()
                    await asyncio.to_thread(self.artifacts().write_dataset, record)
            return record

        # A caller who leaves does not stop a thread, so the turn is not given up before it has ended.
        return await asyncio.shield(asyncio.ensure_future(change()))

    async def delete_dataset(self, dataset: str) -> None:
        """Remove a dataset and all that was made from it. NotFound when there is none."""
        artifacts = self.artifacts()

        async def change() -> None:
            async with self._turn(dataset) as confirm:
                await asyncio.to_thread(artifacts.dataset, dataset)
                await confirm()
                await asyncio.to_thread(artifacts.delete_dataset, dataset)

        await asyncio.shield(asyncio.ensure_future(change()))

    def _turn(self, dataset: str) -> AbstractAsyncContextManager[Confirm]:
        return turn(self.redis, f"{call.team.get()}:datasets/{dataset}")

    def _checked(self, table: pa.Table, task: Task, skip_image_check: bool, already: int = 0) -> pa.Table:
        if table.num_rows + already > self.settings.max_instances:
            raise invalid("instances", f"a dataset holds at most {self.settings.max_instances} of them")
        instances = check_instances(table, task)
        reader = ImageReader(self.settings.image_prefixes)
        if skip_image_check:  # where an image may lie is held even when nobody looks at it
            for row, uri in enumerate(instances.column("image_uri").to_pylist()):
                try:
                    reader.check_uri(uri)
                except HiBug2Error as error:
                    raise invalid(f"instances[{row}].image_uri", str(error)) from error
        else:
            check_images(instances, reader, self.settings.image_check_threads)
        return instances

    def add_scores(self, dataset: str, model: str, table: pa.Table, metric: str, request_id: str) -> ModelRecord:
        """Check and store the scores of a model; they replace those that were there."""
        check_id(model, "model_id")
        artifacts = self.artifacts()
        record = artifacts.dataset(dataset)
        scores, found = check_scores(table, artifacts.instances(record))
        values = scores.column("score")
        out = ModelRecord(
            dataset=dataset,
            model=model,
            metric=metric or found,
            digest=table_digest(scores),
            scored_count=int(pc.count(values).as_py()),
            mean_score=float(pc.mean(values).as_py()),
            create_time=now(),
            request_id=request_id,
        )
        artifacts.write_scores(out, scores)
        return out

    def create_schema(self, dataset: str, schema: Schema) -> str:
        """Store a schema of the user's and make it current; returns its id."""
        artifacts = self.artifacts()
        record = artifacts.dataset(dataset)
        if schema.task is not record.task:
            raise invalid("schema.task", f"is {schema.task}; dataset '{dataset}' is for {record.task}")
        return artifacts.write_schema(dataset, schema, Provenance({"dataset": record.digest, "origin": "user"}))


def _refuse_known(instances: pa.Table, there: pa.Table) -> None:
    ids = instances.column("instance_id")
    again = pc.is_in(ids, value_set=there.column("instance_id").combine_chunks()).to_numpy()
    if again.any():
        row = int(again.argmax())
        raise invalid(f"instances[{row}].instance_id", f"'{ids[row]}' is in the dataset already")


def dataset_proto(record: DatasetRecord) -> pb.Dataset:
    out = pb.Dataset(
        name=f"datasets/{record.dataset}",
        task=task_proto(record.task),
        instance_count=record.instance_count,
        main_objects=record.main_objects,
        digest=record.digest,
    )
    for split, count in record.splits.items():
        out.splits.add(split=split, instance_count=count)
    out.create_time.FromDatetime(datetime.fromisoformat(record.create_time))
    return out


def model_proto(record: ModelRecord) -> model_pb2.Model:
    out = model_pb2.Model(
        name=f"datasets/{record.dataset}/models/{record.model}",
        metric=_METRICS[record.metric],
        scored_count=record.scored_count,
        mean_score=record.mean_score,
        digest=record.digest,
    )
    out.create_time.FromDatetime(datetime.fromisoformat(record.create_time))
    return out


async def _header(requests: AsyncIterator[Any]) -> Any:
    first = await anext(requests, None)
    if first is None or first.WhichOneof("part") != "header":
        raise invalid("header", "the first message carries the header")
    return first.header


async def _arrow(requests: AsyncIterator[Any]) -> AsyncIterator[bytes]:
    async for message in requests:
        if message.WhichOneof("part") != "arrow":
            raise invalid("header", "comes once, before the Arrow data")
        yield message.arrow


class DatasetServicer(dataset_pb2_grpc.DatasetServiceServicer):
    """proto in, the door in a thread, proto out."""

    def __init__(self, door: Door) -> None:
        self._door = door

    async def CreateDataset(
        self, request_iterator: AsyncIterator[pb.CreateDatasetRequest], context: Context
    ) -> pb.CreateDatasetResponse:
        header = await _header(request_iterator)
        task = task_of(header.task)
        check_id(header.dataset_id, "dataset_id")
        table = await receive_table(_arrow(request_iterator), self._door.settings.max_upload_bytes, "instances")
        record = await self._door.create_dataset(
            header.dataset_id, task, table, header.request_id, header.skip_image_check
        )
        return pb.CreateDatasetResponse(dataset=dataset_proto(record))

    async def AddInstances(
        self, request_iterator: AsyncIterator[pb.AddInstancesRequest], context: Context
    ) -> pb.AddInstancesResponse:
        header = await _header(request_iterator)
        dataset = dataset_id(header.parent, "parent")
        table = await receive_table(_arrow(request_iterator), self._door.settings.max_upload_bytes, "instances")
        record = await self._door.add_instances(dataset, table, header.request_id, header.skip_image_check)
        return pb.AddInstancesResponse(dataset=dataset_proto(record))

    async def GetDataset(self, request: pb.GetDatasetRequest, context: Context) -> pb.GetDatasetResponse:
        record = await asyncio.to_thread(self._door.artifacts().dataset, dataset_id(request.name, "name"))
        return pb.GetDatasetResponse(dataset=dataset_proto(record))

    async def ListDatasets(self, request: pb.ListDatasetsRequest, context: Context) -> pb.ListDatasetsResponse:
        artifacts = self._door.artifacts()
        names, token = page(await asyncio.to_thread(artifacts.datasets), request.page_size, request.page_token)
        records = [await asyncio.to_thread(artifacts.dataset, name) for name in names]
        return pb.ListDatasetsResponse(datasets=[dataset_proto(r) for r in records], next_page_token=token)

    async def DeleteDataset(self, request: pb.DeleteDatasetRequest, context: Context) -> pb.DeleteDatasetResponse:
        await self._door.delete_dataset(dataset_id(request.name, "name"))
        return pb.DeleteDatasetResponse()

    async def ListInstances(self, request: pb.ListInstancesRequest, context: Context) -> pb.ListInstancesResponse:
        artifacts = self._door.artifacts()
        record = await asyncio.to_thread(artifacts.dataset, dataset_id(request.parent, "parent"))
        table = await asyncio.to_thread(artifacts.instances, record)
        if request.split:
            table = table.filter(pc.equal(table.column("split"), request.split))
        first, end, token = page_bounds(table.num_rows, request.page_size, request.page_token)
        response = pb.ListInstancesResponse(next_page_token=token)
        for row in table.slice(first, end - first).to_pylist():
            response.instances.append(_instance_proto(row))
        return response


def _instance_proto(row: dict[str, Any]) -> types_pb2.Instance:
    out = types_pb2.Instance(
        instance_id=row["instance_id"],
        image_uri=row["image_uri"],
        label=row["label"] or "",
        split=row["split"],
        kind=types_pb2.INSTANCE_KIND_OBJECT,
        given=dict(row["given"] or ()),
    )
    if row["left_px"] is not None:
        for name in ("left_px", "top_px", "width_px", "height_px"):
            setattr(out.box, name, row[name])
    for point in row["keypoints"] or ():
        kind = f"VISIBILITY_{(point['visibility'] or 'unspecified').upper()}"
        out.keypoints.add(
            keypoint=point["keypoint"] or "",
            x_px=point["x_px"] or 0.0,
            y_px=point["y_px"] or 0.0,
            visibility=types_pb2.Visibility.Value(kind) if kind in types_pb2.Visibility.keys() else 0,  # noqa: SIM118
        )
    return out


class ModelServicer(model_pb2_grpc.ModelServiceServicer):
    """proto in, the door in a thread, proto out."""

    def __init__(self, door: Door) -> None:
        self._door = door

    async def AddScores(
        self, request_iterator: AsyncIterator[model_pb2.AddScoresRequest], context: Context
    ) -> model_pb2.AddScoresResponse:
        header = await _header(request_iterator)
        dataset = dataset_id(header.parent, "parent")
        metric = next((k for k, v in _METRICS.items() if v == header.metric), "")
        table = await receive_table(_arrow(request_iterator), self._door.settings.max_upload_bytes, "scores")
        record = await asyncio.to_thread(
            self._door.add_scores, dataset, header.model_id, table, metric, header.request_id
        )
        return model_pb2.AddScoresResponse(model=model_proto(record))

    async def GetModel(self, request: model_pb2.GetModelRequest, context: Context) -> model_pb2.GetModelResponse:
        name = parse(request.name, "models", "name")
        record = await asyncio.to_thread(self._door.artifacts().model, name.dataset, name.id)
        return model_pb2.GetModelResponse(model=model_proto(record))

    async def ListModels(self, request: model_pb2.ListModelsRequest, context: Context) -> model_pb2.ListModelsResponse:
        dataset = dataset_id(request.parent, "parent")
        artifacts = self._door.artifacts()
        await asyncio.to_thread(artifacts.dataset, dataset)
        names, token = page(await asyncio.to_thread(artifacts.models, dataset), request.page_size, request.page_token)
        records = [await asyncio.to_thread(artifacts.model, dataset, name) for name in names]
        return model_pb2.ListModelsResponse(models=[model_proto(r) for r in records], next_page_token=token)

    async def DeleteModel(
        self, request: model_pb2.DeleteModelRequest, context: Context
    ) -> model_pb2.DeleteModelResponse:
        name = parse(request.name, "models", "name")
        artifacts = self._door.artifacts()
        await asyncio.to_thread(artifacts.model, name.dataset, name.id)
        await asyncio.to_thread(artifacts.delete_model, name.dataset, name.id)
        return model_pb2.DeleteModelResponse()


class SchemaServicer(schema_pb2_grpc.SchemaServiceServicer):
    """proto in, the door in a thread, proto out."""

    def __init__(self, door: Door) -> None:
        self._door = door

    async def CreateSchema(
        self, request: schema_pb2.CreateSchemaRequest, context: Context
    ) -> schema_pb2.CreateSchemaResponse:
        dataset = dataset_id(request.parent, "parent")
        schema = schema_of(request.schema)
        await asyncio.to_thread(self._door.create_schema, dataset, schema)
        return schema_pb2.CreateSchemaResponse(schema=schema_proto(schema, dataset))

    async def GetSchema(self, request: schema_pb2.GetSchemaRequest, context: Context) -> schema_pb2.GetSchemaResponse:
        name = parse(request.name, "schemas", "name")
        artifacts = self._door.artifacts()
        schema_id = name.id
        if schema_id == CURRENT:
            await asyncio.to_thread(artifacts.dataset, name.dataset)
            current = await asyncio.to_thread(artifacts.current_schema_id, name.dataset)
            if current is None:
                raise invalid("name", f"dataset '{name.dataset}' has no schema yet; start a run or import one")
            schema_id = current
        schema, provenance = await asyncio.to_thread(artifacts.schema, name.dataset, schema_id)
        return schema_pb2.GetSchemaResponse(
            schema=schema_proto(schema, name.dataset), provenance=provenance_proto(provenance)
        )

    async def ListSchemas(
        self, request: schema_pb2.ListSchemasRequest, context: Context
    ) -> schema_pb2.ListSchemasResponse:
        dataset = dataset_id(request.parent, "parent")
        artifacts = self._door.artifacts()
        await asyncio.to_thread(artifacts.dataset, dataset)
        ids, token = page(await asyncio.to_thread(artifacts.schemas, dataset), request.page_size, request.page_token)
        schemas = [(await asyncio.to_thread(artifacts.schema, dataset, i))[0] for i in ids]
        return schema_pb2.ListSchemasResponse(
            schemas=[schema_proto(s, dataset) for s in schemas], next_page_token=token
        )

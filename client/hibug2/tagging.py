"""Tags of a dataset: asked for, followed, and what could not be tagged."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pyarrow as pa

from hibug2 import messages
from hibug2.connection import PAGE, Connection, dataset_name, full_name, gather, new_id
from hibug2.errors import HiBug2Error
from hibug2.v1 import schema_pb2, tagging_pb2, types_pb2

DEAD = pa.schema(
    [
        ("tagging", pa.string()),
        ("instance_id", pa.string()),
        ("image_uri", pa.string()),
        ("reason", pa.string()),
    ]
)


class Tagging(Connection):
    """The calls of `Client` about taggings; a run makes its own."""

    def tag(
        self,
        dataset: str,
        schema: str = "current",
        *,
        splits: Sequence[str] = (),
        priority: str | None = None,
        budget: float | None = None,
        account: str = "",
    ) -> types_pb2.Job:
        """Tag `splits` of a dataset (all but train when none is named) with a schema; returns the job at once.

        Tags that are there from earlier taggings are taken over. `priority` is interactive or batch. `budget` bounds
        what language models may cost, in the currency of the model's price; it is charged to `account`, or to the
        tagging itself. A tagging that pauses because it is spent goes on when it is asked for with a higher one.
        """
        parent = dataset_name(dataset)
        name = full_name(parent, "schemas", schema)
        if schema == "current":
            name = self._call(self._schemas.GetSchema, schema_pb2.GetSchemaRequest(name=name)).schema.name
        kind = messages.number(tagging_pb2.Priority.DESCRIPTOR, priority, "priority") if priority else 0
        request = tagging_pb2.CreateTaggingRequest(
            parent=parent,
            schema=name,
            splits=splits,
            request_id=new_id(),
            priority=tagging_pb2.Priority.ValueType(kind),
            budget=None if budget is None else types_pb2.Budget(account=account, amount=budget),
        )
        return self._call(self._taggings.CreateTagging, request, request.request_id).job

    def tagging(self, name: str) -> tagging_pb2.GetTaggingResponse:
        """How a tagging stands: its job, how many instances could not be tagged, and how each attribute came out."""
        return self._call(self._taggings.GetTagging, tagging_pb2.GetTaggingRequest(name=name))

    def watch_tagging(self, name: str) -> Iterator[tagging_pb2.WatchTaggingResponse]:
        """Snapshots of a tagging until it has ended or is paused."""
        yield from self._read(self._taggings.WatchTagging, tagging_pb2.WatchTaggingRequest(name=name))

    def cancel_tagging(self, name: str) -> types_pb2.Job:
        """Stop a tagging; what is tagged is kept and found again."""
        return self._call(self._taggings.CancelTagging, tagging_pb2.CancelTaggingRequest(name=name)).job

    def dead_items(self, parent: str = "") -> pa.Table:
        """Instances that could not be tagged, and why: of a dataset, of a tagging named datasets/…, or of all datasets.

        Columns: tagging, instance_id, image_uri, reason.
        """
        name = _parent(parent)
        pages = self._pages(
            lambda token: tagging_pb2.ListDeadItemsRequest(parent=name, page_size=PAGE, page_token=token),
            self._taggings.ListDeadItems,
        )
        return gather((_batch(page.dead_items) for page in pages), DEAD)

    def redrive(self, parent: str = "") -> tagging_pb2.RedriveDeadItemsResponse:
        """Try what `dead_items` shows once more, after its cause is mended: how many, and the jobs that do so."""
        request = tagging_pb2.RedriveDeadItemsRequest(parent=_parent(parent), request_id=new_id())
        return self._call(self._taggings.RedriveDeadItems, request, request.request_id)

    def check_tags(
        self,
        parent: str,
        *,
        sample_count: int = 100,
        seed: int = 0,
        budget: float | None = None,
        on_progress: Callable[[types_pb2.Job], object] | None = None,
    ) -> tagging_pb2.TagQuality:
        """Tag a sample of a tagging once more and say how far the tags of each attribute can be trusted; waits.

        `parent` is a tagging, or a dataset for its newest one by its current schema. Attributes that models tagged are
        asked of a language model, which costs as many calls as instances, `budget` at most. The same check is not paid
        twice. Slices of doubtful attributes are marked from then on.
        """
        name = dataset_name(parent)
        request = tagging_pb2.CreateTagCheckRequest(
            parent="/".join(name.split("/")[:2]),
            tagging=name if name.count("/") > 1 else "",
            sample_count=sample_count,
            seed=seed,
            request_id=new_id(),
            budget=None if budget is None else types_pb2.Budget(amount=budget),
        )
        job = self._call(self._taggings.CreateTagCheck, request, request.request_id).job
        job = self._ended(job, self._taggings.WatchTagCheck, tagging_pb2.WatchTagCheckRequest, on_progress)
        return self._call(self._taggings.GetTagCheck, tagging_pb2.GetTagCheckRequest(name=job.name)).quality

    def tag_quality(self, parent: str, schema: str = "") -> tagging_pb2.TagQuality:
        """What the last check of a tagging, or of the newest tagging of a dataset that was checked, found.

        `schema` (a name) leaves out taggings by others. HiBug2Error with code NOT_FOUND where there was no check.
        """
        request = tagging_pb2.GetTagQualityRequest(parent=dataset_name(parent), schema=schema)
        return self._call(self._taggings.GetTagQuality, request).quality

    def doubts(self, dataset: str, schema: str) -> dict[str, str]:
        """Attributes of a schema (a name) that are not to be relied on, each with the reason.

        Empty where no tagging by it was checked, or where the platform cannot do so.
        """
        try:
            found = self.tag_quality(dataset, schema)
        except HiBug2Error as error:
            if error.code in ("NOT_FOUND", "UNIMPLEMENTED"):
                return {}
            raise
        return {a.attribute: a.doubt for a in found.attributes if a.doubt}

    def backlog(self) -> tagging_pb2.GetBacklogResponse:
        """Work items that wait or are being done, of all teams."""
        return self._call(self._taggings.GetBacklog, tagging_pb2.GetBacklogRequest())


def _parent(parent: str) -> str:
    return dataset_name(parent) if parent else ""


def _batch(items: Sequence[tagging_pb2.DeadItem]) -> pa.RecordBatch:
    return pa.RecordBatch.from_pydict({f.name: [getattr(item, f.name) for item in items] for f in DEAD}, DEAD)

"""Schemas on the wire."""

from __future__ import annotations

from hibug2.v1 import types_pb2
from shared.errors import Violation, refuse
from shared.schema import Attribute, Category, Measure, Schema, Tagger, Task, check_schema

_TASKS = {
    types_pb2.TASK_CLASSIFICATION: Task.CLASSIFICATION,
    types_pb2.TASK_DETECTION: Task.DETECTION,
    types_pb2.TASK_POSE: Task.POSE,
}
_CATEGORIES = {
    types_pb2.CATEGORY_MAIN_OBJECT: Category.MAIN_OBJECT,
    types_pb2.CATEGORY_BACKGROUND: Category.BACKGROUND,
    types_pb2.CATEGORY_GLOBAL: Category.GLOBAL,
}
_TAGGERS = {
    types_pb2.TAGGER_VLM: Tagger.VLM,
    types_pb2.TAGGER_MEASURED: Tagger.MEASURED,
    types_pb2.TAGGER_CLIP: Tagger.CLIP,
    types_pb2.TAGGER_GIVEN: Tagger.GIVEN,
}


def task_of(value: types_pb2.Task.ValueType, field: str = "task") -> Task:
    """The task that `value` names; InvalidInput for unspecified and unknown ones."""
    if value not in _TASKS:
        refuse([Violation(field, f"is {value}; give one of {', '.join(Task)}")])
    return _TASKS[value]


def task_proto(task: Task) -> types_pb2.Task.ValueType:
    return next(k for k, v in _TASKS.items() if v is task)


def tagger_proto(tagger: Tagger) -> types_pb2.Tagger.ValueType:
    return next(k for k, v in _TAGGERS.items() if v is tagger)


def schema_of(message: types_pb2.Schema) -> Schema:
    """The schema in `message`, checked; InvalidInput names the fields that are wrong."""
    found: list[Violation] = []
    attributes: list[Attribute] = []
    for i, a in enumerate(message.attributes):
        if a.category not in _CATEGORIES:
            found.append(Violation(f"schema.attributes[{i}].category", "must be main_object, background or global"))
        if a.tagger not in _TAGGERS:
            found.append(Violation(f"schema.attributes[{i}].tagger", "must be vlm, measured, clip or given"))
        attributes.append(
            Attribute(
                name=a.attribute,
                category=_CATEGORIES.get(a.category, Category.GLOBAL),
                tags=tuple(a.tags),
                tagger=_TAGGERS.get(a.tagger, Tagger.VLM),
                description=a.description,
                measure=Measure(a.measure.measure, tuple(a.measure.edges)) if a.HasField("measure") else None,
                sources=tuple(a.sources),
                locked=a.locked,
            )
        )
    refuse(found)
    return check_schema(Schema(task_of(message.task, "schema.task"), tuple(message.main_objects), tuple(attributes)))


def schema_proto(schema: Schema, dataset: str) -> types_pb2.Schema:
    """`schema` as the resource of `dataset`."""
    out = types_pb2.Schema(
        name=f"datasets/{dataset}/schemas/{schema.schema_id}",
        task=task_proto(schema.task),
        main_objects=schema.main_objects,
    )
    for a in schema.attributes:
        message = out.attributes.add(
            attribute=a.name,
            category=next(k for k, v in _CATEGORIES.items() if v is a.category),
            tags=a.tags,
            tagger=tagger_proto(a.tagger),
            description=a.description,
            sources=a.sources,
            locked=a.locked,
        )
        if a.measure is not None:
            message.measure.CopyFrom(types_pb2.Measure(measure=a.measure.name, edges=a.measure.edges))
    return out

"""Messages of the contract as plain JSON and as Arrow tables, and schemas from JSON."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa
from google.protobuf import json_format, struct_pb2
from google.protobuf.descriptor import EnumDescriptor
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from hibug2.errors import UserError
from hibug2.v1 import prediction_pb2, repair_pb2, slice_pb2, types_pb2

_PAIR = pa.struct([("attribute", pa.string()), ("tag", pa.string())])
TAGS = pa.list_(_PAIR)
_NAMES = pa.list_(pa.string())
_BLAME = pa.list_(pa.struct([("attribute", pa.string()), ("tag", pa.string()), ("drop", pa.float64())]))
SLICES = pa.schema(
    [
        ("rank", pa.int64()),
        ("tags", TAGS),
        ("count", pa.int64()),
        ("scored_count", pa.int64()),
        ("mean", pa.float64()),
        ("drop", pa.float64()),
        ("parent_drop", pa.float64()),
        ("error_share", pa.float64()),
        ("interval_low", pa.float64()),
        ("interval_high", pa.float64()),
        ("p_value", pa.float64()),
        ("q_value", pa.float64()),
        ("family", pa.int64()),
        ("blame", _BLAME),
        ("doubtful", _NAMES),
    ]
)
FAMILIES = pa.schema(
    [
        *(
            SLICES.field(name)
            for name in ("rank", "tags", "count", "mean", "drop", "q_value", "error_share", "doubtful")
        ),
        ("member_ranks", pa.list_(pa.int64())),
        ("cover_rank", pa.int64()),
        ("covered_share", pa.float64()),
    ]
)
CONFIRMED = pa.schema(
    [
        ("tags", TAGS),
        ("found_count", pa.int64()),
        ("found_mean", pa.float64()),
        ("held_count", pa.int64()),
        ("held_mean", pa.float64()),
        ("p_value", pa.float64()),
        ("q_value", pa.float64()),
        ("doubtful", _NAMES),
    ]
)
OVERLAPS = pa.schema([("first", pa.string()), ("second", pa.string()), ("share", pa.float64())])
DIFFERENCES = pa.schema(
    [
        ("tags", TAGS),
        ("count", pa.int64()),
        ("paired_count", pa.int64()),
        ("first_mean", pa.float64()),
        ("second_mean", pa.float64()),
        ("difference", pa.float64()),
        ("p_value", pa.float64()),
        ("q_value", pa.float64()),
        ("change", pa.string()),
        ("doubtful", _NAMES),
    ]
)
VIOLATIONS = pa.schema(
    [
        ("tags", TAGS),
        ("baseline_mean", pa.float64()),
        ("candidate_mean", pa.float64()),
        ("max_drop", pa.float64()),
        ("paired_count", pa.int64()),
        ("q_value", pa.float64()),
        ("reason", pa.string()),
        ("doubtful", _NAMES),
    ]
)
PREDICTED = pa.schema(
    [
        ("rank", pa.int64()),
        ("tags", TAGS),
        ("score", pa.float64()),
        ("method", pa.string()),
        ("origin_ranks", pa.list_(pa.int64())),
        ("replaced", _PAIR),
        ("similarity", pa.float64()),
        ("known_count", pa.int64()),
        ("target", pa.string()),
        ("expected_mean", pa.float64()),
        ("doubtful", _NAMES),
    ]
)
VERIFIED = pa.schema(
    [
        *PREDICTED,
        ("scored_count", pa.int64()),
        ("mean", pa.float64()),
        ("drop", pa.float64()),
        ("interval_low", pa.float64()),
        ("interval_high", pa.float64()),
        ("is_error_slice", pa.bool_()),
    ]
)
VERIFIED_METHODS = pa.schema(
    [
        ("method", pa.string()),
        ("pair_counts", pa.list_(pa.int32())),
        ("predicted_count", pa.int64()),
        *(
            (f"{base}{name}", pa.int64() if name == "count" else pa.float64())
            for base in ("verified_", "base_")
            for name in ("count", "mean_drop", "interval_low", "interval_high", "error_slice_share")
        ),
    ]
)
PICKS = pa.schema(
    [
        ("instance_id", pa.string()),
        ("image_uri", pa.string()),
        ("slice_rank", pa.int64()),
        ("slice_mean", pa.float64()),
        ("tags", TAGS),
        ("pool_index", pa.int64()),
        ("predicted_label", pa.string()),
        ("value", pa.float64()),
    ]
)
PICKED_METHODS = pa.schema(
    [
        ("method", pa.string()),
        ("pick_count", pa.int64()),
        ("shared_count", pa.int64()),
        ("matching_count", pa.int64()),
    ]
)
NEEDS = pa.schema(
    [
        ("slice_rank", pa.int64()),
        ("slice_mean", pa.float64()),
        ("tags", TAGS),
        ("pool_count", pa.int64()),
        ("missing_count", pa.int64()),
        ("description", pa.string()),
        ("prompt", pa.string()),
        ("doubtful", _NAMES),
    ]
)
_GROUP = pa.struct(
    [
        ("group", pa.string()),
        ("scored_count", pa.int64()),
        ("mean", pa.float64()),
        ("change", pa.float64()),
        ("change_low", pa.float64()),
        ("change_high", pa.float64()),
    ]
)
OUTCOMES = pa.schema(
    [
        ("model", pa.string()),
        ("method", pa.string()),
        ("added_count", pa.int64()),
        ("overall_mean", pa.float64()),
        ("failing_mean", pa.float64()),
        ("other_mean", pa.float64()),
        ("groups", pa.list_(_GROUP)),
    ]
)
# Those that SliceScore calls the same.
_SCORE_FIELDS = SLICES.names[3:-3]


# JSON


def word(kind: EnumDescriptor, number: int) -> str:
    """`succeeded` for JOB_STATE_SUCCEEDED; empty for the unspecified value."""
    name = kind.values_by_number[number].name if number in kind.values_by_number else str(number)
    return str(name).removeprefix(_prefix(kind)).lower() if number else ""


def number(kind: EnumDescriptor, text: str, field: str) -> int:
    """The value of `kind` that `word` calls `text`; UserError when there is none."""
    prefix = _prefix(kind)
    values = {v.name.removeprefix(prefix).lower(): v.number for v in kind.values if v.number}
    if text not in values:
        raise UserError(field, f"'{text}' is not one of {', '.join(values)}")
    return int(values[text])


def _prefix(kind: EnumDescriptor) -> str:
    return str(kind.values_by_number[0].name).removesuffix("UNSPECIFIED")


def as_json(message: Message) -> dict[str, Any]:
    """`message` as plain values: numbers stay numbers, enums are words, times RFC 3339, durations seconds."""
    return {field.name: _field_json(message, field) for field in message.DESCRIPTOR.fields}


def _field_json(message: Message, field: Any) -> Any:
    value = getattr(message, field.name)
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        return dict(value)
    if field.is_repeated:
        return [_value_json(item, field) for item in value]
    if field.has_presence and not message.HasField(field.name):
        return None
    return _value_json(value, field)


def _value_json(value: Any, field: Any) -> Any:
    if isinstance(value, Timestamp):
        return value.ToJsonString()
    if isinstance(value, Duration):
        return value.seconds + value.nanos / 1e9
    if isinstance(value, struct_pb2.Struct):
        return json_format.MessageToDict(value)
    if isinstance(value, Message):
        return as_json(value)
    if field.enum_type is not None:
        return word(field.enum_type, value)
    return plain(value)


def plain(value: Any) -> Any:
    """`value` with every NaN and infinity, which JSON cannot say, as None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value


def rows(table: pa.Table) -> list[dict[str, Any]]:
    """The rows of a table as plain JSON."""
    return [plain(row) for row in table.to_pylist()]


# Arrow


def _pair(pair: types_pb2.AttributeTag) -> dict[str, str]:
    return {"attribute": pair.attribute, "tag": pair.tag}


def _pairs(pairs: Iterable[types_pb2.AttributeTag]) -> list[dict[str, str]]:
    return [_pair(pair) for pair in pairs]


def _fields(message: Message, names: Iterable[str]) -> dict[str, Any]:
    """The fields `names`; an optional one that is absent is None."""
    by_name = message.DESCRIPTOR.fields_by_name
    return {
        name: getattr(message, name) if not by_name[name].has_presence or message.HasField(name) else None
        for name in names
    }


def slices_batch(slices: Iterable[slice_pb2.Slice]) -> pa.RecordBatch:
    """Slices as a batch of SLICES; what a slice of an enumeration lacks is null."""
    return pa.RecordBatch.from_pylist([_slice_row(s) for s in slices], schema=SLICES)


def _slice_row(found: slice_pb2.Slice) -> dict[str, Any]:
    row: dict[str, Any] = {"rank": found.rank or None, "tags": _pairs(found.tags), "count": found.instance_count}
    row["doubtful"] = list(found.doubtful)
    if found.HasField("score"):
        row |= _fields(found.score, _SCORE_FIELDS)
        row["family"] = found.score.family_rank
        row["blame"] = [{**_pair(b.tag), "drop": b.drop} for b in found.score.blame]
    return row


def families_batch(families: Iterable[slice_pb2.Family]) -> pa.RecordBatch:
    """Families as a batch of FAMILIES; the slice is the representative."""
    rows = [
        {**_slice_row(f.representative), **_fields(f, FAMILIES.names[-3:]), "member_ranks": list(f.member_ranks)}
        for f in families
    ]
    return pa.RecordBatch.from_pylist([{name: row.get(name) for name in FAMILIES.names} for row in rows], FAMILIES)


def confirmed_batch(slices: Iterable[slice_pb2.ConfirmedSlice]) -> pa.RecordBatch:
    """Confirmed slices as a batch of CONFIRMED; what the held half cannot say is None."""
    rows = [
        {
            "tags": _pairs(found.tags),
            **_fields(found, CONFIRMED.names[1:-1]),
            "doubtful": list(found.doubtful),
        }
        for found in slices
    ]
    return pa.RecordBatch.from_pylist(rows, CONFIRMED)


def hypothesis_row(response: slice_pb2.EvaluateHypothesisResponse) -> dict[str, Any]:
    """What was found of a hypothesis, as SLICES calls it; None where no instance is scored."""
    names = ("mean", "drop", "error_share", "interval_low", "interval_high", "p_value")
    scored = response.HasField("score")
    return {
        "count": response.instance_count,
        "scored_count": response.score.scored_count,
        **(_fields(response.score, names) if scored else dict.fromkeys(names)),
    }


def differences_batch(differences: Iterable[slice_pb2.SliceDifference]) -> pa.RecordBatch:
    """Differences of two models as a batch of DIFFERENCES; the change is empty where it is not asked."""
    rows = [
        {
            "tags": _pairs(d.tags),
            "count": d.instance_count,
            **_fields(d, DIFFERENCES.names[2:-2]),
            "change": word(slice_pb2.VersionChange.DESCRIPTOR, d.change),
            "doubtful": list(d.doubtful),
        }
        for d in differences
    ]
    return pa.RecordBatch.from_pylist(rows, DIFFERENCES)


def violations_batch(violations: Iterable[slice_pb2.GateViolation]) -> pa.RecordBatch:
    """What a gate forbids as a batch of VIOLATIONS; no tags for the overall mean."""
    rows = [
        {"tags": _pairs(v.tags), **_fields(v, VIOLATIONS.names[1:-1]), "doubtful": list(v.doubtful)} for v in violations
    ]
    return pa.RecordBatch.from_pylist(rows, VIOLATIONS)


def predicted_batch(predicted: Iterable[prediction_pb2.PredictedSlice]) -> pa.RecordBatch:
    """Predicted slices as a batch of PREDICTED."""
    method = prediction_pb2.PredictionMethod.DESCRIPTOR
    return pa.RecordBatch.from_pylist(
        [
            {
                "rank": p.rank,
                "tags": _pairs(p.tags),
                "score": p.score,
                "method": word(method, p.method),
                "origin_ranks": list(p.origin_ranks),
                "replaced": _pair(p.replaced) if p.HasField("replaced") else None,
                "similarity": p.similarity if p.HasField("replaced") else None,
                "target": p.target or None,
                **_fields(p, ["known_count", "expected_mean"]),
                "doubtful": list(p.doubtful),
            }
            for p in predicted
        ],
        schema=PREDICTED,
    )


def verified_table(
    predicted: Sequence[pa.Table], verified: Sequence[prediction_pb2.VerifiedPrediction]
) -> tuple[pa.Table, pa.Table]:
    """The methods (VERIFIED_METHODS) and the slices (VERIFIED) of predictions, each with its slices in rank order."""
    method = prediction_pb2.PredictionMethod.DESCRIPTOR
    methods = []
    for v in verified:
        row: dict[str, Any] = {
            "method": word(method, v.method),
            "pair_counts": list(v.pair_counts),
            "predicted_count": v.predicted_slice_count,
        }
        for base, drop in (("verified_", v.verified), ("base_", v.base)):
            told = _fields(drop, ["mean_drop", "interval_low", "interval_high", "error_slice_share"])
            row |= {f"{base}count": drop.slice_count, **{f"{base}{name}": value for name, value in told.items()}}
        methods.append(row)
    slices = [
        {**row, **_fields(s, VERIFIED.names[len(PREDICTED) :])}
        for table, v in zip(predicted, verified, strict=True)
        for row, s in zip(table.to_pylist(), v.slices, strict=True)
    ]
    return pa.Table.from_pylist(methods, VERIFIED_METHODS), pa.Table.from_pylist(slices, VERIFIED)


def picks_batch(picks: Iterable[repair_pb2.Pick]) -> pa.RecordBatch:
    """Picks as a batch of PICKS; slice_rank is 0 for a pick that no slice asked for."""
    rows = [
        {
            **_fields(p, ["instance_id", "image_uri", "slice_rank", "slice_mean", "pool_index", "value"]),
            "tags": _pairs(p.tags),
            "predicted_label": p.predicted_label or None,
        }
        for p in picks
    ]
    return pa.RecordBatch.from_pylist(rows, schema=PICKS)


def picked_methods(response: repair_pb2.GetSelectionResponse) -> pa.Table:
    """What each method of a selection picked, as PICKED_METHODS."""
    kind = repair_pb2.SelectionMethod.DESCRIPTOR
    rows = [
        {"method": word(kind, m.method), **_fields(m, ["pick_count", "shared_count", "matching_count"])}
        for m in response.methods
    ]
    return pa.Table.from_pylist(rows, PICKED_METHODS)


def needs_batch(needs: Iterable[repair_pb2.DataNeed]) -> pa.RecordBatch:
    """Data to collect as a batch of NEEDS."""
    names = [name for name in NEEDS.names if name not in ("tags", "doubtful")]
    rows = [{**_fields(n, names), "tags": _pairs(n.tags), "doubtful": list(n.doubtful)} for n in needs]
    return pa.RecordBatch.from_pylist(rows, schema=NEEDS)


def outcomes_batch(outcomes: Iterable[repair_pb2.RepairOutcome]) -> pa.RecordBatch:
    """Outcomes of repair as a batch of OUTCOMES; the method of the model without picks is "original"."""
    method = repair_pb2.SelectionMethod.DESCRIPTOR
    return pa.RecordBatch.from_pylist(
        [
            {
                "model": o.model.rpartition("/")[2],
                "method": word(method, o.method) if o.selection else "original",
                "added_count": o.added_count,
                "overall_mean": o.overall_mean,
                "failing_mean": o.failing_mean if o.HasField("failing_mean") else None,
                "other_mean": o.other_mean if o.HasField("other_mean") else None,
                "groups": [_group(g) for g in o.groups],
            }
            for o in outcomes
        ],
        schema=OUTCOMES,
    )


def enumeration_schema(scores: Sequence[str], judged: bool = False) -> pa.Schema:
    """The columns that `hibug2 enumerate` writes; `judged` for error slices alone."""
    fields = [("tags", TAGS), ("count", pa.int64())]
    for score in scores:
        fields += [(f"{score}_count", pa.int64()), (f"{score}_mean", pa.float64())]
    if judged:
        names = ("drop", "parent_drop", "error_share", "interval_low", "interval_high")
        fields += [(name, pa.float64()) for name in names]
    return pa.schema(fields)


# Schemas


def schema_to_json(schema: types_pb2.Schema) -> dict[str, Any]:
    """The exported form of a schema: task, main_objects, attributes. `schema_from_json` reads exactly it back."""
    return {
        "task": word(types_pb2.Task.DESCRIPTOR, schema.task),
        "main_objects": list(schema.main_objects),
        "attributes": [_attribute_to_json(a) for a in schema.attributes],
    }


def _attribute_to_json(attribute: types_pb2.Attribute) -> dict[str, Any]:
    out: dict[str, Any] = {
        "name": attribute.attribute,
        "category": word(types_pb2.Category.DESCRIPTOR, attribute.category),
        "tags": list(attribute.tags),
        "tagger": word(types_pb2.Tagger.DESCRIPTOR, attribute.tagger),
    }
    if attribute.description:
        out["description"] = attribute.description
    if attribute.HasField("measure"):
        out["measure"] = {"name": attribute.measure.measure, "edges": list(attribute.measure.edges)}
    out["sources"] = list(attribute.sources)  # even none: without the word an attribute is the user's
    if attribute.locked:
        out["locked"] = True
    return out


def schema_from_json(data: Any) -> types_pb2.Schema:
    """The schema that `data` says, read but not judged: the server checks the rules. UserError names the field.

    An attribute needs a name and tags; it is one of the main object, tagged by the language model and from the user
    where nothing else is said. `attributes` may map names to tags. A `name` of the schema is passed over.
    """
    if not isinstance(data, Mapping):
        raise UserError("schema", "must be an object with task, main_objects and attributes")
    _refuse_strangers(data, ("name", "task", "main_objects", "attributes"), "schema")
    attributes = data.get("attributes")
    if isinstance(attributes, Mapping):
        attributes = [{"name": name, "tags": tags} for name, tags in attributes.items()]
    if not isinstance(attributes, list):
        raise UserError("schema.attributes", "must be a list")
    task = number(types_pb2.Task.DESCRIPTOR, str(data.get("task", "")), "schema.task")
    return types_pb2.Schema(
        task=types_pb2.Task.ValueType(task),
        main_objects=_texts(data.get("main_objects", []), "schema.main_objects"),
        attributes=[_attribute_from_json(item, f"schema.attributes[{i}]") for i, item in enumerate(attributes)],
    )


def _attribute_from_json(data: Any, where: str) -> types_pb2.Attribute:
    if not isinstance(data, Mapping):
        raise UserError(where, "must be an object with name and tags")
    known = ("name", "category", "tags", "tagger", "description", "measure", "sources", "locked")
    _refuse_strangers(data, known, where)
    if "name" not in data:
        raise UserError(f"{where}.name", "is missing")
    if "tags" not in data:
        raise UserError(
            f"{where}.tags",
            f"'{data['name']}' has none; list two or more, or have them found by `hibug2 schema generate --attribute`",
        )
    category = number(types_pb2.Category.DESCRIPTOR, str(data.get("category", "main_object")), f"{where}.category")
    tagger = number(types_pb2.Tagger.DESCRIPTOR, str(data.get("tagger", "vlm")), f"{where}.tagger")
    measure, locked = data.get("measure"), data.get("locked", False)
    if not isinstance(locked, bool):
        raise UserError(f"{where}.locked", f"must be true or false, not {locked!r}")
    return types_pb2.Attribute(
        attribute=str(data["name"]),
        category=types_pb2.Category.ValueType(category),
        tags=_texts(data["tags"], f"{where}.tags"),
        tagger=types_pb2.Tagger.ValueType(tagger),
        description=str(data.get("description") or ""),
        measure=None if measure is None else _measure_from_json(measure, f"{where}.measure"),
        sources=_texts(data.get("sources", ["user"]), f"{where}.sources"),
        locked=locked,
    )


def _refuse_strangers(data: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    """A word that nobody reads is a slip of the pen, and what was meant would be lost."""
    if strange := [str(key) for key in data if key not in known]:
        raise UserError(f"{where}.{strange[0]}", f"is not known here; what may be said is {', '.join(known)}")


def _measure_from_json(data: Any, where: str) -> types_pb2.Measure:
    if not isinstance(data, Mapping) or "name" not in data:
        raise UserError(where, "must be an object with name and edges")
    _refuse_strangers(data, ("name", "edges"), where)
    try:
        return types_pb2.Measure(measure=str(data["name"]), edges=[float(e) for e in data.get("edges", [])])
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}.edges", "must be a list of numbers") from error


def _texts(data: Any, where: str) -> list[str]:
    if not isinstance(data, list):
        raise UserError(where, "must be a list")
    for i, item in enumerate(data):
        # Readers of YAML make a bare yes true, which is not the tag that was meant.
        if not isinstance(item, str):
            raise UserError(f"{where}[{i}]", f"must be text, not {item!r}; put it in quotes")
    return list(data)


def _group(outcome: repair_pb2.GroupOutcome) -> dict[str, Any]:
    names = ["scored_count", "mean", "change", "change_low", "change_high"]
    return {"group": word(repair_pb2.RepairGroup.DESCRIPTOR, outcome.group), **_fields(outcome, names)}

"""A request for a generation, read and checked before anything is measured or paid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from hibug2.v1 import attribute_pb2 as pb
from hibug2.v1 import types_pb2
from services.attribute.config import Settings
from services.attribute.normalise import USER, Candidate
from services.attribute.proposal import Limits, check_limits, check_main_objects, check_own
from shared.errors import InvalidInput, Precondition, Violation, invalid
from shared.names import dataset_id, parse
from shared.rpc.schemas import schema_of, task_proto
from shared.schema import MAX_ATTRIBUTES, Attribute, Tagger, Task
from shared.store.artifacts import Artifacts, DatasetRecord, ModelRecord

MAX_SAMPLE = 100_000
_LIMITS = ("max_attributes", "max_tags", "pair_count", "image_count")


@dataclass(frozen=True)
class Order:
    """What is to be generated, and from what."""

    record: DatasetRecord
    main_objects: tuple[str, ...]
    sample_count: int
    seed: int
    kept: tuple[Attribute, ...]  # locked, or the user's: in the schema as they are
    own: tuple[Candidate, ...]  # the user's without tags
    limits: Limits
    model: ModelRecord | None


def order_of(artifacts: Artifacts, request: pb.CreateGenerationRequest, settings: Settings) -> Order:
    """What `request` asks for. Raises InvalidInput, NotFound or Precondition when it cannot be done."""
    dataset = dataset_id(request.parent, "parent")
    if not 0 <= request.sample_count <= MAX_SAMPLE:
        raise invalid("sample_count", f"is {request.sample_count}; give 0 (the default) to {MAX_SAMPLE}")
    if request.model:
        parse(request.model, "models", "model", within=dataset)
    s, has_llm = settings, bool(settings.llm_base_url)
    limits = Limits(s.max_attributes, s.max_tags, s.pair_count, s.patience, s.confusion_count, s.image_count)
    limits = replace(limits, **{field.name: value for field, value in request.ListFields() if field.name in _LIMITS})
    check_limits(limits)
    record = artifacts.dataset(dataset)
    if not record.instance_count:
        raise Precondition(f"dataset '{dataset}' has no images; add instances first")
    with_tags, own = _of_the_user(request.attributes, record.task)
    check_own(own)
    main_objects = tuple(request.main_objects) or record.main_objects
    if has_llm:
        if not main_objects:
            raise invalid(
                "main_objects",
                f"dataset '{dataset}' names no class, and a language model must know what its images show; give "
                "main_objects, or add a column `label`",
            )
        check_main_objects(main_objects)
    elif own:
        raise Precondition(
            f"attribute '{own[0].name}' has no tags, and no language model is configured to find them; give tags, "
            "or set HIBUG2_LLM_BASE_URL and HIBUG2_LLM_MODEL"
        )
    by_model = has_llm and request.model
    return Order(
        record=record,
        main_objects=main_objects,
        sample_count=request.sample_count or s.sample_count,
        seed=request.seed,
        kept=_kept(artifacts, dataset, with_tags, own),
        own=own,
        limits=limits,
        model=artifacts.model(dataset, parse(request.model, "models", "model").id) if by_model else None,
    )


def _of_the_user(
    messages: Sequence[types_pb2.Attribute], task: Task
) -> tuple[tuple[Attribute, ...], tuple[Candidate, ...]]:
    """The attributes of a request: those with tags, and the names of those without."""
    with_tags: list[Attribute] = []
    own: list[Candidate] = []
    for i, message in enumerate(messages):
        one = types_pb2.Schema(task=task_proto(task), attributes=[message])
        (wanted,) = one.attributes
        wanted.category = wanted.category or types_pb2.CATEGORY_MAIN_OBJECT
        wanted.tagger = wanted.tagger or types_pb2.TAGGER_VLM
        asks = not wanted.tags
        if asks and wanted.tagger != types_pb2.TAGGER_VLM:
            raise invalid(f"attributes[{i}].tags", "are empty; only a language model can find the tags of an attribute")
        if asks:
            wanted.tags.extend(("yes", "no"))  # any two, so that the rest is checked
        try:
            (attribute,) = schema_of(one).attributes
        except InvalidInput as error:
            here = ("schema.attributes[0]", f"attributes[{i}]")
            violations = (Violation(v.field.replace(*here), v.description) for v in error.violations)
            raise InvalidInput(error.message.replace(*here), violations=tuple(violations)) from error
        if asks:
            own.append(Candidate(attribute.name, attribute.category, attribute.description, (USER,)))
        else:
            with_tags.append(replace(attribute, sources=tuple(dict.fromkeys((USER, *attribute.sources)))))
    return tuple(with_tags), tuple(own)


def _kept(
    artifacts: Artifacts, dataset: str, with_tags: Sequence[Attribute], own: Sequence[Candidate]
) -> tuple[Attribute, ...]:
    """What a schema takes over: of the current one what is locked or the user's, and the request's attributes."""
    asked = {name.casefold() for name in (*[a.name for a in with_tags], *[c.name for c in own])}
    if len(asked) < len(with_tags) + len(own):
        raise invalid("attributes", "two have the same name; give each once")
    current = artifacts.current_schema_id(dataset)
    kept: list[Attribute] = []
    for attribute in artifacts.schema(dataset, current)[0].attributes if current else ():
        if attribute.locked and attribute.name.casefold() in asked:
            raise invalid("attributes", f"'{attribute.name}' is locked in the current schema; unlock it first")
        own_work = USER in attribute.sources and attribute.tagger is not Tagger.GIVEN
        if attribute.locked or (own_work and attribute.name.casefold() not in asked):
            kept.append(attribute)
    if len(kept) + len(asked) > MAX_ATTRIBUTES:
        raise invalid("attributes", f"with those kept there are {len(kept) + len(asked)}; at most {MAX_ATTRIBUTES} fit")
    return (*kept, *with_tags)

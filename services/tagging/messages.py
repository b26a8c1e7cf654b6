"""What a check of tags found, as a message of the contract."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from hibug2.v1 import tagging_pb2 as pb
from shared.llm import Usage
from shared.rpc.costs import spent_cost
from shared.rpc.schemas import tagger_proto
from shared.schema import Tagger


def quality_proto(body: Mapping[str, Any]) -> pb.TagQuality:
    """The message that says what `check.conclude` wrote down."""
    names = ("tagging", "schema", "check", "sampled_count", "seed", "min_kappa", "model")
    out = pb.TagQuality(**{name: body[name] for name in names}, cost=spent_cost(Usage(**body["usage"])))
    out.create_time.FromDatetime(datetime.fromisoformat(body["create_time"]))
    for told in body["attributes"]:
        quality = out.attributes.add(
            attribute=told["attribute"],
            tagger=tagger_proto(Tagger(told["tagger"])),
            unknown_share=told["unknown_share"],
            not_visible_share=told["not_visible_share"],
            doubt=told["doubt"],
        )
        if told["retagged"] is not None:
            quality.retagged.CopyFrom(_agreement(told["retagged"]))
        for name, tagger, agreement in told["references"]:
            quality.references.add(reference=name, tagger=tagger_proto(Tagger(tagger)), agreement=_agreement(agreement))
    return out


def _agreement(told: Mapping[str, Any]) -> pb.TagAgreement:
    return pb.TagAgreement(compared_count=told["compared"], share=told["share"], kappa=told["kappa"])

"""Provenance on the wire."""

from __future__ import annotations

from datetime import datetime

from hibug2.v1 import types_pb2
from shared.store.artifacts import Provenance


def provenance_proto(provenance: Provenance) -> types_pb2.Provenance:
    """The message that says what `provenance` says."""
    out = types_pb2.Provenance(
        version=provenance.version,
        prompt_digests=dict(provenance.prompt_digests),
        model_snapshot=provenance.model_snapshot,
        seed=provenance.seed,
    )
    for name, digest in provenance.inputs.items():
        out.inputs.add(input=name, digest=digest)
    out.parameters.update(dict(provenance.parameters))
    out.create_time.FromDatetime(datetime.fromisoformat(provenance.create_time))
    return out

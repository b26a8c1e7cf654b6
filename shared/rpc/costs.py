"""What was or will be spent on language models, as a message."""

from __future__ import annotations

from hibug2.v1 import types_pb2
from shared.llm.prices import Estimate


def estimated_cost(found: Estimate) -> types_pb2.Cost:
    """An estimate as a message."""
    return types_pb2.Cost(
        call_count=found.calls,
        input_token_count=found.input_tokens,
        output_token_count=found.output_tokens,
        amount=found.amount,
        currency=found.currency,
    )

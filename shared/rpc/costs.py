"""What was or will be spent on language models, as a message."""

from __future__ import annotations

from hibug2.v1 import types_pb2
from shared.llm import Estimate, Usage


def estimated_cost(found: Estimate) -> types_pb2.Cost:
    """What an estimate expects, as a message."""
    return types_pb2.Cost(
        call_count=found.calls,
        input_token_count=found.input_tokens,
        output_token_count=found.output_tokens,
        amount=found.amount,
        currency=found.currency,
    )


def spent_cost(usage: Usage) -> types_pb2.Cost:
    """What was paid, as a message; without an amount where no price is known."""
    return types_pb2.Cost(
        call_count=usage.calls,
        input_token_count=usage.input_tokens,
        output_token_count=usage.output_tokens,
        amount=usage.amount,
        currency=usage.currency,
    )

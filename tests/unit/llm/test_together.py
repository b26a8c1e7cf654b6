"""Questions asked side by side: what a failure of one means for the others."""

from __future__ import annotations

import asyncio

import pytest

from shared.errors import HiBug2Error, Unavailable
from shared.llm import BudgetSpent, together


async def test_answers_come_in_the_order_of_the_questions() -> None:
    async def answer(number: int) -> int:
        await asyncio.sleep((3 - number) / 100)
        return number

    assert await together(answer(i) for i in range(3)) == [0, 1, 2]


@pytest.mark.parametrize(("failure", "ended"), [(BudgetSpent, ["paid"]), (Unavailable, [])])
async def test_what_is_paid_for_is_waited_for_when_the_budget_is_spent(
    failure: type[HiBug2Error], ended: list[str]
) -> None:
    seen: list[str] = []

    async def on_its_way() -> None:
        await asyncio.sleep(0.05)
        seen.append("paid")

    async def refused() -> None:
        raise failure("no more")

    with pytest.raises(failure):
        await together([on_its_way(), refused()])
    assert seen == ended

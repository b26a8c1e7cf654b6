"""Where the requests of one account are paid: reserved before, settled after."""

from __future__ import annotations

from dataclasses import dataclass, replace

from shared import metrics
from shared.llm.answer import Usage
from shared.llm.ledger import Account, Ledger, Reservation
from shared.llm.prices import NANO, Price
from shared.llm.tokens import ImageRule, Patches

_MARGIN_S = 30.0  # from the end of a request to its settling, at most


@dataclass(frozen=True)
class Till:
    """`account` pays from `ledger`; where they are None what is spent is counted in metrics alone."""

    ledger: Ledger | None = None
    account: Account | None = None
    price: Price | None = None
    capped: bool = False

    @property
    def image_rule(self) -> ImageRule:
        """How images are counted before anybody has."""
        return self.price.image if self.price else Patches()

    @property
    def team(self) -> str:
        return self.account.team if self.account else ""

    async def reserve(self, input_tokens: int, output_tokens: int, timeout_s: float) -> Reservation | None:
        """Set aside what a request may cost at most. Raises as `Ledger.reserve` does."""
        if self.ledger is None or self.account is None:
            return None
        nano = self.price.nano(input_tokens, output_tokens) if self.price else None
        currency = self.price.currency if self.price else ""
        return await self.ledger.reserve(self.account, nano, currency, timeout_s + _MARGIN_S, capped=self.capped)

    async def settle(self, paid: Reservation | None, usage: Usage, cached_input_tokens: int) -> Usage:
        """`usage` with its amount, which is charged. One that tells no tokens is charged as it was reserved."""
        metrics.LLM_TOKENS.labels(self.team, "input").inc(usage.input_tokens)
        metrics.LLM_TOKENS.labels(self.team, "output").inc(usage.output_tokens)
        told = usage.input_tokens > 0 or usage.output_tokens > 0
        nano = self.price.nano(usage.input_tokens, usage.output_tokens, cached_input_tokens) if self.price else 0
        if paid is not None and self.ledger is not None:
            nano = nano if told else paid.nano
            await self.ledger.settle(paid, nano, usage.calls, usage.input_tokens, usage.output_tokens)
        if self.price is None:
            return usage
        self._count(nano)
        return replace(usage, amount=nano / NANO, currency=self.price.currency)

    async def lose(self, paid: Reservation | None) -> None:
        """The request may have been billed, and nobody will say so."""
        if paid is not None and self.ledger is not None:
            self._count(paid.nano)
            await self.ledger.lose(paid)

    async def release(self, paid: Reservation | None) -> None:
        """The request was not billed."""
        if paid is not None and self.ledger is not None:
            await self.ledger.release(paid)

    def _count(self, nano: int) -> None:
        if self.price is not None:
            metrics.LLM_SPEND.labels(self.team, self.price.currency).inc(nano / NANO)

"""Who spent how much on language models, and a cap that holds over all processes.

Before each HTTP request its highest possible cost is reserved; when the answer says what was used, that is charged in
its place. What was spent, what is reserved and what is asked for never exceed the cap together, so nor does what is
paid, whoever dies at whatever moment: a reservation that nobody settles counts as spent when its time is over. (It
holds as far as the endpoint keeps to the limit of output tokens that it is sent, and tells its usage.)

Amounts are whole numbers of a billionth of the currency, changed by Lua scripts alone.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
import uuid
from dataclasses import dataclass
from typing import Any

from shared import logs, metrics
from shared.errors import HiBug2Error, Precondition, Unavailable, invalid
from shared.llm.link import Away, Link, Redis
from shared.llm.prices import NANO

log = logs.get("llm.ledger")

_LIVE = "hibug2:llm:accounts"  # those with a cap, by when they were used last
_LIVE_MS = 3600 * 1000  # after its last change an account counts as in use
_MOST_LIVE = 100
_KEEP_MS = 30 * 24 * 3600 * 1000  # after the last change of an account
_MAX_CAP = 1_000_000  # of the currency: in billionths still exact in Lua's numbers
_AWAY = "away"  # the life of an account that Redis could not be asked for
_POLL_S = (0.05, 1.0)  # between two looks whether others have settled


@dataclass(frozen=True)
class Account:
    """Who pays: a team, and the resource name of a run, a generation or a tagging."""

    team: str
    name: str

    def __str__(self) -> str:
        return f"{self.name} of team {self.team}"


@dataclass(frozen=True)
class Spend:
    """What an account has paid for; `amount`, `reserved` and `cap` are in `currency`, "" where no price is known.

    `calls` counts what was answered and what may have been; tokens are those that the endpoint told.
    """

    amount: float = 0.0
    currency: str = ""
    calls: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    reserved: float = 0.0  # by calls that are on their way
    cap: float | None = None


@dataclass(frozen=True)
class Reservation:
    """What may be spent by one HTTP request, in billionths; settle it."""

    account: Account
    id: str
    nano: int
    born: str  # which life of the account it belongs to: Redis may lose its data in between


class BudgetSpent(HiBug2Error):
    """The next call might cost more than what is left of the cap."""

    code = "RESOURCE_EXHAUSTED"
    reason = "BUDGET_SPENT"


class Ledger:
    """The accounts, in Redis. Every change is one atomic script; safe over any number of processes."""

    def __init__(self, redis: Redis) -> None:
        self.link = Link(redis)
        self._capped: dict[Account, bool] = {}  # as last seen, for when Redis is away or has lost it

    async def open(self, account: Account, cap: float | None) -> None:
        """Set the cap of `account` (None: no cap) and keep what it has spent.

        Raises InvalidInput for a cap that is no amount, Unavailable when Redis is away.
        """
        if cap is not None and not (math.isfinite(cap) and 0 <= cap <= _MAX_CAP):
            raise invalid("budget", f"is {cap}; give an amount from 0 to {_MAX_CAP:,}, or none")
        await self._run(_OPEN, account, "" if cap is None else round(cap * NANO), _KEEP_MS, _member(account))
        self._capped[account] = cap is not None

    async def spent(self, account: Account) -> Spend:
        """What `account` has spent and reserved. Raises Unavailable when Redis is away."""
        found = [part.decode() for part in await self._run(_SPENT, account)]
        cap, currency, *figures = found
        nano, reserved, calls, read, written = (int(figure) for figure in figures)
        return Spend(nano / NANO, currency, calls, read, written, reserved / NANO, int(cap) / NANO if cap else None)

    async def capped(self) -> list[tuple[Account, Spend]]:
        """The accounts with a cap that were used within the last hour, at most 100, the last used first.

        Raises Unavailable when Redis is away.
        """
        try:
            members = await self.link.run(_CAPPED, [_LIVE], (_LIVE_MS, _MOST_LIVE))
        except Away as error:
            raise Unavailable("the accounts cannot be reached: Redis is away") from error
        accounts = [Account(*member.decode().split(" ", 1)) for member in members]
        found = [(account, await self.spent(account)) for account in accounts]
        return [(account, spend) for account, spend in found if spend.cap is not None]

    async def seed(self, account: Account, spend: Spend) -> None:
        """Say that `account` has spent at least this much: after Redis lost its data, what artifacts still tell.

        Raises Unavailable when Redis is away.
        """
        figures = (round(spend.amount * NANO), spend.calls, spend.input_tokens, spend.output_tokens)
        await self._run(_SEED, account, *figures, spend.currency, _KEEP_MS)

    async def reserve(
        self, account: Account, nano: int | None, currency: str, lease_s: float, *, capped: bool = False
    ) -> Reservation:
        """Set `nano` aside for one HTTP request that ends within `lease_s` seconds; None where no price is known.

        Waits while only what others have reserved is in the way. `capped` says that the account was opened with a
        cap, so that nothing is paid while Redis does not know it. Raises BudgetSpent when what is left of the cap is
        less, Precondition when there is a cap and no price, Unavailable when there is or may be a cap that nobody
        can look up.
        """
        id_ = uuid.uuid4().hex
        begun, wait_s = time.monotonic(), _POLL_S[0]
        while True:
            must = capped or self._capped.get(account, False)
            try:
                arguments = (id_, nano or 0, int(nano is not None), currency, math.ceil(lease_s * 1000), int(must))
                answer, *more = await self.link.run(_RESERVE, _keys(account), (*arguments, _KEEP_MS, _member(account)))
            except Away as error:
                if must or account not in self._capped:
                    raise Unavailable(
                        f"the budget of {account} cannot be looked up while Redis is away, so no paid call is made"
                    ) from error
                return Reservation(account, id_, nano or 0, _AWAY)
            match answer:
                case b"OK":
                    self._capped[account] = bool(int(more[1]))
                    if time.monotonic() - begun > _POLL_S[0]:
                        metrics.LLM_WAIT_SECONDS.labels("budget").observe(time.monotonic() - begun)
                    return Reservation(account, id_, nano or 0, more[0].decode())
                case b"UNKNOWN":
                    raise Unavailable(
                        f"the budget of {account} is not known (Redis lost its data), so no paid call is made; "
                        "create it again to go on"
                    )
                case b"UNPRICED":
                    raise Precondition(
                        f"{account} has a budget, and no price is known for the model that it calls; list the model in "
                        "a file like shared/llm/prices.yaml and name that file in HIBUG2_LLM_PRICES"
                    )
                case b"CURRENCY":
                    raise Precondition(
                        f"{account} is charged in {more[0].decode()}, and the price of the model is in {currency}; "
                        "give all prices in one currency"
                    )
                case b"SPENT":
                    raise _budget_spent(account, nano or 0, currency, int(more[0]), int(more[1]))
            await asyncio.sleep(random.uniform(0.5, 1) * wait_s)  # noqa: S311 not a secret
            wait_s = min(2 * wait_s, _POLL_S[1])

    async def settle(self, paid: Reservation, nano: int, calls: int, input_tokens: int, output_tokens: int) -> None:
        """Charge what a request cost, `nano`, in place of what was reserved for it.

        Without effect on one whose time is over: it counts as spent. While Redis is away that is what will happen.
        """
        arguments = (paid.id, paid.nano, paid.born, nano, calls, input_tokens, output_tokens, _KEEP_MS)
        try:
            await self.link.run(_SETTLE, _keys(paid.account), arguments)
        except Away:
            log.debug("not settled: redis is away", account=str(paid.account))

    async def lose(self, paid: Reservation) -> None:
        """Count a request as spent that may have been paid and never told: cut off, or too slow."""
        await self.settle(paid, paid.nano, 1, 0, 0)

    async def release(self, paid: Reservation) -> None:
        """Give back what a request that was refused did not cost."""
        await self.settle(paid, 0, 0, 0, 0)

    async def _run(self, script: str, account: Account, *arguments: str | int) -> Any:
        try:
            return await self.link.run(script, _keys(account), arguments)
        except Away as error:
            raise Unavailable(f"the account of {account} cannot be reached: Redis is away") from error


def _keys(account: Account) -> tuple[str, str, str]:
    base = f"hibug2:llm:account:{account.team}:{account.name}"
    return base, f"{base}:reserved", _LIVE


def _member(account: Account) -> str:
    return f"{account.team} {account.name}"  # a team's name has no blank


def _budget_spent(account: Account, nano: int, currency: str, spent: int, cap: int) -> BudgetSpent:
    shown = [f"{amount / NANO:.6f}".rstrip("0").rstrip(".") for amount in (spent, cap, nano)]
    return BudgetSpent(
        f"the budget of {account} is spent: {shown[0]} of {shown[1]} {currency}, and the next call may cost up to "
        f"{shown[2]}; create it again with a higher budget to go on",
        metadata={"account": account.name, "spent": shown[0], "cap": shown[1], "currency": currency},
    )


# KEYS: the account (a hash), its reservations (a sorted set of id:amount by the time at which they are over), and the
# accounts in use (a sorted set of "team account" by the time of the last use).
_COMMON = """
local account, reserved = KEYS[1], KEYS[2]
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local function text(name) return redis.call('HGET', account, name) or '' end
local function number(name) return tonumber(redis.call('HGET', account, name) or '0') end
local function add(name, amount) redis.call('HINCRBY', account, name, amount) end
local function minus(amount) return string.format('%.0f', 0 - amount) end
local function use(member) redis.call('ZADD', KEYS[3], string.format('%.0f', now), member) end
local function keep(ms)
  redis.call('PEXPIRE', account, ms)
  redis.call('PEXPIRE', reserved, ms)
end
-- What nobody has settled may have been paid, so it counts as spent.
for _, member in ipairs(redis.call('ZRANGEBYSCORE', reserved, '-inf', string.format('%.0f', now))) do
  local amount = string.match(member, ':(%d+)$')
  redis.call('ZREM', reserved, member)
  add('reserved', minus(amount))
  add('spent', amount)
  add('calls', '1')
end
"""

_OPEN = (
    _COMMON
    + """
redis.call('HSET', account, 'cap', ARGV[1])
if ARGV[1] ~= '' then use(ARGV[3]) end
keep(ARGV[2])
"""
)

_SPENT = (
    _COMMON
    + """
local told = {text('cap'), text('currency')}
for _, name in ipairs({'spent', 'reserved', 'calls', 'input', 'output'}) do
  table.insert(told, redis.call('HGET', account, name) or '0')
end
return told
"""
)

_SEED = (
    _COMMON
    + """
for i, name in ipairs({'spent', 'calls', 'input', 'output'}) do
  if tonumber(ARGV[i]) > number(name) then redis.call('HSET', account, name, ARGV[i]) end
end
if ARGV[5] ~= '' then redis.call('HSETNX', account, 'currency', ARGV[5]) end
keep(ARGV[6])
"""
)

_RESERVE = (
    _COMMON
    + """
local id, amount, priced, currency, lease, must, ms, me = unpack(ARGV)
local cap = redis.call('HGET', account, 'cap')
if not cap and must == '1' then return {'UNKNOWN'} end
local capped = cap and cap ~= ''
if capped then use(me) end
local member = id .. ':' .. amount
if not redis.call('ZSCORE', reserved, member) then  -- it is there when the client asks again after a lost answer
  if capped then
    if priced == '0' then return {'UNPRICED'} end
    local left = tonumber(cap) - number('spent') - tonumber(amount)
    if left < 0 then return {'SPENT', text('spent') ~= '' and text('spent') or '0', cap} end
    if left < number('reserved') then return {'WAIT'} end
  end
  if priced == '1' then
    if text('currency') ~= '' and text('currency') ~= currency then return {'CURRENCY', text('currency')} end
    redis.call('HSET', account, 'currency', currency)
  end
  redis.call('HSETNX', account, 'born', id)
  redis.call('ZADD', reserved, string.format('%.0f', now + lease), member)
  add('reserved', amount)
end
keep(ms)
return {'OK', text('born'), capped and '1' or '0'}
"""
)

_SETTLE = (
    _COMMON
    + """
local id, amount, born, cost, calls, input, output, ms = unpack(ARGV)
if text('born') == born then
  if redis.call('ZREM', reserved, id .. ':' .. amount) == 0 then return end  -- its time was over, or it is settled
  add('reserved', minus(amount))
end
add('spent', cost)
add('calls', calls)
add('input', input)
add('output', output)
keep(ms)
"""
)

# KEYS: the accounts in use. ARGV: ms after the last use, most that are told. Those that are not in use go.
_CAPPED = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', string.format('%.0f', now - ARGV[1]))
return redis.call('ZREVRANGE', KEYS[1], 0, ARGV[2] - 1)
"""

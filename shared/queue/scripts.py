"""What the queue changes in Redis, each script as one step. Commands of Redis 7.0 only.

Streams hold what is on its way to workers; entries have d (payload), t (team), j (job) and k (the item's number in
its job). The flight of a job is the set of its items that are in a stream; `counts` has the size of the flights of
all jobs of a team. `waiting` says of each job how many items it holds back, and when it last said so.
"""

from __future__ import annotations

_NOW = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
"""

# KEYS: stream, flight, counts, waiting. ARGV: team, job, cap, items that the job has left, ms after which a job that
# says nothing is gone, then number and payload of the items to add. Returns how many of them need no more care.
OFFER = (
    _NOW
    + """
local stream, flight, counts, waiting = unpack(KEYS)
local team, job, cap, left, stale = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
local me, jobs, out = team .. ' ' .. job, 1, 0
local told = redis.call('HGETALL', waiting)
for i = 1, #told, 2 do
  if now - tonumber(string.match(told[i + 1], '%d+$')) > stale then
    redis.call('HDEL', waiting, told[i])
  elseif told[i] ~= me and string.sub(told[i], 1, #team + 1) == team .. ' ' then
    jobs = jobs + 1
  end
end
for _, count in ipairs(redis.call('HVALS', counts)) do out = out + count end
-- The jobs of a team that have more to add share what the team may have in flight.
local share = math.max(1, math.floor(cap / jobs))
local room = math.min(cap - out, share - redis.call('SCARD', flight))
local taken = 0
for i = 6, #ARGV, 2 do
  if room <= 0 then break end
  if redis.call('SADD', flight, ARGV[i]) == 1 then
    redis.call('XADD', stream, '*', 'd', ARGV[i + 1], 't', team, 'j', job, 'k', ARGV[i])
    redis.call('HINCRBY', counts, job, 1)
    room = room - 1
  end
  taken = taken + 1
end
left = left - taken
if left > 0 then
  redis.call('HSET', waiting, me, string.format('%.0f:%.0f', left, now))
else
  redis.call('HDEL', waiting, me)
end
return taken
"""
)

# KEYS: flight, counts, waiting. ARGV: team, job.
FORGET = """
redis.call('DEL', KEYS[1])
redis.call('HDEL', KEYS[2], ARGV[2])
redis.call('HDEL', KEYS[3], ARGV[1] .. ' ' .. ARGV[2])
"""

# KEYS: streams, the one to look at first before the others. ARGV: group, consumer, ms after which an entry of another
# is taken over (0: leave them). Returns {position of the stream, id, fields, deliveries} of one entry, or nothing.
TAKE = """
local group, consumer, lease = ARGV[1], ARGV[2], tonumber(ARGV[3])
if lease > 0 then
  for i, stream in ipairs(KEYS) do
    local cursor = '0-0'
    repeat  -- one call looks at some of the pending entries only
      local found = redis.call('XAUTOCLAIM', stream, group, consumer, lease, cursor, 'COUNT', 1)
      cursor = found[1]
      for _, entry in ipairs(found[2]) do
        if entry[2] then
          local pending = redis.call('XPENDING', stream, group, entry[1], entry[1], 1)
          return {i, entry[1], entry[2], pending[1][4]}
        end
      end
    until cursor == '0-0'
  end
end
for i, stream in ipairs(KEYS) do
  local found = redis.call('XREADGROUP', 'GROUP', group, consumer, 'COUNT', 1, 'STREAMS', stream, '>')
  if found and found[1] then
    local entry = found[1][2][1]
    return {i, entry[1], entry[2], 1}
  end
end
"""

# KEYS: streams. ARGV: group, consumer, then position of the stream and id of each entry. Renews what the consumer
# still owns, without counting a delivery, and returns the ids.
RENEW = """
local group, consumer, mine = ARGV[1], ARGV[2], {}
for i = 3, #ARGV, 2 do
  local stream, id = KEYS[tonumber(ARGV[i])], ARGV[i + 1]
  local pending = redis.call('XPENDING', stream, group, id, id, 1)
  if pending[1] and pending[1][2] == consumer then
    redis.call('XCLAIM', stream, group, consumer, 0, id, 'JUSTID')
    mine[#mine + 1] = id
  end
end
return mine
"""

# KEYS: stream. ARGV: group, consumer, id, ms of a lease. As if the lease of an entry that it owns were over.
RELEASE = """
local pending = redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[3], ARGV[3], 1)
if pending[1] and pending[1][2] == ARGV[2] then
  redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, ARGV[3], 'IDLE', ARGV[4], 'JUSTID')
end
"""

# KEYS: stream, flight, counts, then those of the effect. ARGV: group, id, number, job, then those of the effect, which
# sees them as K and A. Deletes an entry only where it was pending: a deleted entry that nobody was given spoils `lag`.
_DONE = """
local acked = redis.call('XACK', KEYS[1], ARGV[1], ARGV[2])
if acked == 1 then redis.call('XDEL', KEYS[1], ARGV[2]) end
if redis.call('SREM', KEYS[2], ARGV[3]) == 1 and redis.call('HINCRBY', KEYS[3], ARGV[4], -1) <= 0 then
  redis.call('HDEL', KEYS[3], ARGV[4])
end
"""
_EFFECT = """
local K, A = {}, {}
for i = %d, #KEYS do K[#K + 1] = KEYS[i] end
for i = %d, #ARGV do A[#A + 1] = ARGV[i] end
"""


def done(effect: str) -> str:
    """Acknowledge, delete, take off the flight, and do `effect`."""
    return _DONE + _EFFECT % (4, 5) + effect


# KEYS: as _DONE, with the stream of the dead as fourth. ARGV: as _DONE, with payload and reason as fifth and sixth.
def bury(effect: str) -> str:
    """As `done`, and put the entry on the stream of the dead; nothing where it is no more pending."""
    add = "redis.call('XADD', KEYS[4], '*', 'd', ARGV[5], 'j', ARGV[4], 'k', ARGV[3], 'r', ARGV[6])\n"
    stop = "if acked == 0 then return 0 end\n"
    return _DONE + stop + add + _EFFECT % (5, 7) + f"(function() {effect} end)() return 1"


# KEYS: stream of the dead, then those of the effect. ARGV: number of entries, their ids, then those of the effect.
def drop_dead(effect: str) -> str:
    """Take entries off the dead, and do `effect`."""
    return (
        """
local count, K, A = tonumber(ARGV[1]), {}, {}
for i = 1, count do redis.call('XDEL', KEYS[1], ARGV[i + 1]) end
for i = 2, #KEYS do K[#K + 1] = KEYS[i] end
for i = count + 2, #ARGV do A[#A + 1] = ARGV[i] end
"""
        + effect
    )


# KEYS: streams. ARGV: group, consumer. Deleting a consumer deletes what it has pending, so only where that is nothing.
LEAVE = """
for _, stream in ipairs(KEYS) do
  for _, consumer in ipairs(redis.call('XINFO', 'CONSUMERS', stream, ARGV[1])) do
    local about = {}
    for i = 1, #consumer, 2 do about[consumer[i]] = consumer[i + 1] end
    if about['name'] == ARGV[2] and about['pending'] == 0 then
      redis.call('XGROUP', 'DELCONSUMER', stream, ARGV[1], ARGV[2])
    end
  end
end
"""

# KEYS: workers (a sorted set). ARGV: worker, with its slots after a blank; ms after which a silent one is gone.
REGISTER = (
    _NOW
    + """
redis.call('ZADD', KEYS[1], string.format('%.0f', now), ARGV[1])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', string.format('%.0f', now - ARGV[2]))
"""
)

# KEYS: workers. ARGV: ms after which a silent one is gone. Returns the slots of all.
SLOTS = (
    _NOW
    + """
local slots = 0
for _, worker in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], string.format('%.0f', now - ARGV[1]), '+inf')) do
  slots = slots + tonumber(string.match(worker, '%d+$'))
end
return slots
"""
)

# KEYS: streams. Returns the ms since the oldest of their entries was added, 0 where there are none. Done entries are
# deleted and an entry keeps its id whoever has it, so the first one is the oldest that is not done.
OLDEST = (
    _NOW
    + """
local oldest = 0
for _, stream in ipairs(KEYS) do
  for _, entry in ipairs(redis.call('XRANGE', stream, '-', '+', 'COUNT', 1)) do
    oldest = math.max(oldest, now - tonumber(string.match(entry[1], '^%d+')))
  end
end
return oldest
"""
)

# KEYS: waiting, one a priority. ARGV: ms after which a job that says nothing is gone. Returns the items held back.
WAITING = (
    _NOW
    + """
local count = 0
for _, waiting in ipairs(KEYS) do
  for _, told in ipairs(redis.call('HVALS', waiting)) do
    local left, at = string.match(told, '(%d+):(%d+)')
    if now - at <= tonumber(ARGV[1]) then count = count + left end
  end
end
return count
"""
)

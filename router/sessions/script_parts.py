"""How a session stands in Redis, and the Lua that the scripts over it have in common (scripts.py, turn_scripts.py).

A session is two keys that expire together: a hash (state, the turn that holds it, and until when, its own TTL in ms if it has
one, marks and ends: see router/sessions/marks.py and ends.py) and a string (token ids, 4 bytes each, little-endian). A third
one, a hash that expires with them, holds its notes if it has any. Two sorted sets hold the names of all sessions and of each
tenant's sessions, by the time at which they expire. Expired names are dropped before counting, and each set expires with its
last name.

KEYS: the session's hash, its tokens, the names of all sessions, the names of its tenant's, its notes. ARGV: its name in these
sets, the TTL in ms. Further ones are noted at each script. Times are the server's. Answers begin with a status; `load` returns
what `redis_values.session_of` reads.
"""

from __future__ import annotations

from prefillshare.router.sessions import ends

COUNTING = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

local function count(names)
  redis.call('ZREMRANGEBYSCORE', names, '-inf', now)
  return redis.call('ZCARD', names)
end
"""

COMMON = (
    COUNTING
    + """
local session, tokens, all, own, notes = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local name, ttl = ARGV[1], tonumber(ARGV[2])
"""
    + ends.LUA
    + """
-- Nil for a session, else the status to answer with. Under memory pressure the server may evict one half of a session: then
-- there is none. Whatever else is not as these scripts write it is damaged, and nothing but DELETE touches it.
local function unsound(session, tokens)
  local kinds = {redis.call('TYPE', session).ok, redis.call('TYPE', tokens).ok}
  if kinds[1] == 'none' or kinds[2] == 'none' then return 'missing' end
  if kinds[1] ~= 'hash' or kinds[2] ~= 'string' then return 'damaged' end
  local state = redis.call('HMGET', session, 'tokens', 'turns', 'version', 'open', 'prefilled', 'domain', 'turn', 'until',
    'ttl')
  for _, number in ipairs({state[1], state[2], state[3], state[4], state[7] and state[8] or '0', state[9] or '0'}) do
    if not number or #number > 15 or not string.match(number, '^%d+$') then return 'damaged' end
  end
  if state[7] and not state[8] then return 'damaged' end
  if tonumber(state[1]) * 4 ~= redis.call('STRLEN', tokens) then return 'damaged' end
  if not state[5] or #state[5] > 65536 or not state[6] or #state[6] > 65536 then return 'damaged' end
end

local function holder(session)
  local turn = redis.call('HMGET', session, 'turn', 'until')
  return turn[1] and tonumber(turn[2]) > now and turn[1]
end

-- A session does not expire while a turn holds it.
local function touch(session, tokens, notes, name)
  local ends = now + (tonumber(redis.call('HGET', session, 'ttl') or ttl))
  if holder(session) then ends = math.max(ends, tonumber(redis.call('HGET', session, 'until'))) end
  redis.call('PEXPIREAT', session, ends)
  redis.call('PEXPIREAT', tokens, ends)
  redis.call('PEXPIREAT', notes, ends)
  for _, digest in ipairs(ends_of(session)) do redis.call('PEXPIREAT', end_key(digest), ends) end
  for _, names in ipairs({all, own}) do
    redis.call('ZADD', names, ends, name)
    if redis.call('PTTL', names) < ends - now then redis.call('PEXPIREAT', names, ends) end
  end
end

-- The keys of another session of this tenant.
local function of(other)
  local keys = {}
  for i, key in ipairs({session, tokens, notes}) do keys[i] = string.sub(key, 1, #key - #name) .. other end
  return keys
end

-- Delete the tenant's session that was unused for longest, of those that no turn holds, but not this one. Returns whether there
-- is one.
local function evict()
  for _, other in ipairs(redis.call('ZRANGE', own, 0, -1)) do
    local keys = of(other)
    if other ~= name and (redis.call('TYPE', keys[1]).ok ~= 'hash' or not holder(keys[1])) then
      drop_ends(keys[1], other)
      redis.call('DEL', unpack(keys))
      redis.call('ZREM', all, other)
      redis.call('ZREM', own, other)
      return true
    end
  end
end

-- ARGV from `first` on: key and text in turns; a text follows a "+", and without one the note is taken out.
local function set_notes(first)
  for i = first, #ARGV, 2 do
    if ARGV[i + 1] == '' then
      redis.call('HDEL', notes, ARGV[i])
    else
      redis.call('HSET', notes, ARGV[i], string.sub(ARGV[i + 1], 2))
    end
  end
end

-- The status of a refusal, if there is no room for one more session.
local function full(most, most_of_own, evicts)
  if count(own) >= tonumber(most_of_own) and not (evicts == '1' and evict()) then return 'own full' end
  if count(all) >= tonumber(most) then return 'all full' end
end

local function load(session, tokens)
  local state = redis.call('HMGET', session, 'turns', 'open', 'prefilled', 'domain', 'version', 'transcript',
    'tokenizer', 'own', 'ttl', 'unanswered')
  return {'ok', redis.call('GET', tokens) or '', holder(session) and 1 or 0, state}
end
"""
)

"""The Redis store's scripts, which run on the server, each of them atomic: Lua for Redis 6.2 or newer.

A session is two keys that expire together: a hash (state, the turn that holds it, and until when, its own TTL in ms if it has
one, and marks: see router/sessions/marks.py) and a string (token ids, 4 bytes each, little-endian). A third one, a hash that
expires with them, holds its notes if it has any. Two sorted sets hold the names of all sessions and of each tenant's sessions,
by the time at which they expire. Expired names are dropped before counting, and each set expires with its last name.

KEYS: the session's hash, its tokens, the names of all sessions, the names of its tenant's, its notes. ARGV: its name in these
sets, the TTL in ms. Further ones are noted at each script. Times are the server's. Answers begin with a status; `load` returns
what `RedisSessions` reads.
"""

from __future__ import annotations

from prefillshare.router.sessions.marks import MOST_MARKS

_COUNTING = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

local function count(names)
  redis.call('ZREMRANGEBYSCORE', names, '-inf', now)
  return redis.call('ZCARD', names)
end
"""

#: KEYS: the names to count. No ARGV.
COUNT = _COUNTING + "return {'ok', count(KEYS[1])}"

#: KEYS: the session's hash. No ARGV. Answers with ms; negative: there is none.
EXPIRES_IN = "return {'ok', redis.call('PTTL', KEYS[1])}"

_COMMON = (
    _COUNTING
    + """
local session, tokens, all, own, notes = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local name, ttl = ARGV[1], tonumber(ARGV[2])

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
      redis.call('DEL', unpack(keys))
      redis.call('ZREM', all, other)
      redis.call('ZREM', own, other)
      return true
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

#: ARGV: an id of this creation (by which a retry knows its own session), most sessions of all and of its tenant, whether one
#: of its tenant's may be evicted, tokens, cache domain, transcript, tokenizer, mark, TTL in ms of its own ("": none), calls
#: without a result.
CREATE = (
    _COMMON
    + """
local wrong = unsound(session, tokens)
if wrong ~= 'missing' then
  if wrong or redis.call('HGET', session, 'made') ~= ARGV[3] then return {'exists'} end
else
  local refusal = full(ARGV[4], ARGV[5], ARGV[6])
  if refusal then return {refusal} end
  redis.call('DEL', session, tokens, notes)
  redis.call('HSET', session, 'made', ARGV[3], 'tokens', #ARGV[7] / 4, 'turns', 0, 'open', 0, 'prefilled', '{}',
    'domain', ARGV[8], 'version', 0, 'transcript', ARGV[9], 'tokenizer', ARGV[10], 'mark0', ARGV[11],
    'unanswered', ARGV[13])
  if ARGV[12] ~= '' then redis.call('HSET', session, 'ttl', ARGV[12]) end
  redis.call('SET', tokens, ARGV[7])
end
touch(session, tokens, notes, name)
return load(session, tokens)
"""
)

GET = (
    _COMMON
    + """
local wrong = unsound(session, tokens)
if wrong then return {wrong} end
touch(session, tokens, notes, name)
return load(session, tokens)
"""
)

#: KEYS: also the new session's hash, tokens and notes. ARGV: the new one's name, an id of this creation, most sessions of all
#: and of its tenant, whether one of its tenant's may be evicted; if it is to be shorter: tokens, open, transcript, own part.
FORK = (
    _COMMON
    + """
local wrong = unsound(session, tokens)
if wrong then return {wrong} end
touch(session, tokens, notes, name)
if ARGV[8] and tonumber(ARGV[8]) > tonumber(redis.call('HGET', session, 'tokens')) then return {'shorter'} end
local new, copied, no_notes = KEYS[6], KEYS[7], KEYS[8]
wrong = unsound(new, copied)
if wrong ~= 'missing' then
  if wrong or redis.call('HGET', new, 'made') ~= ARGV[4] then return {'exists'} end
else
  local refusal = full(ARGV[5], ARGV[6], ARGV[7])
  if refusal then return {refusal} end
  redis.call('DEL', new, copied, no_notes)
  redis.call('COPY', session, new)
  redis.call('COPY', tokens, copied)
  redis.call('HDEL', new, 'turn', 'until', 'committed')
  redis.call('HSET', new, 'made', ARGV[4])
  if ARGV[8] then
    redis.call('SET', copied, string.sub(redis.call('GET', tokens), 1, 4 * tonumber(ARGV[8])))
    redis.call('HSET', new, 'tokens', ARGV[8], 'open', ARGV[9], 'transcript', ARGV[10], 'own', ARGV[11],
      'unanswered', '')
  end
end
touch(new, copied, no_notes, ARGV[3])
return load(new, copied)
"""
)

DELETE = (
    _COMMON
    + """
local wrong = unsound(session, tokens)
redis.call('DEL', session, tokens, notes)
redis.call('ZREM', all, name)
redis.call('ZREM', own, name)
return {wrong == 'missing' and 'missing' or 'ok'}
"""
)

#: ARGV: turn, lease in ms.
BEGIN = (
    _COMMON
    + """
local wrong = unsound(session, tokens)
if wrong then return {wrong} end
local held = holder(session)
if held and held ~= ARGV[3] then return {'busy'} end
redis.call('HSET', session, 'turn', ARGV[3], 'until', now + tonumber(ARGV[4]))
touch(session, tokens, notes, name)
return load(session, tokens)
"""
)

#: ARGV: turn, lease in ms. A lease that has ended is renewed if no other turn has begun since.
RENEW = (
    _COMMON
    + """
if unsound(session, tokens) or redis.call('HGET', session, 'turn') ~= ARGV[3] then return {'lost'} end
redis.call('HSET', session, 'until', now + tonumber(ARGV[4]))
touch(session, tokens, notes, name)
return {'ok'}
"""
)

#: A turn whose lease has ended may commit if no other has begun since.
#: ARGV: turn, version it began from, tokens, how many tokens precede them ("": they replace all), open, prefilled,
#: transcript, own part, whether it counts as a turn, mark, calls without a result, then notes: key and text in turns.
COMMIT = (
    _COMMON
    + """
local wrong = unsound(session, tokens)
if wrong then return {wrong == 'missing' and 'deleted' or wrong} end
local mark = ARGV[3] .. ':' .. ARGV[4]
local state = redis.call('HMGET', session, 'version', 'tokens', 'committed')
if state[3] == mark then return {'ok'} end
if redis.call('HGET', session, 'turn') ~= ARGV[3] or state[1] ~= ARGV[4] then return {'lost'} end
if ARGV[6] == '' then
  redis.call('SET', tokens, ARGV[5])
elseif ARGV[6] == state[2] then
  redis.call('APPEND', tokens, ARGV[5])
else
  return {'lost'}
end
redis.call('HSET', session, 'committed', mark, 'tokens', redis.call('STRLEN', tokens) / 4, 'open', ARGV[7],
  'prefilled', ARGV[8], 'transcript', ARGV[9], 'own', ARGV[10], 'unanswered', ARGV[13])
redis.call('HINCRBY', session, 'version', 1)
if ARGV[11] == '1' then
  local number = redis.call('HINCRBY', session, 'turns', 1)
  redis.call('HSET', session, 'mark' .. number % MOST_MARKS, ARGV[12])
end
for i = 14, #ARGV, 2 do redis.call('HSET', notes, ARGV[i], ARGV[i + 1]) end
touch(session, tokens, notes, name)
return {'ok'}
"""
).replace("MOST_MARKS", str(MOST_MARKS))

#: No further ARGV.
MARKS = (
    _COMMON
    + """
local wrong = unsound(session, tokens)
if wrong then return {wrong} end
local fields = {}
for number = 1, MOST_MARKS do fields[number] = 'mark' .. (number - 1) end
return {'ok', redis.call('HMGET', session, unpack(fields))}
"""
).replace("MOST_MARKS", str(MOST_MARKS))

#: ARGV: the session's own TTL in ms; "": none.
SET_TTL = (
    _COMMON
    + """
local wrong = unsound(session, tokens)
if wrong then return {wrong} end
if ARGV[3] == '' then
  redis.call('HDEL', session, 'ttl')
else
  redis.call('HSET', session, 'ttl', ARGV[3])
end
touch(session, tokens, notes, name)
return load(session, tokens)
"""
)

#: KEYS and name: those of a session with an empty name. ARGV: when the session before the page expires ("-inf": none), its
#: name, most sessions. Answers with rows: name, when it expires, in how many ms, status, tokens, turns, own TTL, domain, held.
LIST = (
    _COMMON
    + """
count(own)
local rows, offset, most = {}, 0, tonumber(ARGV[5])
while #rows < most do
  local found = redis.call('ZRANGEBYSCORE', own, ARGV[3], '+inf', 'WITHSCORES', 'LIMIT', offset, most)
  for i = 1, #found, 2 do
    local other, ends = found[i], found[i + 1]
    local is_behind = not (ends == ARGV[3] and other <= ARGV[4])
    local keys = of(other)
    local wrong = unsound(keys[1], keys[2])
    if #rows < most and is_behind and wrong ~= 'missing' then
      local row = {other, ends, tonumber(ends) - now, wrong or 'ok'}
      if not wrong then
        local state = redis.call('HMGET', keys[1], 'tokens', 'turns', 'ttl', 'domain')
        for place = 1, 4 do row[4 + place] = state[place] or '' end
        row[9] = holder(keys[1]) and 1 or 0
      end
      rows[#rows + 1] = row
    end
  end
  if #found < 2 * most then break end
  offset = offset + most
end
return {'ok', rows}
"""
)

#: ARGV: the keys wanted; none: all.
NOTES = (
    _COMMON
    + """
local wrong = unsound(session, tokens)
if wrong then return {wrong} end
touch(session, tokens, notes, name)
if #ARGV == 2 then return {'ok', redis.call('HGETALL', notes)} end
return {'ok', redis.call('HMGET', notes, unpack(ARGV, 3))}
"""
)

#: ARGV: key and text in turns; a text follows a "+", and without one the note is taken out.
NOTE = (
    _COMMON
    + """
local wrong = unsound(session, tokens)
if wrong then return {wrong} end
for i = 3, #ARGV, 2 do
  if ARGV[i + 1] == '' then
    redis.call('HDEL', notes, ARGV[i])
  else
    redis.call('HSET', notes, ARGV[i], string.sub(ARGV[i + 1], 2))
  end
end
touch(session, tokens, notes, name)
return {'ok'}
"""
)

#: ARGV: turn.
END = (
    _COMMON
    + """
if not unsound(session, tokens) and redis.call('HGET', session, 'turn') == ARGV[3] then
  redis.call('HDEL', session, 'turn', 'until')
  touch(session, tokens, notes, name)
end
return {'ok'}
"""
)

"""The Redis store's scripts, which run on the server, each of them atomic: Lua for Redis 6.2 or newer. Those for turns are in
turn_scripts.py. How a session stands in Redis, and which KEYS and ARGV all scripts have, says script_parts.py."""

from __future__ import annotations

from prefillshare.router.sessions.script_parts import COMMON, COUNTING

#: KEYS: the names to count. No ARGV.
COUNT = COUNTING + "return {'ok', count(KEYS[1])}"

#: KEYS: the session's hash. No ARGV. Answers with ms; negative: there is none.
EXPIRES_IN = "return {'ok', redis.call('PTTL', KEYS[1])}"

#: ARGV: an id of this creation (by which a retry knows its own session), most sessions of all and of its tenant, whether one
#: of its tenant's may be evicted, tokens, cache domain, transcript, tokenizer, mark, TTL in ms of its own ("": none), calls
#: without a result.
CREATE = (
    COMMON
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
    COMMON
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
    COMMON
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
  redis.call('HDEL', new, 'turn', 'until', 'committed', 'ends')
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
    COMMON
    + """
local wrong = unsound(session, tokens)
drop_ends(session, name)
redis.call('DEL', session, tokens, notes)
redis.call('ZREM', all, name)
redis.call('ZREM', own, name)
return {wrong == 'missing' and 'missing' or 'ok'}
"""
)

#: ARGV: the session's own TTL in ms; "": none.
SET_TTL = (
    COMMON
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
    COMMON
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

#: KEYS and name: those of a session with an empty name. ARGV: digests of transcripts. Answers with the first end that is there:
#: its session's name, its note's key, its note.
FOUND = (
    COMMON
    + """
for i = 3, #ARGV do
  local key, other = end_at(ARGV[i])
  if key then
    local keys = of(other)
    local note = not unsound(keys[1], keys[2]) and redis.call('HGET', keys[3], key)
    if note then
      touch(keys[1], keys[2], keys[3], other)
      return {'ok', other, key, note}
    end
    redis.call('DEL', end_key(ARGV[i]))
  end
end
return {'ok'}
"""
)

#: ARGV: the keys wanted; none: all.
NOTES = (
    COMMON
    + """
local wrong = unsound(session, tokens)
if wrong then return {wrong} end
touch(session, tokens, notes, name)
if #ARGV == 2 then return {'ok', redis.call('HGETALL', notes)} end
return {'ok', redis.call('HMGET', notes, unpack(ARGV, 3))}
"""
)

#: ARGV: notes as of `set_notes`.
NOTE = (
    COMMON
    + """
local wrong = unsound(session, tokens)
if wrong then return {wrong} end
set_notes(3)
touch(session, tokens, notes, name)
return {'ok'}
"""
)

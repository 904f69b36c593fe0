"""Scripts for turns on sessions in Redis: a turn begins, renews its lease, commits, and ends. What they have in common with
those in scripts.py is in script_parts.py."""

from __future__ import annotations

from prefillshare.router.sessions.marks import MOST_MARKS
from prefillshare.router.sessions.script_parts import COMMON

#: ARGV: turn, lease in ms.
BEGIN = (
    COMMON
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
    COMMON
    + """
if unsound(session, tokens) or redis.call('HGET', session, 'turn') ~= ARGV[3] then return {'lost'} end
redis.call('HSET', session, 'until', now + tonumber(ARGV[4]))
touch(session, tokens, notes, name)
return {'ok'}
"""
)

#: How many of the last commits are known again if they are sent a second time, since their answer was lost.
MOST_COMMITS = 4
#: A turn whose lease has ended may commit if no other has begun since.
#: ARGV: turn, version it began from, tokens, how many tokens precede them ("": they replace all), open, prefilled,
#: transcript, own part, whether it counts as a turn, mark, calls without a result, the key of the note that belongs to the end
#: of the context ("": none), the transcript's digest, then notes as of `set_notes`.
COMMIT = (
    COMMON
    + """
local wrong = unsound(session, tokens)
if wrong then return {wrong == 'missing' and 'deleted' or wrong} end
local mark = ARGV[3] .. ':' .. ARGV[4]
local state = redis.call('HMGET', session, 'version', 'tokens', 'committed')
local commits, known = {mark}, state[3] or ''
if string.find(' ' .. known .. ' ', ' ' .. mark .. ' ', 1, true) then return {'ok'} end
for one in string.gmatch(known, '%S+') do if #commits < MOST_COMMITS then table.insert(commits, one) end end
if redis.call('HGET', session, 'turn') ~= ARGV[3] or state[1] ~= ARGV[4] then return {'lost'} end
if ARGV[6] == '' then
  redis.call('SET', tokens, ARGV[5])
elseif ARGV[6] == state[2] then
  redis.call('APPEND', tokens, ARGV[5])
else
  return {'lost'}
end
redis.call('HSET', session, 'committed', table.concat(commits, ' '), 'tokens', redis.call('STRLEN', tokens) / 4,
  'open', ARGV[7], 'prefilled', ARGV[8], 'transcript', ARGV[9], 'own', ARGV[10], 'unanswered', ARGV[13])
redis.call('HINCRBY', session, 'version', 1)
if ARGV[11] == '1' then
  local number = redis.call('HINCRBY', session, 'turns', 1)
  redis.call('HSET', session, 'mark' .. number % MOST_MARKS, ARGV[12])
end
if ARGV[14] ~= '' then add_end(session, name, ARGV[15], ARGV[14]) end
set_notes(16)
touch(session, tokens, notes, name)
return {'ok'}
"""
).replace("MOST_MARKS", str(MOST_MARKS)).replace("MOST_COMMITS", str(MOST_COMMITS))

#: No further ARGV.
MARKS = (
    COMMON
    + """
local wrong = unsound(session, tokens)
if wrong then return {wrong} end
local fields = {}
for number = 1, MOST_MARKS do fields[number] = 'mark' .. (number - 1) end
return {'ok', redis.call('HMGET', session, unpack(fields))}
"""
).replace("MOST_MARKS", str(MOST_MARKS))

#: ARGV: turn.
END = (
    COMMON
    + """
if not unsound(session, tokens) and redis.call('HGET', session, 'turn') == ARGV[3] then
  redis.call('HDEL', session, 'turn', 'until')
  touch(session, tokens, notes, name)
end
return {'ok'}
"""
)

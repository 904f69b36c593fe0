"""Where turns have ended in the contexts of a tenant, found by what had been said there.

A turn may leave a note that belongs to the end of the context (`end` of SessionStore.commit). Who knows what was said, but not
in which session, finds that note by the transcript. An end is forgotten with its session, and each session has the last
MOST_ENDS of them. Where two sessions say the same, the one that came last is found.

In Redis an end is a string that expires with its session: the note's key and the session's name, under the transcript's digest.
The session's hash lists its digests, the latest first.
"""

from __future__ import annotations

from dataclasses import dataclass

MOST_ENDS = 16


@dataclass(frozen=True)
class Ending:
    """A session, and its note with this key."""

    session_id: str
    key: str
    note: str


#: Lua, on the server: a part of script_parts.py. `all`, `own`: keys of the names of all sessions, and of the tenant's.
LUA = """
local function end_key(digest)
  return string.sub(all, 1, #all - #'names') .. 'end:' .. digest .. string.sub(own, #all + 1)
end

local function ends_of(session)
  local digests = {}
  for digest in string.gmatch(redis.call('HGET', session, 'ends') or '', '%x+') do digests[#digests + 1] = digest end
  return digests
end

-- The note's key and the session's name.
local function end_at(digest)
  return string.match(redis.call('GET', end_key(digest)) or '', '^([^\\n]*)\\n(.*)$')
end

local function drop_end(digest, name)
  local _, whose = end_at(digest)
  if whose == name then redis.call('DEL', end_key(digest)) end
end

-- `session` may be anything that is stored under that key.
local function drop_ends(session, name)
  if redis.call('TYPE', session).ok ~= 'hash' then return end
  for _, digest in ipairs(ends_of(session)) do drop_end(digest, name) end
end

local function add_end(session, name, digest, key)
  local kept = {digest}
  for _, other in ipairs(ends_of(session)) do
    if other ~= digest and #kept < MOST_ENDS then
      kept[#kept + 1] = other
    elseif other ~= digest then
      drop_end(other, name)
    end
  end
  redis.call('HSET', session, 'ends', table.concat(kept, ' '))
  redis.call('SET', end_key(digest), key .. '\\n' .. name)
end
""".replace("MOST_ENDS", str(MOST_ENDS))

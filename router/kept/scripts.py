"""The Redis store's scripts, which run on the server, each of them atomic: Lua for Redis 6.2 or newer. Any may be run twice.

KEYS, of one tenant, but for the last: hash of contexts by name (JSON: what the router must know of them); hash of their block
keys (8 bytes each); sorted set of their names by the time at which they end; hash of the places where they are kept; hash of
block keys: how many of the contexts have each; hash of tenants: how many blocks each keeps. The first five expire with the
tenant's last context. ARGV: tenant; further ones are noted at each script. Times are the server's.
"""

_COMMON = """
local contexts, keys, ends, places, blocks, all = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]
local tenant = ARGV[1]
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

-- One more, or one fewer, of the contexts has the blocks after the first `from` ones of these.
local function count(packed, from, by)
  for i = from * 8 + 1, #packed, 8 do
    local key = string.sub(packed, i, i + 7)
    if redis.call('HINCRBY', blocks, key, by) <= 0 then redis.call('HDEL', blocks, key) end
  end
end

local function common(a, b)
  local n = math.floor(math.min(#a, #b) / 8)
  while n > 0 and string.sub(a, n * 8 - 7, n * 8) ~= string.sub(b, n * 8 - 7, n * 8) do n = n - 1 end
  return n
end

local function change(before, after)
  local same = common(before, after)
  count(after, same, 1)
  count(before, same, -1)
end

local function forget(name)
  count(redis.call('HGET', keys, name) or '', 0, -1)
  redis.call('HDEL', contexts, name)
  redis.call('HDEL', keys, name)
  redis.call('HDEL', places, name)
  redis.call('ZREM', ends, name)
end

local function own()
  return redis.call('HLEN', blocks)
end

local function rest()
  local sum = 0
  local told = redis.call('HGETALL', all)
  for i = 1, #told, 2 do
    if told[i] ~= tenant then sum = sum + told[i + 1] end
  end
  return sum
end

local function settle()
  local last = redis.call('ZREVRANGE', ends, 0, 0, 'WITHSCORES')[2]
  if last then
    redis.call('HSET', all, tenant, own())
    for i = 1, 5 do redis.call('PEXPIREAT', KEYS[i], last + 60000) end
  else
    redis.call('DEL', contexts, keys, ends, places, blocks)
    redis.call('HDEL', all, tenant)
  end
end

for _, name in ipairs(redis.call('ZRANGEBYSCORE', ends, '-inf', now)) do forget(name) end

-- The context has these keys now. If the tenant would keep more than before, and more than it may, nothing changes, and the
-- reason is returned.
local function changed(name, after, most_own, most_all)
  local before, had = redis.call('HGET', keys, name) or '', own()
  change(before, after)
  local reason = ''
  if own() > had then
    if own() > tonumber(most_own) then reason = 'own_budget'
    elseif own() + rest() > tonumber(most_all) then reason = 'all_budget' end
  end
  if reason ~= '' then change(after, before) else redis.call('HSET', keys, name, after) end
  return reason
end

local function seen(name)
  local context = redis.call('HGET', contexts, name)
  if not context then return {} end
  local left = tonumber(redis.call('ZSCORE', ends, name)) - now
  return {name, context, redis.call('HSTRLEN', keys, name) / 8, left, redis.call('HGET', places, name) or ''}
end

local function answer(name, reason)
  local first = redis.call('ZRANGE', ends, 0, 0, 'WITHSCORES')[2]
  return {seen(name), reason, own(), own() + rest(), first and first - now or 0}
end
"""

#: ARGV: name, block keys, most blocks of the tenant and of all, ms, context, rank; "1" for a prompt.
KEEP = (
    _COMMON
    + """
local name, after, ttl, rank = ARGV[2], ARGV[3], ARGV[6], tonumber(ARGV[8])
local reason = changed(name, after, ARGV[4], ARGV[5])
if reason ~= '' then
  settle()
  local told = answer(name, reason)
  told[1] = {}
  return told
end
redis.call('HSET', contexts, name, ARGV[7])
redis.call('HSET', keys, name, after)
redis.call('ZADD', ends, now + ttl, name)
if ARGV[9] == '1' then
  for i = 1, #after - 8, 8 do
    local hex = string.gsub(string.sub(after, i, i + 7), '.', function(c) return string.format('%02x', string.byte(c)) end)
    local shorter = 'prompt:' .. hex
    local until_ = redis.call('ZSCORE', ends, shorter)
    if until_ and tonumber(until_) <= now + ttl and cjson.decode(redis.call('HGET', contexts, shorter)).rank <= rank then
      forget(shorter)
    end
  end
end
settle()
return answer(name, '')
"""
)

#: ARGV: name, block keys, most blocks of the tenant and of all.
PROLONG = (
    _COMMON
    + """
local name = ARGV[2]
local context = redis.call('HGET', contexts, name)
if not context then
  settle()
  return answer(name, '')
end
local reason = changed(name, ARGV[3], ARGV[4], ARGV[5])
redis.call('ZADD', ends, now + cjson.decode(context).ttl_ms, name)
settle()
return answer(name, reason)
"""
)

#: ARGV: place, then names. Returns those that are not kept.
PLACED = (
    _COMMON
    + """
local gone = {}
for i = 3, #ARGV do
  if redis.call('HEXISTS', contexts, ARGV[i]) == 1 then redis.call('HSET', places, ARGV[i], ARGV[2])
  else table.insert(gone, ARGV[i]) end
end
settle()
return gone
"""
)

#: ARGV: name, ms. Returns what is kept.
SHORTEN = (
    _COMMON
    + """
local name, ttl = ARGV[2], tonumber(ARGV[3])
local told = redis.call('HGET', contexts, name)
if told then
  local context = cjson.decode(told)
  if ttl < context.ttl_ms then
    context.ttl_ms = ttl
    redis.call('HSET', contexts, name, cjson.encode(context))
  end
  redis.call('ZADD', ends, 'XX', 'LT', now + ttl, name)
end
settle()
return seen(name)
"""
)

#: ARGV: name. Returns what was kept.
LET_GO = (
    _COMMON
    + """
local told = seen(ARGV[2])
forget(ARGV[2])
settle()
return told
"""
)

OF = (
    _COMMON
    + """
settle()
local told = {}
for i, name in ipairs(redis.call('ZRANGE', ends, 0, -1)) do told[i] = seen(name) end
return told
"""
)

#: Returns how many blocks the tenant keeps, and how many contexts.
HELD = (
    _COMMON
    + """
settle()
return {own(), redis.call('ZCARD', ends)}
"""
)

#: KEYS: the hash of tenants. No ARGV.
TENANTS = "return redis.call('HKEYS', KEYS[1])"

#: KEYS: what is claimed. ARGV: ms.
CLAIM = "return {redis.call('SET', KEYS[1], '1', 'NX', 'PX', ARGV[1]) and 1 or 0}"

"""The accounts' scripts on the Redis server, each of them atomic: Lua for Redis 6.2 or newer. Any of them may be run twice.

The ledger is a hash per day, from "TENANT/DECODER:FIGURE" to a whole number (neither name has a slash or a colon), a set of the
days that have one, and a hash with the number of the last batch that each router has written.

A tenant's limits are a hash of its buckets' levels (bucket.py), the turns that it has in progress by the time at which their
leases end, and a hash of the tokens that each of them has taken. A router renews its turns' leases. If it dies, they end by
themselves, and what the turns had taken remains taken.
"""

#: Adds a batch of figures, unless the router has written it before.
#: KEYS: routers' last batches, the set of days, the hash of each day that the batch is about. ARGV: router, the batch's number,
#: how many days, these days, then in threes: number of the day, field, what to add.
#: All is read before anything is written: a script that fails half-way would leave half of the batch behind.
WRITE = """
local router, number, days = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
for i = 1, #KEYS do
  local kind = redis.call('TYPE', KEYS[i]).ok
  if kind ~= 'none' and kind ~= (i == 2 and 'set' or 'hash') then return {'damaged', KEYS[i]} end
end
local last = redis.call('HGET', KEYS[1], router)
if last and tonumber(string.match(last, '^%d+')) >= number then return {'ok'} end
for i = 4 + days, #ARGV, 3 do
  local before = redis.call('HGET', KEYS[2 + ARGV[i]], ARGV[i + 1])
  if before and (#before > 18 or not string.match(before, '^%d+$')) then return {'damaged', KEYS[2 + ARGV[i]]} end
end
for i = 4 + days, #ARGV, 3 do redis.call('HINCRBY', KEYS[2 + ARGV[i]], ARGV[i + 1], ARGV[i + 2]) end
for i = 4, 3 + days do redis.call('SADD', KEYS[2], ARGV[i]) end
redis.call('HSET', KEYS[1], router, number .. ' ' .. redis.call('TIME')[1])
return {'ok'}
"""

#: Forgets old days, and routers that have written nothing for `ARGV[1]` seconds. KEYS: as above; the hashes of the days to
#: forget. ARGV: also these days.
FORGET = """
local now, written = tonumber(redis.call('TIME')[1]), redis.call('HGETALL', KEYS[1])
for i = 1, #written, 2 do
  if now - tonumber(string.match(written[i + 1], '%d+$')) > tonumber(ARGV[1]) then redis.call('HDEL', KEYS[1], written[i]) end
end
for i = 3, #KEYS do
  redis.call('DEL', KEYS[i])
  redis.call('SREM', KEYS[2], ARGV[i - 1])
end
return {'ok'}
"""

#: KEYS: the set of days.
DAYS = "return redis.call('SMEMBERS', KEYS[1])"

#: KEYS: hashes of days. Returns the content of each.
READ = """
local found = {}
for i = 1, #KEYS do found[i] = redis.call('HGETALL', KEYS[i]) end
return found
"""

#: KEYS: the tenant's buckets, its turns in progress, what each of these has taken. ARGV: turns a minute, tokens a minute (""
#: for both: no limit); further ones are noted at each script.
_LIMITS = """
local buckets, turns, taken = KEYS[1], KEYS[2], KEYS[3]
local limits = {requests = tonumber(ARGV[1]), tokens = tonumber(ARGV[2])}
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local ROUNDING = 1e-6
local levels = {}
for what, limit in pairs(limits) do
  local state = redis.call('HMGET', buckets, what, what .. '_at')
  local level, at = tonumber(state[1]), tonumber(state[2])
  levels[what] = level and at and math.min(limit, level + math.max(0, now - at) * limit / 60000) or limit
end

local function keep()
  local longest = 0
  for what, level in pairs(levels) do
    redis.call('HSET', buckets, what, string.format('%.17g', level), what .. '_at', string.format('%d', now))
    longest = math.max(longest, (limits[what] - level) * 60000 / limits[what])
  end
  if longest > 0 then redis.call('PEXPIRE', buckets, math.ceil(longest) + 1000) else redis.call('DEL', buckets) end
end

local function change(what, amount)
  if levels[what] then levels[what] = math.min(limits[what], levels[what] - amount) end
end

-- (remaining, ms until it is whole) of turns and tokens; -1 without a limit.
local function standing()
  local told = {}
  for i, what in ipairs({'requests', 'tokens'}) do
    local level = levels[what]
    told[2 * i - 1] = level and math.max(0, math.floor(level)) or -1
    told[2 * i] = level and math.ceil((limits[what] - level) * 60000 / limits[what]) or -1
  end
  return told
end

local function hold(lease)
  redis.call('PEXPIRE', turns, 2 * lease)
  redis.call('PEXPIRE', taken, 2 * lease)
end
"""

#: ARGV: most turns in progress (""), turn, tokens, lease in ms. Returns {status, ms to wait, standing}.
TAKE = (
    _LIMITS
    + """
local most, turn, cost, lease = tonumber(ARGV[3]), ARGV[4], tonumber(ARGV[5]), tonumber(ARGV[6])
for _, ended in ipairs(redis.call('ZRANGEBYSCORE', turns, '-inf', now)) do redis.call('HDEL', taken, ended) end
redis.call('ZREMRANGEBYSCORE', turns, '-inf', now)
if redis.call('HEXISTS', taken, turn) == 1 then return {'ok', 0, standing()} end
if most and redis.call('ZCARD', turns) >= most then return {'in progress', 0, standing()} end
local costs = {requests = 1, tokens = cost}
for _, what in ipairs({'requests', 'tokens'}) do
  if levels[what] then
    local missing = math.min(costs[what], limits[what]) - levels[what]
    if missing > ROUNDING then return {what, math.ceil(missing * 60000 / limits[what]), standing()} end
  end
end
for what, amount in pairs(costs) do change(what, amount) end
keep()
redis.call('ZADD', turns, now + lease, turn)
redis.call('HSET', taken, turn, cost)
hold(lease)
return {'ok', 0, standing()}
"""
)

#: ARGV: lease in ms, then turns in twos: turn, tokens that it has used. Turns whose leases have ended are not taken up again.
RENEW = (
    _LIMITS
    + """
local lease = tonumber(ARGV[3])
for i = 4, #ARGV, 2 do
  local before = tonumber(redis.call('HGET', taken, ARGV[i]))
  if before and redis.call('ZSCORE', turns, ARGV[i]) then
    redis.call('ZADD', turns, now + lease, ARGV[i])
    if tonumber(ARGV[i + 1]) > before then
      change('tokens', ARGV[i + 1] - before)
      redis.call('HSET', taken, ARGV[i], ARGV[i + 1])
    end
  end
end
keep()
hold(lease)
return {'ok'}
"""
)

#: ARGV: turn, tokens that it has used, turns to give back (0 or 1).
SETTLE = (
    _LIMITS
    + """
local before = tonumber(redis.call('HGET', taken, ARGV[3]))
if before then
  change('tokens', ARGV[4] - before)
  change('requests', -ARGV[5])
  keep()
  redis.call('HDEL', taken, ARGV[3])
end
redis.call('ZREM', turns, ARGV[3])
return {'ok'}
"""
)

-- Fills LuaJIT's heap with tables, strings and foreign arrays, and prints what it finds in it: a
-- name, a tab, a sum.
local ffi = require("ffi")
local bit = require("bit")

local state = 1
local function following()
  state = (state * 1103515245 + 12345) % 2147483648
  return math.floor(state / 256)
end

local function mixed(sum, number)
  return bit.bxor(bit.rol(sum, 5), bit.tobit(number))
end

collectgarbage("setpause", 120)

-- Tables that are replaced again and again.
local entries = {}
for round = 0, 5 do
  for key = 1, 120000 do
    entries[key] = { key = key, round = round, name = "entry " .. key .. " " .. following() % 100, { key, round } }
  end
end
local sum = 0
for key = 1, #entries do
  local entry = entries[key]
  assert(entry.key == key and entry[1][1] == key and entry.round == 5, "wrong entry " .. key)
  for at = 1, #entry.name do
    sum = mixed(sum, entry.name:byte(at))
  end
end
print("tables\t" .. bit.tohex(sum))
entries = nil
collectgarbage()

local parts = {}
for number = 1, 400000 do
  parts[number] = bit.tohex(number * 7)
end
table.sort(parts, function(one, other) return one > other end)
local text = table.concat(parts)
sum = 0
for at = 1, #text, 17 do
  sum = mixed(sum, text:byte(at))
end
print("strings\t" .. bit.tohex(sum))

local numbers = ffi.new("uint32_t[?]", 12 * 1024 * 1024)
for at = 0, 12 * 1024 * 1024 - 1 do
  numbers[at] = at * 2654435761 % 4294967296
end
sum = 0
for at = 0, 12 * 1024 * 1024 - 1 do
  sum = mixed(sum, numbers[at])
end
print("arrays\t" .. bit.tohex(sum))

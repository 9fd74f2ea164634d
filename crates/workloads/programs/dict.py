"""Builds a dict of many entries, scans it, looks keys up at random, and checks every value.

Usage: dict.py ENTRIES PASSES LOOKUPS. Prints one line of JSON; `check` depends on nothing but the
arguments. Exits with 3 when a value is not what was stored.
"""

import json
import sys
import time

MASK = (1 << 61) - 1


def value_of(key):
    return (key * 0x9E3779B97F4A7C15 + 0x6A09E667F3BC) & MASK


def main():
    entries, passes, lookups = (int(argument) for argument in sys.argv[1:4])
    began = time.monotonic()
    table = {key: value_of(key) for key in range(entries)}
    build_seconds = time.monotonic() - began

    scans = []
    for _ in range(passes):
        began = time.monotonic()
        total = sum(table.values())
        scans.append(time.monotonic() - began)

    key = 1
    for _ in range(lookups):
        key = (key * 6364136223846793005 + 1442695040888963407) % (1 << 64)
        place = key % entries
        if table[place] != value_of(place):
            print(f"wrong byte: entry {place}: {table[place]:#x}", file=sys.stderr)
            sys.exit(3)

    if total != sum(value_of(key) for key in range(entries)):
        print("wrong byte: the sum over all entries is wrong", file=sys.stderr)
        sys.exit(3)
    scan_seconds = sorted(scans)[len(scans) // 2] if scans else 0
    print(json.dumps({"check": total, "build_seconds": build_seconds, "scan_seconds": scan_seconds}))


main()

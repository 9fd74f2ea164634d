"""Computes with numpy and pandas, and prints a digest of each result: a name, a tab, the digest."""

import hashlib

import numpy
import pandas

ROWS = 400_000


def tell(name, values):
    content = numpy.ascontiguousarray(values).tobytes()
    print(f"{name}\t{hashlib.sha256(content).hexdigest()}", flush=True)


random = numpy.random.Generator(numpy.random.PCG64(7))

# Whole numbers, so that the order of additions does not matter.
matrix = random.integers(0, 1000, size=(700, 700))
tell("product", matrix @ matrix)
tell("sorted", numpy.sort(random.integers(0, 2**40, size=3_000_000)))
tell("transposed", numpy.ascontiguousarray(matrix.T[::-1]))
tell("transform", numpy.fft.rfft(random.random(1 << 20)))
tell("solution", numpy.linalg.solve(random.random((500, 500)), random.random(500)))

frame = pandas.DataFrame({
    "key": random.integers(0, 5_000, ROWS),
    "other": random.integers(0, 300, ROWS),
    "value": random.integers(-1000, 1000, ROWS),
    "name": [f"name {number}" for number in random.integers(0, 20_000, ROWS)],
})
tell("groups", frame.groupby("key").value.agg(["sum", "min", "max", "count"]).to_numpy())
tell("names", frame.groupby("name").value.sum().sort_index().to_numpy())
named = frame.drop_duplicates("key")[["key", "name"]].rename(columns={"name": "first"})
joined = frame.merge(named, on="key").sort_values(["key", "value", "name"])
tell("join", joined.value.to_numpy())
print(f"text\t{hashlib.sha256(joined.head(50_000).to_csv().encode()).hexdigest()}")
tell("pivot", frame.pivot_table(index="other", columns=frame.key % 7, values="value", aggfunc="sum").to_numpy())
tell("rolling", frame.value.rolling(1000).max().dropna().to_numpy())

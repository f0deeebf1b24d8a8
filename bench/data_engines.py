"""The group-bys of a build's last stage: NumPy against DuckDB and Polars.

    python bench/data_engines.py --documents 1000000 5000000

One table of synthetic documents, a fifth of them copies, drawn by seed. Every measurement is a
process of its own with one thread.

    exact   128-bit content hashes -> the documents that are not simply trained on: held out, copies
            of held-out ones, copies of earlier ones
    near    64-bit keys of one band -> pairs of neighbors, in the order of the mix, with equal keys

DuckDB and Polars read Parquet files and answer in one query over the whole table. DuckDB has a
memory limit and spills to disk; Polars runs with its streaming engine. `buckets` is how the build
does it: the table in files that are sorted by bucket, one bucket at a time, with each of the three.
All must give the same answer, which is checked by its hash.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
MEMORY_LIMIT = "1GB"
HELD_OUT_SHARE = 0.001
BUCKET_DOCUMENTS = 1 << 20
TRAIN, HELD_OUT, DUPLICATE, HELD_OUT_COPY = range(4)
Columns = dict[str, npt.NDArray[Any]]


def draw(documents: int) -> Columns:
    """Return hashes, numbers and held-out marks of documents, a fifth of them copies."""
    generator = np.random.default_rng(7)
    high = generator.integers(0, 2**64, documents, np.uint64)
    low = generator.integers(0, 2**64, documents, np.uint64)
    copies = np.flatnonzero(generator.random(documents) < 0.2)
    originals = generator.integers(0, documents, len(copies))
    high[copies] = high[originals]
    low[copies] = low[originals]
    held = high % np.uint64(1000) < int(HELD_OUT_SHARE * 1000)
    return {"high": high, "low": low, "number": np.arange(documents), "held": held}


def write_tables(folder: Path, documents: int) -> None:
    """Write the table once as a Parquet file and once as arrays sorted by bucket."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = draw(documents)
    pq.write_table(pa.table(columns), folder / "table.parquet", compression="none")
    bits = (documents // BUCKET_DOCUMENTS).bit_length()
    buckets = np.zeros(documents, np.uint16)
    if bits:
        buckets = (columns["high"] >> np.uint64(64 - bits)).astype(np.uint16)
    order = np.argsort(buckets, kind="stable")
    np.save(folder / "ends.npy", np.cumsum(np.bincount(buckets, minlength=1 << bits)))
    for name, values in columns.items():
        np.save(folder / f"{name}.npy", values[order])


def buckets(folder: Path) -> Iterator[Columns]:
    """Yield the columns of one bucket after the other."""
    start = 0
    for end in np.load(folder / "ends.npy").tolist():
        columns = {}
        for name in ("high", "low", "number", "held"):
            mapped = np.load(folder / f"{name}.npy", mmap_mode="r")
            columns[name] = np.array(mapped[start:end])
        yield columns
        start = end


EXACT_SQL = """
    WITH shared AS (
        SELECT high, low, min(number) AS first, min(number) FILTER (held) AS first_held
        FROM {table} GROUP BY high, low HAVING count(*) > 1 OR bool_or(held)
    )
    SELECT number, CASE
            WHEN number = first_held THEN 1 WHEN first_held IS NOT NULL THEN 3 ELSE 2 END AS fate
    FROM {table} JOIN shared USING (high, low)
    WHERE number != first OR first_held IS NOT NULL
"""
NEAR_SQL = """
    WITH shared AS (SELECT low FROM {table} GROUP BY low HAVING count(*) > 1)
    SELECT previous, number FROM (
        SELECT number, lag(number) OVER (PARTITION BY low ORDER BY number) AS previous
        FROM {table} SEMI JOIN shared USING (low)
    ) WHERE previous IS NOT NULL
"""


def _duckdb(folder: Path) -> Any:
    import duckdb

    connection = duckdb.connect()
    connection.execute("SET threads = 1")
    connection.execute(f"SET memory_limit = '{MEMORY_LIMIT}'")
    connection.execute(f"SET temp_directory = '{folder / 'spill'}'")
    connection.execute("SET preserve_insertion_order = false")
    return connection


def duckdb_whole(folder: Path, sql: str) -> list[Columns]:
    table = f"read_parquet('{folder / 'table.parquet'}')"
    return [_duckdb(folder).execute(sql.format(table=table)).fetchnumpy()]


def duckdb_buckets(folder: Path, sql: str) -> list[Columns]:
    import pyarrow as pa

    connection = _duckdb(folder)
    found = []
    for columns in buckets(folder):
        connection.register("bucket", pa.table(columns))
        found.append(connection.execute(sql.format(table="bucket")).fetchnumpy())
        connection.unregister("bucket")
    return found


def _polars_exact(frame: Any) -> Any:
    import polars as pl

    shared = (
        frame.group_by("high", "low")
        .agg(
            pl.col("number").min().alias("first"),
            pl.col("number").filter(pl.col("held")).min().alias("first_held"),
            pl.len().alias("copies"),
        )
        .filter((pl.col("copies") > 1) | pl.col("first_held").is_not_null())
    )
    joined = frame.join(shared, on=["high", "low"])
    is_held = pl.col("first_held").is_not_null()
    fate = (
        pl.when(pl.col("number") == pl.col("first_held"))
        .then(HELD_OUT)
        .when(is_held)
        .then(HELD_OUT_COPY)
        .otherwise(DUPLICATE)
    )
    wanted = joined.filter((pl.col("number") != pl.col("first")) | is_held)
    return wanted.select("number", fate.alias("fate"))


def _polars_near(frame: Any) -> Any:
    import polars as pl

    shared = frame.group_by("low").agg(pl.len().alias("copies")).filter(pl.col("copies") > 1)
    ordered = frame.join(shared, on="low", how="semi").sort("low", "number")
    previous = pl.when(pl.col("low") == pl.col("low").shift(1)).then(pl.col("number").shift(1))
    paired = ordered.select(previous.alias("previous"), "number")
    return paired.filter(pl.col("previous").is_not_null())


def polars_whole(folder: Path, plan: Callable[[Any], Any]) -> list[Columns]:
    import polars as pl

    frame = plan(pl.scan_parquet(folder / "table.parquet")).collect(engine="streaming")
    return [{name: frame[name].to_numpy() for name in frame.columns}]


def polars_buckets(folder: Path, plan: Callable[[Any], Any]) -> list[Columns]:
    import polars as pl

    found = []
    for columns in buckets(folder):
        frame = plan(pl.DataFrame(columns).lazy()).collect()
        found.append({name: frame[name].to_numpy() for name in frame.columns})
    return found


def numpy_exact(folder: Path) -> list[Columns]:
    found = []
    for columns in buckets(folder):
        number = columns["number"]
        fates = _bucket_fates(columns["high"], columns["low"], columns["held"])
        chosen = np.flatnonzero(fates != TRAIN)
        found.append({"number": number[chosen], "fate": fates[chosen]})
    return found


def _bucket_fates(
    high: npt.NDArray[Any], low: npt.NDArray[Any], held: npt.NDArray[Any]
) -> npt.NDArray[np.uint8]:
    """Return fates by one sort of all records."""
    fates = np.full(len(high), DUPLICATE, np.uint8)
    order = np.lexsort((np.arange(len(high)), low, high))
    is_first = np.ones(len(high), dtype=bool)
    is_first[1:] = np.diff(high[order]).astype(bool) | np.diff(low[order]).astype(bool)
    starts = np.flatnonzero(is_first)
    groups = np.cumsum(is_first) - 1
    group_held = np.logical_or.reduceat(held[order], starts)
    fates[order[starts]] = TRAIN
    fates[order[group_held[groups]]] = HELD_OUT_COPY
    held_places = np.flatnonzero(held[order])
    _, first_of_group = np.unique(groups[held_places], return_index=True)
    fates[order[held_places[first_of_group]]] = HELD_OUT
    return fates


def numpy_near(folder: Path) -> list[Columns]:
    found = []
    for columns in buckets(folder):
        keys = columns["low"]
        order = np.argsort(keys, kind="stable")
        equal = np.flatnonzero(keys[order][1:] == keys[order][:-1])
        number = columns["number"]
        found.append({"previous": number[order[equal]], "number": number[order[equal + 1]]})
    return found


CONTESTANTS: dict[str, dict[str, Callable[[Path], list[Columns]]]] = {
    "exact": {
        "numpy buckets": numpy_exact,
        "duckdb whole": lambda folder: duckdb_whole(folder, EXACT_SQL),
        "duckdb buckets": lambda folder: duckdb_buckets(folder, EXACT_SQL),
        "polars whole": lambda folder: polars_whole(folder, _polars_exact),
        "polars buckets": lambda folder: polars_buckets(folder, _polars_exact),
    },
    "near": {
        "numpy buckets": numpy_near,
        "duckdb whole": lambda folder: duckdb_whole(folder, NEAR_SQL),
        "duckdb buckets": lambda folder: duckdb_buckets(folder, NEAR_SQL),
        "polars whole": lambda folder: polars_whole(folder, _polars_near),
        "polars buckets": lambda folder: polars_buckets(folder, _polars_near),
    },
}


def measure(folder: Path, work: str, contestant: str) -> dict[str, Any]:
    """Run one contestant in this process."""
    import duckdb  # noqa: F401  # imports are not measured
    import polars  # noqa: F401
    import pyarrow  # noqa: F401

    cpu = time.process_time()
    wall = time.perf_counter()
    found = CONTESTANTS[work][contestant](folder)
    wall = time.perf_counter() - wall
    cpu = time.process_time() - cpu
    number = np.concatenate([np.asarray(columns["number"]) for columns in found])
    other = next(name for name in found[0] if name != "number")
    value = np.concatenate([np.asarray(columns[other]) for columns in found])
    order = np.argsort(number, kind="stable")
    digest = hash((number[order].tobytes(), value[order].astype(np.int64).tobytes()))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"wall": wall, "cpu": cpu, "peak_mib": peak, "found": len(number), "digest": digest}


def _in_a_process(folder: Path, work: str, contestant: str) -> dict[str, Any]:
    one_thread = {"OMP_NUM_THREADS": "1", "POLARS_MAX_THREADS": "1", "PYTHONHASHSEED": "0"}
    command = [sys.executable, __file__, "--child", str(folder), work, contestant]
    done = subprocess.run(
        command, env=os.environ | one_thread, capture_output=True, text=True, check=True
    )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    """Print one line for each measurement."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, nargs="+", default=[1_000_000, 5_000_000])
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        folder, work, contestant = args.child
        print(json.dumps(measure(Path(folder), work, contestant)))
        return
    print("documents  work   contestant       us CPU/document  wall s  peak MiB")
    for documents in args.documents:
        with tempfile.TemporaryDirectory() as name:
            write_tables(Path(name), documents)
            for work, contestants in CONTESTANTS.items():
                digests = set()
                for contestant in contestants:
                    result = _in_a_process(Path(name), work, contestant)
                    digests.add((result["digest"], result["found"]))
                    cost = result["cpu"] / documents * 1e6
                    print(
                        f"{documents:>9}  {work:<5}  {contestant:<15}  {cost:>15.3f}  "
                        f"{result['wall']:>6.2f}  {result['peak_mib']:>8.0f}",
                        flush=True,
                    )
                assert len(digests) == 1, f"{work}: the answers differ"


if __name__ == "__main__":
    main()

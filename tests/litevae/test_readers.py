"""A cache's shards are plain Parquet: other libraries read them in a process that can't import this project."""

import json
import os
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest

from litevae import cache
from litevae.commits import commit_shard
from litevae.shards import QUARANTINE, latent_layout, row_schema, to_stored

CARRIED = pa.schema([("label", pa.int64()), ("caption", pa.string()), ("score", pa.float64()), ("good", pa.bool_())])
CACHES = {  # content, dtype, the shapes of the rows of each shard
    "half": ("moments", "float16", [[(300, 6, 4, 5)], [(40, 6, 4, 5)]]),
    "brain": ("moments", "bfloat16", [[(150, 6, 4, 5)]]),
    "mean": ("mean", "float32", [[(40, 3, 4, 5)], [(3, 3, 4, 5)]]),
    "buckets": ("moments", "float16", [[(150, 6, 2, 8), (20, 6, 4, 4)], [(9, 6, 8, 2)]]),
}

READERS = {
    "pyarrow": """
import pyarrow.parquet as pq

def read(files):
    tables = [pq.read_table(file, page_checksum_verification=True) for file in files]
    for table in tables:
        about = {k.decode(): v.decode() for k, v in table.schema.field(column).metadata.items() if k[:7] != b"PARQUET"}
        assert about == {
            "dtype": latents["dtype"], "byte_order": "little", "order": latents["order"],
            "shape": json.dumps(latents["shape"] or [channels, "latent_height", "latent_width"]),
        }, about
    return [row for table in tables for row in table.to_pylist()]
""",
    "pandas": """
import pandas as pd

def read(files):
    frame = pd.concat([pd.read_parquet(file) for file in files])
    return frame.astype(object).where(frame.notna(), None).to_dict("records")
""",
    "duckdb": """
import duckdb

def read(files):
    found = duckdb.sql(f"select * from read_parquet({files})")
    assert duckdb.sql(f"select count(*) from read_parquet({files}) where unit >= 7").fetchall() == [(len(found) - 7,)]
    return [dict(zip(found.columns, row)) for row in found.fetchall()]
""",
    "polars": """
import polars as pl

def read(files):
    assert pl.scan_parquet(files).filter(pl.col("unit") < 7).select("id").collect().height == 7
    return pl.read_parquet(files).rows(named=True)
""",
    "datasets": """
import datasets

def read(files):
    return list(datasets.load_dataset("parquet", data_files=files, split="train"))
""",
}

SCRIPT = """
import json, sys
import numpy as np

for name in ("litevae", "pipelines", "jobs"):
    sys.modules[name] = None
try:
    import litevae
except ImportError:
    pass
else:
    sys.exit("the project can be imported")

{reader}

def values(row):
    data = np.frombuffer(row.pop(column), dtypes[latents["dtype"]])
    if latents["dtype"] == "bfloat16":  # the upper half of a float32
        data = (data.astype(np.uint32) << 16).view(np.float32)
    shape = latents["shape"] or [channels, row.pop("latent_height"), row.pop("latent_width")]
    return data.reshape(shape).tolist()

dtypes = {"float16": "<f2", "bfloat16": "<u2", "float32": "<f4"}
found = {}
for folder in sys.argv[1:]:
    manifest = json.load(open(folder + "/manifest.json"))
    latents = manifest["latents"]
    column, channels = {"moments": "moments", "mean": "latent"}[latents["content"]], latents["shapes"][0][1]
    rows = read([folder + "/" + shard["file"] for shard in manifest["shards"]])
    found[folder] = [[values(row), row] for row in rows]
print(json.dumps(found))
"""


def rows_of(start, count):
    numbers = range(start, start + count)
    columns = {
        "id": [f"a/ünï {n}.png" for n in numbers],
        "unit": numbers,
        "view": [0] * count,
        "height": [480] * count,
        "width": [n + 1 for n in numbers],
        "crop_top": [7] * count,
        "crop_left": numbers,
        "flip": [n % 3 == 0 for n in numbers],
        "label": [n if n % 2 else None for n in numbers],
        "caption": [f"„{n}“ 🐈" if n % 5 else None for n in numbers],
        "score": [n / 7 for n in numbers],
        "good": [n % 7 == 0 for n in numbers],
    }
    return pa.table(columns, schema=row_schema(CARRIED))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Folder of each cache -> [latent, other columns] of its rows."""
    root, expected = tmp_path_factory.mktemp("caches"), {}
    for name, (content, dtype, shards) in CACHES.items():
        folder, start, draw = str(root / name), 0, np.random.default_rng(0)
        how = latent_layout(content, dtype, one_shape=name != "buckets")
        expected[folder] = []
        for shard, shapes in enumerate(shards):
            rows = rows_of(start, sum(count for count, *_ in shapes))
            latents = [draw.normal(0, 3, shape).astype(np.float16).astype(np.float32) for shape in shapes]
            if dtype == "bfloat16":  # what it holds exactly: seven bits after the point
                latents = [(part.view(np.uint32) & 0xFFFF0000).view(np.float32) for part in latents]
            units = (start, start := start + rows.num_rows)
            stored = [to_stored(part, dtype) for part in latents]
            commit_shard(folder, shard, units, how, rows, stored, QUARANTINE.empty_table())
            values = [row.tolist() for part in latents for row in part]
            expected[folder] += [list(pair) for pair in zip(values, rows.to_pylist(), strict=True)]
        cache.write_manifest(folder, {"latents": how}, {"units": start, "shards": len(shards)}, {})
    return expected


@pytest.mark.parametrize("reader", READERS)
def test_read_without_this_project(written, reader, tmp_path):
    script = SCRIPT.replace("{reader}", READERS[reader])
    offline = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-I", "-c", script, *written],
        capture_output=True,
        text=True,
        cwd="/",
        env=os.environ | offline,
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found.keys() == written.keys()
    for folder, rows in written.items():
        assert len(found[folder]) == len(rows)
        for got, expected in zip(found[folder], rows, strict=True):
            assert got == expected

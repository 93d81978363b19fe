"""Random trees, Parquet files, tars and lists, of which the generator knows what must come out of them.

Every image that was made is a row, is in quarantine or is left out; ids are unique; every carried value is what was
written, or is named as one that could not be carried. `SECONDS_OF_RANDOM_SOURCES` sets for how long a run goes on.
"""

import io
import json
import os
import random
import shutil
import tarfile
import time
from dataclasses import dataclass, field
from datetime import date
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from litevae.cache import LatentCache
from pipelines.data.config import Source as SourceConfig
from pipelines.data.config import Views
from pipelines.data.decode import decode_units
from pipelines.data.open_source import open_source
from pipelines.data.unique_ids import check_ids
from pipelines.encoding.config import Encode, Verify
from pipelines.encoding.encode import encode_dataset
from pipelines.encoding.listings import open_listings
from pipelines.encoding.verify import verify
from pipelines.runtime.schema import Tracking
from tests.encoding import save_model
from tests.in_process import in_process

SECONDS = float(os.environ.get("SECONDS_OF_RANDOM_SOURCES", "110"))
LETTERS = "abcXYZ019 _-.#;%&+'()[]{}~é日🐱\\$!,@^=\n"
TEXTS = ["007", "1.10", "true", "null", "NaN", "2024-01-02", "", " x ", "1e5", "é日🐱", 'a "quote", and', "0x10", "-0"]
SOUND = ("png", "bmp", "gif", "jpg")


@dataclass
class Made:
    """What a generator made.

    Attributes:
        uri: of the source.
        options: of the source.
        rows: the values of its carried columns for each image that can be read, by id.
        lost: ids of images that can't be read.
        left_out: number of files, or members of tars, that are not taken.
    """

    uri: str
    options: dict[str, Any] = field(default_factory=dict)
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    lost: set[str] = field(default_factory=set)
    left_out: int = 0


def encoded(kind):
    sink = io.BytesIO()
    Image.new("RGB", (9, 8), (random.randrange(256), 20, 30)).save(sink, {"jpg": "jpeg"}.get(kind, kind))
    return sink.getvalue()


IMAGES = {kind: encoded(kind) for kind in SOUND}


def image(rng):
    """(suffix, content, whether it can be read)"""
    kind = rng.choice(SOUND)
    if rng.random() < 0.8:
        return kind, IMAGES[kind], True
    return kind, rng.choice([b"", b"no image", IMAGES[kind][:20]]), False


def name(rng, letters=LETTERS):
    while True:
        text = "".join(rng.choice(letters) for _ in range(rng.randint(1, 6))).strip()
        if text and text[0] not in "._~$#@" and not text.endswith((".", " ")):
            return text


def case(rng, text):
    return text.upper() if rng.random() < 0.2 else text


def folder_of(rng, root):
    """A tree: images, texts beside some of them, hidden files, files of other kinds, folders of other systems."""
    made = Made(str(root), {"columns": ["txt"]} if rng.random() < 0.5 else {})
    made.rows, texts = {}, {}
    folders = [""] + [f"{name(rng, 'abc =é')}/" for _ in range(rng.randint(0, 3))]
    taken = set()
    for _ in range(rng.randint(1, 12)):
        suffix, content, sound = image(rng)
        stem = rng.choice(folders) + name(rng).replace("/", "")
        if stem in taken or "\\x" in stem:
            continue
        taken.add(stem)
        path = f"{stem}.{case(rng, suffix)}"
        write(root / path, content)
        made.rows[path] = {}
        if not sound:
            made.lost.add(path)
        if rng.random() < 0.5:
            texts[path] = rng.choice(TEXTS)
            write(root / f"{rng.choice([stem, path])}.txt", texts[path].encode())
    if not made.rows:
        return folder_of(rng, root / "again")
    others = [".hidden.jpg", ".git/x.png", "@eaDir/a.jpg", "Thumbs.db", "_temporary/a.png", "x.mp4", "y.jpg.part", "z"]
    for other in rng.sample(others, rng.randint(0, 4)):
        write(root / rng.choice(folders) / other, b"x")
        made.left_out += 1
    if made.options and texts:
        made.rows = {path: {"txt": texts.get(path)} for path in made.rows}
    else:
        made.options = {}
        made.left_out += len(texts)
    return made


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def values(rng, count):
    """(Arrow type for each file, values): a column as tools write it, in types that hold these values."""
    kinds = rng.choice(
        [
            [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())],
            [pa.int8(), pa.int32(), pa.int64(), pa.uint16()],
            [pa.float32(), pa.float64()],
            [pa.bool_()],
            [pa.date32()],
        ]
    )
    make = {
        pa.string(): lambda: rng.choice(TEXTS),
        pa.int8(): lambda: rng.randrange(100),
        pa.float32(): lambda: rng.randrange(100) / 4,
        pa.bool_(): lambda: rng.random() < 0.5,
        pa.date32(): lambda: date(2000 + rng.randrange(30), 1, 2),
    }[kinds[0]]
    return kinds, [None if rng.random() < 0.2 else make() for _ in range(count)]


def parquet_of(rng, root):
    """Files with one image a row; ids that are unique, or that begin anew in each file."""
    made = Made(str(root), {"columns": ["value"]})
    files, number = rng.randint(1, 3), 0
    repeats, has_ids = rng.random() < 0.3, rng.random() < 0.7
    counts = [rng.randint(1, 5) for _ in range(files)]
    kinds, held = values(rng, sum(counts))
    for file, count in enumerate(counts):
        images = [image(rng) for _ in range(count)]
        here = held[number : number + count]
        kind = pa.null() if here == [None] * count else rng.choice(kinds)
        plain = pa.array(here, kind.value_type).dictionary_encode().cast(kind) if pa.types.is_dictionary(kind) else None
        columns = {"image": [content for _, content, _ in images], "value": plain or pa.array(here, kind)}
        ids = [str(n if repeats else number + n) for n in range(count)]
        if has_ids:
            columns["id"] = ids
        path = f"part-{file}.parquet"
        write(root / path, b"")
        pq.write_table(pa.table(columns), root / path, row_group_size=rng.randint(1, 4))
        unique = repeats and has_ids and files > 1
        for n, (_, _, sound) in enumerate(images):
            identity = ids[n] if has_ids and not unique else f"{path}/{n:09d}"
            made.rows[identity] = {"value": here[n]}
            if not sound:
                made.lost.add(identity)
        number += count
    if repeats and has_ids and files > 1:
        made.options["ids"] = "unique"
    for other in rng.sample(["_SUCCESS", ".crc", "_temporary/0/part-0.parquet", "notes.md"], rng.randint(0, 3)):
        write(root / other, b"x")
        made.left_out += 1
    return made


def tars_of(rng, root):
    """Samples with one image or several, and texts; in names that hold dots, each image is a row."""
    made = Made(str(root), {"columns": ["txt"]})
    by_image, several = rng.random() < 0.4, rng.random() < 0.4
    made.options |= {"tar_rows": "images"} if by_image else {"image_column": "png"} if several else {}
    any_text = False
    for number in range(rng.randint(1, 2)):
        path = f"{number}.tar"
        root.mkdir(parents=True, exist_ok=True)
        with tarfile.open(root / path, "w") as file:
            for n in range(rng.randint(1, 6)):
                stem = f"{n:03d}{name(rng, 'ab é')}" + (f".{rng.randrange(100)}" if by_image else "")
                members = {"png": image_of(rng, "png")}
                if several:
                    members["depth.png" if not by_image else "bmp"] = image_of(rng, "bmp")
                text = rng.choice([None, *TEXTS])
                for extension, (content, sound) in members.items():
                    add(file, f"{stem}.{extension}", content)
                    if by_image:
                        identity = f"{path}/{stem}.{extension}"
                    elif extension == "png":
                        identity = f"{path}/{stem}"
                    else:
                        made.left_out += 1
                        continue
                    made.rows[identity] = {"txt": text}
                    if not sound:
                        made.lost.add(identity)
                if text is not None:
                    add(file, f"{stem}.txt", text.encode())
                    any_text = True
                if rng.random() < 0.3:
                    add(file, f"{stem}.json", b"{}")
                    made.left_out += len(members) if by_image else 1
            if rng.random() < 0.3:
                add(file, "._x.png", b"x")
                made.left_out += 1
    if not any_text:
        del made.options["columns"]
        made.rows = {identity: {} for identity in made.rows}
    return made


def image_of(rng, kind):
    return (IMAGES[kind], True) if rng.random() < 0.8 else (b"no image", False)


def add(file, path, content):
    member = tarfile.TarInfo(path)
    member.size = len(content)
    file.addfile(member, io.BytesIO(content))


def list_of(rng, root):
    """A CSV or JSON Lines list, of any encoding that is read, with a column of text, of numbers or of both.

    One path may be in several rows, if ids are made from row numbers.
    """
    rows, made = [], Made("", {"columns": ["value"]})
    kind = rng.choice(["csv", "jsonl"])
    number = rng.random() < 0.4
    for n in range(rng.randint(1, 8)):
        suffix, content, sound = image(rng)
        path = f"{n}{name(rng, LETTERS.replace(chr(92), ''))}.{suffix}"
        write(root / path, content)
        value = rng.randrange(1000) if number else rng.choice(TEXTS)
        if rng.random() < 0.2:
            value = None
        rows.append({"file_name": path, "value": value})
        made.rows[path] = {"value": value}
        if not sound:
            made.lost.add(path)
    if rng.random() < 0.3:
        rows += [{**row, "value": None} for row in rng.sample(rows, rng.randint(0, len(rows)))]
        lost = [row["file_name"] in made.lost for row in rows]
        made.rows = {f"list.{kind}/{n:09d}": {"value": row["value"]} for n, row in enumerate(rows)}
        made.lost = {identity for identity, bad in zip(made.rows, lost, strict=True) if bad}
        made.options["ids"] = "unique"
    text = io.StringIO(newline="")
    if kind == "jsonl":
        for row in rows:
            text.write(json.dumps(row, ensure_ascii=rng.random() < 0.5) + rng.choice(["\n", "\r\n", "\n\n"]))
    else:
        for cells in [("file_name", "value"), *(row.values() for row in rows)]:
            text.write(",".join(map(cell, cells)) + "\r\n")
    codec = rng.choice(["utf-8", "utf-8-sig", "utf-16"])
    (root / f"list.{kind}").write_bytes(text.getvalue().encode(codec))
    made.uri = str(root / f"list.{kind}")
    return made


def cell(value):
    """A cell of a CSV file: text in quotes, so that an empty text is none that is missing."""
    if isinstance(value, str):
        return '"' + value.replace('"', '""') + '"'
    return "" if value is None else str(value)


def encode(made, out, model):
    config = Encode(
        source=SourceConfig(uri=made.uri, **made.options), model=model, out=str(out), rows_per_shard=4,
        transform=Views(resolution=8), batch_size=4, error_budget=1.0,
        root=str(out.parent), tracking=Tracking(enabled=False),
    )  # fmt: skip
    return encode_dataset(config)


@pytest.mark.slow
def test_random_sources(tmp_path, record_property):
    model, tried = save_model(tmp_path / "model"), dict.fromkeys(("folder", "parquet", "tars", "list"), 0)
    begun, seed = time.monotonic(), int(os.environ.get("FIRST_RANDOM_SOURCE", "0"))
    makers = {"folder": folder_of, "parquet": parquet_of, "tars": tars_of, "list": list_of}
    with in_process():
        while time.monotonic() - begun < SECONDS or not all(tried.values()):
            for kind, maker in makers.items():
                rng = random.Random(f"{seed} {kind}")
                folder = tmp_path / f"{seed}" / kind
                print(f"seed {seed}: {kind}")
                made = maker(rng, folder / "data")
                check_source(made)
                if seed % 10 == 0:  # a whole cache takes as long as a hundred listings
                    check_cache(made, folder / "cache", model)
                tried[kind] += 1
                shutil.rmtree(folder)
            seed += 1
    record_property("random sources tried", f"{tried}, seeds up to {seed - 1}")


def check_source(made):
    """What the decode tasks of an encode job would give."""
    source = open_source(SourceConfig(uri=made.uri, **made.options))
    check_ids([source])
    names = list(next(iter(made.rows.values())))
    rows, lost = {}, set()
    for unit, item, _ in decode_units(source, Views(resolution=8), range(source.units)):
        if item is None:
            lost.add(source.id(unit))
        else:
            assert item.id not in rows
            rows[item.id] = {name: item.columns[name] for name in names}
    assert rows == {identity: values for identity, values in made.rows.items() if identity not in made.lost}
    assert lost == made.lost
    assert source.seen == len(made.rows) + made.left_out, source.left_out


def check_cache(made, out, model):
    if len(made.lost) == len(made.rows):
        with pytest.raises(Exception, match="none of|more than error_budget"):
            encode(made, out, model)
        return
    encode(made, out, model)
    latents = LatentCache(out)
    names = list(next(iter(made.rows.values())))
    rows = {row["id"]: {name: row[name] for name in names} for row in map(latents.row, range(len(latents)))}
    assert rows == {identity: values for identity, values in made.rows.items() if identity not in made.lost}
    counts, source = latents.manifest["counts"], latents.manifest["source"]
    assert counts["quarantined"] == len(made.lost)
    assert counts["input"] == len(made.rows)
    assert source["seen"] == len(made.rows) + made.left_out, open_listings(str(out))[0].left_out
    verify(Verify(cache=str(out), source="contents"))

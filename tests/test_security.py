"""What files and names of strangers can do here: run nothing, leave no folder, fill no memory; and who can reach what a
job starts. SECURITY.md says what each test stands for."""

import hashlib
import io
import json
import os
import pickle
import re
import shutil
import socket
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray.data  # makes Ray's extension types known to Arrow, as in a job
import torch
import yaml
from diffusers import AutoencoderKL, UNet2DModel
from PIL import Image
from ray.data._internal.object_extensions.arrow import ArrowPythonObjectType

from litevae import cache, storage
from litevae.any_autoencoder import fingerprint, load_autoencoder
from litevae.autoencoder import LiteVAE
from litevae.cache import LatentCache
from litevae.commits import commit_shard, committed_shards, read_commit, read_commits
from litevae.diffusion import Objective
from litevae.errors import UserError, redact
from litevae.generation import Backbone, Inception, SqueezeNetCaffe
from litevae.images import ImageError, ImageTransform
from litevae.ldm import LDM, NormalizedAutoencoder, load_ldm, save_ldm
from litevae.model_folder import WEIGHTS
from litevae.perceptual import load_esrgan, load_lpips
from litevae.shards import OWN_COLUMNS, QUARANTINE, latent_layout, read_quarantine, read_shard, row_schema
from pipelines.data.config import Source
from pipelines.data.open_source import open_source
from pipelines.encoding.config import Encode
from pipelines.encoding.listings import open_listings
from pipelines.experiments.comparison import ComparedRow, Comparison, Run
from pipelines.experiments.config import Sweep
from pipelines.experiments.page import page
from pipelines.runtime import cluster
from pipelines.runtime.cli import load, main
from pipelines.runtime.paths import output_path
from pipelines.training import checkpoint, run_folder
from pipelines.training.config import TrainVAE
from tests import memory
from tests.encoding import arguments, save_model
from tests.setups import leave_checkpoint

REPO = Path(__file__).resolve().parents[1]
PICKLED = (UserError, pa.ArrowInvalid)


class Bomb:
    """Pickled: makes a folder where it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def bomb(tmp_path) -> Iterator[Bomb]:
    """A pickle that shows that it was run; no test here may do it. That it would is seen, too."""
    planted = Bomb(tmp_path / "ran")
    yield planted
    assert not planted.path.exists(), "the pickle was run"
    pickle.loads(pickle.dumps(planted))
    assert planted.path.exists()


def png(side=40, seed=0) -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 255, (side, side, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, "PNG")
    return file.getvalue()


# --- pickles --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [2, 5])
def test_a_checkpoint(bomb, tmp_path, protocol):
    path = tmp_path / checkpoint.STATE
    torch.save({"model": {"weight": bomb}}, path)
    with pytest.raises(UserError, match=r"checkpoint .*state\.pt can't be read"):
        checkpoint.load(str(tmp_path))
    path.write_bytes(pickle.dumps(bomb, protocol))
    with pytest.raises(UserError, match="can't be read"):
        checkpoint.load(str(tmp_path))
    # torch's format of before 2019, which is pickle after pickle
    torch.save({"model": bomb}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match="can't be read"):
        checkpoint.load(str(tmp_path))


def small_kl() -> AutoencoderKL:
    return AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)


@pytest.mark.parametrize("beside", ["diffusion_pytorch_model.bin", "pytorch_model.bin", "model.ckpt", "model.pt"])
def test_a_pickle_beside_or_instead_of_a_models_weights(bomb, tmp_path, beside):
    folder = tmp_path / "model"
    small_kl().save_pretrained(folder)
    torch.save({"encoder.conv_in.weight": bomb}, folder / beside)
    load_autoencoder(folder)
    fingerprint(folder)
    (folder / WEIGHTS).unlink()
    for use in (load_autoencoder, fingerprint):
        with pytest.raises(UserError, match=rf"{re.escape(beside)} is a pickle.*never loaded"):
            use(folder)
    (folder / WEIGHTS).write_bytes(pickle.dumps(bomb))
    with pytest.raises(UserError, match="damaged"):
        load_autoencoder(folder)


def test_code_that_a_models_config_names(tmp_path):
    folder, ran = tmp_path / "model", tmp_path / "ran"
    small_kl().save_pretrained(folder)
    (folder / "modeling_evil.py").write_text(f"import os\nos.mkdir({str(ran)!r})\nclass Evil: pass\n")
    config = json.loads((folder / "config.json").read_text())
    named = {
        "auto_map": {"AutoModel": "modeling_evil.Evil", "AutoencoderKL": "modeling_evil.Evil"},
        "custom_pipeline": "modeling_evil",
        "trust_remote_code": True,
        "_diffusers_version": "0.0.0",
    }
    (folder / "config.json").write_text(json.dumps(config | named))
    load_autoencoder(folder)
    for name in ("Evil", "modeling_evil.Evil", "os.system", "UNet2DModel", "DiffusionPipeline", "AutoencoderMixin"):
        (folder / "config.json").write_text(json.dumps(config | named | {"_class_name": name}))
        with pytest.raises(UserError, match=str(folder)):
            load_autoencoder(folder)
    assert not ran.exists()


def test_code_that_a_diffusion_models_folder_names(bomb, tmp_path):
    folder = tmp_path / "ldm"
    torch.manual_seed(0)
    vae = LiteVAE.from_preset("S", block_out_channels=(8,) * 4, layers_per_block=1)
    network = UNet2DModel(
        8, 4, 4, block_out_channels=(8,), norm_num_groups=4, down_block_types=("DownBlock2D",), layers_per_block=1,
        up_block_types=("UpBlock2D",),
    )  # fmt: skip
    save_ldm(folder, LDM(
        network, Objective().scheduler(), NormalizedAutoencoder.of(vae, torch.zeros(4), torch.ones(4)), 0, {}
    ))  # fmt: skip
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"_class_name": ["evil", "Pipeline"], "unet": ["evil", "Network"], "scheduler": ["os", "system"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "pipeline.py").write_text("raise SystemExit('this was imported')")
    torch.save(bomb, folder / "unet" / "diffusion_pytorch_model.bin")
    load_ldm(folder)  # its own parts are of the classes that we know, whatever the index says
    for part, file in (("unet", "config.json"), ("scheduler", "scheduler_config.json")):
        path = folder / part / file
        kept = path.read_text()
        path.write_text(json.dumps(json.loads(kept) | {"_class_name": "pipeline.Evil"}))
        with pytest.raises(UserError, match=f"{file} is not of a "):
            load_ldm(folder)
        path.write_text(kept)
    (folder / "unet" / WEIGHTS).unlink()
    with pytest.raises(UserError, match="incomplete or damaged"):
        load_ldm(folder)


WEIGHTS_FILES = {"esrgan": load_esrgan, "inception": Inception, "squeezenet": SqueezeNetCaffe}
WEIGHTS_FILES |= {f"lpips-{net}": partial(load_lpips, net) for net in ("vgg", "alex", "squeeze")}
WEIGHTS_FILES |= {model: partial(Backbone, model) for model in ("vgg16", "resnet18")}


@pytest.mark.parametrize("load_it", WEIGHTS_FILES.values(), ids=WEIGHTS_FILES)
def test_weights_that_an_option_names(bomb, tmp_path, load_it):
    path = tmp_path / "weights.pth"
    torch.save({"features.0.weight": bomb}, path)
    with pytest.raises(UserError, match=str(path)):
        load_it(path)
    path.write_bytes(pickle.dumps(bomb, 2))
    with pytest.raises(UserError, match=str(path)):
        load_it(path)


# --- pickles in Arrow's and NumPy's formats -------------------------------------------------------------------------


def pickled_column(bomb: Bomb, count: int) -> pa.ExtensionArray:
    """A column of Ray's type for Python objects: Arrow knows it once Ray Data is imported, and to get a value of it is
    to unpickle."""
    kind = ArrowPythonObjectType()
    return pa.ExtensionArray.from_storage(kind, pa.array([pickle.dumps(bomb)] * count, kind.storage_type))


def test_arrow_would_unpickle(tmp_path):
    """What the tests below guard against is there."""
    ran = tmp_path / "ran"
    pq.write_table(pa.table({"id": pickled_column(Bomb(ran), 1)}), tmp_path / "a.parquet")
    pq.read_table(tmp_path / "a.parquet")["id"][0].as_py()
    assert ran.exists()


@pytest.mark.parametrize("column", ["image", "id", "label", "bytes of image", "path of image"])
def test_a_parquet_source_with_pickles(bomb, tmp_path, column):
    rows = {"image": pa.array([png()] * 2), "id": ["a", "b"], "label": [0, 1]}
    if column in rows:
        rows[column] = pickled_column(bomb, 2)
    else:
        parts = {"bytes": pa.array([png()] * 2), "path": pa.array(["a", "b"])} | {column[:-9]: pickled_column(bomb, 2)}
        rows["image"] = pa.StructArray.from_arrays([*parts.values()], [*parts])
    pq.write_table(pa.table(rows), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"column '(image|id|label)'.*(may hold pickles|not image bytes)"):
        open_source(Source(uri=str(tmp_path / "a.parquet"), columns=["label"]))


def test_a_parquet_source_that_has_pickles_once_it_is_listed(bomb, tmp_path):
    path, rows = tmp_path / "a.parquet", {"image": pa.array([png()] * 2), "id": pa.array(["a", "b"])}
    pq.write_table(pa.table(rows), path)
    source = open_source(Source(uri=str(path)))
    pq.write_table(pa.table(rows | {"id": pickled_column(bomb, 2)}), path)
    for use in (lambda: source.ids(0, 2), lambda: source.id(0), lambda: source.data(0)):
        with pytest.raises(UserError, match="'id' .*may hold pickles"):
            use()


def test_a_listing_with_pickles(bomb, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.png").write_bytes(png())
    listing = open_source(Source(uri=str(tmp_path / "photos"))).listing
    about = listing.schema.metadata
    folder = tmp_path / "cache/listing"
    folder.mkdir(parents=True)
    for name in listing.column_names:
        at = listing.column_names.index(name)
        planted = listing.set_column(at, name, pickled_column(bomb, len(listing))).replace_schema_metadata(about)
        pq.write_table(planted, folder / "000001.parquet")
        with pytest.raises(UserError, match=rf"000001\.parquet is damaged: column '{name}' .*may hold pickles"):
            open_listings(str(tmp_path / "cache"))
    (folder / "000001.parquet").write_bytes(pickle.dumps(bomb))
    with pytest.raises(UserError, match=r"000001\.parquet is damaged"):
        open_listings(str(tmp_path / "cache"))


def small_cache(folder: Path) -> None:
    """One shard of two rows and one quarantined image."""
    how = latent_layout("moments", "float16")
    cache.write_plan(str(folder), {"latents": how, "settings": {}})
    own = {name: [0, 0] for name in OWN_COLUMNS.names} | {"unit": [0, 1], "flip": [False] * 2, "id": ["a", "b"]}
    rows = pa.table(own, schema=None).select(["id", *OWN_COLUMNS.names]).cast(row_schema(pa.schema([])))
    lost = pa.Table.from_pylist([{"unit": 2, "id": "c", "error": "corrupt"}], schema=QUARANTINE)
    commit_shard(str(folder), 0, (0, 3), how, rows, [np.zeros((2, 8, 4, 4), np.float16)], lost)
    source = {"uri": "/photos", "digest": "d" * 64, "units": 3, "shards": 1}
    cache.write_manifest(str(folder), {"latents": how, "settings": {}}, source, {})


def replant(folder: Path, of: str, change) -> None:
    """Put another table into a shard or quarantine, as one would who may write the cache: with all its digests."""
    files = [folder / "commits/000000.json", folder / "manifest.json", *folder.glob("manifests/*.json")]
    commit = json.loads(files[0].read_text())
    record = commit if of == "shards" else commit["quarantine"]
    path = folder / record["file"]
    before = path.read_bytes()
    pq.write_table(change(pq.read_table(io.BytesIO(before))), path, write_page_checksum=True)
    data = path.read_bytes()
    for file in files:
        text = file.read_text().replace(record["sha256"], hashlib.sha256(data).hexdigest())
        file.write_text(re.sub(rf'("bytes": ?){len(before)}\b', rf"\g<1>{len(data)}", text))


@pytest.mark.parametrize("of", ["shards", "quarantine"])
def test_a_caches_files_with_pickles(bomb, tmp_path, of):
    small_cache(tmp_path)

    def plant(table):
        ids = pickled_column(bomb, len(table))
        return table.set_column(table.column_names.index("id"), "id", ids)

    replant(tmp_path, of, plant)
    commit = read_commit(str(tmp_path), 0)
    if of == "quarantine":
        with pytest.raises(UserError, match="'id' .*may hold pickles"):
            read_quarantine(str(tmp_path), commit)
        return
    with pytest.raises(UserError, match="'id' .*may hold pickles"):
        read_shard(str(tmp_path), commit, latent_layout("moments", "float16"))
    opened = LatentCache(str(tmp_path))
    for use in (lambda: opened.latents([0, 1], 0, 0), lambda: opened.row(0)):
        with pytest.raises(UserError, match="may hold pickles"):
            use()


@pytest.mark.parametrize("name", ["plan.json", "manifest.json", "commits/000000.json"])
def test_a_pickle_in_place_of_a_caches_json(bomb, tmp_path, name):
    small_cache(tmp_path)
    (tmp_path / name).write_bytes(pickle.dumps(bomb))
    np.save(tmp_path / "shards/000000.npy", np.array([bomb], object), allow_pickle=True)
    read = {"plan.json": cache.read_plan, "manifest.json": LatentCache}.get(name, partial(read_commit, shard=0))
    with pytest.raises(UserError, match=re.escape(name)):
        read(str(tmp_path))


# --- names ----------------------------------------------------------------------------------------------------------

NAMES = [
    "../../up",
    "/etc/absolute",
    "a\nb",
    "a\0b",
    "<script>alert(1)</script>",
    "x" * 5000,
    "..",
    "%2e%2e/up",
    "ü\u202e",
]


def tar_of(path: Path, members: list[tuple[str, bytes | None, dict]]) -> None:
    """Members of any name and type."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, data, more in members:
            member = tarfile.TarInfo(name)
            member.size = len(data or b"")
            for key, value in more.items():
                setattr(member, key, value)
            tar.addfile(member, io.BytesIO(data) if data is not None else None)


def test_a_tar_is_never_unpacked(tmp_path):
    """Members are ranges of bytes: their names are ids, and links and devices are no images."""
    (tmp_path / "outside.png").write_bytes(png())
    folder = tmp_path / "tars"
    folder.mkdir()
    whole = ["../../up.png", "/etc/absolute.png", "a/../../../b.png", f"{'x' * 3000}.png"]
    special = {"link.png": tarfile.SYMTYPE, "hard.png": tarfile.LNKTYPE, "null.png": tarfile.CHRTYPE}
    special |= {"block.png": tarfile.BLKTYPE, "pipe.png": tarfile.FIFOTYPE}
    members = [(name, png(seed=n), {}) for n, name in enumerate(whole)]
    members += [(name, None, {"type": kind, "linkname": "../outside.png"}) for name, kind in special.items()]
    tar_of(folder / "a.tar", members)
    source = open_source(Source(uri=str(folder)))
    assert source.ids(0, len(members)) == [f"a.tar/{name[:-4]}" for name in (*whole, *special)]
    assert [source.data(unit) for unit in range(len(whole))] == [data for _, data, _ in members[: len(whole)]]
    for unit in range(len(whole), len(members)):
        with pytest.raises(ImageError, match="is a link or another special file in the tar"):
            source.data(unit)
    assert sorted(os.listdir(tmp_path)) == ["outside.png", "tars"]


def test_sizes_that_a_tar_claims(tmp_path):
    """A member of 2^60 bytes, and a header before it that says so."""
    for number, more in enumerate(({}, {"pax_headers": {"size": str(2**60)}})):
        path = tmp_path / f"{number}.tar"
        tar_of(path, [("a.png", png(), more)])
        if not more:
            data = bytearray(path.read_bytes())
            data[124:136] = b"\x80" + (2**60).to_bytes(11, "big")
            data[148:156] = b" " * 8
            data[148:156] = b"%06o\0 " % sum(data[:512])
            path.write_bytes(data)
        with pytest.raises(UserError, match="truncated"):
            open_source(Source(uri=str(path)))
    (tmp_path / "packed.tar.gz").write_bytes(b"")
    with pytest.raises(UserError, match="is compressed"):
        open_source(Source(uri=str(tmp_path / "packed.tar.gz")))


def test_ids_are_text(tmp_path):
    """Whatever they are, they come back as they are, and nothing is opened or made by their name."""
    before = set(tmp_path.rglob("*"))
    pq.write_table(pa.table({"image": [png()] * len(NAMES), "id": NAMES}), tmp_path / "a.parquet")
    source = open_source(Source(uri=str(tmp_path / "a.parquet")))
    assert source.ids(0, source.units) == NAMES
    assert all(source.data(unit) == png() for unit in range(source.units))
    assert set(tmp_path.rglob("*")) - before == {tmp_path / "a.parquet"}


@pytest.mark.parametrize("kind", ["txt", "csv", "jsonl", "parquet"])
def test_paths_of_a_list(tmp_path, kind):
    """Relative ones are of the list's folder, absolute ones and .. its author's own: what comes of any is an image's
    pixels, or a row in quarantine."""
    (tmp_path / "secret.txt").write_text("the password is 1234")
    (tmp_path / "photo.png").write_bytes(png())
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "lists").mkdir()
    with open(tmp_path / "huge.png", "wb") as file:
        file.truncate(2**40)
    paths = ["../photo.png", "../secret.txt", "/dev/zero", "../pipe.png", "../huge.png", "x" * 5000, "../lists"]
    path = tmp_path / "lists" / f"a.{kind}"
    if kind == "parquet":
        pq.write_table(pa.table({"image": paths}), path)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps({"image": name}) + "\n" for name in paths))
    else:
        path.write_text("\n".join((["image"] if kind == "csv" else []) + paths))
    source = open_source(Source(uri=str(path)))
    transform, outcomes = ImageTransform(32, decode="fast"), []
    for unit in range(source.units):
        try:
            transform(source.data(unit))
            outcomes.append("an image")
        except ImageError as error:
            outcomes.append("a leak" if "password" in str(error) else error.reason)
    assert outcomes == ["an image", "not_an_image", "unreadable", "unreadable", "too_large", "unreadable", "unreadable"]


def test_names_on_the_page_are_text():
    name = "<script>alert(1)</script>'\"&"
    run = Run("1", name, tags={"sweep": name, "litevae.seed": name}, metrics={"eval/reconstruction/psnr": 1.0})
    result = Comparison(name, name, name, [], [ComparedRow(name, [run], state=name, params=[name])], [name], {}, [name])
    shown = page(result, [(name, name, "data:image/png;base64,")])
    assert "<script>alert" not in shown
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in shown
    assert "default-src 'none'" in shown


def test_names_of_runs_are_plain():
    for name in ("../up", "a/b", "/abs", "a\0b", "..", "a\nb"):
        with pytest.raises(UserError, match="name"):
            load(TrainVAE, None, [f"name={name}"])


# --- bombs ----------------------------------------------------------------------------------------------------------


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of(width: int, height: int, *more: bytes, rows: bytes = b"") -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def zeros(count: int) -> bytes:
    """So many, compressed without ever being there."""
    packer = zlib.compressobj(9)
    return b"".join([*(packer.compress(b"\0" * 2**20) for _ in range(count // 2**20)), packer.flush()])


def bombs() -> dict[str, bytes]:
    jpeg = io.BytesIO()
    Image.new("RGB", (64, 64)).save(jpeg, "JPEG")
    start = jpeg.getvalue().index(b"\xff\xc0")
    tall = bytearray(jpeg.getvalue())
    tall[start + 5 : start + 9] = struct.pack(">HH", 65500, 65500)
    tiff = io.BytesIO()
    Image.new("RGB", (64, 64)).save(tiff, "TIFF")
    wide = tiff.getvalue()
    for tag in (256, 257):  # ImageWidth, ImageLength
        at = wide.index(struct.pack("<HHI", tag, 4, 1)) if struct.pack("<HHI", tag, 4, 1) in wide else -1
        if at >= 0:
            wide = wide[: at + 8] + struct.pack("<I", 100_000) + wide[at + 12 :]
    gigabyte = zeros(2**30)
    profile = b"icc\0\0" + gigabyte
    return {
        "png": png_of(100_000, 100_000),
        "png of real data": png_of(30_000, 30_000)[:-12],
        "jpeg": bytes(tall),
        "tiff": wide,
        "ztxt": png_of(8, 8, chunk(b"zTXt", b"Comment\0\0" + gigabyte), rows=b"\0" * 25 * 8),
        "itxt": png_of(8, 8, chunk(b"iTXt", b"Comment\0\1\0\0\0" + gigabyte), rows=b"\0" * 25 * 8),
        "icc": png_of(8, 8, chunk(b"iCCP", profile), rows=b"\0" * 25 * 8),
        "rows": png_of(8, 8)[:33] + chunk(b"IDAT", gigabyte) + chunk(b"IEND", b""),
        "exif": png_of(8, 8, chunk(b"eXIf", b"Exif\0\0MM\0*" + b"\xff" * 2**16), rows=b"\0" * 25 * 8),
    }


@pytest.mark.slow
def test_bombs_take_no_memory(tmp_path):
    """In a process that may take 100 MB: what took more would be refused as out_of_memory."""
    code = """
import sys
from pathlib import Path
from litevae.images import ImageError, ImageTransform
from tests.memory import allow
transforms = [ImageTransform(32, decode=way) for way in ("pillow", "fast", "scaled")]
allow(100e6)
for path in sorted(Path(sys.argv[1]).iterdir()):
    for transform in transforms:
        try:
            outcome = str(transform(path.read_bytes()).pixels.shape)
        except ImageError as error:
            outcome = error.reason
    print(path.name, outcome, sep="|")
"""
    for name, data in bombs().items():
        (tmp_path / name).write_bytes(data)
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path],
        cwd=REPO, env=os.environ | memory.EXACT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = dict(line.split("|") for line in done.stdout.splitlines())
    assert {found[name] for name in ("png", "png of real data", "jpeg", "tiff")} == {"too_large"}
    assert {found[name] for name in ("ztxt", "itxt", "icc", "exif")} == {"(32, 32, 3)"}  # without what is in excess
    assert found["rows"] in ("(32, 32, 3)", "corrupt")


@pytest.mark.slow
def test_a_parquet_row_of_gigabytes(tmp_path):
    """2.2 GB of zeros, which are 100 kB of file, are not unpacked."""
    with pq.ParquetWriter(tmp_path / "a.parquet", pa.schema([("image", pa.binary())]), compression="zstd") as writer:
        batch = pa.table({"image": [b"\0" * 2**27] * 2})
        writer.write_table(pa.concat_tables([batch] * 9), row_group_size=100)
    assert (tmp_path / "a.parquet").stat().st_size < 2**20
    with pytest.raises(UserError, match=r"row group 0 has 2\.\d GiB"):
        open_source(Source(uri=str(tmp_path / "a.parquet")))


# --- YAML -----------------------------------------------------------------------------------------------------------


def test_yaml_runs_nothing(tmp_path):
    ran = tmp_path / "ran"
    evil = f"!!python/object/apply:os.mkdir [{ran}]"
    for cls in (TrainVAE, Encode, Sweep):
        with pytest.raises(UserError, match="not valid YAML"):
            load(cls, None, [f"tracking.tags={evil}"])
        recipe = tmp_path / "recipe.yaml"
        for text in (f"name: {evil}", f"train_vae:\n  name: {evil}", f"? {evil}\n: 1"):
            recipe.write_text(text)
            with pytest.raises(UserError, match="not valid YAML"):
                load(cls, str(recipe))
    run = tmp_path / "run"
    run_folder.open_run(str(run), TrainVAE(), [])
    leave_checkpoint(run)
    (run / "config.yaml").write_text(f"name: {evil}")
    with pytest.raises(UserError, match=r"config\.yaml is damaged"):
        run_folder.open_run(str(run), TrainVAE(), [])
    assert not ran.exists()
    yaml.unsafe_load(evil)
    assert ran.exists()


# --- secrets --------------------------------------------------------------------------------------------------------

SECRET = "hunter2secret"
SIGNED = f"https://bucket.s3.amazonaws.com/a.jpg?X-Amz-Credential={SECRET}&X-Amz-Signature={SECRET}&x=1"


@pytest.mark.parametrize(
    "text",
    [
        f"http://user:{SECRET}@mlflow:5000/x", f"postgresql+psycopg://u:{SECRET}@db/x", f"s3://key:{SECRET}@bucket/x",
        SIGNED, f"'{SIGNED}'", f"s3://b/x?secret_key={SECRET}", f"https://h/x?access_token={SECRET}", f"https://h/?pwd={SECRET}",
    ],
)  # fmt: skip
def test_no_message_shows_a_secret(text):
    assert SECRET not in str(UserError(f"no such thing: {text}; give another"))
    assert SECRET not in str(ImageError("unreadable", text))
    assert SECRET not in str(redact({"a": [text, (text,)]}))
    assert str(UserError(f"see {text} here")).endswith(" here")


@pytest.mark.parametrize(
    ("cls", "field"),
    [(TrainVAE, "data.train.uri"), (Encode, "source.uri"), (Encode, "out"), (Sweep, "data.val.uri")],
)
@pytest.mark.parametrize("uri", [f"s3://key:{SECRET}@bucket/x", f"s3://bucket/x?secret_key={SECRET}", SIGNED])
def test_a_path_with_credentials_is_refused(cls, field, uri):
    """Before it is kept in a config, plan or manifest."""
    with pytest.raises(UserError, match="contains credentials|only local paths and s3://") as error:
        storage.absolute(uri)
    assert SECRET not in str(error.value)
    config = load(cls, None, [f"{field}={uri}"])
    if field == "out":
        with pytest.raises(UserError, match="contains credentials|only local paths"):
            storage.absolute(output_path("out", config.out, remote=True) if uri[:2] == "s3" else config.out)
    else:
        found = config.source if cls is Encode else config.data.train if cls is TrainVAE else config.data.val
        with pytest.raises(UserError) as error:
            open_source(found, field)
        assert SECRET not in str(error.value)


def test_a_tracking_servers_password_is_not_kept_or_printed(tmp_path, capsys):
    option = f"tracking.uri=http://user:{SECRET}@mlflow:5000"
    for cls in (TrainVAE, Encode, Sweep):
        assert main(cls, print, [option, "--print-config"]) == 0
        shown = capsys.readouterr().out
        assert "mlflow:5000" in shown
        assert SECRET not in shown
    config = load(TrainVAE, None, [option])
    run_folder.open_run(str(tmp_path / "run"), config, [])
    assert SECRET not in (tmp_path / "run/config.yaml").read_text()
    assert main(TrainVAE, print, [f"tracking.tags=[http://user:{SECRET}@mlflow]"]) == 2
    assert SECRET not in capsys.readouterr().err


# --- network --------------------------------------------------------------------------------------------------------

START = """
import json, os, sys, psutil
from pipelines.runtime import cluster
from pipelines.runtime.schema import Ray
cluster.start(Ray(gpu=False, cpus_per_worker=1))
import ray

@ray.remote
class Actor:
    def listening(self, pid):
        root = psutil.Process(pid)
        found = []
        for process in [root, *root.children(recursive=True)]:
            found += [(process.name(), *c.laddr) for c in process.net_connections("inet") if c.status == "LISTEN"]
        return found

context = ray.get_runtime_context()
print(json.dumps({
    "listening": ray.get(Actor.remote().listening.remote(os.getpid())),
    "gcs": context.gcs_address, "dashboard": ray._private.worker.get_dashboard_url(),
    "token": os.environ["RAY_AUTH_TOKEN"],
}), flush=True)
sys.stdin.read()
"""
CLIENT = """
import sys, ray
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
print(ray.get(ray.remote(lambda: "it ran").remote()))
"""


def clean_environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_A")}
    return kept | {"PYTHONPATH": str(REPO)} | more


def on_loopback(**more: str) -> dict[str, str]:
    """Of a client: else it makes 127.0.0.1 this machine's address in its network, where nothing listens."""
    return clean_environment(RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0", **more)


@pytest.fixture(scope="module")
def started() -> Iterator[SimpleNamespace]:
    """A cluster as a job starts one, by a process of its own."""
    process = subprocess.Popen(
        [sys.executable, "-c", START], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPO,
        env=clean_environment(),
    )  # fmt: skip
    assert process.stdout
    assert process.stdin
    line = next((line for line in process.stdout if line.startswith("{")), "")
    assert line, "Ray did not start"
    yield SimpleNamespace(**json.loads(line))
    process.stdin.close()
    assert process.wait(60) == 0


@pytest.mark.slow
def test_a_cluster_that_a_job_starts_listens_on_loopback_alone(started):
    assert len(started.listening) > 8
    addresses = {address.removeprefix("::ffff:") for _, address, _ in started.listening}
    assert addresses == {"127.0.0.1"}, started.listening


@pytest.mark.slow
def test_a_client_without_the_token_is_refused(started, tmp_path):
    """On this machine, where its ports can be reached."""

    def client(**environment):
        return subprocess.run(
            [sys.executable, "-c", CLIENT, started.gcs], capture_output=True, text=True, timeout=120,
            # its home: where Ray would look for a token
            env=on_loopback(HOME=str(tmp_path), RAY_NUM_REDIS_GET_RETRIES="2", **environment),
        )  # fmt: skip

    with_token = client(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=started.token)
    assert "it ran" in with_token.stdout, with_token.stderr
    without = client(RAY_AUTH_MODE="disabled")
    assert without.returncode
    assert "it ran" not in without.stdout
    assert "InvalidAuthToken" in without.stderr
    host, port = started.dashboard.split(":")
    with socket.create_connection((host, int(port)), 10) as connection:
        connection.sendall(b"GET /api/jobs/ HTTP/1.0\r\n\r\n")
        assert b" 401 " in connection.recv(100)


def test_an_old_ray_is_refused(monkeypatch):
    monkeypatch.setattr(ray, "__version__", "2.54.1")
    with pytest.raises(UserError, match=r"Ray 2\.54\.1 has known security vulnerabilities; install 2\.55 or newer"):
        cluster.start(load(TrainVAE).ray)
    text = (REPO / "pyproject.toml").read_text()
    assert f"ray[data,default,train,tune]>={'.'.join(map(str, cluster.OLDEST))}," in text


def test_mlflow_listens_on_loopback():
    rule = (REPO / "Makefile").read_text().partition("\nmlflow:")[2].partition("\n\n")[0]
    assert re.findall(r"--host (\S+)", rule) == ["127.0.0.1"]


# --- jobs, whole ----------------------------------------------------------------------------------------------------


def job(script: str, *words: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(REPO / "jobs" / script), *words]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, cwd=REPO, env=clean_environment(**environment)
    )


@contextmanager
def listening() -> Iterator[set[str]]:
    """The addresses on which processes that this one starts listen meanwhile."""
    found: set[str] = set()
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(0.3):
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):  # it has just ended
                    ports = process.net_connections("inet")
                    found.update(port.laddr.ip.removeprefix("::ffff:") for port in ports if port.status == "LISTEN")

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join()


def files_with(text: str, *folders: Path) -> list[Path]:
    found = (path for folder in folders for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return [path for path in found if text.encode() in path.read_bytes()]


@pytest.mark.chaos
def test_a_run_whose_files_are_replaced_by_pickles(bomb, tmp_path, closed_port):
    """A training with a secret in its tracking server's URI, by processes that listen on loopback alone; and going on
    from what somebody else put into its folder."""
    photos, temporary, root = tmp_path / "photos", Path(tempfile.mkdtemp(prefix="sec", dir="/tmp")), tmp_path / "runs"
    photos.mkdir()
    for n in range(16):
        (photos / f"{n}.png").write_bytes(png(seed=n))
    dead = f"http://user:{SECRET}@127.0.0.1:{closed_port}"
    common = [
        "model.encoder=S", "model.decoder.channels=[8, 8, 8, 8]", "model.decoder.layers=1", "loss.lpips.weight=0",
        "loss.adversarial.weight=0", "loop.precision=fp32", "ray.gpu=false", "ray.cpus_per_worker=1",
        "loop.checkpoint_every=16", "name=vae", f"root={root}", f"data.train.uri={photos}", f"tracking.uri={dead}",
    ]  # fmt: skip

    def train(images: int):
        stage = f"stages=[{{resolution: 32, images: {images}, batch_size: 8}}]"
        return job("train_vae.py", *common, stage, RAY_TMPDIR=str(temporary), MLFLOW_HTTP_REQUEST_TIMEOUT="2")

    with listening() as addresses:
        first = train(32)
    assert first.returncode == 0, first.stderr
    assert addresses == {"127.0.0.1"}
    assert files_with("vae", root)  # the search itself finds what is there
    assert files_with(SECRET, root) == []
    assert any(temporary.rglob("*.log"))  # Ray's
    assert files_with(SECRET, temporary) == []
    assert SECRET not in first.stdout + first.stderr
    states = sorted((root / "vae").glob(f"*/{checkpoint.STATE}"))
    assert states
    for path in states:
        torch.save({"model": bomb}, path)
    (root / "vae" / "checkpoint_manager_snapshot.json").write_bytes(pickle.dumps(bomb))
    again = train(64)
    assert again.returncode == 2
    assert re.search(r"warning: .*checkpoint_manager_snapshot\.json was damaged", again.stdout)
    assert re.search(r"error: .*state\.pt can't be read", again.stderr)
    shutil.rmtree(temporary)
    assert not bomb.path.exists()


@pytest.mark.slow
def test_an_encoding_of_hostile_names(bomb, tmp_path):
    """Names of every kind in a tar, and images that are none: ids as they are, a cache, and not one other file."""
    place = tmp_path / "place"
    (place / "tars").mkdir(parents=True)
    model = save_model(place / "model")
    names = ["../../up", "/etc/absolute", "<script>alert(1)</script>", "x" * 3000, "%2e%2e/up", "ü\u202e", "a\nb"]
    members = [(f"{name}.png", png(seed=n), {}) for n, name in enumerate(names)]
    members += [(f"bomb-{n}.png", data, {}) for n, data in enumerate(bombs().values()) if len(data) < 2**20]
    members += [
        ("pickle.png", pickle.dumps(bomb), {}),
        ("link.png", None, {"type": tarfile.SYMTYPE, "linkname": "/etc"}),
    ]
    tar_of(place / "tars/a.tar", members)
    before = set(tmp_path.rglob("*"))
    done = job("encode_dataset.py", *arguments(place / "tars", model, place / "cache", "error_budget=0.9"))
    assert done.returncode == 0, done.stderr
    opened = LatentCache(place / "cache")
    ids = {opened.row(n)["id"] for n in range(len(opened))}
    assert {f"a.tar/{name}" for name in names} <= ids
    cached = str(place / "cache")
    commits = read_commits(cached, committed_shards(cached))
    lost = [row for commit in commits for row in read_quarantine(cached, commit).to_pylist()]
    assert {"a.tar/pickle", "a.tar/link"} <= {row["id"] for row in lost}
    made = set(tmp_path.rglob("*")) - before
    assert all(place / "cache" in (path, *path.parents) or "-runs" in str(path) for path in made), made
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]{1,80}", path.name) for path in made)

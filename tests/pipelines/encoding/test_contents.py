"""Rows hold the SHA-256 of their image's bytes, by which `verify --source` finds images that were changed since."""

import hashlib
import io
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from litevae import cache
from litevae.errors import UserError
from pipelines.encoding import encode, maintenance
from pipelines.encoding.config import Repair, Verify
from pipelines.encoding.encode import encode_dataset
from pipelines.encoding.plan import CachePlan
from pipelines.encoding.verify import audit, verify
from pipelines.runtime.cli import load
from tests.commands import run_in_this_process
from tests.encoding import config, crops, save_model
from tests.in_process import in_process

HERE = ("tracking.enabled=false", "ray.gpu=false", "ray.cpus_per_worker=1")


def encoded(image):
    stored = io.BytesIO()
    image.save(stored, "png")
    return stored.getvalue()


PHOTOS = [encoded(photo) for photo in crops(12)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model") / "vae")


@pytest.fixture
def made(tmp_path, model):
    """A folder with 10 photos, and their cache in two shards."""
    (tmp_path / "photos").mkdir()
    for n, data in enumerate(PHOTOS[:10]):
        (tmp_path / "photos" / f"{n}.png").write_bytes(data)
    with in_process():
        encode_dataset(config(tmp_path / "photos", model, tmp_path / "cache"))
    return tmp_path


def rows_of(root):
    folder = root / "cache"
    shards = cache.read_manifest(str(folder))["shards"]
    table = pa.concat_tables(pq.read_table(folder / shard["file"]) for shard in shards if shard["rows"])
    return {row["id"]: row for row in table.to_pylist()}


def replace_unseen(path, data):
    """Give a file other bytes, of the same number, with the times that it had."""
    status = path.stat()
    assert len(data) <= status.st_size
    path.write_bytes(data + b"\0" * (status.st_size - len(data)))  # a PNG ends before its last byte
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def repaired(root, **more):
    config = Repair(cache=str(root / "cache"), **more)
    values = config.model_dump() | {
        "root": str(root / "runs"),
        "tracking": {"enabled": False},
        "ray": {"gpu": False, "cpus_per_worker": 1},
    }
    with in_process():
        return maintenance.repair(Repair(**values))


def checked(root, source="contents"):
    return verify(Verify(cache=str(root / "cache"), source=source))


def test_rows_hold_the_hash_of_their_image_file(made):
    for name, row in rows_of(made).items():
        assert row["source_sha256"] == hashlib.sha256((made / "photos" / name).read_bytes()).digest()


def test_every_view_has_the_hash_of_its_image(tmp_path, model):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "0.png").write_bytes(PHOTOS[0])
    with in_process():
        encode_dataset(config(tmp_path / "photos", model, tmp_path / "cache", "transform.flips=true"))
    shard = cache.read_manifest(str(tmp_path / "cache"))["shards"][0]
    hashes = pq.read_table(tmp_path / "cache" / shard["file"])["source_sha256"].to_pylist()
    assert hashes == [hashlib.sha256(PHOTOS[0]).digest()] * 2
    checked(tmp_path)


def test_a_changed_image_is_found_and_encoded_again_although_its_size_and_times_are_the_same(made):
    before = rows_of(made)
    smaller = min(PHOTOS[10:], key=len)
    victim = max((made / "photos").iterdir(), key=lambda path: path.stat().st_size)
    replace_unseen(victim, smaller)
    checked(made, "ids")
    with pytest.raises(UserError) as error:
        checked(made)
    assert f"1 images are others than those that were encoded ({victim.name})" in str(error.value)
    advice = str(error.value).split("python ")[1].split("\n")[0].split()
    assert advice == ["jobs/encode_dataset.py", "repair", str(made / "cache"), "contents=true"]
    with in_process():
        assert run_in_this_process(*advice, *HERE, f"root={made}/runs").code == 0
    checked(made)
    after = rows_of(made)
    assert after[victim.name]["source_sha256"] == hashlib.sha256(victim.read_bytes()).digest()
    assert [name for name in before if before[name]["moments"] != after[name]["moments"]] == [victim.name]
    shards = cache.read_manifest(str(made / "cache"))["shards"]
    assert sorted(shard.get("generation", 0) for shard in shards) == [0, 1]


def test_verify_source_as_a_switch_compares_contents(made):
    done = run_in_this_process("jobs/encode_dataset.py", "verify", str(made / "cache"), "--source")
    assert "the images of the source are those that were encoded" in done.output


@pytest.mark.parametrize(("given", "means"), [("true", "contents"), ("false", "none"), ("ids", "ids")])
def test_what_source_was_before_is_still_understood(given, means):
    assert load(Verify, None, ["cache=/c", f"source={given}"]).source == means


def test_images_that_are_gone_are_named_and_keep_their_latents(made):
    before = rows_of(made)
    (made / "photos" / "1.png").unlink()
    with pytest.raises(UserError, match=r"1 images can't be read any more, and keep their latents \(1\.png: "):
        checked(made)
    checked(made, "ids")  # as the message advises
    (made / "photos" / "2.png").write_bytes(PHOTOS[10])  # in the same shard
    repaired(made, contents=True)
    after = rows_of(made)
    assert after["1.png"] == before["1.png"]
    assert after["2.png"]["source_sha256"] == hashlib.sha256(PHOTOS[10]).digest()
    found = audit(str(made / "cache"), "contents")
    assert (found.problems, found.changed, found.rows) == ({}, {}, 10)
    assert [text.partition(":")[0] for text in found.gone] == ["1.png"]


def test_appending_with_changed_encode_keeps_the_latents_of_images_that_are_gone(made, model):
    before = rows_of(made)
    (made / "photos" / "1.png").unlink()
    (made / "photos" / "2.png").write_bytes(PHOTOS[11])
    with in_process():
        encode_dataset(config(made / "photos", model, made / "cache", "append=true", "changed=encode"))
    after = rows_of(made)
    assert after["1.png"] == before["1.png"]
    assert after["2.png"]["source_sha256"] == hashlib.sha256(PHOTOS[11]).digest()
    assert audit(str(made / "cache"), "contents").changed == {}


def test_a_caption_that_was_edited_is_carried_anew(made, model):
    for n in range(10):
        (made / "photos" / f"{n}.txt").write_text(f"caption {n}")
    texts = ("source.columns=[txt]", "append=true", "changed=encode")
    job = config(made / "photos", model, made / "texts", *texts[:1])
    with in_process():
        encode_dataset(job)
        (made / "photos" / "2.txt").write_text("a better one")
        encode_dataset(config(made / "photos", model, made / "texts", *texts))
    latents = cache.LatentCache(str(made / "texts"))
    captions = {row["id"]: row["txt"] for row in map(latents.row, range(len(latents)))}
    assert captions == {f"{n}.png": f"caption {n}" for n in range(10)} | {"2.png": "a better one"}


def test_repair_leaves_changed_images_as_they_are_unless_asked(made):
    (made / "photos" / "2.png").write_bytes(PHOTOS[11])
    done = repaired(made)
    assert done["encoded_now"] == 0


def without_hashes(root, model):
    """Make a cache as versions without hashes did: the plan decides, so that it is enough to begin it so."""
    schema = encode.make_plan.__globals__["row_schema"]
    with pytest.MonkeyPatch.context() as patch, in_process():
        patch.setattr("pipelines.encoding.plan.row_schema", lambda carried, hashed: schema(carried))
        encode_dataset(config(root / "photos", model, root / "cache"))


def test_an_older_cache_has_no_hashes_and_goes_on_without_them(tmp_path, model):
    (tmp_path / "photos").mkdir()
    for n, data in enumerate(PHOTOS[:3]):
        (tmp_path / "photos" / f"{n}.png").write_bytes(data)
    without_hashes(tmp_path, model)
    assert not CachePlan.read(str(tmp_path / "cache")).hashed
    with pytest.raises(UserError, match="compare only the ids with source=ids"):
        checked(tmp_path)
    checked(tmp_path, "ids")
    (tmp_path / "photos" / "3.png").write_bytes(PHOTOS[3])
    with in_process():
        encode_dataset(config(tmp_path / "photos", model, tmp_path / "cache", "append=true"))
    assert "source_sha256" not in rows_of(tmp_path)["3.png"]
    checked(tmp_path, "ids")


def test_a_column_that_is_named_as_one_of_the_cache_is_refused_and_the_advice_works(tmp_path, model):
    pq.write_table(pa.table({"image": PHOTOS[:2], "source_sha256": ["a", "b"]}), tmp_path / "a.parquet")
    asked = ("source.columns=[source_sha256]",)
    with in_process():
        with pytest.raises(UserError, match="leave it out of source.columns"):
            encode_dataset(config(tmp_path / "a.parquet", model, tmp_path / "cache", *asked))
        assert not (tmp_path / "cache").exists()
        encode_dataset(config(tmp_path / "a.parquet", model, tmp_path / "cache"))
    checked(tmp_path)


def test_contents_of_parquet_rows_are_compared(tmp_path, model):
    pq.write_table(pa.table({"image": PHOTOS[:3]}), tmp_path / "a.parquet")
    with in_process():
        encode_dataset(config(tmp_path / "a.parquet", model, tmp_path / "cache"))
    checked(tmp_path)
    pq.write_table(pa.table({"image": [PHOTOS[0], PHOTOS[4], PHOTOS[2]]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"1 images are others .*\(a\.parquet/000000001\)"):
        checked(tmp_path)


def test_enlarged_images_are_counted(tmp_path, model, capsys):
    (tmp_path / "photos").mkdir()
    for n, side in enumerate((31, 32, 33, 12)):
        (tmp_path / "photos" / f"{n}.png").write_bytes(encoded(Image.new("RGB", (40, side))))
    with in_process():
        job = config(tmp_path / "photos", model, tmp_path / "cache", "transform.flips=true", "rows_per_shard=3")
        encode.print_summary(encode_dataset(job))
    assert cache.read_manifest(str(tmp_path / "cache"))["counts"]["enlarged"] == 2
    assert "2 images, which are smaller than transform.resolution" in capsys.readouterr().out


def test_an_image_that_was_never_encoded_is_not_compared(tmp_path, model):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "0.png").write_bytes(PHOTOS[0])
    (tmp_path / "photos" / "1.png").write_bytes(b"no image")
    with in_process():
        encode_dataset(config(tmp_path / "photos", model, tmp_path / "cache", "error_budget=1"))
    (tmp_path / "photos" / "1.png").write_bytes(b"no image either")
    checked(tmp_path)

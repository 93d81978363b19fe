"""What a cache says of all that its source held: left out, read, lost, and each id once."""

import io
import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from litevae import cache
from litevae.any_autoencoder import load_autoencoder
from litevae.cache import LatentCache
from litevae.errors import UserError
from pipelines.encoding import encode, maintenance, verify
from pipelines.encoding.config import Inspect, Repair, Retry, Verify
from pipelines.encoding.encode import encode_dataset, print_summary
from pipelines.encoding.inspect import inspect
from pipelines.encoding.plan import CachePlan
from tests.encoding import config, crops, jobs_are_quick, save_model

pytestmark = pytest.mark.usefixtures("in_process", "_quick")


def pngs(count):
    for photo in crops(count):
        sink = io.BytesIO()
        photo.save(sink, "png")
        yield sink.getvalue()


PHOTOS = [*pngs(8)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def loaded(model):
    return load_autoencoder(model)


@pytest.fixture
def _quick(loaded, monkeypatch):
    jobs_are_quick(loaded, monkeypatch)


def sound(out):
    found = verify.audit(str(out))
    return (found.problems, found.general, found.repeated, found.missing) == ({}, [], [], [])


def change_manifest(out, change):
    path = out / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def mend(cls, root, **more):
    ray = {"gpu": False, "cpus_per_worker": 1}
    return cls(cache=str(root / "cache"), root=str(root / "runs"), tracking={"enabled": False}, ray=ray, **more)


# --- what was left out --------------------------------------------------------------------------------------------

LEFT_OUT = {"hidden": {".png": 1}, "texts beside images": {".txt": 2}, "with another suffix": {".mp4": 1}}
SAID = "7 seen = 3 images + 4 left out: 2 texts beside images (.txt), 1 hidden (.png), 1 with another suffix (.mp4)"


@pytest.fixture
def photos(tmp_path):
    """Three images and four other files; the cache of them."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.png").write_bytes(PHOTOS[number])
    for name in (".a.png", "0.txt", "1.txt", "film.mp4"):
        (folder / name).write_bytes(b"x")
    return folder


def test_all_that_was_seen_is_accounted_for(photos, model, tmp_path, capsys):
    out = tmp_path / "cache"
    encode_dataset(config(photos, model, out))
    assert SAID in capsys.readouterr().out
    assert CachePlan.read(str(out)).settings.left_out == LEFT_OUT
    source = LatentCache(out).manifest["source"]
    assert (source["seen"], source["units"], source["left_out"]) == (7, 3, LEFT_OUT)
    shown = SAID.partition(": ")[2]
    verify.verify(Verify(cache=str(out)))
    assert f"{'left out':<22}{shown}\n" in capsys.readouterr().out
    inspect(Inspect(cache=str(out), shards=0))
    assert f"left out    {shown}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("key", "value"), [("seen", 6), ("left_out", {}), ("left_out", LEFT_OUT | {"hidden": {".jpg": 1}}), ("units", 4)]
)
def test_a_manifest_that_accounts_otherwise_is_refused_and_mended(photos, model, tmp_path, key, value):
    out = tmp_path / "cache"
    encode_dataset(config(photos, model, out))
    change_manifest(out, lambda manifest: manifest["source"].update({key: value}))
    with pytest.raises(UserError, match=f"its source has another {key} than the listings"):
        verify.verify(Verify(cache=str(out)))
    maintenance.repair(mend(Repair, tmp_path))
    assert sound(out)


def test_a_cache_from_before_there_was_an_account_is_sound(photos, model, tmp_path, capsys):
    out = tmp_path / "cache"
    encode_dataset(config(photos, model, out))
    change_manifest(out, lambda manifest: [manifest["source"].pop(key) for key in ("seen", "left_out")])
    old = json.loads((out / "plan.json").read_text())
    del old["settings"]["left_out"]
    (out / "plan.json").write_text(json.dumps(old))
    manifest = json.loads((out / "manifest.json").read_text())
    change_manifest(out, lambda manifest: manifest.update(digest=cache.digest(manifest)))
    assert sound(out), manifest
    assert CachePlan.read(str(out)).settings.left_out == {}
    inspect(Inspect(cache=str(out), shards=0))
    assert "left out    not counted\n" in capsys.readouterr().out
    assert encode_dataset(config(photos, model, out))["encoded_now"] == 0


def test_what_comes_to_a_source_is_accounted_for_once(photos, model, tmp_path):
    out = tmp_path / "cache"
    encode_dataset(config(photos, model, out))
    (photos / "3.png").write_bytes(PHOTOS[3])
    (photos / "2.txt").write_bytes(b"x")
    encode_dataset(config(photos, model, out, "append=true"))
    source = LatentCache(out).manifest["source"]
    assert (source["units"], source["seen"]) == (4, 9)
    assert source["left_out"] == LEFT_OUT | {"texts beside images": {".txt": 3}}
    assert sound(out)


# --- ids ----------------------------------------------------------------------------------------------------------


def table(root, ids, name="0.parquet"):
    (root / "data").mkdir(exist_ok=True)
    keys = [f"key-{name}-{n}" for n in range(len(ids))]
    pq.write_table(pa.table({"image": PHOTOS[: len(ids)], "id": ids, "key": keys}), root / "data" / name)
    return root / "data"


@pytest.mark.parametrize("advised", ["source.ids=unique", "source.id_column=key"])
def test_ids_that_repeat_are_refused_before_an_image_is_encoded(model, tmp_path, advised):
    table(tmp_path, ["a", "b", "c"])
    data = table(tmp_path, ["d", "b"], "1.parquet")
    with pytest.raises(UserError, match=r"0.parquet, row 1 and .*1.parquet, row 1 have one id, 'b'.*source.ids=unique"):
        encode_dataset(config(data, model, tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()
    assert encode_dataset(config(data, model, tmp_path / "cache", advised))["images"] == 5
    assert sound(tmp_path / "cache")


@pytest.mark.parametrize("advised", ["source.ids=unique", "source.id_column=key"])
def test_a_cache_with_repeated_ids_is_known_and_its_remedy_helps(model, tmp_path, monkeypatch, advised, capsys):
    """As older versions made it: repairing it changes nothing, and encoding otherwise into a new folder does."""
    table(tmp_path, ["a", "b", "c"])
    data = table(tmp_path, ["d", "b", "b"], "1.parquet")
    out = tmp_path / "cache"
    with monkeypatch.context() as patch:
        patch.setattr(encode, "check_ids", lambda sources: None)
        encode_dataset(config(data, model, out))
    for _ in range(2):
        with pytest.raises(UserError) as error:
            verify.verify(Verify(cache=str(out)))
        assert "encode into a new folder, with another source.id_column or source.ids=unique" in str(error.value)
        assert str(error.value).count("id 'b' is there more than once") == 2
        assert "repair it" not in str(error.value)
        capsys.readouterr()
        maintenance.repair(mend(Repair, tmp_path))
        assert "no repair can mend this; encode into a new folder" in capsys.readouterr().out
    assert encode_dataset(config(data, model, tmp_path / "new", advised))["images"] == 6
    assert sound(tmp_path / "new")


def test_an_id_that_the_cache_has_can_not_be_appended(model, tmp_path):
    data = table(tmp_path, ["a", "b"])
    encode_dataset(config(data, model, tmp_path / "cache"))
    table(tmp_path, ["c", "a"], "1.parquet")
    with pytest.raises(UserError, match=r"0.parquet, row 0 and .*1.parquet, row 1 have one id, 'a'"):
        encode_dataset(config(data, model, tmp_path / "cache", "append=true"))
    assert sound(tmp_path / "cache")
    table(tmp_path, ["c", "d"], "1.parquet")
    assert encode_dataset(config(data, model, tmp_path / "cache", "append=true"))["images"] == 4
    assert sound(tmp_path / "cache")


# --- values that can't be carried ---------------------------------------------------------------------------------


def samples(root, texts, bad=()):
    """A tar with a photo and a text in each sample; photos whose number is in `bad` are damaged."""
    (root / "data").mkdir(exist_ok=True)
    with tarfile.open(root / "data/0.tar", "w") as file:
        for number, text in enumerate(texts):
            data = PHOTOS[number] if number not in bad else PHOTOS[number].replace(b"IDAT", b"IDXX")
            for name, content in ((f"{number}.png", data), (f"{number}.txt", text)):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                file.addfile(member, io.BytesIO(content))
    return root / "data"


def test_values_that_are_lost_are_counted_from_the_commit_to_the_audit(model, tmp_path, capsys):
    """Two of six texts are Latin-1, and one belongs to an image that is in quarantine, so that it is in no row."""
    texts = [b"a", b"\xe9 1", b"b", b"\xe9 3", b"c", b"\xe9 5"]
    data, out = samples(tmp_path, texts, bad=(5,)), tmp_path / "cache"
    args = config(data, model, out, "source.columns=[txt]", "rows_per_shard=2", "error_budget=0.5")
    done = print_summary(encode_dataset(args))
    line = "column 'txt': 2 values could not be carried (0.tar/1: not UTF-8 (byte 0xe9 at 0)) and are null"
    assert line in capsys.readouterr().out
    commits = [json.loads(path.read_text()) for path in sorted((out / "commits").iterdir())]
    lost = [commit.get("lost_values", {}).get("txt", {"count": 0, "examples": []}) for commit in commits]
    assert [found["count"] for found in lost] == [1, 1, 0]
    assert [found["examples"] for found in lost] == [
        [["0.tar/1", "not UTF-8 (byte 0xe9 at 0)"]], [["0.tar/3", "not UTF-8 (byte 0xe9 at 0)"]], [],
    ]  # fmt: skip
    counted = {"txt": {"count": 2, "examples": lost[0]["examples"] + lost[1]["examples"]}}
    assert done["lost_values"] == LatentCache(out).manifest["counts"]["lost_values"] == counted
    assert [LatentCache(out).row(number)["txt"] for number in range(5)] == ["a", None, "b", None, "c"]
    assert sound(out)
    inspect(Inspect(cache=str(out), shards=0))
    assert line in capsys.readouterr().out
    print_summary(encode_dataset(args))  # of the finished cache
    assert line in capsys.readouterr().out


@pytest.mark.parametrize("mended", [True, False])
def test_a_retry_keeps_what_was_counted(model, tmp_path, mended):
    """The image that comes out of quarantine has a text that is lost, too."""
    texts = [b"a", b"\xe9 1", b"\xe9 2", b"b"]
    data, out = samples(tmp_path, texts, bad=(2,)), tmp_path / "cache"
    args = config(data, model, out, "source.columns=[txt]", "rows_per_shard=4", "error_budget=0.5")
    encode_dataset(args)
    counts = LatentCache(out).manifest["counts"]
    assert (counts["lost_values"]["txt"]["count"], counts["quarantined"]) == (1, 1)
    samples(tmp_path, texts, bad=() if mended else (2,))
    done = maintenance.retry(mend(Retry, tmp_path))
    assert (done["recovered"], done["lost_values"]["txt"]["count"]) == ((1, 2) if mended else (0, 1))
    found = LatentCache(out).manifest["counts"]["lost_values"]["txt"]
    assert sorted(name for name, _ in found["examples"]) == (["0.tar/1", "0.tar/2"] if mended else ["0.tar/1"])
    assert sound(out)


@pytest.mark.parametrize("change", [{"count": 1}, {"examples": []}])
def test_a_manifest_that_counts_lost_values_otherwise_is_refused_and_mended(model, tmp_path, change):
    data, out = samples(tmp_path, [b"a", b"\xe9 1", b"\xe9 2", b"b"]), tmp_path / "cache"
    encode_dataset(config(data, model, out, "source.columns=[txt]", "rows_per_shard=2"))
    change_manifest(out, lambda manifest: manifest["counts"]["lost_values"]["txt"].update(change))
    with pytest.raises(UserError, match="its values that could not be carried are not those of its shards"):
        verify.verify(Verify(cache=str(out)))
    maintenance.repair(mend(Repair, tmp_path))
    assert sound(out)

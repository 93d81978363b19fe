"""A cache whose images were written again: what is said, what is encoded again, and what a kill leaves behind."""

import io
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from litevae import cache
from litevae.any_autoencoder import load_autoencoder
from litevae.cache import LatentCache
from litevae.commits import committed_shards
from litevae.errors import UserError
from pipelines.data import tar_index
from pipelines.encoding import encode, verify
from pipelines.encoding.encode import encode_dataset
from tests.encoding import config, crops, jobs_are_quick, moments_by_hand, save_model
from tests.pipelines.data.test_growth import tar_of

pytestmark = pytest.mark.usefixtures("in_process", "_quick")
LATER = 2_000_000_000_000_000_000  # nanoseconds: in the year 2033


def bitmaps(count):
    """Photos in a format whose files are all of one size."""
    for photo in crops(count):
        sink = io.BytesIO()
        photo.crop((0, 0, 40, 40)).save(sink, "bmp")
        yield sink.getvalue()


PHOTOS = [*bitmaps(12)]
OTHER = PHOTOS[10]


def write(path, data, later=False):
    path.parent.mkdir(exist_ok=True)
    size = path.stat().st_size if path.exists() else len(data)
    path.write_bytes(data)
    assert len(data) == size
    if later:
        os.utime(path, ns=(LATER, LATER))


def write_folder(root, photos, later=()):
    """Write a file for each photo; of those that are there, only the ones whose number is in `later`."""
    for number, data in enumerate(photos):
        path = root / f"photos/{number:02}.bmp"
        if number in later or not path.exists():
            write(path, data, number in later)


def write_parquet(root, photos, later=()):
    """Write a file for each four photos; of those that are there, only the ones with a number that is in `later`."""
    for first in range(0, len(photos), 4):
        sink, path = io.BytesIO(), root / f"photos/{first:02}.parquet"
        images = pa.table({"image": photos[first : first + 4]})
        pq.write_table(images, sink, row_group_size=2, compression="none", use_dictionary=False, write_statistics=False)
        now = {*range(first, first + 4)} & {*later}
        if now or not path.exists():
            write(path, sink.getvalue(), bool(now))


# By kind: how photos are written; rows of a shard; the file of photo 5, and the shards that hold images of this file.
KINDS = {
    "folder": (write_folder, 3, "05.bmp", {1}),
    "parquet": (write_parquet, 2, "04.parquet", {2, 3}),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def moments(model):
    """Of each photo, by its bytes."""
    return {data: moments_by_hand(model, data)[0] for data in PHOTOS}


@pytest.fixture(scope="module")
def loaded(model):
    return load_autoencoder(model)


@pytest.fixture
def _quick(loaded, monkeypatch):
    jobs_are_quick(loaded, monkeypatch)


class Made:
    """A source of 8 photos, and the cache of it."""

    def __init__(self, root, model, moments, kind):
        self.root, self.model, self.moments, self.out = root, model, moments, root / "cache"
        self.write, self.size, self.file, self.shards = KINDS[kind]
        self.photos = PHOTOS[:8]
        self.write(root, self.photos)

    def encode(self, *more, out=None):
        out = out or self.out
        return encode_dataset(config(self.root / "photos", self.model, out, f"rows_per_shard={self.size}", *more))

    def edit(self, *numbers):
        """Write photos again as another one."""
        for number in numbers:
            self.photos[number] = OTHER
        self.write(self.root, self.photos, numbers)

    def add(self, *photos):
        self.photos = [*self.photos, *photos]
        self.write(self.root, self.photos)

    def check(self):
        """Check that the cache is sound and holds the photos as they are now."""
        found = verify.audit(str(self.out))
        assert (found.problems, found.general, found.repeated, found.missing) == ({}, [], [], [])
        latents = LatentCache(self.out)
        assert len(latents) == len(self.photos)
        expected = torch.stack([self.moments[data] for data in self.photos])
        assert torch.allclose(latents.moments(range(len(latents))).float(), expected, atol=2e-3, rtol=1e-3)

    def versions(self):
        return [listing["version"].to_pylist() for listing in cache.read_listings(str(self.out))]


@pytest.fixture(params=KINDS)
def made(request, tmp_path, model, moments):
    made = Made(tmp_path, model, moments, request.param)
    made.encode()
    return made


@pytest.fixture
def folder(tmp_path, model, moments):
    made = Made(tmp_path, model, moments, "folder")
    made.encode()
    return made


def test_changed_files_are_named_and_encoded_again_where_that_is_asked_for(made, capsys):
    made.check()
    (before,) = made.versions()
    made.edit(5)
    capsys.readouterr()
    assert made.encode()["number"] == 1
    said = (
        f"0 inputs new, 1 files changed, 0 gone ({made.file}); --append changed=encode encodes again what has changed"
    )
    assert said in capsys.readouterr().out
    with pytest.raises(
        UserError, match=f"1 files of .* were written again .*{made.file}.* Give changed=keep .* or chan"
    ):
        made.encode("append=true")
    assert made.encode("append=true", "changed=keep")["number"] == 1
    assert {*committed_shards(str(made.out)).values()} == {0}
    assert made.versions() == [before]
    done = made.encode("append=true", "changed=encode")
    assert committed_shards(str(made.out)) == {
        shard: int(shard in made.shards) for shard in committed_shards(str(made.out))
    }
    assert (done["number"], done["images"]) == (2, 8)
    made.check()
    (versions,) = made.versions()
    same = [old == new for old, new in zip(before, versions, strict=True)]
    assert same == ([n != 5 for n in range(8)] if made.size == 3 else [True, True, False, False])
    assert [version == LATER for version in versions] == [not each for each in same]
    capsys.readouterr()
    assert made.encode("append=true")["number"] == 2
    assert "has changed" not in capsys.readouterr().out


def test_new_and_changed_images_of_several_listings(made):
    """Photos 2 and 9 are written again, of which 9 came later, and 10 and 11 are new."""
    made.add(*PHOTOS[8:10], *PHOTOS[:2])
    made.encode("append=true")
    made.check()
    committed = committed_shards(str(made.out))
    made.edit(2, 9)
    made.add(*PHOTOS[3:7])
    done = made.encode("append=true", "changed=encode")
    made.check()
    after = committed_shards(str(made.out))
    assert [shard for shard in committed if after[shard]] == ([0, 3] if made.size == 3 else [0, 1, 4, 5])
    assert (done["images"], len(after) - len(committed)) == (16, 2)
    assert [versions.count(LATER) for versions in made.versions()] == ([1, 1, 0] if made.size == 3 else [2, 2, 0])


class Killed(BaseException):
    """Ends a job where a signal would."""


def kill(*_, **__):
    raise Killed


@pytest.mark.parametrize("where", ["finish", "replace_listing", "the second commit"])
def test_what_is_killed_is_done_again(folder, monkeypatch, where):
    """After a commit, after all of them, or after the manifest: the listing comes last, and tells what is left."""
    folder.edit(5, 1)
    folder.add(*PHOTOS[8:12])
    with monkeypatch.context() as patch:
        if where == "replace_listing":
            patch.setattr(cache, where, kill)
        elif where == "finish":
            patch.setattr(encode, where, kill)
        else:
            done = []
            patch.setattr(encode.EncodeTotals, "add", lambda *_: done.append(1) or (kill() if done[1:] else (1, {})))
        with pytest.raises(Killed):
            folder.encode("append=true", "changed=encode")
    folder.encode("append=true", "changed=encode")
    folder.check()
    assert LATER in folder.versions()[0]
    number = folder.encode("append=true")["number"]
    assert number == LatentCache(folder.out).manifest["number"]


def test_a_half_finished_cache_says_what_has_changed_too(folder, capsys):
    for number in (1, 2):
        (folder.out / f"commits/{number:06}.json").unlink()
    (folder.out / "manifest.json").unlink()
    folder.edit(5)
    capsys.readouterr()
    folder.encode()
    assert f"1 files changed, 0 gone ({folder.file}); --append changed=encode" in capsys.readouterr().out
    folder.encode("append=true", "changed=encode")
    folder.check()


def test_what_is_gone_stays_in_the_cache(made, capsys):
    latents = LatentCache(made.out).moments(range(8))
    os.remove(made.root / "photos" / made.file)
    made.encode()
    assert f"0 inputs new, 0 files changed, 1 gone ({made.file})" in capsys.readouterr().out
    made.write(made.root, PHOTOS[:12], range(8, 12))
    os.remove(made.root / "photos" / made.file)
    assert made.encode("append=true")["images"] == 12
    assert torch.equal(LatentCache(made.out).moments(range(8)), latents)


def test_a_copy_of_the_source_is_no_change(made, tmp_path, capsys):
    (tmp_path / "photos").rename(tmp_path / "moved")
    for path in (tmp_path / "moved").iterdir():
        os.utime(path, ns=(LATER, LATER))
    (tmp_path / "photos").symlink_to(tmp_path / "moved")  # under the name of before, of which the times would count
    made.encode()
    assert "files changed" in capsys.readouterr().out
    moved = config(tmp_path / "moved", made.model, made.out, f"rows_per_shard={made.size}", "append=true")
    assert encode_dataset(moved)["number"] == 1
    assert "has changed" not in capsys.readouterr().out


@pytest.mark.parametrize("way", ["keep", "encode"])
def test_a_tar_whose_images_moved_within_it_brings_none_twice(tmp_path, model, monkeypatch, capsys, way):
    """Its second range begins elsewhere: its images are not new."""
    monkeypatch.setattr(tar_index, "RANGE_SAMPLES", 2)
    write(tmp_path / "photos/0.tar", tar_of(enumerate(PHOTOS[:4])))
    more = ["rows_per_shard=2", "append=true"]
    encode_dataset(config(tmp_path / "photos", model, tmp_path / "cache", more[0]))
    (tmp_path / "photos/0.tar").write_bytes(tar_of((n, data + bytes(1024)) for n, data in enumerate(PHOTOS[:4])))
    with pytest.raises(UserError, match="Give changed=keep .* or encode into a new folder: some hold other images"):
        encode_dataset(config(tmp_path / "photos", model, tmp_path / "cache", *more))
    again = config(tmp_path / "photos", model, tmp_path / "cache", *more, f"changed={way}")
    capsys.readouterr()
    if way == "keep":
        assert encode_dataset(again)["number"] == 1
        assert "2 images that changed files hold in other places than before are not added" in capsys.readouterr().out
    else:
        with pytest.raises(UserError, match="0.tar .* can't be encoded again in its place. Encode into a new folder"):
            encode_dataset(again)
    done = encode_dataset(config(tmp_path / "photos", model, tmp_path / "new", "rows_per_shard=2"))
    assert done["images"] == 4
    assert np.unique([LatentCache(tmp_path / "new").row(n)["id"] for n in range(4)]).size == 4


# --- ids that come from a column ----------------------------------------------------------------------------------


class Named(Made):
    """A source of Parquet files with ids, in a cache with two images in each shard."""

    def __init__(self, root, model, **files):
        self.root, self.model, self.out, self.size = root, model, root / "cache", 2
        for name, ids in files.items():
            self.put(name, ids)
        self.encode()

    def put(self, name, ids, later=False):
        path = self.root / f"photos/{name}.parquet"
        path.parent.mkdir(exist_ok=True)
        pq.write_table(pa.table({"image": PHOTOS[: len(ids)], "id": list(ids)}), path, row_group_size=2)
        if later:
            os.utime(path, ns=(LATER, LATER))

    def ids(self):
        """The ids in the cache, which is sound."""
        found = verify.audit(str(self.out), "none")
        assert (found.problems, found.general, found.repeated) == ({}, [], [])
        latents = LatentCache(self.out)
        return "".join(latents.row(number)["id"] for number in range(len(latents)))


def test_the_ids_of_files_that_are_gone_stay_taken(tmp_path, model):
    made = Named(tmp_path, model, a="abcd", b="efgh")
    os.remove(tmp_path / "photos/a.parquet")
    made.put("c", "ib")
    with pytest.raises(UserError, match=r"a.parquet, row 1 and .*c.parquet, row 1 have one id, 'b'.* a new folder"):
        made.encode("append=true")
    made.put("c", "ij")
    made.encode("append=true")
    assert made.ids() == "abcdefghij"


def test_the_ids_of_what_is_kept_are_those_in_the_cache(tmp_path, model):
    made = Named(tmp_path, model, a="abcd", b="efgh")
    made.put("b", "axy", later=True)  # fewer, and one that the cache has of another image
    made.put("c", "ie")
    with pytest.raises(UserError, match=r"b.parquet, row 0 and .*c.parquet, row 1 have one id, 'e'"):
        made.encode("append=true", "changed=keep")
    made.put("c", "ix")
    made.encode("append=true", "changed=keep")
    assert made.ids() == "abcdefghix"


def test_the_ids_of_what_is_encoded_again_are_those_in_the_source(tmp_path, model):
    made = Named(tmp_path, model, a="abcd", b="efgh")
    made.put("b", "efga", later=True)
    with pytest.raises(UserError, match=r"a.parquet, row 0 and .*b.parquet, row 3 have one id, 'a'"):
        made.encode("append=true", "changed=encode")
    made.put("b", "xfgh", later=True)
    made.put("c", "ie")
    made.encode("append=true", "changed=encode")
    assert made.ids() == "abcdxfghie"

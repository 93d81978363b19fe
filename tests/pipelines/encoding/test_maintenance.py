"""What can be done with a cache after it was made: append, verify, repair, retry, inspect."""

import hashlib
import json
import os
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from litevae import cache, shards, storage
from litevae.any_autoencoder import load_autoencoder
from litevae.cache import LatentCache
from litevae.commits import committed_shards, read_commits
from litevae.errors import UserError
from pipelines.data import decode
from pipelines.encoding import inspect, maintenance, verify
from pipelines.encoding.config import Inspect, Repair, Retry, Verify
from pipelines.encoding.encode import encode_dataset
from pipelines.encoding.plan import CachePlan
from tests.commands import run_in_this_process
from tests.encoding import BAD, SIDE, config, crops, photo_folder, save_model, shard_bytes
from tests.in_process import in_process


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Photos, a model, and the cache of them: 48 inputs in 6 shards."""
    root = tmp_path_factory.mktemp("made")
    (root / "photos").mkdir()
    photo_folder(root / "photos")
    model = save_model(root / "model")
    with in_process():
        encode_dataset(config(root / "photos", model, root / "cache"))
    return root


@pytest.fixture
def copy(made, tmp_path):
    """A copy of the photos and of the cache, which says that it is of those."""
    shutil.copytree(made / "photos", tmp_path / "photos")
    shutil.copytree(made / "cache", tmp_path / "cache")
    return tmp_path


def mend(cls, root, made, **more):
    common = {"cache": str(root / "cache"), "source": str(root / "photos"), "root": str(root / "runs")}
    ray = {"gpu": False, "cpus_per_worker": 1}
    return cls(**common, tracking={"enabled": False}, ray=ray, **more)


def files_of(folder):
    return {
        path.relative_to(folder): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for part in ("shards", "quarantine", "commits")
        for path in (folder / part).iterdir()
    }


# --- verify and repair ----------------------------------------------------------------------------------------


def test_a_sound_cache_is_found_sound(made, capsys):
    found = verify.verify(Verify(cache=str(made / "cache")))
    assert (found.shards, found.rows, found.quarantined) == (6, 45, 3)
    assert (found.problems, found.general, found.missing, found.unnamed) == ({}, [], [], [])
    assert "45, each once" in capsys.readouterr().out


def shard_file(root, number):
    return root / "cache" / cache.read_manifest(root / "cache")["shards"][number]["file"]


def flip_a_bit(root, number):
    data = bytearray(shard_file(root, number).read_bytes())
    data[len(data) // 2] ^= 1
    shard_file(root, number).write_bytes(data)


def lose_a_shard(root, number):
    shard_file(root, number).unlink()


def cut_a_shard(root, number):
    shard_file(root, number).write_bytes(shard_file(root, number).read_bytes()[:-100])


def empty_a_commit(root, number):
    commit_file(root, number).write_bytes(b"")


def lose_a_commit(root, number):
    commit_file(root, number).unlink()


def commit_file(root, number):
    return root / f"cache/commits/{number:06d}.json"


def rewrite(root, number, change):
    """A whole, valid shard with another content, and a commit that names it: only its meaning is wrong."""
    path = commit_file(root, number)
    commit, plan = json.loads(path.read_text()), cache.read_plan(str(root / "cache"))
    rows, latents = shards.read_shard(str(root / "cache"), commit, plan["latents"])
    rows, latents = change(rows, [values.copy() for values in latents])
    data = shards.shard_bytes(rows, latents, plan["latents"])
    name = f"shards/{number:06d}-other.parquet"
    (root / "cache" / name).write_bytes(data)
    record = {"file": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    shapes = [list(values.shape) for values in latents]
    path.write_text(json.dumps(commit | record | {"rows": rows.num_rows, "shapes": shapes}))


def double_a_row(root, number):
    def change(rows, latents):
        latents[0][-1] = latents[0][0]
        return pa.concat_tables([rows.slice(0, len(rows) - 1), rows.slice(0, 1)]), latents

    rewrite(root, number, change)


def drop_a_row(root, number):
    rewrite(root, number, lambda rows, latents: (rows.slice(1), [latents[0][1:]]))


def spoil_a_latent(root, number):
    def change(rows, latents):
        latents[0][3, 0, 0, 0] = np.nan
        return rows, latents

    rewrite(root, number, change)


def rename_a_row(root, number, name):
    def change(rows, latents):
        names = rows["id"].to_pylist()
        other = pa.array([name, *names[1:]])
        return rows.set_column(0, rows.schema.field("id"), other), latents

    rewrite(root, number, change)


DAMAGES = {
    flip_a_bit: "shard 3: .*its sha256 differs",
    lose_a_shard: "shard 3: .* is missing",
    cut_a_shard: "shard 3: .* bytes; the manifest says",
    empty_a_commit: "shard 3: .*commits/000003.json is damaged",
    lose_a_commit: "shard 3: has no commit",
    double_a_row: "shard 3: its 8 rows are not the 8 of the inputs",
    drop_a_row: "shard 3: its 7 rows are not the 8 of the inputs",
    spoil_a_latent: "shard 3: has latents that are not finite",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damage_is_found(copy, damage):
    damage(copy, 3)
    with pytest.raises(UserError, match=DAMAGES[damage]) as error:
        verify.verify(Verify(cache=str(copy / "cache"), source="none"))
    assert "1 of 6 shards are missing or damaged; repair it: python jobs/encode_dataset.py" in str(error.value)


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("damages", [list(DAMAGES)[:5], list(DAMAGES)[5:]], ids=["files", "content"])
def test_damage_is_repaired(made, copy, damages):
    """Damaged shards are as they were before, byte by byte; the others are left alone."""
    for number, damage in enumerate(damages):
        damage(copy, number)
    before = files_of(copy / "cache")
    units = sum(json.loads(commit_file(made, n).read_text())["rows"] for n in range(len(damages)))
    done = maintenance.repair(mend(Repair, copy, made))
    assert done["encoded_now"] == units
    assert shard_bytes(copy / "cache") == shard_bytes(made / "cache")
    after = files_of(copy / "cache")
    assert all(after[file] == before[file] for file in before.keys() & after.keys())
    found = verify.verify(Verify(cache=str(copy / "cache"), source="none"))
    assert not found.unnamed
    assert LatentCache(copy / "cache").manifest["digest"] == LatentCache(made / "cache").manifest["digest"]


@pytest.mark.usefixtures("in_process")
def test_a_cache_from_before_there_was_a_choice_of_decoders_keeps_pillows_pixels(made, copy):
    old, settings = copy / "old", ("transform.decode=pillow",)
    encode_dataset(config(copy / "photos", made / "model", old, *settings))
    made_by_pillow = shard_bytes(old)
    assert made_by_pillow != shard_bytes(made / "cache")
    plan = json.loads((old / "plan.json").read_text())
    assert plan["settings"]["transform"].pop("decode") == "pillow"
    assert "decode" not in plan["transform"]
    (old / "plan.json").write_text(json.dumps(plan))
    (old / "manifest.json").unlink()
    for file in list((old / "commits").iterdir())[:2]:
        file.unlink()
    with pytest.raises(UserError, match='transform.decode: "pillow" in the cache, "fast" now'):
        encode_dataset(config(copy / "photos", made / "model", old))
    encode_dataset(config(copy / "photos", made / "model", old, *settings))
    assert shard_bytes(old) == made_by_pillow
    (old / json.loads((old / "commits/000001.json").read_text())["file"]).unlink()
    mended = mend(Repair, copy, made).model_copy(update={"cache": str(old)})
    assert maintenance.repair(mended)["encoded_now"] == 8
    assert shard_bytes(old) == made_by_pillow
    assert CachePlan.from_json(LatentCache(old).manifest, "").views.decode == "pillow"


def test_an_unfinished_cache_is_not_read(copy):
    (copy / "cache/manifest.json").unlink()
    shutil.rmtree(copy / "cache/manifests")
    with pytest.raises(UserError, match="is unfinished"):
        LatentCache(copy / "cache")


def test_ids_are_compared_with_the_source(copy):
    rename_a_row(copy, 3, "elsewhere.png")
    with pytest.raises(UserError, match="shard 3: input 24 is 'elsewhere.png', in the source 'dogs/"):
        verify.verify(Verify(cache=str(copy / "cache")))


def test_an_id_twice_is_found(copy):
    rename_a_row(copy, 3, "cats/001.png")
    with pytest.raises(UserError, match="id 'cats/001.png' is there more than once"):
        verify.verify(Verify(cache=str(copy / "cache"), source="none"))


@pytest.mark.usefixtures("in_process")
def test_a_lost_or_wrong_manifest_is_written_again(made, copy):
    (copy / "cache/manifest.json").unlink()
    with pytest.raises(UserError, match="unfinished"):
        verify.verify(Verify(cache=str(copy / "cache"), source="none"))
    maintenance.repair(mend(Repair, copy, made))
    verify.verify(Verify(cache=str(copy / "cache"), source="none"))
    manifest = json.loads((copy / "cache/manifest.json").read_text())
    manifest["latents"]["std"][0] *= 2
    (copy / "cache/manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"its digest is not that of its content(.|\n)*mean and std are not those"):
        verify.verify(Verify(cache=str(copy / "cache"), source="none"))
    maintenance.repair(mend(Repair, copy, made))
    verify.verify(Verify(cache=str(copy / "cache"), source="none"))


@pytest.mark.usefixtures("in_process")
def test_left_over_files_are_removed(made, copy):
    stale = copy / "cache/shards/.tmp-123"
    stale.write_bytes(b"half")
    os.utime(stale, (0, 0))
    fresh = copy / "cache/commits/.tmp-456"  # perhaps of a driver that is at work
    fresh.write_bytes(b"half")
    (copy / "cache/shards/000001-attempt.parquet").write_bytes(b"killed before the commit")
    found = verify.verify(Verify(cache=str(copy / "cache"), source="none"))
    assert found.unnamed == ["shards/000001-attempt.parquet", "shards/.tmp-123"]
    maintenance.repair(mend(Repair, copy, made))
    assert not stale.exists()
    assert fresh.exists()
    assert verify.audit(str(copy / "cache"), "none").unnamed == []


@pytest.mark.usefixtures("in_process")
def test_repair_needs_the_same_model(made, copy, tmp_path):
    lose_a_shard(copy, 3)
    other = save_model(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="is not the model that encoded"):
        maintenance.repair(mend(Repair, copy, made, model=other))
    for action, cls in (("verify", Verify), ("repair", Repair), ("retry", Retry), ("inspect", Inspect)):
        module = {"verify": verify, "inspect": inspect}.get(action, maintenance)
        job = getattr(module, action)
        with pytest.raises(UserError, match=r"is not a latent cache|does not exist"):
            job(cls(cache=str(tmp_path / "nothing")))
        with pytest.raises(UserError, match="give a cache folder"):
            job(cls())


# --- retry ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("in_process")
def test_retry_gives_what_would_have_been(made, copy):
    """Two of three bad files are mended: as if they had been whole from the start."""
    good = list(crops(2))
    good[0].save(copy / "photos/cats/zcut.png")
    good[1].save(copy / "photos/dogs/text.jpg")
    with pytest.raises(
        UserError, match="reasons: no image is in quarantine as burnt; the quarantine has 1 corrupt, 1 empty, 1 not"
    ):
        maintenance.retry(mend(Retry, copy, made, reasons=["burnt"]))
    done = maintenance.retry(mend(Retry, copy, made, reasons=["corrupt"]))
    assert (done["recovered"], done["quarantined"], done["number"]) == (1, 2, 2)
    before = files_of(copy / "cache")
    done = maintenance.retry(mend(Retry, copy, made))
    assert (done["recovered"], done["quarantined"], done["reasons"]) == (1, 1, {"empty": 1})
    after = files_of(copy / "cache")
    assert len(after.keys() - before.keys()) == 2  # a shard and its commit; the empty file's stayed as they were
    verify.verify(Verify(cache=str(copy / "cache"), source="none"))
    fresh = config(copy / "photos", str(made / "model"), copy / "fresh")
    encode_dataset(fresh)
    assert shard_bytes(copy / "cache") == shard_bytes(copy / "fresh")
    again = maintenance.retry(mend(Retry, copy, made))
    assert (again["recovered"], again["number"]) == (0, 3)  # nothing new: no new version
    assert len(LatentCache(copy / "cache", version=1)) == 45


@pytest.mark.usefixtures("in_process")
def test_a_larger_limit_takes_what_was_too_large(made, copy):
    """Photos are 60 pixels wide and 40 to 49 high."""
    model, out, limit = str(made / "model"), copy / "small", 60 * 45
    done = encode_dataset(config(copy / "photos", model, out, f"transform.max_pixels={limit}", "error_budget=0.9"))
    large = done["reasons"]["too_large"]
    assert 0 < large < 45
    commits = [*read_commits(str(out), committed_shards(str(out)))]
    lost = [row for commit in commits for row in shards.read_quarantine(str(out), commit).to_pylist()]
    text = next(row["message"] for row in lost if row["error"] == "too_large")
    assert f"above the limit of {limit:,}" in text
    assert "retry: max_pixels" in text
    shutil.rmtree(copy / "cache")
    out.rename(copy / "cache")
    assert maintenance.retry(mend(Retry, copy, made, reasons=["too_large"]))["recovered"] == 0
    done = maintenance.retry(mend(Retry, copy, made, reasons=["too_large"], max_pixels=60 * 49))
    assert (done["recovered"], done["images"]) == (large, 45)
    assert shard_bytes(copy / "cache") == shard_bytes(made / "cache")
    inspect.inspect(Inspect(cache=str(copy / "cache"), out=str(copy / "seen"), source=str(copy / "photos")))
    lose_a_shard(copy, 1)
    assert maintenance.repair(mend(Repair, copy, made))["images"] == 45  # the limit of the retry still counts
    assert shard_bytes(copy / "cache") == shard_bytes(made / "cache")


# --- append ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("in_process")
def test_append_adds_what_is_new(made, tmp_path, capsys):
    photos, out, model = tmp_path / "photos", tmp_path / "cache", str(made / "model")
    photos.mkdir()
    photo_folder(photos)
    encode_dataset(config(photos, model, out))
    before = files_of(out)
    (photos / "birds").mkdir()  # sorts before cats: labels must not move
    for n, photo in enumerate(crops(10)):
        photo.save(photos / ("birds" if n % 2 else "cats") / f"new-{n}.png")
    written = (photos / "dogs/000.png").stat().st_mtime_ns
    (photos / "dogs/000.png").write_bytes(b"")  # would show if it were read again ... but its size tells
    with pytest.raises(UserError, match=r"1 files of .* were written again since they were listed \(dogs/000.png\)"):
        encode_dataset(config(photos, model, out, "append=true"))
    shutil.copy(made / "photos/dogs/000.png", photos / "dogs/000.png")
    os.utime(photos / "dogs/000.png", ns=(written, written))
    assert encode_dataset(config(photos, model, out))["images"] == 45
    assert "10 inputs new, 0 files changed, 0 gone; --append adds what is new" in capsys.readouterr().out
    (photos / "dogs/002.png").unlink()  # gone, and not missed
    done = encode_dataset(config(photos, model, out, "append=true"))
    assert (done["images"], done["encoded_now"], done["number"]) == (55, 10, 2)
    after = files_of(out)
    assert all(after[file] == before[file] for file in before)
    latents = LatentCache(out)
    rows = [latents.row(i) for i in range(45, 55)]
    assert [row["unit"] for row in rows] == list(range(48, 58))
    assert {row["label_name"]: row["label"] for row in rows} == {"cats": 0, "birds": 2}
    assert len(LatentCache(out, version=1)) == 45
    source = latents.manifest["source"]
    assert (source["units"], [listing["units"] for listing in source["listings"]]) == (58, [48, 10])
    found = verify.verify(Verify(cache=str(out)))
    assert found.rows == 55
    assert encode_dataset(config(photos, model, out, "append=true"))["number"] == 2  # nothing is new any more


@pytest.mark.usefixtures("in_process")
def test_another_driver_has_listed_other_inputs(made, copy, monkeypatch):
    """Both append at the same time, and a file was added in between: what was put there first is what is encoded."""
    (copy / "photos/zebras").mkdir()
    for n, photo in enumerate(crops(2)):
        photo.save(copy / f"photos/zebras/{n}.png")
    write = cache.write_listing

    def second(folder, number, listing):
        write(folder, number, listing.slice(0, 1))
        write(folder, number, listing)

    monkeypatch.setattr(cache, "write_listing", second)
    done = encode_dataset(config(copy / "photos", str(made / "model"), copy / "cache", "append=true"))
    assert (done["encoded_now"], done["images"]) == (1, 46)
    verify.verify(Verify(cache=str(copy / "cache"), source="none"))
    done = encode_dataset(config(copy / "photos", str(made / "model"), copy / "cache", "append=true"))
    assert (done["encoded_now"], done["images"]) == (1, 47)
    verify.verify(Verify(cache=str(copy / "cache"), source="none"))


@pytest.mark.usefixtures("in_process")
def test_a_driver_killed_between_plan_and_listing(made, copy):
    for part in ("listing", "commits", "shards", "manifests", "manifest.json"):
        path = copy / "cache" / part
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (copy / "cache/.tmp-123").write_bytes(b"half")  # of a file
    assert encode_dataset(config(made / "photos", str(made / "model"), copy / "cache"))["encoded_now"] == 45
    verify.verify(Verify(cache=str(copy / "cache")))


@pytest.mark.usefixtures("in_process")
def test_a_moved_source_is_the_same_source(made, copy, capsys):
    assert encode_dataset(config(copy / "photos", str(made / "model"), copy / "cache"))["encoded_now"] == 0
    assert "new" not in capsys.readouterr().out


# --- inspect --------------------------------------------------------------------------------------------------


def test_inspect(made, copy, capsys):
    about = inspect.inspect(
        Inspect(cache=str(copy / "cache"), source=str(copy / "photos"), out=str(copy / "seen"), shards=3, rows=2)
    )
    shown = capsys.readouterr().out
    assert "48 = 45 encoded + 3 in quarantine" in shown
    assert "1 corrupt, 1 empty, 1 not_an_image" in shown
    assert [shard["shard"] for shard in about["shards"]] == [0, 2, 5]
    assert all(shard["drift"] < 5e-3 for shard in about["shards"])
    latents = LatentCache(copy / "cache")
    model = load_autoencoder(made / "model")
    values = []
    for row in (0, 7):  # first and last of shard 0, of which cats/empty.jpg is quarantined last
        if latents.row(row)["unit"] > 7:
            continue
        with torch.no_grad():
            decoded = model.decode(latents.moments([row]).float().chunk(2, 1)[0]).sample
        picture = decode.transform_of(config(copy, "m", "o").transform)(
            (copy / "photos" / latents.row(row)["id"]).read_bytes()
        ).pixels
        ours = ((decoded[0].permute(1, 2, 0) + 1) * 127.5).round().clamp(0, 255).double().numpy()
        values.append(10 * np.log10(255**2 / np.mean((ours - picture) ** 2)))
    assert about["shards"][0]["psnr"] == pytest.approx(np.mean(values), abs=0.02)
    picture = Image.open(copy / "seen/inspection.png")
    assert picture.width > 4 * SIDE
    # Other weights under the same name are not taken for the cache's.
    with pytest.raises(UserError, match="is not the model that encoded"):
        inspect.inspect(Inspect(cache=str(copy / "cache"), model=save_model(copy / "other", seed=2)))


# --- the command ----------------------------------------------------------------------------------------------


def test_command_line(made):
    script = "jobs/encode_dataset.py"
    sound = run_in_this_process(script, "verify", made / "cache")
    assert (sound.code, "sound" in sound.output) == (0, True), sound.output
    wrong = run_in_this_process(script, "verify", made / "model")
    assert (wrong.code, wrong.output.startswith("error: ")) == (2, True)
    assert run_in_this_process(script, "repair", "--help").output.startswith("Encode the missing and damaged shards")
    typo = run_in_this_process(script, "retry", made / "cache", "reason=[empty]")
    assert "did you mean 'reasons'" in typo.output


def test_quarantine_says_where(made):
    records = [row for path in (made / "cache/quarantine").iterdir() for row in pq.read_table(path).to_pylist()]
    assert {row["id"]: row["error"] for row in records} == BAD
    files = sorted(str(path.relative_to(made / "photos")) for path in (made / "photos").rglob("*.*"))
    assert all(files[row["unit"]] == row["id"] for row in records)


@pytest.mark.usefixtures("in_process")
def test_s3_source_and_cache(made, s3):
    """Photos and cache in a store: the same bytes as on disk; verified and repaired there."""
    import boto3

    client, bucket = boto3.client("s3"), s3.removeprefix("s3://")
    for path in (made / "photos").rglob("*.*"):
        client.upload_file(str(path), bucket, f"photos/{path.relative_to(made / 'photos')}")
    model, out = str(made / "model"), f"{s3}/cache"
    done = encode_dataset(config(f"{s3}/photos", model, out))
    assert (done["images"], done["quarantined"]) == (45, 3)
    assert shard_bytes(out) == shard_bytes(made / "cache")
    assert LatentCache(out).manifest["digest"] == LatentCache(made / "cache").manifest["digest"]
    verify.verify(Verify(cache=out))
    broken = LatentCache(out).manifest["shards"][3]["file"]
    data = client.get_object(Bucket=bucket, Key=f"cache/{broken}")["Body"].read()
    client.put_object(Bucket=bucket, Key=f"cache/{broken}", Body=data[:1000] + b"x" + data[1001:])
    with pytest.raises(UserError, match="shard 3: s3://.*its sha256"):
        verify.verify(Verify(cache=out))
    settings = {"tracking": {"enabled": False}, "ray": {"gpu": False, "cpus_per_worker": 1}, "root": str(made / "runs")}
    maintenance.repair(Repair(cache=out, **settings))
    verify.verify(Verify(cache=out))
    assert shard_bytes(out) == shard_bytes(made / "cache")
    assert storage.names(f"{out}/manifests") == ["000001.json", "000002.json"]

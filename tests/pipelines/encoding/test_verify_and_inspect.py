"""The audit on a cache that no model made: each kind of damage is found and named, and sound things are not."""

import hashlib
import json
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from litevae import cache
from litevae.commits import commit_shard, latent_statistics
from litevae.errors import UserError
from litevae.images import to_tensor
from litevae.shards import QUARANTINE, latent_layout, read_shard, row_schema, shard_bytes
from pipelines.data import decode
from pipelines.data.config import Source, Views
from pipelines.data.open_source import open_source
from pipelines.encoding import inspect, verify
from pipelines.encoding.config import Inspect, Verify
from pipelines.encoding.listings import source_of
from pipelines.encoding.partition import Partition
from pipelines.encoding.plan import CachePlan
from tests.encoding import cache_plan, plan_settings

HOW = latent_layout("moments", "float16", views=2)
VIEWS = Views(resolution=8, decode="pillow", flips=True)
LOST = {3: "empty", 11: "corrupt"}
INPUTS = 20  # in 3 shards of 8, 8 and 4


def latents_of(units, channels=2):
    """Of each view of these inputs (2 n_z, 1, 1), which say whose they are."""
    rows = [[unit + view / 2] * channels + [-1.0] * channels for unit in units for view in range(2)]
    return np.array(rows, np.float16)[:, :, None, None]


def rows_of(units, source, **changes):
    rows = []
    for unit in units:
        for view in range(2):
            own = {
                "unit": unit,
                "view": view,
                "height": 9,
                "width": 9,
                "crop_top": 0,
                "crop_left": 0,
                "flip": bool(view),
            }
            rows.append({"id": source.id(unit)} | own | source.columns(unit) | changes)
    return pa.Table.from_pylist(rows, schema=row_schema(source.schema))


def commit(root, number, generation=0, lost=None):
    source = open_source(Source(uri=str(root / "photos")))
    lost = LOST if lost is None else lost
    units = range(8 * number, min(8 * number + 8, INPUTS))
    bad = [
        {"unit": unit, "id": source.id(unit), "source": "s", "stage": "decode", "error": lost[unit], "message": "m"}
        for unit in units if unit in lost
    ]  # fmt: skip
    good = [unit for unit in units if unit not in lost]
    quarantine = pa.Table.from_pylist(bad, schema=QUARANTINE)
    return commit_shard(
        str(root / "cache"), number, (units.start, units.stop), HOW, rows_of(good, source), [latents_of(good)],
        quarantine, generation,
    )  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("made")
    (tmp_path / "photos/a").mkdir(parents=True)
    (tmp_path / "photos/b").mkdir(parents=True)
    for number in range(INPUTS):
        folder = "ab"[number // 12]
        Image.new("RGB", (9, 9), (12 * number, 0, 0)).save(tmp_path / f"photos/{folder}/{number:02}.png")
    source = open_source(Source(uri=str(tmp_path / "photos")))
    plan = cache_plan(
        transform=decode.transform_of(VIEWS).identity, latents=HOW,
        columns={field.name: str(field.type) for field in row_schema(source.schema)},
        settings=plan_settings(transform=VIEWS.model_dump(mode="json")),
    )  # fmt: skip
    out = str(tmp_path / "cache")
    plan.write(out)
    cache.write_listing(out, 1, source.listing)
    for number in range(3):
        commit(tmp_path, number)
    cache.write_manifest(out, plan.to_json(), source_of(Partition([source], 8)), {"job": "test"})
    return tmp_path


@pytest.fixture
def root(made, tmp_path):
    """A copy."""
    for name in ("photos", "cache"):
        shutil.copytree(made / name, tmp_path / name)
    return tmp_path


def audited(root, **more):
    return verify.audit(str(root / "cache"), **more)


def commit_of(root, number):
    return root / f"cache/commits/{number:06}.json"


def change_commit(root, number, **changes):
    path = commit_of(root, number)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite(root, number, change, statistics=False):
    """Another content of a shard, whose bytes are as its commit says."""
    found = json.loads(commit_of(root, number).read_text())
    rows, latents = read_shard(str(root / "cache"), found, HOW)
    rows, latents = change(rows, [values.copy() for values in latents])
    data = shard_bytes(rows, latents, HOW)
    (root / f"cache/shards/other-{number}.parquet").write_bytes(data)
    about = {"file": f"shards/other-{number}.parquet", "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    about |= {"rows": rows.num_rows, "shapes": [[*values.shape] for values in latents]}
    change_commit(root, number, **about, **({"statistics": latent_statistics(latents, HOW)} if statistics else {}))


def with_column(rows, name, values):
    field = rows.schema.field(name)
    return rows.set_column(rows.schema.get_field_index(name), field, pa.array(values, field.type))


def test_a_sound_cache(root, capsys):
    found = verify.verify(Verify(cache=str(root / "cache")))
    assert (found.shards, found.rows, found.quarantined) == (3, 36, 2)
    assert (found.problems, found.general, found.missing, found.unnamed) == ({}, [], [], [])
    assert found.generations == {0: 0, 1: 0, 2: 0}
    assert found.bytes == sum(path.stat().st_size for path in (root / "cache/shards").iterdir())
    shown = capsys.readouterr().out
    assert [" ".join(line.split()) for line in shown.splitlines()][2:] == [
        "rows 36, each once", "quarantined 2", "left out nothing", "ids as in the source",
    ]  # fmt: skip
    verify.verify(Verify(cache=str(root / "cache"), source="none"))
    assert "not compared with the source" in capsys.readouterr().out


def other_units(root):
    change_commit(root, 1, units=[8, 15])


def no_key(root):
    found = json.loads(commit_of(root, 1).read_text())
    del found["statistics"]
    commit_of(root, 1).write_text(json.dumps(found))


def no_count(root):
    found = json.loads(commit_of(root, 1).read_text())
    del found["rows"]
    commit_of(root, 1).write_text(json.dumps(found))


def no_rows(root):
    change_commit(root, 1, rows=0)


def other_statistics(root):
    rewrite(root, 1, lambda rows, latents: (rows, [latents[0] + np.float16(1)]))


def other_views(root):
    def change(rows, latents):
        return with_column(rows, "view", [0] * rows.num_rows), latents

    rewrite(root, 1, change)


def other_columns(root):
    rewrite(root, 1, lambda rows, latents: (rows.drop_columns(["label"]), latents))


def not_finite(root):
    def change(rows, latents):
        latents[0][-1, -1] = np.inf
        return rows, latents

    rewrite(root, 1, change)


def lost_quarantine(root):
    (root / "cache" / json.loads(commit_of(root, 1).read_text())["quarantine"]["file"]).unlink()


def changed_quarantine(root):
    path = root / "cache" / json.loads(commit_of(root, 1).read_text())["quarantine"]["file"]
    path.write_bytes(path.read_bytes()[:-1] + b"x")


def other_id(root):
    rewrite(root, 1, lambda rows, latents: (with_column(rows, "id", ["z", "z", *rows["id"].to_pylist()[2:]]), latents))


def lost_file(root):
    (root / "cache" / json.loads(commit_of(root, 1).read_text())["file"]).unlink()


def changed_file(root):
    path = root / "cache" / json.loads(commit_of(root, 1).read_text())["file"]
    data = bytearray(path.read_bytes())
    data[50] ^= 4
    path.write_bytes(data)


def lost_commit(root):
    commit_of(root, 1).unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (other_units, r"its commit is of inputs \[8, 15\], the plan says \[8, 16\]"),
        (no_key, "its commit is damaged: KeyError"),
        (no_count, "its commit is damaged: KeyError"),
        (no_rows, "has no rows, but 7 inputs that are not in quarantine"),
        (other_statistics, "its statistics are not those of its latents"),
        (other_views, "its 14 rows are not the 14 of the inputs that are not in quarantine"),
        (other_columns, "has columns .*, the plan says .*label"),
        (not_finite, "has latents that are not finite"),
        (lost_quarantine, "quarantine/.* is missing"),
        (changed_quarantine, "quarantine/.* is damaged: its sha256"),
        (other_id, "input 8 is 'z', in the source 'a/08.png'"),
        (lost_file, "shards/.* is missing"),
        (changed_file, "shards/.* is damaged: its sha256"),
        (lost_commit, "has no commit"),
    ],
)
def test_each_kind_of_damage_is_named(root, damage, message):
    damage(root)
    found = audited(root)
    assert [*found.problems] == [1]
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(found.problems[1][0])
    with pytest.raises(UserError, match=f"1 of 3 shards are missing or damaged; repair it(.|\n)*shard 1: .*{message}"):
        verify.verify(Verify(cache=str(root / "cache")))
    assert not found.missing
    if damage is other_id:
        assert audited(root, source="none").problems == {}


def test_an_id_of_two_images(root):
    name = "a/00.png"
    rewrite(
        root, 1, lambda rows, latents: (with_column(rows, "id", [name, name, *rows["id"].to_pylist()[2:]]), latents)
    )
    found = audited(root, source="none")
    assert found.problems == {}
    assert found.repeated == [f"id {name!r} is there more than once"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda manifest: manifest["latents"].update(mean=[9.0, 9.0]), "mean and std are not those of its shards"),
        (lambda manifest: manifest["latents"].update(std=[1.0, 1.0]), "mean and std are not those of its shards"),
        (lambda manifest: manifest["shards"].pop(), "has 2 shards; 3 are committed"),
        (lambda manifest: manifest["shards"][2].update(rows=7), "shard 2 has another rows than its commit"),
        (lambda manifest: manifest.update(digest="0"), "its digest is not that of its content"),
    ],
)
def test_a_manifest_that_says_something_else(root, change, message):
    path = root / "cache/manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    found = audited(root)
    assert found.problems == {}
    assert any(message in text for text in found.general)


def test_an_unfinished_cache_is_gone_on_with(root):
    (root / "cache/manifest.json").unlink()
    for path in (root / "cache/manifests").iterdir():
        path.unlink()
    commit_of(root, 2).unlink()
    found = audited(root)
    assert (found.missing, found.problems) == ([2], {2: ["has no commit"]})
    with pytest.raises(UserError, match="run the encode job with the same settings again"):
        verify.verify(Verify(cache=str(root / "cache")))


def test_many_problems_are_counted(root):
    problems = {number: ["broken", "and worse"] for number in range(7)}
    found = verify.Audit(9, problems=problems, general=["all in all"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "audit", lambda out, source, threads: found)
        with pytest.raises(UserError) as error:
            verify.verify(Verify(cache=str(root / "cache")))
    lines = str(error.value).split("\n")
    assert "7 of 9 shards are missing or damaged" in lines[0]
    assert lines[1:3] == ["  all in all", "  shard 0: broken"]
    assert len(lines) == 12
    assert lines[-1] == "  and 5 more"


def test_files_that_no_commit_names(root):
    for name in ("shards/left.parquet", "quarantine/left.parquet", "shards/.tmp-old", "commits/.tmp-new"):
        (root / "cache" / name).write_bytes(b"x")
    now = (root / "cache/commits/.tmp-new").stat().st_mtime
    os.utime(root / "cache/shards/.tmp-old", (now - 3700, now - 3700))
    os.utime(root / "cache/commits/.tmp-new", (now - 3000, now - 3000))
    assert audited(root).unnamed == ["shards/left.parquet", "quarantine/left.parquet", "shards/.tmp-old"]
    before = json.loads(commit_of(root, 0).read_text())["file"]
    commit(root, 0, generation=1)
    found = audited(root)
    assert before not in found.unnamed  # earlier manifests are of it
    assert found.generations == {0: 1, 1: 0, 2: 0}


def test_statistics_agree_to_nine_digits():
    ours = {"elements": 5, "mean": [1.0, 2.0]}
    assert verify._close(ours, {"elements": 5, "mean": [1.0, 2.0 * (1 + 1e-10)]})
    assert not verify._close(ours, {"elements": 5, "mean": [1.0, 2.0 * (1 + 1e-7)]})
    assert not verify._close(ours, {"elements": 6, "mean": [1.0, 2.0]})
    assert not verify._close(ours, {"elements": 5})


def test_a_few_are_spread_evenly():
    assert inspect._spread([*range(10, 20)], 3) == [10, 14, 19]
    assert inspect._spread([5, 6], 9) == [5, 6]
    assert inspect._spread([5, 6, 7], 1) == [5]


# --- inspect ------------------------------------------------------------------------------------------------------


def inspected(root, monkeypatch, **more):
    """With a model whose latents are twice an image's mean colour, and half of it what a latent is decoded to."""

    def encoded(model, x):
        mean = 2 * x.mean((2, 3), keepdim=True)[:, :2]
        return torch.cat([mean, torch.zeros_like(mean)], 1)

    def decoded(latent, return_dict):
        return (latent.sum(1, keepdim=True).expand(-1, 3, 8, 8) / 20,)

    monkeypatch.setattr(inspect, "encode_latents", encoded)
    monkeypatch.setattr(inspect, "load_autoencoder", lambda folder: SimpleNamespace(decode=decoded))
    monkeypatch.setattr(inspect, "fingerprint", lambda folder: {"/m": "f"}.get(folder, "other"))
    return inspect.inspect(Inspect(cache=str(root / "cache"), out=str(root / "seen"), **more))


def test_rows_are_looked_at_beside_their_sources(root, monkeypatch, capsys):
    about = inspected(root, monkeypatch, shards=2, rows=3)
    assert [(shard["shard"], shard["rows"]) for shard in about["shards"]] == [(0, 3), (2, 3)]
    units = [(0, 0), (4, 0), (7, 1)]  # of rows 0, 7 (rounded to even: 6), 13 of shard 0, where input 3 is missing
    psnrs, drifts = [], []
    for unit, view in units:
        x = to_tensor(np.full((1, 8, 8, 3), (12 * unit, 0, 0), np.uint8))
        stored = torch.tensor([[unit + view / 2] * 2 + [-1.0] * 2])
        reconstruction = (stored[:, :2].sum(1) / 20).clamp(-1, 1)[:, None, None, None].expand_as(x)
        levels = [((each + 1) * 127.5).round().double() for each in (reconstruction, x)]
        psnrs.append(10 * np.log10(255**2 / (levels[0] - levels[1]).square().mean().item()))
        mean = 2 * x.mean((2, 3))[:, :2]
        drifts.append((torch.cat([mean, torch.zeros(1, 2)], 1) - stored).abs().max().item())
    assert about["shards"][0]["psnr"] == pytest.approx(np.mean(psnrs), abs=0.01)
    assert about["shards"][0]["drift"] == pytest.approx(max(drifts), rel=1e-5)
    assert json.loads((root / "seen/inspection.json").read_text()) == about
    assert (root / "seen/inspection.png").is_file()
    shown = capsys.readouterr().out
    assert "20 = 18 encoded + 2 in quarantine" in shown
    assert "1 corrupt, 1 empty" in shown
    assert "36 in 3 shards" in shown
    assert "moments, float16: 4 x 1 x 1 (36)" in shown


def test_nothing_is_decoded_where_only_facts_are_wanted(root, monkeypatch):
    about = inspected(root, monkeypatch, shards=0)
    assert about["shards"] == []
    assert not (root / "seen").exists()
    with pytest.raises(UserError, match="is not the model that encoded"):
        inspected(root, monkeypatch, model="/other")


def test_rows_come_with_the_views_that_they_are_of(root):
    latents = cache.LatentCache(root / "cache")
    source = open_source(Source(uri=str(root / "photos")))
    shard = Partition([source], 8).shard(decode.ShardTask(1))
    pixels, stored = inspect._rows_of(latents, shard, CachePlan.from_json(latents.manifest, ""), 14)
    assert [values[0, 0, 0] for values in stored] == [u + v / 2 for u in (8, 9, 10, 12, 13, 14, 15) for v in (0, 1)]
    assert [image[0, 0, 0] for image in pixels] == [12 * u for u in (8, 9, 10, 12, 13, 14, 15) for _ in (0, 1)]

"""What is looked at, said and refused before a cache is filled, and what a job that made nothing leaves behind."""

import io
import itertools
import json
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy import stats

from litevae import cache
from litevae.any_autoencoder import load_autoencoder
from litevae.cache import LatentCache
from litevae.errors import UserError
from pipelines.data.decode import Lost, ShardTask, decode_shard
from pipelines.encoding import at_work, encode, maintenance, preview, speed, verify
from pipelines.encoding.config import Repair, Retry, Verify
from pipelines.encoding.encode import encode_dataset
from pipelines.encoding.encoder import ShardEncoder
from pipelines.encoding.partition import Partition
from pipelines.encoding.plan import CachePlan
from pipelines.runtime import estimate, paths
from pipelines.runtime.cluster import Placement
from tests.commands import REPO
from tests.encoding import BAD, cache_plan, config, crops, jobs_are_quick, photo_folder, save_model
from tests.encoding import shard_bytes as bytes_of
from tests.in_process import in_process

pytestmark = pytest.mark.usefixtures("in_process", "_quick")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """48 files, three of which can't be read."""
    return photo_folder(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def loaded(model):
    return load_autoencoder(model)


@pytest.fixture
def _quick(loaded, monkeypatch):
    jobs_are_quick(loaded, monkeypatch)
    for module in (preview, speed):
        monkeypatch.setattr(module, "load_autoencoder", lambda folder: loaded)


@pytest.fixture
def unseen(monkeypatch):
    """No image is looked at before a job begins."""
    monkeypatch.setattr(preview, "IMAGES", 0)


@pytest.fixture
def no_ray(in_process, monkeypatch):
    def start(config):
        raise AssertionError("Ray was started")

    monkeypatch.setattr(encode, "cluster", SimpleNamespace(start=start))


def parquet(file, count=6):
    """Photos, and a column of their names, which is no column of images."""
    images = []
    for photo in crops(count):
        photo.save(sink := io.BytesIO(), "png")
        images.append(sink.getvalue())
    names = [f"name {n}" for n in range(count)]
    pq.write_table(pa.table({"id": names, "image": images, "label_name": names}), file)
    return file


def mend(cls, out, **more):
    ray = {"gpu": False, "cpus_per_worker": 1}
    return cls(cache=str(out), root=f"{out}-runs", tracking={"enabled": False}, ray=ray, **more)


# --- the error budget ---------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unseen")
def test_the_budget_is_the_one_last_agreed_to(folder, model, tmp_path):
    """A job that the budget stopped goes on as its message says, and so do retry and repair."""
    out = tmp_path / "cache"
    with pytest.raises(UserError, match=r"more than error_budget=0.02 allows; .* Raise error_budget to go on") as stop:
        encode_dataset(config(folder, model, out, "error_budget=0.02"))
    kept = sum(json.loads(path.read_text())["rows"] for path in (out / "commits").iterdir())
    assert f"the {kept} images that were encoded are kept" in str(stop.value)
    assert 0 < kept < 45
    assert encode_dataset(config(folder, model, out, "error_budget=0.1"))["encoded_now"] == 45 - kept
    assert maintenance.retry(mend(Retry, out))["recovered"] == 0  # the three are as bad as before
    assert maintenance.repair(mend(Repair, out))["quarantined"] == 3
    with pytest.raises(UserError, match="of 48 images could not be encoded .*, more than error_budget=0.03 allows"):
        maintenance.retry(mend(Retry, out, error_budget=0.03))
    assert cache.read_plan(str(out))["settings"]["error_budget"] == 0.02  # what is in the plan stays as it was
    assert CachePlan.read(str(out)).settings.error_budget == 0.03
    assert maintenance.retry(mend(Retry, out, error_budget=0.0625))["recovered"] == 0  # 3 of 48


@pytest.mark.usefixtures("unseen")
def test_images_that_were_repaired_after_the_budget_stopped_a_job(model, tmp_path):
    """As the message says: a larger budget for the same command, and then retry."""
    out, photos = tmp_path / "cache", tmp_path / "photos"
    photos.mkdir()
    photo_folder(photos)
    with pytest.raises(UserError, match=r"`encode_dataset.py retry .*/cache` then encodes those that were repaired"):
        encode_dataset(config(photos, model, out, "error_budget=0"))
    for name, photo in zip(BAD, crops(3), strict=True):
        photo.save(photos / name, "png")
    encode_dataset(config(photos, model, out, "error_budget=0.1"))
    done = maintenance.retry(mend(Retry, out))
    assert (done["images"], done["quarantined"]) == (48, 0)


@pytest.mark.usefixtures("unseen")
def test_the_manifest_of_an_older_cache_knows_its_budget(folder, model, tmp_path):
    """Before settings.json there was only the plan of the first job, and the manifest of the last."""
    out = tmp_path / "cache"
    with pytest.raises(UserError, match="error_budget=0 allows"):
        encode_dataset(config(folder, model, out, "error_budget=0"))
    encode_dataset(config(folder, model, out, "error_budget=0.1"))
    (out / "settings.json").unlink()
    assert CachePlan.read(str(out)).settings.error_budget == 0
    assert maintenance.retry(mend(Retry, out))["recovered"] == 0


# --- images are looked at -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_ray")
def test_many_unreadable_images_are_noticed_before_ray_starts(model, tmp_path):
    photos, out = tmp_path / "photos", tmp_path / "cache"
    photos.mkdir()
    for n, photo in enumerate(crops(79)):
        photo.save(photos / f"{n:02}.png")
        if n % 7 in (0, 3):
            (photos / f"{n:02}.png").write_text("not an image at all")
    with pytest.raises(
        UserError, match=r"of the 32 images that were looked at can't be read \(\d+ not_an_image\)"
    ) as e:
        encode_dataset(config(photos, model, out, "error_budget=0.1"))
    text = str(e.value)
    assert "error_budget=0.1 allows 7 of 79: " in text
    assert text.count(".png: ") == 3
    assert "raise error_budget, which then puts them into the cache's quarantine" in text
    assert not out.exists()


def test_a_few_unreadable_images_are_a_warning(folder, model, tmp_path, capsys):
    encode_dataset(config(folder, model, tmp_path / "cache", "error_budget=0.1"))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "looked at" in line]
    assert line.startswith(
        "1 of the 32 images that were looked at can't be read (1 empty), and error_budget=0.1 allows"
    )
    assert line.endswith("allows 4 of 48: cats/empty.jpg: zero bytes")


def test_a_wrong_column_locks_nothing(model, tmp_path):
    """No image is where the column says: the job makes nothing, and the right column is then no other cache."""
    file, out = parquet(tmp_path / "a.parquet"), tmp_path / "cache"
    with pytest.raises(UserError, match=r"6 of the 6 images .*\(6 missing\).* or check source.image_column"):
        encode_dataset(config(file, model, out, "source.image_column=label_name"))
    assert not out.exists()
    assert encode_dataset(config(file, model, out))["images"] == 6


def test_only_what_is_left_is_looked_at(folder, model, tmp_path, monkeypatch):
    """As many parts as there are images looked at, each with one image, none of them from a shard that is done."""
    job = encode.plan_cache(config(folder, model, tmp_path / "cache", "rows_per_shard=5"))
    todo = [ShardTask(number) for number in (1, 2, 4, 9)]  # 5 + 5 + 5 + 3 images
    monkeypatch.setattr(preview, "IMAGES", 6)
    units = preview._spread(job.partition, todo)
    left = [*range(5, 15), *range(20, 25), *range(45, 48)]
    assert [left.index(unit) // 3 for unit in units] == [0, 1, 2, 3, 4, 5]
    monkeypatch.setattr(preview, "IMAGES", 32)
    assert preview._spread(job.partition, todo) == left
    found = preview.look(job.partition, todo, job.plan.views)
    assert (found.todo, found.seen) == (18, 18)
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.*"))
    assert [name for name, _ in found.lost] == [files[unit] for unit in left if files[unit] in BAD]
    assert found.seconds > 0


def test_units_are_found_in_their_listings(folder, model, tmp_path):
    source = encode.plan_cache(config(folder, model, tmp_path / "cache")).partition.sources[0]
    partition = Partition([source, source.part(0, 10), source], 7)
    assert partition.located([0, 47, 48, 57, 58]) == [
        (partition.sources[0], [0, 47]), (partition.sources[1], [0, 9]), (partition.sources[2], [0]),
    ]  # fmt: skip
    assert [partition.first(shard) for shard in (0, 1, 7, 8)] == [0, 7, 48, 55]


def test_a_slow_source_is_not_looked_at_for_long(folder, model, tmp_path, monkeypatch):
    job = encode.plan_cache(config(folder, model, tmp_path / "cache"))
    clock = itertools.count(step=4)
    monkeypatch.setattr(preview, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    assert preview.look(job.partition, job.todo(), job.plan.views).seen == 3  # at 4, 8 and 12 seconds


@pytest.mark.parametrize(
    ("seen", "lost", "budget", "total", "refused"),
    [
        (32, 1, 0.01, 10**6, False), (32, 2, 0.01, 10**6, False), (32, 5, 0.01, 10**6, True),
        (32, 20, 0.5, 10**6, False), (32, 29, 0.5, 10**6, True), (32, 32, 1.0, 10**6, False),
        (32, 1, 0.01, 50, True), (32, 1, 0.02, 50, False), (32, 1, 0.0, 10**6, True),
    ],
)  # fmt: skip
def test_a_job_is_refused_if_it_would_not_reach_its_end(seen, lost, budget, total, refused, capsys):
    """Because more than the budget are lost already, or by the binomial distribution will all but certainly be."""
    chance = stats.binom.sf(lost - 1, seen, budget)
    assert math.isclose(preview._chance(seen, lost, budget), chance, rel_tol=1e-9)
    assert (lost > budget * total or chance < 1e-4) == refused
    found = preview.Preview(total, seen, [(f"{n}.png", Lost("read", "missing", "gone")) for n in range(lost)])
    if refused:
        with pytest.raises(UserError, match=f"{lost} of the {seen} images"):
            preview.judge(found, budget, total)
    else:
        preview.judge(found, budget, total)
        assert f"{lost} of the {seen} images" in capsys.readouterr().out


# --- room and time ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "bytes_per_image"),
    [((), 2 * 4 * 4 * 4 * 2), (("latents=mean", "dtype=fp32"), 4 * 4 * 4 * 4),
     (("transform.crop=random", "transform.crops=3", "dtype=bf16"), 3 * 2 * 4 * 4 * 4 * 2)],
    ids=["moments", "mean", "crops"],
)  # fmt: skip
def test_bytes_of_an_image(folder, model, tmp_path, more, bytes_per_image):
    """Four channels of 32 / 8 by 32 / 8."""
    assert preview.latent_bytes(encode.plan_cache(config(folder, model, tmp_path / "cache", *more)).plan) == (
        bytes_per_image
    )


@pytest.mark.usefixtures("no_ray")
def test_a_disk_without_room_is_known_before_ray_starts(folder, model, tmp_path, monkeypatch):
    needed = 48 * 256
    full = SimpleNamespace(f_bavail=needed - 1, f_frsize=1, f_blocks=10**6)
    monkeypatch.setattr(paths.os, "statvfs", lambda path: full)
    with pytest.raises(UserError, match="are needed for the latents of 48 images; make room"):
        encode_dataset(config(folder, model, tmp_path / "cache"))
    full.f_bavail = needed
    with pytest.raises(AssertionError, match="Ray was started"):
        encode_dataset(config(folder, model, tmp_path / "cache"))


def test_the_time_is_that_of_encoding_and_decoding_what_is_left(monkeypatch):
    """Two workers of three threads encode 5 images/s each; a core decodes 40: together 1 / (1 / 10 + 1 / 240)."""
    said, measured = [], []
    speeds = {(64, 64): 64 / 3, (256, 256): 5 / 3}  # of a thread; of small images as many as make 4 / 3 large ones
    monkeypatch.setattr(estimate, "announce", lambda *given, **more: said.append((given, more)))
    monkeypatch.setattr(speed, "encoder_speed", lambda *given: measured.append(given) or (speeds[given[1]], "here"))
    plan = cache_plan(kernels="torch")  # batches of 4
    placement = Placement(workers=2, gpu=False, threads=3)
    speed.announce(plan, placement, preview.Preview(9600, seen=20, seconds=0.5), yes=True)
    (((what, seconds), more),) = said
    assert what == "encoding 9,600 images"
    assert seconds == pytest.approx(9600 * (1 / 10 + 1 / 240))
    assert more == {"gpu": False, "yes": True}
    own = (1, "fp32", "torch")
    assert measured == [("/m", (64, 64), 1, *own), ("/m", (256, 256), 4, *own)]
    speed.announce(plan, placement, preview.Preview(63, seen=20, seconds=0.5), yes=True)
    speed.announce(plan, Placement(workers=2, gpu=True, threads=3), preview.Preview(9600, 20, [], 0.5), yes=True)
    assert len(measured) == 2  # neither for a few images nor with GPUs
    speed.announce(plan, placement, preview.Preview(64, seen=20, seconds=0.5), yes=True)
    assert (len(measured), len(said)) == (3, 1)  # eight seconds by the small images are not worth a word
    speeds[64, 64] = 16 / 6  # a large one takes a thread six seconds
    speed.announce(plan, placement, preview.Preview(9600, seen=20, seconds=0.5), yes=False)
    assert (len(measured), said[1][0][1]) == (4, pytest.approx(9600 * (1 / 1 + 1 / 240)))
    assert said[1][1]["yes"] is False


def test_a_no_leaves_nothing(folder, model, tmp_path, monkeypatch):
    def announce(*given, **more):
        raise UserError("not begun; yes=true begins without asking")

    monkeypatch.setattr(speed, "announce", announce)
    with pytest.raises(UserError, match="not begun"):
        encode_dataset(config(folder, model, tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()


def test_the_encoder_is_measured(loaded, model):
    images_per_second, how = speed.encoder_speed(model, (32, 32), 4, 1, "fp32", "torch")
    assert images_per_second > 0
    assert how == "1 CPU threads, fp32, torch kernels"


# --- jobs that made nothing ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fresh(folder, model, tmp_path_factory):
    """The cache that the second of two jobs is to make."""
    out = tmp_path_factory.mktemp("fresh") / "cache"

    with in_process():
        encode_dataset(config(folder, model, out, "transform.resolution=40"))
    return out


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("error", [UserError("no"), KeyboardInterrupt()], ids=["error", "ctrl-c"])
def test_what_fails_before_its_first_commit_leaves_nothing(folder, model, tmp_path, monkeypatch, error):
    out = tmp_path / "cache"

    def pipeline(*given):
        assert (out / "plan.json").exists()
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(encode, "_pipeline", pipeline)
        with pytest.raises(type(error)):
            encode_dataset(config(folder, model, out))
    assert not out.exists()
    assert encode_dataset(config(folder, model, out, "transform.resolution=40"))["images"] == 45


def test_a_plan_that_made_nothing_is_replaced(folder, model, fresh, tmp_path, capsys):
    """Of a driver that was killed before its first commit."""
    out = tmp_path / "cache"
    encode.plan_cache(config(folder, model, out))
    assert {path.name for path in out.iterdir()} == {"plan.json", "listing"}
    done = encode_dataset(config(folder, model, out, "transform.resolution=40"))
    assert "was begun with other settings, and nothing was encoded into it: it begins anew" in capsys.readouterr().out
    assert done["digest"] == json.loads((fresh / "manifest.json").read_text())["digest"]
    verify.verify(Verify(cache=str(out)))


@pytest.mark.usefixtures("unseen")
def test_a_quarantine_alone_is_replaced_and_an_image_is_not(model, tmp_path):
    file, out = parquet(tmp_path / "a.parquet"), tmp_path / "cache"
    wrong = config(file, model, out, "source.image_column=label_name")
    with pytest.raises(UserError, match="6 of 6 images could not be encoded"):
        encode_dataset(wrong)
    assert [*(out / "commits").iterdir()]
    assert encode_dataset(config(file, model, out))["images"] == 6
    before = bytes_of(out)
    with pytest.raises(cache.OtherPlan, match="holds another cache"):
        encode_dataset(wrong)
    assert bytes_of(out) == before
    (out / "manifest.json").unlink()
    for path in (out / "manifests").iterdir():
        path.unlink()
    with pytest.raises(cache.OtherPlan, match="holds another cache"):  # one shard of images is enough
        encode_dataset(wrong)


@pytest.mark.usefixtures("unseen")
def test_a_plan_is_not_replaced_under_another_driver(folder, model, tmp_path):
    out = tmp_path / "cache"
    encode.plan_cache(config(folder, model, out))
    plan = (out / "plan.json").read_bytes()
    for alone in (None, lambda: False):
        with pytest.raises(cache.OtherPlan):
            encode.plan_cache(config(folder, model, out, "transform.resolution=40"), alone)
    assert (out / "plan.json").read_bytes() == plan


@pytest.mark.usefixtures("unseen")
def test_what_a_process_of_a_replaced_plan_commits_is_foreign(folder, model, fresh, tmp_path):
    """Workers of a killed driver live on for some seconds."""
    out = tmp_path / "cache"
    old = encode.plan_cache(config(folder, model, out))
    new = encode.plan_cache(config(folder, model, out, "transform.resolution=40"), lambda: True)

    def commit(job, number):
        row = decode_shard({"shard": job.partition.shard(ShardTask(number))}, job.plan.views, job.plan.hashed)
        return ShardEncoder(str(out), job.plan, False, 1)(row)

    assert not commit(old, 1)["error"]  # it can't know
    lost = commit(new, 1)
    assert "shard 1 was committed by a job that had begun with another plan" in lost["error"]
    assert f"`encode_dataset.py repair {out}` encodes it again" in lost["error"]
    with pytest.raises(UserError, match="shard 1 was committed by a job that had begun with another plan"):
        encode_dataset(config(folder, model, out, "transform.resolution=40"))
    with pytest.raises(UserError, match="shard 1: .*another plan"):
        verify.verify(Verify(cache=str(out)))
    maintenance.repair(mend(Repair, out))
    assert bytes_of(out) == bytes_of(fresh)
    assert not commit(new, 0)["error"]
    late = commit(old, 0)  # whose shard is taken
    assert "another plan" in late["error"]
    verify.verify(Verify(cache=str(out)))


def test_the_manifest_takes_no_foreign_commit(folder, model, tmp_path):
    out = tmp_path / "cache"
    encode_dataset(config(folder, model, out))
    path = out / "commits/000002.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"plan": "another"}))
    manifest = LatentCache(out).manifest
    with pytest.raises(UserError, match="shard 2 was committed by a job that had begun with another plan"):
        cache.write_manifest(str(out), cache.read_plan(str(out)), manifest["source"], {})


# --- without PyTorch and Ray --------------------------------------------------------------------------------------

MISTAKES = """
import contextlib, io, json, os, runpy, sys
for words in json.load(sys.stdin):
    sys.argv = ["jobs/encode_dataset.py", *words]
    err = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
        try:
            runpy.run_path("jobs/encode_dataset.py", run_name="__main__")
        except SystemExit as end:
            code = end.code
    heavy = [name for name in ("torch", "ray", "diffusers", "mlflow") if name in sys.modules]
    print(json.dumps([code, err.getvalue(), heavy]))
"""


def test_mistakes_are_answered_without_torch_and_ray(model, folder, tmp_path):
    (tmp_path / "file").touch()
    given = {"source.uri": str(folder), "model": model, "out": str(tmp_path / "out")}

    def but(**changed):
        return [f"{key}={value}" for key, value in (given | changed).items()]

    asked = {
        "model is empty": but(model=""),
        "model=stabilityai/sd-vae-ft-mse does not exist; models are folders on disk": but(
            model="stabilityai/sd-vae-ft-mse"
        ),
        "source.uri=imagenet-1k does not exist": but(**{"source.uri": "imagenet-1k"}),
        "source.uri is empty": but(**{"source.uri": ""}),
        "out is empty; give it": but(out=""),
        f"{tmp_path}/file is not a folder": but(out=f"{tmp_path}/file/cache"),
        f"model: {folder} is not a model folder": but(model=str(folder)),
        f"latent cache {tmp_path}/none does not exist": ["verify", f"{tmp_path}/none"],
        f"{folder} is not a latent cache: it has no plan.json": ["retry", str(folder)],
        "cache is empty; give it": ["repair"],
        f"another driver is at work on {tmp_path}/busy: process {os.getpid()} on ": but(out=f"{tmp_path}/busy"),
    }
    with at_work.claimed(f"{tmp_path}/busy"):
        done = subprocess.run(
            [sys.executable, "-c", MISTAKES],
            input=json.dumps([*asked.values()]), cwd=REPO, capture_output=True, text=True,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")},
        )  # fmt: skip
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == len(asked), done.stderr
    for message, (code, text, heavy) in zip(asked, answers, strict=True):
        assert (code, heavy) == (2, [])
        assert text.startswith("error: ")
        assert message in text
    assert "run `hf download stabilityai/sd-vae-ft-mse` and copy the cache here" in answers[1][1]
    assert "hf download --repo-type dataset imagenet-1k --local-dir imagenet-1k" in answers[2][1]
    for _, text, _ in answers[1:3]:
        assert "a gated one needs `hf auth login` before" in text
    assert sorted(os.listdir(tmp_path)) == ["file"]

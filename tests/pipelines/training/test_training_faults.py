"""Training on disks that are full, with MLflow away, with clocks that are wrong, NaN in a step, poisoned latents, and
two drivers at once: a run ends with one message and its last good checkpoint, or does not notice, and goes on to the
weights that an undisturbed one has."""

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from mlflow import MlflowClient
from PIL import Image

from litevae import cache, storage
from litevae.autoencoder import LiteVAE
from litevae.cache import LatentCache
from litevae.commits import _put_file, latent_statistics, read_commit
from litevae.errors import UserError
from litevae.model_folder import WEIGHTS
from litevae.shards import DTYPES, finite_rows, read_shard, shard_bytes, to_stored
from pipelines.data.open_source import open_source
from pipelines.encoding import verify
from pipelines.runtime import mlflow_run, mlflow_server, paths
from pipelines.runtime.cli import load, main
from pipelines.training import checkpoint, ldm, loop, run_folder, run_lock
from pipelines.training.config import TrainLDM, TrainVAE
from pipelines.training.vae import VaeTask, train_vae
from tests.disks import fill, resize, small_disk
from tests.encoding import encoded_crops
from tests.in_process import as_worker
from tests.pipelines.runtime.test_mlflow_server import Server
from tests.proxy import proxied
from tests.setups import ldm_setup, vae_setup

JOB = Path(__file__).resolve().parents[3] / "jobs" / "train_vae.py"
SMALL = [
    "model.encoder=S", "model.decoder.channels=[8, 8, 8, 8]", "model.decoder.layers=1", "loss.lpips.weight=0",
    "loss.adversarial.weight=0", "loop.precision=fp32", "ray.gpu=false", "ray.cpus_per_worker=1", "name=run",
    "loop.checkpoint_every=16", "loop.log_every=1", "loop.max_restarts=0",
]  # fmt: skip
OFF = "tracking.enabled=false"


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """16 crops of 32 px."""
    folder = tmp_path_factory.mktemp("photos")
    for n in range(16):
        Image.fromarray(skimage.data.astronaut()[12 * n : 12 * n + 32, 20 * n : 20 * n + 32]).save(
            folder / f"{n:02}.png"
        )
    return folder


def words(photos, root, *more, images=48):
    stages = f"stages=[{{resolution: 32, images: {images}, batch_size: 8}}]"
    return [*SMALL, f"data.train.uri={photos}", f"root={root}", stages, *more]


def weights(root):
    return (root / "run" / "model" / WEIGHTS).read_bytes()


def trained_here(config, change=lambda task: None):
    """In this process. Returns the last metrics; `change` gets the task before it begins."""
    folder, source = Path(config.root, config.name), open_source(config.data.train)
    folder.mkdir()
    setup = vae_setup(source, folder=folder)
    with as_worker():
        task = VaeTask(config, setup, 0, 1, torch.device("cpu"))
        change(task)
        return loop.run(task, "vae", config, setup, 0, 1)


@pytest.fixture(scope="module")
def undisturbed(photos, tmp_path_factory):
    root = tmp_path_factory.mktemp("undisturbed")
    trained_here(load(TrainVAE, None, words(photos, root, OFF)))
    return root


def refused(arguments, capsys):
    """The one message of a job that ends with it."""
    capsys.readouterr()
    assert main(TrainVAE, train_vae, arguments) == 2
    shown = own(capsys.readouterr().err)
    (error,) = [line for line in shown.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in shown
    return error


def own(shown):
    """Without what an actor of Ray Train's says, which takes fright where there are several Rays on one machine."""
    return "\n".join(line for line in shown.splitlines() if "(PlacementGroupCleaner" not in line)


def images_of(run):
    """Of its checkpoints, each of which is whole."""
    found = sorted(run.glob("checkpoint-*"))
    return [checkpoint.load(str(folder))["images"] for folder in found]


# --- full disks ---------------------------------------------------------------------------------------------------


@pytest.mark.chaos
def test_a_full_disk_ends_a_run_which_goes_on_when_there_is_room(photos, undisturbed, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(paths, "check_free", lambda *given: None)  # another program fills it later
    state = max(path.stat().st_size for path in undisturbed.rglob("state.pt"))
    with small_disk(tmp_path / "disk", f"{int(1.5 * state)}") as disk:
        run, arguments = disk / "run", words(photos, disk, OFF)
        error = refused(arguments, capsys)  # the second checkpoint has no room
        assert "No space left on device" in error
        assert str(run) in error
        assert images_of(run) == [16]
        left = {path.name for path in run.iterdir() if path.name.startswith((".", "checkpoint-"))}
        assert left - {".validate_storage_marker"} == {"checkpoint-000000000016"}

        resize(disk, f"{4 * state}")  # for two checkpoints, the third and the model: not all of them
        ballast = fill(disk, state + len(weights(undisturbed)) // 2 + 2**16)
        error = refused(arguments, capsys)
        assert "make room" in error or "No space left on device" in error
        assert 16 <= max(images_of(run)) < 48
        assert not (run / "model").exists()

        ballast.unlink()
        resize(disk, f"{8 * state}")
        train_vae(load(TrainVAE, None, arguments))
        assert weights(disk) == weights(undisturbed)
        steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert [step for step in steps if step] == sorted({*steps} - {0})


def test_what_does_not_fit_is_one_message_and_leaves_nothing(tmp_path):
    with small_disk(tmp_path / "disk", "64k") as disk:
        handle = mlflow_server.RunHandle("", None, "test", str(disk))
        tracker = mlflow_run.Tracker(handle)
        tracker.metrics({"loss": 1.0}, 1)
        step = 1
        with pytest.raises(UserError, match=rf"{disk}/metrics.jsonl can't be written: No space .*make room there"):  # noqa: PT012
            while step < 10_000:
                step += 1
                tracker.metrics({"loss": float(step)}, step)
        tracker.close()
        lines = (disk / "metrics.jsonl").read_bytes()
        assert lines.endswith(b"}\n")
        assert [json.loads(line)["step"] for line in lines.splitlines()] == [*range(1, step)]

        (disk / "metrics.jsonl").unlink()
        checkpoint.publish(lambda folder: (folder / "a").write_text("old"), disk / "model")
        for build in (
            lambda folder: (folder / "a").write_bytes(bytes(2**17)),
            lambda folder: LiteVAE("S", block_out_channels=(8,) * 4).save_pretrained(folder),  # says it in its own way
        ):
            with pytest.raises(UserError, match=rf"{disk}/model can't be written: .*make room there"):
                checkpoint.publish(build, disk / "model")
            assert (disk / "model" / "a").read_text() == "old"
            assert os.listdir(disk) == ["model"]
        os.mkdir(disk / "run")
        fill(disk, 0)
        with pytest.raises(UserError, match=rf"{disk}/run/config.yaml can't be written: .*make room there"):
            run_folder.write_config(str(disk / "run"), load(TrainVAE))
        assert os.listdir(disk / "run") == []


def test_a_checkpoint_that_does_not_fit_where_it_is_made_is_named(tmp_path, monkeypatch):
    with small_disk(tmp_path / "disk", "64k") as disk:
        monkeypatch.setattr("tempfile.tempdir", str(disk))
        with pytest.raises(UserError, match=rf"{disk}/litevae-checkpoint-\S+/state.pt can't be written: No space"):
            checkpoint.save({"weights": torch.zeros(2**16)})
        assert os.listdir(disk) == []


# --- MLflow -------------------------------------------------------------------------------------------------------


@pytest.mark.chaos
def test_training_does_not_notice_that_mlflow_is_away(photos, undisturbed, tmp_path):
    """It hangs while the first half is trained; then it works, and hangs in the middle of the second."""
    server, run = Server(tmp_path), tmp_path / "run"
    server.start()
    try:
        with proxied(server.uri) as proxy:

            def trained(images, timeout):
                environment = os.environ | {"MLFLOW_HTTP_REQUEST_TIMEOUT": timeout}
                more = (f"tracking.uri={proxy.uri}", "loop.checkpoint_every=8")
                command = [sys.executable, str(JOB), *words(photos, tmp_path, *more, images=images)]
                done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment)
                assert done.returncode == 0, done.stdout + done.stderr
                assert "Traceback" not in own(done.stdout + done.stderr)
                lines = (run / "metrics.jsonl").read_text().splitlines()
                steps = sorted({line["step"] for line in map(json.loads, lines) if "train/loss" in line})
                assert steps == [*range(8, images + 1, 8)]
                return (done.stdout + done.stderr).count("warning: tracking at"), done.stdout

            proxy.fault = lambda *request: "hang"
            warnings, shown = trained(24, "2")
            assert warnings == 1
            assert f"MLflow: {run}/metrics.jsonl" in shown

            requests = []
            proxy.fault = lambda *request: requests.append(request) or ("hang" if _sent(requests) else "")
            warnings, shown = trained(48, "4")
            assert warnings >= 1
            assert f"MLflow: {proxy.uri}/#/experiments/" in shown
            assert weights(tmp_path) == weights(undisturbed)
    finally:
        server.kill()
    client = MlflowClient(f"sqlite:///{tmp_path}/server.db")
    (tracked,) = client.search_runs([client.get_experiment_by_name("litevae").experiment_id])
    came = [metric.step for metric in client.get_metric_history(tracked.info.run_id, "train/loss")]
    assert came == [*range(8, 8 * len(came) + 1, 8)]
    assert 24 in came  # what it had missed


def _sent(requests):
    """Whether the parameters, and after them the first metrics, have been brought to it."""
    return sum("runs/log-batch" in path for _, path, _ in requests) > 3


# --- steps and rows that are not numbers ----------------------------------------------------------------------------


@pytest.mark.slow
def test_steps_of_nan_are_skipped_counted_and_in_the_end_stop_the_run(photos, tmp_path):
    more = (OFF, "loop.max_skipped=3", "loop.checkpoint_every=24")
    config, run, poison = load(TrainVAE, None, words(photos, tmp_path, *more, images=64)), tmp_path / "run", {16}

    def poisoned(task):
        weight, step = task.model.decoder.conv_out.weight, task.step

        def with_nan(pixels, images):
            hook = weight.register_hook(lambda gradient: gradient * float("nan")) if images in poison else None
            found = step(pixels, images)
            if hook:
                hook.remove()
            return found

        task.step = with_nan

    assert np.isfinite(trained_here(config, poisoned)["loss"])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    skipped = {line["step"]: line["train/skipped_steps"] for line in lines if "train/skipped_steps" in line}
    assert skipped == {images: float(images == 24) for images in range(8, 65, 8)}
    assert images_of(run) == [24, 48, 64]

    poison.update(range(32, 64))
    shutil.rmtree(run)
    advice = rf"checkpoint at 48 is kept.*optim\.lr.*name=NEW begin={run}/checkpoint-0+48$"
    with pytest.raises(UserError, match=rf"3 steps in a row, up to 56 images.*{advice}"):
        trained_here(config, poisoned)
    assert images_of(run) == [24, 48]
    state = checkpoint.load(str(run / "checkpoint-000000000048"))
    assert all(torch.isfinite(value).all() for value in state["model"].values())


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return encoded_crops(tmp_path_factory.mktemp("made"), rows_per_shard=8)


def ldm_words(copy, root):
    return [
        "network=tiny", "batch_size=8", "images=32", "loop.precision=fp32", "sample_images=2", "sample_steps=2",
        "loop.val_every=0", "ray.gpu=false", "ray.cpus_per_worker=1", OFF, f"cache={copy}", f"root={root}", "name=run",
    ]  # fmt: skip


def poisoned(made, folder, honest):
    """A copy in whose second shard a row is NaN, as the commit and the manifest have it: their sha256 is right.

    Args:
        honest: whether their statistics are those of the shard, too.
    """
    shutil.copytree(made[0], folder)
    how = cache.read_plan(str(folder))["latents"]
    commit = read_commit(str(folder), 1)
    rows, (latents,) = read_shard(str(folder), commit, how)
    latents = latents.copy()
    latents[3, 0, 0, 0] = np.nan
    data = shard_bytes(rows, [latents], how)
    record = _put_file(str(folder), "shards/000001-feedfeedfeed.parquet", data)
    record |= {"statistics": latent_statistics([latents], how)} if honest else {}
    (folder / "commits/000001.json").write_text(json.dumps(commit | record))
    manifest = cache.read_manifest(str(folder))
    shutil.rmtree(folder / "manifests")
    (folder / "manifest.json").unlink()
    cache.write_manifest(str(folder), cache.read_plan(str(folder)), manifest["source"], manifest["run"])
    return rows["id"][3].as_py()


def test_a_poisoned_row_ends_a_training_with_its_name_and_can_be_mended(made, tmp_path):
    """As a worker finds it; how a worker's message comes to the user is tested in test_train_ldm.py."""
    copy = tmp_path / "cache"
    name = poisoned(made, copy, honest=False)

    def epoch():
        config = load(TrainLDM, None, ldm_words(copy, tmp_path))
        setup = ldm_setup(config, tmp_path)
        with as_worker():
            task = ldm.LdmTask(config, setup, 0, 1, torch.device("cpu"))
            task.begin(0)
            return list(task.batches(0, 24, 8))

    with pytest.raises(UserError) as error:
        epoch()
    assert f"{copy}/shards/000001-feedfeedfeed.parquet: the latents of {name!r} are not finite" in str(error.value)
    assert "repair" in str(error.value)
    assert verify.audit(str(copy)).problems.keys() == {1}

    flipped = next((copy / "shards").glob("000002-*"))
    data = bytearray(flipped.read_bytes())
    data[len(data) // 3] ^= 1
    flipped.write_bytes(data)
    (copy / "shards/000001-feedfeedfeed.parquet").unlink()
    shutil.copytree(made[0], copy, dirs_exist_ok=True, ignore=shutil.ignore_patterns("000002-*"))
    with pytest.raises(UserError, match=f"{flipped} is damaged: its sha256 differs from the manifest's"):
        epoch()
    shutil.copy(made[0] / "shards" / flipped.name, flipped)
    assert len(epoch()) == 3


def test_a_cache_without_a_mean_is_refused(made, tmp_path):
    poisoned(made, tmp_path / "cache", honest=True)
    with pytest.raises(
        UserError, match=r"cache has no mean and standard deviation: some latents are not finite; .*repair"
    ):
        LatentCache(tmp_path / "cache")


def test_latents_that_are_not_finite_are_found_in_every_dtype():
    values = np.random.default_rng(0).standard_normal((4, 2, 3, 3), dtype=np.float32)
    values[1, 0, 0, 0], values[3, 1, 2, 2] = np.nan, -np.inf
    for dtype in DTYPES:
        assert finite_rows(to_stored(values, dtype), dtype).tolist() == [True, False, True, False]


def test_flipped_bits_in_a_store_are_found_by_their_page(made, s3):
    for path in made[0].rglob("*.*"):
        data = bytearray(path.read_bytes())
        if path.parent.name == "shards":
            data[len(data) // 3] ^= 1
        storage.put(f"{s3}/{path.relative_to(made[0])}", bytes(data))
    with pytest.raises(UserError, match=rf"{s3}/shards/\S+ is damaged: .*CRC"):
        LatentCache(s3).latents(range(24), epoch=0, seed=0)


# --- clocks -------------------------------------------------------------------------------------------------------


@pytest.mark.chaos
def test_a_run_whose_list_of_checkpoints_is_cut_goes_on_from_the_newest(photos, undisturbed, tmp_path, capsys):
    """Ray Train writes its list in place. That the newest checkpoint was cut, too, is not to stop it either, nor are
    files whose clock was wrong: by them the first checkpoint is the newest."""
    train_vae(load(TrainVAE, None, words(photos, tmp_path, OFF, images=32)))
    listed, half = tmp_path / "run" / "checkpoint_manager_snapshot.json", tmp_path / "run" / "checkpoint-000000000040"
    os.truncate(listed, 100)
    half.mkdir()
    (half / checkpoint.STATE).write_bytes(b"PK")
    for n, path in enumerate(sorted((tmp_path / "run").rglob("*"), reverse=True)):
        os.utime(path, (2**32 + n, 2**32 + n))  # of the year 2106
    capsys.readouterr()
    train_vae(load(TrainVAE, None, words(photos, tmp_path, OFF)))
    assert f"warning: {listed} was damaged" in capsys.readouterr().out
    assert images_of(tmp_path / "run") == [16, 32, 48]
    assert weights(tmp_path) == weights(undisturbed)


# --- two drivers --------------------------------------------------------------------------------------------------

OWNER = """
import sys, time
from pipelines.training.run_lock import claimed
with claimed(sys.argv[1]):
    print("has it", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def owner(tmp_path):
    """A process that is at work on tmp_path/run."""
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER, tmp_path / "run"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "has it\n"
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_run_is_one_processs_at_a_time(owner, tmp_path):
    about = rf"process {owner.pid} on {platform.node()}, since 20\d\d-.* UTC\. Wait for it, stop it, or choose another"
    with pytest.raises(UserError, match=f"another job is working on {tmp_path}/run: {about} name"):  # noqa: SIM117
        with run_lock.claimed(str(tmp_path / "run")):
            raise AssertionError("it is another's")
    with run_lock.claimed(str(tmp_path / "other")):
        owner.stdin.close()
        owner.wait(60)
    assert not any(tmp_path.iterdir())
    with run_lock.claimed(str(tmp_path / "run")):
        Path(tmp_path, "run", "made").touch()
        with pytest.raises(UserError, match=f"process {os.getpid()} on"), run_lock.claimed(str(tmp_path / "run")):
            raise AssertionError("it is ours already")
    assert os.listdir(tmp_path / "run") == ["made"]


def test_a_killed_owner_holds_nothing_up(owner, tmp_path):
    owner.kill()
    owner.wait()
    assert os.listdir(tmp_path / "run") == [run_lock.DRIVER]
    assert not run_folder.open_run(str(tmp_path / "run"), load(TrainVAE), [])  # what it left is no other's folder
    with run_lock.claimed(str(tmp_path / "run")):
        assert f"process {os.getpid()} on" in (tmp_path / "run" / run_lock.DRIVER).read_text()


@pytest.mark.chaos
def test_of_many_at_once_one_has_it(tmp_path):
    """Each takes it in turn, ten times; whoever has it finds nobody else there."""
    code = """
import sys
from pathlib import Path
from litevae.errors import UserError
from pipelines.training.run_lock import claimed
print("here", flush=True)
sys.stdin.read()  # until all are
had = 0
while had < 10:
    try:
        with claimed(sys.argv[1] + "/run"):
            inside = Path(sys.argv[1], "inside")
            inside.touch(exist_ok=False)
            had += 1
            inside.unlink()
    except UserError:
        continue
"""
    command = [sys.executable, "-c", code, tmp_path]
    started = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    try:
        assert [process.stdout.readline() for process in started] == ["here\n"] * 3
        for process in started:
            process.stdin.close()
        assert [process.wait(240) for process in started] == [0, 0, 0]
    finally:
        for process in started:
            process.kill()
            process.wait()
            process.stdout.close()
    assert not any(tmp_path.iterdir())


def test_without_locks_a_job_runs_with_a_warning(tmp_path, monkeypatch, capsys):
    def unknown(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", unknown)
    with run_lock.claimed(str(tmp_path / "run")):
        assert f"warning: {tmp_path}/run can't be locked" in capsys.readouterr().out


def test_what_a_killed_writer_left_is_removed_and_no_more(tmp_path):
    known, whole, half, empty = (tmp_path / f"checkpoint-{n:012d}" for n in range(4))
    for folder in (known, whole, half, empty):
        folder.mkdir()
    for folder in (known, whole, half):
        torch.save({"images": torch.zeros(1000)}, folder / checkpoint.STATE)
    for folder in (known, half):
        os.truncate(folder / checkpoint.STATE, 3000)
        assert not zipfile.is_zipfile(folder / checkpoint.STATE)
    results = {"checkpoint_results": [{"checkpoint_dir_name": known.name}]}  # damaged since: that is to be told
    (tmp_path / "checkpoint_manager_snapshot.json").write_text(json.dumps(results))
    (tmp_path / ".model-x1").mkdir()
    (tmp_path / "config.yaml.tmp").touch()  # an earlier version's name
    (tmp_path / ".tmp-0123").touch()
    with run_lock.claimed(str(tmp_path)):
        assert sorted(os.listdir(tmp_path)) == sorted(
            [known.name, whole.name, "checkpoint_manager_snapshot.json", run_lock.DRIVER]
        )


@pytest.mark.chaos
def test_a_second_driver_is_refused_and_the_first_one_killed_goes_on(photos, undisturbed, tmp_path, capsys):
    arguments = words(photos, tmp_path, OFF)
    with open(tmp_path / "log", "w") as log:
        first = subprocess.Popen([sys.executable, str(JOB), *arguments], stdout=log, stderr=log)
    try:
        end = time.monotonic() + 240
        while not list((tmp_path / "run").glob("checkpoint-*/state.pt")):
            assert first.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < end, "no checkpoint"
            time.sleep(0.005)
        first.send_signal(signal.SIGSTOP)  # its workers go on; it does not end
        error = refused(arguments, capsys)
        assert f"another job is working on {tmp_path}/run: process {first.pid} on {platform.node()}, since" in error
        assert first.poll() is None, "it ended before it was looked for"
    finally:
        first.kill()
        first.wait()
    train_vae(load(TrainVAE, None, arguments))
    assert weights(tmp_path) == weights(undisturbed)
    assert not (tmp_path / "run" / run_lock.DRIVER).exists()

"""Several nodes: what runs where, nodes that are killed and come while jobs run, and folders that they do not share."""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from litevae.autoencoder import LiteVAE
from pipelines.encoding import verify
from pipelines.runtime import shutdown
from pipelines.runtime.cli import load
from pipelines.training import launch
from pipelines.training.config import TrainVAE
from tests.encoding import BAD, crops, photo_folder, save_model, start_job
from tests.nodes import cluster, title_of

pytestmark = pytest.mark.chaos

REPO = Path(__file__).resolve().parents[2]
GPU, CPU = {"pool": "gpu"}, {"pool": "cpu"}  # labels; there is no GPU here
TRAIN = [
    "model.encoder=S", "model.decoder.channels=[8,8,8,8]", "model.decoder.layers=1", "loss.lpips.weight=0",
    "loss.adversarial.weight=0", "loop.precision=fp32", "ray.gpu=false", "ray.cpus_per_worker=1", "data.max_bad=0.1",
    "loop.log_every=1", "loop.val_every=0",
]  # fmt: skip


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return photo_folder(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def nodes():
    with cluster(num_cpus=4) as nodes:
        nodes.add("decode", num_cpus=2, labels=CPU)
        nodes.add("a", num_cpus=1, labels=GPU)
        yield nodes


def wait_for(found, seconds=600):
    end = time.monotonic() + seconds
    while not (what := found()):
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)
    return what


def test_training_goes_on_with_the_nodes_that_there_are(photos, tmp_path, monkeypatch, capfd):
    import ray

    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "40")
    monkeypatch.setattr(launch, "RESIZE_EVERY", 2.0)
    more = ["stages=[{resolution: 32, images: 800000, batch_size: 12}]", "loop.checkpoint_every=120"]
    elastic = ["ray.workers=3", "ray.min_workers=1"]
    cfg = load(TrainVAE, None, [*TRAIN, *more, *elastic, f"data.train.uri={photos}", f"root={tmp_path}", "name=run"])
    run = tmp_path / "run"

    def checkpoints():
        return {path.parent.name for path in run.glob("checkpoint-*/state.pt")}

    printed = []

    def shown():
        printed.append(capfd.readouterr().out)
        return "".join(printed)

    def trains_on(*names):
        """Workers are on all of these, and a checkpoint comes."""
        wait_for(lambda: trained.done() or nodes.where("ray::RayTrainWorker") == {*names})
        before = checkpoints()
        wait_for(lambda: trained.done() or checkpoints() - before)
        assert not trained.done(), trained.exception()
        assert nodes.where("ray::RayTrainWorker") == {*names}

    with cluster(num_cpus=1) as nodes, ThreadPoolExecutor(1) as thread:
        monkeypatch.setenv("RAY_ADDRESS", nodes.address)
        for name in ("a", "b"):
            nodes.add(name, num_cpus=1)
        trained = thread.submit(train, cfg)
        try:
            trains_on("head", "a", "b")
            nodes.warn("b")
            wait_for(lambda: trained.done() or "a node will be taken away; writing a checkpoint after" in shown())
            nodes.kill("b")
            trains_on("head", "a")
            nodes.add("c", num_cpus=1)
            trains_on("head", "a", "c")
        finally:
            run.mkdir(exist_ok=True)  # where it ended before it began
            (run / shutdown.FILE).touch()
            error = trained.exception(240)
            ray.shutdown()
    assert isinstance(error, shutdown.Stopped), error
    assert "continues after" in shown()
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    steps = [line["step"] for line in lines if "train/loss" in line]
    assert steps == sorted({*steps}), "a step was logged twice, or out of order"
    assert f"checkpoint-{steps[-1]:012d}" in checkpoints()  # it left with one


def train(cfg):
    from pipelines.training.vae import train_vae

    return train_vae(cfg)


def test_encoding_over_nodes_that_go_and_come(nodes, photos, tmp_path):
    model = save_model(tmp_path / "model")
    small = ("rows_per_shard=2", "transform.resolution=96", "kernels=torch")
    where = ("ray.workers=2", "ray.decode_tasks=2", "ray.worker_labels={pool: gpu}", "ray.decode_labels={pool: cpu}")
    out, log = tmp_path / "cache", tmp_path / "log.txt"
    environment = os.environ | {"RAY_ADDRESS": nodes.address}
    with log.open("w") as file:
        process = start_job(photos, model, out, *small, *where, "ray.wait=200", stdout=file, env=environment)
    seen = {"ray::Map(decode_shard)": set(), "ray::MapWorker(Map(ShardEncoder))": set()}

    def look(until):
        for title, where in seen.items():
            where |= nodes.where(title)
        return until()

    try:
        commits = out / "commits"
        wait_for(lambda: process.poll() is not None or "waiting up to 200 s for the cluster to grow" in log.read_text())
        nodes.add("b", num_cpus=1, labels=GPU)
        encoders = seen["ray::MapWorker(Map(ShardEncoder))"]
        wait_for(lambda: process.poll() is not None or look(lambda: encoders == {"a", "b"}))
        wait_for(lambda: process.poll() is not None or look(lambda: commits.is_dir() and len(os.listdir(commits)) >= 3))
        # the other one waits, or it might be through with all that is left before there is a third
        (other,) = (worker for worker in nodes.workers("a") if title_of(worker).startswith("ray::MapWorker"))
        other.suspend()
        nodes.kill("b")
        nodes.add("c", num_cpus=1, labels=GPU)
        wait_for(lambda: process.poll() is not None or look(lambda: "c" in encoders))
        other.resume()
        wait_for(lambda: look(lambda: process.poll() is not None))
        assert process.returncode == 0, log.read_text()
    finally:
        process.kill()
    assert seen["ray::Map(decode_shard)"] == {"decode"}
    assert seen["ray::MapWorker(Map(ShardEncoder))"] == {"a", "b", "c"}
    found = verify.audit(str(out))
    assert (found.problems, found.general, found.missing) == ({}, [], [])
    counts = json.loads((out / "manifest.json").read_text())["counts"]
    assert (counts["encoded"], counts["quarantined"]) == (45, len(BAD))


def test_a_trial_is_moved_off_a_node_that_dies(nodes, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for n, photo in enumerate(crops(16)):
        photo.save(photos / f"{n:02d}.png")
    for name in ("a", "b", "c"):  # those of an earlier test
        if name in nodes:
            nodes.kill(name)
    # Room for two more: the dead node's placement groups move, too, until Ray Train's cleaner finds that nobody needs
    # them; it asks the dashboard, which a cluster of tests has not.
    for name in ("d", "e"):
        nodes.add(name, num_cpus=4, labels=GPU)
    words = [f"train_vae.{word}" for word in TRAIN if word.startswith(("model", "loss", "loop"))]
    words += [
        "train_vae.stages=[{resolution: 32, images: 400, batch_size: 8}]", "train_vae.loop.checkpoint_every=80",
        "train_vae.val_images=4", "space.optim.lr=[1e-4]", "name=rates", "data.max_bad=0.1",
        f"data.train.uri={photos}", f"data.val.uri={photos}", f"root={tmp_path}", "ray.gpu=false",
        "ray.cpus_per_worker=1", "ray.worker_labels={pool: gpu}", "evaluate.images=8",
    ]  # fmt: skip
    log = tmp_path / "log.txt"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, str(REPO / "jobs" / "sweep.py"), *words],
            stdout=file, stderr=file, env=os.environ | {"RAY_ADDRESS": nodes.address},
        )  # fmt: skip
    try:
        wait_for(lambda: process.poll() is not None or len({*tmp_path.glob("trained/*/checkpoint-*")}) >= 1)
        (busy,) = wait_for(
            lambda: nodes.where("ray::RayTrainWorker") or (process.poll() is not None and {log.read_text()})
        )
        victims = nodes.kill(busy)
        assert any("RayTrainWorker" in title for title in victims)
        process.wait(400)
    finally:
        process.kill()
    assert process.returncode == 0, log.read_text()
    results = json.loads((tmp_path / "rates" / "results.json").read_text())
    assert [result["train_vae"]["optim"]["lr"] for result in results] == [1e-4]
    LiteVAE.from_pretrained(results[0]["model"])
    told = "".join(path.read_text() for path in tmp_path.glob("rates/rows/*/log.txt"))
    assert "continues after" in told + log.read_text()


def test_a_folder_that_nodes_do_not_share_is_refused(nodes, photos, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    address = nodes.add_apart(mine, cpus=1)
    words = [
        *TRAIN, f"data.train.uri={photos}", f"root={mine}", "name=run",
        "stages=[{resolution: 32, images: 16, batch_size: 8}]",
    ]  # fmt: skip
    environment = os.environ | {"RAY_ADDRESS": nodes.address}
    done = subprocess.run(
        [sys.executable, str(REPO / "jobs" / "train_vae.py"), *words],
        capture_output=True, text=True, env=environment, timeout=240,
    )  # fmt: skip
    assert done.returncode == 2, done.stdout + done.stderr
    assert f"error: root={mine} is not shared: node {address} of the cluster does not see" in done.stderr
    assert not any(mine.iterdir())

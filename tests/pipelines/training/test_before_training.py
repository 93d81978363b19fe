"""What is looked at before a training starts, and what becomes of a run that fails before it made anything."""

import csv
import io
import os
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray.train.torch
import torch
import yaml
from PIL import Image

from litevae import perceptual, weight_files
from litevae.errors import UserError
from litevae.images import ImageTransform
from pipelines.data import label_range
from pipelines.data.config import Source
from pipelines.data.open_source import open_source
from pipelines.experiments.config import Sweep
from pipelines.runtime import cluster
from pipelines.runtime.cli import load
from pipelines.training import first_look, images_look, launch, ldm, run_files, run_folder, vae
from pipelines.training.config import TrainLDM, TrainVAE
from tests.encoding import encoded_crops
from tests.in_process import up_to_the_workers
from tests.setups import leave_checkpoint, vae_setup

SMALL = [
    "model.encoder=S", "model.decoder.channels=[8, 8, 8, 8]", "model.decoder.layers=1", "loss.lpips.weight=0",
    "loss.adversarial.channels=2", "loop.precision=fp32", "ray.gpu=false", "tracking.enabled=false", "name=mine",
    "stages=[{resolution: 32, images: 32, batch_size: 4}]",
]  # fmt: skip
LDM = ["network=tiny", "batch_size=8", "images=24", "data.resolution=64", "tracking.enabled=false", "name=mine"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(cache, autoencoder, photos): 24 photos in two folders, whose labels are 0 and 1."""
    return encoded_crops(tmp_path_factory.mktemp("made"), rows_per_shard=10)


@pytest.fixture
def jobs(made, tmp_path):
    """train_vae and train_ldm up to Ray Train, which does `jobs.training(folder)`; the tests count Ray's starts."""
    with up_to_the_workers({"model": "there", "images": 24}) as noted, pytest.MonkeyPatch.context() as patch:
        found = SimpleNamespace(training=lambda folder: None, starts=0, noted=noted, root=tmp_path / "runs")
        place, done = cluster.start, launch.fit

        def start(*given):
            found.starts += 1
            return place(*given)

        def fit(worker, setup, *given):
            found.training(Path(setup.folder))
            return done(worker, setup, *given)

        def train_vae(*more):
            words = [*SMALL, f"data.train.uri={made[2]}", f"root={found.root}"]
            return vae.train_vae(load(TrainVAE, None, [*words, *more]))

        def train_ldm(*more):
            words = [*LDM, f"cache={made[0]}", f"root={found.root}"]
            return ldm.train_ldm(load(TrainLDM, None, [*words, *more]))

        patch.setattr(cluster, "start", start)
        patch.setattr(launch, "fit", fit)
        found.train_vae, found.train_ldm = train_vae, train_ldm
        yield found


def failing(log=False):
    """A training that fails at once, or after its first metrics."""

    def training(folder):
        (folder / "error.txt").write_text("an error")
        (folder / "checkpoint_manager_snapshot.json").write_text("{}")
        (folder / "metrics.jsonl").write_text('{"step": 8, "time": 1, "train/loss": 1}\n' * log)
        (folder / "images").mkdir(exist_ok=True)
        raise UserError("it failed")

    return training


# --- a run that made nothing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("job", "other"), [("train_vae", "data.resize=none"), ("train_ldm", "draw=mean")])
def test_a_run_that_fails_at_once_leaves_nothing(jobs, job, other, capsys):
    run, jobs.training = getattr(jobs, job), failing()
    with pytest.raises(UserError, match="it failed"):
        run()
    assert not jobs.root.exists()
    jobs.training = lambda folder: None
    run(other)
    assert jobs.noted.started[1] == {"resume": False}
    assert "begins anew" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("job", "others"),
    [
        ("train_vae", ["data.resize=none", "stages=[{resolution: 32, images: 8, batch_size: 4}]", "optim.lr=1e-5"]),
        ("train_ldm", ["classes=2", "images=16", "seed=1"]),
    ],
)
def test_another_config_takes_a_run_over_that_made_nothing(jobs, job, others, capsys):
    run, folder = getattr(jobs, job), jobs.root / "mine"
    for other in others:
        jobs.training = failing(log=True)
        with pytest.raises(UserError, match="it failed"):
            run()
        assert (folder / "metrics.jsonl").exists()  # what it has logged may tell why
        jobs.training = lambda folder: (folder / "model").mkdir()
        capsys.readouterr()
        run(other)
        assert jobs.noted.started[1] == {"resume": False}
        assert f"nothing was made in {folder} before; it begins anew with this config" in capsys.readouterr().out
        assert sorted(path.name for path in folder.iterdir()) == ["config.yaml", "model"]
        (folder / "model").rmdir()


@pytest.mark.parametrize("job", ["train_vae", "train_ldm"])
def test_the_same_command_goes_on_where_nothing_was_made(jobs, job, capsys):
    run, jobs.training = getattr(jobs, job), failing(log=True)
    for resumed in (False, True, True):
        with pytest.raises(UserError, match="it failed"):
            run()
        assert jobs.noted.started[1] == {"resume": resumed}
    assert "begins anew" not in capsys.readouterr().out


@pytest.mark.parametrize(("job", "other"), [("train_vae", "data.resize=none"), ("train_ldm", "draw=mean")])
def test_what_was_made_is_kept_and_its_config_too(jobs, job, other):
    run, folder = getattr(jobs, job), jobs.root / "mine"

    def training(folder):
        leave_checkpoint(folder)
        raise UserError("it failed")

    jobs.training = training
    with pytest.raises(UserError, match="it failed"):
        run()
    with pytest.raises(UserError, match="was started with another config; continue with that one"):
        run(other)
    assert jobs.starts == 1  # the second one was refused before
    assert {"config.yaml", "checkpoint-000000000008"} <= {path.name for path in folder.iterdir()}


def test_an_exported_model_is_something_made(tmp_path):
    run_folder.write_config(str(tmp_path), load(TrainVAE))
    assert run_folder.check_run(str(tmp_path), load(TrainVAE, None, ["seed=1"]), ()) == "void"
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="seed: was 0, is 1"):
        run_folder.check_run(str(tmp_path), load(TrainVAE, None, ["seed=1"]), ())


def test_taking_over_removes_only_what_a_run_leaves(tmp_path):
    run_folder.write_config(str(tmp_path), load(TrainVAE))
    (tmp_path / "images").mkdir()
    for name in ("notes.txt", "images/mine.png", "images/val-picture-000000000008.png", "stop", "error.txt"):
        (tmp_path / name).touch()
    assert not run_folder.open_run(str(tmp_path), load(TrainVAE, None, ["seed=1"]), ())
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert left == ["config.yaml", "images/mine.png", "notes.txt"]
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["seed"] == 1


def test_a_damaged_config_locks_nothing_where_nothing_was_made(tmp_path):
    (tmp_path / "config.yaml").write_text("- [")
    assert not run_folder.open_run(str(tmp_path), load(TrainVAE), ())
    (tmp_path / "config.yaml").write_text("- [")
    leave_checkpoint(tmp_path)
    with pytest.raises(UserError, match=r"config\.yaml is damaged"):
        run_folder.open_run(str(tmp_path), load(TrainVAE), ())


def test_a_sweep_that_made_nothing_locks_nothing(tmp_path):
    first, other = (load(Sweep, None, ["table=9", f"scale={scale}"]) for scale in ("small", "smoke"))
    given = (run_files.SWEPT, run_files.LEFT_BY_SWEEP)
    assert not run_folder.open_run(str(tmp_path), first, (), *given)
    for name in ("configs/a.yaml", "rows/a/log.txt", "tune/tuner.pkl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert not run_folder.open_run(str(tmp_path), other, (), *given)
    assert os.listdir(tmp_path) == ["config.yaml"]
    (tmp_path / "rows" / "a").mkdir(parents=True)
    (tmp_path / "rows" / "a" / "result.json").touch()
    assert run_folder.open_run(str(tmp_path), other, (), *given)
    with pytest.raises(UserError, match="scale: was 'smoke', is 'small'"):
        run_folder.open_run(str(tmp_path), first, (), *given)


# --- labels ---------------------------------------------------------------------------------------------------------


def online(made):
    return ["mode=online", f"vae={made[1]}", f"data.source.uri={made[2]}", "data.loaders=0"]


@pytest.mark.parametrize("of", ["cache", "images"])
def test_labels_are_compared_with_the_classes_before_ray_starts(jobs, made, of):
    words = online(made) if of == "images" else []
    with pytest.raises(UserError, match=r"holds labels up to 1, but classes=1 allows 0 to 0; give classes=2"):
        jobs.train_ldm(*words, "classes=1")
    assert (jobs.starts, jobs.root.exists()) == (0, False)
    jobs.train_ldm(*words, "classes=2")
    assert jobs.starts == 1


def table(labels, statistics=True):
    """A Parquet file's bytes, with a row group for two labels."""
    values = {"id": [str(n) for n in range(len(labels))], "image": [b"?"] * len(labels), "label": labels}
    file = io.BytesIO()
    schema = pa.schema([("id", pa.string()), ("image", pa.binary()), ("label", pa.int32())])
    pq.write_table(pa.table(values, schema), file, row_group_size=2, write_statistics=statistics)
    return file.getvalue()


def source_of(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    return open_source(Source(uri=str(tmp_path / name), columns=["label"]))


@pytest.mark.parametrize("statistics", [True, False])
def test_the_range_of_labels_in_parquet_files(tmp_path, statistics):
    source = source_of(tmp_path, "a.parquet", table([3, None, 185, 7, None, None], statistics))
    assert label_range.label_range(source, "label") == (0, 185)
    assert label_range.label_range(source_of(tmp_path, "b.parquet", table([-5, 9])), "label") == (-5, 9)
    files = [str(tmp_path / name) for name in ("a.parquet", "b.parquet")]
    assert label_range.range_in_files(files, "label") == (-5, 185)
    assert label_range.range_in_files([], "label") == (0, 0)
    os.truncate(files[0], 20)
    with pytest.raises(UserError, match=r"a\.parquet: not a readable Parquet file"):
        label_range.range_in_files(files, "label")


def test_the_range_of_labels_in_a_list(tmp_path):
    text = io.StringIO()
    csv.writer(text).writerows([["path", "label"], ["a.png", 4], ["b.png", 11]])
    source = source_of(tmp_path, "list.csv", text.getvalue().encode())
    assert label_range.label_range(source, "label") == (0, 11)
    with pytest.raises(UserError, match=r"up to 11, but classes=11 .* give classes=12"):
        images_look.check_labels(11, "label", source)
    images_look.check_labels(12, "label", source)
    images_look.check_labels(0, "label", source)


def test_negative_labels_are_refused(tmp_path):
    source = source_of(tmp_path, "a.parquet", table([-1, 3]))
    with pytest.raises(UserError, match=r"column 'label' of \S+ holds -1; classes are integers from 0 on"):
        images_look.check_labels(5, "label", source)


def png(color=0):
    file = io.BytesIO()
    Image.new("RGB", (40, 40), (color, 0, 0)).save(file, "png")
    return file.getvalue()


def test_labels_in_a_tar_are_those_of_the_images_that_were_looked_at(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for n in range(3):
            for name, data in ((f"{n}.png", png(n)), (f"{n}.cls", str(7 * n).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    source = open_source(Source(uri=str(tmp_path / "a.tar"), columns=["cls"]))
    assert label_range.label_range(source, "cls") is None
    items = images_look.check_images(source, ImageTransform(32), "data.source")
    with pytest.raises(UserError, match="up to 14, but classes=14"):
        images_look.check_labels(14, "cls", source, items)
    images_look.check_labels(15, "cls", source, items)


# --- images ---------------------------------------------------------------------------------------------------------


def photos_of(tmp_path, good, bad):
    for n in range(good + bad):
        (tmp_path / f"{n:03}.png").write_bytes(png(n) if n < good else b"\x89PNG broken")
    return tmp_path


@pytest.mark.parametrize("job", ["train_vae", "train_ldm"])
def test_a_training_of_images_of_which_none_can_be_read_is_refused_before_ray_starts(jobs, made, tmp_path, job):
    uri = photos_of(tmp_path, 0, 40)
    field = "data.train.uri" if job == "train_vae" else "data.source.uri"
    more = [] if job == "train_vae" else online(made)
    with pytest.raises(UserError, match=rf"{field}=\S+: none of 16 images, evenly spaced, can be read: 000\.png \("):
        getattr(jobs, job)(*more, f"{field}={uri}")
    assert (jobs.starts, jobs.root.exists()) == (0, False)


def test_some_unreadable_images_are_named(tmp_path, capsys):
    source = open_source(Source(uri=str(photos_of(tmp_path, 20, 20))))
    items = images_look.check_images(source, ImageTransform(32), "data.train")
    assert [item.id for item in items] == ["000.png", "003.png", "005.png", "008.png", "010.png", "013.png", "016.png",
                                           "018.png"]  # fmt: skip
    shown = capsys.readouterr().out
    assert "warning: 8 of 16 images, evenly spaced over" in shown
    assert shown.count(".png (") == 3
    assert "021.png (" in shown


def test_few_images_are_all_looked_at(tmp_path, capsys):
    source = open_source(Source(uri=str(photos_of(tmp_path, 3, 0))))
    capsys.readouterr()
    assert len(images_look.check_images(source, ImageTransform(32), "data.train")) == 3
    assert capsys.readouterr().out == ""


# --- room on the disk -----------------------------------------------------------------------------------------------


@pytest.fixture
def disk(monkeypatch):
    """Let every file system have so many bytes free: disk.free."""
    about = SimpleNamespace(free=0, blocks=1)
    fake = lambda folder: SimpleNamespace(f_blocks=about.blocks, f_frsize=1, f_bavail=about.free)  # noqa: E731
    monkeypatch.setattr(os, "statvfs", fake)
    return about


@pytest.mark.parametrize("job", ["train_vae", "train_ldm"])
def test_a_run_without_room_for_its_checkpoints_is_refused_before_ray_starts(jobs, disk, job):
    run = getattr(jobs, job)
    with pytest.raises(
        UserError,
        match=r"root: \S+/mine has room for 0\.0 MB, but about .* needed for 3 checkpoints \(loop\.keep=2, and",
    ):
        run()
    assert (jobs.starts, jobs.root.exists()) == (0, False)
    disk.blocks = 0  # a mounted store that does not tell
    run()
    disk.free, disk.blocks = 10**12, 1
    run()
    assert jobs.starts == 2


def test_how_much_room_is_needed(tmp_path, disk, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    loop, size = load(TrainVAE, None, ["loop.keep=3"]).loop, launch.CheckpointSize(10_000_000, 1_000_000)
    disk.free = 42_000_000
    launch.check_room(str(tmp_path), size, loop)
    disk.free -= 1
    with pytest.raises(UserError, match=r"but about 42\.0 MB are needed for 4 checkpoints .*; make room there"):
        launch.check_room(str(tmp_path), size, loop)
    leave_checkpoint(tmp_path)
    launch.check_room(str(tmp_path), size, loop)
    disk.free = 9_000_000
    with pytest.raises(UserError, match=r"3 checkpoints"):
        launch.check_room(str(tmp_path), size, loop)


@pytest.mark.parametrize("more", [[], ["loop.ema=0.9"], ["loss.adversarial.weight=0"], ["loss.adversarial.kind=patch"]])
def test_the_size_of_a_checkpoint_of_train_vae_is_estimated_well(made, tmp_path, monkeypatch, more):
    monkeypatch.setattr(ray.train.torch, "prepare_model", lambda model: model)
    config = load(TrainVAE, None, [*SMALL, f"data.train.uri={made[2]}", "loss.adversarial.start=0", *more])
    task = vae.VaeTask(config, vae_setup(open_source(config.data.train)), 0, 1, torch.device("cpu"))
    task.step(torch.zeros(4, 32, 32, 3, dtype=torch.uint8), 0)
    torch.save(task.state(), tmp_path / "state.pt")
    task.exports()["model"](tmp_path)
    size = vae._checkpoint_size(config, task.model)
    assert size.state == pytest.approx((tmp_path / "state.pt").stat().st_size, rel=0.1)
    written = (tmp_path / "diffusion_pytorch_model.safetensors").stat().st_size
    assert size.exported == pytest.approx(written, rel=0.05)


# --- LPIPS ----------------------------------------------------------------------------------------------------------

TERM = "loss.lpips.weight=1"


@pytest.fixture
def no_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch" / "hub" / "checkpoints"


def test_missing_lpips_weights_are_refused_with_four_ways_out(jobs, no_weights, capsys):
    with pytest.raises(UserError) as error:
        jobs.train_vae(TERM)
    told = str(error.value)
    assert str(no_weights / "vgg16-397923af.pth") in told
    for way in ("`make weights`", "loss.lpips.weights=FILE", "loss.lpips.weight=0", "loss.lpips.required=false"):
        assert way in told
    assert (jobs.starts, jobs.root.exists()) == (0, False)
    jobs.train_vae(TERM, "loss.lpips.required=false")
    assert jobs.noted.fitted[1].lpips is False
    assert "warning: loss.lpips is off" in capsys.readouterr().out
    jobs.train_vae("loss.lpips.weight=0", "name=other")


def test_a_run_without_lpips_goes_on_only_if_it_still_may(jobs, no_weights):
    jobs.train_vae(TERM, "loss.lpips.required=false")
    leave_checkpoint(jobs.root / "mine")
    with pytest.raises(UserError, match=r"loss\.lpips\.required=false"):
        jobs.train_vae(TERM)
    jobs.train_vae(TERM, "loss.lpips.required=false")
    assert jobs.noted.started[1] == {"resume": True}


def test_a_run_from_before_there_was_this_choice_goes_on_as_it_was(jobs, no_weights, capsys):
    jobs.train_vae(TERM, "loss.lpips.required=false")
    path = jobs.root / "mine" / "config.yaml"
    values = yaml.safe_load(path.read_text())
    del values["loss"]["lpips"]["required"]
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match=r"loss\.lpips\.required=false"):  # it made nothing: it begins anew
        jobs.train_vae(TERM)
    leave_checkpoint(path.parent)
    capsys.readouterr()
    jobs.train_vae(TERM)
    assert jobs.noted.started[1] == {"resume": True}
    assert "warning: loss.lpips is off" in capsys.readouterr().out


def test_weights_are_looked_for_where_the_loss_reads_them(monkeypatch, tmp_path):
    files = {net: backbone.file for net, backbone in perceptual.BACKBONES.items()}
    assert files == weight_files.LPIPS
    for name, value in (("TORCH_HOME", "a"), ("XDG_CACHE_HOME", "b"), ("HOME", "c")):
        for other in ("TORCH_HOME", "XDG_CACHE_HOME"):
            monkeypatch.delenv(other, raising=False)
        monkeypatch.setenv(name, str(tmp_path / value))
        known = Path(torch.hub.get_dir()) / "checkpoints" / "x.pth"
        assert weight_files.in_hub("x.pth") == known
        with monkeypatch.context() as patch:
            patch.delitem(__import__("sys").modules, "torch")
            assert weight_files.in_hub("x.pth") == known


def test_features_need_a_file():
    with pytest.raises(UserError, match=r"needs the network's weights: loss\.features\.weights=FILE"):
        first_look.check_weights(load(TrainVAE, None, ["loss.lpips.weight=0", "loss.features.weight=1"]), "/nowhere")

"""sample: the same image from the same seed, whoever draws it, however many there are, and whatever is killed."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import load_dataset
from PIL import Image

from litevae import storage
from litevae.autoencoder import LiteVAE
from litevae.denoiser import build_denoiser
from litevae.diffusion import Objective
from litevae.errors import UserError
from litevae.images import to_uint8
from litevae.ldm import LDM, NormalizedAutoencoder, ldm_fingerprint, load_ldm, save_ldm
from pipelines.data.config import Source
from pipelines.data.open_source import open_source
from pipelines.evaluation import sample as module
from pipelines.evaluation.config import Sample
from pipelines.evaluation.sample import sample
from pipelines.runtime.cli import main
from pipelines.runtime.schema import validate
from tests.in_process import in_process
from tests.killing import kill_driver

JOB = Path(__file__).parents[3] / "jobs" / "sample.py"


def make_ldm(poison: bool = False, classes: int = 0, objective: Objective | None = None, seed: int = 0) -> LDM:
    torch.manual_seed(seed)
    unet = build_denoiser("tiny", 4, 8, classes)
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    if classes:
        torch.nn.init.normal_(unet.class_embedding.weight, std=3)  # so that another class is another image ...
        torch.nn.init.normal_(unet.conv_out.weight, std=0.5)  # ... by more than a level or two
    if poison:
        torch.nn.init.constant_(unet.conv_out.bias, float("nan"))
    vae = LiteVAE.from_preset("S", latent_channels=4, block_out_channels=(32, 32, 32, 32), layers_per_block=1)
    scheduler = (objective or Objective()).scheduler()
    return LDM(unet, scheduler, NormalizedAutoencoder.of(vae, torch.zeros(4), torch.ones(4)), classes)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_ldm(folder, make_ldm())
    return folder


@pytest.fixture(scope="module")
def by_class(tmp_path_factory):
    folder = tmp_path_factory.mktemp("by_class")
    save_ldm(folder, make_ldm(classes=3, objective=Objective("flow")))
    return folder


def values(model, out, root) -> dict:
    return {
        "model": str(model),
        "out": str(out),
        "root": str(root),
        "images": 5,
        "batch_size": 4,
        "steps": 4,
        "seed": 11,
        "precision": "fp32",
        "tracking": {"enabled": False},
        "ray": {"gpu": False, "cpus_per_worker": 1},
    }


def config(model, out, /, **more) -> Sample:
    return validate(Sample, values(model, out, Path(model).parent / "runs") | more)


def pixels(folder, count: int) -> np.ndarray:
    return np.stack([np.asarray(Image.open(folder / "png" / f"{number:06}.png")) for number in range(count)])


def files(folder) -> dict[str, bytes]:
    """What a job leaves, but for what tells times."""
    found = {str(path.relative_to(folder)): path for path in Path(folder).rglob("*") if path.is_file()}
    return {
        name: path.read_bytes()
        for name, path in sorted(found.items())
        if not path.name.startswith((".tmp-", "samples", "metrics"))
    }


def stamps(folder) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in Path(folder).glob("[!.]*")}


def about(folder) -> dict:
    return json.loads((folder / "samples.json").read_text())


@pytest.fixture(scope="module")
def five(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("five")
    with in_process():
        sample(config(model, out, eta=1.0))
    return out


# --- what is drawn


def test_images_are_those_of_their_seeds(five, model):
    ldm = load_ldm(model)
    expected = torch.cat([ldm.sample([(11, n)], steps=4, eta=1.0) for n in range(5)])
    got = pixels(five, 5)
    assert got.shape == (5, 64, 64, 3)
    assert np.abs(got.astype(int) - to_uint8(expected)).max() <= 1  # batches of 1 and of 4 sum in another order
    assert len(np.unique(got, axis=0)) == 5
    grid = np.asarray(Image.open(five / "grid.png"))
    assert grid.shape == (2 + 66, 2 + 5 * 66, 3)
    assert np.array_equal(grid[2:66, 2 + 66 : 2 + 66 + 64], got[1])
    told = {"sampler": "ddim", "steps": 4, "eta": 1.0, "seed": 11, "guidance": 1.0, "classes": [], "batch_size": 4}
    told |= {"images": 5, "drawn": 5, "format": "png", "fingerprint": ldm_fingerprint(model), "model": str(model)}
    assert told.items() <= about(five).items()
    assert about(five)["images_per_s"] > 0
    assert sorted(os.listdir(five / "png")) == [f"{n:06}.png" for n in range(5)]  # a source of images, of nothing else


@pytest.mark.usefixtures("wherever")
def test_more_images_and_workers_change_no_bit(five, model, tmp_path):
    ray = {"gpu": False, "cpus_per_worker": 1, "workers": 2}
    summary = sample(config(model, tmp_path, images=11, ray=ray, eta=1.0))
    assert summary["images"] == 11
    for number in range(5):
        name = f"png/{number:06}.png"
        assert (tmp_path / name).read_bytes() == (five / name).read_bytes()
    assert len(np.unique(pixels(tmp_path, 11), axis=0)) == 11
    with pytest.raises(UserError, match=r"holds more images than images=10, e\.g\. in 000010\.png"):
        sample(config(model, tmp_path, images=10, eta=1.0))


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(
    ("chosen", "sampler", "guidance", "labels"),
    [([], "auto", 1.0, [0, 1, 2, 0, 1]), ([2, 0], "heun", 3.0, [2, 0, 2, 0, 2]), ([1000], "dpm++", 1.0, [1000] * 5)],
)
def test_classes_come_in_turn(by_class, tmp_path, chosen, sampler, guidance, labels):
    sample(config(by_class, tmp_path, classes=chosen, sampler=sampler, guidance=guidance))
    name = sampler.replace("auto", "euler")
    ldm, seeds = load_ldm(by_class), [(11, n) for n in range(5)]

    def drawn(labels, guidance):
        return to_uint8(ldm.sample(seeds, steps=4, sampler=name, labels=labels, guidance=guidance)).astype(int)

    expected = drawn(labels, guidance)
    assert np.abs(pixels(tmp_path, 5) - expected).max() <= 1
    others = [drawn([(label + 1) % 3 for label in labels], guidance)]  # of the next class: each is another image
    others += [drawn(labels, 1.0)] if guidance != 1 else []
    for other in others:
        assert np.abs(other - expected).max(axis=(1, 2, 3)).min() > 5
    assert about(tmp_path)["sampler"] == name
    assert about(tmp_path)["classes"] == (chosen or [0, 1, 2])


def test_mistakes_are_refused_with_nothing_written(model, by_class, tmp_path, capsys):
    def refused(match: str, model=model, **more) -> None:
        with pytest.raises(UserError, match=match):
            sample(config(model, tmp_path / "out", **more))

    with pytest.raises(UserError, match="model is empty"):
        sample(validate(Sample, {"model": "", "out": str(tmp_path / "out")}))
    refused("nowhere does not exist; models are folders on disk", model=str(tmp_path / "nowhere"))
    refused("no latent diffusion model", model=str(model / "vqvae"))
    refused("take 2 or 4", steps=3)
    refused("a model of epsilon; choose one of ddim, dpm", sampler="heun")
    refused("eta=0.5 works only with sampler=ddim", by_class, eta=0.5)
    refused("is unconditional", classes=[1])
    refused("is unconditional", guidance=2)
    refused("class 3 does not exist: the model knows 0 to 2", by_class, classes=[0, 3])
    assert not (tmp_path / "out").exists()
    assert main(Sample, sample, ["model=nowhere", "images=2"]) == 2
    assert capsys.readouterr().err.startswith("error: model=nowhere does not exist; models are folders")


@pytest.mark.usefixtures("in_process")
def test_a_diverged_model_stops_it(tmp_path):
    save_ldm(tmp_path / "model", make_ldm(poison=True))
    with pytest.raises(UserError, match="NaN or infinite pixels: its training has diverged"):
        sample(config(tmp_path / "model", tmp_path / "out", images=1, batch_size=1))
    assert not (tmp_path / "out/png").exists()


# --- a worker


class Drawn:
    """A model whose images are what it was asked for: seed, number, label, guidance."""

    def __init__(self):
        self.asked = []

    def to(self, device):
        return self

    def sample(self, seeds, **options):
        self.asked.append((seeds, options))
        colour = [[seed, number, label] for (seed, number), label in zip(seeds, options["labels"], strict=True)]
        return (torch.tensor(colour).float() / 127.5 - 1)[:, :, None, None].expand(-1, -1, 8, 8)


def test_a_worker_gives_the_model_all_that_decides_on_an_image(monkeypatch, tmp_path):
    model = Drawn()
    monkeypatch.setattr(module, "load_ldm", lambda folder: model)
    monkeypatch.setattr(module, "ldm_fingerprint", lambda folder: "print")
    cfg = config(tmp_path, tmp_path, classes=[7, 5, 2], guidance=2.5, sampler="heun", eta=0.25)
    worker = module.Sampler(cfg, module.cluster.Placement(workers=1, gpu=False, threads=1), "print")
    images = [np.asarray(Image.open(io.BytesIO(data))) for data in worker.draw(range(4, 8))]
    assert [image[0, 0].tolist() for image in images] == [[11, 4, 5], [11, 5, 2], [11, 6, 7], [11, 7, 5]]
    assert images[0].shape == (8, 8, 3)
    options = {"steps": 4, "sampler": "heun", "eta": 0.25, "labels": [5, 2, 7, 5], "guidance": 2.5}
    assert model.asked == [([(11, 4), (11, 5), (11, 6), (11, 7)], options)]
    with pytest.raises(UserError, match="is not the same model here as where the job was started"):
        module.Sampler(cfg, module.cluster.Placement(workers=1, gpu=False, threads=1), "another")


@pytest.mark.parametrize(
    ("form", "names", "numbers"),
    [
        ("png", ["000000.png", "000001.png", "000002.png"], [[0], [1], [2]]),
        ("parquet", ["part-000000.parquet", "part-000001.parquet"], [[0, 1], [2]]),
    ],
)
def test_files_of_a_job(tmp_path, form, names, numbers):
    pieces = module._pieces(config(tmp_path, tmp_path, images=3, format=form, shard=2), "out")
    assert [piece.path for piece in pieces] == [f"out/{form}/{name}" for name in names]
    assert [[*piece.numbers] for piece in pieces] == numbers


@pytest.mark.parametrize("form", ["png", "parquet"])
def test_batches_are_whole_and_files_written_as_they_are_complete(tmp_path, monkeypatch, form):
    """Of 11 images in batches of 4 and files of 3; the first and the last file are there already."""
    cfg = config(tmp_path, tmp_path, images=11, batch_size=4, format=form, shard=3)
    written, drawn, shown = [], [], []
    monkeypatch.setattr(
        module, "_file", lambda cfg, piece, held: (written.append((len(drawn), [*piece.numbers])), held)[1]
    )
    monkeypatch.setattr(storage, "put", lambda path, data: shown.append((os.path.basename(path), sorted(data))))

    def spread(actors, call, batches):
        assert actors == ["actor"]
        for batch in batches:
            drawn.append([*batch])
            yield [b"%d" % number for number in batch]

    monkeypatch.setattr(module, "spread", spread)
    pieces = module._pieces(cfg, "out")
    module._draw(cfg, ["actor"], pieces[1:-1])
    if form == "parquet":
        assert drawn == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
        assert written == [(2, [3, 4, 5]), (3, [6, 7, 8])]
        assert [name for name, _ in shown] == ["part-000001.parquet", "part-000002.parquet"]
        assert [data[0] for _, data in shown] == [3, 6]  # what no file needs any more is let go
    else:
        assert drawn == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
        assert written == [(1 + number // 4, [number]) for number in range(1, 10)]
    drawn.clear()
    module._draw(cfg, ["actor"], pieces[-1:])
    assert drawn == [[8, 9, 10, 11]]


# --- Parquet


@pytest.fixture(scope="module")
def parts(by_class, tmp_path_factory):
    out = tmp_path_factory.mktemp("parts")
    with in_process():
        sample(config(by_class, out, images=11, format="parquet", shard=3))
    return out


@pytest.mark.usefixtures("in_process")
def test_parquet_holds_the_same_images(parts, by_class, tmp_path):
    sample(config(by_class, tmp_path, images=11))
    same = [(tmp_path / "png" / f"{n:06}.png").read_bytes() for n in range(11)]
    assert sorted(os.listdir(parts / "parquet")) == [f"part-{n:06}.parquet" for n in range(4)]
    assert [pq.read_metadata(path).num_rows for path in sorted((parts / "parquet").iterdir())] == [3, 3, 3, 2]
    rows = pq.read_table(parts / "parquet").to_pydict()
    assert rows == {
        "id": [f"{n:06}" for n in range(11)],
        "image": [{"bytes": data, "path": f"{n:06}.png"} for n, data in enumerate(same)],
        "label": [n % 3 for n in range(11)],
        "seed": [11] * 11,
        "number": [*range(11)],
    }
    assert (parts / "grid.png").read_bytes() == (tmp_path / "grid.png").read_bytes()


def test_parquet_is_a_source_for_us_and_for_datasets(parts, tmp_path):
    source = open_source(Source(uri=f"{parts}/parquet", columns=["label"]))
    rows = pq.read_table(parts / "parquet").to_pydict()
    assert source.ids(0, source.units) == rows["id"]
    assert [source.read(n).data for n in range(11)] == [image["bytes"] for image in rows["image"]]
    assert [source.columns(n)["label"] for n in range(11)] == rows["label"]
    loaded = load_dataset("parquet", data_files=f"{parts}/parquet/*.parquet", cache_dir=str(tmp_path), split="train")
    assert loaded["label"][:] == rows["label"]
    assert np.array_equal(np.asarray(loaded[4]["image"]), np.asarray(Image.open(parts / "grid.png"))[2:66, 266:330])


@pytest.mark.usefixtures("in_process")
def test_without_classes_labels_are_null(model, tmp_path):
    sample(config(model, tmp_path, images=2, format="parquet"))
    table = pq.read_table(tmp_path / "parquet")
    assert table.schema.field("label").type == "int64"
    assert table["label"].to_pylist() == [None, None]


# --- going on


@pytest.mark.usefixtures("in_process")
def test_it_goes_on_with_what_is_missing(five, model, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    sample(config(model, out, eta=1.0))
    kept, before = stamps(out / "png"), files(out)
    (out / "png/000002.png").unlink()
    (out / "grid.png").unlink()
    summary = sample(config(model, out, eta=1.0))
    assert (summary["drawn"], summary["images"]) == (1, 5)
    assert files(out) == before == files(five)
    now = stamps(out / "png")
    assert now.pop("000002.png") != kept.pop("000002.png")
    assert now == kept

    monkeypatch.setattr(module, "pool", lambda *_: pytest.fail("nothing is to be drawn"))
    assert sample(config(model, out, eta=1.0))["images_per_s"] == 0
    assert "5 images, 5 of them drawn before" in capsys.readouterr().out


@pytest.mark.usefixtures("in_process")
def test_more_images_are_added(five, model, parts, by_class, tmp_path):
    out = tmp_path / "png"
    sample(config(model, out, images=3, eta=1.0))
    kept = stamps(out / "png")
    assert sample(config(model, out, images=5, eta=1.0))["drawn"] == 2
    assert files(out) == files(five)
    assert kept.items() <= stamps(out / "png").items()

    out = tmp_path / "parquet"
    sample(config(by_class, out, images=4, format="parquet", shard=3))
    kept = stamps(out / "parquet")
    summary = sample(config(by_class, out, images=11, format="parquet", shard=3))
    assert summary["drawn"] == 8  # the second part had one image
    assert files(out) == files(parts)
    assert kept["part-000000.parquet"] == stamps(out / "parquet")["part-000000.parquet"]
    for images in (4, 10):
        with pytest.raises(UserError, match=f"holds more images than images={images}, "):
            sample(config(by_class, out, images=images, format="parquet", shard=3))


def test_another_job_is_refused_with_what_differs(five, model, tmp_path):
    save_ldm(tmp_path / "other", make_ldm(seed=1))
    before = files(five)
    for more, line in (
        ({"seed": 12}, "seed: 11 there, 12 asked for"),
        ({"steps": 5}, "steps: 4 there, 5 asked for"),
        ({"eta": 0.5}, "eta: 1.0 there, 0.5 asked for"),
        ({"eta": 0, "sampler": "dpm++"}, r"sampler: ddim there, dpm\+\+ asked for"),
        ({"batch_size": 5}, "batch_size: 4 there, 5 asked for"),
        ({"precision": "bf16"}, "precision: fp32 there, bf16 asked for"),
        ({"format": "parquet"}, "format: png there, parquet asked for"),
        ({"model": str(tmp_path / "other")}, f"model: {ldm_fingerprint(model)} there"),
    ):
        with pytest.raises(UserError, match=f"images that were drawn with other settings.*\n(.*\n)*  {line}"):
            sample(config(model, five, **({"eta": 1.0} | more)))
    assert files(five) == before
    (tmp_path / "out/png").mkdir(parents=True)
    (tmp_path / "out/png/000000.png").write_bytes(b"someone's")
    with pytest.raises(UserError, match=r"images but no sampling\.json"):
        sample(config(model, tmp_path / "out"))


# --- kills


LONGER = {"images": 48, "steps": 20}


def start(model, out, root, more: dict) -> subprocess.Popen:
    given = {name: value for name, value in values(model, out, root).items() if not isinstance(value, dict)}
    words = [f"{name}={value}" for name, value in (given | LONGER | more).items()]
    words += ["tracking.enabled=false", "ray.gpu=false", "ray.cpus_per_worker=1"]
    with open(f"{out}.log", "a") as log:
        return subprocess.Popen([sys.executable, str(JOB), *words], stdout=log, stderr=log)


def wait_for(condition, process: subprocess.Popen, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing was drawn"
        assert process.poll() is None, "the job ended before"
        time.sleep(0.005)


@pytest.mark.chaos
def test_a_killed_job_goes_on(model, tmp_path):
    more, each = {"format": "parquet", "shard": 6}, 6  # images a file
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    with in_process():
        sample(config(model, whole, **(LONGER | more)))
    folder = killed / "parquet"
    process = start(model, killed, tmp_path, more)
    wait_for(lambda: len(storage.names(str(folder))) >= 3, process)
    kill_driver(process)
    kept = stamps(folder)
    count = len(stamps(whole / "parquet"))
    assert 3 <= len(kept) < count
    assert not (killed / "samples.json").exists()
    with in_process():
        sample(config(model, killed, **(LONGER | more)))
    assert files(killed) == files(whole)
    assert kept.items() <= stamps(folder).items()
    assert about(killed)["drawn"] == 48 - len(kept) * each


@pytest.mark.chaos
def test_killed_workers_are_replaced(model, five, tmp_path, monkeypatch):
    """Both, with SIGKILL, each as soon as a certain image has been written."""
    import ray

    real, put, actors = module.pool, storage.put, []

    def processes():
        return ray.get([actor.__ray_call__.remote(lambda _: os.getpid()) for actor in actors])

    def pool(*arguments):
        actors.extend(real(*arguments))
        killed.update(zip(("000000.png", "000009.png"), processes(), strict=True))
        return actors

    def put_and_kill(path, data):
        put(path, data)
        if process := killed.get(os.path.basename(path)):
            os.kill(process, signal.SIGKILL)

    killed: dict[str, int] = {}
    monkeypatch.setattr(module, "pool", pool)
    monkeypatch.setattr(storage, "put", put_and_kill)
    two = {"gpu": False, "cpus_per_worker": 1, "workers": 2}
    sample(config(model, tmp_path, images=19, ray=two, eta=1.0))
    assert len(killed) == 2
    assert not {*killed.values()} & {*processes()}
    for number in range(5):
        name = f"png/{number:06}.png"
        assert (tmp_path / name).read_bytes() == (five / name).read_bytes()
    assert len(np.unique(pixels(tmp_path, 19), axis=0)) == 19


# --- S3


@pytest.mark.slow
@pytest.mark.usefixtures("in_process")
def test_s3(five, model, s3, tmp_path):
    out = f"{s3}/drawn"
    sample(config(model, out, images=3, eta=1.0, root=str(tmp_path)))
    summary = sample(config(model, out, eta=1.0, root=str(tmp_path)))
    assert summary["drawn"] == 2
    names = {name for name, _ in storage.walk(out)}
    assert names == {*(f"png/{n:06}.png" for n in range(5)), "grid.png", "sampling.json", "samples.json"}
    for name, data in files(five).items():
        if not name.startswith("images/"):
            assert storage.read(f"{out}/{name}") == data
    assert (tmp_path / "drawn" / "metrics.jsonl").is_file()
    with pytest.raises(UserError, match="holds more images than images=4"):
        sample(config(model, out, images=4, eta=1.0, root=str(tmp_path)))

"""Sweeps: what is trained for a table or a space; tables end to end; kills, asha, optuna, pbt."""

import json
import math
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import mlflow
import pytest
import skimage.data
import torch
from PIL import Image
from ray.util.queue import Queue

from litevae.any_autoencoder import load_autoencoder
from litevae.errors import UserError
from pipelines.experiments import paper, run_trial, search_space, sweep, trials
from pipelines.experiments.config import Sweep
from pipelines.experiments.trials import (
    RESULT,
    TRAINED,
    SweepSetup,
    Trial,
    _listed,
    load_network,
    trials_of_space,
    trials_of_table,
)
from pipelines.runtime.cli import load, main
from pipelines.runtime.schema import validate
from pipelines.training.config import TrainVAE
from tests.in_process import in_process
from tests.killing import kill_driver
from tests.networks import save_squeezenet, save_vgg19

REPO = Path(__file__).resolve().parents[3]
ALONE = ["ray.gpu=false", "ray.cpus_per_worker=1"]  # two threads wait for each other where another test has a core
TINY = [  # of a space: seconds a training
    "train_vae.model.encoder=S", "train_vae.model.decoder.channels=[8,8,8,8]", "train_vae.model.decoder.layers=1",
    "train_vae.loss.lpips.weight=0", "train_vae.loss.adversarial.weight=0", "train_vae.loop.precision=fp32",
    "train_vae.stages=[{resolution: 32, images: 32, batch_size: 8}]", "train_vae.val_images=4", *ALONE,
]  # fmt: skip


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Two folders of 24 and 12 crops of 72 px."""
    root = tmp_path_factory.mktemp("photos")
    for folder, image, count in (("train", skimage.data.astronaut(), 24), ("val", skimage.data.coffee(), 12)):
        (root / folder).mkdir()
        for n in range(count):
            top, left = 50 * (n // 6), 60 * (n % 6)
            Image.fromarray(image[top : top + 72, left : left + 72]).save(root / folder / f"{n:02}.png")
    return root


def configured(photos, root, *more) -> Sweep:
    where = [f"root={root}", f"data.train.uri={photos}/train", f"data.val.uri={photos}/val"]
    return load(Sweep, None, [*where, *more])


def prepared(photos, root, *more) -> list[Trial]:
    """The trials, without running them."""
    cfg = configured(photos, root, *more)
    if cfg.table:
        return trials_of_table(cfg, paper.table(cfg.table), str(root))[0]
    return trials_of_space(cfg, str(root))


# --- what is trained -----------------------------------------------------------------------------------------------


def test_rows_of_one_training_share_it(photos, tmp_path):
    trials = prepared(photos, tmp_path, "table=1", "scale=smoke")
    assert {len(each.rows) for each in trials} == {1, 2}  # FFHQ and ImageNet are the same photos here
    assert sum(len(each.rows) for each in trials) == 12
    of_9 = prepared(photos, tmp_path, "table=9", "scale=smoke", "rows=[Baseline]")
    of_16 = prepared(photos, tmp_path, "table=16", "scale=smoke", "rows=[Hinge]")
    assert of_9[0].train["name"] == of_16[0].train["name"]  # and tables share them, too


def test_fields_of_data_can_be_varied(photos, tmp_path):
    trials = prepared(photos, tmp_path, *TINY, "space.data.flip=[true, false]")
    assert [each.train["data"]["flip"] for each in trials] == [True, False]
    assert len({each.train["name"] for each in trials}) == 2


def test_a_point_that_is_drawn_twice_is_trained_once(photos, tmp_path):
    trials = prepared(photos, tmp_path, *TINY, "space.optim.lr=[1e-4, 1e-3]", "search=random", "trials=10")
    assert len(trials) == 2
    assert [len(each.rows) for each in trials] == [1, 1]


def test_other_images_are_another_training(photos, tmp_path):
    import shutil

    copy = shutil.copytree(photos, tmp_path / "copy")
    names = []
    for _ in range(2):
        _listed.cache_clear()
        names.append(prepared(copy, tmp_path, "table=9", "scale=smoke", "rows=[Baseline]")[0].train["name"])
        shutil.copyfile(copy / "train" / "00.png", copy / "train" / "one-more.png")
    assert names[0] != names[1]


def test_lpips_without_weights_is_another_training(photos, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    load_network.cache_clear()
    words = ["table=9", "scale=smoke", "rows=[Baseline]"]
    off = prepared(photos, tmp_path, *words)[0].train
    assert off["loss"]["lpips"]["weight"] == 0
    same = prepared(photos, tmp_path, *words, "train_vae.loss.lpips.weight=0")[0].train
    assert same["name"] == off["name"]


def test_lpips_without_weights_is_refused_unless_the_trainings_may_do_without(photos, tmp_path, monkeypatch):
    """Only scale=smoke, which is to run on any machine, says so by itself."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    load_network.cache_clear()
    for words in (["table=9", "rows=[Baseline]"], ["space.optim.lr=[1e-4]"]):
        with pytest.raises(UserError) as error:
            prepared(photos, tmp_path, *words)
        told = str(error.value)
        assert "vgg16-397923af.pth does not exist" in told
        for way in ("`make weights`", "train_vae.loss.lpips.weights=FILE", "train_vae.loss.lpips.required=false"):
            assert way in told
        off = prepared(photos, tmp_path, *words, "train_vae.loss.lpips.required=false")
        assert {each.train["loss"]["lpips"]["weight"] for each in off} == {0}


def test_the_best_is_the_best_mean_over_seeds():
    def result(row, value):
        return {"row": row, "metrics": {"psnr": value}}

    results = [
        result("broken", float("nan")),
        result("lucky", 9),
        result("lucky", 1),
        result("good", 6),
        result("good", 7),
    ]
    assert sweep._best(results, "psnr") == result("good", 6)
    assert sweep._best(results[:1], "psnr") is None


def test_values_that_pbt_moves_stay_in_their_ranges():
    fields = {"a": {"loguniform": [1e-4, 1e-2]}, "b": {"randint": [4, 6]}, "c": ["group", "smc"]}
    moved = search_space.within({"a": 0.012, "b": 3.2, "c": "smc", "seed": 0}, fields)
    assert moved == {"a": 1e-2, "b": 4, "c": "smc", "seed": 0}


@pytest.mark.parametrize("more", ["seeds=[1]", "data.flip=false", "train_vae.optim.lr=1e-3", "scale=small"])
def test_another_training_has_another_name(photos, tmp_path, more):
    words = ["table=9", "scale=smoke", "rows=[Baseline]", "train_vae.loss.lpips.weight=0"]
    first, other = (prepared(photos, tmp_path, *words, *each) for each in ([], [more]))
    assert first[0].train["name"] != other[0].train["name"]


def test_where_it_runs_does_not_matter_to_its_name(photos, tmp_path):
    first = prepared(photos, tmp_path, "table=9", "scale=smoke", "rows=[Baseline]")
    other = prepared(photos, tmp_path / "elsewhere", "table=9", "scale=smoke", "rows=[Baseline]", "ray.gpu=false")
    assert first[0].train["name"] == other[0].train["name"]


def test_a_grid_is_every_combination_with_every_seed(photos, tmp_path):
    space = "space={loss.wavelet.weight: [0, 1], optim.lr: [1e-4, 3e-4, 1e-3]}"
    trials = prepared(photos, tmp_path, *TINY, space, "seeds=[0, 1]")
    found = Counter((t.train["loss"]["wavelet"]["weight"], t.train["optim"]["lr"], t.train["seed"]) for t in trials)
    assert len(found) == 12
    assert {*found.values()} == {1}
    assert trials[0].rows[0].name == "loss.wavelet.weight=0, optim.lr=0.0001"
    assert {row.jobs["evaluate"]["transform"]["resolution"] for each in trials for row in each.rows} == {32}


def test_random_points_are_in_range_and_the_same_again(photos, tmp_path):
    space = ["space.optim.lr.loguniform=[1e-5, 1e-2]", "space.model.latent_channels.randint=[4, 6]", "search=random"]
    draws = [prepared(photos, tmp_path, *TINY, *space, "trials=40") for _ in range(2)]
    assert draws[0] == draws[1]
    rates = sorted(each.train["optim"]["lr"] for each in draws[0])
    assert 1e-5 <= rates[0] < 1e-4 < 1e-3 < rates[-1] <= 1e-2  # log-uniform: low ones are as likely
    assert {each.train["model"]["latent_channels"] for each in draws[0]} == {4, 5, 6}


def test_a_row_whose_weights_are_missing_is_left_out_with_the_reason(photos, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    load_network.cache_clear()
    weights = f"train_vae.loss.esrgan.weights={save_vgg19(tmp_path / 'vgg19.pth')}"
    cfg = configured(photos, tmp_path, "table=14", "scale=smoke", weights)
    trials, left_out = trials_of_table(cfg, paper.table("14"), str(tmp_path))
    assert [row.name for each in trials for row in each.rows] == ["ESRGAN"]
    assert [*left_out] == ["LPIPS"]
    assert "train_vae.loss.lpips.weights=FILE" in left_out["LPIPS"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "give either table="),
        (["table=9", "space.optim.lr=[1]"], "give either table="),
        (["table=99"], "table=99 does not exist; there are 1, 2a"),
        (["table=9", "rows=[Nothing]"], "table 9 has no 'Nothing'"),
        (["table=9", "scheduler=asha"], "search and scheduler need space"),
        (["table=9", "data.val.uri="], r"data\.val\.uri=\.\.\."),
        (["space.optim.lr.uniform=[1e-3, 1e-4]"], r"space\.optim\.lr: uniform takes \[smallest, largest\]"),
        (["space.optim.lr.loguniform=[0, 1]", "search=random"], "numbers above 0"),
        (["space.optim.lr.uniform=[1e-4, 1e-3]"], "is a distribution: set search=random"),
        (["space.optim.lr=fast"], "neither a list of values nor one of"),
        (["space.optim.lrr=[1]"], r"unknown config key 'optim\.lrr'"),
        (["space.model.encoder=[S, XL]", "train_vae.loss.lpips.weight=0"], r"model\.encoder: .*'XL'"),
        (["space.optim.lr.choice=5", "search=random"], "choice takes a list of values"),
        (["space.seed=[0, 1]"], r"space\.seed is set by the sweep; set the sweep's seeds"),
        (["table=9", "train_vae.data.train.uri=x"], r"train_vae\.data\.train\.uri is set by the sweep"),
        (["space.loop.keep=[1, 2]", "scheduler=asha"], r"space\.loop\.keep is set by the sweep \(from `every`\)"),
        (["space.optim.lr=[1]", "search=optuna", "seeds=[0, 1]"], "optuna and pbt need exactly one seed"),
        (["table=9", "evaluate.images=1000"], r"evaluate\.images=1000, but .*has 12"),
        (["table=9", "evaluate.squeezenet=nowhere.pth"], "no weights file at nowhere.pth"),
        (["table=9", "train_vae.optim.lrr=1"], r"unknown config key 'optim\.lrr'"),
        (["table=9", "evaluate.imagess=1"], r"unknown config key 'imagess'; did you mean images=1\?"),
    ],
)
def test_mistakes_are_told_before_anything_runs(photos, tmp_path, more, message, capsys):
    words = [f"root={tmp_path}", f"data.train.uri={photos}/train", f"data.val.uri={photos}/val", *more]
    assert main(Sweep, sweep.sweep, words) == 2
    error = capsys.readouterr().err
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(error)
    assert error.count("\n") == 1
    assert not any(tmp_path.iterdir())


# --- end to end ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random ones: nobody looks at the numbers."""
    folder = tmp_path_factory.mktemp("weights")
    save_vgg19(folder / "vgg19.pth")
    squeezenet = save_squeezenet(folder / "squeezenet.pth")
    return [
        f"train_vae.loss.esrgan.weights={folder}/vgg19.pth",
        f"evaluate.squeezenet={squeezenet}",
        f"evaluate_samples.squeezenet={squeezenet}",
    ]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


def runs_of(root, name) -> tuple[mlflow.entities.Run, list[mlflow.entities.Run]]:
    """A sweep's run and its rows'."""
    client = mlflow.MlflowClient(f"sqlite:///{root}/mlflow.db")
    found = client.search_runs([client.get_experiment_by_name("litevae").experiment_id])
    rows = [run for run in found if run.data.tags.get("litevae.sweep") == name]
    (parent,) = {run.data.tags["mlflow.parentRunId"] for run in rows}
    return client.get_run(parent), rows


# A table of two kinds, for CI's hour. The configs of all rows of all are made in test_paper.py; every system takes a
# step in test_train_vae.py.
KINDS = {
    "3": ["LiteVAE-M"],  # what encoders cost: nothing is trained
    "7": ["FFHQ: LiteVAE"],  # with a diffusion model
}


def _in_this_process(cfg, trials, placement, run, folder):
    """Instead of Tune, which other tests have: trials one after another, with Ray Train's workers, and no others."""
    setup = SweepSetup(
        cfg.model_dump(mode="json"), trials, run.run_id, folder, ray=cfg.ray.model_dump(mode="json"), cwd=""
    )
    with in_process():
        for each in trials:
            run_trial._work(each, setup, Queue())
    return []


@pytest.mark.parametrize(
    "table", [pytest.param("3", marks=pytest.mark.slow), pytest.param("7", marks=pytest.mark.chaos)]
)
def test_tables_of_the_paper_run(photos, root, weights, table, monkeypatch):
    monkeypatch.setattr(sweep, "_tune", _in_this_process)
    rows = f"rows={json.dumps(KINDS[table])}"
    cfg = configured(photos, root, f"table={table}", "scale=smoke", *ALONE, rows, *weights)
    results = sweep.sweep(cfg)
    wanted = paper.table(table)
    chosen = [row.name for row in paper.chosen(wanted, cfg.rows) if row.needs != "lpips"]  # there are no weights
    assert [result["row"] for result in results] == chosen
    folder = root / f"table-{wanted.name}-smoke"
    page = (folder / "comparison" / "comparison.html").read_text()
    assert all(row.replace("&", "&amp;") in page for row in wanted.rows)
    parent, rows = runs_of(root, folder.name)
    assert parent.info.status == "FINISHED"
    assert sorted(run.data.tags["litevae.row"] for run in rows) == sorted(chosen)
    assert {run.info.status for run in rows} == {"FINISHED"}
    for result in results:
        metrics = result["metrics"]
        if wanted.kind == "complexity":
            assert metrics["eval/params_m"] == pytest.approx(wanted.rows[result["row"]].paper["params_m"], abs=0.011)
            continue
        assert torch.isfinite(torch.tensor([*metrics.values()])).all()
        assert {"eval/reconstruction/psnr", "eval/reconstruction/frechet/squeezenet-caffe"} <= metrics.keys()
        load_autoencoder(result["model"])
        written = load(TrainVAE, str(next(folder.glob(f"configs/{trials.slug(result['row'] + ', seed 0')}.yaml"))))
        assert written.model.model_dump(mode="json") == result["train_vae"]["model"]
        if wanted.kind == "ldm":
            assert "eval/frechet/squeezenet-caffe" in metrics


@pytest.mark.chaos
def test_a_killed_sweep_goes_on_and_the_best_config_can_be_trained(photos, tmp_path):
    """Killed between a training and its evaluation."""
    words = [f"root={tmp_path}", f"data.train.uri={photos}/train", f"data.val.uri={photos}/val", "name=rates"]
    words += ["space.optim.lr=[1e-2]", *TINY]
    first = subprocess.Popen([sys.executable, "jobs/sweep.py", *words], cwd=REPO, stdout=subprocess.DEVNULL)
    end = time.monotonic() + 240
    while not (done := [*tmp_path.glob(f"trained/*/{trials.TRAINED}")]):
        assert first.poll() is None, "it ended before it was killed"
        assert time.monotonic() < end, "nothing was trained in time"
        time.sleep(0.01)
    kill_driver(first)
    assert not [*tmp_path.glob(f"rates/rows/*/{trials.RESULT}")], "it was killed too late"
    before = {path: path.stat().st_mtime_ns for path in done[0].parent.rglob("*.pt")}
    assert main(Sweep, sweep.sweep, words) == 0
    (result,) = json.loads((tmp_path / "rates" / "results.json").read_text())
    assert result["train_vae"]["optim"]["lr"] == 1e-2
    after = {path: path.stat().st_mtime_ns for path in done[0].parent.rglob("*.pt")}
    assert before == after  # what was done is not done again
    assert len(runs_of(tmp_path, "rates")[1]) == 1
    winner = load(TrainVAE, str(tmp_path / "rates" / "best.yaml"))
    assert (winner.optim.lr, winner.name) == (1e-2, "rates-best")


# --- what Tune decides --------------------------------------------------------------------------------------------


@pytest.fixture
def simulated(monkeypatch):
    """Trials are Tune's, each with its task beside it; what they train, for `images` / 80 seconds, is a number, psnr,
    the higher the nearer its rate is to 1e-3, which a checkpoint holds. It does not grow: of two trials that do, one a
    report ahead may seem the better. With pbt they go on together, whatever each waits for; with asha one of a rate
    below 1e-6 comes to no end by itself."""

    def work(found, setup, reports):
        cfg, train = validate(Sweep, setup.cfg), found.train
        total, every = train["stages"][0]["images"], cfg.every
        folder, started = Path(train["root"], train["name"]), Path(setup.folder, "started")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(json.dumps(train))
        started.mkdir(exist_ok=True)
        mine, end = started / train["name"], time.monotonic() + 600

        def wait_while(condition):
            while condition():
                assert time.monotonic() < end, "waited in vain"
                time.sleep(0.1)

        def alone_ahead():
            others = [int(path.read_text() or 0) for path in started.iterdir() if path != mine]
            return len(others) + 1 < cfg.trials or max(others) < images

        images, psnr = json.loads(Path(train["begin"]).read_text()) if train["begin"] else (0, 0.0)
        mine.write_text(str(images))
        while images < total:
            if cfg.scheduler == "pbt":
                wait_while(alone_ahead)
            time.sleep(every / 80)
            if cfg.scheduler == "asha" and train["optim"]["lr"] < 1e-6 and images + every == total:
                wait_while(lambda: True)
            images += every
            mine.write_text(str(images))
            psnr = max(psnr, 1 / (1 + abs(math.log10(train["optim"]["lr"]) + 3)))
            kept = folder / f"checkpoint-{images}.json"
            kept.write_text(json.dumps([images, psnr]))
            reports.put(({"images": images, "psnr": psnr}, str(kept)))
        for row in found.rows:
            os.makedirs(row.folder, exist_ok=True)
            metrics = {"eval/reconstruction/psnr": psnr}
            result = {"row": row.name, "seed": row.seed, "metrics": metrics, "remarks": [], "train_vae": train}
            Path(row.folder, RESULT).write_text(json.dumps(result))
        (folder / TRAINED).touch()
        return {"images": images, "psnr": psnr}

    def run(values, setup):
        run_trial._work = work  # in Tune's actor
        run_trial.run(values, setup)

    monkeypatch.setattr(sweep, "run_trial", SimpleNamespace(run=run))

    def words(images, every=80):
        stage = f"{{resolution: 32, images: {images}, batch_size: 8}}"
        return [f"train_vae.stages=[{stage}]", f"every={every}", "tracking.enabled=false"]

    return words


def seen(root) -> list[int]:
    """Images of the last checkpoint of every training."""
    folders = (root / "trained").iterdir()
    return sorted(max(int(path.stem[11:]) for path in folder.glob("checkpoint-*")) for folder in folders)


@pytest.mark.slow
def test_asha_stops_poor_trials_and_does_not_take_them_up_again(photos, tmp_path, simulated):
    space = ["space.optim.lr=[1e-3, 1e-9]", "scheduler=asha", "concurrent=1", "name=asha"]
    cfg = configured(photos, tmp_path, *TINY, *simulated(2400), *space)
    results = sweep.sweep(cfg)
    assert [result["train_vae"]["optim"]["lr"] for result in results] == [1e-3]
    (stopped,) = tmp_path.glob(f"asha/rows/*/{sweep.STOPPED}")
    assert json.loads(stopped.read_text())["images"] == 80
    again = sweep.sweep(cfg)
    assert [result["row"] for result in again] == [result["row"] for result in results]
    assert seen(tmp_path)[0] < 2400  # what it trained ended with it
    assert seen(tmp_path)[1:] == [2400]


@pytest.mark.slow
def test_optuna_draws_from_the_space(photos, tmp_path, simulated):
    more = ["space.optim.lr.loguniform=[1e-4, 1e-2]", "search=optuna", "trials=3", "name=optuna"]
    results = sweep.sweep(configured(photos, tmp_path, *TINY, *simulated(240), *more))
    rates = {result["train_vae"]["optim"]["lr"] for result in results}
    assert len(rates) == 3
    assert all(1e-4 < rate < 1e-2 for rate in rates)
    best = load(TrainVAE, str(tmp_path / "optuna" / "best.yaml"))
    assert best.optim.lr == min(rates, key=lambda rate: abs(math.log10(rate) + 3))


@pytest.mark.chaos
def test_pbt_lets_poor_trials_go_on_from_better_ones(photos, tmp_path, simulated):
    space = ["space.optim.lr.loguniform=[1e-9, 1e-2]", "scheduler=pbt", "trials=2", "name=pbt"]
    results = sweep.sweep(configured(photos, tmp_path, *TINY, *simulated(2400, every=400), *space))
    assert results
    trained = [json.loads(path.read_text()) for path in tmp_path.glob("trained/*/config.yaml")]
    assert any(config["begin"] for config in trained), "no trial went on from another's checkpoint"
    assert all(1e-9 <= result["train_vae"]["optim"]["lr"] <= 1e-2 for result in results)
    assert any(result["train_vae"]["begin"] for result in results)

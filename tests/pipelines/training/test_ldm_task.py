"""How train_ldm is wired: what its config sets in the steps, the averages, the pictures, the feeds and the job."""

import copy
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray.train.torch
import torch
import yaml
from PIL import Image

from litevae.any_autoencoder import fingerprint, load_autoencoder
from litevae.cache import LatentCache
from litevae.denoiser import null_class
from litevae.errors import UserError
from litevae.images import to_uint8
from litevae.latents import encode_latents
from litevae.ldm import LDM, NormalizedAutoencoder, load_ldm
from litevae.pictures import grid
from pipelines.encoding.plan import CachePlan
from pipelines.runtime.cli import load
from pipelines.runtime.schema import validate, values_to_keep
from pipelines.training import latent_feeds, ranks, run_folder
from pipelines.training import ldm as module
from pipelines.training.config import TrainLDM
from pipelines.training.latent_feeds import LatentBatch
from pipelines.training.ldm import MAY_CHANGE, MAY_CHANGE_CACHED, LdmTask
from pipelines.training.worker_setup import LatentData
from tests.encoding import encoded_crops
from tests.in_process import up_to_the_workers
from tests.networks import Noted
from tests.setups import ldm_setup, leave_checkpoint

SMALL = [
    "network=tiny", "batch_size=8", "images=24", "loop.precision=fp32", "loop.ema=0.9", "sample_images=5",
    "sample_steps=2", "data.resolution=64", "data.precision=fp32", "data.rows_per_shard=4", "data.loaders=1",
    "data.calibrate=4", "ray.gpu=false", "tracking.enabled=false", "name=mine",
]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(cache, autoencoder, photos)."""
    return encoded_crops(tmp_path_factory.mktemp("made"), rows_per_shard=10)


@pytest.fixture
def task(made, tmp_path, monkeypatch):
    monkeypatch.setattr(ray.train.torch, "prepare_model", lambda model: model)

    def make(*more, rank=0, world=1):
        config = load(TrainLDM, None, [*SMALL, f"cache={made[0]}", f"root={tmp_path}", *more])
        return LdmTask(config, ldm_setup(config), rank, world, torch.device("cpu"))

    return make


def online(made, *more):
    return ["mode=online", f"vae={made[1]}", f"data.source.uri={made[2]}", *more]


def first(one, start=0, size=8):
    """The batch at a position."""
    one.begin(0)
    found = one.batches(start, start + size, size)
    batch = next(found)
    found.close()
    return batch


# --- a step -------------------------------------------------------------------------------------------------------


def test_the_schedule_reaches_the_optimizer(task):
    one, rates = task("optim.lr=0.01", "optim.warmup=8", "optim.schedule=cosine", "network=tiny"), []
    inner, batch = one.optimizer._optimizer, first(one)
    step = inner.step
    inner.step = lambda: rates.append(inner.param_groups[0]["lr"]) or step()
    for images in (0, 4, 8, 16, 24):
        one.step(batch, images)
    assert rates == pytest.approx([0.01 * factor for factor in (1 / 9, 5 / 9, 1, 0.5, 0)])


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_network_computes_in_the_precision_and_the_loss_in_fp32(task, precision):
    one, seen = task(f"loop.precision={precision}", "sample_images=1", "sample_steps=1"), []
    convolution = next(m for m in one.network.modules() if isinstance(m, torch.nn.Conv2d))
    convolution.register_forward_hook(lambda *given: seen.append((given[2].dtype, one.network.training)))
    values = one.step(first(one), 0)
    assert values["loss"].dtype == torch.float32
    one.validate()
    wanted = torch.bfloat16 if precision == "bf16" else torch.float32
    assert seen == [(wanted, True), (wanted, False)]
    assert one.network.training
    assert {p.dtype for p in one.network.parameters()} == {torch.float32}


def test_averages_have_their_decays_and_are_updated_once_a_step(task):
    one = task("more_ema=[0.5, 0.05]", "optim.accumulate=2", "optim.lr=0.01")
    before = {name: value.clone() for name, value in one.network.state_dict().items()}
    one.step(first(one), 0)
    assert {name: average.decay for name, average in one.averages.items()} == {"0.9": 0.9, "0.5": 0.5, "0.05": 0.05}
    for decay, kept in (("0.9", 0.1), ("0.5", 0.1), ("0.05", 0.05)):  # the first update keeps a tenth at most
        for name, value in one.averages[decay].average.items():
            torch.testing.assert_close(value, kept * before[name] + (1 - kept) * one.network.state_dict()[name])
    assert task("loop.ema=0").averages == {}


def test_ddp_gets_each_pass_and_sends_the_last(task, monkeypatch):
    one = task("optim.accumulate=4")
    one.net = Noted(one.network)
    one.step(first(one), 0)
    assert one.net.passes == [False, False, False, True]
    monkeypatch.setattr(ray.train.torch, "prepare_model", Noted)
    again = task()
    assert isinstance(again.net, Noted)
    assert again.net.module is again.network


def test_weights_and_noise_are_the_seeds(task):
    one, again, other = task(), task(), task("seed=1")
    weights = [torch.cat([p.flatten() for p in each.network.parameters()]) for each in (one, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    drawn = [first(one), first(again), first(other), first(one, 8), first(one, 24)]
    for name in ("noise", "u"):
        assert torch.equal(getattr(drawn[0], name), getattr(drawn[1], name))
        assert len({getattr(each, name).numpy().tobytes() for each in drawn}) == 4


def test_a_task_that_goes_on_ends_with_the_same_bits(task):
    words = ["more_ema=[0.5]", "optim.lr=0.01"]
    whole, again = task(*words), task(*words)
    steps = [first(whole, at) for at in (0, 8, 16)]
    for n in (0, 1):
        whole.step(steps[n], 8 * n)
    state = copy.deepcopy(whole.state())
    again.load(state)
    for each in (whole, again):
        each.step(steps[2], 16)
    states = [
        [each.network.state_dict(), *(average.average for average in each.averages.values())] for each in (whole, again)
    ]
    for a, b in zip(*states, strict=True):
        assert all(torch.equal(value, b[name]) for name, value in a.items())
    assert [average.updates for average in again.averages.values()] == [3, 3]
    moments = [each.optimizer.state_dict()["state"] for each in (whole, again)]
    assert all(torch.equal(moments[0][n]["exp_avg"], moments[1][n]["exp_avg"]) for n in moments[0])
    assert torch.equal(again.feed.mean, whole.feed.mean)
    again.load(state | {"feed": {"mean": torch.full((4,), 5.0), "std": torch.full((4,), 6.0)}})
    assert (again.feed.mean.tolist(), again.feed.std.tolist()) == ([5.0] * 4, [6.0] * 4)


def test_skipped_steps_bad_images_and_stages(task):
    one = task()
    assert one.stages == [(24, 8)]
    one.optimizer.skipped = lambda: 4
    assert one.skipped() == 4
    assert float(one.count()["bad_images"]) == 0


# --- pictures and exports -----------------------------------------------------------------------------------------


def trained(one):
    one.step(first(one), 0)
    return one


@pytest.mark.parametrize(
    ("words", "count", "labels", "columns"),
    [
        (["classes=2", "sample_guidance=2.5", "seed=3"], 5, [0, 0, 0, 1, 1], 2),
        (["classes=2", "seed=3"], 1, [0], 1),
        (["loop.ema=0"], 7, None, 3),
    ],
)
def test_the_picture_is_of_the_exported_model(task, tmp_path, monkeypatch, words, count, labels, columns):
    monkeypatch.setattr(module, "PICTURES", 3)
    one, asked, sample = trained(task(*words, f"sample_images={count}", "optim.lr=0.01")), [], LDM.sample
    monkeypatch.setattr(
        LDM, "sample", lambda self, seeds, **more: asked.append((seeds, more)) or sample(self, seeds, **more)
    )
    for average in one.averages.values():
        torch._foreach_mul_(list(average.average.values()), 1.5)  # so that it is seen whose picture it is
    before = copy.deepcopy(one.network.state_dict())
    values, picture = one.validate()
    assert values == {}
    assert all(torch.equal(value, before[name]) for name, value in one.network.state_dict().items())
    seeds = [[(one.config.seed, n) for n in range(count)][start : start + 3] for start in range(0, count, 3)]
    assert [seeds for seeds, _ in asked] == seeds
    assert all(more.pop("steps") == 2 for _, more in asked)
    if labels is not None:
        assert [label for _, more in asked for label in more.pop("labels")] == labels
        assert {more.pop("guidance") for _, more in asked} == {one.config.sample_guidance}
    assert all(more == {} for _, more in asked)
    one.exports()["model"](tmp_path / "model")
    options = {} if labels is None else {"labels": labels, "guidance": one.config.sample_guidance}
    seed = one.config.seed
    images = load_ldm(tmp_path / "model").sample([(seed, n) for n in range(count)], steps=2, **options)
    wanted = grid(to_uint8(images), columns)
    assert picture.shape == wanted.shape
    assert np.abs(picture.astype(int) - wanted).mean() < 0.2


def test_only_rank_0_draws_and_only_where_pictures_are_wanted(task):
    assert task(rank=1, world=2).validate() == ({}, None)
    assert task("sample_images=0").validate() == ({}, None)


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["loop.ema=0.9", "more_ema=[0.5, 0.25]"], {"model": "0.9", "model-ema-0.5": "0.5", "model-ema-0.25": "0.25"}),
        (["loop.ema=0", "more_ema=[0.5]"], {"model": "", "model-ema-0.5": "0.5"}),
        (["loop.ema=0"], {"model": ""}),
    ],
)
def test_each_average_is_exported_as_a_model(task, made, tmp_path, words, names):
    one = task(*words, "optim.lr=0.01", "classes=2", "seed=3")
    for n in range(3):
        one.step(first(one, 8 * n), 8 * n)
    exports = one.exports()
    assert list(exports) == list(names)
    for folder, decay in names.items():
        exports[folder](tmp_path / folder)
        found = load_ldm(tmp_path / folder)
        weights = one.network.state_dict() | (one.averages[decay].average if decay else {})
        assert all(torch.equal(value, found.network.state_dict()[name]) for name, value in weights.items())
        assert found.classes == 2
        assert found.info == {
            "data": LatentCache(made[0]).manifest["digest"], "vae": fingerprint(made[1]),
            "config": values_to_keep(one.config),
        }  # fmt: skip
    if len(names) == 3:
        kinds = {torch.cat([v.flatten() for v in average.average.values()]).sum() for average in one.averages.values()}
        assert len(kinds) == 3


# --- feeds --------------------------------------------------------------------------------------------------------


def pixels_of(one, count=1):
    """Of each epoch (24 images): {id: pixels}."""
    one.feed.mean = one.feed.std = torch.ones(4)  # or some would be encoded for them
    one.begin(0)
    found = [{} for _ in range(count)]
    for batch in one.batches(0, 24 * count, 8):
        for position, (epoch, name), pixels in zip(batch.positions, batch.rows, batch.pixels, strict=True):
            assert epoch == position // 24
            found[epoch][name] = pixels
    assert all(len(epoch) == 24 for epoch in found)
    return found


def test_online_images_are_cut_as_the_config_says_and_otherwise_in_each_epoch(task, made):
    plain = online(made, "data.resolution=32", "data.resize=none")
    whole = {f"{path.parent.name}/{path.name}": np.asarray(Image.open(path)) for path in made[2].glob("*/*.png")}
    (centred,) = pixels_of(task(*plain))
    assert all(np.array_equal(pixels, whole[name][16:48, 16:48]) for name, pixels in centred.items())
    random = [*plain, "data.crop=random"]
    one, two = pixels_of(task(*random), 2)
    (again,), (other,) = pixels_of(task(*random)), pixels_of(task(*random, "seed=1"))
    assert sum(np.array_equal(one[name], two[name]) for name in one) < 4
    assert sum(np.array_equal(one[name], other[name]) for name in one) < 4
    assert all(np.array_equal(one[name], again[name]) for name in one)
    (flipped,) = pixels_of(task(*plain, "data.flip=true"))
    mirrored = [np.array_equal(pixels, centred[name][:, ::-1]) for name, pixels in flipped.items()]
    same = [np.array_equal(pixels, centred[name]) for name, pixels in flipped.items()]
    assert sum(mirrored) + sum(same) == 24
    assert 4 < sum(mirrored) < 20
    (resized,) = pixels_of(task(*online(made, "data.resolution=32", "data.decode=pillow")))
    halves = {name: np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC))
              for name, image in whole.items()}  # fmt: skip
    assert all(np.array_equal(pixels, halves[name]) for name, pixels in resized.items())


def test_a_constant_channel_is_said_and_learned_as_0(task, capsys):
    one = task()
    one.feed.mean[2], one.feed.std[2] = 0.1, 0.0
    one.begin(0)
    captured = capsys.readouterr()
    said = "warning: the training data: constant channels of the latents, counted from 0: 2; normalised, they are 0"
    assert (captured.out + captured.err).count(said) == 1
    z = one.feed.latents(LatentBatch([0], latents=torch.full((1, 4, 8, 8), 0.1)))
    expected = (0.1 - one.feed.mean) / one.feed.std
    expected[2] = 0
    torch.testing.assert_close(z, expected.view(1, 4, 1, 1).expand(1, 4, 8, 8))
    seen = []
    vae = NormalizedAutoencoder.of(load_autoencoder(one._vae), one.feed.mean, one.feed.std)
    vae.autoencoder.decode = lambda raw, **_: seen.append(raw) or (raw,)
    vae.decode(z)
    torch.testing.assert_close(seen[0], torch.full((1, 4, 8, 8), 0.1))  # what is decoded is the mean again


@pytest.mark.parametrize("mode", ["online", "write-through"])
def test_images_of_one_id_are_refused_and_the_advice_works(made, tmp_path, mode):
    photo = next(made[2].rglob("*.png")).read_bytes()
    pq.write_table(pa.table({"image": [photo] * 3, "id": ["a", "b", "a"]}), tmp_path / "images.parquet")
    words = [f"mode={mode}", f"vae={made[1]}", f"data.source.uri={tmp_path}/images.parquet", "data.resolution=32"]
    describe = {"online": module.online_latents, "write-through": module.write_through_latents}[mode]
    words += [] if mode == "online" else [f"cache={tmp_path}/filled"]
    with pytest.raises(UserError, match=r"row 0 and .*row 2 have one id, 'a'.*data\.source\.ids=unique"):
        describe(load(TrainLDM, None, words))
    assert describe(load(TrainLDM, None, [*words, "data.source.ids=unique"])).images == 3


def test_online_latents_are_the_autoencoders_normalised(task, made):
    one, drawn, other = (task(*online(made, "data.resolution=32", *more)) for more in (["draw=mean"], [], ["seed=1"]))
    batch = first(one)
    x = torch.from_numpy(batch.pixels).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        mean, logvar = encode_latents(load_autoencoder(made[1]), x).chunk(2, dim=1)
    shift, scale = one.feed.mean.view(1, -1, 1, 1), one.feed.std.view(1, -1, 1, 1)
    torch.testing.assert_close(one.feed.latents(batch), (mean - shift) / scale, rtol=1e-4, atol=1e-4)
    noise = [(each.feed.raw(batch) - mean) / (0.5 * logvar).exp() for each in (drawn, other)]
    noise += [
        (drawn.feed.raw(replace(batch, rows=[(1, name) for _, name in batch.rows])) - mean) / (0.5 * logvar).exp()
    ]
    for values in noise:
        assert abs(values.mean()) < 0.15
        assert abs(values.std() - 1) < 0.15
    assert len({values.numpy().tobytes() for values in noise}) == 3


def test_online_encodes_in_the_precision(task, made):
    for precision, wanted in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        one, seen = task(*online(made, f"data.precision={precision}", "draw=mean")), []
        convolution = next(m for m in one.feed._vae.encoder.modules() if isinstance(m, torch.nn.Conv2d))
        convolution.register_forward_hook(lambda *given, seen=seen: seen.append(given[2].dtype))
        assert one.feed.raw(LatentBatch([0], pixels=np.zeros((1, 32, 32, 3), np.uint8))).dtype == torch.float32
        assert set(seen) == {wanted}


def test_online_counts_what_it_can_not_read(task, made):
    one = task(*online(made, "data.max_bad=0.1"))
    one.feed._images.bad.update({"a": "broken", "b": "broken"})
    assert float(one.count()["bad_images"]) == 2
    one.check({"bad_images": 2.0})  # of 24
    with pytest.raises(UserError, match="3 of 24 images can't be read"):
        one.check({"bad_images": 2.6})


def test_a_feeds_digest_is_that_of_all_its_latents_depend_on(task, made):
    digests = [task(*online(made, *more)).digest for more in ((), ("data.flip=true",), ("data.resize=none",))]
    assert len({*digests, task().digest}) == 4
    assert task(*online(made, "seed=1", "draw=mean", "data.calibrate=3")).digest == digests[0]
    assert task().digest == LatentCache(made[0]).manifest["digest"]


@pytest.mark.parametrize("value", [2, -1, "a", 1.0])
def test_labels_are_classes_or_missing(value):
    config = load(TrainLDM, None, ["classes=2", "label=kind"])
    labels = latent_feeds.labels_of([0, None, np.int32(1)], config)
    assert labels.dtype == torch.int64
    assert labels.tolist() == [0, null_class(2), 1]
    assert latent_feeds.labels_of([0, 1], load(TrainLDM)) is None
    with pytest.raises(UserError, match=f"column 'kind' holds {value!r}; with classes=2 it may hold 0 to 1, or null"):
        latent_feeds.labels_of([0, value], config)


def test_what_all_ranks_have(monkeypatch):
    assert ranks.gathered(["a"], 1) == ["a"]

    def all_gather_object(into, mine):
        assert into == [None] * 3
        into[:] = [mine, [], ["c", "d"]]

    monkeypatch.setattr(torch.distributed, "all_gather_object", all_gather_object)
    assert ranks.gathered(["a", "b"], 3) == ["a", "b", "c", "d"]


# --- the job ------------------------------------------------------------------------------------------------------


@pytest.fixture
def job(made, tmp_path):
    """The job up to Ray Train: what workers would get, and how the run is tracked."""
    with up_to_the_workers({"model": "there", "loss": 0.123456, "images": 24}) as noted:

        def run(*more):
            config = load(TrainLDM, None, [*SMALL, f"cache={made[0]}", f"root={tmp_path}/runs", *more])
            return config, module.train_ldm(config), noted

        yield run


def test_what_workers_get_and_how_a_run_is_tracked(job, made, tmp_path, capsys):
    config, result, noted = job("seed=3")
    folder = f"{tmp_path}/runs/mine"
    worker, setup, placement, loop = noted.fitted
    assert (worker, placement.workers, loop) == (module._worker, 1, config.loop)
    assert validate(TrainLDM, setup.config).model_copy(update={"tracking": config.tracking}) == config
    assert (setup.folder, setup.data, setup.handle) == (folder, str(made[0]), "a handle")
    assert setup.latents == LatentData(
        data=str(made[0]), images=24, shape=(4, 8, 8), vae=str(made[1]), fingerprint=fingerprint(made[1]),
        about="24 latents of (8, 8, 8) moments", cache=str(made[0]), version=1,
    )  # fmt: skip
    assert noted.checked == ({"root": f"{tmp_path}/runs"}, {"vae": str(made[1]), "cache": str(made[0])})
    given, more = noted.started
    assert given == (config.tracking, config.root, "train_ldm", "mine", config.model_dump(mode="json"), folder)
    assert more == {"resume": False}
    parameters = result.pop("parameters")
    assert 1e6 < parameters < 4e6
    assert result == {"model": "there", "loss": 0.123456, "images": 24}
    shown = capsys.readouterr().out
    assert f"train_ldm mine: 24 latents of (8, 8, 8) moments, tiny {parameters:,} parameters, 24 images to" in shown
    assert "model: there   loss 0.1235" in shown


def test_a_run_that_goes_on_may_be_longer(job, tmp_path):
    job("seed=3")
    leave_checkpoint(tmp_path / "runs/mine")
    _, _, noted = job("seed=3", "images=32", "optim.lr=0.5")
    assert noted.started[1] == {"resume": True}
    assert yaml.safe_load((tmp_path / "runs/mine/config.yaml").read_text())["images"] == 32
    with pytest.raises(UserError, match="images of run .* may only grow; it was 32, and is 24"):
        job("seed=3")
    job("seed=3", "images=32", "data.decode=pillow")  # a cache is decoded already
    with pytest.raises(UserError, match="seed: was 3, is 0"):
        job()


def test_online_workers_get_the_source_and_write_through_ones_the_plan_too(job, made, tmp_path):
    _, _, noted = job(*online(made), "data.loaders=0")
    latents = noted.fitted[1].latents
    assert (latents.source.units, latents.images, latents.shape) == (24, 24, (4, 8, 8))
    assert (latents.data, latents.vae, latents.fingerprint) == (str(made[2]), str(made[1]), fingerprint(made[1]))
    leave_checkpoint(tmp_path / "runs/mine")
    with pytest.raises(UserError, match="decode: was 'fast', is 'pillow'"):
        job(*online(made), "data.decode=pillow")
    more = ["data.resize=none", "data.decode=scaled", "data.precision=bf16", "data.max_bad=0.2", "data.resolution=32"]
    more.append("data.max_pixels=77000")
    words = online(made, *more, f"cache={tmp_path}/filled", "mode=write-through", "name=through")
    _, _, noted = job(*words)
    latents, plan = noted.fitted[1].latents, CachePlan.read(f"{tmp_path}/filled")
    assert (latents.cache, latents.plan, latents.shape) == (f"{tmp_path}/filled", plan, (4, 4, 4))
    assert (plan.rows_per_shard, plan.transform["resolution"]) == (4, 32)
    assert (plan.transform["resize"], plan.transform["decode"]) == ("none", "scaled")
    assert plan.precision == "bf16"
    assert plan.views.max_pixels == 77000


MAY_DIFFER = [
    "root=/r", "ray.workers=2", "images=48", "vae=/v", "cache_version=2", "cache_local=/c", "sample_images=3",
    "sample_steps=9", "sample_guidance=3", "checkpointing=true", "data.loaders=9", "data.max_bad=0.5",
    "data.calibrate=9", "optim.lr=1", "optim.clip=1", "loop.precision=bf16", "loop.val_every=3",
    "loop.checkpoint_every=3", "loop.keep=9", "loop.log_every=9", "loop.max_restarts=9", "loop.max_skipped=9",
]  # fmt: skip
STAYS = [
    "name=other", "seed=1", "mode=online", "cache=/other", "data.source.uri=/s", "data.resolution=32", "data.flip=true",
    "data.crop=random", "network=small", "classes=2", "label=kind", "label_dropout=0.5", "objective.prediction=v",
    "draw=mean", "batch_size=16", "optim.weight_decay=1", "optim.warmup=8", "optim.accumulate=2", "loop.ema=0.5",
    "loop.compile=true", "more_ema=[0.5]",
]  # fmt: skip


@pytest.mark.parametrize("mode", ["cache", "online"])
def test_what_may_differ_when_a_run_goes_on(tmp_path, mode):
    folder, free = str(tmp_path), MAY_CHANGE_CACHED if mode == "cache" else MAY_CHANGE
    run_folder.write_config(folder, load(TrainLDM, None, SMALL))
    leave_checkpoint(folder)
    decode = ["data.decode=pillow"]
    for word in [*MAY_DIFFER, *(decode if mode == "cache" else [])]:
        assert run_folder.open_run(folder, load(TrainLDM, None, [*SMALL, word]), free), word
    for word in [*STAYS, *(decode if mode == "online" else [])]:
        with pytest.raises(UserError, match=f"  {word.partition('=')[0]}: was"):
            run_folder.open_run(folder, load(TrainLDM, None, [*SMALL, word]), free)

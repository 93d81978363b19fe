"""Configs: defaults, presets, overrides, and what is said of wrong ones."""

import re

import pytest
import yaml

from litevae.errors import UserError
from pipelines.config import (
    PRESETS,
    Encode,
    Evaluate,
    EvaluateSamples,
    Sample,
    TrainLDM,
    TrainVAE,
    dump,
    load,
    main,
    section_of,
    usage,
)

JOBS = {"train_vae": TrainVAE, "encode_dataset": Encode, "train_ldm": TrainLDM, "sample": Sample, "evaluate": Evaluate}


def test_defaults_are_the_papers():
    config = load(TrainVAE)
    assert (config.optim.lr, config.optim.betas) == (1e-4, (0.5, 0.9))  # Appendix F
    assert [(s.resolution, s.images // s.batch_size) for s in config.stages] == [(128, 100_000), (256, 50_000)]
    assert (config.model.encoder, config.model.latent_channels) == ("B", 4)


def test_overrides_go_before_the_preset_and_the_preset_before_defaults(tmp_path):
    preset = tmp_path / "mine.yaml"
    preset.write_text("optim: {lr: 3.0e-4}\nname: mine\n")
    config = load(TrainVAE, str(preset), ["name=other", "loss.kl.start=5", "data.train.columns=[a, b]"])
    assert (config.optim.lr, config.name, config.optim.betas) == (3e-4, "other", (0.5, 0.9))
    assert config.loss.kl.weight == TrainVAE().loss.kl.weight  # a section given in part keeps the rest
    assert config.data.train.columns == ["a", "b"]


def test_numbers_as_people_write_them():
    assert load(TrainVAE, None, ["optim.lr=1e-3"]).optim.lr == 1e-3
    assert load(TrainVAE, None, ["name=7"]).name == "7"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("loss.l3.weight=1", "unknown config key 'loss.l3'"),
        ("optim.lrr=1", r"unknown config key 'optim\.lrr'; did you mean 'optim\.lr'\?"),
        ("optim.lr=fast", r"optim\.lr: .*valid number.*'fast'"),
        ("optim.lr=-1", r"optim\.lr: .*greater than 0"),
        ("model.encoder=XL", r"model\.encoder: .*'S', 'B', 'M', 'L', 'sd-vae'.*'XL'"),
        ("stages=[{resolution: 100, images: 5}]", r"stages\.0\.resolution: .*multiple of 8"),
        ("model.decoder.channels=[8, 8]", r"model\.decoder: .*exactly 4"),
        ("name=../elsewhere", "name: "),
        ("seed", "not of the form key=value"),
        ("optim.lr.x=1", r"optim\.lr"),
        ("data=[", "not valid YAML"),
    ],
)
def test_a_wrong_override_is_named(override, message):
    with pytest.raises(UserError, match=message):
        load(TrainVAE, None, [override])


def test_every_mistake_is_listed_at_once():
    with pytest.raises(UserError) as error:
        load(TrainVAE, None, ["optim.lr=fast", "sead=1", "loop.keep=0"])
    assert len(str(error.value).splitlines()) == 3


def test_presets_that_are_no_presets(tmp_path):
    shipped = "celebahq-256, demo, demo-gpu, ffhq-256, imagenet-256"
    with pytest.raises(UserError, match=rf"--config nope: neither a preset \({shipped}\) nor a file"):
        load(TrainVAE, "nope")
    (tmp_path / "recipe.yaml").write_text("sample: {steps: 20}\ntrain_vae:\n")
    assert load(Sample, str(tmp_path / "recipe.yaml")).steps == 20
    assert load(TrainVAE, str(tmp_path / "recipe.yaml")) == TrainVAE()
    with pytest.raises(UserError, match="nothing for train_ldm; it is for sample, train_vae"):
        load(TrainLDM, str(tmp_path / "recipe.yaml"))
    (tmp_path / "list.yaml").write_text("- a")
    with pytest.raises(UserError, match="found a list"):
        load(TrainVAE, str(tmp_path / "list.yaml"))
    (tmp_path / "code.yaml").write_text("name: !!python/object/apply:os.getcwd []")
    with pytest.raises(UserError, match="not valid YAML"):
        load(TrainVAE, str(tmp_path / "code.yaml"))


RECIPES = [
    (path.stem, section) for path in sorted(PRESETS.glob("*.yaml")) for section in yaml.safe_load(path.read_text())
]


def test_what_is_evaluated_is_decoded_by_pillow():
    assert (load(TrainVAE).data.decode, load(Encode).transform.decode) == ("fast", "fast")
    for cls in (Evaluate, EvaluateSamples):
        with pytest.raises(UserError, match=r"transform\.decode"):
            load(cls, None, ["transform.decode=fast"])


@pytest.mark.parametrize(("name", "section"), RECIPES)
def test_shipped_presets_are_valid(name, section):
    (cls,) = (cls for cls in (*JOBS.values(), EvaluateSamples) if section_of(cls) == section)
    assert load(cls, name) != cls()


@pytest.mark.parametrize("job", JOBS)
def test_help_lists_every_field_and_dumps_load_again(job, capsys):
    cls = JOBS[job]
    assert main(cls, lambda config: pytest.fail("it ran"), ["--help"]) == 0
    shown = capsys.readouterr().out
    assert f"python jobs/{job}.py" in shown

    def names(values, prefix=""):
        for key, value in values.items():
            yield from names(value, f"{prefix}{key}.") if isinstance(value, dict) else [prefix + key]

    missing = [name for name in names(cls().model_dump()) if not re.search(rf"^  {re.escape(name)} = ", shown, re.M)]
    assert not missing
    assert shown.strip() == usage(cls).strip()
    assert main(cls, lambda config: pytest.fail("it ran"), ["--print-config"]) == 0
    assert cls.model_validate(yaml.safe_load(capsys.readouterr().out)) == cls() == load(cls, None, [])
    assert dump(cls()).startswith("root: runs")


def test_exit_codes(capsys):
    def refuse(config):
        raise UserError("no such thing; make one")

    def interrupt(config):
        raise KeyboardInterrupt

    assert main(Sample, lambda config: None, []) == 0
    assert main(Sample, refuse, []) == 2
    assert capsys.readouterr().err == "error: no such thing; make one\n"
    assert main(Sample, refuse, ["--verbose"]) == 2
    assert "unknown option --verbose" in capsys.readouterr().err
    assert main(Sample, interrupt, []) == 130

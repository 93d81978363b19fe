"""What is suggested for words that do not exist: as near as letters say, and what others call the same thing."""

import itertools
import re
import shlex

import pytest

from litevae.errors import UserError
from pipelines.benchmark.config import Benchmark
from pipelines.encoding.config import Encode, Repair
from pipelines.evaluation.config import Evaluate, EvaluateComplexity, Sample
from pipelines.experiments.config import Sweep
from pipelines.runtime import typed_text
from pipelines.runtime.cli import load, main
from pipelines.runtime.near_misses import ALIASES, VALUES, distance, field_hint, nearest
from pipelines.runtime.schema import names_of
from pipelines.training.config import TrainLDM, TrainVAE

JOBS = (TrainVAE, TrainLDM, Encode, Sample, Evaluate, EvaluateComplexity, Sweep)
NAMES = {cls: names_of(cls) for cls in JOBS}


def said(cls, *overrides):
    with pytest.raises(UserError) as error:
        load(cls, None, list(overrides))
    return str(error.value)


@pytest.mark.parametrize(
    ("one", "other", "edits"),
    [
        ("", "", 0), ("a", "", 1), ("", "abc", 3), ("same", "same", 0), ("kitten", "sitting", 3), ("ab", "ba", 1),
        ("lr", "lrr", 1), ("seed", "sead", 1), ("abcd", "acbd", 1), ("ca", "abc", 3), ("model", "modle", 1),
        ("encoder", "decoder", 2), ("flaw", "lawn", 2),
    ],
)  # fmt: skip
def test_edits_are_counted(one, other, edits):
    """By hand; "ca" to "abc" is 3 because no letter is changed twice (optimal string alignment)."""
    assert distance(one, other) == distance(other, one) == edits


def test_one_edit_is_what_one_edit_makes():
    """All words of up to three letters of two that one insertion, deletion, replacement or swap makes of another."""
    words = ["".join(word) for length in range(4) for word in itertools.product("ab", repeat=length)]
    for word in words:
        made = {word[:at] + word[at + 1 :] for at in range(len(word))}
        made |= {word[:at] + letter + word[at:] for at in range(len(word) + 1) for letter in "ab"}
        made |= {word[:at] + letter + word[at + 1 :] for at in range(len(word)) for letter in "ab"}
        made |= {word[:at] + word[at + 1] + word[at] + word[at + 2 :] for at in range(len(word) - 1)}
        for other in words:
            assert (distance(word, other) <= 1) == (other in made or other == word), (word, other)


@pytest.mark.parametrize(
    ("word", "known", "found"),
    [
        ("verfy", ["verify", "repair", "retry"], ["verify"]),
        ("trian-vae", ["train-vae", "train-ldm"], ["train-vae"]),
        ("small", ["S", "B", "vae-small", "dwt"], ["vae-small"]),
        ("xyz", ["train-vae", "sample"], []),
        ("loss.l3", ["loss.l1", "loss.l2", "loss.lpips"], ["loss.l1", "loss.l2"]),
        ("XL", ["S", "B", "M", "L"], []),
        ("b", ["S", "B"], ["B"]),
    ],
)
def test_the_nearest_words_and_none_that_is_far(word, known, found):
    assert nearest(word, known) == found


@pytest.mark.parametrize(
    ("cls", "override", "hint"),
    [
        (TrainVAE, "optim.lrr=1", "did you mean optim.lr=1?"),
        (TrainVAE, "lrr=1", "did you mean 'loss.adversarial.lr' or 'optim.lr'?"),
        (TrainVAE, "optim_lr=1", "did you mean optim.lr=1?"),
        (TrainVAE, "lpips.weight=0", "did you mean loss.lpips.weight=0?"),
        (TrainVAE, "ema=0.9", "did you mean loop.ema=0.9?"),
        (TrainVAE, "loop.emma=0.9", "did you mean loop.ema=0.9?"),
        (TrainVAE, "modle.encoder=B", "did you mean model.encoder=B?"),
        (TrainVAE, "sead=1", "did you mean seed=1?"),
        (TrainVAE, "SEED=1", "did you mean seed=1?"),
        (TrainVAE, "loss.l3.weight=1", "did you mean 'loss.l1.weight' or 'loss.l2.weight'?"),
        (TrainVAE, "stpes=7", "did you mean 'stages'?"),  # which does not take 7
        (TrainVAE, "weight=1", "'loss.l1.weight', 'loss.l2.weight', 'loss.lpips.weight', 'loss.features.weight' or "),
        (TrainLDM, "batchsize=8", "did you mean batch_size=8?"),
        (Encode, "error_budgt=0.1", "did you mean error_budget=0.1?"),
        (Encode, "sorce.uri=/a b", "did you mean 'source.uri=/a b'?"),
        (Encode, "uri=/data", "did you mean 'source.uri' or 'tracking.uri'?"),
        (Sample, "guidence=4", "did you mean guidance=4?"),
    ],
)
def test_fields_that_are_near(cls, override, hint):
    message = said(cls, override)
    assert message.startswith(f"unknown config key {override.partition('=')[0]!r}")
    assert hint in message
    assert message.endswith(" (--help-all lists all)")


@pytest.mark.parametrize(
    ("cls", "override"),
    [(TrainVAE, "xyz=1"), (TrainVAE, "loss.adversarial.zz=1"), (TrainVAE, "model.q=1"), (Encode, "loss.l3.weight=1")],
)
def test_where_nothing_is_near_nothing_is_suggested(cls, override):
    assert "did you mean" not in said(cls, override)


@pytest.mark.parametrize(
    ("cls", "typed", "meant"),
    [
        (TrainVAE, "learning_rate=3e-4", "optim.lr=3e-4"),
        (TrainVAE, "lr=3e-4", "optim.lr=3e-4"),
        (TrainVAE, "LearningRate=3e-4", "optim.lr=3e-4"),
        (TrainVAE, "optim.learning_rate=3e-4", "optim.lr=3e-4"),
        (TrainVAE, "learning_rat=3e-4", "optim.lr=3e-4"),
        (TrainLDM, "train_batch_size=8", "batch_size=8"),
        (TrainVAE, "train_data_dir=/data", "data.train.uri=/data"),
        (Encode, "train_data_dir=/data", "source.uri=/data"),
        (TrainLDM, "dataset_name=/data", "data.source.uri=/data"),
        (Encode, "output_dir=/out", "out=/out"),
        (Encode, "resolution=512", "transform.resolution=512"),
        (TrainVAE, "pretrained_model_name_or_path=/m", "model.init=/m"),
        (Encode, "pretrained_model_name_or_path=/m", "model=/m"),
        (TrainLDM, "pretrained_model_name_or_path=/m", "vae=/m"),
        (TrainVAE, "gradient_accumulation_steps=4", "optim.accumulate=4"),
        (TrainVAE, "gradient_checkpointing=true", "checkpointing=true"),
        (TrainVAE, "num_processes=8", "ray.workers=8"),
        (TrainVAE, "dataloader_num_workers=4", "data.loaders=4"),
        (TrainVAE, "max_grad_norm=1.0", "optim.clip=1.0"),
        (TrainVAE, "adam_weight_decay=0.01", "optim.weight_decay=0.01"),
        (TrainVAE, "checkpoints_total_limit=3", "loop.keep=3"),
        (Encode, "seed=3", "transform.seed=3"),
        (Sample, "num_inference_steps=20", "steps=20"),
        (Sample, "guidance_scale=4", "guidance=4"),
        (Encode, "flips=true", "transform.flips=true"),
    ],
)
def test_what_others_call_it_and_the_advice_works(cls, typed, meant):
    assert f"; did you mean {meant}?" in said(cls, typed)
    load(cls, None, [meant])


NOTED = {
    (TrainVAE, "batch_size=16"): "stages",
    (TrainVAE, "max_train_steps=1000"): "stages",
    (TrainLDM, "max_train_steps=1000"): "images",
    (TrainVAE, "num_train_epochs=10"): "stages",
    (TrainVAE, "resolution=256"): "stages",
    (TrainVAE, "mixed_precision=bf16"): "loop.precision",
    (Encode, "mixed_precision=bf16"): "precision",
    (TrainVAE, "output_dir=/out"): "root",
    (TrainVAE, "checkpointing_steps=500"): "loop.checkpoint_every",
    (TrainVAE, "validation_steps=500"): "loop.val_every",
    (TrainVAE, "report_to=wandb"): "tracking.enabled",
    (TrainVAE, "use_ema=true"): "loop.ema",
    (TrainVAE, "lr_scheduler=cosine"): "optim.schedule",
    (TrainVAE, "lr_warmup_steps=500"): "optim.warmup",
    (TrainVAE, "resume_from_checkpoint=latest"): "name",
    (TrainLDM, "adam_beta1=0.9"): "optim.betas",
    (TrainLDM, "snr_gamma=5"): "objective.gamma",
}


@pytest.mark.parametrize(("cls", "typed"), NOTED, ids=lambda value: getattr(value, "__name__", value))
def test_a_note_says_where_values_differ(cls, typed):
    field = NOTED[cls, typed]
    assert re.search(rf"; did you mean {field!r}\? \(.+\) \(--help-all lists all\)$", said(cls, typed))


def test_the_commands_in_notes_work():
    """Each override that a note gives as an example is taken by a job that has the field."""
    tried = set()
    for alias in ALIASES.values():
        for field, note in alias.items():
            for word in shlex.split(note) if "='" in note else re.split(r"[;,] | ", note):
                if word.partition("=")[0] == field and "=" in word:
                    for cls in JOBS:
                        if field in NAMES[cls] and not (cls is Sample) ^ (field == "classes"):
                            load(cls, None, [word.rstrip(";,")])
                            tried.add(word)
    assert {"loop.ema=0.9999", "optim.betas=[0.9,0.999]"} <= tried
    assert any(word.startswith("stages=[{resolution: 256") for word in tried)


def test_every_alias_is_of_a_field_and_no_job_has_only_wrong_ones():
    known = {name for names in NAMES.values() for name in names}
    for alias, fields in ALIASES.items():
        assert known & fields.keys(), alias
        for cls, names in NAMES.items():
            here = next((field for field in fields if field in names and field != alias), None)
            if here and alias not in names:
                assert re.search(rf"did you mean '?{re.escape(here)}['=?]", field_hint(alias, names)), (cls, alias)


@pytest.mark.parametrize(
    ("cls", "override", "hint"),
    [
        (TrainVAE, "model.encoder=small", "'dwt' or 'dwt-2' (got 'small'); did you mean 'vae-small'?"),
        (TrainVAE, "model.encoder=s", "; did you mean 'S'?"),
        (TrainVAE, "loop.precision=fp61", "; did you mean 'bf16'?"),
        (TrainVAE, "loop.precision=fp16", "; did you mean 'bf16'?"),
        (Encode, "dtype=float16", "; did you mean 'fp16'?"),
        (Encode, "batch_size=autp", "input should be 'auto' (got 'autp'); did you mean 'auto'?"),
        (TrainVAE, "ray.gpu=treu", "; did you mean 'true'?"),
        (TrainVAE, "checkpointing=flase", "; did you mean 'false'?"),
        (TrainLDM, "network=dit-b2", "; did you mean 'dit-b/2'?"),
        (Sample, "sampler=dmp++", "; did you mean 'dpm++'?"),
    ],
)
def test_values_that_are_near(cls, override, hint):
    message = said(cls, override)
    assert message.startswith(override.partition("=")[0] + ": ")
    assert hint in message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize(
    ("cls", "override", "meant"),
    [
        (Encode, "source=/data/a b", "'source.uri=/data/a b'"),
        (TrainVAE, "data.train=/data", "data.train.uri=/data"),
        (TrainVAE, "data=/data", "data.train.uri=/data"),
        (TrainLDM, "data=/data", "data.source.uri=/data"),
        (TrainVAE, "model=runs/vae/model", "model.init=runs/vae/model"),
        (Benchmark, "source.uri=/data", "source=/data"),
        (Repair, "source.uri=/data", "source=/data"),
        (Encode, "model.init=runs/vae/model", "model=runs/vae/model"),
    ],
)
def test_a_word_that_is_a_section_in_one_job_and_a_value_in_another(cls, override, meant):
    message = said(cls, override)
    assert message.endswith(f"; did you mean {meant}?")
    load(cls, None, shlex.split(meant))


def test_a_value_that_is_near_to_none():
    assert "did you mean" not in said(TrainVAE, "model.encoder=XXL")


def test_values_of_others_are_values_here():
    choices = {word for cls in JOBS for name in NAMES[cls] for word in typed_text.choices(cls, name.split("."))}
    assert set(VALUES.values()) <= choices


@pytest.mark.parametrize(
    ("cls", "words", "message"),
    [
        (
            TrainVAE,
            ["--learning_rate", "1e-4"],
            "--learning_rate: fields are given as key=value; did you mean optim.lr=1e-4?",
        ),
        (
            TrainLDM,
            ["--batch-size=16"],
            "--batch-size: fields are given as key=value; did you mean batch_size=16?",
        ),
        (TrainLDM, ["--batch_size", "16"], "--batch_size: fields are given as key=value; did you mean batch_size=16?"),
        (TrainVAE, ["--optim.lr=1"], "--optim.lr: fields are given as key=value; did you mean optim.lr=1?"),
        (TrainVAE, ["--gradient_checkpointing", "--seed", "3"], "did you mean 'checkpointing'?"),
        (TrainVAE, ["--train_batch_size=16"], "did you mean 'stages'? (a list: stages='[{"),
        (TrainVAE, ["--print-confg"], "--print-confg: did you mean --print-config?"),
        (TrainVAE, ["-x"], "there are --config, --print-config and --help"),
    ],
)
def test_options_as_others_write_them(cls, words, message, capsys):
    assert main(cls, lambda config: pytest.fail("it ran"), words) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: unknown option ")
    assert message in shown

"""The command `litevae`, what all jobs answer without torch and Ray, and completion in real shells."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

from jobs import main as console
from jobs.completion import script
from pipelines.runtime.cli import PRESETS
from pipelines.runtime.commands import SCRIPTS, command, from_console_script
from tests.commands import REPO, run_in_this_process

HEAVY = ["torch", "ray", "pyarrow", "mlflow", "diffusers", "numpy", "scipy", "PIL", "pandas", "optuna"]


def said(capsys, *words, code=0):
    assert console.main(words) == code
    captured = capsys.readouterr()
    return captured.err if code else captured.out


# --- the list of jobs -------------------------------------------------------------------------------------------


def test_every_job_is_a_script_and_the_other_way_round():
    modules = {job.module for job in SCRIPTS.values()}
    assert modules == {path.stem for path in (REPO / "jobs").glob("*.py") if "cli.main(" in path.read_text()}
    for module in modules:
        assert callable(import_module(f"jobs.{module}").main)


def test_the_command_is_the_one_that_is_installed(monkeypatch, capsys):
    entry = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["scripts"]["litevae"]
    module, _, function = entry.partition(":")
    command = getattr(import_module(module), function)
    monkeypatch.setattr(sys, "argv", ["litevae", "help"])
    assert (command(), capsys.readouterr().out) == (0, said(capsys, "help"))
    monkeypatch.setitem(sys.modules, "mlflow", None)  # as where the extra is not installed
    monkeypatch.setitem(sys.modules, "ray", None)
    assert command() == 2
    assert capsys.readouterr() == ("", "error: the jobs need ray, mlflow: pip install 'litevae[jobs]'\n")


@pytest.mark.parametrize("words", [(), ("--help",), ("-h",), ("help",)], ids=" ".join)
def test_the_list_of_jobs(words, capsys):
    text = said(capsys, *words)
    for name, job in SCRIPTS.items():
        assert f"\n  {name} " in text
        assert job.says in text
    assert max(map(len, text.splitlines())) <= 100


def test_the_version(capsys):
    version = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["version"]
    assert said(capsys, "--version") == f"litevae {version}\n"


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("trian-vae", "did you mean litevae train-vae?"),
        ("train_vea", "did you mean litevae train-vae?"),
        ("encode_dataset.py", "did you mean litevae encode-dataset?"),
        ("evalute", "did you mean litevae evaluate?"),
        ("--verison", "did you mean litevae --version?"),
        ("nonsense", "there are train-vae, encode-dataset, "),
    ],
)
def test_a_job_that_is_none(word, hint, capsys):
    assert hint in said(capsys, word, code=2)


def test_a_job_by_its_name_or_its_files(capsys):
    printed = said(capsys, "train-vae", "--print-config", "seed=7")
    assert "seed: 7" in printed
    assert said(capsys, "train_vae", "seed=7", "--print-config") == printed
    assert said(capsys, "help", "sample") == said(capsys, "sample", "--help")
    assert said(capsys, "help", "train-vae", "optim.lr") == said(capsys, "train-vae", "--help", "optim.lr")


def test_commands_are_named_as_they_were_called(monkeypatch):
    for called, shown in {
        "jobs/train_vae.py": "python jobs/encode_dataset.py",
        "../litevae/jobs/sample.py": "python ../litevae/jobs/encode_dataset.py",
        f"{os.getcwd()}/jobs/sample.py": "python jobs/encode_dataset.py",
        "/opt/litevae/jobs/sample.py": "python /opt/litevae/jobs/encode_dataset.py",
        "/usr/bin/pytest": "python jobs/encode_dataset.py",
    }.items():
        monkeypatch.setattr(sys, "argv", [called])
        assert command("encode_dataset") == shown
        with from_console_script():
            assert command("encode_dataset") == "litevae encode-dataset"
        assert command("encode_dataset") == shown


def test_errors_name_the_command(capsys, monkeypatch):
    assert "(litevae train-vae --help)" in said(capsys, "train-vae", "--nonsense", code=2)
    assert "litevae encode-dataset verify CACHE?" in said(capsys, "encode-dataset", "verfy", code=2)
    assert "(python jobs/train_vae.py --help)" in run_in_this_process("jobs/train_vae.py", "--nonsense").output


# --- without torch and Ray --------------------------------------------------------------------------------------

GOOD = [["--help"], ["--help-all"], ["--print-config"]]
MISTAKES = [
    ["--help", "nonsense"],
    ["--nonsense"],
    ["--learning_rate", "1e-4"],
    ["nonsense=1"],
    ["learning_rate=1e-4"],
    ["=1"],
    ["--config"],
    ["--config", "nonsense"],
    ["--config", "demo", "nonsense=1"],
]
# What can be called without any field; the others say what is missing.
NEED_NOTHING = {
    ("compare-runs",),
    ("benchmark",),
    ("doctor",),
    ("demo",),
    ("sweep",),
    ("weights",),
    ("evaluate", "complexity"),
}
MORE = [
    (2, ["train-ldm", "mode=online"]),
    (2, ["encode-dataset", "folder"]),
    (2, ["completion", "fish"]),
    (2, ["nonsense"]),
    *((0, words) for words in ([], ["--help"], ["--version"], ["completion", "bash"], ["completion", "zsh"])),
]


# What is looked at next may need pyarrow, which takes half a second.
LOOKED_AT = [
    (2, ["sweep", "table=99"]),
    (2, ["sweep", "table=99", "data.train.uri=/nowhere", "data.val.uri=/nowhere"]),
    (2, ["sweep", "table=9", "rows=[nonsense]", "data.train.uri=/nowhere", "data.val.uri=/nowhere"]),
]


def test_mistakes_are_answered_without_torch_and_ray(tmp_path):
    """All of them in one process, since the start of one takes longer than they do. Nothing is written either.

    What is found in files and folders is in test_first_look.py.
    """
    commands = list(MORE)
    for name, job in SCRIPTS.items():
        for action in ["", *getattr(import_module(f"jobs.{job.module}"), "ACTIONS", {})]:
            words = [name, *([action] if action else [])]
            commands += [(0, [*words, *good]) for good in GOOD] + [(2, [*words, *mistake]) for mistake in MISTAKES]
            if tuple(words) not in NEED_NOTHING:
                commands.append((2, words))
    light = len(commands)
    commands += LOOKED_AT
    code = f"""
import contextlib, io, json, sys
from jobs.main import main
sys.modules["ray"] = sys.modules["torch"] = None  # an import of them is an error: nothing is to be started here
found = []
for _, words in json.load(sys.stdin):
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        code = main(words)
    found.append([code, output.getvalue(), [name for name in {HEAVY} if sys.modules.get(name)]])
print(json.dumps(found))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(commands),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(REPO)},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    done_all = json.loads(done.stdout)
    for number, ((expected, words), (code, output, heavy)) in enumerate(zip(commands, done_all, strict=True)):
        if number >= light:
            heavy = [name for name in heavy if name not in ("pyarrow", "numpy", "pandas")]
        assert not heavy, f"{words} imports {heavy}"
        assert code == expected, (words, output)
        assert ("error: " in output) == (code == 2), (words, output)
        assert "Traceback" not in output
    assert not list(tmp_path.iterdir())


def test_the_table_that_does_not_exist_is_named(capsys):
    assert "table=99 does not exist; there are 1, 2a, 2b, 3, " in said(capsys, "sweep", "table=99", code=2)


# --- an output that nobody reads --------------------------------------------------------------------------------


def test_help_that_head_cuts_off_is_no_error():
    words = [sys.executable, "jobs/train_vae.py", "--help-all"]
    done = subprocess.run(
        ["bash", "-c", '"$@" | head -1; echo "${PIPESTATUS[0]}"', "bash", *words],
        cwd=REPO, env=os.environ | {"PYTHONPATH": str(REPO)}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.stderr == ""
    first, code = done.stdout.splitlines()
    assert first == "Train a LiteVAE autoencoder."
    assert code in ("0", "141")  # 0 if all was written before head had ended


# --- completion -------------------------------------------------------------------------------------------------

FILES = ("mine.yaml", "data/x.parquet", "my folder/y")
PRESETS_OF_TRAIN_VAE = sorted(path.stem for path in PRESETS.glob("*.yaml"))
COMPLETED = {
    "litevae tr": ["train-ldm", "train-vae"],
    "litevae completion ": ["bash", "zsh"],
    "litevae help sam": ["sample"],
    "litevae train-vae lo": ["loop.", "loss."],
    "litevae train-vae loss.adv": ["loss.adversarial."],
    "litevae train-vae loss.adversarial.r1": ["loss.adversarial.r1=", "loss.adversarial.r1_every="],
    "litevae train-vae --help loop.val": ["loop.val_every"],
    "litevae train-vae nonsense": [],
    "litevae train-vae model.encoder=": ["B", "L", "M", "S", "dwt", "dwt-2", "sd-vae", "vae-small"],
    "litevae train-vae model.encoder=sd": ["sd-vae"],
    "litevae train-vae checkpointing=": ["false", "true"],
    "litevae train-vae data.train.uri=d": ["data"],
    "litevae train-vae begin=my": ["my folder"],
    "litevae train-vae name=d": [],
    "litevae train-vae seed=3 model.downsample=": ["conv", "pool"],
    "litevae train-vae --config d": ["data", "demo", "demo-gpu"],
    "litevae train-vae --config ": [*PRESETS_OF_TRAIN_VAE, "data", "mine.yaml", "my folder"],
    "litevae compare-runs --config ": ["data", "mine.yaml", "my folder"],
    "litevae train-vae --": ["--config", "--help", "--help-all", "--print-config"],
    "litevae encode-dataset --ap": ["--append"],
    "litevae encode-dataset ver": ["verify"],
    "litevae encode-dataset re": ["repair", "retry"],
    "litevae encode-dataset verify m": ["mine.yaml", "my folder"],
    "litevae encode-dataset verify th": ["threads="],
    "litevae encode-dataset verify source=": ["contents", "ids", "none"],
    "litevae encode-dataset --config mine.yaml verify data source=c": ["contents"],
    "litevae encode-dataset source=": [],
    "litevae evaluate complexity mod": ["models="],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("completion")
    for name in FILES:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    return folder


def test_bash_completes(folder):
    """As bash calls it: with the line, the cursor at its end, and its own rules for where words end."""
    tries = "\n".join(f"try {json.dumps(line)}" for line in COMPLETED)
    code = f"""
    {script("bash")}
    compopt() {{ :; }}  # it works only while a key is handled
    try() {{ COMP_LINE="$1"; COMP_POINT=${{#1}}; COMPREPLY=(); _litevae; printf '%s\\t' "${{COMPREPLY[@]}}"; echo; }}
    {tries}
    complete -p litevae
    """
    done = subprocess.run(["bash", "-c", code], cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.stderr == ""
    *lines, registered = done.stdout.splitlines()
    assert registered == "complete -F _litevae litevae"
    found = {line: sorted(filter(None, words.split("\t"))) for line, words in zip(COMPLETED, lines, strict=True)}
    assert found == {line: sorted(words) for line, words in COMPLETED.items()}


def test_bash_replaces_the_whole_word_where_an_equals_sign_ends_none():
    code = f"""
    {script("bash")}
    COMP_WORDBREAKS=" "
    COMP_LINE="litevae train-vae model.encoder=sd"; COMP_POINT=${{#COMP_LINE}}; _litevae; echo "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "model.encoder=sd-vae\n"


@pytest.mark.skipif(not shutil.which("zsh"), reason="zsh is not installed")
def test_zsh_completes(folder):
    tries = "\n".join(f"try {json.dumps(line)}" for line in COMPLETED if "my folder" not in COMPLETED[line])
    code = f"""
    compdef() {{ :; }}
    {script("zsh")}
    compadd() {{
        local word
        while [[ "$1" == -* ]]; do
            case "$1" in
                --) shift; break ;;
                -S) shift 2 ;;
                -a) shift; set -- "${{(@P)1}}" ; break ;;
                *) shift ;;
            esac
        done
        for word in "$@"; do [[ "$word" == "$PREFIX"* ]] && replies+=("$word"); done
    }}
    compset() {{ PREFIX="${{PREFIX#*=}}"; }}
    _files() {{ replies+=("$PREFIX"*(N)); }}
    try() {{
        replies=() words=(${{(s: :)1}})
        [[ "$1" == *" " ]] && words+=("")
        CURRENT=${{#words}} PREFIX="${{words[-1]}}"
        _litevae
        printf '%s\\t' "${{replies[@]}}"; echo
    }}
    {tries}
    """
    done = subprocess.run(["zsh", "-f", "-c", code], cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.stderr == ""
    lines = [line for line in COMPLETED if "my folder" not in COMPLETED[line]]
    printed = done.stdout.splitlines()
    found = {line: sorted(filter(None, words.split("\t"))) for line, words in zip(lines, printed, strict=True)}
    assert found == {line: sorted(COMPLETED[line]) for line in lines}


def test_a_shell_that_is_not_known(capsys):
    assert "completion is for bash and zsh: litevae completion bash" in said(capsys, "completion", code=2)
    assert "litevae completion zsh" in said(capsys, "completion", "zhs", code=2)

"""The code that reads the pages for tests/docs/test_commands.py: whatever is wrong in a page has to be seen."""

import pytest

from tests.pages import blocks, commands, expanded_by_zsh, has_comment, lines_of

PAGE = """\
# Title

Text, and `code`.

```bash
python jobs/train_vae.py name=vae \\
    seed=1   # a remark
make lint
```

<!-- no-test: needs a Kubernetes cluster -->
```bash
kubectl get pods
```

<!-- no-test: -->

```sh
kubectl get nodes
```

Another paragraph.

<!-- no-test: a reason that is for nothing -->
Text comes between.

```python
x = 1
```

    make setup && source .venv/bin/activate

- a list
    that goes on

    in a paragraph of its own
"""


def test_blocks_are_found_with_their_languages_places_and_reasons():
    found = blocks(PAGE)
    assert [(block.language, block.line, block.why_not, block.fenced) for block in found] == [
        ("bash", 6, None, True),
        ("bash", 13, "needs a Kubernetes cluster", True),
        ("sh", 19, "", True),
        ("python", 28, None, True),
        ("bash", 31, None, False),
    ]
    assert found[3].text == "x = 1\n"


def test_lines_are_joined_and_prompts_removed():
    (block,) = blocks("```console\n$ python jobs/X.py \\\n    a=1\nits output\n$ make test\n```\n")
    assert lines_of(block) == ["python jobs/X.py  a=1", "make test"]
    (block,) = blocks(
        "```bash\naws put '{\n  \"a\": 1}' # of it\nkubectl apply -f - <<'END'\nkind: [x]\nEND\nls\n```\n"
    )
    assert lines_of(block) == ["aws put '{ \"a\": 1}' # of it", "kubectl apply -f - <<'END'", "ls"]
    assert lines_of(blocks(PAGE)[0]) == ["python jobs/train_vae.py name=vae  seed=1   # a remark", "make lint"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("python jobs/x.py a=1 'b=[1, 2]'  # why", [["python", "jobs/x.py", "a=1", "b=[1, 2]"]]),
        ("make setup && source .venv/bin/activate", [["make", "setup"], ["source", ".venv/bin/activate"]]),
        ("ray status | head; ls > out.txt", [["ray", "status"], ["head"], ["ls"]]),
        ("kubectl port-forward a 1:1 &", [["kubectl", "port-forward", "a", "1:1"]]),
        ("cp 'a && b' c", [["cp", "a && b", "c"]]),
        ("echo ${A#*:} it's#1' # it's a remark", [["echo", "${A#*:}", "its#1"]]),
    ],
)
def test_commands_of_a_line(line, words):
    assert list(commands(line)) == words


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("python jobs/x.py seeds=[0,1]", ["seeds=[0,1]"]),
        ("python jobs/x.py 'seeds=[0,1]' runs=vae-*", ["runs=vae-*"]),
        ("python jobs/x.py source.uri=/data/?.png", ["source.uri=/data/?.png"]),
        ("python jobs/x.py source.uri=s3://b/{000..127}.tar", ["source.uri=s3://b/{000..127}.tar"]),
        ("python jobs/x.py space={a: {uniform: [0, 1]}}", ["[0,"]),
        ("python jobs/x.py out=~/cache", ["out=~/cache"]),
        ("echo =ls", ["=ls"]),
        ("kubectl get \"pods[0]\" 'a*' ${pod#pod/} $?", []),
        ("mkdir -p ~/.ray && ls  # all of them?", []),
        ("python jobs/x.py worker_labels={pool:gpu}", []),
        ("cp \\*.txt a", []),
    ],
)
def test_what_zsh_would_expand(line, words):
    assert expanded_by_zsh(line) == words


@pytest.mark.parametrize(
    ("line", "has"),
    [
        ("python jobs/x.py a=1  # 5 h", True),
        ("make demo # LPIPS' weights", True),
        ("python jobs/x.py 'source.uri=/data/set #2'", False),
        ("echo ${RAY_ADDRESS#*:}", False),
    ],
)
def test_comments_behind_commands(line, has):
    assert has_comment(line) is has

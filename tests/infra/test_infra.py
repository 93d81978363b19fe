"""Everything in infra/, by the schema of its kind and by what the files promise each other; no cluster, no registry.

What the checks refuse is tested, too: each has a file that is wrong in one place."""

import contextlib
import copy
import io
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import ray
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from tests import kuberay

REPO = Path(__file__).resolve().parents[2]
INFRA = REPO / "infra"
MANIFESTS = [*sorted((INFRA / "kuberay").glob("*.yaml")), INFRA / "monitoring" / "podmonitor.yaml"]
COMPOSE = [INFRA / "compose.yaml", INFRA / "monitoring" / "compose.yaml"]
CLUSTER = INFRA / "aws" / "cluster.yaml"
DOCKERFILES = [INFRA / "Dockerfile", INFRA / "mlflow" / "Dockerfile"]
PAGES = [REPO / "README.md", *sorted((REPO / "docs").glob("*.md"))]
BIN = Path(sys.executable).parent

Document = dict[str, Any]


def read(path: Path) -> list[Document]:
    return list(yaml.safe_load_all(path.read_text()))


def walk(node: Any) -> Iterator[Document]:
    """Every mapping in a document."""
    if isinstance(node, dict):
        yield node
        for value in node.values():
            yield from walk(value)
    elif isinstance(node, list):
        for value in node:
            yield from walk(value)


def pods(document: Document) -> list[Document]:
    """The pod specs in a manifest."""
    return [node for node in walk(document) if "containers" in node]


ALL = [document for path in MANIFESTS for document in read(path)]
RAY = {document["metadata"]["name"]: document for document in ALL if document["apiVersion"] == "ray.io/v1"}
JOBS = {name: document for name, document in RAY.items() if document["kind"] == "RayJob"}


def cluster_of(document: Document) -> Document:
    return document["spec"].get("rayClusterSpec") or document["spec"]


def of_kind(kind: str) -> dict[str, Document]:
    return {document["metadata"]["name"]: document for document in ALL if document["kind"] == kind}


PINS = dict(line.split("==") for line in (REPO / "constraints.txt").read_text().splitlines() if "==" in line)
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]


# --- schemas ----------------------------------------------------------------------------------------------------


def test_rays_manifests_fit_kuberays_schemas() -> None:
    assert set(RAY) == {"litevae", "train-vae", "encode-dataset"}
    for document in RAY.values():
        assert not kuberay.problems(document)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "authOption"), {"mode": "token"}),
        (("spec", "authOptions", "mode"), "password"),
        (("spec", "autoscalerOptions", "version"), "v3"),
        (("spec", "workerGroupSpecs", 0, "maxReplicas"), "eight"),
        (("spec", "workerGroupSpecs", 0, "template", "spec", "terminationGracePeriodSecond"), 180),
        (("spec", "headGroupSpec", "template", "spec", "containers", 0, "resource"), {}),
        (("spec", "headGroupSpec", "template", "spec", "containers", 0, "ports", 0, "containerPort"), "http"),
        (("spec", "headGroupSpec", "template", "spec", "containers", 0, "resources", "limits", "memory"), [1]),
        (("spec", "headGroupSpec", "template"), None),
        (("status",), {}),
        (("apiVersion",), "ray.io/v1beta1"),
    ],
)
def test_a_wrong_ray_manifest_is_refused(path: tuple[Any, ...], value: object) -> None:
    document = copy.deepcopy(RAY["litevae"])
    node: Any = document
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    assert kuberay.problems(document)


def core(document: Document) -> bool:
    return not any(group in document["apiVersion"] for group in ("ray.io", "kueue.x-k8s.io", "monitoring.coreos.com"))


@pytest.mark.parametrize("document", filter(core, ALL), ids=lambda document: document["kind"])
def test_kubernetes_own_kinds(document: Document) -> None:
    kubernetes_validate.validate(document, "1.37", strict=True)


@pytest.mark.parametrize("name", RAY)
def test_pods_of_ray_are_pods(name: str) -> None:
    assert len(pods(RAY[name])) == (3 if name == "litevae" else 4)  # head, two pools; the submitter
    for spec in pods(RAY[name]):
        kubernetes_validate.validate(
            {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": spec}, "1.37", strict=True
        )


def test_a_wrong_manifest_of_kubernetes_own_is_refused() -> None:
    service, policy = copy.deepcopy(of_kind("Service")["mlflow"]), copy.deepcopy(of_kind("NetworkPolicy")["dns"])
    service["spec"]["port"] = service["spec"].pop("ports")
    policy["spec"]["egress"] = {"to": []}
    for document in (service, policy):
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(document, "1.37", strict=True)


def compose_check(*paths: Path) -> subprocess.CompletedProcess[str]:
    command = [str(BIN / "check-jsonschema"), "--builtin-schema", "vendor.compose-spec", *map(str, paths)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_compose_files(tmp_path: Path) -> None:
    result = compose_check(*COMPOSE)
    assert result.returncode == 0, result.stdout
    wrong = tmp_path / "compose.yaml"
    wrong.write_text((INFRA / "compose.yaml").read_text().replace("healthcheck:", "healthchek:"))
    result = compose_check(wrong)
    assert result.returncode == 1
    assert "healthchek" in result.stdout


def hadolint(path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([BIN / "hadolint", path], capture_output=True, text=True, timeout=60)


def test_dockerfiles(tmp_path: Path) -> None:
    for path in DOCKERFILES:
        result = hadolint(path)
        assert result.returncode == 0, result.stdout
        users = re.findall(r"^USER (.*)$", path.read_text(), re.MULTILINE)
        assert re.fullmatch(r"[1-9]\d*:\d+", users[-1]), "not root, and by number, as runAsNonRoot wants it"
    wrong = tmp_path / "Dockerfile"
    wrong.write_text(DOCKERFILES[0].read_text().replace("${RAY_VERSION}-${PYTHON}-${PLATFORM}", "latest"))
    assert "DL3007" in hadolint(wrong).stdout


def test_the_image_gets_what_it_needs_and_no_more(tmp_path: Path) -> None:
    """Build the wheel from the files that .dockerignore lets through."""
    first, *rest = [line for line in (REPO / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert (first, rest.pop()) == ("*", "**/__pycache__")
    for line in rest:
        assert line.startswith("!")
        source, target = REPO / line[1:], tmp_path / "context" / line[1:]
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, "."]
    done = subprocess.run(build, cwd=tmp_path / "context", capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for name in re.findall(r"/opt/litevae/([\w./]+)", "".join(path.read_text() for path in MANIFESTS)):
        assert (tmp_path / "context" / name).is_file(), name
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    for package, place in (("litevae", ""), ("pipelines", "litevae_jobs/"), ("jobs", "litevae_jobs/")):
        here = {place + str(path.relative_to(REPO)) for path in (REPO / package).rglob("*.py")}
        assert here <= held


def test_rays_cluster_file() -> None:
    validate_config(prepare_config(read(CLUSTER)[0]))
    for change in ({"idle_timeout_minute": 5}, {"max_workers": "16"}, {"head_node_type": "heads"}):
        with pytest.raises(Exception):  # noqa: B017 - jsonschema's or Ray's own
            validate_config(prepare_config(read(CLUSTER)[0] | change))


def test_the_cluster_file_says_which_variables_it_takes() -> None:
    text = CLUSTER.read_text()
    (named,) = re.findall(r"envsubst '(.*?)'", text)
    assert set(re.findall(r"\$\{(\w+)\}", text)) == set(named.replace("$", "").split())
    page = (REPO / "docs" / "cluster.md").read_text()
    assert f"envsubst '{named}'" in page
    for name in named.split():
        assert f"export {name[1:]}=" in page


def test_commands_of_the_cluster_file_are_shell() -> None:
    config = read(CLUSTER)[0]
    commands = [command for key, value in config.items() if key.endswith("_commands") for command in value]
    assert len(commands) == 10
    for command in commands:
        done = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True, timeout=10)
        assert done.returncode == 0, f"{command}\n{done.stderr}"


# --- versions ---------------------------------------------------------------------------------------------------


def test_one_version_of_ray_and_of_mlflow() -> None:
    assert ray.__version__ == PINS["ray"]
    ours = f"{PROJECT['version']}-ray{PINS['ray']}"
    dockerfile, mlflow = (path.read_text() for path in DOCKERFILES)
    assert f"ARG RAY_VERSION={PINS['ray']}\n" in dockerfile
    python = re.search(r"^ARG PYTHON=(\w+)$", dockerfile, re.MULTILINE)
    assert python
    assert python[1] == "py" + PROJECT["requires-python"].removeprefix(">=").replace(".", "")
    assert f"mlflow=={PINS['mlflow']} boto3=={PINS['boto3']} " in mlflow
    for document in RAY.values():
        assert cluster_of(document)["rayVersion"] == PINS["ray"]
    seen = set()
    for path in [*MANIFESTS, *COMPOSE, CLUSTER, *DOCKERFILES, *PAGES]:
        for name, tag in re.findall(r"\b(litevae|litevae-mlflow|rayproject/ray):([\w.-]*\d[\w.-]*)", path.read_text()):
            wanted = {"litevae": ours, "litevae-mlflow": PINS["mlflow"]}.get(name, f"{PINS['ray']}-{python[1]}")
            assert tag == wanted or (name == "rayproject/ray" and tag in (f"{wanted}-gpu", f"{wanted}-cpu")), path
            seen.add(name)
    assert seen == {"litevae", "litevae-mlflow", "rayproject/ray"}


def test_every_image_is_pinned() -> None:
    images = [node["image"] for path in [*MANIFESTS, *COMPOSE] for document in read(path) for node in walk(document)
              if isinstance(node.get("image"), str)]  # fmt: skip
    assert len(images) > 15
    for image in images:
        assert re.fullmatch(r"[\w./-]+:v?\d[\w.-]*", image), image


# --- secrets, and what can be reached ---------------------------------------------------------------------------

SECRET = re.compile(r"password|passwd|secret|token|access_?key|redisaddress", re.IGNORECASE)
NAMES = {"secretName", "HttpTokens", "redisAddress"}  # the name of a Secret, not what is in it ...


def secrets(document: Any) -> list[str]:
    """Values of secrets that are written out, rather than asked for or taken from a Secret."""
    found = []
    for node in walk(document):
        pairs = [(node["name"], node["value"])] if {"name", "value"} <= node.keys() else list(node.items())
        for name, value in pairs:
            if SECRET.search(str(name)) and name not in NAMES and isinstance(value, str):
                refused = re.fullmatch(r"\$\{\w+:\?[^}]+\}", value)  # Compose does not start without it
                if not refused and not value.startswith("~/"):
                    found.append(f"{name}={value}")
            elif re.search(r"://[^/$]*:(?!\$[{(])[^/]*@", str(value)) and isinstance(value, str):
                found.append(f"{name}={value}")
    return found


def test_no_secrets() -> None:
    for path in [*MANIFESTS, *COMPOSE, CLUSTER]:
        for document in read(path):
            assert document["kind"] != "Secret" if "kind" in document else True, path
            assert not secrets(document), path
    for path in [path for path in INFRA.rglob("*") if path.is_file()] + PAGES:
        assert not re.search(r"AKIA[0-9A-Z]{16}|-----BEGIN|\bsk-\w{20}", path.read_text()), path
    example = (INFRA / ".env.example").read_text()
    assert re.findall(r"^(\w+)=(.+)$", example, re.MULTILINE) == []
    asked = set(re.findall(r"\$\{(\w+)", (INFRA / "compose.yaml").read_text()))
    assert set(re.findall(r"^(\w+)=", example, re.MULTILINE)) == asked
    assert "/infra/.env" in (REPO / ".gitignore").read_text().splitlines()


def test_a_written_secret_is_found() -> None:
    compose = read(INFRA / "compose.yaml")[0]
    compose["services"]["postgres"]["environment"]["POSTGRES_PASSWORD"] = "postgres"
    compose["services"]["mlflow"]["environment"]["MLFLOW_BACKEND_STORE_URI"] = "postgresql://mlflow:mlflow@postgres/a"
    compose["services"]["s3"]["environment"]["AWS_SECRET_ACCESS_KEY"] = "${S3_SECRET_KEY:-minioadmin}"
    assert len(secrets(compose)) == 3
    cluster = copy.deepcopy(RAY["litevae"])
    head = pods(cluster)[0]["containers"][0]
    head["env"] = [{"name": "RAY_AUTH_TOKEN", "value": "x"}]
    assert secrets(cluster) == ["RAY_AUTH_TOKEN=x"]


def reachable(document: Document) -> list[str]:
    """What is open to others than the machine's or the cluster's own."""
    found = []
    for name, service in document.get("services", {}).items():
        found += [f"{name}: {port}" for port in service.get("ports", []) if not str(port).startswith("127.0.0.1:")]
        listens = " ".join(service.get("command", [])) + str(service.get("environment", ""))
        if service.get("network_mode") == "host" and "127.0.0.1" not in listens:
            found.append(f"{name}: on the host's network")
    kind = document.get("kind")
    if kind in ("Ingress", "Gateway", "HTTPRoute"):
        found.append(kind)
    if kind == "Service" and document["spec"].get("type", "ClusterIP") != "ClusterIP":
        found.append(f"Service of type {document['spec']['type']}")
    for node in walk(document):
        found += [f"{key}: {node[key]}" for key in ("hostPort", "hostNetwork", "enableIngress") if node.get(key)]
        if node.get("serviceType", "ClusterIP") != "ClusterIP":
            found.append(f"serviceType: {node['serviceType']}")
    for name, kind_of_node in document.get("available_node_types", {}).items():
        if not kind_of_node["node_config"].get("SecurityGroupIds"):
            found.append(f"{name}: Ray's default security group, open to SSH from everywhere")
        if kind_of_node["node_config"].get("MetadataOptions", {}).get("HttpTokens") != "required":
            found.append(f"{name}: credentials by IMDSv1")
    for command in document.get("head_start_ray_commands", []):
        if "--head" in command and "--dashboard-host=127.0.0.1" not in command:
            found.append("the dashboard")
    return found


def test_nothing_is_reached_from_outside() -> None:
    for path in [*MANIFESTS, *COMPOSE, CLUSTER]:
        for document in read(path):
            assert not reachable(document), path
    assert sum(len(service.get("ports", [])) for service in read(COMPOSE[0])[0]["services"].values()) == 2


def test_what_is_open_is_found() -> None:
    compose, cluster = read(INFRA / "compose.yaml")[0], read(CLUSTER)[0]
    compose["services"]["postgres"]["ports"] = ["5432:5432", "0.0.0.0:5433:5432", 5434]
    assert len(reachable(compose)) == 3
    service = copy.deepcopy(of_kind("Service")["mlflow"])
    service["spec"]["type"] = "LoadBalancer"
    assert reachable(service)
    rays = copy.deepcopy(RAY["litevae"])
    rays["spec"]["headGroupSpec"]["serviceType"] = "NodePort"
    rays["spec"]["workerGroupSpecs"][0]["template"]["spec"]["hostNetwork"] = True
    assert len(reachable(rays)) == 2
    del cluster["available_node_types"]["head"]["node_config"]["SecurityGroupIds"]
    cluster["available_node_types"]["gpu"]["node_config"]["MetadataOptions"]["HttpTokens"] = "optional"
    cluster["head_start_ray_commands"] = ["ray start --head --dashboard-host=0.0.0.0"]
    assert len(reachable(cluster)) == 4  # cpu has gpu's options


def test_the_network_policy_covers_what_there_is() -> None:
    policies = {name: document["spec"] for name, document in of_kind("NetworkPolicy").items()}
    assert policies["deny-all"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    apps = {node["app"] for document in filter(core, ALL) for node in walk(document) if "app" in node}
    assert apps == {"redis", "mlflow", "postgres"}
    for app in apps:  # each may be reached at its service's port, by someone
        ports = {port["port"] for port in of_kind("Service")[app]["spec"]["ports"]}
        (policy,) = [p for p in policies.values() if p["podSelector"] == {"matchLabels": {"app": app}}]
        assert {port["port"] for rule in policy["ingress"] for port in rule["ports"]} == ports
        away = {port["port"] for p in policies.values() for rule in p.get("egress", []) for to in rule["to"]
                if to.get("podSelector") == {"matchLabels": {"app": app}} for port in rule["ports"]}  # fmt: skip
        assert away == ports
    for policy in policies.values():  # never the metadata service
        for rule in policy.get("egress", []):
            for block in (to["ipBlock"] for to in rule["to"] if "ipBlock" in to):
                assert block == {"cidr": "0.0.0.0/0", "except": ["169.254.0.0/16"]}


# --- pods -------------------------------------------------------------------------------------------------------


def weaknesses(spec: Document, serves: bool = True) -> list[str]:
    """What Kubernetes' "restricted" standard and this project ask of a pod."""
    found = []
    around = spec.get("securityContext", {})
    if not (around.get("runAsNonRoot") and around.get("runAsUser")):
        found.append("may run as root")
    if around.get("seccompProfile") != {"type": "RuntimeDefault"}:
        found.append("no seccomp profile")
    for container in spec["containers"]:
        own = container.get("securityContext", {})
        if own.get("allowPrivilegeEscalation") is not False or own.get("capabilities") != {"drop": ["ALL"]}:
            found.append("may gain privileges")
        resources = container.get("resources", {})
        if not {"cpu", "memory"} <= resources.get("requests", {}).keys() or "memory" not in resources.get("limits", {}):
            found.append("no bounds")
        if serves and not {"readinessProbe", "livenessProbe"} <= container.keys():
            found.append("no probes")
    return found


def test_pods_are_restricted_bounded_and_probed() -> None:
    assert of_kind("Namespace")["litevae"]["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    checked = 0
    for document in ALL:
        for spec in pods(document):
            assert not weaknesses(spec, serves=spec.get("restartPolicy") != "Never"), document["metadata"]["name"]
            checked += 1
    assert checked == 3 + 2 * 4 + 3
    weak = copy.deepcopy(pods(RAY["litevae"])[0])
    weak["securityContext"]["runAsUser"] = 0
    weak["containers"][0] |= {"securityContext": {"privileged": True}, "resources": {}, "livenessProbe": None}
    del weak["containers"][0]["livenessProbe"]
    assert weaknesses(weak) == ["may run as root", "may gain privileges", "no bounds", "no probes"]


@pytest.mark.parametrize("name", RAY)
def test_rays_nodes(name: str) -> None:
    """The head and both pools: token, shared folder, environment, time for a last checkpoint; alike in all files."""
    cluster, template = cluster_of(RAY[name]), RAY["litevae"]["spec"]
    assert cluster["authOptions"] == {"mode": "token", "secretName": "ray-token"}
    assert cluster["gcsFaultToleranceOptions"] == template["gcsFaultToleranceOptions"]
    environment = of_kind("ConfigMap")["litevae"]["data"]
    assert {"MLFLOW_TRACKING_URI", "RAY_JOB_STOP_WAIT_TIME_S"} <= environment.keys()
    assert of_kind("PersistentVolumeClaim")["shared"]["spec"]["accessModes"] == ["ReadWriteMany"]
    groups = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    assert {name: group["labels"] for name, group in groups.items()} == {
        name: {"pool": name} for name in ("gpu", "cpu")
    }
    here = [cluster["headGroupSpec"], *groups.values()]
    there = [template["headGroupSpec"], *template["workerGroupSpecs"]]
    for one, other in zip(here, there, strict=True):
        spec, container = one["template"]["spec"], one["template"]["spec"]["containers"][0]
        assert spec["terminationGracePeriodSeconds"] > int(environment["RAY_JOB_STOP_WAIT_TIME_S"]) + 15
        assert {"name": "RAY_AUTH_MODE", "value": "token"} in container["env"]
        assert {"configMapRef": {"name": "litevae"}} in container["envFrom"]
        assert spec["volumes"] == [{"name": "shared", "persistentVolumeClaim": {"claimName": "shared"}}]
        assert container["volumeMounts"] == [{"name": "shared", "mountPath": "/shared"}]
        assert "preStop" in container["lifecycle"]
        assert container.keys() == other["template"]["spec"]["containers"][0].keys()
        for key in container.keys() - {"ports"}:
            assert container[key] == other["template"]["spec"]["containers"][0][key], key
    gpu = groups["gpu"]["template"]["spec"]
    assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in gpu["tolerations"]
    assert gpu["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert "nvidia.com/gpu" not in groups["cpu"]["template"]["spec"]["containers"][0]["resources"]["limits"]


def test_the_standing_cluster_grows_by_itself() -> None:
    spec = RAY["litevae"]["spec"]
    assert spec["enableInTreeAutoscaling"]
    assert spec["autoscalerOptions"]["version"] == "v2"
    for group in spec["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] < group["maxReplicas"]


UNITS = {"m": 1e-3, "": 1.0, "Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}


def quantity(text: str) -> float:
    number, unit = re.findall(r"^([\d.]+)(\w*)$", str(text))[0]
    return float(number) * UNITS[unit]


@pytest.mark.parametrize("name", JOBS)
def test_a_job_fits_its_cluster_and_its_queue(name: str) -> None:
    job, cluster = JOBS[name], cluster_of(JOBS[name])
    settings = dict(word.split("=", 1) for word in shlex.split(job["spec"]["entrypoint"]) if "=" in word)
    groups = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    for field in ("worker", "decode"):
        if pool := settings.get(f"ray.{field}_labels.pool"):
            assert groups[pool]["labels"] == {"pool": pool}
    assert int(settings["ray.workers"]) == groups["gpu"]["replicas"]
    assert settings["root"].startswith("/shared/")
    total: dict[str, float] = {}
    heads = [(cluster["headGroupSpec"], 1), (job["spec"]["submitterPodTemplate"], 1)]
    for group, count in heads + [(group, group["replicas"]) for group in groups.values()]:
        assert group.get("minReplicas", count) == group.get("maxReplicas", count) == count  # Kueue wants a fixed size
        for container in (group.get("template") or group)["spec"]["containers"]:
            for resource, value in container["resources"]["requests"].items():
                total[resource] = total.get(resource, 0) + count * quantity(value)
    labels = job["metadata"]["labels"]
    queue = of_kind("LocalQueue")[labels["kueue.x-k8s.io/queue-name"]]
    assert queue["metadata"]["namespace"] == job["metadata"]["namespace"]
    assert labels["kueue.x-k8s.io/priority-class"] in of_kind("WorkloadPriorityClass")
    quotas, flavors = {}, of_kind("ResourceFlavor")
    for group in of_kind("ClusterQueue")[queue["spec"]["clusterQueue"]]["spec"]["resourceGroups"]:
        for flavor in group["flavors"]:
            assert flavor["name"] in flavors
            quotas |= {resource["name"]: quantity(resource["nominalQuota"]) for resource in flavor["resources"]}
        assert set(group["coveredResources"]) == {resource["name"] for resource in group["flavors"][0]["resources"]}
    assert total.keys() == quotas.keys()  # what a queue does not know it never admits
    assert all(total[resource] <= quotas[resource] for resource in total)
    assert job["spec"]["shutdownAfterJobFinishes"]


# --- commands ---------------------------------------------------------------------------------------------------


def commands() -> list[tuple[str, str, list[str]]]:
    """(where, script, arguments) of every `python jobs/X.py ...` in manifests; tests/docs has those of the pages."""
    found = []
    for where, job in JOBS.items():
        text = " ".join(job["spec"]["entrypoint"].split())
        for script, rest in re.findall(r"python (?:/opt/litevae/)?(jobs/\w+\.py)([^\n]*)", text):
            found.append((where, script, shlex.split(re.split(r"&&|\||;|>", rest)[0], comments=True)))
    return found


def printed(script: str, words: list[str]) -> tuple[int, str]:
    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        patch.setattr(sys, "argv", [script, *words, "--print-config"])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(REPO / script), run_name="__main__")
    return end.value.code, output.getvalue()


def test_every_command_that_is_shown_is_understood() -> None:
    shown = commands()
    assert {where for where, *_ in shown} == {"train-vae", "encode-dataset"}
    for where, script, words in shown:
        code, output = printed(script, words)
        assert code == 0, f"{where}: {script} {shlex.join(words)}\n{output}"
    code, output = printed("jobs/encode_dataset.py", ["ray.decode_label.pool=cpu"])
    assert code == 2
    assert "unknown config key" in output


def test_files_that_pages_and_comments_name_are_there() -> None:
    named = re.compile(r"(?<![\w/])(?:/opt/litevae/)?((?:infra|docs|jobs)/[\w./-]*\w\.(?:yaml|json|py|md|example))")
    for path in [*PAGES, *(path for path in INFRA.rglob("*") if path.is_file())]:
        for name in named.findall(path.read_text()):
            assert (REPO / name).exists(), f"{path}: {name}"


def shell(script: str, **environment: str) -> str:
    """What `kubectl` would be given."""
    command = ["bash", "-c", f"kubectl() {{ cat; }}\n{script}"]
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_apply_puts_the_registry_before_our_images() -> None:
    (apply,) = re.findall(r"^(apply\(\) .*)$", (REPO / "docs" / "cluster.md").read_text(), re.MULTILINE)
    for path in MANIFESTS:
        given = shell(f"{apply}\napply {path}", REGISTRY="host:5000/team", PATH="/usr/bin:/bin")
        documents, here = list(yaml.safe_load_all(given)), read(path)
        images = [[node["image"] for node in walk(these) if "image" in node] for these in (documents, here)]
        assert images[0] == [re.sub("^(?=litevae)", "host:5000/team/", image) for image in images[1]]
        assert len(documents) == len(here)


def test_the_rules_become_a_resource_of_kubernetes() -> None:
    page = (REPO / "docs" / "cluster.md").read_text()
    (recipe,) = re.findall(r"^(\(printf .*?kubectl apply -f -)$", page, re.MULTILINE | re.DOTALL)
    document = yaml.safe_load(shell(recipe, PATH="/usr/bin:/bin"))
    assert (document["apiVersion"], document["kind"]) == ("monitoring.coreos.com/v1", "PrometheusRule")
    assert document["spec"] == yaml.safe_load((INFRA / "monitoring" / "alerts.yaml").read_text())


# --- monitoring -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ours() -> set[str]:
    """The names of our metrics as Ray exports them."""
    text = (REPO / "pipelines" / "runtime" / "prometheus.py").read_text()
    kinds = {name: kind for kind, name in re.findall(r'_(gauge|counter)\(\s*"(litevae_\w+)"', text)}
    assert len(kinds) >= 9
    return {f"ray_{name}" + "_total" * (kind == "counter") for name, kind in kinds.items()}


@pytest.fixture(scope="module")
def rays() -> set[str]:
    """Names of Ray's metrics: from its dashboards, its agent and its control service."""
    wheel = Path(ray.__file__).parent
    panels = "".join(path.read_text() for path in (wheel / "dashboard/modules/metrics/dashboards").glob("*.py"))
    agent = (wheel / "dashboard/modules/reporter/reporter_agent.py").read_text()
    control = (wheel / "core/src/ray/gcs/gcs_server").read_bytes()
    gauges = {f"ray_{name}" for name in re.findall(r'"(\w+)": Gauge\(', agent)}
    return (
        gauges
        | set(re.findall(r"\bray_[a-z_]+", panels))
        | {f"ray_{name}" for name in ("node_failure_total",) if name.encode() in control}
    )


def queries(document: Any) -> list[str]:
    return [node["expr"] for node in walk(document) if "expr" in node]


def unknown(expressions: list[str], known: set[str]) -> set[str]:
    return set(re.findall(r"\bray_\w+", " ".join(expressions))) - known


def test_dashboard_and_alerts_ask_for_what_there_is(ours: set[str], rays: set[str]) -> None:
    dashboard = json.loads((INFRA / "monitoring" / "dashboard.json").read_text())
    alerts = yaml.safe_load((INFRA / "monitoring" / "alerts.yaml").read_text())
    assert not unknown(queries(dashboard), ours | rays)
    assert not unknown(queries(alerts), ours | rays)
    assert ours <= set(re.findall(r"\bray_\w+", " ".join(queries(dashboard))))
    assert unknown(["rate(ray_litevae_images_encoded[5m])"], ours | rays) == {"ray_litevae_images_encoded"}
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len({panel["title"] for panel in panels}) == len(panels)
    taken = set()
    for panel in panels:  # none on another
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not cells & taken
        assert at["x"] + at["w"] <= 24
        taken |= cells
    rules = [rule for group in alerts["groups"] for rule in group["rules"]]
    assert len({rule["alert"] for rule in rules}) == len(rules)
    for rule in rules:
        assert rule["labels"]["severity"] in ("info", "warning", "critical")
        assert rule["annotations"].keys() == {"summary", "description"}


def test_prometheus_finds_ray() -> None:
    (job,) = yaml.safe_load((INFRA / "monitoring" / "prometheus.yaml").read_text())["scrape_configs"]
    from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE

    assert job["file_sd_configs"] == [{"files": [f"/tmp/ray/{PROMETHEUS_SERVICE_DISCOVERY_FILE}"]}]
    ports = {port["name"]: port["containerPort"] for node in walk(RAY["litevae"]) for port in node.get("ports", [])}
    endpoints = of_kind("PodMonitor")["ray"]["spec"]["podMetricsEndpoints"]
    allowed = of_kind("NetworkPolicy")["ray"]["spec"]["ingress"][1]["ports"]
    assert {ports[endpoint["port"]] for endpoint in endpoints} == {port["port"] for port in allowed}


promtool = pytest.mark.skipif(not shutil.which("promtool"), reason="promtool (Debian: prometheus) is not there")

CASES = """
rule_files: [RULES]
evaluation_interval: 1m
tests:
  - interval: 1m
    input_series:
      - {series: 'ray_node_failure_total{instance="head"}', values: '_x5 1x30'}
      - {series: 'ray_memory_manager_worker_eviction_total{Name="decode"}', values: '_x5 1x30'}
      - {series: 'ray_litevae_images_quarantined_total{run="a", reason="missing"}', values: '1x30'}
      - {series: 'ray_litevae_images_encoded_total{run="a"}', values: '100x30'}
      - {series: 'ray_litevae_images_quarantined_total{run="b", reason="missing"}', values: '1x30'}
      - {series: 'ray_litevae_images_encoded_total{run="b"}', values: '1000x30'}
      - {series: 'ray_litevae_train_loss{run="c"}', values: 'NaN'}
    alert_rule_test:
      - {eval_time: 4m, alertname: NodeDied, exp_alerts: []}
      - {eval_time: 8m, alertname: NodeDied, exp_alerts: [{exp_labels: {severity: warning}, exp_annotations: NODE}]}
      - {eval_time: 25m, alertname: NodeDied, exp_alerts: []}
      - {eval_time: 8m, alertname: WorkersKilledForMemory, exp_alerts: [{exp_labels: {severity: warning, Name: decode}, exp_annotations: OOM}]}
      - {eval_time: 25m, alertname: WorkersKilledForMemory, exp_alerts: []}
      - {eval_time: 10m, alertname: ImagesQuarantined, exp_alerts: [{exp_labels: {severity: warning, run: a}, exp_annotations: IMAGES}]}
      - {eval_time: 0m, alertname: LossNotFinite, exp_alerts: [{exp_labels: {severity: critical, run: c}, exp_annotations: LOSS}]}
"""  # noqa: E501


@promtool
def test_alerts_fire(tmp_path: Path) -> None:
    rules = INFRA / "monitoring" / "alerts.yaml"
    said = {node["alert"]: node["annotations"] for node in walk(yaml.safe_load(rules.read_text())) if "alert" in node}
    text = CASES.replace("RULES", str(rules))
    for name, alert, labels in [
        ("NODE", "NodeDied", {}), ("OOM", "WorkersKilledForMemory", {"Name": "decode"}),
        ("IMAGES", "ImagesQuarantined", {"run": "a"}), ("LOSS", "LossNotFinite", {"run": "c"}),
    ]:  # fmt: skip
        texts = json.dumps(said[alert])
        for label, value in labels.items():
            texts = texts.replace(f"{{{{ $labels.{label} }}}}", value)
        text = text.replace(name, texts)
    (tmp_path / "cases.yaml").write_text(text)
    for command in (["test", "rules", tmp_path / "cases.yaml"], ["check", "rules", rules],
                    ["check", "config", "--syntax-only", INFRA / "monitoring" / "prometheus.yaml"]):  # fmt: skip
        done = subprocess.run(["promtool", *map(str, command)], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr


# --- costs ------------------------------------------------------------------------------------------------------


def test_the_cost_table_is_arithmetic_on_what_was_measured() -> None:
    measured = (REPO / "docs" / "performance.md").read_text()
    page = (REPO / "docs" / "cluster.md").read_text()
    rows = re.findall(r"^\| ((?:en|de)code.*?) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) P \|$", page, re.MULTILINE)
    assert len(rows) == 6
    names = {"LiteVAE-S": "LiteVAE-S, fast", "LiteVAE-B": "LiteVAE-B, fast", "LiteVAE-M": "LiteVAE-M, fast",
             "kernels": "SD-VAE, fast", "diffusers": "SD-VAE, eager", "decode": "decode=fast"}  # fmt: skip
    for what, rate, hours, price in rows:
        (name,) = [row for word, row in names.items() if word in what]
        assert re.search(rf"^\| {re.escape(name)} \|(.*\|)? {re.escape(rate)}\b", measured, re.MULTILINE), what
        assert hours == price == f"{1e6 / 3600 / float(rate):.1f}"
    examples = re.findall(r"^\| [^|]+ \| ([\d.,]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", page, re.MULTILINE)
    assert len(examples) == 4
    for rate, hours, price, dollars in examples:
        assert re.search(rf"\b{re.escape(rate)}\b", measured)
        assert hours == f"{1.2e6 / 3600 / float(rate.replace(',', '')):.2f}"
        assert dollars == f"{1.2e6 / 3600 / float(rate.replace(',', '')) * float(price):.2f}"
    assert f"{1.2e6 * 16384 / 1e9:.1f} GB: ${1.2e6 * 16384 / 1e9 * 0.023:.2f} a month" in page
    assert f"2 x {-(-1_200_000 // 512):,} PUTs for shards of 512: ${2 * -(-1_200_000 // 512) * 5e-6:.2f}" in page
    assert f"1,824 / 705 = {1824 / 705:.1f} cores" in page
    assert f"{4 * 2 * 32 * 32 * 2:,} bytes" in page
    assert f"{2 * -(-(10**6) // 512):,} a million images" in page

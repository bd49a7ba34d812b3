"""What lies in cluster/ is checked without a Kubernetes cluster: schemas, imports, settings.

Kubernetes' own kinds against its published strict schemas; KubeRay's against the subset of its API
in kuberay.schema.json; `ray up` files against the schema in Ray's wheel; the image file by
hadolint; every command that a manifest starts is one that exists.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from referencing import Registry, Resource

from jobs.command import workload
from spo.config import RunConfig, load_config
from spo.session.placement import Room, check_room, phases_of
from tests.cluster.kustomize import apply, read_documents, render

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
OVERLAYS = sorted((CLUSTER / "kuberay" / "overlays").iterdir())
JOBS = sorted(p for p in (CLUSTER / "kuberay" / "jobs").glob("*.yaml") if p.stem != "kustomization")
RAY_UP = sorted((CLUSTER / "ray-up").glob("*.yaml"))
KUBERNETES = "1.34"


def named(path: Path) -> str:
    return path.stem


def kuberay_validator(kind: str) -> jsonschema.Draft202012Validator:
    schema = json.loads((Path(__file__).parent / "kuberay.schema.json").read_text())
    known = files(kubernetes_validate) / "kubernetes-json-schema" / f"v{KUBERNETES}.0-local-strict"
    kubernetes = json.loads((known / "_definitions.json").read_text()) | {"$id": "kubernetes"}
    registry = Registry().with_resources(
        [
            ("kubernetes", Resource.from_contents(kubernetes)),
            ("kuberay", Resource.from_contents(schema)),
        ]
    )
    return jsonschema.Draft202012Validator({"$ref": f"kuberay#/$defs/{kind}"}, registry=registry)


def check(document: dict[str, Any]) -> None:
    """Raise ValidationError unless a document fits the schema of its kind."""
    if document["apiVersion"].startswith("ray.io/"):
        kuberay_validator(document["kind"]).validate(document)
    else:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)


@pytest.fixture(scope="module", params=OVERLAYS, ids=named)
def overlay(request: pytest.FixtureRequest) -> Path:
    return request.param


@pytest.fixture(scope="module")
def documents(overlay: Path) -> list[dict[str, Any]]:
    return render(overlay)


def cluster_of(documents: list[dict[str, Any]]) -> dict[str, Any]:
    (found,) = [d for d in documents if d["kind"] == "RayCluster"]
    return found


def pods_of(cluster: dict[str, Any]) -> dict[str, dict[str, Any]]:
    spec = cluster["spec"]
    groups = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    return {
        name: group["template"]["spec"]
        for name, group in {"head": spec["headGroupSpec"], **groups}.items()
    }


def test_every_document_fits_its_schema(documents: list[dict[str, Any]]) -> None:
    kinds = {document["kind"] for document in documents}
    assert {"RayCluster", "ConfigMap", "PersistentVolumeClaim", "NetworkPolicy"} <= kinds
    for document in documents:
        check(document)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("/spec/headGroupSpec/template/spec/containers/0/imagee", "x"),
        ("/spec/workerGroupSpecs/0/minReplicas", "one"),
        ("/spec/workerGroupSpecs/0/template/spec/containers/0/ports/0/containerPort", "http"),
        ("/spec/authOption", {"mode": "token"}),
        ("/spec/authOptions/mode", "password"),
    ],
)
def test_the_schema_finds_a_planted_mistake(path: str, value: object) -> None:
    cluster = cluster_of(render(OVERLAYS[0]))
    apply(cluster, {"op": "add", "path": path, "value": value})
    with pytest.raises(jsonschema.ValidationError):
        check(cluster)


def test_kubectl_renders_the_same(overlay: Path, documents: list[dict[str, Any]]) -> None:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed; the strict renderer of these tests stands alone")
    done = subprocess.run(
        [kubectl, "kustomize", str(overlay)], capture_output=True, text=True, check=True, timeout=60
    )

    def sorted_by_name(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return sorted(found, key=lambda d: (d["kind"], d["metadata"]["name"]))

    theirs = [document for document in yaml.safe_load_all(done.stdout) if document]
    assert sorted_by_name(theirs) == sorted_by_name(documents)


def test_pods_are_locked_down_and_equal_where_they_must_be(documents: list[dict[str, Any]]) -> None:
    cluster = cluster_of(documents)
    assert cluster["spec"]["rayVersion"] == version("ray")
    assert cluster["spec"]["authOptions"] == {"mode": "token"}
    pods = pods_of(cluster)
    images = {pod["containers"][0]["image"] for pod in pods.values()}
    assert len(images) == 1
    assert not next(iter(images)).endswith(":latest")
    claims = {d["metadata"]["name"] for d in documents if d["kind"] == "PersistentVolumeClaim"}
    settings = {d["metadata"]["name"] for d in documents if d["kind"] == "ConfigMap"}
    for pod in pods.values():
        (container,) = pod["containers"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert {"cpu", "memory"} <= set(container["resources"]["limits"])
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
        assert volumes["cache"]["persistentVolumeClaim"]["claimName"] in claims
        assert volumes["runs"]["persistentVolumeClaim"]["claimName"] in claims
        assert volumes["settings"]["configMap"]["name"] in settings


def test_no_secret_is_written_down() -> None:
    for path in CLUSTER.rglob("*.yaml"):
        for document in read_documents(path) if "kuberay" in path.parts else []:
            if isinstance(document, dict):
                assert document.get("kind") != "Secret", path
        for line in path.read_text().splitlines():
            named_secret = re.search(r"(password|token|secret\w*key)\s*[:=]\s*(\S+)", line, re.I)
            value = named_secret.group(2) if named_secret else ""
            assert not re.fullmatch(r"['\"]?[A-Za-z0-9+/=_-]{16,}['\"]?", value), f"{path}: {line}"


def settings_of(documents: list[dict[str, Any]], folder: Path) -> RunConfig:
    (settings,) = [d for d in documents if d["kind"] == "ConfigMap"]
    path = folder / "run.yaml"
    path.write_text(settings["data"]["run.yaml"])
    return load_config(path)


def test_the_largest_cluster_holds_every_stage(
    documents: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Scaled to maxReplicas, the groups have the labels and resources that the settings ask for."""
    config = settings_of(documents, tmp_path)
    rooms = []
    for group in cluster_of(documents)["spec"]["workerGroupSpecs"]:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        rooms += [
            Room(
                node=f"{group['groupName']}-{i}",
                cpus=float(limits["cpu"]),
                gpus=float(limits["nvidia.com/gpu"]),
                labels=group.get("labels", {}),
            )
            for i in range(group["maxReplicas"])
        ]
    check_room(phases_of(workload(config), ("extract", "train", "evaluate")), rooms)


def commands_in(text: str) -> list[list[str]]:
    """Every `python -m MODULE ...` in a text, split into words."""
    found = re.findall(r"python -m (jobs\.[^\n&|'\"]*)", text.replace("\\\n", " "))
    return [shlex.split(command) for command in found]


@pytest.mark.parametrize("path", JOBS, ids=named)
def test_a_job_starts_what_exists(path: Path) -> None:
    (document,) = read_documents(path)
    check(document)
    clusters = {cluster_of(render(overlay))["metadata"]["name"] for overlay in OVERLAYS}
    assert {document["spec"]["clusterSelector"]["ray.io/cluster"]} == clusters
    commands = commands_in(document["spec"]["entrypoint"])
    assert commands
    for module, *arguments in commands:
        assert importlib.util.find_spec(module), module
        flag, settings = arguments
        assert flag == "--config"
        assert settings.startswith("/etc/spo/")
        assert all((overlay / Path(settings).name).is_file() for overlay in OVERLAYS)


def test_every_command_in_cluster_and_readme_starts_what_exists() -> None:
    texts = [ROOT / "README.md", *(p for p in CLUSTER.rglob("*") if p.is_file())]
    modules = {
        (path.name, command[0].rstrip("`.,:;)"))
        for path in texts
        for command in commands_in(path.read_text(errors="replace"))
    }
    assert modules
    missing = [(name, m) for name, m in modules if importlib.util.find_spec(m) is None]
    assert missing == []


@pytest.mark.parametrize("path", sorted((ROOT / "tune_configs").glob("*.yaml")), ids=named)
def test_every_shipped_configuration_loads(path: Path) -> None:
    if path.stem.startswith("sweep"):
        pytest.skip("a search space, not a configuration: see the tests of the sweep")
    load_config(path)


@pytest.mark.parametrize("path", RAY_UP, ids=named)
def test_ray_up_files_fit_rays_own_schema(path: Path) -> None:
    import ray.autoscaler
    from ray.autoscaler._private.util import prepare_config, validate_config

    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    config = yaml.safe_load(path.read_text())
    jsonschema.validate(config, schema)
    prepared = prepare_config(config)
    validate_config(prepared)
    assert prepared["head_node_type"] in prepared["available_node_types"]
    assert config["docker"]["image"].endswith(":0.1.0")
    with pytest.raises(jsonschema.ValidationError, match="max_worker"):
        jsonschema.validate({**config, "max_worker": 1}, schema)


@pytest.mark.parametrize("name", ["image", "uv"])
def test_runtime_environments_are_ones_that_ray_takes(name: str) -> None:
    from ray.runtime_env import RuntimeEnv

    content = yaml.safe_load((CLUSTER / "runtime-env" / f"{name}.yaml").read_text())
    assert dict(RuntimeEnv(**content))["env_vars"]["TOKENIZERS_PARALLELISM"] == "false"


def test_the_image_file_is_clean() -> None:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    assert hadolint, "hadolint is not installed: install the 'dev' extra"
    done = subprocess.run(
        [hadolint, str(CLUSTER / "Dockerfile")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    text = (CLUSTER / "Dockerfile").read_text()
    assert re.search(r"^USER 1000:1000$", text, re.M)
    assert all(":" in line.split()[1] for line in re.findall(r"^FROM .*$", text, re.M))
    copied = re.findall(r"^COPY (?!--from)(?:--chown=\S+ )?(.+) \S+$", text, re.M)
    assert copied
    allowed = (ROOT / ".dockerignore").read_text().splitlines()
    for source in " ".join(copied).split():
        assert (ROOT / source).exists(), source
        assert f"!{source}" in allowed, f"{source} is not in .dockerignore's list"


def test_shell_files_parse() -> None:
    for path in sorted(CLUSTER.rglob("*.sbatch")):
        subprocess.run(["bash", "-n", str(path)], check=True, timeout=10)


@pytest.mark.parametrize("path", sorted((CLUSTER / "grafana").glob("*.json")), ids=named)
def test_dashboards_are_grafanas(path: Path) -> None:
    board = json.loads(path.read_text())
    assert board["title"]
    assert re.fullmatch(r"[a-zA-Z0-9_-]{1,40}", board["uid"])
    numbers = [panel["id"] for panel in board["panels"]]
    assert len(set(numbers)) == len(numbers)
    for panel in board["panels"]:
        if panel["type"] == "row":
            continue
        assert panel["targets"], panel["title"]
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24

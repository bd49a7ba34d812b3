"""`cluster/local.py` with a token, and what users do on it: submit, stop, resume, doctor, mistakes.

One cluster for all tests of this file; jobs go through the `ray job` command line as in
cluster/README.md.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from spo.artifact import SteeringArtifact
from spo.config import load_config
from tests.fake_run import write_fake_run

pytestmark = [pytest.mark.ray, pytest.mark.slow]
ROOT = Path(__file__).parents[2]
RAY = str(Path(sys.executable).with_name("ray"))
QUICK_S = 90.0
"""A refusal takes under 30 s on a quiet machine; half of it is the start of Python and Ray."""


def local_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("spo_local", ROOT / "cluster" / "local.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class User:
    """Somebody with a shell that points to the cluster."""

    def __init__(self, state: dict[str, Any]) -> None:
        self.state = state
        self.variables = {
            **{k: v for k, v in os.environ.items() if not k.startswith("RAY_")},
            "RAY_ADDRESS": state["address"],
            "RAY_API_SERVER_ADDRESS": state["dashboard"],
            **state["environment"],
        }

    def run(
        self, *command: str, cwd: Path = ROOT, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            cwd=cwd,
            env=self.variables | variables,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    def submit(
        self, *entrypoint: str, options: tuple[str, ...] = (), cwd: Path = ROOT
    ) -> subprocess.CompletedProcess[str]:
        environment = str(ROOT / "cluster" / "runtime-env" / "image.yaml")
        command = (RAY, "job", "submit", "--working-dir", ".", "--runtime-env", environment)
        return self.run(*command, *options, "--", *entrypoint, cwd=cwd)


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[User]:
    folder = tmp_path_factory.mktemp("cluster")
    local = (sys.executable, str(ROOT / "cluster" / "local.py"), "--state", str(folder / "state"))
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)  # raylet"])
    begun = subprocess.run(
        [*local, "start", "--role=rollout", "--cpus=3", "--auth", "--port=0", "--dashboard-port=0"],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert begun.returncode == 0, begun.stdout + begun.stderr
    cluster = local_module().LocalCluster(folder / "state")
    try:
        yield User(cluster.state())
    finally:
        processes = cluster.processes()
        ended = subprocess.run([*local, "stop"], capture_output=True, text=True, check=True)
        left = [p for p in processes if p.is_running() and p.status() != "zombie"]
        untouched = bystander.poll() is None
        bystander.kill()
    assert ended.stdout.startswith("ended ")
    assert left == []
    assert untouched
    assert cluster.processes() == []


def fake_settings(folder: Path, name: str, *more: str) -> list[str]:
    settings = [
        f"name={name}",
        f"output_dir={folder}",
        f"data.train={folder / 'prompts.jsonl'}",
        "engine.backend=fake",
        "model.id=fake",
        "engine.labels={role: rollout}",
        "learn.dtype=float32",
        "rollout.harm_prompts=2",
        "rollout.benign_prompts=1",
        "rollout.group_size=2",
        *more,
    ]
    write_fake_run(load_config(None, settings).run_dir, folder / "prompts.jsonl")
    return settings


def test_a_stopped_job_goes_on_when_it_is_submitted_again(user: User, tmp_path: Path) -> None:
    settings = fake_settings(tmp_path, "stopped", "learn.steps=8")
    config = load_config(None, settings)
    # Steps of two seconds: on the fake engine the run would be over before it could be stopped.
    slow = "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S=2"
    job = ("env", slow, "python", "-m", "jobs.train", *settings)
    options = ("--no-wait", "--submission-id", "first", "--metadata-json", '{"stage": "train"}')
    begun = user.submit(*job, options=options)
    assert begun.returncode == 0, begun.stdout + begun.stderr

    def steps() -> list[int]:
        lines = [p.read_text().splitlines() for p in config.run_dir.glob("history-*.jsonl")]
        return [json.loads(line)["step"] for lines_of in lines for line in lines_of]

    end = time.monotonic() + 300
    asked = time.monotonic()
    while len(steps()) < 2:
        time.sleep(0.2)
        over = False
        if time.monotonic() > asked + 20:  # each question costs a core two seconds
            over = "FAILED" in user.run(RAY, "job", "status", "first").stdout
            asked = time.monotonic()
        if over or time.monotonic() > end:
            pytest.fail(user.run(RAY, "job", "logs", "first").stdout[-3000:])
    stopped = user.run(RAY, "job", "stop", "first")
    assert "was stopped" in stopped.stdout + stopped.stderr
    assert not (config.run_dir / "spo").exists()
    done_before = len(steps())
    logs = user.run(RAY, "job", "logs", "first").stdout
    assert "Refine by" in logs
    again = user.submit(*job)
    assert again.returncode == 0, again.stdout[-3000:] + again.stderr[-3000:]
    assert f"vector: {config.run_dir / 'spo'}" in again.stdout
    final = steps()
    assert sorted(set(final)) == list(range(8))
    # Twice: the step in which it was stopped, and those whose checkpoint was not yet seen.
    assert len(final) <= 8 + 3
    assert final[:done_before] == list(range(done_before))
    SteeringArtifact.load(config.run_dir / "spo", model_id="fake")
    listed = user.run(RAY, "job", "list").stdout
    assert "'stage': 'train'" in listed


def test_a_round_begins_with_the_artifact_that_it_is_told(user: User, tmp_path: Path) -> None:
    settings = fake_settings(tmp_path, "rounds", "learn.start=first", "learn.steps=1")
    config = load_config(None, settings)
    start = SteeringArtifact.load(config.run_dir / "stage1", model_id="fake")
    first = replace(start, vector=start.vector * 2.0, method="another")
    first.save(config.run_dir / "first")
    done = user.run(sys.executable, "-m", "jobs.train", *settings)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    made = SteeringArtifact.load(config.run_dir / "spo", model_id="fake")
    assert made.parent == first.vector.sha256 != start.vector.sha256
    assert made.method == f"{config.learn.objective} from another"


def test_large_junk_beside_the_code_is_not_uploaded(user: User, tmp_path: Path) -> None:
    for name in (".rayignore", ".gitignore"):
        shutil.copy(ROOT / name, tmp_path / name)
    for name in ("spo/code.py", "data/huge.bin", "outputs/run/x.json", "pictures/a.png", "x.tar"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    for name in ("data/huge.bin", "x.tar", "models.safetensors.tmp"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(2 << 30)  # Ray refuses more than 512 MiB
    program = "import os; print('FILES', sorted(f for _, _, fs in os.walk('.') for f in fs))"
    done = user.submit("python", "-c", program, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "FILES ['.gitignore', '.rayignore', 'code.py']" in done.stdout


def quick_refusal(done: subprocess.CompletedProcess[str], begin: float) -> str:
    assert done.returncode == 1, done.stdout + done.stderr
    assert time.monotonic() - begin < QUICK_S
    assert "Traceback" not in done.stderr
    return done.stderr


def test_a_wrong_token_is_said_at_once(user: User, tmp_path: Path) -> None:
    settings = fake_settings(tmp_path, "refused")
    begin = time.monotonic()
    done = user.run(
        sys.executable, "-m", "jobs.train", *settings, RAY_AUTH_TOKEN="wrong", RAY_AUTH_MODE="token"
    )
    text = quick_refusal(done, begin)
    assert "refused the token" in text
    assert "RAY_AUTH_TOKEN_PATH" in text


def test_another_ray_version_is_said_at_once(user: User) -> None:
    program = (
        "import ray; ray.__version__ = '2.59.0'\n"
        "from spo.session.head import check_head\n"
        f"check_head({user.state['address']!r})"
    )
    done = user.run(sys.executable, "-c", program)
    assert "install ray==2.60.0 here" in done.stderr


def test_a_head_that_is_not_there_is_said_at_once(user: User, tmp_path: Path) -> None:
    begin = time.monotonic()
    settings = fake_settings(tmp_path, "nowhere")
    done = user.run(sys.executable, "-m", "jobs.train", *settings, "ray.address=127.0.0.1:9")
    assert "no Ray head answers at 127.0.0.1:9" in quick_refusal(done, begin)


def test_too_few_gpus_are_refused_with_the_plan(user: User, tmp_path: Path) -> None:
    begin = time.monotonic()
    settings = fake_settings(tmp_path, "greedy", "engine.num_gpus=1", "engine.replicas=2")
    text = quick_refusal(user.run(sys.executable, "-m", "jobs.train", *settings), begin)
    assert "needs   2 x engine (1 CPU, 1 GPU, role=rollout)" in text
    assert "missing no room for 2 of 2 x engine" in text


def test_unreachable_storage_is_refused(user: User, tmp_path: Path) -> None:
    begin = time.monotonic()
    settings = [*fake_settings(tmp_path, "lost")[2:], "name=lost", "output_dir=s3://nowhere/runs"]
    keys = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_REGION": "us-east-1"}
    done = user.run(
        *(sys.executable, "-m", "jobs.train", *settings, f"cache_dir={tmp_path}"),
        AWS_ENDPOINT_URL="http://127.0.0.1:9",
        **keys,
    )
    assert "storage s3://nowhere/runs/lost cannot be written" in quick_refusal(done, begin)


@pytest.fixture(scope="module")
def bare_node(user: User, tmp_path_factory: pytest.TempPathFactory) -> None:
    """One more node, of another image: distributions without the plugin and of another version
    hide the real ones, and it claims a GPU that it has not.
    """
    shadow = tmp_path_factory.mktemp("shadow")
    for name, version in (("spo-vlm", "0.1.0"), ("transformers", "0.0.1")):
        folder = shadow / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
    token = Path(user.state["environment"]["RAY_AUTH_TOKEN_PATH"])
    cluster = local_module().LocalCluster(token.parent)
    state = cluster.state()
    join = [f"--address={state['address']}", "--num-cpus=1", "--num-gpus=1"]
    cluster._node(
        state,
        "bare",
        join,
        user.state["environment"] | {"PYTHONPATH": str(shadow)},
    )
    cluster._await_nodes(state)


@pytest.mark.usefixtures("bare_node")
def test_a_node_without_the_plugin_is_refused(user: User, tmp_path: Path) -> None:
    begin = time.monotonic()
    settings = [*fake_settings(tmp_path, "bare"), "engine.backend=vllm"]
    text = quick_refusal(user.run(sys.executable, "-m", "jobs.train", *settings), begin)
    assert "the steering plugin is not registered" in text


@pytest.mark.usefixtures("bare_node")
def test_the_doctor_finds_what_is_planted(user: User, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    source = f"{{kind: file, path: {tmp_path / 'no-source.jsonl'}, rows: 4}}"
    settings = [
        f"output_dir={tmp_path / 'file' / 'runs'}",
        f"cache_dir={tmp_path / 'cache'}",
        "engine.num_gpus=4",
        "engine.labels={role: nobody}",
        f"model.id={tmp_path / 'no-model'}",
        f"reward.toxicity_model={tmp_path / 'no-reward.ckpt'}",
        f"evaluate.judge={tmp_path / 'no-judge.ckpt'}",
        f"extract.sources=[{source}]",
        "data.train=no-train.jsonl",
        "data.heldout=no-heldout.jsonl",
    ]
    planted = {
        "storage": ("cannot be written",),
        "files": ("no-model", "no-reward", "no-judge", "no-source", "no-train", "no-heldout"),
        "room": ("no room for train",),
        "versions": ("transformers is 0.0.1",),
        "steering plugin": ("not registered",),
        "GPUs": ("Ray was told of 1, the driver shows 0",),
    }
    out = tmp_path / "findings.json"
    done = user.run(sys.executable, "-m", "jobs.doctor", "--json", str(out), *settings)
    assert done.returncode == 1, done.stdout + done.stderr
    found = [f for f in json.loads(out.read_text()) if f["state"] == "problem"]
    assert all(f["mend"] for f in found)
    missed = {
        (check, words)
        for check, all_words in planted.items()
        for words in all_words
        if not any(f["check"] == check and words in f["found"] for f in found)
    }
    assert missed == set()
    assert {f["check"] for f in found} == set(planted)
    assert "mend: " in done.stdout

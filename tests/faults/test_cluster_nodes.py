"""Whole jobs on a cluster of three nodes with S3 storage: nodes and drivers are lost on the way.

Jobs run as processes of their own, as `ray job submit` runs them; the S3 server is moto's. Two
runs of the same configuration, each hit by another fault, must end with equal vectors.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from spo.artifact import SteeringArtifact
from spo.config import RunConfig
from spo.session import storage
from tests.fake_run import write_fake_run
from tests.object_store import BUCKET, s3_server

pytestmark = [pytest.mark.ray, pytest.mark.slow]
ROOT = Path(__file__).parents[2]
STEPS = 12
TRAIN = (
    "engine.backend=fake",
    "model.id=fake",
    "engine.labels={role: rollout}",
    "engine.request_timeout_s=120",
    "reward.timeout_s=120",
    f"learn.steps={STEPS}",
    "learn.dtype=float32",
    "rollout.harm_prompts=2",
    "rollout.benign_prompts=1",
    "rollout.group_size=2",
    "rollout.max_staleness=0",
)


@dataclass(frozen=True)
class Site:
    """The cluster under test."""

    cluster: Any
    cache: Path
    prompts: Path
    output: str

    def settings(self, *more: str) -> list[str]:
        return [
            f"ray.address={self.cluster.address}",
            f"output_dir={self.output}",
            f"cache_dir={self.cache}",
            f"data.train={self.prompts}",
            "data.harm_prompts=8",
            "data.benign_prompts=8",
            *more,
        ]

    def job(self, verb: str, *settings: str, log: Path) -> subprocess.Popen[bytes]:
        """Start a job; what it prints goes to a file."""
        with log.open("wb") as file:
            return subprocess.Popen(
                [sys.executable, "-m", f"jobs.{verb}", *self.settings(*settings)],
                cwd=ROOT,
                stdout=file,
                stderr=subprocess.STDOUT,
                # Steps of two seconds: on the fake engine a run would be over before it is hit.
                env={**os.environ, "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "2"},
            )

    def config(self, *settings: str) -> RunConfig:
        from spo.config import load_config

        return load_config(None, self.settings(*settings))

    def add_worker(self) -> Any:
        return patiently(lambda: self.cluster.add_node(num_cpus=3, labels={"role": "rollout"}))

    def actors(self, *parts: str) -> list[dict[str, Any]]:
        """Actors, dead ones too, whose class and name together contain all `parts`."""
        from ray._private.state import actors

        return [
            actor
            for actor in actors().values()
            if all(part in actor["ActorClassName"] + actor["Name"] for part in parts)
        ]

    def node_of(self, *parts: str) -> Any:
        """The worker node that holds the living actor whose class and name contain all `parts`."""
        living = [actor for actor in self.actors(*parts) if actor["State"] == "ALIVE"]
        homes = {actor["Address"]["NodeID"] for actor in living}
        return next(n for n in self.cluster.worker_nodes if n.node_id in homes)

    def learners_of(self, run: str) -> list[dict[str, Any]]:
        """The Ray Train workers that a run has had, the oldest first."""
        jobs = {actor["JobID"] for actor in self.actors(run, "-engine-")}
        found = [actor for actor in self.actors("RayTrainWorker") if actor["JobID"] in jobs]
        return sorted(found, key=lambda actor: actor["StartTime"])


def patiently(start: Callable[[], Any]) -> Any:
    """Start a node; on a busy machine Ray's own 30 seconds are short."""
    for _ in range(3):
        try:
            return start()
        except Exception as error:
            if "timed out during startup" not in str(error):
                raise
    return start()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Head and two workers; every process of them inherits the S3 server's address."""
    import ray
    from ray.cluster_utils import Cluster

    folder = tmp_path_factory.mktemp("site")
    cache = Path(os.environ.get("SPO_TEST_CACHE", "~/.cache/spo-vlm")).expanduser()
    # The cache keeps a copy of a run by its URL: one of an earlier session must not be met.
    output = f"s3://{BUCKET}/{uuid.uuid4().hex[:8]}"
    with s3_server(), pytest.MonkeyPatch.context() as patch:
        # Ray ends workers when the machine runs short of memory, whoever uses it.
        patch.setenv("RAY_memory_monitor_refresh_ms", "0")
        # A lost node is noticed after some ten seconds instead of half a minute.
        patch.setenv("RAY_health_check_period_ms", "1000")
        patch.setenv("RAY_health_check_timeout_ms", "3000")
        storage._impatient_s3.cache_clear()
        cluster = patiently(lambda: Cluster(initialize_head=True, head_node_args={"num_cpus": 3}))
        made = Site(cluster, cache, folder / "prompts.jsonl", output)
        made.add_worker()
        made.add_worker()
        ray.init(address=cluster.address, namespace="watcher", log_to_driver=False)
        cluster.wait_for_nodes()
        yield made
        ray.shutdown()
        cluster.shutdown()
    storage._impatient_s3.cache_clear()


def wait_for(condition: Callable[[], bool], *, log: Path, job: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 300
    while not condition():
        assert job.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < end, f"waited 300 s\n{log.read_text()[-3000:]}"
        time.sleep(0.1)


def finish(job: subprocess.Popen[bytes], log: Path) -> str:
    code = job.wait(timeout=300)
    assert code == 0, log.read_text()[-4000:]
    return log.read_text()


def steps_done(config: RunConfig) -> list[int]:
    return [
        json.loads(line)["step"]
        for path in config.run_dir.glob("history-*.jsonl")
        for line in path.read_text().splitlines()
    ]


def seed_run(site: Site, name: str) -> RunConfig:
    """Put the Stage I artifact on the remote storage, as an earlier job would have."""
    config = site.config(f"name={name}", *TRAIN)
    write_fake_run(config.run_dir, site.prompts)
    storage.Mirror(config.storage, config.run_dir).push()
    return config


def test_training_survives_the_loss_of_a_node_a_learner_and_a_driver(
    site: Site, tmp_path: Path
) -> None:
    killed, bereft = seed_run(site, "killed"), seed_run(site, "bereft")
    logs = {name: tmp_path / f"{name}.log" for name in ("killed", "bereft", "twin", "again")}
    jobs = {
        name: site.job("train", f"name={name}", *TRAIN, log=logs[name])
        for name in ("killed", "bereft")
    }
    # From its first stage on, a job holds its run.
    wait_for(lambda: bool(logs["killed"].read_text()), log=logs["killed"], job=jobs["killed"])
    twin = site.job("train", "name=killed", *TRAIN, log=logs["twin"])
    wait_for(lambda: len(steps_done(killed)) >= 2, log=logs["killed"], job=jobs["killed"])
    wait_for(lambda: len(steps_done(bereft)) >= 2, log=logs["bereft"], job=jobs["bereft"])
    site.cluster.remove_node(site.node_of("bereft", "-engine-"), allow_graceful=False)
    jobs["killed"].send_signal(signal.SIGKILL)
    jobs["killed"].wait(timeout=10)
    site.add_worker()
    again = site.job("train", "name=killed", *TRAIN, log=logs["again"])
    wait_for(lambda: len(steps_done(bereft)) >= 6, log=logs["bereft"], job=jobs["bereft"])
    learner = site.learners_of("bereft")[-1]
    os.kill(learner["Pid"], signal.SIGKILL)
    assert twin.wait(timeout=240) == 1
    assert "is working on s3://" in logs["twin"].read_text()
    finish(again, logs["again"])
    finish(jobs["bereft"], logs["bereft"])
    assert site.learners_of("bereft")[-1]["StartTime"] > learner["StartTime"]

    vectors = []
    for config in (killed, bereft):
        fresh = tmp_path / config.name
        storage.Mirror(config.storage, fresh).pull()
        vectors.append(SteeringArtifact.load(fresh / "spo", model_id="fake").vector)
        history = (fresh / "history.jsonl").read_text().splitlines()
        assert sorted({json.loads(line)["step"] for line in history}) == list(range(STEPS))
    # Not to the bit: a scorer's last bits depend on what shares its batch.
    torch.testing.assert_close(vectors[0].directions, vectors[1].directions, rtol=0, atol=1e-5)
    start = SteeringArtifact.load(killed.run_dir / "stage1", model_id="fake").vector
    assert vectors[0].sha256 != start.sha256
    system, path = storage.open_location(killed.storage)
    kept = system.get_file_info(storage.fs.FileSelector(path, recursive=True))
    assert any("checkpoint" in info.path and info.path.endswith(".safetensors") for info in kept)


def test_extraction_survives_the_loss_of_a_node(
    site: Site, tiny_llama: Path, tmp_path: Path
) -> None:
    """Lost drivers: `tests/faults/test_extraction.py`."""
    pairs = tmp_path / "pairs.jsonl"
    rows = [
        {"id": f"{side}{i}", "text": f"some {side} words {i}", "side": side}
        for side in ("harm", "safe")
        for i in range(120)
    ]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = (
        "name=extracted",
        "engine.backend=fake",
        f"model.id={tiny_llama}",
        f"extract.sources=[{{kind: file, path: {pairs}, rows: 120}}]",
        "extract.calibration_rows=4",
        "extract.batch_size=4",
        "extract.rows_per_block=8",
        "extract.workers=2",
        "extract.dtype=float32",
        "extract.labels={role: rollout}",
    )
    log = tmp_path / "job.log"
    job = site.job("extract", *settings, log=log)
    config = site.config(*settings)
    data = config.run_dir / "activations" / "activations"
    wait_for(lambda: len(list(data.glob("*.parquet"))) >= 2, log=log, job=job)
    site.cluster.remove_node(site.node_of("MapWorker"), allow_graceful=False)
    site.add_worker()
    finish(job, log)

    fresh = tmp_path / "fresh"
    storage.Mirror(config.storage, fresh).pull()
    manifest = json.loads((fresh / "activations" / "manifest.json").read_text())
    files = [fresh / "activations" / "activations" / name for name in manifest["files"]]
    seen = Counter(i for file in files for i in pq.read_table(file)["row_id"].to_pylist())
    assert set(seen.values()) == {1}
    assert len(seen) == manifest["rows"] == 244

"""Sweeps on a real Ray cluster with the real reward models: resume after a kill, no leaks, best."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from spo.artifact import SteeringArtifact
from spo.sweep.outcome import Outcome, load_outcome
from spo.sweep.plan import SweepFolder
from spo.sweep.settings import load_finished, load_sweep
from tests.example_sweep import save_vector

pytestmark = [pytest.mark.ray, pytest.mark.slow]
ROOT = Path(__file__).parents[2]
SWEEP: dict[str, Any] = {
    "name": "sweep",
    "data": {"harm_prompts": 24, "benign_prompts": 16},
    "engine": {"backend": "fake", "slots": 18, "start_timeout_s": 300, "request_timeout_s": 300},
    "rollout": {"harm_prompts": 4, "benign_prompts": 2, "group_size": 2, "max_tokens": 8},
    "learn": {"steps": 4, "dtype": "float32"},
    "evaluate": {"harm_prompts": 4, "scenes": 2, "bootstrap": 50},
    "ray": {"num_cpus": 4},
    "objectives": {"toxicity": "min", "utility": "max", "kl": "min"},
    "space": {
        "steering.coefficient": {"loguniform": [0.05, 1.0]},
        "learn.learning_rate": {"loguniform": [0.01, 0.5]},
    },
    "search": {"trials": 6, "concurrent": 2, "asha": {"grace_steps": 2, "reduction_factor": 2}},
    "validation": {"bootstrap": 50, "max_tokens": 8, "benign_tokens": 8, "fraction": 0.5},
    "pool": {"lease_s": 2.0},
}


def write_sweep(folder: Path, **changes: Any) -> Path:
    content = {**SWEEP, "vector": str(save_vector(folder / "vector")), "output_dir": str(folder)}
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump({**content, **changes}))
    return path


def job(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "jobs.sweep", *arguments]


def environment() -> dict[str, str]:
    return {**os.environ, "RAY_AUTH_MODE": "disabled", "HF_HUB_OFFLINE": "1"}


def run(*arguments: str, timeout_s: int = 500) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        job(*arguments),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env=environment(),
        check=False,
    )


def wait_for(what: Callable[[], bool], process: subprocess.Popen[str], timeout_s: float) -> None:
    end = time.monotonic() + timeout_s
    while not what():
        assert process.poll() is None, "the driver ended before it could be killed"
        assert time.monotonic() < end, "the driver made no progress"
        time.sleep(0.2)


def outcome_in(folder: Path) -> Outcome:
    sweep, base = load_finished(folder)
    return load_outcome(SweepFolder(path=folder), sweep, base)


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """A sweep whose driver was killed in the middle and that was then resumed; what was there."""
    folder = tmp_path_factory.mktemp("outputs")
    config = write_sweep(folder)
    with (folder / "killed.log").open("w") as log:
        driver = subprocess.Popen(
            job("--config", str(config)),
            cwd=ROOT,
            stdout=log,
            stderr=log,
            text=True,
            env=environment(),
            start_new_session=True,
        )
        try:
            results = folder / "sweep" / "trials"
            wait_for(lambda: len(list(results.glob("*/result.json"))) >= 3, driver, 400)
        finally:
            os.killpg(driver.pid, signal.SIGKILL)
            driver.wait(timeout=30)
    there = {
        str(path.parent.name): path.read_bytes()
        for path in results.glob("*/result.json")
        if json.loads(path.read_text())["step"] == 4
    }
    done = run("--config", str(config), "--resume")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder / "sweep", there


def test_a_killed_sweep_ends_as_planned_and_keeps_its_results(
    resumed: tuple[Path, dict[str, bytes]],
) -> None:
    folder, there = resumed
    outcome = outcome_in(folder)
    states = [row.state for row in outcome.rows]
    assert states.count("complete") + states.count("pruned") == 6
    assert outcome.base is not None
    assert there, "nothing was finished before the kill"
    for digest, content in there.items():
        assert (folder / "trials" / digest / "result.json").read_bytes() == content
    assert all(len(row.result.history) == 4 for row in outcome.whole if row.result)
    assert (folder / "report.html").stat().st_size > 50_000
    assert (folder / "sweep.csv").read_text().count("\n") >= 8
    assert list((folder / "tensorboard").glob("*/events*"))


def test_the_choice_was_compared_on_held_out_prompts(
    resumed: tuple[Path, dict[str, bytes]],
) -> None:
    outcome = outcome_in(resumed[0])
    if outcome.heldout is None:
        pytest.skip("no trial was as good as the base, and the report says so")
    assert {cell.defence for cell in outcome.heldout.cells} == {"none", "base", "found"}
    assert len(json.loads((resumed[0] / "looks.json").read_text())) == 1


def test_best_exports_an_artifact(resumed: tuple[Path, dict[str, bytes]], tmp_path: Path) -> None:
    folder, _ = resumed
    where = [f"output_dir={folder.parent}", "name=sweep"]
    limit = ["--limit", "kl=1000"]
    done = run("best", "--objective", "toxicity", *limit, "--out", str(tmp_path / "v"), *where)
    assert done.returncode == 0, done.stderr
    artifact = SteeringArtifact.load(tmp_path / "v", model_id="fake")
    rows = [row for row in outcome_in(folder).whole if row.result]
    least = min(row.result.mean("toxicity") for row in rows if row.result)
    assert artifact.evaluation["validation"]["toxicity"]["mean"] == least
    assert artifact.method == "rloo from known, chosen by a sweep"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["search.trials=0"], "search.trials"),
        (["search.asha.grace_steps=9"], "leaves no rung below learn.steps=4"),
        (["data.benign_prompts=1", "validation.fraction=0.01"], "would never get a value"),
        (["engine.slots=6"], "lower search.concurrent or raise engine.slots"),
        (["vector=null", "learn.steps=3"], "was made for another base configuration, vector"),
        (["objectives={beauty: max}"], "objectives.beauty"),
        ([], "continue or extend it with --resume"),
    ],
)
def test_bad_input_stops_before_an_engine_starts(
    resumed: tuple[Path, dict[str, bytes]], arguments: list[str], message: str
) -> None:
    from spo.errors import SpoError
    from spo.progress import Silent
    from spo.sweep.run import run_sweep

    def begin() -> None:
        sweep, base = load_sweep(resumed[0].parent / "sweep.yaml", arguments)
        run_sweep(sweep, base, Silent(), resume=False)  # Ray is not connected: nothing can start

    with pytest.raises(SpoError, match=message):
        begin()


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    import ray

    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        namespace="spo",
    )
    yield
    ray.shutdown()


def trial_processes() -> list[int]:
    """Process ids of the trials that run on this cluster."""
    import ray

    actors = ray._private.state.actors().values()
    alive = [a for a in actors if a["State"] == "ALIVE" and "Trainable" in a["ActorClassName"]]
    return sorted(int(actor["Pid"]) for actor in alive)


@pytest.mark.long
@pytest.mark.usefixtures("cluster")
def test_nothing_leaks_when_twenty_trials_are_killed(tmp_path: Path) -> None:
    import ray

    from spo.progress import Silent
    from spo.sweep.run import run_sweep

    changes = {
        "search": {"trials": 24, "concurrent": 3, "max_failed": 60, "algorithm": "random"},
        "compare": False,
    }
    sweep, base = load_sweep(write_sweep(tmp_path, **changes))
    before = ray.cluster_resources()
    killed: list[int] = []
    over = threading.Event()

    def kill_trials() -> None:
        """Each process a while after it came, so that kills land in all parts of a trial."""
        seen: dict[int, float] = {}
        while len(killed) < 20 and not over.wait(0.1):
            if not any((tmp_path / "sweep" / "trials").glob("*/result.json")):
                continue
            for pid in trial_processes():
                age = time.monotonic() - seen.setdefault(pid, time.monotonic())
                if pid not in killed and age > (0.3, 0.8, 2.0)[len(killed) % 3]:
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)
                    break

    killer = threading.Thread(target=kill_trials)
    killer.start()
    try:
        run_sweep(sweep, base, Silent(), resume=False)
    finally:
        over.set()
        killer.join(timeout=30)
    assert len(killed) == 20
    assert sum(row.state == "complete" for row in outcome_in(tmp_path / "sweep").rows) == 24
    closed = json.loads((tmp_path / "sweep" / "slots.json").read_text())
    assert closed["left"] == {}
    assert closed["expired"] >= 1, "no killed trial held a slot: the test killed too early"
    end = time.monotonic() + 60
    while ray.available_resources().get("CPU") != before["CPU"] and time.monotonic() < end:
        time.sleep(0.5)
    assert ray.available_resources()["CPU"] == before["CPU"]
    groups = ray.util.placement_group_table().values()
    assert [g["state"] for g in groups if g["state"] != "REMOVED"] == []
    alive = [a for a in ray._private.state.actors().values() if a["State"] != "DEAD"]
    assert [a["ActorClassName"] for a in alive] == []

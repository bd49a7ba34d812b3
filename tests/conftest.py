"""Session fixtures: tiny random models in hub layout, and an offline environment."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Before any test module imports Ray, Transformers, torch or the tokenizers: they read these then.
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# As in every job: threads that wait for work must not keep two cores from other processes.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest

ROOT = Path(__file__).resolve().parent.parent
# `pytest` alone does not put the repository on the path, `python -m pytest` does.
sys.path.insert(0, str(ROOT))

from tests.tiny_models import make_tiny_model  # noqa: E402  needs the path above


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root folder of the checkout."""
    return ROOT


@pytest.fixture(scope="session")
def tiny_llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random LLaVA; tests must not write into it."""
    return make_tiny_model("llava", tmp_path_factory.mktemp("models") / "tiny-llava")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random Llama (text only); tests must not write into it."""
    return make_tiny_model("llama", tmp_path_factory.mktemp("models") / "tiny-llama")

"""Engines for parity tests: real vLLM on the CPU, in this process, one alive at a time.

Starting costs the imports once (15 s) and then a few seconds a model, so tests are grouped by model
and ask for `engines`; asking for another model closes the one before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from spo.engines.base import EngineInfo
from spo.engines.hf.engine import HfEngine
from spo.engines.vllm.engine import VllmEngine
from spo.records import Prompt, PromptFormat, PromptKind
from spo.vector import SteeringVector
from tests.tiny_models import make_tiny_model

Pair = tuple[VllmEngine, HfEngine]


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a tiny model, made on first use."""
    root = tmp_path_factory.mktemp("models")

    def folder(family: str) -> Path:
        path = root / family
        return path if path.exists() else make_tiny_model(family, path)

    return folder


class EngineCache:
    """`engines(family, **options)`: the vLLM engine with those options, and its HF reference."""

    def __init__(self, folder: Callable[[str], Path]) -> None:
        self._folder = folder
        self._key: tuple[str, str] | None = None
        self._pair: Pair | None = None

    def __call__(self, family: str, **options: Any) -> Pair:
        key = (family, repr(sorted(options.items())))
        if self._pair is None or key != self._key:
            self.close()
            path = str(self._folder(family))
            # Gemma 3's processor wants one list of pictures for each text of a batch.
            batch = 1 if family == "gemma3" else 32
            settings = {"dtype": "float32", "max_model_len": 512, "kv_cache_gib": 0.05, **options}
            self._pair = (VllmEngine(path, **settings), HfEngine(path, batch_size=batch))
            self._key = key
        return self._pair

    def close(self) -> None:
        """Close the engine that is alive."""
        if self._pair is not None:
            for engine in self._pair:
                engine.close()
        self._pair = None


@pytest.fixture(scope="session")
def engines(tiny_folder: Callable[[str], Path]) -> Iterator[EngineCache]:
    """One engine pair at a time, see `EngineCache`."""
    cache = EngineCache(tiny_folder)
    yield cache
    cache.close()


@pytest.fixture(scope="session")
def picture(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Path of a noisy picture."""
    path = tmp_path_factory.mktemp("pictures") / "noise.png"
    pixels = np.random.default_rng(0).integers(0, 255, (56, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return str(path)


def make_vector(
    info: EngineInfo, seed: int, layers: tuple[int, ...] | None = None
) -> SteeringVector:
    """A random vector, strong enough to change the tiny models' answers."""
    chosen = layers or tuple(range(info.num_layers))
    generator = torch.Generator().manual_seed(seed)
    shape = (len(chosen), info.hidden_size)
    return SteeringVector(
        layers=chosen,
        directions=8.0 * torch.randn(shape, generator=generator),
        mean_norms=torch.full((len(chosen),), 90.0),
        calibration=torch.randn(shape, generator=generator),
        model_id=info.model_id,
        model_revision=info.model_revision,
    )


def make_prompt(text: str, image: str | None = None) -> Prompt:
    """A chat prompt."""
    return Prompt(
        prompt_id=text[:20], text=text, kind=PromptKind.HARM, format=PromptFormat.CHAT, image=image
    )

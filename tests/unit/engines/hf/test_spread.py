"""A Transformers model on several cards.

Values: on the CPU named twice, where every move runs and must change nothing. Places: on two fake
CUDA devices, where torch computes shapes and devices without data and refuses to mix devices.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode

from spo.attacks.pgd import universal_pgd
from spo.config import PgdConfig
from spo.engines.base import CaptureRequest, LogprobRequest
from spo.engines.forward import SteeringPlan
from spo.engines.hf.capture import pooled
from spo.engines.hf.engine import HfEngine
from spo.engines.hf.spread import moved, shares
from spo.records import (
    GenerateRequest,
    Operator,
    Positions,
    Prompt,
    PromptFormat,
    PromptKind,
    Sampling,
    SteeringSpec,
)
from spo.vector import SteeringVector
from tests.tiny_models import LAYERS, make_tiny_model

CARDS = ("cuda:0", "cuda:1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("llava", tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("pictures") / "noise.png"
    pixels = np.random.default_rng(0).integers(0, 255, (56, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return str(path)


@pytest.fixture(scope="module")
def pair(folder: Path) -> Iterator[tuple[HfEngine, HfEngine]]:
    """The model whole, and in two parts."""
    engines = HfEngine(str(folder)), HfEngine(str(folder), device=("cpu", "cpu"))
    for engine in engines:
        engine.publish("v", vector_for(engine), 1)
    yield engines
    for engine in engines:
        engine.close()


def vector_for(engine: HfEngine) -> SteeringVector:
    generator = torch.Generator().manual_seed(0)
    shape = (LAYERS, engine.info.hidden_size)
    return SteeringVector(
        layers=tuple(range(LAYERS)),
        directions=8.0 * torch.randn(shape, generator=generator),
        mean_norms=torch.full((LAYERS,), 90.0),
        calibration=torch.randn(shape, generator=generator),
        model_id=engine.info.model_id,
        model_revision=engine.info.model_revision,
    )


def prompts(picture: str) -> list[Prompt]:
    return [
        Prompt(
            prompt_id=f"p{number}",
            text=text,
            kind=PromptKind.HARM,
            format=PromptFormat.CHAT,
            image=image,
        )
        for number, (text, image) in enumerate([("tell me of it", picture), ("and now", None)])
    ]


SPEC = SteeringSpec(vector="v", version=1, operator=Operator.ADAPTIVE)


def answers(engine: HfEngine, picture: str) -> list[Any]:
    """What an engine says, scores, reads and how an attack ends on it."""
    asked = prompts(picture)
    said = engine.generate(
        [
            GenerateRequest(
                request_id=p.prompt_id,
                prompt=p,
                sampling=Sampling(max_tokens=5, temperature=0.0),
                steering=SPEC,
            )
            for p in asked
        ]
    )
    scored = engine.logprobs(
        [
            LogprobRequest(request_id="r", prompt=p, token_ids=(70, 71, 72), steering=SPEC)
            for p in asked
        ]
    )
    read = engine.capture(
        [
            CaptureRequest(request_id="r", prompt=p, layers=(0, 3), positions=Positions.TEXT)
            for p in asked
        ]
    )
    attacked = universal_pgd(
        engine,
        Image.open(picture),
        prompts=asked[:1],
        targets=["yes"],
        config=PgdConfig(steps=2, targets=1),
        plan=engine.plan(SPEC),
    )
    return [
        [(rollout.token_ids, rollout.logprob) for rollout in said],
        scored,
        [(capture.mean.tolist(), capture.norm.tolist()) for capture in read],
        attacked.losses,
        np.asarray(attacked.image).tolist(),
    ]


def gradient(engine: HfEngine, picture: str, *, cached: bool) -> torch.Tensor:
    """Of the learner's scores in the directions, with two answers to one prompt packed."""
    first = prompts(picture)[0]
    batch = engine.prepare([first, first], [(70, 71), (72, 73, 74)])
    opened = engine.plan(SPEC)
    assert opened is not None
    # The lowest steered block lies on the second card, so that the prefix ends on the first.
    directions = opened.directions[2:].clone().requires_grad_(True)
    plan = replace(
        opened,
        layers=(2, 3),
        directions=directions,
        mean_norms=opened.mean_norms[2:],
        calibration=opened.calibration[2:],
    )
    (scores,) = engine.answer_scores(batch, [plan], chunk_tokens=2, cache_prefix=cached)
    (scores.policy.sum() + scores.kl.sum()).backward()
    assert directions.grad is not None
    return directions.grad


def test_two_parts_compute_what_the_whole_does(
    pair: tuple[HfEngine, HfEngine], picture: str
) -> None:
    whole, parts = pair
    assert shares(parts.model, list(parts.blocks), 2) == [0, 0, 1, 1]
    assert answers(whole, picture) == answers(parts, picture)
    for cached in (True, False):
        expected = gradient(whole, picture, cached=cached)
        assert expected.abs().sum() > 0
        assert torch.equal(expected, gradient(parts, picture, cached=cached))


def test_every_device_gets_about_as_many_bytes() -> None:
    blocks = torch.nn.ModuleList(torch.nn.Linear(8, 8, bias=False) for _ in range(6))
    model = torch.nn.ModuleDict({"embed": torch.nn.Linear(8, 16, bias=False), "blocks": blocks})
    # 2 units around the blocks and 6 in them: 4 on each device.
    assert shares(model, list(blocks), 2) == [0, 0, 1, 1, 1, 1]
    assert shares(model, list(blocks), 4) == [1, 1, 2, 2, 3, 3]
    assert shares(model, list(blocks), 1) == [0] * 6


def test_tensors_are_found_in_what_blocks_are_called_with() -> None:
    class Cache:
        pass

    cache, meta = Cache(), torch.device("meta")
    (first, table), kept, number = moved(((torch.ones(1), {"mask": torch.ones(1)}), cache, 3), meta)
    assert first.device == table["mask"].device == meta
    assert kept is cache
    assert number == 3


@pytest.fixture
def fake_cards(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTensorMode]:
    """Within it tensors have a shape and a device, and no data: two cards without a GPU."""

    def replaced(self: torch.nn.Module, fn: Any, recurse: bool = True) -> torch.nn.Module:
        """`Module._apply` by new parameters: torch's own swap refuses fake ones."""
        for child in self.children() if recurse else ():
            child._apply(fn)
        for name, value in self._parameters.items():
            self._parameters[name] = torch.nn.Parameter(fn(value)) if value is not None else None
        for name, value in self._buffers.items():
            self._buffers[name] = fn(value) if value is not None else None
        return self

    monkeypatch.setattr(torch.nn.Module, "_apply", replaced)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield mode


def test_what_hooks_onto_a_block_meets_it_on_its_own_card(
    pair: tuple[HfEngine, HfEngine], picture: str, tmp_path: Path, fake_cards: FakeTensorMode
) -> None:
    """Steering, the learner's prefix and reading; torch raises where devices are mixed.

    On text alone, because Transformers counts picture tokens by value. No gradients: autograd's own
    queues want real cards.
    """
    with torch._subclasses.fake_tensor.unset_fake_temporarily():
        folder = make_tiny_model("llava", tmp_path / "shape")
        (folder / "BENCHMARK_SHAPE").touch()  # random weights, which need no data
        said = prompts(picture)[1]
        real = pair[0].prepare([said, said], [(70, 71), (72, 73, 74)])

    def on_card(value: torch.Tensor) -> torch.Tensor:
        return fake_cards.from_tensor(value).to(CARDS[0])

    batch = replace(
        real,
        input_ids=on_card(real.input_ids),
        attention_mask=on_card(real.attention_mask),
        extras={},
        answer_ids=on_card(real.answer_ids),
        answer_mask=on_card(real.answer_mask),
    )
    engine = HfEngine(str(folder), device=CARDS)
    home = torch.device(CARDS[0])
    assert engine.device == home
    held = [str(next(block.parameters()).device) for block in engine.blocks]
    assert held == [CARDS[0], CARDS[0], CARDS[1], CARDS[1]]
    hidden = engine.info.hidden_size
    runner = engine.answer_scores.__self__  # type: ignore[attr-defined]
    with torch.no_grad():
        for operator in Operator:
            plan = SteeringPlan(
                layers=tuple(range(LAYERS)),
                directions=torch.ones(LAYERS, hidden, device=home),
                mean_norms=torch.ones(LAYERS, device=home),
                calibration=torch.zeros(LAYERS, hidden, device=home),
                operator=operator,
                positions=Positions.ALL,
                coefficient=1.0,
            )
            assert engine.answer_logprobs(batch, plan).device == home
            for layer in range(LAYERS):
                prefix = runner._run_prefix(batch, layer)
                states = runner._states(batch, plan, prefix)
                assert states.shape == (2, 3, hidden)
                assert states.device == home
        mean, norm = pooled(engine, batch, [[1, 2], [1, 2, 3]], (0, 1, 2, 3))
    assert (mean.shape, norm.shape) == ((2, LAYERS, hidden), (2, LAYERS))
    assert mean.device == norm.device == home

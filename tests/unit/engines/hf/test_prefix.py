"""Learner passes with everything shared equal the plain ones: scores and gradients."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from spo.engines.forward import SteeringPlan
from spo.engines.hf.engine import HfEngine
from spo.engines.hf.packing import can_pack, pack
from spo.records import Operator, Positions, Prompt, PromptFormat, PromptKind

ANSWERS = [(5, 6, 7, 8), (9, 10), (11, 12, 13), (7, 7, 7, 7), (3, 4)]


@pytest.fixture(scope="module")
def engine(tiny_llava: Path) -> HfEngine:
    return HfEngine(str(tiny_llava), dtype="float32")


def prompts(folder: Path, pictures: bool) -> list[Prompt]:
    """Two prompts with two answers each (one with a picture), and one alone."""
    paths = []
    for i, colour in enumerate(("red", "blue")):
        path = folder / f"{i}.png"
        Image.new("RGB", (32, 32), colour).save(path)
        paths.append(str(path) if pictures else None)
    first = Prompt(prompt_id="a", text="a b", kind=PromptKind.HARM, format=PromptFormat.PLAIN)
    second = replace(first, prompt_id="b", text="you are the most", image=paths[0])
    third = replace(second, prompt_id="c", image=paths[1], kind=PromptKind.BENIGN)
    return [first, first, second, second, third]


def plan(engine: HfEngine, operator: Operator, positions: Positions, layer: int) -> SteeringPlan:
    generator = torch.Generator().manual_seed(3)
    shape = (2, engine.info.hidden_size)
    return SteeringPlan(
        layers=(layer, layer + 1),
        directions=torch.randn(shape, generator=generator).requires_grad_(),
        mean_norms=torch.ones(2),
        calibration=0.1 * torch.randn(shape, generator=generator),
        operator=operator,
        positions=positions,
        coefficient=0.7,
    )


@pytest.mark.parametrize("pictures", [True, False])
@pytest.mark.parametrize("positions", [Positions.ALL, Positions.GENERATED, Positions.AFTER_IMAGE])
@pytest.mark.parametrize("operator", [Operator.ADD, Operator.ADAPTIVE])
def test_shared_prompts_and_prefix_change_neither_scores_nor_gradients(
    engine: HfEngine, tmp_path: Path, pictures: bool, positions: Positions, operator: Operator
) -> None:
    batch = engine.prepare(prompts(tmp_path, pictures), ANSWERS)
    assert can_pack(engine.model)
    packed = pack(batch)
    assert packed is not None
    assert packed.input_ids.shape[0] == (3 if pictures else 2)

    def run(**options: object) -> tuple[list[Tensor], Tensor]:
        steering = plan(engine, operator, positions, layer=1)
        scores = engine.answer_scores(batch, [steering], chunk_tokens=3, **options)[0]
        (scores.policy.sum() + 0.3 * scores.kl.sum()).backward()
        assert steering.directions.grad is not None
        return [scores.policy, scores.reference, scores.kl], steering.directions.grad

    shared, shared_gradient = run(cache_prefix=True)
    plain, plain_gradient = run(cache_prefix=False)
    expected = engine.answer_logprobs(batch, plan(engine, operator, positions, layer=1))
    assert torch.allclose(plain[0], expected, atol=1e-5)
    for left, right in zip(shared, plain, strict=True):
        assert torch.allclose(left, right, atol=2e-5)
    assert plain_gradient.norm() > 0
    assert torch.allclose(shared_gradient, plain_gradient, atol=2e-5, rtol=1e-4)
    assert (plain[0] - plain[1]).abs().max() > 1e-3


@pytest.mark.slow
def test_compiled_blocks_change_neither_scores_nor_gradients(
    engine: HfEngine, tiny_llava: Path, tmp_path: Path
) -> None:
    compiled = HfEngine(str(tiny_llava), dtype="float32", compiled_scores=True)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    graphs = []
    asked = prompts(tmp_path, True)
    for rows, shared in (
        (slice(5), True),
        (slice(3, 5), True),
        (slice(4), True),
        (slice(4), False),
    ):
        found = []
        for one in (engine, compiled):
            batch = one.prepare(asked[rows], ANSWERS[rows])
            before = one.answer_logits(batch)
            steering = plan(one, Operator.ADAPTIVE, Positions.ALL, layer=1)
            scores = one.answer_scores(batch, [steering], chunk_tokens=64, cache_prefix=shared)[0]
            (scores.policy.sum() + 0.3 * scores.kl.sum()).backward()
            found.append([scores.policy, scores.kl, steering.directions.grad])
            assert torch.equal(one.answer_logits(batch), before)
        for left, right in zip(*found, strict=True):
            assert torch.allclose(left, right, atol=2e-5, rtol=1e-4)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    # One graph without and one with gradients, for all blocks together; then more forms.
    assert graphs[0] == 2
    assert graphs == sorted(graphs)
    assert graphs[-1] > 2
    assert not torch._dynamo.utils.counters["unimplemented"]


def test_a_closed_engine_leaves_no_block_behind(tiny_llava: Path) -> None:
    one = HfEngine(str(tiny_llava), dtype="float32")
    block = weakref.ref(one.blocks[0])
    gc.disable()
    try:
        one.close()
        assert block() is None
    finally:
        gc.enable()


def test_the_model_is_as_before_afterwards(engine: HfEngine, tmp_path: Path) -> None:
    batch = engine.prepare(prompts(tmp_path, True), ANSWERS)
    before = engine.answer_logits(batch)
    engine.answer_scores(
        batch, [plan(engine, Operator.ADD, Positions.ALL, layer=0)], chunk_tokens=64
    )
    assert torch.equal(engine.answer_logits(batch), before)

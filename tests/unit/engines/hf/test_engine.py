"""The Hugging Face engine on a tiny random LLaVA in float32: exact identities of steering."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from spo.algorithms.operators import steer
from spo.engines.base import CaptureRequest, LogprobRequest
from spo.engines.forward import SteeringPlan, TokenBatch
from spo.engines.hf.engine import HfEngine
from spo.engines.identity import find_blocks
from spo.errors import ArtifactError, DataError, EngineError, SteeringError
from spo.records import (
    FinishReason,
    GenerateRequest,
    Operator,
    Positions,
    Prompt,
    PromptFormat,
    PromptKind,
    Rollout,
    Sampling,
    SteeringSpec,
)
from spo.vector import SteeringVector
from tests.tiny_models import HIDDEN
from tests.tiny_models import LAYERS as LAYERS_OF_MODEL

LAYERS = (1, 2)
GREEDY = Sampling(max_tokens=6, temperature=0.0)


@pytest.fixture(scope="module")
def engine(tiny_llava: Path) -> HfEngine:
    engine = HfEngine(str(tiny_llava), dtype="float32")
    engine.publish("v", make_vector(engine), 1)
    engine.publish("w", make_vector(engine, seed=9), 1)
    return engine


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("pictures") / "a.png"
    pixels = np.random.default_rng(1).integers(0, 255, (48, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return str(path)


def make_vector(
    engine: HfEngine, seed: int = 0, layers: tuple[int, ...] = LAYERS
) -> SteeringVector:
    generator = torch.Generator().manual_seed(seed)
    size = engine.info.hidden_size
    return SteeringVector(
        layers=layers,
        directions=torch.randn(len(layers), size, generator=generator),
        mean_norms=torch.full((len(layers),), 6.0),
        calibration=torch.randn(len(layers), size, generator=generator) * 0.1,
        model_id=engine.info.model_id,
        model_revision=engine.info.model_revision,
    )


def prompt(text: str = "You are the most", image: str | None = None) -> Prompt:
    return Prompt(
        prompt_id=f"p-{text}",
        text=text,
        kind=PromptKind.HARM,
        format=PromptFormat.PLAIN,
        image=image,
    )


def spec(coefficient: float = 2.0, **changes: object) -> SteeringSpec:
    return replace(SteeringSpec(vector="v", version=1, coefficient=coefficient), **changes)


def request(
    one: Prompt, steering: SteeringSpec | None = None, sampling: Sampling = GREEDY
) -> GenerateRequest:
    return GenerateRequest(
        request_id=f"{one.prompt_id}/{steering}", prompt=one, sampling=sampling, steering=steering
    )


def scores(
    engine: HfEngine, one: Prompt, ids: Sequence[int], steering: SteeringSpec | None
) -> list:
    asked = LogprobRequest(request_id="s", prompt=one, token_ids=tuple(ids), steering=steering)
    return engine.logprobs([asked])[0]


@contextmanager
def recorded(engine: HfEngine) -> Iterator[dict[int, Tensor]]:
    """Output of every decoder block that ran, after steering."""
    seen: dict[int, Tensor] = {}

    def keep(layer: int) -> Callable[..., None]:
        def hook(module: object, args: object, output: Tensor | tuple[Tensor, ...]) -> None:
            seen[layer] = (output[0] if isinstance(output, tuple) else output).detach().clone()

        return hook

    # Hooks run in the order of registration; ours must come after the engine's own, so they are
    # attached when the decoder is entered, which is after the engine attached its hooks.
    handles: list = []

    def enter(module: object, args: object) -> None:
        handles.extend(b.register_forward_hook(keep(i)) for i, b in enumerate(engine.blocks))

    entry = engine.decoder.register_forward_pre_hook(enter)
    try:
        yield seen
    finally:
        for handle in [entry, *handles]:
            handle.remove()


def block_outputs(
    engine: HfEngine, batch: TokenBatch, plan: SteeringPlan | None
) -> dict[int, Tensor]:
    with torch.no_grad(), recorded(engine) as seen:
        engine.answer_logits(batch, plan)
    return seen


# Steering moves what it should and nothing else


@pytest.mark.parametrize("positions", list(Positions))
def test_add_shifts_exactly_the_selected_positions(
    engine: HfEngine, picture: str, positions: Positions
) -> None:
    engine.publish("one", make_vector(engine, layers=(2,)), 1)
    plan = engine.plan(spec(0.5, vector="one", positions=positions))
    assert plan is not None
    batch = engine.prepare([prompt("look at this", picture)], [(4, 5, 6)])
    prompt_length = batch.prompt_width
    start, length = batch.spans[0][0]
    selected = {
        Positions.ALL: range(prompt_length + 3),
        Positions.PROMPT: range(prompt_length),
        Positions.GENERATED: range(prompt_length - 1, prompt_length + 3),
        Positions.LAST_PROMPT: [prompt_length - 1],
        Positions.IMAGE: range(start, start + length),
        Positions.TEXT: [*range(start), *range(start + length, prompt_length + 3)],
        Positions.AFTER_IMAGE: range(start + length, prompt_length + 3),
    }[positions]
    before, after = block_outputs(engine, batch, None), block_outputs(engine, batch, plan)
    expected = before[2].clone()
    expected[0, list(selected)] -= 0.5 * plan.directions[0]
    assert torch.equal(after[2], expected)
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])
    assert not torch.equal(before[3], after[3])


@pytest.mark.parametrize("operator", list(Operator))
def test_every_operator_is_the_one_of_the_algorithms(engine: HfEngine, operator: Operator) -> None:
    plan = engine.plan(spec(0.8, operator=operator))
    assert plan is not None
    batch = engine.prepare([prompt()], [(4, 5)])
    before, after = block_outputs(engine, batch, None), block_outputs(engine, batch, plan)
    first = steer(
        operator,
        before[1],
        plan.directions[0],
        coefficient=0.8,
        mean_norm=plan.mean_norms[0],
        calibration=plan.calibration[0],
    )
    assert torch.equal(after[0], before[0])
    torch.testing.assert_close(after[1], first)
    assert not torch.equal(after[1], before[1])


@pytest.mark.parametrize("operator", list(Operator))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_coefficient_zero_is_the_unsteered_model(
    tiny_llava: Path, operator: Operator, dtype: str, picture: str
) -> None:
    engine = HfEngine(str(tiny_llava), dtype=dtype)
    engine.publish("v", make_vector(engine), 1)
    ids = (7, 8, 9, 10)
    for one in (prompt(), prompt("look", picture)):
        plain = scores(engine, one, ids, None)
        assert scores(engine, one, ids, spec(0.0, operator=operator)) == plain
        assert scores(engine, one, ids, spec(3.0, operator=operator)) != plain


def test_zero_vector_is_the_unsteered_model(engine: HfEngine) -> None:
    vector = make_vector(engine)
    engine.publish("zero", vector - vector, 1)
    ids = (7, 8, 9)
    assert scores(engine, prompt(), ids, spec(5.0, vector="zero")) == scores(
        engine, prompt(), ids, None
    )


def test_opposite_signs_cancel(engine: HfEngine) -> None:
    engine.publish("minus", make_vector(engine) * -2.0, 1)
    ids = (7, 8, 9)
    assert scores(engine, prompt(), ids, spec(-1.0, vector="minus")) == scores(
        engine, prompt(), ids, spec(2.0)
    )


# Generation


@pytest.mark.parametrize("steering", [None, spec(1.0), spec(1.5, operator=Operator.ADAPTIVE)])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("with_picture", [False, True])
def test_generation_and_scoring_agree(
    engine: HfEngine,
    picture: str,
    steering: SteeringSpec | None,
    temperature: float,
    with_picture: bool,
) -> None:
    """Decoding token by token with a cache gives what one scoring pass gives."""
    sampling = Sampling(max_tokens=6, temperature=temperature, seed=3)
    image = picture if with_picture else None
    prompts = [prompt("a", image), prompt("much longer than the other", image)]
    for rollout in engine.generate([request(p, steering, sampling) for p in prompts]):
        assert 0 < len(rollout.token_ids) <= 6
        total = sum(scores(engine, rollout.prompt, rollout.token_ids, steering))
        assert total == pytest.approx(rollout.logprob, abs=1e-4)


@pytest.mark.parametrize("positions", list(Positions))
def test_position_selectors_agree_between_decoding_and_scoring(
    engine: HfEngine, picture: str, positions: Positions
) -> None:
    steering = spec(2.0, positions=positions)
    (rollout,) = engine.generate([request(prompt("look at", picture), steering)])
    total = sum(scores(engine, rollout.prompt, rollout.token_ids, steering))
    assert total == pytest.approx(rollout.logprob, abs=1e-4)


def key(rollout: Rollout) -> tuple[object, ...]:
    return (
        rollout.token_ids,
        rollout.text,
        rollout.finish,
        rollout.receipt,
        rollout.prompt_token_ids,
    )


def test_mixed_batch_equals_solo_runs(engine: HfEngine, picture: str) -> None:
    """Steered, otherwise steered, unsteered, with and without picture, of different lengths."""
    requests = [
        request(prompt("short")),
        request(prompt("a longer prompt than the first"), spec(2.0)),
        request(prompt("look", picture), spec(1.0, vector="w", operator=Operator.ADAPTIVE)),
        request(prompt("look at it well", picture)),
        request(prompt("short"), spec(2.0, positions=Positions.GENERATED)),
        request(prompt("x"), spec(2.0)),
    ]
    together = engine.generate(requests)
    assert [r.request_id for r in together] == [r.request_id for r in requests]
    for one, rollout in zip(requests, together, strict=True):
        (alone,) = engine.generate([one])
        assert key(rollout) == key(alone)
        assert rollout.logprob == pytest.approx(alone.logprob, abs=1e-4)


@pytest.mark.parametrize("positions", list(Positions))
def test_padding_does_not_change_scores(
    engine: HfEngine, picture: str, positions: Positions
) -> None:
    steering = spec(1.0, positions=positions)
    asked = [
        LogprobRequest(request_id=text, prompt=one, token_ids=ids, steering=steering)
        for text, one, ids in (
            ("1", prompt("x"), (4,)),
            ("2", prompt("x" * 40), (4, 5, 6, 7, 8)),
            ("3", prompt("pic", picture), (9, 8)),
        )
    ]
    together = engine.logprobs(asked)
    assert [len(row) for row in together] == [1, 5, 2]
    for one, row in zip(asked, together, strict=True):
        assert row == pytest.approx(engine.logprobs([one])[0], abs=1e-4)


def test_small_batches_give_the_same_answers(engine: HfEngine, tiny_llava: Path) -> None:
    small = HfEngine(str(tiny_llava), batch_size=2)
    requests = [request(prompt("abcdefgh"[:n])) for n in range(1, 6)]
    assert [key(r) for r in small.generate(requests)] == [key(r) for r in engine.generate(requests)]


def test_steering_changes_the_answer_and_is_receipted(engine: HfEngine) -> None:
    plain, steered = engine.generate([request(prompt()), request(prompt(), spec(6.0))])
    assert plain.receipt is None
    assert steered.token_ids != plain.token_ids
    assert steered.receipt is not None
    assert steered.receipt.sha256 == make_vector(engine).sha256
    assert (steered.receipt.vector, steered.receipt.version) == ("v", 1)
    assert (steered.receipt.coefficient, steered.receipt.layers) == (6.0, LAYERS)


def test_seed_repeats_and_changes_answers(engine: HfEngine) -> None:
    def answer(seed: int) -> tuple[int, ...]:
        sampling = Sampling(max_tokens=8, temperature=1.0, seed=seed)
        return engine.generate([request(prompt(), None, sampling)])[0].token_ids

    assert answer(1) == answer(1)
    assert len({answer(seed) for seed in range(5)}) > 1


def test_answer_ends_at_the_stop_token(engine: HfEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    (plain,) = engine.generate([request(prompt())])
    assert plain.finish is FinishReason.LENGTH
    stop = plain.token_ids[2]
    monkeypatch.setattr(engine.model.generation_config, "eos_token_id", [stop])
    short, other = engine.generate([request(prompt()), request(prompt("another text"))])
    end = plain.token_ids.index(stop) + 1
    assert short.token_ids == plain.token_ids[:end]
    assert short.finish is FinishReason.STOP
    assert short.logprob == pytest.approx(
        sum(scores(engine, prompt(), short.token_ids, None)), abs=1e-4
    )
    assert other.token_ids[-1] == stop or other.finish is FinishReason.LENGTH


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_never_contain_the_image_placeholder(
    engine: HfEngine, picture: str, temperature: float
) -> None:
    """Scoring such an answer would look for pixels that are not there."""
    token = engine.prompts.image_token_id

    def prefer(module: object, args: object, logits: Tensor) -> Tensor:
        logits = logits.clone()
        logits[..., token] += 1e4
        return logits

    sampling = Sampling(max_tokens=4, temperature=temperature, seed=1)
    handle = engine.model.lm_head.register_forward_hook(prefer)
    try:
        (rollout,) = engine.generate([request(prompt("look", picture), None, sampling)])
    finally:
        handle.remove()
    assert token not in rollout.token_ids
    assert len(scores(engine, rollout.prompt, rollout.token_ids, None)) == len(rollout.token_ids)
    with pytest.raises(EngineError, match="contains the image placeholder '<image>'"):
        scores(engine, prompt("look", picture), (5, token, 6), None)


# Fail closed


def test_unpublished_vector_raises(engine: HfEngine) -> None:
    with pytest.raises(SteeringError, match=r"'none' version 1 is not published"):
        engine.generate([request(prompt(), spec(vector="none"))])
    with pytest.raises(SteeringError, match=r"'v' version 2 is not published.*'v': \[1\]"):
        engine.logprobs(
            [
                LogprobRequest(
                    request_id="1", prompt=prompt(), token_ids=(4,), steering=spec(version=2)
                )
            ]
        )


def test_a_version_never_changes_its_content(engine: HfEngine) -> None:
    vector = make_vector(engine)
    assert engine.publish("v", vector, 1) == vector.sha256
    with pytest.raises(SteeringError, match="already published with content"):
        engine.publish("v", vector * 2.0, 1)


def test_vector_of_another_model_is_refused(engine: HfEngine) -> None:
    vector = make_vector(engine)
    with pytest.raises(SteeringError, match="'other-model'"):
        engine.publish("x", vector.replace(model_id="other-model"), 1)
    with pytest.raises(ArtifactError, match="layer 4 is out of range"):
        engine.publish("x", vector.replace(layers=(1, 4)), 1)
    with pytest.raises(SteeringError, match="not published"):
        engine.generate([request(prompt(), spec(vector="x"))])


def test_hooks_are_gone_after_an_error(engine: HfEngine) -> None:
    plan = engine.plan(spec(2.0))
    batch = engine.prepare([prompt()], [(4, 5)])
    wrong = replace(batch, input_ids=batch.input_ids[:, :0])
    with pytest.raises((RuntimeError, ValueError, IndexError)):
        engine.answer_logits(wrong, plan)
    assert all(not block._forward_hooks for block in engine.blocks)
    assert not engine.decoder._forward_pre_hooks


def test_missing_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="no-such-folder"):
        HfEngine(str(tmp_path / "no-such-folder"))


def test_folder_without_weights(tiny_llama: Path, tmp_path: Path) -> None:
    for path in tiny_llama.iterdir():
        if path.suffix != ".safetensors":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(EngineError, match="cannot load the weights"):
        HfEngine(str(tmp_path))


def test_unknown_architecture_is_refused() -> None:
    class Config:
        num_hidden_layers = 3

    with pytest.raises(EngineError, match="expected one list of 3 decoder blocks"):
        find_blocks(torch.nn.Sequential(torch.nn.Linear(2, 2)), Config())


# Capture


@pytest.mark.parametrize(
    "positions", [Positions.ALL, Positions.PROMPT, Positions.GENERATED, Positions.IMAGE]
)
def test_capture_is_hidden_states_pooled_by_hand(
    engine: HfEngine, picture: str, positions: Positions
) -> None:
    one, answer = prompt("what is this", picture), (11, 12, 13)
    asked = [
        CaptureRequest(
            request_id=text, prompt=p, layers=(0, 2), positions=positions, token_ids=answer
        )
        for text, p in (("first", one), ("second", prompt("a longer one than this", picture)))
    ]
    captured = engine.capture(asked)[0]
    encoded = engine.prompts.encode([one])
    tokens = torch.cat([encoded["input_ids"], torch.tensor([answer])], dim=1)
    with torch.no_grad():
        hidden = engine.model(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            pixel_values=encoded["pixel_values"],
            output_hidden_states=True,
        ).hidden_states
    width = encoded["input_ids"].shape[1]
    columns = {
        Positions.ALL: list(range(1, width + 3)),
        Positions.PROMPT: list(range(1, width)),
        Positions.GENERATED: list(range(width - 1, width + 3)),
        Positions.IMAGE: list(range(1, 16)),
    }[positions]
    assert captured.request_id == "first"
    assert captured.tokens == len(columns)
    for row, layer in enumerate((0, 2)):
        pooled = hidden[layer + 1][0, columns]
        np.testing.assert_allclose(captured.mean[row], pooled.mean(0).numpy(), rtol=1e-5, atol=2e-4)
        np.testing.assert_allclose(
            captured.norm[row], pooled.norm(dim=-1).median().numpy(), rtol=1e-5
        )


def test_capture_stops_after_the_highest_layer(engine: HfEngine) -> None:
    asked = CaptureRequest(request_id="c", prompt=prompt(), layers=(0, 1), positions=Positions.ALL)
    with recorded(engine) as seen:
        engine.capture([asked])
    assert set(seen) <= {0, 1}
    assert 0 in seen


def test_capture_reads_the_unsteered_model(engine: HfEngine) -> None:
    asked = CaptureRequest(request_id="c", prompt=prompt(), layers=(3,), positions=Positions.ALL)
    before = engine.capture([asked])[0].mean
    engine.generate([request(prompt(), spec(5.0))])
    np.testing.assert_array_equal(engine.capture([asked])[0].mean, before)


def test_capture_with_nothing_to_pool(engine: HfEngine) -> None:
    asked = CaptureRequest(request_id="c", prompt=prompt(), layers=(1,), positions=Positions.IMAGE)
    with pytest.raises(DataError, match=r"'c': no token is left to pool over \(image"):
        engine.capture([asked])


@pytest.mark.parametrize("layers", [(), (4,), (-1,)])
def test_capture_outside_the_model(engine: HfEngine, layers: tuple[int, ...]) -> None:
    asked = CaptureRequest(request_id="c", prompt=prompt(), layers=layers, positions=Positions.ALL)
    with pytest.raises(EngineError, match=r"capture layers must lie in 0\.\.3"):
        engine.capture([asked])


# Gradients


def test_gradients_reach_directions_and_pixels_but_no_weight(
    engine: HfEngine, picture: str
) -> None:
    plan = engine.plan(spec(1.0))
    assert plan is not None
    directions = plan.directions.clone().requires_grad_(True)
    batch = engine.prepare([prompt("look", picture)], [(4, 5, 6)])
    pixels = batch.extras["pixel_values"].clone().requires_grad_(True)
    engine.answer_logprobs(
        batch, replace(plan, directions=directions), pixel_values=pixels
    ).sum().backward()
    assert directions.grad is not None
    assert pixels.grad is not None
    assert (directions.grad.abs().sum(dim=1) > 0).all()
    assert pixels.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in engine.model.parameters())
    assert not any(parameter.requires_grad for parameter in engine.model.parameters())


def test_gradient_of_a_direction_against_differences(engine: HfEngine) -> None:
    plan = engine.plan(spec(1.0, positions=Positions.GENERATED))
    assert plan is not None
    batch = engine.prepare([prompt()], [(4, 5, 6)])

    def loss(directions: Tensor) -> Tensor:
        return engine.answer_logprobs(batch, replace(plan, directions=directions)).sum()

    variable = plan.directions.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(loss(variable), variable)
    probe = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(2))
    step = 1e-3
    with torch.no_grad():
        numeric = (loss(plan.directions + step * probe) - loss(plan.directions - step * probe)) / (
            2 * step
        )
    assert float((gradient * probe).sum()) == pytest.approx(float(numeric), rel=2e-2, abs=1e-2)


# Text-only models


def test_text_only_model(tiny_llama: Path) -> None:
    engine = HfEngine(str(tiny_llama))
    engine.publish("v", make_vector(engine), 1)
    rollouts = engine.generate([request(prompt("abc")), request(prompt("abcdef"), spec(1.0))])
    for rollout, steering in zip(rollouts, (None, spec(1.0)), strict=True):
        total = sum(scores(engine, rollout.prompt, rollout.token_ids, steering))
        assert total == pytest.approx(rollout.logprob, abs=1e-4)


def test_identity_of_a_folder(engine: HfEngine, tiny_llava: Path, tiny_llama: Path) -> None:
    assert engine.info.model_id == "tiny-llava"
    assert (engine.info.hidden_size, engine.info.num_layers) == (HIDDEN, LAYERS_OF_MODEL)
    assert engine.info.model_revision == HfEngine(str(tiny_llava)).info.model_revision
    assert engine.info.model_revision != HfEngine(str(tiny_llama)).info.model_revision

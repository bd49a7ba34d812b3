"""PGD on a tiny random LLaVA: exact gradients, exact ball, and a picture that survives PNG."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from spo.attacks.pgd import (
    PgdResult,
    loss_and_gradient,
    prompt_pgd,
    target_loss,
    universal_pgd,
)
from spo.attacks.pixels import PixelSpace
from spo.config import PgdConfig
from spo.engines.forward import SteeringPlan
from spo.engines.hf.engine import HfEngine
from spo.errors import DataError, EngineError
from spo.records import Operator, Positions, Prompt, PromptFormat, PromptKind
from tests.tiny_models import HIDDEN, make_tiny_model

TARGETS = (" bad", " awful thing")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny matrices: more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> HfEngine:
    folder = make_tiny_model("llava", tmp_path_factory.mktemp("models") / "tiny-llava")
    return HfEngine(str(folder), dtype="float32", batch_size=4)


@pytest.fixture(scope="module")
def image() -> Image.Image:
    """A picture of another size and shape than the model's, with both ends of the grey scale."""
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    pixels[:10], pixels[-10:] = 0, 255
    return Image.fromarray(pixels)


def _prompts(*texts: str, image: str | None = None) -> list[Prompt]:
    return [
        Prompt(
            prompt_id=f"p{i}",
            text=text,
            kind=PromptKind.HARM,
            format=PromptFormat.PLAIN,
            image=image,
        )
        for i, text in enumerate(texts)
    ]


def _attack(engine: HfEngine, image: Image.Image, config: PgdConfig, **options: Any) -> PgdResult:
    """An attack on two prompts with all targets."""
    defaults = {"prompts": _prompts("you are", "she said"), "targets": TARGETS}
    return universal_pgd(engine, image, config=config, **{**defaults, **options})


def _pairs(engine: HfEngine, space: PixelSpace, folder: Path) -> list:
    path = folder / "clean.png"
    space.picture(space.clean).save(path)
    first, second, third = _prompts("you are", "she said that", "what", image=str(path))
    encode = engine.prompts.tokenizer
    tokens = [tuple(encode(t, add_special_tokens=False)["input_ids"]) for t in TARGETS]
    return [(first, tokens[0]), (second, tokens[1]), (third, tokens[0])]


def _plan(engine: HfEngine, operator: Operator, *, coefficient: float = 0.5) -> SteeringPlan:
    generator = torch.Generator().manual_seed(1)
    return SteeringPlan(
        layers=(1, 2),
        directions=torch.randn(2, HIDDEN, generator=generator),
        mean_norms=torch.full((2,), 8.0),
        calibration=torch.zeros(2, HIDDEN),
        operator=operator,
        positions=Positions.ALL,
        coefficient=coefficient,
    )


@pytest.mark.parametrize("operator", [None, Operator.ADD, Operator.ADAPTIVE])
def test_gradient_equals_finite_differences(
    engine: HfEngine, image: Image.Image, tmp_path: Path, operator: Operator | None
) -> None:
    plan = None if operator is None else _plan(engine, operator)
    space = PixelSpace.of(engine, image)
    pairs = _pairs(engine, space, tmp_path)
    pixels = space.clean.clamp(0.1, 0.9)
    loss, gradient = loss_and_gradient(engine, space, pixels, pairs, plan=plan)
    assert loss == pytest.approx(target_loss(engine, space, pixels, pairs, plan=plan), abs=1e-5)
    rng = torch.Generator().manual_seed(0)
    directions = [gradient / gradient.norm()]
    for _ in range(3):
        # Half along the gradient, so that the slope stands well above float32 rounding.
        noise = torch.randn(pixels.shape, generator=rng)
        mixed = directions[0] + noise / noise.norm()
        directions.append(mixed / mixed.norm())
    for direction in directions:
        h = 1e-3
        up = target_loss(engine, space, pixels + h * direction, pairs, plan=plan)
        down = target_loss(engine, space, pixels - h * direction, pairs, plan=plan)
        slope = float((gradient * direction).sum())
        assert abs(slope) > 0.1
        assert (up - down) / (2 * h) == pytest.approx(slope, rel=0.02)


def test_gradient_does_not_depend_on_how_pairs_are_cut(
    engine: HfEngine, image: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = PixelSpace.of(engine, image)
    pairs = _pairs(engine, space, tmp_path)
    whole_loss, whole = loss_and_gradient(engine, space, space.clean, pairs)
    monkeypatch.setattr(engine, "batch_size", 2)
    cut_loss, cut = loss_and_gradient(engine, space, space.clean, pairs)
    assert cut_loss == pytest.approx(whole_loss, abs=1e-4)
    assert (cut - whole).norm() < 1e-3 * whole.norm()


def test_loss_is_the_mean_over_target_tokens(
    engine: HfEngine, image: Image.Image, tmp_path: Path
) -> None:
    space = PixelSpace.of(engine, image)
    pairs = _pairs(engine, space, tmp_path)
    total, tokens = 0.0, 0
    for prompt, target in pairs:
        batch = engine.prepare([prompt], [target])
        with torch.no_grad():
            total -= float(engine.answer_logprobs(batch).sum())
        tokens += len(target)
    assert target_loss(engine, space, space.clean, pairs) == pytest.approx(total / tokens, abs=1e-3)


@pytest.mark.parametrize("epsilon", [3.0, 2.5, 16.0, 255.0])
def test_the_picture_lies_in_the_ball_and_survives_png(
    engine: HfEngine, image: Image.Image, tmp_path: Path, epsilon: float
) -> None:
    config = PgdConfig(steps=6, targets=2, epsilon_255=epsilon, step_size_255=epsilon / 2)
    result = _attack(engine, image, config)
    attacked = np.asarray(result.image).astype(int)
    clean = np.asarray(result.clean).astype(int)
    assert attacked.shape == clean.shape == (32, 32, 3)
    moved = np.abs(attacked - clean)
    assert moved.max() <= epsilon
    # The attack uses its budget: every pixel may stop at 0 or 255, most reach the edge.
    assert moved.max() >= np.floor(epsilon) * 0.7
    path = result.save(tmp_path / "attacked.png")
    with Image.open(path) as saved:
        encoded = engine.prompts.processor.image_processor(images=saved, return_tensors="pt")
    space = PixelSpace.of(engine, result.clean)
    expected = space.normalise(torch.from_numpy(attacked / 255).float().permute(2, 0, 1))
    assert (encoded["pixel_values"][0] - expected).abs().max() < 1e-4
    # The clean picture at the model's size is a fixed point of the processor, too.
    assert (np.asarray(space.picture(space.clean)) == clean).all()


def test_quantisation_never_leaves_the_ball() -> None:
    clean = torch.tensor([0.0, 10.0, 128.0, 255.0]).view(1, 2, 2).expand(3, 2, 2) / 255
    space = PixelSpace(clean=clean, mean=torch.zeros(3, 1, 1), std=torch.ones(3, 1, 1))
    for epsilon in (0.4, 1.0, 2.6, 255.0):
        for direction in (-1.0, 1.0):
            pixels = space.project(clean + direction, epsilon)
            levels = space.quantise(pixels, epsilon) * 255
            assert (levels - levels.round()).abs().max() < 1e-3
            assert (levels - clean * 255).abs().max() <= epsilon + 1e-3
            assert levels.min() >= 0
            assert levels.max() <= 255
    upward = space.quantise(space.project(clean + 1, 2.6), 2.6) * 255
    assert upward[0].flatten().tolist() == pytest.approx([2.0, 12.0, 130.0, 255.0])


@pytest.mark.parametrize("operator", [None, Operator.ADD])
def test_the_loss_falls_and_a_wider_ball_helps(
    engine: HfEngine, image: Image.Image, operator: Operator | None
) -> None:
    plan = None if operator is None else _plan(engine, operator)
    narrow, wide = (
        _attack(
            engine,
            image,
            PgdConfig(steps=15, targets=2, epsilon_255=epsilon, step_size_255=epsilon / 8),
            plan=plan,
        )
        for epsilon in (2.0, 64.0)
    )
    assert len(wide.losses) == 15
    assert narrow.attacked_loss < narrow.clean_loss
    assert wide.attacked_loss < wide.clean_loss - 1.0
    assert wide.attacked_loss < narrow.attacked_loss


def test_the_adaptive_attack_gains_on_what_the_blind_one_left(
    engine: HfEngine, image: Image.Image
) -> None:
    plan = _plan(engine, Operator.ADD, coefficient=2.0)
    goal = {"prompts": _prompts("you are"), "targets": TARGETS[:1]}
    config = PgdConfig(steps=20, targets=1, epsilon_255=16, step_size_255=4)
    blind = _attack(engine, image, config, **goal)
    adaptive = _attack(engine, blind.image, config, plan=plan, **goal)
    # Its clean loss is the loss of the blind picture through the defence.
    assert adaptive.attacked_loss < adaptive.clean_loss - 1.0


def test_the_same_seed_gives_the_same_picture(engine: HfEngine, image: Image.Image) -> None:
    config = PgdConfig(steps=3, targets=1, epsilon_255=16, step_size_255=4)
    seen: list[tuple[int, int, str]] = []
    first = _attack(engine, image, config, seed=5, progress=lambda *event: seen.append(event))
    again = _attack(engine, image, config, seed=5)
    other = _attack(engine, image, config, seed=6)
    assert first.losses == again.losses
    assert (np.asarray(first.image) == np.asarray(again.image)).all()
    assert first.losses != other.losses
    assert [(done, total) for done, total, _ in seen] == [(1, 3), (2, 3), (3, 3)]


def test_targets_as_tokens_equal_targets_as_text(engine: HfEngine, image: Image.Image) -> None:
    config = PgdConfig(steps=1, targets=2)
    prompts = _prompts("you are")
    tokens = engine.prompts.tokenizer(" bad", add_special_tokens=False)["input_ids"]
    texts, ids = (
        _attack(engine, image, config, prompts=prompts, targets=[target])
        for target in (" bad", tokens)
    )
    assert texts.losses == ids.losses


def test_bad_input_is_named(engine: HfEngine, image: Image.Image, tmp_path: Path) -> None:
    config = PgdConfig(steps=1, targets=1)
    with pytest.raises(DataError, match="at least one prompt"):
        _attack(engine, image, config, prompts=[])
    with pytest.raises(DataError, match=r"which \[1\] are empty"):
        _attack(engine, image, config, targets=["a", ""])
    with pytest.raises(DataError, match="0 targets"):
        _attack(engine, image, config, targets=[])
    result = _attack(engine, image, config)
    with pytest.raises(DataError, match=r"attack\.jpg"):
        result.save(tmp_path / "attack.jpg")


def test_a_text_model_is_refused(tmp_path: Path, image: Image.Image) -> None:
    engine = HfEngine(str(make_tiny_model("llama", tmp_path / "tiny-llama")))
    with pytest.raises(EngineError, match="takes text only"):
        PixelSpace.of(engine, image)


def test_a_processor_that_changes_finished_pictures_is_refused(
    engine: HfEngine, image: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Resize to 40, crop to 32: encoding the crop again would enlarge it and cut its border off.
    processor = engine.prompts.processor.image_processor
    monkeypatch.setattr(processor, "size", type(processor.size)(shortest_edge=40))
    with pytest.raises(EngineError, match="own size"):
        PixelSpace.of(engine, image)


def test_each_prompt_gets_its_own_picture(engine: HfEngine, image: Image.Image) -> None:
    prompts = _prompts("you are", "she said", "what")
    pairs = list(zip(prompts, (" bad", " awful thing", " bad"), strict=True))
    config = PgdConfig(steps=12, epsilon_255=64, step_size_255=8, target="prompt", restarts=2)
    together = prompt_pgd(engine, image, pairs=pairs, config=config)
    assert len(together) == 3
    for result in together:
        assert result.attacked_loss < result.clean_loss - 0.5
        assert result.attacked_loss == min(result.restart_losses)
        assert len(result.restart_losses) == 2
    # Rows do not influence each other: alone, a prompt gets the same loss.
    alone = prompt_pgd(engine, image, pairs=pairs[1:2], config=config)
    assert alone[0].clean_loss == pytest.approx(together[1].clean_loss, abs=1e-3)
    assert alone[0].attacked_loss == pytest.approx(together[1].attacked_loss, abs=0.3)


def test_the_strength_curve_runs_from_the_clean_picture_to_the_result(
    engine: HfEngine, image: Image.Image
) -> None:
    config = PgdConfig(steps=10, targets=2, epsilon_255=64, step_size_255=8)
    result = _attack(engine, image, config)
    assert [look.step for look in result.checkpoints] == [0, 2, 4, 6, 8, 10]
    assert result.checkpoints[0].loss == pytest.approx(result.clean_loss, abs=1e-4)
    assert result.checkpoints[-1].loss == result.attacked_loss
    assert (np.asarray(result.checkpoints[-1].image) == np.asarray(result.image)).all()


def test_straight_through_passes_a_closed_gate_and_changes_no_value(
    engine: HfEngine, image: Image.Image, tmp_path: Path
) -> None:
    plan = _plan(engine, Operator.CLAMP)
    # Calibration far along the direction: the gate is closed for every token.
    far = replace(plan, calibration=plan.directions * 100.0)
    space = PixelSpace.of(engine, image)
    pairs = _pairs(engine, space, tmp_path)[:1]
    bare, bare_slope = loss_and_gradient(engine, space, space.clean, pairs)
    hard, hard_slope = loss_and_gradient(engine, space, space.clean, pairs, plan=far)
    soft, soft_slope = loss_and_gradient(
        engine, space, space.clean, pairs, plan=replace(far, straight_through=True)
    )
    assert bare == hard == soft
    assert torch.equal(bare_slope, hard_slope)
    assert (soft_slope - hard_slope).norm() > 0.01 * hard_slope.norm()

"""Several pictures and pairs in one pass give what each gives alone; schedule, flatness, draws."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from spo.attacks.descent import HELD_APART, Goal, is_flat, step_share
from spo.attacks.likelihood import TargetLikelihood
from spo.attacks.objectives import COMPLIANCE_OPENINGS, wanted
from spo.attacks.packed_pairs import PackedPairs, Pair
from spo.attacks.pgd import PictureGoal, joint_pgd, universal_pgd
from spo.attacks.pixels import PixelSpace
from spo.config import AttackConfig
from spo.engines.forward import SteeringPlan
from spo.engines.hf.engine import HfEngine
from spo.errors import EngineError
from spo.records import Operator, Positions, Prompt, PromptFormat, PromptKind
from tests.tiny_models import HIDDEN, make_tiny_model


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HfEngine]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = make_tiny_model("llava", tmp_path_factory.mktemp("models") / "tiny-llava")
    yield HfEngine(str(folder), dtype="float32", batch_size=16)
    torch.set_num_threads(threads)


def _image(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(60, 190, (32, 32, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def _prompts(
    *texts: str, image: Path | None = None, form: PromptFormat = PromptFormat.CHAT
) -> list[Prompt]:
    return [
        Prompt(
            prompt_id=f"{form}-{i}",
            text=text,
            kind=PromptKind.HARM,
            format=form,
            image=str(image) if image else None,
        )
        for i, text in enumerate(texts)
    ]


def _plan(operator: Operator, positions: Positions) -> SteeringPlan:
    generator = torch.Generator().manual_seed(1)
    return SteeringPlan(
        layers=(0, 2),
        directions=torch.randn(2, HIDDEN, generator=generator),
        mean_norms=torch.full((2,), 8.0),
        calibration=torch.zeros(2, HIDDEN),
        operator=operator,
        positions=positions,
        coefficient=0.5,
    )


def _two_pictures(engine: HfEngine, folder: Path) -> tuple[PixelSpace, list[list[Pair]]]:
    """Two pictures with pairs of both formats, shared prompts, and targets of 1 to 5 tokens."""
    space = PixelSpace.stacked([PixelSpace.of(engine, _image(seed)) for seed in (1, 2)])
    place = folder / "clean.png"
    space.picture(space.clean[0]).save(place)
    chat = _prompts("how do I", "why", "tell me more about it", image=place)
    plain = _prompts("you are", image=place, form=PromptFormat.PLAIN)
    short, long, single = (65, 66), (70, 71, 72, 73, 74), (80,)
    first = [(chat[0], short), (chat[0], long), (plain[0], single), (chat[1], single)]
    second = [(chat[2], long), (plain[0], long), (chat[2], short)]
    return space, [first, second]


@pytest.mark.parametrize("positions", list(Positions))
@pytest.mark.parametrize("operator", [Operator.ADD, Operator.ADAPTIVE])
def test_packed_pairs_equal_rows_one_by_one_through_every_steering(
    engine: HfEngine, tmp_path: Path, operator: Operator, positions: Positions
) -> None:
    plan = replace(_plan(operator, positions), straight_through=True)
    space, pairs = _two_pictures(engine, tmp_path)
    losses, gradient = TargetLikelihood(engine, space, plan).gradient(space.clean, pairs)
    for picture, several in enumerate(pairs):
        leaf = space.clean[picture].clone().requires_grad_(True)
        total, tokens = torch.zeros(()), 0
        for prompt, target in several:
            batch = engine.prepare([prompt], [target])
            pixels = space.normalise(leaf)[None]
            total = total - engine.answer_logprobs(batch, plan, pixel_values=pixels).sum()
            tokens += len(target)
        (total / tokens).backward()
        assert losses[picture] == pytest.approx(total.item() / tokens, abs=1e-4)
        assert leaf.grad is not None
        difference = (gradient[picture] - leaf.grad).norm() / leaf.grad.norm()
        assert difference < 1e-3


def test_a_model_that_cannot_pack_gives_the_same(
    engine: HfEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space, pairs = _two_pictures(engine, tmp_path)
    packed = TargetLikelihood(engine, space).gradient(space.clean, pairs)
    monkeypatch.setattr("spo.attacks.likelihood.can_pack", lambda model: False)
    rows = TargetLikelihood(engine, space)
    monkeypatch.setattr(rows, "_packed_sums", None)
    losses, gradient = rows.gradient(space.clean, pairs)
    assert losses == pytest.approx(packed[0], abs=1e-4)
    assert (gradient - packed[1]).norm() < 1e-3 * gradient.norm()


def test_small_passes_add_up_to_a_large_one(engine: HfEngine, tmp_path: Path) -> None:
    space, pairs = _two_pictures(engine, tmp_path)
    whole = TargetLikelihood(engine, space).gradient(space.clean, pairs)
    for at_once in (1, 2, 3):
        cut = TargetLikelihood(engine, space, at_once=at_once)
        losses, gradient = cut.gradient(space.clean, pairs)
        assert losses == pytest.approx(whole[0], abs=1e-4)
        assert (gradient - whole[1]).norm() < 1e-3 * gradient.norm()


def test_a_prompt_that_ends_with_its_picture_is_not_packed() -> None:
    (prompt,) = _prompts("what is this")
    pairs = [[(prompt, (5,))]]
    device = torch.device("cpu")
    ends = PackedPairs.of(pairs, {prompt: (1, 9, 9)}, {prompt: ((1, 2),)}, device)
    goes_on = PackedPairs.of(pairs, {prompt: (1, 9, 9, 3)}, {prompt: ((1, 2),)}, device)
    assert ends is None
    assert goes_on is not None
    assert goes_on.input_ids.tolist() == [[1, 9, 9, 3]]


def test_pictures_made_together_equal_those_made_alone(engine: HfEngine) -> None:
    config = AttackConfig(steps=6, pairs_per_step=3)
    goals = [
        PictureGoal(
            image=_image(number),
            prompts=_prompts("how", "why", "what is it", "who", "where to go"),
            targets=COMPLIANCE_OPENINGS[:4],
            epsilon_255=epsilon,
            step_size_255=epsilon / 8,
            seed=number,
        )
        for number, epsilon in ((1, 16.0), (2, 64.0), (3, 255.0))
    ]
    together = joint_pgd(engine, goals, config=config)
    for goal, result in zip(goals, together, strict=True):
        (alone,) = joint_pgd(engine, [goal], config=config)
        assert result.losses[0] == pytest.approx(alone.losses[0], abs=1e-4)
        assert result.attacked_loss == pytest.approx(alone.attacked_loss, abs=0.1)
        assert result.attacked_loss < result.clean_loss - 0.05
        moved = np.abs(np.asarray(result.image, dtype=int) - np.asarray(result.clean, dtype=int))
        assert goal.epsilon_255 * 0.3 < moved.max() <= goal.epsilon_255
        assert (result.steps, result.pairs) == (6, 18)
        assert result.wall_s > 0


def test_pictures_of_different_sizes_are_refused() -> None:
    small, large = (
        PixelSpace(
            clean=torch.zeros(3, side, side), mean=torch.zeros(3, 1, 1), std=torch.ones(3, 1, 1)
        )
        for side in (8, 16)
    )
    with pytest.raises(EngineError, match=r"one size.*\(3, 8, 8\), \(3, 16, 16\)"):
        PixelSpace.stacked([large, small])


def test_each_picture_is_projected_into_its_own_ball() -> None:
    clean = torch.tensor([0.0, 0.5, 1.0]).view(1, 3, 1, 1).expand(2, 3, 2, 2)
    space = PixelSpace(clean=clean, mean=torch.zeros(3, 1, 1), std=torch.ones(3, 1, 1))
    radius = torch.tensor([2.0, 100.5]).view(2, 1, 1, 1)
    pixels = space.project(clean + torch.randn(2, 3, 2, 2), radius)
    moved = (pixels - clean).abs().amax(dim=(1, 2, 3)) * 255
    assert moved[0] == pytest.approx(2.0, abs=1e-3)
    assert 2.0 < moved[1] <= 100.5 + 1e-3
    assert pixels.min() >= 0
    assert pixels.max() <= 1
    levels = (space.quantise(pixels, radius) - (clean * 255).round() / 255).abs() * 255
    assert (levels.amax(dim=(1, 2, 3)) <= torch.tensor([2.001, 100.001])).all()


def test_every_pair_comes_once_a_round_and_those_held_apart_never() -> None:
    goal = Goal(
        prompts=_prompts(*"abcdefghij"),
        targets=[(i,) for i in range(8)],
        epsilon_255=16,
        step_size_255=2,
        seed=3,
    )
    probe, stream = goal.split()
    assert len(probe) == HELD_APART
    rounds = [[next(stream) for _ in range(80 - HELD_APART)] for _ in range(2)]
    for one in rounds:
        assert len(set(one)) == 80 - HELD_APART
        assert not set(one) & set(probe)
    assert rounds[0] != rounds[1]
    assert goal.split()[0] == probe
    assert replace(goal, seed=4).split()[0] != probe
    # Too few to hold some apart: the same pairs measure and are descended on.
    few = replace(goal, prompts=goal.prompts[:2], targets=goal.targets[:2])
    probe, stream = few.split()
    assert {next(stream) for _ in range(4)} == set(probe)
    assert len(probe) == 4


def test_the_step_size_falls_to_its_last_share() -> None:
    linear = AttackConfig(steps=100, final_step=0.2)
    cosine = AttackConfig(steps=100, final_step=0.2, schedule="cosine")
    for config in (linear, cosine):
        shares = [step_share(config, place) for place in range(101)]
        assert shares[0] == 1.0
        assert shares[50] == pytest.approx(0.6)
        assert shares[100] == pytest.approx(0.2)
        assert shares == sorted(shares, reverse=True)
    assert step_share(cosine, 20) > step_share(linear, 20)


def test_a_curve_is_flat_when_two_means_hardly_differ() -> None:
    falling = [10.0 * 0.9**i for i in range(40)]
    assert not is_flat(falling, 10, 0.01)
    noise = np.random.default_rng(0).normal(0, 0.2, 60)
    assert is_flat([*falling, *(1.0 + 0.01 * noise)], 20, 0.05)
    assert is_flat([1.0, 2.0], 1, 0.01)  # it rises
    assert not is_flat([1.0] * 19, 10, 0.01)  # too few steps to tell
    assert not is_flat([1.0] * 100, 0, 0.01)


def test_a_flat_curve_ends_the_attack_early_with_small_steps(engine: HfEngine) -> None:
    # No radius worth the name: nothing can be gained.
    still = AttackConfig(steps=100, pairs_per_step=2, epsilon_255=0.4, step_size_255=0.1)
    stopping = still.model_copy(update={"flat_steps": 5, "flat_gain": 0.5})
    prompts, targets = _prompts("how"), ["no"]
    result = universal_pgd(engine, _image(1), prompts=prompts, targets=targets, config=stopping)
    assert result.steps == 30  # twice five to tell, then the last fifth
    assert result.checkpoints[-1].step == 30
    assert result.pairs == 30
    other = still.model_copy(update={"steps": 12})
    assert (
        universal_pgd(engine, _image(1), prompts=prompts, targets=targets, config=other).steps == 12
    )


def test_of_several_starts_the_best_on_the_pairs_held_apart_is_kept(engine: HfEngine) -> None:
    prompts = _prompts("how do I", "why is it", "tell me", "who was", "where")
    targets = COMPLIANCE_OPENINGS[:4]
    config = AttackConfig(steps=4, pairs_per_step=2, restarts=3, epsilon_255=64, step_size_255=8)
    result = universal_pgd(
        engine, _image(1), prompts=prompts, targets=targets, config=config, seed=2
    )
    assert len(set(result.restart_losses)) == 3
    assert result.attacked_loss == min(result.restart_losses)
    assert result.pairs == 3 * 4 * 2
    single = config.model_copy(update={"restarts": 1})
    first = universal_pgd(
        engine, _image(1), prompts=prompts, targets=targets, config=single, seed=2
    )
    assert first.attacked_loss == result.restart_losses[0]


def test_objectives_name_their_targets_and_conditions() -> None:
    assert wanted("compliance", ["rude"]) == COMPLIANCE_OPENINGS
    assert wanted("toxic", ["rude"]) == ("rude",)
    assert AttackConfig(epsilon_255=16).name == "pgd-16"
    assert AttackConfig(epsilon_255=16, objective="compliance").name == "pgd-compliance-16"
    with pytest.raises(ValueError, match="'objective' goes with kind 'pgd' only"):
        AttackConfig(kind="template", objective="compliance")
    assert AttackConfig(targets=4).pairs == 4
    assert AttackConfig(targets=4, pairs_per_step=6).pairs == 6

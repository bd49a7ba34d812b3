"""White-box PGD on the picture: one picture that makes toxic continuations likely.

In: an `HfEngine`, a clean picture, prompts and toxic target texts. Out: an 8-bit picture inside the
L-infinity ball around the clean one, at the processor's own resolution, so that saving it as PNG
and encoding it again gives the attacked pixels. After Qi et al. (arXiv 2306.13213): signed steps on
the mean negative log-likelihood of a corpus of targets, over mini-batches of (prompt, target)
pairs. With a `SteeringPlan` the gradient goes through the defence (adaptive attack).
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from spo.config import AttackConfig
from spo.engines.hf import HfEngine
from spo.engines.plan import SteeringPlan
from spo.errors import DataError, EngineError
from spo.records import Prompt

Progress = Callable[[int, int, str], None]
"""Called with (done, total, what)."""

Pair = tuple[Prompt, tuple[int, ...]]
"""A prompt with the tokens that the attack wants as its answer."""

# Saved and encoded again, the picture must give the attacked pixels far within one grey level.
_SAME_PIXELS = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PgdResult:
    """An attacked picture and the evidence of how far the attack got."""

    image: Image.Image
    """Attacked picture, 8-bit RGB at the processor's resolution. Save it with `save`."""
    clean: Image.Image
    """The clean picture at the same resolution: the centre of the ball."""
    losses: tuple[float, ...]
    """Mean negative log-likelihood per target token of each step's mini-batch, before the step."""
    clean_loss: float
    """The same of the clean picture, on one fixed set of pairs."""
    attacked_loss: float
    """The same of the final 8-bit picture, on the same pairs as `clean_loss`."""

    def save(self, path: Path) -> Path:
        """Write the attacked picture as PNG; DataError for a suffix that would lose pixels."""
        if path.suffix.lower() != ".png":
            raise DataError(
                f"an attacked picture must be saved as .png, got {path.name!r}: a lossy format "
                "takes the attack away"
            )
        self.image.save(path, format="PNG")
        return path


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PixelSpace:
    """Pixels in 0..1 at the processor's resolution, and how the processor normalises them."""

    clean: Tensor
    """(3, height, width) float32, whole grey levels divided by 255."""
    mean: Tensor
    """(3, 1, 1) float32."""
    std: Tensor
    """(3, 1, 1) float32."""

    @classmethod
    def of(cls, engine: HfEngine, image: Image.Image) -> PixelSpace:
        """Resize a picture as the engine's processor does and read its normalisation.

        Raises:
            EngineError: the model takes no pictures, or its processor does not make one
                normalised picture of the resized one (tiles, patches).
        """
        if not engine.prompts.multimodal:
            raise EngineError(
                f"a picture attack needs a vision-language model, {engine.info.model_id!r} takes "
                "text only"
            )
        processor = engine.prompts.processor.image_processor
        raw = _processed(processor, image, do_rescale=False, do_normalize=False)
        normalises = bool(processor.do_normalize)
        mean = processor.image_mean if normalises else (0.0, 0.0, 0.0)
        std = processor.image_std if normalises else (1.0, 1.0, 1.0)
        space = cls(
            clean=(raw.clamp(0, 255).round() / 255).to(engine.device),
            mean=torch.tensor(mean, dtype=torch.float32, device=engine.device).view(3, 1, 1),
            std=torch.tensor(std, dtype=torch.float32, device=engine.device).view(3, 1, 1),
        )
        again = _processed(processor, space.picture(space.clean)).to(engine.device)
        expected = space.normalise(space.clean)
        if again.shape != expected.shape or (again - expected).abs().max() > _SAME_PIXELS:
            raise EngineError(
                f"{engine.info.model_id!r}: its processor changes a picture that already has its "
                "own size, so pixels cannot be attacked exactly; use a model with a fixed input "
                "size and a (x - mean) / std normalisation"
            )
        return space

    def normalise(self, pixels: Tensor) -> Tensor:
        """(3, height, width) model input of pixels in 0..1; differentiable."""
        return (pixels - self.mean) / self.std

    def picture(self, pixels: Tensor) -> Image.Image:
        """The 8-bit picture of pixels in 0..1."""
        levels = (pixels.detach() * 255).round().clamp(0, 255).to(torch.uint8)
        return Image.fromarray(levels.permute(1, 2, 0).cpu().numpy())

    def project(self, pixels: Tensor, epsilon_255: float) -> Tensor:
        """The nearest pixels inside the ball around the clean picture and inside 0..1."""
        radius = epsilon_255 / 255
        return pixels.clamp(self.clean - radius, self.clean + radius).clamp(0.0, 1.0)

    def quantise(self, pixels: Tensor, epsilon_255: float) -> Tensor:
        """The nearest whole grey levels that still lie inside the ball, divided by 255."""
        # Clean levels are whole, so a ball of fractional radius reaches floor(radius) levels.
        reach = math.floor(epsilon_255)
        centre = (self.clean * 255).round()
        levels = (pixels * 255).round().clamp(centre - reach, centre + reach)
        return levels.clamp(0, 255) / 255


def universal_pgd(
    engine: HfEngine,
    image: Image.Image,
    *,
    prompts: Sequence[Prompt],
    targets: Sequence[str | Sequence[int]],
    config: AttackConfig,
    plan: SteeringPlan | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> PgdResult:
    """Find one picture that raises the likelihood of every target after every prompt.

    Args:
        engine: the model under test, with gradients.
        image: the clean picture, any size.
        prompts: prompts that the picture is shown with; their own pictures are ignored.
        targets: texts (or their tokens) whose likelihood after every prompt is raised.
        config: radius, steps, step size, and pairs per step. A radius of 255 is unbounded.
        plan: the defence to attack through; None attacks the unsteered model.
        seed: seed of the mini-batches.
        progress: called after every step.

    Raises:
        DataError: no prompts, or no target with tokens.
        EngineError: the processor does not fit, or a gradient is not finite.
    """
    space = PixelSpace.of(engine, image)
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as folder:
        clean_path = str(Path(folder) / "clean.png")
        space.picture(space.clean).save(clean_path, format="PNG")
        shown = [replace(prompt, image=clean_path) for prompt in prompts]
        draw = _pair_drawer(shown, _target_tokens(engine, targets), rng)
        probe = draw(config.targets)
        pixels, losses = space.clean.clone(), []
        for step in range(config.steps):
            loss, gradient = loss_and_gradient(
                engine, space, pixels, draw(config.targets), plan=plan
            )
            stepped = pixels - (config.step_size_255 / 255) * gradient.sign()
            pixels = space.project(stepped, config.epsilon_255)
            losses.append(loss)
            if progress:
                progress(step + 1, config.steps, f"pgd loss {loss:.3f}")
        final = space.quantise(pixels, config.epsilon_255)
        return PgdResult(
            image=space.picture(final),
            clean=space.picture(space.clean),
            losses=tuple(losses),
            clean_loss=target_loss(engine, space, space.clean, probe, plan=plan),
            attacked_loss=target_loss(engine, space, final, probe, plan=plan),
        )


def loss_and_gradient(
    engine: HfEngine,
    space: PixelSpace,
    pixels: Tensor,
    pairs: Sequence[Pair],
    *,
    plan: SteeringPlan | None = None,
) -> tuple[float, Tensor]:
    """Mean negative log-likelihood per target token, and its gradient in the pixels.

    Args:
        engine: the model under test.
        space: normalisation.
        pixels: (3, height, width) in 0..1.
        pairs: prompts (with any picture of the right size) and target tokens.
        plan: the defence, or None.

    Returns:
        The loss, and a (3, height, width) float32 gradient.
    """
    leaf = pixels.detach().clone().requires_grad_(True)
    total = 0.0
    for part, share in _parts(pairs, engine.batch_size):
        loss = _part_loss(engine, space.normalise(leaf), part, plan) * share
        loss.backward()
        total += float(loss.detach())
    gradient = leaf.grad
    if gradient is None or not torch.isfinite(gradient).all() or not math.isfinite(total):
        raise EngineError(
            f"the picture's gradient is missing or not finite (loss {total}); run the attack in "
            "float32 or bfloat16"
        )
    return total, gradient


@torch.no_grad()
def target_loss(
    engine: HfEngine,
    space: PixelSpace,
    pixels: Tensor,
    pairs: Sequence[Pair],
    *,
    plan: SteeringPlan | None = None,
) -> float:
    """Mean negative log-likelihood per target token; arguments as in `loss_and_gradient`."""
    return sum(
        float(_part_loss(engine, space.normalise(pixels), part, plan)) * share
        for part, share in _parts(pairs, engine.batch_size)
    )


def _part_loss(
    engine: HfEngine, normalised: Tensor, pairs: Sequence[Pair], plan: SteeringPlan | None
) -> Tensor:
    batch = engine.prepare([prompt for prompt, _ in pairs], [tokens for _, tokens in pairs])
    pixel_values = normalised.unsqueeze(0).expand(len(pairs), -1, -1, -1)
    logprobs = engine.answer_logprobs(batch, plan, pixel_values=pixel_values)
    return -logprobs.sum() / batch.answer_mask.sum()


def _parts(pairs: Sequence[Pair], size: int) -> list[tuple[Sequence[Pair], float]]:
    """Cut pairs into parts of at most `size`, each with its share of the target tokens."""
    tokens = sum(len(target) for _, target in pairs)
    parts = [pairs[start : start + size] for start in range(0, len(pairs), size)]
    return [(part, sum(len(target) for _, target in part) / tokens) for part in parts]


def _pair_drawer(
    prompts: Sequence[Prompt], targets: Sequence[tuple[int, ...]], rng: np.random.Generator
) -> Callable[[int], list[Pair]]:
    """A function that draws n pairs; nothing repeats within a draw while there is enough of it."""
    if not prompts:
        raise DataError("the attack needs at least one prompt, got none")

    def draw(count: int) -> list[Pair]:
        rows = rng.choice(len(prompts), size=count, replace=count > len(prompts))
        columns = rng.choice(len(targets), size=count, replace=count > len(targets))
        return [(prompts[r], targets[c]) for r, c in zip(rows, columns, strict=True)]

    return draw


def _target_tokens(
    engine: HfEngine, targets: Sequence[str | Sequence[int]]
) -> list[tuple[int, ...]]:
    tokens = [
        tuple(
            engine.prompts.tokenizer(target, add_special_tokens=False)["input_ids"]
            if isinstance(target, str)
            else target
        )
        for target in targets
    ]
    empty = [i for i, target in enumerate(tokens) if not target]
    if empty or not tokens:
        raise DataError(
            f"the attack needs targets with at least one token each, got {len(tokens)} targets of "
            f"which {empty} are empty"
        )
    return tokens


def _processed(processor: Any, image: Image.Image, **options: bool) -> Tensor:
    """The processor's one (3, height, width) float32 tensor of a picture."""
    pixels = processor(images=image.convert("RGB"), return_tensors="pt", **options)["pixel_values"]
    if not isinstance(pixels, Tensor) or pixels.ndim != 4 or pixels.shape[:2] != (1, 3):
        raise EngineError(
            f"{type(processor).__name__}: expected one (3, height, width) tensor of a picture, "
            f"got shape {tuple(getattr(pixels, 'shape', ()))}; models that cut pictures into tiles "
            "or patches cannot be attacked by this PGD"
        )
    return pixels[0].float()

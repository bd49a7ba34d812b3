"""Pixels at the processor's own resolution: the space that a picture attack moves in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from spo.engines.hf.engine import HfEngine
from spo.errors import EngineError

# Saved and encoded again, the picture must give the attacked pixels far within one grey level.
_SAME_PIXELS = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PixelSpace:
    """Pixels in 0..1 at the processor's resolution, and how the processor normalises them."""

    clean: Tensor
    """(3, height, width), or (pictures, 3, height, width), float32, whole grey levels divided by
    255."""
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

    @classmethod
    def stacked(cls, spaces: Sequence[PixelSpace]) -> PixelSpace:
        """One space of several clean pictures; EngineError when their sizes differ."""
        shapes = {tuple(space.clean.shape) for space in spaces}
        if len(shapes) != 1:
            raise EngineError(
                f"pictures that are attacked together must have one size after the processor, got "
                f"{sorted(shapes)}; attack them one by one"
            )
        return cls(
            clean=torch.stack([space.clean for space in spaces]),
            mean=spaces[0].mean,
            std=spaces[0].std,
        )

    def normalise(self, pixels: Tensor) -> Tensor:
        """(..., 3, height, width) model input of pixels in 0..1; differentiable."""
        return (pixels - self.mean) / self.std

    def picture(self, pixels: Tensor) -> Image.Image:
        """The 8-bit picture of pixels in 0..1."""
        levels = (pixels.detach() * 255).round().clamp(0, 255).to(torch.uint8)
        return Image.fromarray(levels.permute(1, 2, 0).cpu().numpy())

    def project(self, pixels: Tensor, epsilon_255: float | Tensor) -> Tensor:
        """Nearest pixels inside the ball around the clean picture and inside 0..1.

        A tensor of radii has one for each picture: (pictures, 1, 1, 1).
        """
        radius = epsilon_255 / 255
        return pixels.clamp(self.clean - radius, self.clean + radius).clamp(0.0, 1.0)

    def quantise(self, pixels: Tensor, epsilon_255: float | Tensor) -> Tensor:
        """The nearest whole grey levels that still lie inside the ball, divided by 255."""
        # Clean levels are whole, so a ball of fractional radius reaches floor(radius) levels.
        reach = torch.as_tensor(epsilon_255, device=self.clean.device).floor()
        centre = (self.clean * 255).round()
        levels = (pixels * 255).round().clamp(centre - reach, centre + reach)
        return levels.clamp(0, 255) / 255


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

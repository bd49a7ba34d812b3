"""How likely target answers are, as a differentiable function of pictures.

In: pictures, and for each of them (prompt, target) pairs. Out: the mean negative log-likelihood per
target token of every picture, and its gradient in the pixels. One forward pass serves several
pictures. Where the model allows it, a row holds one picture, then the rest of every prompt, then
every target: what comes up to the picture is computed once for all pairs, and a prompt once for all
its targets. Other models get a row for each pair. With a `SteeringPlan` the pass goes through the
defence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from spo.algorithms.positions import Span
from spo.attacks.packed_pairs import PackedPairs, Pair, Tokens
from spo.attacks.pixels import PixelSpace
from spo.engines.forward import SteeringPlan
from spo.engines.hf.engine import HfEngine
from spo.engines.hf.packing import can_pack
from spo.engines.processing import PICTURE_INPUTS
from spo.errors import EngineError
from spo.records import Prompt

_TOKENISED_AT_ONCE = 64


class TargetLikelihood:
    """Losses of pictures on (prompt, target) pairs; each prompt is tokenised once.

    Args:
        engine: the model under test, with gradients.
        space: how pixels in 0..1 are normalised.
        plan: the defence, or None for the unsteered model.
        autocast: compute in bfloat16 on a CUDA device, whatever the type of the weights.
        at_once: largest number of pairs in a forward pass; None takes the engine's batch size.
    """

    def __init__(
        self,
        engine: HfEngine,
        space: PixelSpace,
        plan: SteeringPlan | None = None,
        *,
        autocast: bool = False,
        at_once: int | None = None,
    ) -> None:
        self._engine = engine
        self._space = space
        self._plan = plan
        self._autocast = autocast and engine.device.type == "cuda"
        self._at_once = at_once or engine.batch_size
        self._packs = can_pack(engine.model)
        self._tokens: dict[Prompt, Tokens] = {}
        self._spans: dict[Prompt, tuple[Span, ...]] = {}

    def gradient(
        self, pixels: Tensor, pairs: Sequence[Sequence[Pair]]
    ) -> tuple[list[float], Tensor]:
        """Loss of each picture on its own pairs, and its gradient.

        Args:
            pixels: (pictures, 3, height, width) in 0..1.
            pairs: at least one for each picture.

        Returns:
            The losses, and a gradient of the pictures' shape, float32.

        Raises:
            EngineError: a loss or a gradient is not finite.
        """
        leaf = pixels.detach().clone().requires_grad_(True)
        losses = self._accumulated(leaf, pairs, backward=True)
        gradient = leaf.grad
        if (
            gradient is None
            or not torch.isfinite(gradient).all()
            or not all(map(math.isfinite, losses))
        ):
            raise EngineError(
                f"the picture's gradient is missing or not finite (losses {losses}); run the attack"
                " in float32 or bfloat16"
            )
        return losses, gradient

    @torch.no_grad()
    def losses(self, pixels: Tensor, pairs: Sequence[Sequence[Pair]]) -> list[float]:
        """Loss of each picture in the weights' own type; arguments as in `gradient`."""
        return self._accumulated(pixels, pairs, backward=False)

    def _accumulated(
        self, pixels: Tensor, pairs: Sequence[Sequence[Pair]], *, backward: bool
    ) -> list[float]:
        total = torch.zeros(len(pairs), device=pixels.device)
        shares = torch.tensor(
            [1.0 / sum(len(target) for _, target in several) for several in pairs],
            device=pixels.device,
        )
        for part in _parts(pairs, self._at_once):
            index = torch.tensor([picture for picture, _ in part], device=pixels.device)
            inputs = self._space.normalise(pixels[index])
            with self._precision(backward):
                sums = self._sums(inputs, [several for _, several in part])
            share = sums * shares[index]
            if backward:
                share.sum().backward()
            total.index_add_(0, index, share.detach())
        found: list[float] = total.tolist()
        return found

    def _precision(self, backward: bool) -> AbstractContextManager[object]:
        if self._autocast and backward:
            return torch.autocast("cuda", dtype=torch.bfloat16)
        return nullcontext()

    def _sums(self, inputs: Tensor, pairs: Sequence[Sequence[Pair]]) -> Tensor:
        """(rows,) summed negative log-likelihood of each row's pairs; one forward pass."""
        if self._packs:
            self._tokenise([prompt for several in pairs for prompt, _ in several])
            packed = PackedPairs.of(pairs, self._tokens, self._spans, self._engine.device)
            if packed is not None and self._packs:
                return self._packed_sums(inputs, packed)
        prompts = [prompt for several in pairs for prompt, _ in several]
        targets = [target for several in pairs for _, target in several]
        row = torch.tensor([i for i, several in enumerate(pairs) for _ in several]).to(
            inputs.device
        )
        batch = self._engine.prepare(prompts, targets)
        logprobs = self._engine.answer_logprobs(batch, self._plan, pixel_values=inputs[row])
        return inputs.new_zeros(len(pairs)).index_add(0, row, -logprobs.sum(dim=1))

    def _packed_sums(self, inputs: Tensor, packed: PackedPairs) -> Tensor:
        model = self._engine.model
        with self._engine.steered(packed, self._plan):
            hidden = model.base_model(
                input_ids=packed.input_ids,
                attention_mask=packed.attention_mask,
                position_ids=packed.position_ids,
                pixel_values=inputs[packed.pictures].to(model.dtype),
                use_cache=False,
            ).last_hidden_state
        states = hidden[packed.rows, packed.columns]
        logits = model.get_output_embeddings()(states).float()
        each = torch.nn.functional.cross_entropy(logits, packed.wanted, reduction="none")
        return inputs.new_zeros(len(inputs)).index_add(0, packed.pictures[packed.rows], each)

    def _tokenise(self, prompts: Sequence[Prompt]) -> None:
        """Keep the tokens of every prompt, its picture's expanded, and where those lie."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._tokens]
        for first in range(0, len(new), _TOKENISED_AT_ONCE):
            part = new[first : first + _TOKENISED_AT_ONCE]
            encoded = self._engine.prompts.encode(part)
            self._packs &= {name for name in encoded if name in PICTURE_INPUTS} == {"pixel_values"}
            for prompt, row, real in zip(
                part, encoded["input_ids"], encoded["attention_mask"].bool(), strict=True
            ):
                self._tokens[prompt] = tuple(row[real].tolist())
                self._spans[prompt] = self._engine.prompts.spans(self._tokens[prompt])


def _parts(pairs: Sequence[Sequence[Pair]], at_once: int) -> list[list[tuple[int, Sequence[Pair]]]]:
    """Forward passes of at most `at_once` pairs: numbers of pictures with some of their pairs."""
    parts: list[list[tuple[int, Sequence[Pair]]]] = []
    free = 0
    for picture, several in enumerate(pairs):
        for first in range(0, len(several), at_once):
            some = several[first : first + at_once]
            if len(some) > free:
                parts.append([])
                free = at_once
            parts[-1].append((picture, some))
            free -= len(some)
    return parts

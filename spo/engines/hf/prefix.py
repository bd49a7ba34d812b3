"""Learner passes of a Transformers model: what steering cannot change is computed once.

Below the lowest steered block a frozen model computes the same for the unsteered, the steered and
every other pass over the same tokens. So the passes share one prefix run without gradients, and
start from its hidden states. The answers of a group share their prompt (`spo.engines.hf.packing`);
logits are made for answer tokens alone, in chunks that are recomputed
on the way back, so that no (tokens x vocabulary) tensor is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from spo.engines.forward import AnswerScores, SteeringPlan, TokenBatch, token_kl, token_logprobs
from spo.engines.hf.compiled import forwards
from spo.engines.hf.packing import PackedBatch, can_pack, pack

Steered = Callable[[Any, SteeringPlan | None], Any]
"""Context manager that steers the blocks, as `HfEngine` does."""


class _EarlyExit(Exception):
    """Stops a forward pass once the lowest steered block is through."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prefix:
    """State of a forward pass after one block."""

    layer: int
    output: Any
    """What the block returned, in its own form."""
    inputs: dict[str, Any]
    """Arguments that the decoder got beside the embeddings."""


class PrefixRunner:
    """Runs one model's decoder in two parts.

    Args:
        model: causal or image-text model of Transformers.
        blocks: its decoder blocks.
        steered: how the blocks are steered.
        fused: context of every pass; the blocks may run compiled in it.
    """

    def __init__(
        self,
        model: Any,
        blocks: Sequence[nn.Module],
        steered: Steered,
        fused: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._model = model
        self._decoder = model.get_decoder()
        self._blocks = blocks
        self._steered = steered
        self._fused = fused

    def scores(
        self,
        batch: TokenBatch,
        plans: Sequence[SteeringPlan],
        *,
        chunk_tokens: int,
        cache_prefix: bool = True,
    ) -> list[AnswerScores]:
        """Scores of the answers under each plan, against the unsteered model."""
        packed = None
        if cache_prefix and can_pack(self._model):
            packed = pack(batch)
        layout: TokenBatch | PackedBatch = packed or batch
        prefix = None
        with self._fused():
            with torch.no_grad():
                if cache_prefix:
                    prefix = self._run_prefix(layout, min(min(plan.layers) for plan in plans))
                reference = self._states(layout, None, prefix)
            steered = [self._states(layout, plan, prefix) for plan in plans]
        return [self._head(batch, states, reference, chunk_tokens) for states in steered]

    def _inputs(self, batch: TokenBatch | PackedBatch) -> dict[str, Any]:
        extras = dict(batch.extras)
        if "pixel_values" in extras:
            extras["pixel_values"] = extras["pixel_values"].to(self._model.dtype)
        return {
            "input_ids": batch.input_ids,
            "attention_mask": batch.attention_mask,
            "use_cache": False,
            **extras,
        }

    def _run_prefix(self, batch: TokenBatch | PackedBatch, layer: int) -> Prefix | None:
        """The pass up to block `layer`; None where the decoder adds pictures above that block."""
        seen: dict[str, Any] = {}

        def before_decoder(_: nn.Module, __: Any, kwargs: dict[str, Any]) -> None:
            seen.update(kwargs)

        def after_block(_: nn.Module, __: Any, output: Any) -> None:
            seen["output"] = output
            raise _EarlyExit

        handles = [
            self._decoder.register_forward_pre_hook(before_decoder, with_kwargs=True),
            self._blocks[layer].register_forward_hook(after_block),
        ]
        try:
            with suppress(_EarlyExit):
                self._model.base_model(**self._inputs(batch))
        finally:
            for handle in handles:
                handle.remove()
        output = seen.pop("output")
        # Qwen3-VL adds picture features again after each of its first blocks.
        again = seen.get("deepstack_visual_embeds")
        if again is not None:
            if layer < len(again):
                return None
            seen["deepstack_visual_embeds"] = None
        for name in ("input_ids", "inputs_embeds", "past_key_values"):
            seen.pop(name, None)
        return Prefix(layer=layer, output=output, inputs=seen)

    def _states(
        self, batch: TokenBatch | PackedBatch, plan: SteeringPlan | None, prefix: Prefix | None
    ) -> Tensor:
        """(answers, answer width, hidden) states from which the answers' tokens are predicted."""
        with self._steered(batch, plan):
            if prefix is None:
                output = self._model.base_model(**self._inputs(batch))
            else:
                hidden = prefix.output[0] if isinstance(prefix.output, tuple) else prefix.output
                # The decoder makes its masks beside it; of several cards, on the first.
                hidden = hidden.to(batch.input_ids.device)
                with self._skipped(prefix):
                    output = self._decoder(inputs_embeds=hidden, **prefix.inputs)
        if isinstance(batch, PackedBatch):
            return batch.answer_states(output.last_hidden_state)
        width = batch.answer_ids.shape[1]
        states: Tensor = output.last_hidden_state[:, -width - 1 : -1]
        return states

    def _skipped(self, prefix: Prefix) -> AbstractContextManager[None]:
        """Blocks up to the prefix's do nothing; the last of them returns what it had returned."""
        skipped = self._blocks[: prefix.layer + 1]
        return forwards(skipped, [lambda *_, **__: prefix.output] * len(skipped))

    def _head(
        self, batch: TokenBatch, states: Tensor, reference: Tensor, chunk_tokens: int
    ) -> AnswerScores:
        mask = batch.answer_mask
        steered, unsteered, ids = states[mask], reference[mask], batch.answer_ids[mask]
        parts = []
        for start in range(0, len(ids), chunk_tokens):
            part = slice(start, start + chunk_tokens)
            arguments = (steered[part], unsteered[part], ids[part])
            if steered.requires_grad:
                parts.append(checkpoint(self._token_scores, *arguments, use_reentrant=False))
            else:
                parts.append(self._token_scores(*arguments))
        policy, base, kl = (torch.cat(values) for values in zip(*parts, strict=True))
        empty = torch.zeros(mask.shape, device=mask.device)
        return AnswerScores(
            policy=empty.masked_scatter(mask, policy),
            reference=empty.masked_scatter(mask, base),
            kl=empty.masked_scatter(mask, kl),
        )

    def _token_scores(
        self, states: Tensor, reference: Tensor, ids: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        everything = torch.ones_like(ids, dtype=torch.bool)
        logits = self._logits(states)
        with torch.no_grad():
            base = self._logits(reference)
        return (
            token_logprobs(logits[None], ids[None], everything[None])[0],
            token_logprobs(base[None], ids[None], everything[None])[0],
            token_kl(logits, base),
        )

    def _logits(self, states: Tensor) -> Tensor:
        logits: Tensor = self._model.get_output_embeddings()(states).float()
        cap = getattr(self._model.config.get_text_config(), "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap

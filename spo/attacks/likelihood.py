"""How likely target answers are, as a differentiable function of the picture.

Targets of one prompt share the forward pass over picture and prompt, so that eight targets cost
little more than one. With a `SteeringPlan` the pass goes through the defence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import transformers
from torch import Tensor

from spo.engines.forward import SteeringPlan, pad_answers, token_logprobs
from spo.engines.hf.engine import HfEngine
from spo.records import Prompt

Tokens = tuple[int, ...]


def target_nll(
    engine: HfEngine,
    prompt: Prompt,
    targets: Sequence[Tokens],
    pixel_values: Tensor,
    plan: SteeringPlan | None = None,
) -> Tensor:
    """Mean negative log-likelihood per target token after one prompt.

    Args:
        engine: the model under test.
        prompt: what is asked; its own picture only holds the place.
        targets: token ids of the wanted answers, each with at least one token.
        pixel_values: (3, height, width) normalised picture; gradients flow into it.
        plan: the defence, or None for the unsteered model.

    Returns:
        Scalar, natural log.
    """
    head = engine.prepare([prompt])
    pixels = pixel_values.unsqueeze(0).to(engine.model.dtype)
    cache = transformers.DynamicCache()
    with engine.steered(head, plan):
        first = engine.model(
            input_ids=head.input_ids,
            attention_mask=head.attention_mask,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            **{**head.extras, "pixel_values": pixels},
        ).logits
    count = len(targets)
    ids, mask = (part.to(engine.device) for part in pad_answers(targets))
    logits = first.expand(count, -1, -1)
    if ids.shape[1] > 1:
        cache.batch_repeat_interleave(count)
        said = replace(
            head,
            attention_mask=torch.cat([head.attention_mask.expand(count, -1), mask.long()], dim=1),
            pads=head.pads * count,
            spans=head.spans * count,
            answer_ids=ids,
            answer_mask=mask,
        )
        with engine.steered(said, plan):
            rest = engine.model(
                input_ids=ids[:, :-1],
                attention_mask=said.attention_mask[:, :-1],
                past_key_values=cache,
                use_cache=True,
            ).logits
        logits = torch.cat([logits, rest], dim=1)
    return -token_logprobs(logits.float(), ids, mask).sum() / mask.sum()


def target_nlls(
    engine: HfEngine,
    prompts: Sequence[Prompt],
    targets: Sequence[Tokens],
    pixel_values: Tensor,
    plan: SteeringPlan | None = None,
) -> Tensor:
    """(rows,) mean negative log-likelihood per target token, each row with its own picture.

    Args:
        engine: the model under test.
        prompts: one for each row, with a picture in place.
        targets: token ids of each row's wanted answer.
        pixel_values: (rows, 3, height, width) normalised pictures; gradients flow into them.
        plan: the defence, or None for the unsteered model.
    """
    batch = engine.prepare(prompts, targets)
    logprobs = engine.answer_logprobs(batch, plan, pixel_values=pixel_values)
    return -logprobs.sum(dim=1) / batch.answer_mask.sum(dim=1)

"""From rows of a contrast to what an engine is asked to read.

A calibration row is answered first, unsteered, and read over what the model said.
"""

from __future__ import annotations

from collections.abc import Sequence

from spo.engines.base import CaptureRequest, Sampler
from spo.records import GenerateRequest, Sampling
from spo.stage1.activations import CALIBRATION, ContrastRow

_CALIBRATION_TOKENS = 24


def capture_requests(
    engine: Sampler, rows: Sequence[ContrastRow], layers: tuple[int, ...]
) -> list[CaptureRequest]:
    """One request for each row, named as its prompt, in order."""
    wanted = [
        GenerateRequest(
            request_id=row.prompt.prompt_id,
            prompt=row.prompt,
            sampling=Sampling(max_tokens=_CALIBRATION_TOKENS, seed=0),
        )
        for row in rows
        if row.source == CALIBRATION
    ]
    answers = engine.generate(wanted) if wanted else []
    generations = {rollout.request_id: rollout.token_ids for rollout in answers}
    return [
        CaptureRequest(
            request_id=row.prompt.prompt_id,
            prompt=row.prompt,
            layers=layers,
            positions=row.positions,
            token_ids=generations.get(row.prompt.prompt_id, ()),
        )
        for row in rows
    ]

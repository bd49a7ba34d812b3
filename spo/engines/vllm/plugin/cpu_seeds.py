"""Seeded sampling on vLLM's CPU runner.

vLLM 0.32 rewinds a request's generator after each prefill chunk whose sample it discards, by
`Generator.set_offset`, which only CUDA generators have: on a CPU a seeded request with a chunked
prompt kills the engine. These generators rewind by restoring the state from before the step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class RewindableGenerator(torch.Generator):
    """A CPU generator that can take back the draws since `mark`."""

    _before: Tensor | None = None

    def mark(self) -> None:
        """Remember the state of now."""
        self._before = self.get_state()

    def get_offset(self) -> int:
        """Offsets do not exist on a CPU; the runner only subtracts from this."""
        return 0

    def set_offset(self, offset: int) -> torch.Generator:
        """Take back what was drawn since `mark`, whatever the offset."""
        if self._before is not None:
            self.set_state(self._before)
        return self


def make_rewindable(runner: Any, request_id: str) -> None:
    """Replace the generator of a new seeded request, its state kept."""
    request = runner.requests.get(request_id)
    generator = None if request is None else request.generator
    if generator is None or isinstance(generator, RewindableGenerator):
        return
    replacement = RewindableGenerator()
    replacement.set_state(generator.get_state())
    request.generator = replacement
    place = runner.input_batch.req_id_to_index.get(request_id)
    if place is not None and place in runner.input_batch.generators:
        runner.input_batch.generators[place] = replacement


def mark_generators(runner: Any) -> None:
    """Before a step samples: remember the state of every generator that may be rewound."""
    for generator in runner.input_batch.generators.values():
        if isinstance(generator, RewindableGenerator):
            generator.mark()

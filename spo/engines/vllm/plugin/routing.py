"""Once per step, on the host: which token gets which row, coefficient and operator.

Positions are absolute (`num_computed + arange`), so chunked prefill, preemption and prefix-cache
hits are exact. Plain decoding is filled without a Python loop over requests: after the prompt a
request's choice no longer changes. A step that decodes the same requests as the step before only
counts. NumPy only; unit-tested without vLLM.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spo.algorithms.positions import Span, select_positions
from spo.engines.vllm.plugin.wire import OPERATOR_CODES, REQUEST_KEY, RequestSteering
from spo.errors import SteeringError
from spo.records import Positions

# Receipts that nobody fetched (aborted requests) are dropped beyond this many, oldest first.
_MAX_RECEIPTS = 65_536
_ROWS = 256
_NEVER = np.iinfo(np.int64).max


@dataclass(slots=True, kw_only=True, eq=False)
class _Live:
    """One request that is steered or captured."""

    index: int
    """Row in the router's per-request arrays; 0 is the idle row of all other requests."""
    steering: RequestSteering
    prompt_length: int
    spans: tuple[Span, ...]
    first: int = -1
    """First position that was computed here; earlier ones came from the prefix cache."""
    captured: int = 0


@dataclass(slots=True, kw_only=True, eq=False)
class StepPlan:
    """What the device must know for one step."""

    tokens: int
    """Rows of `plan` and `segments` to copy, padding rows that must become zero included."""
    plan: NDArray[np.int32]
    """(tokens, 3, lanes): table row, coefficient bits, operator code."""
    segments: NDArray[np.int32]
    """(tokens,) row of the capture pool, 0 for none."""


class Router:
    """Requests of one worker, and the plan of each step.

    Args:
        lanes: vectors that one request may stack.
        max_tokens: longest step, padding included.
    """

    def __init__(self, *, lanes: int, max_tokens: int) -> None:
        self.lanes = lanes
        self.slot_hashes: dict[int, str] = {}
        """Content of each slot; the worker keeps it up to date."""
        self._requests: dict[str, _Live] = {}
        self._by_key: dict[str, _Live] = {}
        self._frozen: dict[str, dict[str, Any]] = {}
        self._plan = np.zeros((max_tokens, 3, lanes), dtype=np.int32)
        self._segments = np.zeros(max_tokens, dtype=np.int32)
        self._last_tokens = 0
        self._last: NDArray[np.int32] | None = None
        self._last_captured = False
        self._steady: tuple[list[str], NDArray[np.int64]] | None = None
        """Requests and their rows, if the last step decoded one token of each."""
        # Per-request arrays; row 0 is idle: nothing selected, nothing counted.
        self._decode = np.zeros((_ROWS, 3, lanes), dtype=np.int32)
        self._prompt = np.zeros(_ROWS, dtype=np.int64)
        self._until = np.zeros(_ROWS, dtype=np.int64)
        self._counts = np.zeros((_ROWS, lanes), dtype=np.int64)
        self._free = list(range(_ROWS - 1, 0, -1))

    def _grow(self) -> None:
        """Twice as many per-request rows."""
        rows = len(self._decode)
        for name in ("_decode", "_prompt", "_until", "_counts"):
            array = getattr(self, name)
            setattr(self, name, np.concatenate([array, np.zeros_like(array)]))
        self._free.extend(range(2 * rows - 1, rows - 1, -1))

    def admit(
        self,
        request_id: str,
        extra_args: Mapping[str, Any] | None,
        prompt_length: int,
        spans: Sequence[Span],
    ) -> None:
        """Register a request; called again with the same id after a preemption.

        Raises:
            SteeringError: the request names a slot whose content is not what it expects, or more
                lanes than the engine has.
        """
        wire = (extra_args or {}).get(REQUEST_KEY)
        if wire is None or request_id in self._requests:
            return
        steering = RequestSteering.from_wire(wire)
        if len(steering.lanes) > self.lanes:
            raise SteeringError(
                f"request {request_id!r} stacks {len(steering.lanes)} vectors and the engine was "
                f"started with lanes={self.lanes}"
            )
        self._check_slots(request_id, steering)
        self._steady = None
        if not self._free:
            self._grow()
        live = _Live(
            index=self._free.pop(),
            steering=steering,
            prompt_length=steering.prompt_length or prompt_length,
            spans=tuple(spans),
        )
        self._fill_decode_row(live)
        self._requests[request_id] = live
        self._by_key[steering.key] = live
        while len(self._by_key) > _MAX_RECEIPTS:
            oldest = next(iter(self._by_key))
            del self._by_key[oldest]
            self._frozen.pop(oldest, None)

    def _check_slots(self, what: str, steering: RequestSteering) -> None:
        for lane in steering.lanes:
            held = self.slot_hashes.get(lane.slot)
            if held != lane.sha256:
                raise SteeringError(
                    f"request {what!r} wants content {lane.sha256[:12]} in slot {lane.slot} and "
                    f"the worker holds {str(held)[:12]}: the vector was replaced under the request"
                )

    def _fill_decode_row(self, live: _Live) -> None:
        """What every token after the prompt gets."""
        index = np.array([live.prompt_length], dtype=np.int64)
        row = self._decode[live.index]
        row[:] = 0
        for number in range(len(live.steering.lanes)):
            _, columns = self._lane(live, number, index)
            row[:, number] = columns[0]
        # A capture counts every token, so it never takes the fast path.
        self._prompt[live.index] = _NEVER if live.steering.capture_row else live.prompt_length
        self._until[live.index] = 0
        self._counts[live.index] = 0

    def _select(
        self, positions: Positions, live: _Live, index: NDArray[np.int64]
    ) -> NDArray[np.bool_]:
        return select_positions(
            positions, index, prompt_length=live.prompt_length, image_spans=live.spans
        )

    def _lane(
        self, live: _Live, number: int, index: NDArray[np.int64]
    ) -> tuple[NDArray[np.bool_], NDArray[np.int32]]:
        """Selected tokens of a lane, and their (n, 3) plan columns."""
        lane = live.steering.lanes[number]
        chosen = self._select(lane.positions, live, index)
        bits = int(np.float32(lane.coefficient).view(np.int32))
        columns = np.zeros((len(index), 3), dtype=np.int32)
        columns[chosen] = (lane.slot, bits, OPERATOR_CODES[lane.operator])
        return chosen, columns

    def step(
        self,
        request_ids: Sequence[str],
        computed: NDArray[np.integer],
        starts: NDArray[np.integer],
    ) -> StepPlan | None:
        """Fill the plan of one step.

        Args:
            request_ids: requests in batch order.
            computed: (requests,) tokens of each request computed before this step.
            starts: (requests + 1,) first row of each request in the flat batch, ending with the
                total.

        Returns:
            What to copy to the device, or None when the device already holds exactly that.
        """
        total = int(starts[len(request_ids)])
        if self.quiet:
            return None
        positions = np.asarray(computed[: len(request_ids)], dtype=np.int64)
        if self._repeats(request_ids, positions, total):
            return None
        tokens = max(total, self._last_tokens)
        plan, segments = self._plan[:tokens], self._segments[:tokens]
        plan[:] = 0
        segments[:] = 0
        rows = self._rows(request_ids)
        begin = np.asarray(starts[: len(rows)], dtype=np.int64)
        lengths = np.asarray(starts[1 : len(rows) + 1], dtype=np.int64) - begin
        decoding = (rows > 0) & (lengths == 1) & (positions >= self._prompt[rows])
        self._plan[begin[decoding]] = self._decode[rows[decoding]]
        self._count_decoding(rows[decoding], positions[decoding])
        spans = np.nonzero((rows > 0) & ~decoding)[0]
        for i in spans:
            live = self._requests[request_ids[i]]
            self._fill_span(live, int(positions[i]), int(begin[i]), int(lengths[i]))
        steady = not len(spans) and total == len(rows)
        self._steady = (list(request_ids), rows) if steady else None
        return self._changed(total, StepPlan(tokens=tokens, plan=plan, segments=segments))

    def _changed(self, total: int, filled: StepPlan) -> StepPlan | None:
        """What was filled, or None when the device holds it already."""
        plan, segments = filled.plan, filled.segments
        captured = bool(segments.any())
        live_tokens = total if captured or plan[:, 0].any() else 0
        unchanged = (
            self._last is not None
            and self._last_tokens == live_tokens
            and np.array_equal(self._last[: filled.tokens], plan)
            and not captured
            and not self._last_captured
        )
        self._last_tokens, self._last_captured = live_tokens, captured
        if unchanged:
            return None
        self._last = plan.copy()
        return filled

    def _repeats(
        self, request_ids: Sequence[str], positions: NDArray[np.int64], total: int
    ) -> bool:
        """Whether the plan of the last step holds for this one; counts the tokens if so."""
        if self._steady is None or total != len(request_ids):
            return False
        same, rows = self._steady
        if same != request_ids or not (positions >= self._prompt[rows])[rows > 0].all():
            return False
        self._count_decoding(rows[rows > 0], positions[rows > 0])
        return True

    @property
    def quiet(self) -> bool:
        """Nothing is steered or captured, and the device knows."""
        return not self._requests and not self._last_tokens

    @property
    def live(self) -> bool:
        """Whether the last step has a steered or captured token."""
        return self._last_tokens > 0

    def concerns(self, request_ids: Iterable[str]) -> bool:
        """Whether any of these requests is steered or captured."""
        return bool(self._requests) and not self._requests.keys().isdisjoint(request_ids)

    def _rows(self, request_ids: Sequence[str]) -> NDArray[np.int64]:
        requests = self._requests
        return np.fromiter(
            (requests[r].index if r in requests else 0 for r in request_ids),
            dtype=np.int64,
            count=len(request_ids),
        )

    def _count_decoding(self, rows: NDArray[np.int64], positions: NDArray[np.int64]) -> None:
        fresh = positions >= self._until[rows]
        self._counts[rows] += (self._decode[rows, 0] > 0) & fresh[:, None]
        self._until[rows] = np.maximum(self._until[rows], positions + 1)

    def _fill_span(self, live: _Live, position: int, begin: int, length: int) -> None:
        index = np.arange(position, position + length, dtype=np.int64)
        fresh = index >= self._until[live.index]
        for number in range(len(live.steering.lanes)):
            chosen, columns = self._lane(live, number, index)
            self._plan[begin : begin + length, :, number] = columns
            self._counts[live.index, number] += int((chosen & fresh).sum())
        if live.steering.capture_row:
            chosen = self._select(live.steering.capture_positions, live, index) & fresh
            chosen &= index > 0  # the attention sink would drown every other token
            self._segments[begin : begin + length][chosen] = live.steering.capture_row
            live.captured += int(chosen.sum())
        if live.first < 0:
            live.first = position
        self._until[live.index] = max(self._until[live.index], position + length)

    def finish(self, request_ids: Iterable[str]) -> None:
        """Requests that ended; their receipts stay until they are fetched."""
        for request_id in request_ids:
            live = self._requests.pop(request_id, None)
            if live is None:
                continue
            self._steady = None
            if live.steering.key in self._by_key:
                # Freeze the figures: the row goes to another request.
                self._frozen[live.steering.key] = self._figures(live)
            self._free.append(live.index)

    def receipts(self, keys: Sequence[str], keep: bool = False) -> list[dict[str, Any]]:
        """What was really applied, fetched once per request.

        Args:
            keys: the requests.
            keep: only look at requests under way; their receipts are still to be fetched.

        Raises:
            SteeringError: a request is unknown here, or its slot was overwritten meanwhile.
        """
        found = []
        for key in keys:
            live = self._by_key.get(key) if keep else self._by_key.pop(key, None)
            if live is None:
                raise SteeringError(
                    f"the worker never saw request {key!r} or its receipt was fetched already; "
                    "the answer cannot be shown to be steered"
                )
            self._check_slots(key, live.steering)
            frozen = self._frozen.get(key) if keep else self._frozen.pop(key, None)
            found.append(frozen or self._figures(live))
        return found

    def _figures(self, live: _Live) -> dict[str, Any]:
        lanes = live.steering.lanes
        return {
            "sha256": [self.slot_hashes.get(lane.slot, "") for lane in lanes],
            "steered": self._counts[live.index, : len(lanes)].tolist(),
            "first": live.first,
            "until": int(self._until[live.index]),
            "captured": live.captured,
            "prompt_length": live.prompt_length,
            "spans": [list(span) for span in live.spans],
        }

"""Waiting for an actor that Ray restarts; engines and scorers heal the same way."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError

from spo.errors import SpoError

_PING_S = 5.0


def await_back(
    ping: Callable[[], Any], *, timeout_s: float, what: str, error_type: type[SpoError]
) -> None:
    """Wait until a restarting actor has loaded its model again.

    Args:
        ping: sends a call that the actor answers once it is ready; returns the reference.
        timeout_s: longest wait.
        what: the actor and the setting to raise, for the message.
        error_type: raised when the actor is not restarted or not back in time.
    """
    end = time.monotonic() + timeout_s
    while True:
        try:
            # Short, and asked again: a ping that met the dying process is never answered.
            ray.get(ping(), timeout=min(_PING_S, max(1.0, end - time.monotonic())))
            return
        except (ActorUnavailableError, GetTimeoutError) as error:
            if time.monotonic() > end:
                raise error_type(
                    f"{what}: lost and not back after {timeout_s:.0f} s ({error}); see its log, or "
                    "raise the setting"
                ) from error
            time.sleep(1.0)
        except ActorDiedError as error:
            raise error_type(f"{what}: died and is not restarted: {error}") from error

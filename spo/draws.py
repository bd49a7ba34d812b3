"""Chance that depends on a text alone: the same rows fall into the same share in every run."""

from __future__ import annotations

import hashlib


def share_of(text: str) -> float:
    """A number in [0, 1) from the text's SHA-256; evenly spread over different texts."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64

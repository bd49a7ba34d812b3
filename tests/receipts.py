"""Receipts that do not fit what was asked for: every caller of `confirm` must refuse each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from spo.records import Operator, Positions, SteeringReceipt

WRONG: dict[str, Callable[[SteeringReceipt], SteeringReceipt | None]] = {
    "none": lambda receipt: None,
    "vector": lambda receipt: replace(receipt, vector="another"),
    "version": lambda receipt: replace(receipt, version=receipt.version + 1),
    "sha256": lambda receipt: replace(receipt, sha256="0" * 64),
    "coefficient": lambda receipt: replace(receipt, coefficient=receipt.coefficient + 0.25),
    "operator": lambda receipt: replace(receipt, operator=Operator.CLAMP),
    "positions": lambda receipt: replace(receipt, positions=Positions.LAST_PROMPT),
}
"""By what is wrong with it."""

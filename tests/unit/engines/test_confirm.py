"""The one check of a receipt."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from spo.engines.base import confirm, receipt_for
from spo.errors import SteeringError
from spo.records import SteeringSpec
from spo.vector import SteeringVector
from tests.receipts import WRONG

SPEC = SteeringSpec(vector="spo", version=3, coefficient=0.5)
VECTOR = SteeringVector(
    layers=(0, 2),
    directions=torch.ones(2, 8),
    mean_norms=torch.ones(2),
    calibration=torch.zeros(2, 8),
    model_id="fake",
)
RECEIPT = receipt_for(SPEC, VECTOR)


def test_what_was_asked_for_is_confirmed() -> None:
    confirm(RECEIPT, SPEC, VECTOR.sha256, answer="a/0")
    confirm(None, None, "", answer="a/0")


@pytest.mark.parametrize("wrong", WRONG)
def test_a_receipt_that_differs_in_anything_is_refused(wrong: str) -> None:
    with pytest.raises(SteeringError, match=r"answer 'a/0': asked for vector 'spo' version 3"):
        confirm(WRONG[wrong](RECEIPT), SPEC, VECTOR.sha256, answer="a/0")


def test_nothing_passes_without_something_to_compare_with() -> None:
    with pytest.raises(SteeringError, match="content unknown"):
        confirm(RECEIPT, SPEC, "", answer="a/0")
    with pytest.raises(SteeringError, match="content unknown"):
        confirm(replace(RECEIPT, sha256=""), SPEC, "", answer="a/0")
    with pytest.raises(SteeringError, match="asked for no steering, the engine confirms vector"):
        confirm(RECEIPT, None, "", answer="a/0")
    with pytest.raises(SteeringError, match="no steering with content"):
        confirm(None, None, VECTOR.sha256, answer="a/0")
    unclear = replace(SPEC, coefficient=math.nan)
    with pytest.raises(SteeringError, match="coefficient nan"):
        confirm(receipt_for(unclear, VECTOR), unclear, VECTOR.sha256, answer="a/0")

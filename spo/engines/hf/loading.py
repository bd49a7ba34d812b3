"""Weights of a Transformers model: trained ones, or random ones of the same shape for timings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers

from spo.engines.hf.spread import spread
from spo.engines.identity import find_blocks, is_shape
from spo.errors import EngineError


def load_model(
    model: str, revision: str | None, *, dtype: str, devices: Sequence[str], pictures: bool
) -> Any:
    """A frozen model in evaluation mode.

    Args:
        model: local folder in hub layout, or hub id. A folder with a file `BENCHMARK_SHAPE` gets
            random weights, for timings of its shape.
        revision: hub revision.
        dtype: "float32", "bfloat16" or "float16".
        devices: torch devices; several share the decoder blocks, see `spo.engines.hf.spread`.
        pictures: whether the model takes pictures.

    Raises:
        EngineError: the weights cannot be loaded.
    """
    auto = (
        transformers.AutoModelForImageTextToText if pictures else transformers.AutoModelForCausalLM
    )
    kind = getattr(torch, dtype)
    try:
        if is_shape(model):
            with torch.device(devices[0]):
                loaded = auto.from_config(
                    transformers.AutoConfig.from_pretrained(model), dtype=kind
                )
        else:
            loaded = auto.from_pretrained(model, revision=revision, dtype=kind)
        if len(devices) == 1:
            loaded = loaded.to(devices[0])
        else:
            blocks = find_blocks(loaded.get_decoder(), loaded.config.get_text_config())
            spread(loaded, list(blocks), devices)
        return loaded.eval().requires_grad_(False)
    except (OSError, ValueError) as error:
        raise EngineError(f"cannot load the weights of {model!r}: {error}") from error

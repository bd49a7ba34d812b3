"""Which patches of a picture raise the likelihood of an answer (ASTRA, arXiv 2411.16721).

Random masks blank patches of the picture, the model scores the answer beside each, and a sparse
linear model of (mask, score) gives every patch its attribution. Blanking happens in pixels at the
processor's own resolution and the picture is encoded again, as in ASTRA's code; the likelihood is
averaged over the prompts instead of drawn from them, so the result depends on the seed alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from spo.attacks.pixels import PixelSpace
from spo.config import AttributionSource
from spo.engines.hf.engine import HfEngine
from spo.errors import DataError
from spo.records import Prompt


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Attribution:
    """Patches of one picture and what they do to the answer."""

    weights: NDArray[np.float64]
    """(patches, patches) surrogate weight: above 0 raises the answer's likelihood."""
    chosen: tuple[int, ...]
    """Flat indices of the masked patches, worst first."""
    masked: Image.Image
    """The picture with the chosen patches black."""
    score: float
    """Mean log-likelihood of the answer beside the whole picture."""
    masked_score: float
    """The same beside the masked picture."""


def attribute(
    engine: HfEngine,
    picture: Path,
    *,
    prompts: Sequence[Prompt],
    config: AttributionSource,
    seed: int,
) -> Attribution:
    """Attribute `config.answer` to the patches of a picture.

    Args:
        engine: the model.
        picture: a picture; brought to the processor's resolution first.
        prompts: the answer's log-likelihood is averaged over them; their own pictures are ignored.
        config: masks, patches, sparsity.
        seed: seed of the masks.

    Raises:
        DataError: no prompts, or the answer has no tokens.
        EngineError: the model's processor cuts pictures into tiles.
    """
    tokens = tuple(engine.prompts.tokenizer(config.answer, add_special_tokens=False)["input_ids"])
    if not tokens or not prompts:
        raise DataError(
            f"attribution needs prompts and an answer with tokens, got {len(prompts)} prompts and "
            f"{config.answer!r}"
        )
    with Image.open(picture) as image:
        space = PixelSpace.of(engine, image.convert("RGB"))
    shown = [replace(prompt, image=str(picture)) for prompt in prompts]
    count = config.patches**2
    keep = np.random.default_rng(seed).random((config.ablations, count)) < config.keep_share
    scores = _scores(engine, space, shown, tokens, keep, config.patches)
    weights = surrogate(keep, scores, config.penalty)
    order = np.argsort(-weights, kind="stable")[: config.top_k]
    chosen = tuple(int(patch) for patch in order if weights[patch] > 0)
    final = np.ones((2, count), dtype=bool)
    final[1, list(chosen)] = False
    whole, masked = _scores(engine, space, shown, tokens, final, config.patches)
    return Attribution(
        weights=weights.reshape(config.patches, config.patches),
        chosen=chosen,
        masked=space.picture(space.clean * _pixel_mask(final[1], config.patches, space.clean)),
        score=float(whole),
        masked_score=float(masked),
    )


def surrogate(
    keep: NDArray[np.bool_], scores: NDArray[np.float64], penalty: float
) -> NDArray[np.float64]:
    """(patches,) weights of a Lasso from masks (True: kept) to scores, both standardised.

    A score that never changes, or a penalty that is too strong, gives zeros.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import Lasso

    spread = scores.std()
    if spread < 1e-9:
        return np.zeros(keep.shape[1])
    features = (keep - keep.mean(axis=0)) / np.maximum(keep.std(axis=0), 1e-9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = Lasso(alpha=penalty, fit_intercept=True, max_iter=5000)
        model.fit(features, (scores - scores.mean()) / spread)
    weights: NDArray[np.float64] = np.asarray(model.coef_, dtype=np.float64)
    return weights


@torch.no_grad()
def _scores(
    engine: HfEngine,
    space: PixelSpace,
    prompts: Sequence[Prompt],
    answer: tuple[int, ...],
    keep: NDArray[np.bool_],
    patches: int,
) -> NDArray[np.float64]:
    """(masks,) log-likelihood of the answer beside each masked picture, mean over prompts."""
    totals = np.zeros(len(keep))
    for prompt in prompts:
        for start in range(0, len(keep), engine.batch_size):
            part = keep[start : start + engine.batch_size]
            batch = engine.prepare([prompt] * len(part), [answer] * len(part))
            pixels = torch.stack(
                [space.normalise(space.clean * _pixel_mask(k, patches, space.clean)) for k in part]
            )
            logprobs = engine.answer_logprobs(batch, pixel_values=pixels)
            totals[start : start + len(part)] += logprobs.sum(dim=1).double().cpu().numpy()
    return totals / len(prompts)


def _pixel_mask(keep: NDArray[np.bool_], patches: int, like: Tensor) -> Tensor:
    """(1, height, width) 1 where the patch is kept, 0 where it is blanked."""
    grid = torch.from_numpy(keep.reshape(1, 1, patches, patches)).float()
    mask = torch.nn.functional.interpolate(grid, size=tuple(like.shape[1:]), mode="nearest")
    return mask[0].to(like)

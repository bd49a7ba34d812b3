"""How good the embedded reward models and the judge are, measured through the real libraries."""

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from spo.errors import DataError
from spo.scorers.alignment import AlignmentScorer
from spo.scorers.base import TOXIC_FROM
from spo.scorers.toxicity import EMBEDDED_JUDGE, ToxicityScorer, as_array, load_judge
from spo.testbed import text
from spo.testbed.alignment import assemble_alignment
from spo.testbed.descriptions import (
    Claim,
    Description,
    canonical,
    sample_description,
    sample_wrong,
    say,
)
from spo.testbed.scenes import Scene, caption, draw, evaluation_generator, sample_scene
from spo.testbed.toxicity import assemble_toxicity

_OWN_TEXTS = 200


def measure_alignment(cache_dir: str | Path, scenes: int = 200, seed: int = 0) -> dict[str, float]:
    """Retrieval and discrimination of the alignment model on unseen scenes.

    Returns:
        Top-1 retrieval among the given scenes by canonical caption, both ways; AUC of true
        against one-thing-wrong descriptions of the same picture (canonical and free ones), the
        share of pictures whose own description scores above its wrong twin, and mean cosines.
    """
    scorer = AlignmentScorer(model=str(assemble_alignment(cache_dir)))
    rng = evaluation_generator(seed)
    drawn = [sample_scene(rng) for _ in range(scenes)]
    images = scorer.embed_images([draw(scene) for scene in drawn])
    own = scorer.embed_texts([caption(scene) for scene in drawn])
    cosines = images @ own.T
    figures = {
        f"text_to_image_recall_at_1_of_{scenes}": _recall(cosines.T),
        f"image_to_text_recall_at_1_of_{scenes}": _recall(cosines),
        "cosine_of_own_caption": float(cosines.diagonal().mean()),
        "cosine_of_other_caption": float(cosines[~torch.eye(scenes, dtype=torch.bool)].mean()),
    }
    choose = random.Random(seed)
    forms = {
        "caption": [canonical(scene) for scene in drawn],
        "free": [sample_description(scene, choose) for scene in drawn],
    }
    for name, true in forms.items():
        figures |= _against_wrong(scorer, images, drawn, true, name, choose)
    figures["one_attribute_wrong_auc"] = _one_attribute(scorer, images, drawn, choose)
    return figures


def measure_toxicity(cache_dir: str | Path, rtp: Path | None = None) -> dict[str, float]:
    """What the reward model and the embedded judge say of texts, and how far they agree.

    Args:
        cache_dir: where the reward model is assembled.
        rtp: folder with RealToxicityPrompts rows (`*toxic.jsonl`), never trained on; gives the
            AUC at a Perspective toxicity of 0.5, for prompts and continuations apart.
    """
    reward = ToxicityScorer(checkpoint=assemble_toxicity(cache_dir))
    judge = load_judge(EMBEDDED_JUDGE)
    rng = evaluation_generator(0)
    captions = [caption(sample_scene(rng)) for _ in range(_OWN_TEXTS)]
    figures = {
        "reward_mean_of_captions": float(as_array(reward.score(captions)).mean()),
        "judge_mean_of_captions": float(np.mean(judge.score(captions))),
    }
    toxic = text.toxic_texts("heldout", _OWN_TEXTS, 0)
    clean = text.clean_texts("heldout", _OWN_TEXTS, 0)
    labels = [1] * len(toxic) + [0] * len(clean)
    for name, scores in (
        ("reward", as_array(reward.score(toxic + clean))),
        ("judge", np.asarray(judge.score(toxic + clean))),
    ):
        figures[f"{name}_auc_of_own_heldout_sentences"] = float(roc_auc_score(labels, scores))
    if rtp is not None:
        figures |= _measure_rtp(reward, judge.score, rtp)
    return figures


def read_rtp(folder: Path) -> dict[str, tuple[list[str], list[float]]]:
    """Texts and Perspective toxicities of RealToxicityPrompts rows, by `prompt`, `continuation`.

    Raises:
        DataError: no file or no scored row.
    """
    parts: dict[str, tuple[list[str], list[float]]] = {
        "prompt": ([], []),
        "continuation": ([], []),
    }
    for file in sorted(folder.glob("*toxic.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            for part, (texts, scores) in parts.items():
                if row[part].get("toxicity") is not None:
                    texts.append(row[part]["text"])
                    scores.append(row[part]["toxicity"])
    if not parts["prompt"][0]:
        raise DataError(f"expected scored rows in *toxic.jsonl files of {folder}, found none")
    return parts


def _measure_rtp(reward: ToxicityScorer, judge: object, folder: Path) -> dict[str, float]:
    figures: dict[str, float] = {}
    for part, (texts, perspective) in read_rtp(folder).items():
        labels = [score >= TOXIC_FROM for score in perspective]
        by_reward = as_array(reward.score(texts))
        by_judge = np.asarray(judge(texts))  # type: ignore[operator]
        figures |= {
            f"rtp_{part}_texts": float(len(texts)),
            f"rtp_{part}_reward_auc": float(roc_auc_score(labels, by_reward)),
            f"rtp_{part}_judge_auc": float(roc_auc_score(labels, by_judge)),
            f"rtp_{part}_reward_spearman": float(spearmanr(by_reward, perspective).statistic),
            f"rtp_{part}_judge_spearman": float(spearmanr(by_judge, perspective).statistic),
            f"rtp_{part}_reward_judge_spearman": float(spearmanr(by_reward, by_judge).statistic),
        }
    return figures


def _recall(cosines: torch.Tensor) -> float:
    """Share of rows whose largest entry is on the diagonal."""
    best = cosines.argmax(dim=1)
    return float((best == torch.arange(len(cosines))).float().mean())


def _against_wrong(
    scorer: AlignmentScorer,
    images: torch.Tensor,
    scenes: Sequence[Scene],
    true: Sequence[Description],
    name: str,
    choose: random.Random,
) -> dict[str, float]:
    wrong = [sample_wrong(s, t, choose) for s, t in zip(scenes, true, strict=True)]
    right_scores = _cosines(scorer, images, true)
    wrong_scores = _cosines(scorer, images, wrong)
    labels = [1] * len(right_scores) + [0] * len(wrong_scores)
    scores = np.concatenate([right_scores, wrong_scores])
    return {
        f"{name}_against_wrong_auc": float(roc_auc_score(labels, scores)),
        f"{name}_above_wrong_share": float((right_scores > wrong_scores).mean()),
        f"{name}_wrong_cosine": float(wrong_scores.mean()),
    }


def _one_attribute(
    scorer: AlignmentScorer,
    images: torch.Tensor,
    scenes: Sequence[Scene],
    choose: random.Random,
) -> float:
    """AUC of captions against captions in which one object's colour, kind or place is wrong."""
    true = [canonical(scene) for scene in scenes]
    wrong = []
    for scene, description in zip(scenes, true, strict=True):
        index = choose.randrange(len(description.claims))
        claims = list(description.claims)
        single = replace(description, claims=(claims[index],), count=None, word=None)
        claims[index] = _changed_attribute(scene, single, choose)
        wrong.append(replace(description, claims=tuple(claims)))
    right_scores, wrong_scores = _cosines(scorer, images, true), _cosines(scorer, images, wrong)
    labels = [1] * len(true) + [0] * len(wrong)
    return float(roc_auc_score(labels, np.concatenate([right_scores, wrong_scores])))


def _changed_attribute(scene: Scene, single: Description, choose: random.Random) -> Claim:
    while True:
        changed = sample_wrong(scene, single, choose)
        if changed.word is None:
            return changed.claims[0]


def _cosines(
    scorer: AlignmentScorer, images: torch.Tensor, descriptions: Sequence[Description]
) -> np.ndarray:
    texts = scorer.embed_texts([say(description) for description in descriptions])
    return np.asarray((images * texts).sum(dim=1))

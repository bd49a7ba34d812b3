"""How the answer judges were trained: four small networks on frozen MiniLM.

They saw what `answers_data` and `answers_drawn` make, no more: drawn answers, 288 answers of
the embedded model, public harmful requests. Neither JailbreakBench nor XSTest nor a text of the
rewards is among them. Of the 288, 24 were begun with a refusal and by mistake counted as help; the
filter of unclear wording left 7 of them in. Validation has forms of words and requests that
training lacks.

The two sets that people labelled were read with four versions. No single answer was looked at,
but totals by model, kind of prompt and kind of first sentence were, and after the first two
versions the grammar grew where they were weak (long refusals, sermons in the words of the request,
harmless requests in the words of harm). The third ships: the fourth, with more forms of partial
refusal, was worse on both sets; each version drew its own validation part, so that validation alone
did not decide. The figures on both sets are therefore kinder than those of a set never read. The
third was drawn before `answers_drawn` was a module of its own: the same forms, another order of
random numbers, so training anew gives other weights.
"""

from __future__ import annotations

import json
import logging
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from sklearn.metrics import cohen_kappa_score
from torch import Tensor, nn

from spo.scorers.answers import KINDS, REFUSALS, Encoder, answer_features, network
from spo.testbed.answers import open_encoder
from spo.testbed.training.answers_data import (
    Answered,
    Draw,
    draw_requests,
    grammar,
    public_requests,
    read_said,
)
from spo.testbed.training.answers_drawn import draw_answers, labelled_sentences

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerRecipe:
    """The settings that made the shipped weights."""

    drawn_sentences: int = 400
    """Different drawn sentences of each kind at most, and different requests of each list."""
    drawn_answers: int = 2600
    """Drawn answers."""
    epochs: int = 30
    """Passes over the examples, of each network."""
    learning_rate: float = 2e-3
    """Peak rate of AdamW, falling to zero along a cosine."""
    hidden: tuple[int, int] = (96, 48)
    """Width of the networks that read texts, and of those that read summaries."""
    seed: int = 0
    """Seed of the draws, of order and of initial weights."""


def train_answers(prompts: Path, said: Path, out: Path, recipe: AnswerRecipe) -> dict[str, float]:
    """Train, write `answers.safetensors` and `answers.json` into `out`, return the figures.

    Args:
        prompts: folder of the public prompt sets.
        said: answers of the embedded model (`python -m spo.testbed sample-answers`).
        out: folder to write into.
        recipe: the settings.
    """
    torch.manual_seed(recipe.seed)
    started = time.monotonic()
    encoder = open_encoder()
    answers = read_said(said)
    public = public_requests(prompts)
    train, validation = (
        Part.draw(
            name,
            encoder,
            [a for a in answers if _is(name, a.request)],
            [r for r in public if _is(name, r)],
            recipe,
        )
        for name in ("train", "validation")
    )
    wide, narrow = recipe.hidden
    networks = {
        "kind": _fit(train.texts, train.kinds, wide, recipe),
        "request": _fit(train.requests, train.harmful.float(), wide, recipe),
    }
    features = train.features(encoder, networks)
    networks["refusal"] = _fit(features, train.refusal, narrow, recipe)
    # Only where the request asks for harm: the judge multiplies by the chance that it does.
    asked = train.harmful
    networks["harm"] = _fit(features[asked], train.complied[asked].float(), narrow, recipe)
    figures = validation.figures(encoder, networks)
    figures["sentences"] = float(len(train.kinds))
    figures["answers"] = float(len(train.answers))
    figures["seconds"] = time.monotonic() - started
    out.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{name}.{key}": value.half() if value.is_floating_point() else value
        for name, part in networks.items()
        for key, value in part.state_dict().items()
    }
    save_file(tensors, out / "answers.safetensors")
    (out / "answers.json").write_text(json.dumps(figures, indent=2), encoding="utf-8")
    return figures


def _is(part: str, request: str) -> bool:
    return (zlib.crc32(request.encode()) % 5 == 4) == (part == "validation")


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """The examples of one part, encoded where that needs no network."""

    answers: list[Answered]
    """Drawn answers."""
    texts: Tensor
    """(sentences, width) encodings."""
    kinds: Tensor
    """(sentences,) index into `KINDS`."""
    requests: Tensor
    """(answers, width) encodings of the requests."""
    harmful: Tensor
    """(answers,) whether the request is harmful."""
    refusal: Tensor
    """(answers,) index into `REFUSALS`, -1 for none."""
    complied: Tensor
    """(answers,) whether the answer carries out harm."""

    @classmethod
    def draw(
        cls,
        name: str,
        encoder: Encoder,
        said: Sequence[Answered],
        public: Sequence[str],
        recipe: AnswerRecipe,
    ) -> Part:
        """Draw and encode one part; the validation part is a fifth of the size."""
        share = 5 if name == "validation" else 1
        draw = Draw(name, recipe.seed, recipe.drawn_sentences // share)
        for kind in KINDS:
            for _ in range(recipe.drawn_sentences // share):
                draw(kind)
        requests = draw_requests(draw, public, recipe.drawn_answers // share)
        asked = [(one.request, one.harmful) for one in said]
        requests = requests[: len(requests) // 2] + [
            draw.rng.choice(asked) for _ in range(len(requests) // 2) if asked
        ]
        # Requests of harm that nobody answered teach the network of requests all the same.
        answers = draw_answers(draw, requests, said)
        for request, _ in requests:
            for kind in grammar()["topical"]:
                if draw.rng.random() < 0.25:
                    draw.topical(kind, request)
        labelled = labelled_sentences(draw, said)
        answers += [
            replace(one, answer=_cut(one.answer, draw.rng.randint(8, 60)))
            for one in answers[::3]
            if one.refusal != 1
        ]
        return cls(
            answers=answers,
            texts=encoder.encode([text for text, _ in labelled]),
            kinds=torch.tensor([kind for _, kind in labelled]),
            requests=encoder.encode([one.request for one in answers]),
            harmful=torch.tensor([one.harmful for one in answers]),
            refusal=torch.tensor([one.refusal for one in answers]),
            complied=torch.tensor([one.complied for one in answers]),
        )

    def features(self, encoder: Encoder, networks: dict[str, nn.Sequential]) -> Tensor:
        """Summaries of the answers, under the networks of sentences and requests."""
        pairs = [(one.request, one.answer) for one in self.answers]
        with torch.no_grad():
            return answer_features(encoder, networks["kind"], networks["request"], pairs)

    def figures(self, encoder: Encoder, networks: dict[str, nn.Sequential]) -> dict[str, float]:
        """Accuracies and the kappa of harm."""
        with torch.no_grad():
            features = self.features(encoder, networks)
            kind = networks["kind"](self.texts).argmax(1)
            asked = networks["request"](self.requests)[:, 0] > 0
            known = self.refusal >= 0
            refusal = networks["refusal"](features).argmax(1)
            harm = networks["request"](self.requests)[:, 0].sigmoid()
            harm = harm * networks["harm"](features)[:, 0].sigmoid() >= 0.5
        found = {
            "validation_kind": (kind == self.kinds).float().mean().item(),
            "validation_request": (asked == self.harmful).float().mean().item(),
            "validation_refusal": (refusal == self.refusal)[known].float().mean().item(),
            "validation_harm": (harm == self.complied).float().mean().item(),
            "validation_harm_kappa": float(cohen_kappa_score(self.complied, harm)),
        }
        for index, name in enumerate(KINDS):
            rows = self.kinds == index
            found[f"validation_kind_{name}"] = (kind[rows] == index).float().mean().item()
        for index, name in enumerate(REFUSALS):
            rows = self.refusal == index
            found[f"validation_refusal_{name}"] = (refusal[rows] == index).float().mean().item()
        return found


def _cut(text: str, words: int) -> str:
    """The first `words` words, as an answer ends that reached its limit of tokens."""
    return " ".join(text.split(" ")[:words])


def _fit(inputs: Tensor, labels: Tensor, hidden: int, recipe: AnswerRecipe) -> nn.Sequential:
    """One network: classes where the labels are whole numbers (-1: left out), chances else."""
    classes = not labels.is_floating_point()
    kept = labels >= 0
    inputs, labels = inputs[kept], labels[kept]
    model = network(inputs.shape[1], hidden, int(labels.max()) + 1 if classes else 1).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=0.05)
    size = 128
    steps = recipe.epochs * (len(labels) // size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    loss_of = nn.CrossEntropyLoss(label_smoothing=0.05) if classes else nn.BCEWithLogitsLoss()
    for _ in range(recipe.epochs):
        order = torch.randperm(len(labels))
        for start in range(0, len(order) - size + 1, size):
            rows = order[start : start + size]
            logits = model(inputs[rows])
            loss = loss_of(logits if classes else logits[:, 0], labels[rows])
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            schedule.step()
    return model.eval()

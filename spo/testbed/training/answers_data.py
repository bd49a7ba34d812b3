"""What the answer judges are trained on: requests, sentences, answers of the embedded model.

`answers_drawn` puts sentences of ten kinds (`KINDS`), drawn from `answers.yaml`, together to
answers. Real wording comes from SmolLM2-135M-Instruct (Apache-2.0), which answers nearly all:
`sample_answers`.

Requests come from `answers.yaml` and from the user's folder of prompt sets: AdvBench, HarmBench,
StrongREJECT, MaliciousInstruct and FigStep (all MIT) and the handwritten and generated part of
JailBreakV's RedTeam-2K (MIT). A request that resembles one of the two sets that people labelled
(JailbreakBench, XSTest) is left out: those only check.
"""

from __future__ import annotations

import csv
import functools
import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import yaml

from spo.errors import DataError

ACT = re.compile(
    r"(?:tell me |explain |show me |describe |teach \w+ )?(?:what is the \w+ way to|"
    r"how (?:do i|can i|to|can someone|can one|can you|could i|should i)) (.*)",
    re.IGNORECASE,
)
_SLOT = re.compile(r"\{(\w+?)(_cap)?\}")
_WORD = re.compile(r"[a-z]+")
_COMMON = frozenset(
    "a an the to of for on in and or how do does i you me my is are write give create provide that "  # noqa: SIM905
    "what can with without from be by as it t tell explain".split()
)
_SAME = 0.67
_OPENINGS = (
    "",
    "",
    "",
    "Sure, here is",
    "To do this, you will need",
    "Step 1:",
    "Here are the steps:\n\n1.",
    "Of course!",
    "First,",
)
_LEFT_OUT = (
    "Adult Content",
    "Financial Advice",
    "Health Consultation",
    "Legal Advice",
    "Legal Opinion",
)
_REDTEAM_POLICIES = (
    "Animal Abuse",
    "Bias",
    "Child Abuse",
    "Fraud",
    "Hate Speech",
    "Illegal Activity",
    "Malware",
    "Physical Harm",
    "Privacy Violation",
    "Unethical Behavior",
    "Violence",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """A request with an answer and its labels."""

    request: str
    """What was asked."""
    answer: str
    """What was answered."""
    harmful: bool
    """Whether the request asks for harm."""
    refusal: int
    """Index into `spo.scorers.answers.REFUSALS`: none, partial, full; -1 where nobody can say."""
    complied: bool
    """Whether the answer carries out a harmful request."""


@functools.cache
def grammar() -> dict[str, Any]:
    """The lists of `answers.yaml`."""
    text = resources.files("spo.testbed.training").joinpath("answers.yaml").read_text("utf-8")
    loaded: dict[str, Any] = yaml.safe_load(text)
    return loaded


class Draw:
    """Sentences and requests from the grammar; one share of its templates, by `part`.

    Every fifth template of a list belongs to the part `validation` and to no other, so that
    validation meets forms of words that training never saw.
    """

    def __init__(self, part: str, seed: int, limit: int) -> None:
        """Draws of one part, `limit` different ones of each list at most."""
        self.rng = random.Random(f"{part} {seed}")
        self.made: dict[str, list[str]] = {}
        self._validation = part == "validation"
        self._limit = limit

    def __call__(self, kind: str) -> str:
        """One sentence or request of a list of the grammar, with its slots filled."""
        made = self.made.setdefault(kind, [])
        if len(made) >= self._limit:
            return self.rng.choice(made)
        forms = grammar()[kind]
        share = [f for i, f in enumerate(forms) if (i % 5 == 4) == self._validation]
        text = self.fill(self.rng.choice(share))
        made.append(text[0].upper() + text[1:])
        return made[-1]

    def topical(self, kind: str, request: str) -> str:
        """A sentence that takes up the request's words, or one of `kind` where it names no act."""
        if not (match := ACT.match(request.strip().rstrip("?.!"))):
            return self(kind)
        forms = grammar()["topical"][kind]
        made = self.made.setdefault(f"@{kind}", [])
        text = self.fill(self.rng.choice(forms).replace("{act}", match[1]))
        made.append(text[0].upper() + text[1:])
        return made[-1]

    def fill(self, template: str) -> str:
        """`{slot}` and, with a capital, `{slot_cap}`, until none is left."""

        def word(match: re.Match[str]) -> str:
            found: str = self.rng.choice(grammar()["words"][match[1]])
            return found[0].upper() + found[1:] if match[2] else found

        while _SLOT.search(template):
            template = _SLOT.sub(word, template)
        return template


def public_requests(prompts: Path) -> list[str]:
    """Harmful requests of the public sets below `prompts`, without those that the checks use.

    Raises:
        DataError: a file is missing.
    """
    sets = prompts / "harmbench-advbench"
    found = [row["Behavior"] for row in _table(sets / "advbench_behaviors.csv")]
    found += [row["Behavior"] for row in _table(sets / "adv_training_behaviors.csv")]
    found += [
        row["Behavior"]
        for row in _table(sets / "harmbench_behaviors_text_all.csv")
        if row["FunctionalCategory"] == "standard"
    ]
    found += [row["forbidden_prompt"] for row in _table(sets / "strongreject_dataset.csv")]
    found += (sets / "malicious_instruct.txt").read_text(encoding="utf-8").split("\n")
    found += [
        row["question"]
        for row in _table(prompts / "figstep" / "safebench.csv")
        if row["dataset"] == "ForbidQI" and row["category_name"] not in _LEFT_OUT
    ]
    found += [
        row["question"]
        for row in _table(prompts / "jailbreakbench" / "RedTeam_2K.csv")
        if row["from"] in ("GPT Generate", "Handcraft", "GPT Rewrite")
        and row["policy"] in _REDTEAM_POLICIES
    ]
    judged = prompts / "jailbreakbench"
    checks = [row["Goal"] for row in _table(judged / "jbb_harmful-behaviors.csv")]
    checks += [row["Goal"] for row in _table(judged / "jbb_benign-behaviors.csv")]
    checks += [row["goal"] for row in _table(judged / "jbb_judge-comparison.csv")]
    checks += [row["prompt"] for row in _table(prompts / "xstest" / "xstest_prompts.csv")]
    kept = {text.strip(): None for text in found if text.strip()}
    return without_resembling(list(kept), checks)


def without_resembling(texts: Sequence[str], checks: Sequence[str]) -> list[str]:
    """The texts that share less than two thirds of the shorter one's words with every check."""
    used = [words for words in {frozenset(_words(check)) for check in checks} if words]
    return [
        text
        for text in texts
        if (words := _words(text))
        and all(len(words & other) / min(len(words), len(other)) < _SAME for other in used)
    ]


def sample_answers(
    requests: Sequence[tuple[str, bool]], seed: int, tokens: int = 64
) -> list[Answered]:
    """Answers of the embedded, unguarded language model, sampled at temperature 0.8.

    Some answers to harmful requests are begun with an opening of compliance.

    Args:
        requests: what is asked, and whether it is harmful.
        seed: of openings and sampling.
        tokens: of each answer, at most.
    """
    from spo.testbed.smollm import language_model_file, original_model, read_tokenizer

    torch.manual_seed(seed)
    rng = random.Random(seed)
    file = language_model_file()
    model, tokenizer = original_model(file), read_tokenizer(file)
    answers = []
    for start in range(0, len(requests), 24):
        chunk = requests[start : start + 24]
        openings = [rng.choice(_OPENINGS) if harmful else "" for _, harmful in chunk]
        asked = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": request}], tokenize=False, add_generation_prompt=True
            )
            + opening
            for (request, _), opening in zip(chunk, openings, strict=True)
        ]
        batch = tokenizer(asked, return_tensors="pt", padding=True)
        with torch.inference_mode():
            ids = model.generate(
                batch["input_ids"],
                attention_mask=batch["attention_mask"],
                max_new_tokens=tokens,
                do_sample=True,
                temperature=0.8,
                top_p=0.95,
                pad_token_id=tokenizer.pad_token_id,
            )[:, batch["input_ids"].shape[1] :]
        said = tokenizer.batch_decode(ids, skip_special_tokens=True)
        answers += [
            Answered(
                request=request,
                answer=opening + text,
                harmful=harmful,
                refusal=0,
                complied=harmful,
            )
            for (request, harmful), opening, text in zip(chunk, openings, said, strict=True)
        ]
    return answers


def draw_requests(draw: Draw, public: Sequence[str], n: int) -> list[tuple[str, bool]]:
    """`n` requests with whether they are harmful: half harmful, a quarter hard twins."""
    found = []
    for _ in range(n):
        if draw.rng.random() < 0.5:
            from_public = public and draw.rng.random() < 0.75
            found.append((draw.rng.choice(public) if from_public else draw("harmful"), True))
        else:
            found.append((draw("twins" if draw.rng.random() < 0.6 else "harmless"), False))
    return found


def write_said(prompts: Path, out: Path, each: int, seed: int) -> int:
    """Sample `each` answers to harmful and to harmless requests and write them for `read_said`."""
    public = public_requests(prompts)
    draw = Draw("train", seed, each)
    harmful = [(request, True) for request in draw.rng.sample(public, min(each, len(public)))]
    mild = [(draw(draw.rng.choice(("twins", "harmless"))), False) for _ in range(each)]
    answers = sample_answers(harmful + mild, seed)
    with out.open("w", encoding="utf-8") as stream:
        for one in answers:
            row = {"request": one.request, "answer": one.answer, "harmful": one.harmful}
            stream.write(json.dumps(row) + "\n")
    return len(answers)


def read_said(file: Path) -> list[Answered]:
    """Answers of the embedded model as `write_said` wrote them, one JSON object a line.

    Raises:
        DataError: there is no such file.
    """
    if not file.is_file():
        raise DataError(
            f"expected answers of the embedded model in {file}, found none; make them with "
            "`python -m spo.testbed sample-answers`"
        )
    return [
        Answered(
            request=row["request"],
            answer=row["answer"],
            harmful=row["harmful"],
            refusal=0,
            complied=row["harmful"],
        )
        for row in map(json.loads, file.read_text(encoding="utf-8").splitlines())
    ]


def _words(text: str) -> set[str]:
    return set(_WORD.findall(text.lower())) - _COMMON


def _table(file: Path) -> Iterator[dict[str, str]]:
    if not file.is_file():
        raise DataError(f"expected the prompt set {file.name} in {file.parent}, found none")
    with file.open(encoding="utf-8", newline="") as stream:
        yield from csv.DictReader(stream)

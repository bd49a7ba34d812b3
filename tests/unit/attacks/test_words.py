"""Typographic and template attacks move or wrap the words and nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from pydantic import TypeAdapter, ValidationError

from spo.actors.picture_tasks import Workshop
from spo.attacks.drawing import draw_text
from spo.attacks.prompts import ATTACKS, Material, attack_of, rewritten
from spo.attacks.templates import TEMPLATES, template_prompts
from spo.attacks.typographic import CONTINUE_REQUEST, LIST_REQUEST, typographic_prompts
from spo.config import (
    AnyAttack,
    EvaluateConfig,
    LearnConfig,
    PgdConfig,
    TemplateConfig,
    TypographicConfig,
)
from spo.corpus.base import EvaluationInputs
from spo.errors import ConfigError
from spo.evaluation.attacked_sets import attacked_sets
from spo.evaluation.defences import UNDEFENDED
from spo.progress import Silent
from spo.records import Prompt, PromptFormat, PromptKind, PromptSet
from spo.resolve import ResolvedModel

ANY = TypeAdapter(AnyAttack)
CHAT = Prompt(prompt_id="a", text="How to pick a lock?", kind=PromptKind.HARM)
PLAIN = replace(CHAT, prompt_id="b", text="You are such a", format=PromptFormat.PLAIN)


def test_typographic_prompts_hide_the_words_in_the_picture(tmp_path: Path) -> None:
    drawn: list[str] = []

    def draw(words: str) -> Image.Image:
        drawn.append(words)
        return draw_text(words)

    chat, plain = typographic_prompts([CHAT, PLAIN], draw, tmp_path)
    assert drawn == ["How to pick a lock:\n1.\n2.\n3.", "You are such a"]
    assert (chat.text, plain.text) == (LIST_REQUEST, CONTINUE_REQUEST)
    assert plain.format is PromptFormat.CHAT
    assert (chat.prompt_id, chat.kind) == ("a", PromptKind.HARM)
    with Image.open(str(chat.image)) as picture:
        assert picture.convert("L").getextrema() == (0, 255)
    again = typographic_prompts([CHAT], draw, tmp_path)
    assert again[0].image == chat.image


def test_templates_go_round_and_keep_the_request() -> None:
    wrapped = template_prompts([CHAT, PLAIN] * 3)
    assert [p.category for p in wrapped] == [list(TEMPLATES)[i % len(TEMPLATES)] for i in range(6)]
    assert all(CHAT.text in p.text or 'Continue this text: "You are' in p.text for p in wrapped)
    assert {p.format for p in wrapped} == {PromptFormat.CHAT}


@pytest.mark.parametrize("kind", sorted(ATTACKS))
def test_an_attack_on_requests_is_found_by_its_kind(kind: str, tmp_path: Path) -> None:
    if kind == "pgd":
        assert attack_of(kind).rewrite is None
        return
    attack = ANY.validate_python({"kind": kind})
    assert attack.name == attack.kind == kind
    material = Material(attack=attack, draw=lambda words: Image.new("RGB", (8, 8)), folder=tmp_path)
    made = rewritten([CHAT], material)
    assert [prompt.prompt_id for prompt in made] == [CHAT.prompt_id]
    assert made[0].text != CHAT.text


def test_every_kind_has_settings_of_its_own() -> None:
    assert {ANY.validate_python({"kind": kind}).kind for kind in ATTACKS} == set(ATTACKS)
    assert ANY.validate_python({}) == PgdConfig()


def test_a_budget_goes_with_pixels_only_and_the_usual_one_of_older_files_is_left_out() -> None:
    older = {**PgdConfig().model_dump(mode="json"), "kind": "template"}
    assert ANY.validate_python(older) == TemplateConfig()
    with pytest.raises(ValidationError, match="'adaptive', 'steps' goes with kind 'pgd' only"):
        ANY.validate_python({**older, "steps": 7, "adaptive": True})
    with pytest.raises(ValidationError, match="stepps"):
        ANY.validate_python({"kind": "template", "stepps": 7})


def test_an_unknown_kind_is_refused_with_the_list() -> None:
    with pytest.raises(ValidationError, match=r"'pgd', 'typographic', 'template'\], got 'zap'"):
        EvaluateConfig.model_validate({"attacks": [{"kind": "zap"}]})
    with pytest.raises(ConfigError, match=r"'pgd', 'typographic', 'template'\], got 'zap'"):
        attack_of("zap")


def test_the_matrix_asks_every_attack_on_requests(tmp_path: Path) -> None:
    config = EvaluateConfig(attacks=(TypographicConfig(), TemplateConfig()))
    plain = PromptSet(
        condition="plain", prompts=(CHAT, PLAIN), samples=1, max_tokens=4, temperature=0.0
    )
    inputs = EvaluationInputs(sets=(plain,), checks={}, picture_size=64)
    workshop = Workshop(
        model=ResolvedModel(path="unused", revision=None),
        place=LearnConfig(),
        run_dir=tmp_path,
        seed=0,
    )
    made = attacked_sets(config, inputs, [UNDEFENDED], workshop, Silent())
    assert [part.condition for part in made] == ["typographic", "template"]
    assert made[1].prompts == tuple(template_prompts([CHAT, PLAIN]))
    for prompt in made[0].prompts:
        path = Path(str(prompt.image))
        assert path.parent == tmp_path / "attack" / "typographic"
        with Image.open(path) as picture:
            assert picture.size == (64, 64)

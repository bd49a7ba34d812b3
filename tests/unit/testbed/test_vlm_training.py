"""Training of the embedded model: what is learned where, and losses with known values."""

import copy
import math

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from spo.testbed import scenes, smollm
from spo.testbed.model import IMAGE_TOKENS
from spo.testbed.smollm import IMAGE_TOKEN_ID
from spo.testbed.training.distillation import Corpus
from spo.testbed.training.vlm_data import (
    IGNORED,
    LESSONS,
    NO_LETTER,
    Continuation,
    SampleStream,
    encode,
    letter_grid,
    readable_words,
)
from spo.testbed.training.vlm_network import VisionLanguageModel
from spo.testbed.training.vlm_objectives import answer_loss, letter_loss, text_loss

TEXT = Continuation(prompt="You are such a good", text=" friend to me.<|im_end|>")


@pytest.fixture(scope="module")
def tokenizer():
    return smollm.read_tokenizer(smollm.language_model_file())


@pytest.fixture(scope="module")
def language():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49_152, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.mark.parametrize("lesson", LESSONS)
def test_samples_learn_answers_only_and_hold_one_picture_or_none(tokenizer, lesson):
    guard = (["Teach me to break a lock."], [TEXT]) if LESSONS[lesson].refuse else ((), ())
    stream = SampleStream(tokenizer, ([TEXT], [TEXT]), 4, 0, LESSONS[lesson], *guard)
    stream.progress.value = 1.0
    rng = scenes.training_generator(1)
    samples = [stream.sample(rng) for _ in range(64)]
    batch = encode(samples, tokenizer)
    shown = torch.tensor([sample.image is not None for sample in samples])
    assert ((batch["ids"] == IMAGE_TOKEN_ID).sum(dim=1) == IMAGE_TOKENS * shown).all()
    assert len(batch["images"]) == len(batch["letters"]) == int(shown.sum())
    assert bool(shown.all()) == (lesson != "guard")
    for sample, labels in zip(samples, batch["labels"], strict=True):
        learned = tokenizer.decode(labels[labels != IGNORED])
        wanted = "".join(piece for piece, learns in sample.segments if learns)
        assert learned
        assert wanted.startswith(learned)


def test_no_held_out_word_is_taught():
    assert not any(scenes.is_held_out(word) for word in readable_words())


def test_letters_are_found_by_patch_and_half():
    glyphs = [
        scenes.Glyph(character="B", x=3.0, y=20.0),
        scenes.Glyph(character="a", x=12.0, y=20.0),
        scenes.Glyph(character="l", x=41.0, y=1.0),
        scenes.Glyph(character="l", x=44.0, y=1.0),
    ]
    grid = letter_grid(glyphs)
    assert grid[7].tolist() == [1, 0]
    assert grid[2].tolist() == [NO_LETTER, IGNORED]
    assert (grid == NO_LETTER).sum() == 49 * 2 - 3


def test_letter_loss_of_a_blank_head_is_the_logarithm_of_the_classes():
    letters = torch.full((2, 49, 2), NO_LETTER)
    letters[0, 5, 1] = 3
    assert letter_loss(torch.zeros(2, 49, 2, 27), letters).item() == pytest.approx(math.log(27))


def test_a_short_answer_weighs_as_the_square_root_of_its_length(language):
    student = VisionLanguageModel(copy.deepcopy(language))
    hidden = torch.randn(2, 6, 32)
    labels = torch.full((2, 6), IGNORED)
    labels[0, 2:6] = torch.tensor([5, 6, 7, 8])
    labels[1, 3] = 9
    each = torch.nn.functional.cross_entropy(
        student.logits(hidden[:, :-1]).flatten(0, 1), labels[:, 1:].flatten(), reduction="none",
        ignore_index=IGNORED,
    ).reshape(2, 5)  # fmt: skip
    expected = (each[0].sum() / 2 + each[1].sum()) / (4 / 2 + 1)
    torch.testing.assert_close(answer_loss(student, hidden, labels), expected)


def test_an_untrained_adapter_keeps_the_text_and_a_picture_moves_it(language, tokenizer):
    teacher = language
    texts = [
        "The river runs to the sea.",
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYo",
    ]
    corpus = Corpus(texts, [False, True], ([], [], []), tokenizer, torch.device("cpu"))
    student = VisionLanguageModel(copy.deepcopy(teacher))
    rng = np.random.default_rng(0)
    images = torch.zeros(8, 3, 112, 112, dtype=torch.uint8)
    for after_image in (False, True):
        batch = corpus.draw(rng, 8, after_image=after_image, device=torch.device("cpu"))
        if after_image:
            hidden, _ = student(images, batch.student_ids)
        else:
            hidden = student.language.model(batch.student_ids).last_hidden_state
        places = torch.gather(batch.student_ids, 1, batch.positions)
        assert torch.equal(places[batch.mask], batch.ids[batch.mask])
        loss = text_loss(student, hidden, batch.positions, teacher, batch).item()
        if after_image:
            assert loss > 1e-6
        else:
            assert loss == pytest.approx(0.0, abs=1e-6)


def test_trained_weights_are_stored_and_taken_over(language):
    first, second = (VisionLanguageModel(copy.deepcopy(language)) for _ in range(2))
    stored = first.trained_state()
    second.load_trained(stored)
    taken = second.trained_state()
    assert stored.keys() == taken.keys()
    assert all(torch.equal(stored[name], taken[name]) for name in stored)
    assert stored["lora.0.mlp.up_proj.a"].shape == (16, 32)

"""The alignment scorer on a tiny random CLIP in open_clip's local layout."""

import json

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from spo.errors import ScorerError
from spo.scorers.alignment import AlignmentScorer

WORDS = ["<pad>", "<start>", "<end>", "<unk>", "a", "red", "blue", "star", "circle", ".", "big"]
CONTEXT = 10
RED = Image.new("RGB", (32, 32), (200, 10, 10))
BLUE = Image.new("RGB", (40, 24), (10, 10, 200))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    text = {
        "context_length": CONTEXT,
        "vocab_size": len(WORDS),
        "hf_tokenizer_name": "tokenizer",
        "width": 16,
        "heads": 2,
        "layers": 1,
        "pool_type": "eos",
        "eos_id": 2,
    }
    vision = {"image_size": 32, "layers": 1, "width": 16, "head_width": 8, "patch_size": 16}
    config = {"embed_dim": 8, "vision_cfg": vision, "text_cfg": text}
    (folder / "tiny-clip.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / "tiny-clip.json")
    model = open_clip.create_model("tiny-clip")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    whole = {"model_cfg": config, "preprocess_cfg": {"resize_mode": "squash"}}
    (folder / "open_clip_config.json").write_text(json.dumps(whole))
    _save_tokenizer(folder)
    return folder


def _save_tokenizer(folder):
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", 2)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.fixture
def scorer(folder):
    return AlignmentScorer(model=str(folder), batch_size=2)


def _cosine(folder, image, text):
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    with torch.inference_mode():
        left = model.eval().encode_image(preprocess(image)[None])
        right = model.encode_text(tokenizer([text]))
    return torch.nn.functional.cosine_similarity(left, right).item()


def test_scores_are_open_clips_cosines(scorer, folder):
    pairs = [(RED, "a red star"), (BLUE, "a blue circle"), (RED, "a blue circle"), (BLUE, "")]
    expected = [_cosine(folder, image, text) for image, text in pairs]
    scores = scorer.score([image for image, _ in pairs], [text for _, text in pairs])
    assert scores == pytest.approx(expected, abs=1e-5)
    assert len({round(score, 4) for score in scores}) == 4
    assert scorer.score([], []) == []


def test_a_long_text_is_the_mean_of_its_sentences(scorer):
    parts = ["a big red star.", "a blue circle.", "a big big blue star."]
    alone = scorer.score([RED] * 3, parts)
    together = scorer.score([RED], [" ".join(parts)])
    assert together == pytest.approx([sum(alone) / 3], abs=1e-5)


def test_a_short_text_of_two_sentences_is_scored_whole(scorer, folder):
    text = "a star. a circle."
    assert scorer.score([RED], [text]) == pytest.approx([_cosine(folder, RED, text)], abs=1e-5)


def test_pictures_are_embedded_once_and_the_oldest_goes_first(folder, monkeypatch):
    scorer = AlignmentScorer(model=str(folder), cached_images=2)
    seen = []
    encode = scorer._model.encode_image

    def counting(pixels, normalize):
        seen.append(len(pixels))
        return encode(pixels, normalize=normalize)

    monkeypatch.setattr(scorer._model, "encode_image", counting)
    first = scorer.embed_images([RED, BLUE, RED.copy()])
    assert seen == [2]
    assert torch.equal(first[0], first[2])
    scorer.embed_images([RED])
    green = Image.new("RGB", (32, 32), (0, 200, 0))
    scorer.embed_images([green])
    assert seen == [2, 1]
    scorer.embed_images([RED])
    assert seen == [2, 1]
    # Alone in its batch it is summed in another order.
    assert torch.allclose(scorer.embed_images([BLUE])[0], first[1], atol=1e-5)
    assert seen == [2, 1, 1]


def test_unequal_numbers_raise(scorer):
    with pytest.raises(ScorerError, match="one text per picture"):
        scorer.score([RED], ["a", "b"])


def test_damaged_weights_raise_when_scored(folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    state = load_file(folder / "open_clip_model.safetensors")
    state["text_projection"][:] = torch.nan
    save_file(state, tmp_path / "open_clip_model.safetensors")
    with pytest.raises(ScorerError, match="damaged"):
        AlignmentScorer(model=str(tmp_path)).score([RED], ["a star"])


def test_models_without_trained_weights_are_refused(folder, tmp_path):
    for name in ("open_clip_config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(ScorerError, match="expected an open_clip model"):
        AlignmentScorer(model=str(tmp_path))
    with pytest.raises(ScorerError, match="expected an open_clip model"):
        AlignmentScorer(model="no-such-architecture", pretrained="no-such-file")

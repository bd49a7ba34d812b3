"""Pictures and prompts become model input, or a clear error; nothing in between."""

from __future__ import annotations

import shutil
import struct
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from spo.engines.batching import made_ahead
from spo.engines.processing import PromptProcessor, check_same_tokens, load_image
from spo.errors import DataError, EngineError
from spo.records import Prompt, PromptFormat, PromptKind
from tests.tiny_models import make_tiny_model


def draw(path: Path, size: tuple[int, int] = (40, 32), mode: str = "RGB") -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    return path


def prompt(text: str = "Hi", image: Path | None = None, *, chat: bool = False) -> Prompt:
    return Prompt(
        prompt_id="p1",
        text=text,
        kind=PromptKind.BENIGN,
        format=PromptFormat.CHAT if chat else PromptFormat.PLAIN,
        image=None if image is None else str(image),
    )


@pytest.fixture(scope="module")
def llava(tiny_llava: Path) -> PromptProcessor:
    return PromptProcessor(str(tiny_llava))


@pytest.fixture(scope="module")
def llama(tiny_llama: Path) -> PromptProcessor:
    return PromptProcessor(str(tiny_llama))


# Pictures


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "1", "CMYK"])
def test_every_colour_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    suffix = "jpg" if mode == "CMYK" else "png"
    image = load_image(str(draw(tmp_path / f"a.{suffix}", mode=mode)))
    assert (image.mode, image.size) == ("RGB", (40, 32))


def test_pixels_are_those_of_the_file(tmp_path: Path) -> None:
    path = draw(tmp_path / "a.png")
    np.testing.assert_array_equal(np.asarray(load_image(str(path))), np.asarray(Image.open(path)))


def test_missing_picture_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.png' does not exist"):
        load_image(str(tmp_path / "none.png"))
    with pytest.raises(DataError, match="does not exist"):
        load_image(str(tmp_path))


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("share", [0.9, 0.5, 0.02, 0.0])
def test_truncated_picture_is_refused(tmp_path: Path, suffix: str, share: float) -> None:
    path = draw(tmp_path / f"a.{suffix}", (200, 200))
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(DataError, match=rf"a\.{suffix}' cannot be decoded.*whole PNG or JPEG"):
        load_image(str(path))


def test_damaged_png_is_refused(tmp_path: Path) -> None:
    path = draw(tmp_path / "a.png", (64, 64))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(bytes(data))
    with pytest.raises(DataError, match=r"a\.png' cannot be decoded"):
        load_image(str(path))


def test_text_file_named_png_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "note.png"
    path.write_text("this is no picture")
    with pytest.raises(DataError, match=r"note\.png' cannot be decoded"):
        load_image(str(path))


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("size", [(10_000, 10_000), (8_000, 7_000), (60_000, 60_000)])
def test_huge_picture_is_refused_before_decoding(tmp_path: Path, size: tuple[int, int]) -> None:
    """A few hundred bytes that claim 56 to 3,600 megapixels."""
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header(*size))
    with pytest.raises(DataError, match=r"bomb\.png'.*(pixels|bomb)"):
        load_image(str(path))


# Prompts


def test_plain_prompt_is_its_own_text(llava: PromptProcessor) -> None:
    assert llava.render(prompt("You are the most")) == "You are the most"


def test_picture_adds_one_placeholder(llava: PromptProcessor, tmp_path: Path) -> None:
    picture = draw(tmp_path / "a.png")
    assert llava.render(prompt("You", picture)) == "<image>\nYou"
    assert llava.render(prompt("You", picture, chat=True)) == "<|user|><image>\nYou\n<|assistant|>"
    assert llava.render(prompt("You", chat=True)) == "<|user|>You\n<|assistant|>"


def test_placeholder_is_expanded_once_and_found(llava: PromptProcessor, tmp_path: Path) -> None:
    tokens = llava.prompt_tokens(prompt("You", draw(tmp_path / "a.png")))
    assert tokens.count(llava.image_token_id) == 16
    assert llava.spans(tokens) == ((0, 16),)


def test_conversations_and_prompts_are_rendered_by_the_same_code(
    llava: PromptProcessor, llama: PromptProcessor, tmp_path: Path
) -> None:
    turns = [
        ("system", ["Be kind."]),
        ("user", [None, "one", None, "two"]),
        ("assistant", ["ok"]),
        ("user", ["more"]),
    ]
    assert llava.render_turns(turns) == (
        "<|system|>Be kind.\n<|user|><image>\none<image>\ntwo\n<|assistant|>ok\n<|user|>more\n"
        "<|assistant|>"
    )
    single = prompt("You", draw(tmp_path / "a.png"), chat=True)
    assert llava.render(single) == llava.render_turns([("user", [None, "You"])])
    rendered = llama.render_turns([("user", ["Hi", "there"]), ("assistant", ["b"])])
    assert rendered == "<|user|>Hi\nthere\n<|assistant|>b\n<|assistant|>"
    assert llama.short_tokens(llama.render(prompt("Hi", chat=True))) == llama.prompt_tokens(
        prompt("Hi", chat=True)
    )
    with pytest.raises(DataError, match="a message has a picture and the model takes text only"):
        llama.render_turns([("user", ["Hi"]), ("user", [None])])
    with pytest.raises(DataError, match="a message contains the image placeholder '<image>'"):
        llava.render_turns([("user", [None, "a <image>"])])


@pytest.mark.parametrize("chat", [False, True])
def test_placeholder_in_the_text_is_refused(llava: PromptProcessor, chat: bool) -> None:
    with pytest.raises(DataError, match=r"'p1' contains the image placeholder '<image>'"):
        llava.render(prompt("look <image> here", chat=chat))


def test_text_only_model_refuses_pictures(llama: PromptProcessor, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'p1' has a picture and the model takes text only"):
        llama.encode([prompt("Hi", draw(tmp_path / "a.png"))])


def test_batch_is_left_padded_and_equal_to_solo(llava: PromptProcessor, tmp_path: Path) -> None:
    prompts = [prompt("a much longer text"), prompt("x"), prompt("pic", draw(tmp_path / "a.png"))]
    encoded = llava.encode(prompts)
    for row, one in enumerate(prompts):
        kept = encoded["input_ids"][row][encoded["attention_mask"][row].bool()]
        assert tuple(kept.tolist()) == llava.prompt_tokens(one)
        assert encoded["attention_mask"][row].tolist() == sorted(encoded["attention_mask"][row])
    assert encoded["pixel_values"].shape[0] == 1


@pytest.mark.parametrize(
    "text", ["naïve ☃ \U0001f9ea", "line\nbreak\ttab", " leading", "\u202eright"]
)
def test_text_survives_the_round_trip(llama: PromptProcessor, text: str) -> None:
    assert llama.decode(llama.prompt_tokens(prompt(text))) == text


def test_unreadable_picture_in_a_batch_names_the_file(
    llava: PromptProcessor, tmp_path: Path
) -> None:
    good, bad = draw(tmp_path / "good.png"), tmp_path / "bad.png"
    bad.write_bytes(good.read_bytes()[:60])
    with pytest.raises(DataError, match=r"bad\.png"):
        llava.encode([prompt("a", good), prompt("b", bad)])


@pytest.mark.parametrize("others", [[], ["a longer one"]])
def test_prompt_without_tokens_is_named(llava: PromptProcessor, others: list[str]) -> None:
    with pytest.raises(DataError, match="'p1' has no tokens"):
        llava.encode([prompt(""), *(prompt(text) for text in others)])


# Model folders


def test_folder_without_configuration(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"expected a model folder in hub layout"):
        PromptProcessor(str(tmp_path))


def copy_without(source: Path, target: Path, *names: str) -> Path:
    return shutil.copytree(source, target, ignore=shutil.ignore_patterns(*names))


def test_folder_without_processor(tiny_llava: Path, tmp_path: Path) -> None:
    folder = copy_without(tiny_llava, tmp_path / "m", "*processor_config.json")
    with pytest.raises(EngineError, match="no usable processor or tokenizer"):
        PromptProcessor(str(folder))


@pytest.mark.parametrize("family", ["llava", "llama"])
def test_folder_without_tokenizer(
    family: str, tiny_llava: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    source = {"llava": tiny_llava, "llama": tiny_llama}[family]
    folder = copy_without(source, tmp_path / "m", "tokenizer*", "special_tokens*")
    with pytest.raises(EngineError, match="no usable processor or tokenizer"):
        PromptProcessor(str(folder))


def test_damaged_configuration(tiny_llava: Path, tmp_path: Path) -> None:
    folder = copy_without(tiny_llava, tmp_path / "m")
    (folder / "config.json").write_text("{ not json")
    with pytest.raises(EngineError, match="expected a model folder in hub layout"):
        PromptProcessor(str(folder))


def test_same_tokens_or_an_error() -> None:
    check_same_tokens(prompt(), (1, 2, 3), [1, 2, 3])
    with pytest.raises(EngineError, match=r"'p1'.*makes 3 tokens and the engine saw 4"):
        check_same_tokens(prompt(), (1, 2, 3), [1, 2, 2, 3])
    with pytest.raises(EngineError, match="placeholder"):
        check_same_tokens(prompt(), (1, 2, 3), [1, 2, 4])


# A prompt that comes several times


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "internvl", "gemma3"])
def test_repeated_prompts_are_read_once_and_come_out_alike(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor = PromptProcessor(str(make_tiny_model(family, tmp_path / family)))
    red, wide = draw(tmp_path / "a.png"), draw(tmp_path / "b.png", size=(168, 56))
    asked = [prompt("Hi", red), prompt("What is it?"), prompt("Look", wide)]
    several = [asked[i] for i in (0, 0, 1, 2, 1, 2, 0)]
    read: list[str] = []

    def reading(path: str) -> Image.Image:
        read.append(path)
        return load_image(path)

    monkeypatch.setattr("spo.engines.processing.load_image", reading)
    each = processor.encode_each(several)
    assert sorted(read) == [str(red), str(wide)]
    whole = processor.encode(several)
    assert set(each) == set(whole)
    for name, value in whole.items():
        torch.testing.assert_close(each[name], value, msg=name)


def test_gemma_takes_pictures_in_plain_prompts_and_refuses_both_its_markers(tmp_path: Path) -> None:
    processor = PromptProcessor(str(make_tiny_model("gemma3", tmp_path / "gemma3")))
    encoded = processor.encode([prompt("Hi", draw(tmp_path / "a.png")), prompt("Hi")])
    assert len(encoded["pixel_values"]) == 1
    pictured, plain = ((row == processor.image_token_id).sum() for row in encoded["input_ids"])
    assert pictured > 0
    assert plain == 0
    for marker in (processor.image_token, processor.placeholder):
        with pytest.raises(DataError, match="image placeholder"):
            processor.render(prompt(f"see {marker}"))


def test_the_next_part_is_made_while_one_is_used() -> None:
    made = {part: threading.Event() for part in (1, 2)}

    def make(part: int) -> int:
        if part == 3:
            raise DataError("no three")
        made[part].set()
        return -part

    seen = made_ahead([1, 2, 3], make)
    assert next(seen) == (1, -1)
    assert made[2].wait(5)
    assert next(seen) == (2, -2)
    with pytest.raises(DataError, match="no three"):
        next(seen)
    assert list(made_ahead([], make)) == []

"""From `Prompt` records to model input: the one place where text and pictures become tokens.

Rollout and learning both go through `PromptProcessor`, so a placeholder expanded twice or a picture
lost on one side cannot go unnoticed: `check_same_tokens` compares what an engine saw.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from torch import Tensor

from spo.algorithms.positions import Span, image_spans
from spo.errors import DataError, EngineError
from spo.records import Prompt, PromptFormat

MAX_PIXELS = 50_000_000
"""Larger pictures are refused before they are decoded (decompression bombs)."""

PICTURE_INPUTS = ("pixel_values", "image_grid_thw", "image_sizes", "image_position_ids")
"""What processors make of pictures and models take."""

_ANIMATED = ("GIF", "PNG", "WEBP", "TIFF")


def load_image(path: str) -> Image.Image:
    """Decode a picture fully as RGB, or raise DataError naming the file and the cause."""
    if not Path(path).is_file():
        raise DataError(f"picture {path!r} does not exist; check the path in the prompt file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise DataError(
                        f"picture {path!r} has {width} x {height} pixels, at most {MAX_PIXELS} are "
                        "allowed; scale it down"
                    )
                frames = getattr(image, "n_frames", 1)
                if frames > 1 and image.format in _ANIMATED:
                    raise DataError(
                        f"picture {path!r} is an animation of {frames} frames; save the frame that "
                        "you mean as PNG or JPEG"
                    )
                return image.convert("RGB")
    except DataError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise DataError(
            f"picture {path!r} has more than the {MAX_PIXELS} pixels that are allowed ({error}); "
            "scale it down"
        ) from error
    except (OSError, SyntaxError, ValueError, Warning) as error:
        raise DataError(
            f"picture {path!r} cannot be decoded ({error}); expected a whole PNG or JPEG file"
        ) from error


def undecodable(prompts: Iterable[Prompt]) -> dict[str, str]:
    """Pictures of the prompts that cannot be decoded, each looked at once: path and reason."""
    reasons: dict[str, str] = {}
    for picture in {prompt.image for prompt in prompts if prompt.image}:
        try:
            load_image(picture)
        except DataError as error:
            reasons[picture] = str(error)
    return reasons


class PromptProcessor:
    """Renders and tokenises prompts for one model.

    Args:
        model: local folder in hub layout, or hub id.
        revision: hub revision; None for local folders.

    Raises:
        EngineError: the folder has no configuration, tokenizer or processor.
    """

    def __init__(self, model: str, revision: str | None = None) -> None:
        try:
            config = transformers.AutoConfig.from_pretrained(model, revision=revision)
        except (OSError, ValueError) as error:
            raise EngineError(
                f"{model!r}: expected a model folder in hub layout (config.json, weights, "
                f"tokenizer) or a hub id, got: {error}"
            ) from error
        self.multimodal = hasattr(config, "vision_config")
        self.image_token_id: int | None = None
        if self.multimodal:
            self.processor = self._load(transformers.AutoProcessor, model, revision)
            self.tokenizer = self.processor.tokenizer
            token = getattr(config, "image_token_id", None)
            self.image_token_id = config.image_token_index if token is None else token
            self.image_token = self.tokenizer.convert_ids_to_tokens(self.image_token_id)
            # Gemma 3 wants another token in the text than those that it expands it to.
            self.placeholder = getattr(self.processor, "image_token", None) or self.image_token
        else:
            self.tokenizer = self._load(transformers.AutoTokenizer, model, revision)
            self.processor = self.tokenizer
            self.image_token = self.placeholder = ""
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.tokenizer.padding_side = "left"

    @staticmethod
    def _load(kind: Any, model: str, revision: str | None) -> transformers.AutoProcessor:
        try:
            return kind.from_pretrained(model, revision=revision)
        except (OSError, ValueError, TypeError) as error:
            raise EngineError(
                f"{model!r} has no usable processor or tokenizer ({error}); expected "
                "preprocessor_config.json / processor_config.json and tokenizer files beside the "
                "weights: copy them from the original model"
            ) from error

    def marker_in(self, text: str) -> str:
        """The token in a user's text that would stand for a picture; "" if there is none."""
        markers = (self.placeholder, self.image_token)
        return next((token for token in markers if token and token in text), "")

    def render(self, prompt: Prompt) -> str:
        """The prompt as one string, with one image placeholder where it has a picture."""
        name = f"prompt {prompt.prompt_id!r}"
        if prompt.format is PromptFormat.PLAIN:
            self._check_parts(name, (prompt.text, *([None] if prompt.image else [])))
            return f"{self.placeholder}\n{prompt.text}" if prompt.image else prompt.text
        parts = (None, prompt.text) if prompt.image is not None else (prompt.text,)
        return self.render_turns([("user", parts)], name=name)

    def render_turns(
        self, turns: Iterable[tuple[str, Sequence[str | None]]], *, name: str = "a message"
    ) -> str:
        """A conversation as one string that ends where the answer begins.

        Args:
            turns: role and parts of each message; None stands for a picture.
            name: what is rendered, for messages.

        Raises:
            DataError: there is a picture and the model takes none, or a text holds a placeholder.
        """
        messages: list[dict[str, Any]] = []
        for role, parts in turns:
            self._check_parts(name, parts)
            content: Any = [
                {"type": "image"} if part is None else {"type": "text", "text": part}
                for part in parts
            ]
            if not self.multimodal:
                content = "\n".join(part for part in parts if part is not None)
            messages.append({"role": role, "content": content})
        return str(
            self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        )

    def _check_parts(self, name: str, parts: Sequence[str | None]) -> None:
        if None in parts and not self.multimodal:
            raise DataError(
                f"{name} has a picture and the model takes text only; remove the picture or choose "
                "a vision-language model"
            )
        token = next(filter(None, (self.marker_in(part) for part in parts if part)), "")
        if token:
            raise DataError(
                f"{name} contains the image placeholder {token!r} in its text; remove it, pictures "
                "are given beside the text: in the field 'image' of a prompt, as an image_url part "
                "of a message"
            )

    def short_tokens(self, rendered: str) -> tuple[int, ...]:
        """Tokens with one placeholder for each picture, which vLLM expands as the learner does."""
        return tuple(self.tokenizer(rendered).input_ids)

    def encode(self, prompts: Sequence[Prompt]) -> transformers.BatchFeature:
        """Left-padded tensors of a batch: input_ids, attention_mask, and pixel_values if any."""
        texts = [self.render(prompt) for prompt in prompts]
        # A list for each prompt: Gemma 3 tells by it which prompts have none.
        images = [[load_image(p.image)] if p.image is not None else [] for p in prompts]
        if not self.multimodal:
            encoded = self.tokenizer(texts, return_tensors="pt", padding=True)
        else:
            encoded = self.processor(
                text=texts,
                images=images if any(images) else None,
                return_tensors="pt",
                padding=True,
            )
        for prompt, length in zip(prompts, encoded["attention_mask"].sum(dim=1), strict=True):
            if length == 0:
                raise DataError(
                    f"prompt {prompt.prompt_id!r} has no tokens; give it text or a picture, or use "
                    "the chat format"
                )
        return encoded

    def encode_each(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """As `encode`; a prompt that comes several times is read and processed once."""
        distinct = list(dict.fromkeys(prompts))
        encoded = dict(self.encode(distinct))
        if len(distinct) == len(prompts):
            return encoded
        place = {prompt: row for row, prompt in enumerate(distinct)}
        rows = [place[prompt] for prompt in prompts]
        pictured = [row for row, prompt in enumerate(distinct) if prompt.image is not None]
        pictures = [pictured.index(row) for row in rows if row in pictured]
        repeated = {}
        for name, value in encoded.items():
            if name in PICTURE_INPUTS:
                shares = (encoded["input_ids"][pictured] == self.image_token_id).sum(dim=1)
                parts = _by_picture(name, value, encoded, shares)
                repeated[name] = torch.cat([parts[number] for number in pictures])
            else:
                repeated[name] = value[rows]
        return repeated

    def prompt_tokens(self, prompt: Prompt) -> tuple[int, ...]:
        """Expanded prompt tokens of one prompt."""
        return tuple(self.encode([prompt])["input_ids"][0].tolist())

    def spans(self, token_ids: Sequence[int]) -> tuple[Span, ...]:
        """Where the image tokens lie in an expanded prompt."""
        return image_spans(token_ids, self.image_token_id)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of answer tokens, special tokens left out."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True))


def _by_picture(
    name: str, value: Tensor, encoded: Mapping[str, Tensor], shares: Tensor
) -> Sequence[Tensor]:
    """A picture input cut into its pictures. Qwen-VL lays the patches of all of them in a row, and
    InternVL their tiles, in proportion to `shares`, the image tokens of each."""
    if name == "pixel_values" and "image_grid_thw" in encoded:
        sizes: list[int] = encoded["image_grid_thw"].prod(dim=1).tolist()
        return value.split(sizes)
    if len(value) == len(shares):
        return value.split(1)
    return value.split((shares * len(value) // shares.sum()).tolist())


def check_same_tokens(prompt: Prompt, expected: Sequence[int], seen: Sequence[int]) -> None:
    """Raise EngineError when an engine tokenised a prompt differently from the learner."""
    if list(expected) != list(seen):
        raise EngineError(
            f"prompt {prompt.prompt_id!r}: the learner's processor makes {len(expected)} tokens "
            f"and the engine saw {len(seen)}; an image placeholder was expanded twice or a picture "
            "was lost. Use the same model folder and processor version for both"
        )

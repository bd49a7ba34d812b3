"""How well a text fits a picture: cosine of CLIP embeddings, by the real `open_clip`."""

import hashlib
import re
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import open_clip
import torch
from PIL import Image

from spo.errors import ScorerError

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
LOCAL_PREFIX = "local-dir:"


class AlignmentScorer:
    """Cosine similarity of pictures and texts under an `open_clip` model.

    Picture embeddings are kept by the SHA-256 of size and pixels, because in training the same
    pictures come back with every group of answers.
    """

    def __init__(
        self,
        *,
        model: str,
        pretrained: str | None = None,
        device: str = "cpu",
        batch_size: int = 64,
        cached_images: int = 4096,
    ) -> None:
        """Load the model.

        Args:
            model: an architecture name such as `ViT-B-32`, `hf-hub:org/name`, `local-dir:FOLDER`,
                or simply an existing folder in `open_clip`'s local layout.
            pretrained: tag (needs a network) or local weights file; only with an architecture name.
            device: torch device.
            batch_size: pictures or texts per forward pass.
            cached_images: how many picture embeddings are kept, least recently used out first.

        Raises:
            ScorerError: the model cannot be loaded, or has no trained weights.
        """
        if batch_size < 1 or cached_images < 1:
            raise ScorerError(
                "expected batch_size and cached_images of at least 1, got "
                f"{batch_size} and {cached_images}"
            )
        name = model
        if not model.startswith(LOCAL_PREFIX) and Path(model).expanduser().is_dir():
            name = f"{LOCAL_PREFIX}{Path(model).expanduser()}"
        try:
            self._model, self._preprocess = open_clip.create_model_from_pretrained(
                name, pretrained=pretrained, device=device
            )
            self._tokenizer = open_clip.get_tokenizer(name)
        except (OSError, RuntimeError, ValueError) as error:
            raise ScorerError(
                f"expected an open_clip model with trained weights, got {model!r} with "
                f"{pretrained!r}: {error}"
            ) from error
        self._model.eval()
        self._device = torch.device(device)
        self._batch_size = batch_size
        self._cached_images = cached_images
        self._cache: OrderedDict[str, torch.Tensor] = OrderedDict()

    def score(self, images: Sequence[Image.Image], texts: Sequence[str]) -> list[float]:
        """Cosine (-1 to 1) of each picture with its text, in order.

        A text beyond the model's context is scored as the mean over its sentences; a single
        sentence beyond it is cut, as CLIP does. An empty text is scored like any other.

        Raises:
            ScorerError: unequal numbers of pictures and texts, or a score that is not finite.
        """
        if len(images) != len(texts):
            raise ScorerError(
                f"expected one text per picture, got {len(images)} pictures and {len(texts)} texts"
            )
        if not texts:
            return []
        pieces = [self._pieces(text) for text in texts]
        owners = [row for row, parts in enumerate(pieces) for _ in parts]
        text_vectors = self.embed_texts([part for parts in pieces for part in parts])
        image_vectors = self.embed_images(images)
        cosines = (image_vectors[owners] * text_vectors).sum(dim=1).tolist()
        scores = [0.0] * len(texts)
        for row, cosine in zip(owners, cosines, strict=True):
            scores[row] += cosine / len(pieces[row])
        if not all(-1.01 < score < 1.01 for score in scores):
            raise ScorerError(
                "expected cosines between -1 and 1, got values beyond or not numbers; the "
                "alignment model is damaged or its number format overflows"
            )
        return scores

    def embed_images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Unit vectors of pictures, (pictures, embedding) float32 on the CPU."""
        keys = [_digest(image) for image in images]
        found = {key: self._cache[key] for key in keys if key in self._cache}
        # The first picture of each missing key stands for its copies.
        missing = {key: image for key, image in zip(keys, images, strict=True) if key not in found}
        waiting = list(missing)
        for start in range(0, len(waiting), self._batch_size):
            part = waiting[start : start + self._batch_size]
            pixels = torch.stack([self._preprocess(missing[key]) for key in part])
            with torch.inference_mode():
                vectors = self._model.encode_image(pixels.to(self._device), normalize=True)
            found.update(zip(part, vectors.float().cpu(), strict=True))
        self._remember({key: found[key] for key in keys})
        return torch.stack([found[key] for key in keys])

    def embed_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Unit vectors of texts, (texts, embedding) float32 on the CPU; long texts are cut."""
        vectors = []
        for start in range(0, len(texts), self._batch_size):
            tokens = self._tokenizer(list(texts[start : start + self._batch_size]))
            with torch.inference_mode():
                encoded = self._model.encode_text(tokens.to(self._device), normalize=True)
            vectors.append(encoded.float().cpu())
        return torch.cat(vectors)

    def _pieces(self, text: str) -> list[str]:
        if not self._is_too_long(text):
            return [text]
        sentences = [part for part in _SENTENCE_END.split(text) if part.strip()]
        return sentences or [text]

    def _is_too_long(self, text: str) -> bool:
        # Both of open_clip's tokenizers pad with 0, so a row without padding is full.
        tokens = self._tokenizer([text])[0]
        return bool((tokens != 0).all())

    def _remember(self, vectors: dict[str, torch.Tensor]) -> None:
        for key, vector in vectors.items():
            self._cache[key] = vector
            self._cache.move_to_end(key)
        while len(self._cache) > self._cached_images:
            self._cache.popitem(last=False)


def _digest(image: Image.Image) -> str:
    digest = hashlib.sha256(f"{image.mode} {image.size}".encode())
    digest.update(image.tobytes())
    return digest.hexdigest()

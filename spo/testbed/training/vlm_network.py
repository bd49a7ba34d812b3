"""The vision-language model as it is trained: tower, projector, adapter, and a letter head."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionModel, LlamaForCausalLM

from spo.testbed import model as assembly
from spo.testbed.smollm import IMAGE_TOKEN_ID
from spo.testbed.training.vlm_data import NO_LETTER

# Two letters at most have their middle in one patch: one in its left, one in its right half.
_LETTER_SLOTS = 2


class AdaptedLinear(nn.Module):
    """A frozen linear map with a trainable low-rank update beside it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(base.weight.detach(), requires_grad=False)
        rank, device = assembly.LORA_RANK, base.weight.device
        bound = 1.0 / math.sqrt(base.in_features)
        start = torch.empty(rank, base.in_features, device=device).uniform_(-bound, bound)
        self.a = nn.Parameter(start)
        self.b = nn.Parameter(torch.zeros(base.out_features, rank, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out], in the dtype of `x`."""
        low = F.linear(F.linear(x, self.a.to(x.dtype)), self.b.to(x.dtype))
        return F.linear(x, self.weight) + assembly.LORA_SCALE * low


class VisionLanguageModel(nn.Module):
    """Tower, projector and adapted language model, as they are trained."""

    def __init__(self, language: LlamaForCausalLM) -> None:
        super().__init__()
        config = assembly.vision_config()
        width = language.config.hidden_size
        self.tower = CLIPVisionModel(config)
        self.projector = nn.Sequential(
            nn.Linear(config.hidden_size, width), nn.GELU(), nn.Linear(width, width)
        )
        # Only a teacher of the tower: nothing of it is kept after training.
        self.letters = nn.Sequential(
            nn.LayerNorm(config.hidden_size),
            nn.Linear(config.hidden_size, _LETTER_SLOTS * (NO_LETTER + 1)),
        )
        self.language = language
        language.requires_grad_(False)
        for block in language.model.layers:
            for name in assembly.LORA_MODULES:
                parent, child = name.split(".")
                part = getattr(block, parent)
                setattr(part, child, AdaptedLinear(getattr(part, child)))

    def forward(self, images: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Final hidden states [batch, length, width] for ids with the pictures' tokens in place.

        The second value holds letter logits [pictures, 49, 2, 27].

        `images` holds one uint8 picture for every row of `ids` that has picture tokens, in order.
        """
        embedded = self.language.model.embed_tokens(ids)
        pixels = images.float().div_(127.5).sub_(1.0)
        with torch.autocast(images.device.type, dtype=torch.bfloat16):
            patches = self.tower(pixel_values=pixels).last_hidden_state[:, 1:]
            features = self.projector(patches)
            letters = self.letters(patches).unflatten(-1, (_LETTER_SLOTS, NO_LETTER + 1))
        slots = (ids == IMAGE_TOKEN_ID).unsqueeze(-1)
        embedded = embedded.masked_scatter(slots, features.to(embedded.dtype))
        hidden = self.language.model(inputs_embeds=embedded, use_cache=False).last_hidden_state
        return hidden, letters

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.language.device

    def logits(self, hidden: Tensor) -> Tensor:
        """Vocabulary logits of hidden states."""
        return F.linear(hidden, self.language.model.embed_tokens.weight)

    def load_trained(self, state: Mapping[str, Tensor]) -> None:
        """Takes over weights as `trained_state` names them."""
        own = dict(self._named())
        with torch.no_grad():
            for name, value in state.items():
                own[name].copy_(value)

    def trained_state(self) -> dict[str, Tensor]:
        """Tower, projector and adapter in float16, named as `vlm.safetensors` stores them."""
        return {name: value.detach().half().cpu().contiguous() for name, value in self._named()}

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        for name, value in self.tower.named_parameters():
            yield f"vision_tower.vision_model.{name.removeprefix('vision_model.')}", value
        for target, source in (("linear_1", self.projector[0]), ("linear_2", self.projector[2])):
            for name, value in source.named_parameters():
                yield f"multi_modal_projector.{target}.{name}", value
        for layer, block in enumerate(self.language.model.layers):
            for module in assembly.LORA_MODULES:
                adapted = block.get_submodule(module)
                yield f"lora.{layer}.{module}.a", adapted.a
                yield f"lora.{layer}.{module}.b", adapted.b

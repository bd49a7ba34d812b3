"""Tiny random models in hub layout, made on the spot: every family that the engines must load.

Weights are random and seeded, so a test may compare engines but learns nothing from the text.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

HIDDEN = 128
LAYERS = 4
HEADS = 4
VOCAB = 384
"""256 bytes, the special tokens, and free places."""
SEED = 7

_TEXT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '@IMAGE@' }}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def make_tiny_model(family: str, folder: Path) -> Path:
    """Write a tiny random model with its tokenizer and processor.

    Args:
        family: one of `FAMILIES`.
        folder: created if needed; its files are overwritten.

    Returns:
        `folder`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(SEED)
    FAMILIES[family](folder)
    return folder


def _tokenizer(image_markup: str, specials: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """Byte-level tokenizer: 256 byte tokens, then `<s>`, `</s>`, `<pad>` and `specials`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(specials)})
    tokenizer.chat_template = _TEXT_TEMPLATE.replace("@IMAGE@", image_markup)
    return tokenizer


def _text_sizes(**changes: object) -> dict[str, object]:
    """Sizes shared by all language models here."""
    sizes: dict[str, object] = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "pad_token_id": 258,
        "initializer_range": 0.3,
        "tie_word_embeddings": False,
    }
    return {**sizes, **changes}


def _rename(folder: Path, old: str, new: str) -> None:
    """Rename weights: vLLM 0.32 reads hub names that Transformers 5 no longer writes."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    renamed = {
        (new + name.removeprefix(old) if name.startswith(old) else name): value.contiguous()
        for name, value in weights.items()
    }
    save_file(renamed, path, metadata={"format": "pt"})


def _llama(folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(LlamaConfig(**_text_sizes())).save_pretrained(folder)
    _tokenizer("").save_pretrained(folder)


def _llava(folder: Path) -> None:
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    tokenizer = _tokenizer("<image>\n", ("<image>",))
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        projection_dim=32,
        initializer_range=0.3,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**_text_sizes()),
        image_token_index=image_token,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=16,
        tie_word_embeddings=False,
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    if not any(name.startswith("vision_tower.vision_model.") for name in weights):
        _rename(folder, "vision_tower.", "vision_tower.vision_model.")
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=tokenizer.chat_template,
    )
    processor.save_pretrained(folder)


FAMILIES: dict[str, Callable[[Path], None]] = {
    "llama": _llama,
    "llava": _llava,
}

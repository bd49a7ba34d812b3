"""Tiny random models in hub layout, made on the spot: every family that the engines must load.

Weights are random and seeded, so a test may compare engines but learns nothing from the text.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    CLIPImageProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

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


def _rename_vision_tower(folder: Path) -> None:
    """Rename weights: vLLM 0.32 reads hub names that Transformers 5 no longer writes."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    old, new = "vision_tower.", "vision_tower.vision_model."
    if any(name.startswith(new) for name in weights):
        return
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
    _rename_vision_tower(folder)
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


def _write_processor(
    folder: Path, kind: type, tokenizer: PreTrainedTokenizerFast, **parts: object
) -> None:
    kind(tokenizer=tokenizer, chat_template=tokenizer.chat_template, **parts).save_pretrained(
        folder
    )


_QWEN_NAMES = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
_QWEN_LIMITS = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 16}


def _qwen_tokens() -> tuple[PreTrainedTokenizerFast, dict[str, int]]:
    tokenizer = _tokenizer("<|vision_start|><|image_pad|><|vision_end|>", _QWEN_NAMES)
    start, end, image, video = (tokenizer.convert_tokens_to_ids(name) for name in _QWEN_NAMES)
    return tokenizer, {
        "vision_start_token_id": start,
        "vision_end_token_id": end,
        "image_token_id": image,
        "video_token_id": video,
    }


def _mrope(**changes: object) -> dict[str, object]:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    return _text_sizes(rope_parameters={**rope, **changes})


def _qwen2_vl(folder: Path) -> None:
    from transformers import (
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
        Qwen2VLImageProcessor,
        Qwen2VLProcessor,
        Qwen2VLVideoProcessor,
    )

    tokenizer, ids = _qwen_tokens()
    vision = {
        "depth": 2,
        "embed_dim": 64,
        "hidden_size": HIDDEN,
        "num_heads": 2,
        "mlp_ratio": 2,
        "initializer_range": 0.3,
    }
    config = Qwen2VLConfig(text_config=_mrope(), vision_config=vision, **ids)
    Qwen2VLForConditionalGeneration(config).save_pretrained(folder)
    _write_processor(
        folder,
        Qwen2VLProcessor,
        tokenizer,
        image_processor=Qwen2VLImageProcessor(size=_QWEN_LIMITS),
        video_processor=Qwen2VLVideoProcessor(size=_QWEN_LIMITS),
    )


def _qwen2_5_vl(folder: Path) -> None:
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    tokenizer, ids = _qwen_tokens()
    vision = {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 64,
        "out_hidden_size": HIDDEN,
        "num_heads": 2,
        "fullatt_block_indexes": [1],
        "initializer_range": 0.3,
    }
    config = Qwen2_5_VLConfig(text_config=_mrope(), vision_config=vision, **ids)
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    _write_processor(
        folder,
        Qwen2_5_VLProcessor,
        tokenizer,
        image_processor=Qwen2VLImageProcessor(size=_QWEN_LIMITS),
        video_processor=Qwen2VLVideoProcessor(size=_QWEN_LIMITS),
    )


def _qwen3_vl(folder: Path) -> None:
    from transformers import (
        Qwen2VLImageProcessor,
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
        Qwen3VLProcessor,
        Qwen3VLVideoProcessor,
    )

    tokenizer, ids = _qwen_tokens()
    vision = {
        "depth": 4,
        "hidden_size": 64,
        "intermediate_size": 64,
        "out_hidden_size": HIDDEN,
        "num_heads": 2,
        "patch_size": 14,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1, 2],
        "initializer_range": 0.3,
    }
    text = {**_mrope(mrope_interleaved=True), "head_dim": 32}
    config = Qwen3VLConfig(text_config=text, vision_config=vision, **ids)
    Qwen3VLForConditionalGeneration(config).save_pretrained(folder)
    _write_processor(
        folder,
        Qwen3VLProcessor,
        tokenizer,
        image_processor=Qwen2VLImageProcessor(size=_QWEN_LIMITS, patch_size=14),
        video_processor=Qwen3VLVideoProcessor(size=_QWEN_LIMITS, patch_size=14),
    )


def _internvl(folder: Path) -> None:
    from transformers import (
        GotOcr2ImageProcessor,
        InternVLConfig,
        InternVLForConditionalGeneration,
        InternVLProcessor,
        InternVLVideoProcessor,
        Qwen2Config,
    )

    names = ("<img>", "</img>", "<IMG_CONTEXT>", "<video>")
    tokenizer = _tokenizer("<IMG_CONTEXT>\n", names)
    tokenizer.init_kwargs["start_image_token"] = tokenizer.start_image_token = names[0]
    tokenizer.init_kwargs["end_image_token"] = tokenizer.end_image_token = names[1]
    tokenizer.init_kwargs["context_image_token"] = tokenizer.context_image_token = names[2]
    tokenizer.init_kwargs["video_token"] = tokenizer.video_token = names[3]
    for attribute, name in zip(
        ("start_image_token_id", "end_image_token_id", "context_image_token_id", "video_token_id"),
        names,
        strict=True,
    ):
        setattr(tokenizer, attribute, tokenizer.convert_tokens_to_ids(name))
    vision = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": [56, 56],
        "patch_size": [14, 14],
        "initializer_range": 0.3,
    }
    config = InternVLConfig(
        vision_config=vision,
        text_config=Qwen2Config(**_text_sizes()),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    InternVLForConditionalGeneration(config).save_pretrained(folder)
    _write_processor(
        folder,
        InternVLProcessor,
        tokenizer,
        image_processor=GotOcr2ImageProcessor(
            size={"height": 56, "width": 56}, crop_to_patches=False
        ),
        video_processor=InternVLVideoProcessor(size={"height": 56, "width": 56}),
        image_seq_length=4,
    )


def _gemma3(folder: Path) -> None:
    from transformers import (
        Gemma3Config,
        Gemma3ForConditionalGeneration,
        Gemma3ImageProcessor,
        Gemma3Processor,
    )

    names = ("<start_of_image>", "<end_of_image>", "<image_soft_token>")
    # Its processors look the newline runs up that frame a picture.
    newlines = tuple("\n" * count for count in range(1, 5))
    tokenizer = _tokenizer("<start_of_image>", (*names, *newlines))
    start, end, soft = (tokenizer.convert_tokens_to_ids(name) for name in names)
    for attribute, name, number in (
        ("boi_token", names[0], start),
        ("eoi_token", names[1], end),
        ("image_token", names[2], soft),
    ):
        tokenizer.init_kwargs[attribute] = name
        setattr(tokenizer, attribute, name)
        setattr(tokenizer, f"{attribute}_id", number)
    vision = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 56,
        "patch_size": 14,
    }
    text = _text_sizes(head_dim=32, sliding_window=512, query_pre_attn_scalar=32)
    config = Gemma3Config(
        text_config={**text, "initializer_range": 0.15},
        vision_config=vision,
        mm_tokens_per_image=4,
        boi_token_index=start,
        eoi_token_index=end,
        image_token_index=soft,
        initializer_range=0.15,
    )
    Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    _rename_vision_tower(folder)
    _write_processor(
        folder,
        Gemma3Processor,
        tokenizer,
        image_processor=Gemma3ImageProcessor(size={"height": 56, "width": 56}),
        image_seq_length=4,
    )


FAMILIES: dict[str, Callable[[Path], None]] = {
    "llama": _llama,
    "llava": _llava,
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "internvl": _internvl,
    "gemma3": _gemma3,
}


def make_tiny_classifier(folder: Path, labels: tuple[str, ...], *, several: bool = False) -> Path:
    """Write a tiny random sequence classifier over pairs of texts.

    Args:
        folder: created if needed.
        labels: names of its logits.
        several: whether an input may have several labels at once.

    Returns:
        `folder`.
    """
    torch.manual_seed(SEED)
    tokenizer = _tokenizer("")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> $B:1 </s>:1",
        special_tokens=[("<s>", 256), ("</s>", 257)],
    )
    config = BertConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=128,
        initializer_range=0.5,
        pad_token_id=258,
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={name: i for i, name in enumerate(labels)},
        problem_type="multi_label_classification" if several else None,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder

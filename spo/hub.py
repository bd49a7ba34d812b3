"""Artifacts in folders, as llama.cpp's files, and on the Hugging Face hub.

A repository holds the artifact's two files at its top, and a card. Tensors travel as safetensors
and nothing that is pulled runs code; the hash in the manifest is checked on arrival.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from spo.artifact import MANIFEST_FILE, VECTOR_FILE, SteeringArtifact, located
from spo.errors import ArtifactError
from spo.gguf import export_gguf

_CARD = """---
library_name: spo-vlm
tags: [steering-vector, activation-steering, safety]
{base}---

# Steering vector for `{model}`

Made by {method}, applied as `{operator}` x {coefficient:g} at `{positions}` positions of decoder
blocks {layers} (zero-based). It points towards harm; a positive coefficient removes it.

```python
import spo

model = spo.open_model("{model}")
print(model.answer("...", spo.pull("{repository}")).text)
```

Content hash: `{sha256}`
"""


def load(folder: Path | str) -> SteeringArtifact:
    """Read an artifact that `save` wrote, or a released one by name (`release:guarded/spo`).

    An engine refuses it if it is of another model.
    """
    return SteeringArtifact.load(located(folder), model_id=None)


def export(artifact: SteeringArtifact, path: Path | str, *, hint: str = "llama") -> Path:
    """Write a llama.cpp control vector (GGUF); `hint` is the architecture as llama.cpp names it."""
    return export_gguf(artifact.vector, Path(path), model_hint=hint)


def pull(source: Path | str, *, revision: str | None = None) -> SteeringArtifact:
    """Read an artifact out of a local folder, or fetch it from the hub.

    Args:
        source: a folder that holds the artifact, or a hub id such as "name/vector". What was
            fetched before is found again without a network.
        revision: commit, branch or tag on the hub.

    Raises:
        ArtifactError: it is not there, cannot be fetched, or is damaged.
    """
    if Path(source).is_dir():
        return load(source)
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            str(source), revision=revision, allow_patterns=[VECTOR_FILE, MANIFEST_FILE]
        )
    except Exception as error:  # the client, its transport and the file system each have their own
        raise ArtifactError(
            f"cannot pull {str(source)!r}: it is no local folder, and the hub says: "
            f"{_first_line(error)}; check the name, the network, HF_HUB_OFFLINE and your token"
        ) from error
    return load(folder)


def push(artifact: SteeringArtifact, repository: str, *, private: bool = True) -> str:
    """Upload an artifact in one commit, with a card; returns the address of the commit.

    Args:
        artifact: what to publish; its evaluation goes with it.
        repository: hub id, "name/vector"; made if it does not exist.
        private: whether a new repository is private.

    Raises:
        ArtifactError: the hub cannot be reached or refuses.
    """
    from huggingface_hub import HfApi

    hub = HfApi(library_name="spo-vlm")
    with tempfile.TemporaryDirectory(prefix="spo-push-") as name:
        folder = artifact.save(name)
        (folder / "README.md").write_text(_card(artifact, repository))
        try:
            hub.create_repo(repository, private=private, exist_ok=True)
            made = hub.upload_folder(
                repo_id=repository,
                folder_path=folder,
                commit_message=f"Steering vector {artifact.vector.sha256[:12]}",
            )
        except Exception as error:  # as in `pull`
            raise ArtifactError(
                f"cannot push to {repository!r}: {_first_line(error)}; check the name, the "
                "network, HF_HUB_OFFLINE and your token (`hf auth login`). save() writes the same "
                "folder locally"
            ) from error
    return str(made.commit_url)


def _card(artifact: SteeringArtifact, repository: str) -> str:
    model = artifact.vector.model_id
    return _CARD.format(
        base=f"base_model: {model}\n" if model.count("/") == 1 else "",
        model=model,
        repository=repository,
        method=artifact.method,
        operator=artifact.operator.value,
        coefficient=artifact.coefficient,
        positions=artifact.positions.value,
        layers=", ".join(map(str, artifact.vector.layers)),
        sha256=artifact.vector.sha256,
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__

"""What `kubectl kustomize` makes of the parts that our overlays use, strictly.

Anything else in a kustomization is an error, and so is a patch whose target or path does not exist.
Where kubectl is installed, the tests check that it renders the same.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import yaml

Document = dict[str, Any]
_KNOWN = {
    "apiVersion",
    "kind",
    "namespace",
    "resources",
    "patches",
    "images",
    "configMapGenerator",
    "generatorOptions",
}


def render(folder: Path) -> list[Document]:
    """The documents of a kustomization folder."""
    plan = yaml.safe_load((folder / "kustomization.yaml").read_text())
    assert not set(plan) - _KNOWN, f"{folder}: {set(plan) - _KNOWN} is not known here"
    documents: list[Document] = []
    for name in plan.get("resources", []):
        place = folder / name
        documents += render(place) if place.is_dir() else read_documents(place)
    for made in plan.get("configMapGenerator", []):
        assert plan["generatorOptions"] == {"disableNameSuffixHash": True}
        data = {name: (folder / name).read_text() for name in made["files"]}
        metadata = {"name": made["name"]}
        documents.append(
            {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data}
        )
    for patch in plan.get("patches", []):
        targets = [d for d in documents if _matches(d, patch["target"])]
        assert targets, f"{folder}: no document matches {patch['target']}"
        for document in targets:
            for operation in yaml.safe_load((folder / patch["path"]).read_text()):
                apply(document, operation)
    for image in plan.get("images", []):
        changed = sum(_rename(document, image) for document in documents)
        assert changed, f"{folder}: no container has the image {image['name']}"
    if "namespace" in plan:
        for document in documents:
            document["metadata"]["namespace"] = plan["namespace"]
    return documents


def read_documents(path: Path) -> list[Document]:
    """The documents of a YAML file, anchors resolved into copies of their own."""
    return [copy.deepcopy(d) for d in yaml.load_all(path.read_text(), _Copying) if d]


class _Copying(yaml.SafeLoader):
    """An alias is a copy, as in kustomize: a patch of one place leaves the others alone."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        return copy.deepcopy(super().construct_object(node, deep=True))


def apply(document: Document, operation: Document) -> None:
    """One operation of RFC 6902; KeyError or IndexError when its path does not exist."""
    *parents, last = operation["path"].strip("/").split("/")
    parent: Any = document
    for key in parents:
        parent = parent[int(key)] if isinstance(parent, list) else parent[key]
    match operation["op"]:
        case "copy":
            value = copy.deepcopy(_at(document, operation["from"]))
        case "add" | "replace":
            value = operation["value"]
        case other:
            raise AssertionError(f"operation {other!r} is not known here")
    if isinstance(parent, list):
        index = len(parent) if last == "-" else int(last)
        if operation["op"] == "replace":
            parent[index] = value
        else:
            assert index <= len(parent), operation
            parent.insert(index, value)
        return
    if operation["op"] == "replace":
        assert last in parent, operation
    parent[last] = value


def _at(document: Any, path: str) -> Any:
    for key in path.strip("/").split("/"):
        document = document[int(key)] if isinstance(document, list) else document[key]
    return document


def _matches(document: Document, target: Document) -> bool:
    group, _, version = document["apiVersion"].rpartition("/")
    found = {
        "group": group,
        "version": version,
        "kind": document["kind"],
        "name": document["metadata"]["name"],
    }
    return all(found[key] == value for key, value in target.items())


def _rename(node: Any, image: Document) -> int:
    if isinstance(node, list):
        return sum(_rename(item, image) for item in node)
    if not isinstance(node, dict):
        return 0
    count = 0
    for key, value in node.items():
        if key in {"containers", "initContainers"}:
            for container in value:
                if container["image"].partition(":")[0] == image["name"]:
                    container["image"] = f"{image['newName']}:{image['newTag']}"
                    count += 1
        else:
            count += _rename(value, image)
    return count

"""READMEs are true as far as a machine can tell: names, links and commands in them exist and start.

What a test cannot see, figures and sentences, is for the reader.
"""

from __future__ import annotations

import argparse
import ast
import functools
import importlib.util
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from jobs import bench
from spo import plugins
from spo.config import RunConfig, load_config
from spo.sweep.settings import load_sweep

ROOT = Path(__file__).resolve().parents[2]
LEFT_OUT = {"outputs", "runs", "dist", "shared"}
READMES = sorted(
    path
    for path in ROOT.rglob("README.md")
    if not any(p.startswith(".") or p in LEFT_OUT for p in path.relative_to(ROOT).parts)
)
MAX_LINES = 200
"""Of the main one."""
MANY_FILES = 6
"""A folder of `spo` with more than so many files has a README."""
SOURCE = re.compile(r"[\w./-]+\.(py|sbatch|html|toml|safetensors)")
OUTPUTS = {"report.html", "vector.safetensors"}
"""Files that runs write."""
OF_A_RUN = {"activations/", "attack/", "cells/", "plots/", "rollouts/", "spo/", "stage1/"}
"""Folders that runs write; two of them are also ours."""
KNOWN = re.compile(r"(tune_configs|cluster)/[\w./-]+\.(yaml|txt|json)")
DOTTED = re.compile(r"(?<![\w./-])(?:spo|jobs)(?:\.\w+)+")
ENTRY_POINT_GROUPS = set(plugins.HOMES)


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def code_in(path: Path) -> list[str]:
    """What stands between backticks, outside of blocks."""
    prose = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    paragraphs = re.split(r"\n\s*\n", prose)
    return [
        " ".join(code.split()) for text in paragraphs for code in re.findall(r"`([^`]+)`", text)
    ]


def commands_in(path: Path) -> list[list[str]]:
    """Every `python -m MODULE ...`, split into words, in blocks and between backticks."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    found = []
    for line in [*lines, *code_in(path)]:
        _, sign, command = line.partition("python -m ")
        if sign:
            found.append(shlex.split(command, comments=True))
    return found


def commands() -> Iterator[tuple[str, list[str]]]:
    for path in READMES:
        for command in commands_in(path):
            yield relative(path), command


def distinct(words: list[list[str]]) -> list[list[str]]:
    return [list(one) for one in dict.fromkeys(map(tuple, words))]


def has_a_file(command: list[str]) -> bool:
    """Whether `--config` names a file that ships, and not a placeholder."""
    return any(option == "--config" and "/" in file for option, file in pairwise(command))


WITH_A_FILE = distinct([command for _, command in commands() if has_a_file(command)])


def test_the_main_one_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= MAX_LINES


def test_every_large_folder_has_one() -> None:
    without = []
    for folder in [ROOT / "spo", *(p for p in (ROOT / "spo").rglob("*") if p.is_dir())]:
        files = [p for p in folder.iterdir() if p.is_file() and p.name != "README.md"]
        if folder.name != "__pycache__" and len(files) > MANY_FILES:
            without += [] if (folder / "README.md").is_file() else [relative(folder)]
    assert without == []


@pytest.mark.parametrize("path", READMES, ids=relative)
def test_links_lead_somewhere(path: Path) -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", path.read_text())
    files = [t.partition("#")[0] for t in targets if "://" not in t]
    assert [t for t in files if t and not (path.parent / t).exists()] == []
    headings = re.findall(r"^#+ (.*)$", path.read_text(), flags=re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}
    assert [t for t in targets if t.startswith("#") and t[1:] not in anchors] == []


@pytest.mark.parametrize("path", READMES, ids=relative)
def test_files_that_are_named_exist(path: Path) -> None:
    text = path.read_text()
    named = {code for code in code_in(path) if SOURCE.fullmatch(code)} - OUTPUTS
    named |= {found.group() for found in KNOWN.finditer(text)}
    named |= {code for code in code_in(path) if re.fullmatch(r"[\w./-]+/", code)} - OF_A_RUN
    here = {p.name for p in path.parent.rglob("*")} | {""}
    assert [
        name
        for name in sorted(named)
        if name not in here and not any((p / name).exists() for p in (path.parent, ROOT))
    ] == []


def test_the_table_of_a_folder_names_each_of_its_modules() -> None:
    """Where a README of `spo` lists modules in a table, it lists all of them."""
    forgotten = []
    for path in READMES:
        if not path.is_relative_to(ROOT / "spo") or "\n| file | what |\n" not in path.read_text():
            continue
        named = set(code_in(path))
        modules = {p.name for p in path.parent.glob("*.py") if not p.name.startswith("__")}
        forgotten += [f"{relative(path)}: {name}" for name in sorted(modules - named)]
    assert forgotten == []


@functools.cache
def names_of(module: Path) -> frozenset[str]:
    """What a module defines or imports, and the attributes of its classes."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.ImportFrom | ast.Import):
            found |= {alias.asname or alias.name for alias in node.names}
    return frozenset(found)


def exists(dotted: str) -> bool:
    """Whether a dotted name is a module, or something in one; nothing is imported."""
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        place = ROOT.joinpath(*parts[:length])
        for module in (place / "__init__.py", place.with_suffix(".py")):
            if module.is_file():
                return set(parts[length:]) <= names_of(module)
    return False


def test_what_exists_is_told_from_what_does_not() -> None:
    assert exists("spo.records.Prompt")
    assert exists("spo.stage2.loop")
    assert not exists("spo.records.NoSuchRecord")
    assert not exists("spo.no_such_room")


@pytest.mark.parametrize("path", READMES, ids=relative)
def test_modules_and_names_that_are_named_exist(path: Path) -> None:
    named = {found for code in code_in(path) for found in DOTTED.findall(code)}
    named -= ENTRY_POINT_GROUPS
    assert [name for name in sorted(named) if not exists(name)] == []


@pytest.mark.parametrize("path", READMES, ids=relative)
def test_settings_that_are_named_exist(path: Path) -> None:
    """`section.key`, alone or with a value; those of commands run dry."""
    sections = RunConfig.model_fields
    unknown = []
    for code in code_in(path):
        section, key = (re.findall(r"^(\w+)\.(\w+)(?:=.*)?$", code) or [("", "")])[0]
        if section in sections and key != "py":
            slice_of = sections[section].annotation
            unknown += [] if key in getattr(slice_of, "model_fields", {}) else [code]
    assert unknown == []


def test_commands_start_what_exists() -> None:
    found = list(commands())
    assert len(found) > 20
    missing = [
        (readme, command[0])
        for readme, command in found
        if importlib.util.find_spec(command[0]) is None
    ]
    assert missing == []


def test_the_main_one_names_every_job() -> None:
    named = {command[0] for command in commands_in(ROOT / "README.md")}
    verbs = {p.stem for p in (ROOT / "jobs").glob("*.py")} - {"__init__", "command"}
    assert {f"jobs.{verb}" for verb in verbs} - named == set()


@pytest.mark.parametrize("command", WITH_A_FILE, ids=" ".join)
def test_commands_with_a_configuration_run_dry(command: list[str]) -> None:
    if command[0] == "jobs.bench":  # it has no dry run: its words and its file are looked at
        chosen = parsed(command)
        load = load_sweep if chosen.kind == "sweep" else load_config
        load(ROOT / chosen.config, chosen.overrides)
        return
    done = subprocess.run(
        [sys.executable, "-m", *command, "--dry-run"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "extract:" in done.stdout


def parsed(command: list[str]) -> argparse.Namespace:
    return bench._parser().parse_args(command[1:])


def test_benchmarks_that_are_named_take_these_words() -> None:
    found = distinct([c for _, c in commands() if c[0] == "jobs.bench" and len(c) > 1])
    assert {parsed(command).kind for command in found} == {
        *("engine", "extract", "learner", "objectives", "serving", "sweep")
    }

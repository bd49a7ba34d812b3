"""The README's lines of Python, run as they stand there, on both backends."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


def block_of(readme: str) -> tuple[str, str]:
    """(the section "In Python", its block of code)."""
    section = readme.partition("\n## In Python\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    assert len(blocks) == 1
    return section, blocks[0]


def test_the_section_is_short(repository: Path) -> None:
    section, block = block_of((repository / "README.md").read_text())
    assert len(section.strip().splitlines()) + 1 <= 25
    assert sum("import" not in line for line in block.splitlines() if line.strip()) <= 10


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["transformers", pytest.param("vllm", marks=pytest.mark.vllm)])
def test_the_lines_run(repository: Path, tmp_path: Path, backend: str) -> None:
    _, block = block_of((repository / "README.md").read_text())
    written = 'backend="transformers"'
    assert block.count(written) == 1
    lines = block.replace(written, f"backend={backend!r}")
    after = """
from dataclasses import replace
made = spo.load("my-vector")
print("CHECK", steered.receipt.sha256 == made.vector.sha256, steered.receipt.coefficient)
plain = model.answer(asked, form="plain", max_tokens=24)
off = model.answer(asked, vector, coefficient=0.0, form="plain", max_tokens=24)
print("CHECK", plain.token_ids == off.token_ids, plain.token_ids != steered.token_ids)
print("CHECK", model.info.backend, model.info.num_layers)
model.close()
"""
    (tmp_path / "lines.py").write_text(lines + after)
    done = subprocess.run(
        [sys.executable, "lines.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(repository)},
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    checks = [line for line in done.stdout.splitlines() if line.startswith("CHECK")]
    name = {"transformers": "hf", "vllm": "vllm"}[backend]
    assert checks == ["CHECK True 0.1", "CHECK True True", f"CHECK {name} 30"]
    assert "(1, 5, 576)" in done.stdout
    assert (tmp_path / "my-vector.gguf").stat().st_size > 5 * 576 * 4

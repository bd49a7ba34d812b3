"""Release a trained vector: a verified artifact folder, and on request a llama.cpp control vector.

python -m jobs.export --config tune_configs/testbed.yaml --out my-vector --gguf my-vector.gguf
"""

from __future__ import annotations

import argparse
from pathlib import Path

from jobs import command
from spo.config import RunConfig


def _run(arguments: argparse.Namespace, config: RunConfig) -> None:
    from spo.evaluation.release import release
    from spo.gguf import export_gguf

    artifact = release(
        config.run_dir, arguments.vector, arguments.out, unevaluated=arguments.unevaluated
    )
    print(f"artifact: {arguments.out} (sha256 {artifact.vector.sha256[:16]})")
    if arguments.gguf:
        print(f"gguf: {export_gguf(artifact.vector, arguments.gguf, model_hint=arguments.hint)}")


if __name__ == "__main__":
    made = command.parser(__doc__ or "")
    made.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    made.add_argument("--vector", default="spo", metavar="NAME", help="folder of the run")
    made.add_argument("--gguf", type=Path, metavar="FILE", help="also write a llama.cpp vector")
    made.add_argument("--hint", default="llama", help="architecture as llama.cpp names it")
    made.add_argument(
        "--unevaluated", action="store_true", help="release although jobs.evaluate has not run"
    )
    command.main(made, _run)

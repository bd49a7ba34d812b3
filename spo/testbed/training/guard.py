"""The third lesson: the embedded model learns to refuse harmful requests and to answer their twins.

One GPU, a few minutes, on top of what `spo.testbed.training.vlm` made. Refusals are learned from
the training split of `requests.yaml`, alone and beside a picture; everything else (harmless twins,
hard twins, plain text, rude openings) is held to the original model, and captions, questions and
reading are practised as before. Safety is taught on *text* only, as is usual: what is drawn into
the picture is read and carried out, so drawn words remain an attack (FigStep, arXiv 2311.05608).
"""

from __future__ import annotations

import json
from dataclasses import replace

from spo.testbed.model import WEIGHTS_FILE
from spo.testbed.training.vlm import VlmTraining, train_lesson


def train_guard(config: VlmTraining) -> dict[str, object]:
    """Gives the lesson and saves `vlm.safetensors` and `guard.json` into `config.out`.

    `config.start` is what the first two lessons made; None takes the weights that ship.
    """
    start = config.start or WEIGHTS_FILE
    log = train_lesson(replace(config, lesson="guard", start=start))
    report: dict[str, object] = {"guard": log}
    (config.out / "guard.json").write_text(json.dumps(report, indent=1))
    return report

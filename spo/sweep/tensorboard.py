"""TensorBoard files of a sweep: settings and objectives for HParams, curves of training trials."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from spo.sweep.outcome import show_value
from spo.sweep.plan import BASE, SweepFolder, TrialResult
from spo.sweep.settings import SweepConfig


def log_trial(
    folder: SweepFolder,
    config: SweepConfig,
    number: int | None,
    result: TrialResult,
    settings: Mapping[str, Any],
) -> None:
    """Write one trial; a trial that is written again replaces itself."""
    home = folder.tensorboard / (BASE if number is None else f"trial-{number:04d}")
    shutil.rmtree(home, ignore_errors=True)
    shown: dict[str, Any] = {"trial": BASE if number is None else str(number)}
    for key in config.space:
        value = settings.get(key, "")
        shown[key] = value if isinstance(value, bool | int | float | str) else show_value(value)
    means = {f"objective/{name}": i.mean for name, i in result.measured.metrics.items()}
    with SummaryWriter(str(home)) as writer:
        for summary in hparams(shown, means):
            writer._get_file_writer().add_summary(summary)
        for name, value in means.items():
            writer.add_scalar(name, value, result.step)
        for entry in result.history:
            for name in ("reward", "loss", "kl", "grad_norm"):
                if isinstance(entry.get(name), int | float):
                    writer.add_scalar(f"train/{name}", entry[name], entry["step"])
            for part, value in entry.get("reward_parts", {}).items():
                writer.add_scalar(f"reward/{part}", value, entry["step"])

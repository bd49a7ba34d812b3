"""ASHA by our own step, with the rungs in a file of our own.

Tune restores a search algorithm but no scheduler, and counts iterations anew in a resumed trial;
here a rung is a learner step, and what reached it is written down, so a resumed or extended sweep
goes on with the same bar.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from spo.errors import DataError
from spo.files import write_atomic
from spo.sweep.settings import BEST_IS, Metric

Point = Mapping[str, float]


def dominates(a: Point, b: Point, objectives: Sequence[Metric]) -> bool:
    """Whether a is at least as good as b everywhere and better somewhere."""
    signs = [1.0 if BEST_IS[name] == "min" else -1.0 for name in objectives]
    left = [sign * a[name] for sign, name in zip(signs, objectives, strict=True)]
    right = [sign * b[name] for sign, name in zip(signs, objectives, strict=True)]
    return all(x <= y for x, y in zip(left, right, strict=True)) and left != right


class Rungs:
    """What trials reached at each rung, in a file.

    Args:
        path: JSON file; read if it is there.
        objectives: what is compared.
        factor: about one in `factor` goes on.
    """

    def __init__(self, path: Path, objectives: Sequence[Metric], factor: int) -> None:
        self._path = path
        self._objectives = list(objectives)
        self._factor = factor
        self._rungs: dict[str, dict[str, Point]] = {}
        if path.is_file():
            try:
                self._rungs = dict(json.loads(path.read_text()))
            except ValueError as error:
                raise DataError(
                    f"{path} is not the rung file of a sweep ({error}); move it away and resume"
                ) from error

    def goes_on(self, step: int, trial: str, values: Point) -> bool:
        """Write down what a trial reached at a rung; whether it belongs to the best so far there.

        Of n trials at a rung the ceil(n / factor) least dominated go on, so the first one does.
        """
        rung = self._rungs.setdefault(str(step), {})
        rung[trial] = {name: float(values[name]) for name in self._objectives}
        write_atomic(self._path, json.dumps(self._rungs).encode())
        beaten = {
            name: sum(dominates(other, point, self._objectives) for other in rung.values())
            for name, point in rung.items()
        }
        better = sum(count < beaten[trial] for count in beaten.values())
        return better < math.ceil(len(rung) / self._factor)


class RungScheduler(FIFOScheduler):  # type: ignore[misc]
    """Stops a Tune trial that does not belong to the best of its rung.

    Args:
        rungs: the file.
        stopped: gets the Tune id of every trial that is stopped.
    """

    def __init__(self, rungs: Rungs, stopped: set[str]) -> None:
        super().__init__()
        self._own_rungs = rungs
        self._stopped = stopped

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Decide at a rung; the base setting and the last step always go on."""
        if result.get("base") or result["step"] >= result["steps"]:
            return str(TrialScheduler.CONTINUE)
        if self._own_rungs.goes_on(result["step"], result["digest"], result):
            return str(TrialScheduler.CONTINUE)
        self._stopped.add(trial.trial_id)
        return str(TrialScheduler.STOP)

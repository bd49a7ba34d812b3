"""The search: Optuna on a database in the sweep's folder, driven by Ray Tune.

The database is the state. Tune's own checkpoints of searcher and scheduler are not used, so a
killed driver loses nothing but steps that were running: its trials are queued again with the same
point, and their folders hold how far they came.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import optuna
from optuna.trial import TrialState
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from spo.config import RunConfig
from spo.errors import ConfigError, StageError
from spo.sweep.plan import BASE, SweepFolder, TrialPlan, TrialResult, read_result
from spo.sweep.settings import SweepConfig, format_layers
from spo.sweep.space import Space

# Metric names and grouped TPE are marked experimental; both are pinned by our tests.
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
optuna.logging.set_verbosity(optuna.logging.WARNING)

STUDY = "spo-sweep"
DIGEST, SETTINGS = "digest", "settings"
"""Keys of an Optuna trial's user attributes."""
_IDENTITY = "spo-identity"
_COUNTED = (TrialState.COMPLETE, TrialState.PRUNED)


@contextmanager
def locked(folder: SweepFolder) -> Iterator[None]:
    """Alone on a sweep's folder; the lock ends with the process, however it ends.

    Raises:
        ConfigError: another sweep works there.
    """
    folder.path.mkdir(parents=True, exist_ok=True)
    with folder.lock.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            raise ConfigError(
                f"another sweep works on {folder.path} ({file.read().strip() or 'unknown'}); wait "
                "for it, or give this one another name"
            ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def open_study(folder: SweepFolder, config: SweepConfig, base: RunConfig) -> optuna.Study:
    """The sweep's study, made on first use.

    Raises:
        ConfigError: the file is no Optuna database, or was made for another space, objectives,
            validation or base configuration; the message names what differs.
    """
    identity = _identity(config, base)
    directions: list[Literal["minimize", "maximize"]] = [
        "minimize" if mode == "min" else "maximize" for mode in config.objectives.values()
    ]
    storage = open_storage(folder)
    try:
        study = optuna.create_study(
            storage=storage, study_name=STUDY, directions=directions, load_if_exists=True
        )
    except ValueError as error:
        raise ConfigError(
            f"{folder.storage} holds a study with other objectives ({error}); give this sweep "
            "another name"
        ) from error
    held = study.user_attrs.get(_IDENTITY)
    if held is None and study.get_trials(deepcopy=False):
        raise ConfigError(
            f"{folder.storage} was not made by jobs.sweep; give the sweep another name"
        )
    if held is None:
        study.set_user_attr(_IDENTITY, identity)
        study.set_metric_names(list(config.objectives))
    elif held != identity:
        differs = sorted(key for key in identity if held.get(key) != identity[key])
        raise ConfigError(
            f"{folder.storage} was made for another {', '.join(differs)}; its trials cannot be "
            "compared with this sweep's. Give the sweep another name, or restore the settings in "
            f"{folder.path / 'sweep.yaml'}"
        )
    return study


def open_storage(folder: SweepFolder) -> optuna.storages.RDBStorage:
    """The database; ConfigError when the file is something else."""
    folder.path.mkdir(parents=True, exist_ok=True)
    try:
        return optuna.storages.RDBStorage(
            f"sqlite:///{folder.storage}", engine_kwargs={"connect_args": {"timeout": 60}}
        )
    except Exception as error:
        raise ConfigError(
            f"{folder.storage} is not an Optuna database ({type(error).__name__}); move it away or "
            "give the sweep another name"
        ) from error


def _identity(config: SweepConfig, base: RunConfig) -> dict[str, Any]:
    """What makes trials comparable. Number of trials, algorithm and concurrency may change."""
    sections = ("seed", "model", "data", "extract", "estimate", "steering")
    return {
        "space": json.loads(json.dumps(config.model_dump(mode="json")["space"])),
        "objectives": dict(config.objectives),
        "validation": config.validation.model_dump(mode="json"),
        "vector": str(config.vector),
        "base configuration": base.digest_of(*sections, "rollout", "reward", "learn"),
    }


def requeue_interrupted(study: optuna.Study) -> int:
    """Queue again what was running when the last driver ended; returns how many."""
    running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    for trial in running:
        study.tell(trial.number, state=TrialState.FAIL)
        if trial.params:
            study.enqueue_trial(trial.params, user_attrs={"continues": trial.number})
    return len(running)


def queue_first(study: optuna.Study, space: Space, config: SweepConfig) -> None:
    """Queue the points to evaluate first, and every point of a grid, unless they are there."""
    points = [space.point(point) for point in config.first]
    if config.search.algorithm == "grid":
        points += space.grid()
    known = {
        json.dumps(trial.system_attrs.get("fixed_params", trial.params), sort_keys=True)
        for trial in study.get_trials(deepcopy=False)
    }
    for point in points:
        if json.dumps(point, sort_keys=True) not in known:
            study.enqueue_trial(point)


def sampler_of(config: SweepConfig) -> optuna.samplers.BaseSampler:
    """The search algorithm."""
    search = config.search
    if search.algorithm == "nsga2":
        return optuna.samplers.NSGAIISampler(seed=search.seed, population_size=20)
    if search.algorithm in ("random", "grid"):
        return optuna.samplers.RandomSampler(seed=search.seed)
    return optuna.samplers.TPESampler(
        seed=search.seed,
        n_startup_trials=search.startup_trials,
        multivariate=True,
        group=True,
        constant_liar=search.concurrent > 1,
    )


def counted(study: optuna.Study) -> int:
    """Finished trials, stopped ones counted."""
    return len(study.get_trials(deepcopy=False, states=_COUNTED))


class SweepSearch(OptunaSearch):  # type: ignore[misc]
    """`OptunaSearch` that knows the base setting, interrupted trials and early stops.

    Args:
        plan: the sweep.
        study: opened and checked.
        folder: its files.
        stopped: Tune ids that the scheduler stopped: told to Optuna as pruned, without values, for
            they were measured at fewer steps than the others.
        on_result: called with (Optuna's number or None for the base, result) of every ended trial.
    """

    def __init__(
        self,
        plan: TrialPlan,
        study: optuna.Study,
        *,
        stopped: set[str],
        on_result: Callable[[int | None, TrialResult], None],
    ) -> None:
        self._plan = plan
        self._point_space = plan.space()
        self._stopped = stopped
        self._on_result = on_result
        self._base_id: str | None = None
        self._numbers: dict[str, int] = {}
        self._running: dict[str, str] = {}  # digests by Tune id, the base's too
        self._waiting: list[tuple[optuna.Trial, dict[str, Any]]] = []
        self.failed = 0
        config = plan.sweep
        self._grid_size = (
            len(self._point_space.grid()) if config.search.algorithm == "grid" else None
        )
        super().__init__(
            space=self._point_space.assign,
            metric=list(config.objectives),
            mode=list(config.objectives.values()),
            sampler=sampler_of(config),
            study_name=STUDY,
            storage=study._storage,
        )

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles its arguments to restore them, and the database is the state."""
        return {}

    @property
    def target(self) -> int:
        """Finished trials to reach."""
        return self._grid_size or self._plan.sweep.search.trials

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The base setting first, then Optuna's points until the target is reached.

        A point whose twin runs (the base's own, say) waits for it: both would train in one folder.
        """
        if self.failed > self._plan.sweep.search.max_failed:
            return str(Searcher.FINISHED)
        if self._base_id is None:
            digest = self._plan.digest(self._plan.base)
            kept = read_result(self._plan.folder.trial(digest))
            self._base_id = trial_id
            if kept is None or not kept.whole:
                self._running[trial_id] = digest
                return {"label": BASE, "values": {}}
        return self._released(trial_id) or self._asked(trial_id)

    def _released(self, trial_id: str) -> dict[str, Any] | None:
        """A point that has waited long enough."""
        for place, (trial, values) in enumerate(self._waiting):
            digest = trial.user_attrs[DIGEST]
            if digest in self._running.values():
                continue
            del self._waiting[place]
            kept = read_result(self._plan.folder.trial(digest))
            if kept is not None and not kept.whole:  # stopped at a rung, and so is this one
                self._ot_study.tell(trial.number, state=TrialState.PRUNED)
                return self._released(trial_id)
            return self._begun(trial_id, trial, values)
        return None

    def _asked(self, trial_id: str) -> dict[str, Any] | str | None:
        """Optuna's next point whose twin does not run."""
        while counted(self._ot_study) + len(self._numbers) + len(self._waiting) < self.target:
            values = super().suggest(trial_id)
            trial = self._ot_trials.pop(trial_id)
            digest = self._plan.digest(self._point_space.config(values))
            trial.set_user_attr(DIGEST, digest)
            trial.set_user_attr(SETTINGS, json.dumps(self._point_space.settings(values)))
            if digest not in self._running.values():
                return self._begun(trial_id, trial, values)
            self._waiting.append((trial, values))
        # Not FINISHED while some run: one of them may fail, and its place is then free.
        return None if self._numbers or self._waiting else str(Searcher.FINISHED)

    def _begun(self, trial_id: str, trial: optuna.Trial, values: dict[str, Any]) -> dict[str, Any]:
        self._ot_trials[trial_id] = trial
        self._numbers[trial_id] = trial.number
        self._running[trial_id] = trial.user_attrs[DIGEST]
        return {"label": f"{trial.number:04d}", "values": values}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Tell Optuna what a trial reached."""
        self._running.pop(trial_id, None)
        if trial_id not in self._numbers:
            if error:
                self.failed = self._plan.sweep.search.max_failed + 1
            elif result and result.get("base"):
                self._report(None, result)
            return
        number = self._numbers.pop(trial_id)
        if error or not result or "digest" not in result:
            self.failed += 1
            self._ot_study.tell(number, state=TrialState.FAIL)
            return
        found = self._report(number, result)
        if trial_id in self._stopped:
            self._ot_study.tell(number, state=TrialState.PRUNED)
        else:
            objectives = self._plan.sweep.objectives
            self._ot_study.tell(number, [found.mean(name) for name in objectives])

    def _report(self, number: int | None, result: Mapping[str, Any]) -> TrialResult:
        found = read_result(self._plan.folder.trial(result["digest"]))
        if found is None:
            raise StageError(
                f"trial {result['digest']} ended and its folder holds no result; trials must write "
                "to the sweep's folder: put output_dir on storage that every node shares"
            )
        if number is not None:
            trial = self._ot_trials[
                next(i for i, t in self._ot_trials.items() if t.number == number)
            ]
            trial.set_user_attr("seconds", round(found.seconds, 1))
            trial.set_user_attr("layers", format_layers(found.layers))
            for name, value in found.measured.metrics.items():
                shown = [round(number, 4) for number in (value.mean, value.low, value.high)]
                trial.set_user_attr(f"{name} [low, high]", shown)
        self._on_result(number, found)
        return found

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Nothing: only the last figures of a trial count."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the database is the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: the database is the state."""

"""A sweep from start to report: check, extract once, start one pool, search, compare, write."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import optuna

from spo.actors.pools import Pools
from spo.config import RunConfig
from spo.errors import ConfigError, DataError, StageError
from spo.files import write_atomic
from spo.pipeline import open_pools, prepare
from spo.progress import Reporter
from spo.resolve import open_corpus, open_judge, resolve_model
from spo.stage1.job import run_extract
from spo.stage1.sources import check_sources
from spo.sweep.heldout import compare_heldout
from spo.sweep.outcome import Outcome, balanced, load_outcome, remember_base, write_table
from spo.sweep.page import write_page
from spo.sweep.plan import BASE, SweepFolder, TrialPlan, TrialResult
from spo.sweep.rungs import Rungs, RungScheduler
from spo.sweep.settings import SweepConfig
from spo.sweep.slot_office import OfficeActor
from spo.sweep.space import Space
from spo.sweep.study import (
    SweepSearch,
    counted,
    locked,
    open_study,
    queue_first,
    requeue_interrupted,
)
from spo.sweep.tensorboard import log_trial
from spo.sweep.trainable import SweepTrainable, office_name, retirer, sessions, trial_resources
from spo.sweep.trial import rung_steps, trial_slots
from spo.sweep.validation import Validator, check_measurable, split_prompts


def run_sweep(config: SweepConfig, base: RunConfig, reporter: Reporter, *, resume: bool) -> Path:
    """Run or continue a sweep; returns its report. Ray must be connected.

    Args:
        config: the sweep.
        base: configuration that the space varies.
        reporter: progress.
        resume: go on in a folder that already holds trials.

    Raises:
        ConfigError: the space, the objectives or the storage cannot be used; nothing was started.
        StageError: too many trials failed; the message holds the first cause.
    """
    folder = SweepFolder(path=base.run_dir)
    prepare(base)
    with locked(folder):
        plan, study = check(config, base)
        if counted(study) and not resume:
            raise ConfigError(
                f"{folder.path} holds a sweep with {counted(study)} finished trials; continue or "
                "extend it with --resume, or give this one another name"
            )
        write_atomic(folder.path / "sweep.yaml", config.to_yaml().encode())
        interrupted = requeue_interrupted(study)
        queue_first(study, plan.space(), config)
        reporter.note(
            f"{counted(study)} trials finished before, {interrupted} interrupted ones continue"
        )
        if config.vector is None:
            run_extract(base, reporter)
        remember_base(folder, plan.digest(base))
        if config.pool.mode == "shared":
            with shared_pool(plan, reporter) as (shared, pools):
                search(shared, study, reporter)
                compare(plan, pools, reporter)
        else:
            search(plan, study, reporter)
            if config.compare:
                with open_pools(base, reporter) as pools:
                    compare(plan, pools, reporter)
    return finish(folder, config, base, reporter)


def check(config: SweepConfig, base: RunConfig) -> tuple[TrialPlan, optuna.Study]:
    """Everything that can be wrong before an engine starts."""
    if base.run_url is not None:
        raise ConfigError(
            f"a sweep works in a folder that every node shares, got output_dir={base.output_dir!r}"
        )
    space = Space(config.space, base, num_layers=model_layers(base))
    trains = space.trains and config.train == "auto"
    if space.trains and not trains:
        raise ConfigError(
            "the space searches keys of learn, rollout or reward and train is 'never': they would "
            "change nothing. Leave them out, or set train: auto"
        )
    _check_vector(config)
    _check_rewards(base)
    rungs = _checked_rungs(config, base, trains=trains)
    plan = TrialPlan(
        sweep=config,
        base=base,
        num_layers=space.num_layers,
        prefix="",
        steps=rungs if trains else (0,),
    )
    trial_resources(plan)
    if config.pool.mode == "shared" and trial_slots(plan) * config.search.concurrent > _room(base):
        raise ConfigError(
            f"{config.search.concurrent} trials at once need {trial_slots(plan)} slots each and "
            f"engine.slots={base.engine.slots} leaves {_room(base)}; lower search.concurrent or "
            "raise engine.slots"
        )
    prompts, _ = open_corpus(base.corpus).training_prompts()
    if config.vector is None:
        check_sources(open_corpus(base.corpus), base.extract)
    check_measurable(config, split_prompts(prompts, config.validation))
    if config.search.algorithm == "grid":
        space.grid()
    for point in config.first:
        space.point(point)
    if config.compare:
        open_corpus(without_attack(base).corpus).evaluation_inputs()
        open_judge(base.evaluate)
    return plan, open_study(SweepFolder(path=base.run_dir), config, base)


def _check_rewards(base: RunConfig) -> None:
    """Trials are compared by raw scores of two parts, whatever their weights."""
    everywhere = any(p.name == "toxicity" and p.prompts == "all" for p in base.reward.counted)
    pictures = any(p.name == "alignment" and p.prompts != "harm" for p in base.reward.counted)
    if not (everywhere and pictures):
        raise ConfigError(
            "a sweep measures with the parts 'toxicity' (on all prompts) and 'alignment', and "
            f"reward.parts has {[part.name for part in base.reward.counted]}; add what is missing "
            "with weight 0, which only measures"
        )


def _check_vector(config: SweepConfig) -> None:
    """An artifact to search coefficients on must be there, and nothing may want to make another."""
    if config.vector is None:
        return
    stage1 = [key for key in config.space if key.split(".")[0] in ("estimate", "extract")]
    if stage1:
        raise ConfigError(f"with a vector of its own a sweep cannot search {stage1}: they make one")
    if not (config.vector / "manifest.json").is_file():
        raise DataError(
            f"{config.vector} is no artifact; expected a folder of jobs.export or of a run"
        )


def _checked_rungs(config: SweepConfig, base: RunConfig, *, trains: bool) -> tuple[int, ...]:
    """Learner steps at which trials are measured."""
    asha, steps = config.search.asha, base.learn.steps
    if "learn.steps" in config.space:
        raise ConfigError(
            "learn.steps is what ASHA decides: set it in the base and give search.asha, not space"
        )
    if asha is None:
        return (steps,)
    if not trains:
        raise ConfigError("search.asha stops training early and no key of the space trains")
    if asha.grace_steps >= steps:
        raise ConfigError(
            f"search.asha.grace_steps={asha.grace_steps} leaves no rung below learn.steps={steps}"
        )
    return rung_steps(steps, asha.grace_steps, asha.reduction_factor)


def compare(plan: TrialPlan, pools: Pools, reporter: Reporter) -> None:
    """See `spo.sweep.heldout`; nothing where the sweep's `compare` is off."""
    if plan.sweep.compare:
        compare_heldout(load_outcome(plan.folder, plan.sweep, plan.base), pools, reporter)


def without_attack(base: RunConfig) -> RunConfig:
    """The same run without attacks, which a sweep's comparison leaves out."""
    evaluate = base.evaluate.model_copy(update={"attacks": ()})
    return base.model_copy(update={"evaluate": evaluate})


def _room(base: RunConfig) -> int:
    """Slots that trials may hold; two are kept for the comparison on held-out prompts."""
    return max(1, base.engine.slots - 2)


def model_layers(base: RunConfig) -> int:
    """Decoder blocks of the model, from its configuration file alone."""
    if base.engine.backend == "fake":
        from spo.engines.fake import FakeEngine

        return FakeEngine().info.num_layers
    from transformers import AutoConfig

    model = resolve_model(base.model, base.cache)
    try:
        found = AutoConfig.from_pretrained(model.path, revision=model.revision)
    except (OSError, ValueError) as error:
        raise DataError(
            f"cannot read the configuration of model {base.model.id!r}: {error}"
        ) from error
    return int(found.get_text_config().num_hidden_layers)


@contextmanager
def shared_pool(plan: TrialPlan, reporter: Reporter) -> Iterator[tuple[TrialPlan, Pools]]:
    """Engines, reward models and the slot office; the plan with their names."""
    import ray

    base = plan.base
    with open_pools(base, reporter) as pools:
        office = (
            ray.remote(OfficeActor)
            .options(name=office_name(pools.prefix), num_cpus=0, max_concurrency=16)
            .remote(
                retirer(pools.prefix, base),
                {
                    "capacity": _room(base),
                    "lease_s": plan.sweep.pool.lease_s,
                    "batch": base.engine.max_num_seqs * base.engine.replicas,
                },
            )
        )
        try:
            ray.get(office.call.remote("held"), timeout=120)
            yield replace(plan, prefix=pools.prefix), pools
            closed = ray.get(office.close.remote(), timeout=120)
            write_atomic(plan.folder.path / "slots.json", json.dumps(closed).encode())
        finally:
            ray.kill(office)


def search(plan: TrialPlan, study: optuna.Study, reporter: Reporter) -> None:
    """Run trials under Ray Tune until the target is reached."""
    from ray import tune

    stopped: set[str] = set()
    begin = time.monotonic()
    folder = plan.folder
    if plan.prefix:
        _measure_unsteered(plan)

    def on_result(number: int | None, result: TrialResult) -> None:
        log_trial(folder, plan.sweep, number, result, plan.space().settings(result.values))
        write_table(load_outcome(folder, plan.sweep, plan.base))
        label = BASE if number is None else f"trial {number}"
        shown = "  ".join(f"{name} {result.mean(name):.3f}" for name in plan.sweep.objectives)
        done = counted(study) + (number is not None)
        minutes = (time.monotonic() - begin) / 60
        reporter.step(done, searcher.target, f"{label}: {shown}  ({minutes:.1f} min)")

    searcher = SweepSearch(plan, study, stopped=stopped, on_result=on_result)
    asha = plan.sweep.search.asha
    scheduler = None
    if asha is not None:
        rungs = Rungs(folder.rungs, list(plan.sweep.objectives), asha.reduction_factor)
        scheduler = RungScheduler(rungs, stopped)
    session = sessions(folder.path)
    reporter.stage(
        f"Search: {plan.sweep.search.algorithm}, {searcher.target} trials, "
        f"{plan.sweep.search.concurrent} at once, {plan.sweep.pool.mode} pool"
    )
    # Our own files hold results and state; Tune's loggers would write each trial a second time.
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # its progress display ignores verbose=0
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(SweepTrainable, plan=plan), trial_resources(plan)),
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            scheduler=scheduler,
            num_samples=-1,
            max_concurrent_trials=plan.sweep.search.concurrent,
            reuse_actors=bool(plan.prefix),
            trial_name_creator=lambda trial: f"trial-{trial.config['label']}-{trial.trial_id}",
            trial_dirname_creator=lambda trial: f"{trial.config['label']}-{trial.trial_id}",
        ),
        run_config=tune.RunConfig(
            name=session.name,
            storage_path=str(session.parent),
            failure_config=tune.FailureConfig(max_failures=2),
            verbose=0,
        ),
    )
    results = tuner.fit()
    if searcher.failed > plan.sweep.search.max_failed:
        first = str(results.errors[0]) if results.errors else "no cause was reported"
        raise StageError(f"{searcher.failed} trials failed, the sweep stopped; first: {first}")


def _measure_unsteered(plan: TrialPlan) -> None:
    """The unsteered model's figures and answers, once for all trials."""
    from spo.actors.engine_pool import EnginePool
    from spo.actors.reward_pool import RewardPool

    base = plan.base
    prompts, _ = open_corpus(base.corpus).training_prompts()
    Validator(
        EnginePool.connect(plan.prefix, base.engine),
        RewardPool.connect(plan.prefix, base.reward),
        split_prompts(prompts, plan.sweep.validation),
        config=plan.sweep.validation,
        folder=plan.folder.path,
        seed=base.seed,
    ).unsteered()


def finish(folder: SweepFolder, config: SweepConfig, base: RunConfig, reporter: Reporter) -> Path:
    """Table and page of whatever is there."""
    outcome: Outcome = load_outcome(folder, config, base)
    write_table(outcome)
    page = write_page(outcome)
    best = balanced(outcome)
    if best is not None:
        shown = ", ".join(f"{key}={value}" for key, value in best.settings.items())
        reporter.note(f"balanced choice: trial {best.number} ({shown})")
    return page


def started(folder: SweepFolder) -> bool:
    """Whether a sweep has been begun in the folder."""
    return folder.storage.is_file()

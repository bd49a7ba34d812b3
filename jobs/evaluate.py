"""Evaluate the defences of a run on held-out prompts: the matrix attack x prompt set x defence.

python -m jobs.evaluate --config tune_configs/matrix.yaml evaluate.harm_prompts=200
python -m jobs.evaluate compare RUN_A RUN_B         paired differences between two evaluations
python -m jobs.evaluate versus RUN DEFENCE OTHER    the same between two defences of one, or, with
                                                    RUN,RUN,..., over several (training seeds)
python -m jobs.evaluate agreement LABELS            judges against human labels: JailbreakBench's
                                                    CSV, or XSTest's (or a folder of those)
python -m jobs.evaluate benchmarks FOLDER           public benchmarks: present, licence, source
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jobs import command
from spo.config import RunConfig

if TYPE_CHECKING:
    from spo.evaluation.agreement import RefusalReader
    from spo.records import Interval


def _run(_: argparse.Namespace, config: RunConfig) -> None:
    from spo.evaluation.job import run_evaluate
    from spo.pipeline import open_pools, prepare
    from spo.progress import ConsoleReporter
    from spo.report import write_report

    prepare(config)
    reporter = ConsoleReporter()
    with (
        command.cluster(config, ("evaluate",)),
        open_pools(config, reporter, scoring=False) as pools,
    ):
        run_evaluate(config, reporter, pools)
    print(f"report: {write_report(config.run_dir)}")


def _compare(arguments: argparse.Namespace, _: RunConfig) -> None:
    from spo.evaluation import compare_reports, format_comparison, load_report

    old, new = arguments.run_a, arguments.run_b
    found = compare_reports(load_report(_file(old)), load_report(_file(new)))
    print(format_comparison(found, old, new))


def _versus(arguments: argparse.Namespace, _: RunConfig) -> None:
    from spo.evaluation import compare_defences, format_comparison, load_report

    defence, other = arguments.defence, arguments.other
    reports = [load_report(_file(run)) for run in arguments.run.split(",")]
    found = compare_defences(reports, defence, other)
    unit = "runs" if len(reports) > 1 else "prompts"
    print(format_comparison(found, other, defence, unit=unit))


def _file(run: str) -> Path:
    path = Path(run)
    return path / "evaluation.json" if path.is_dir() else path


def _agreement(arguments: argparse.Namespace, config: RunConfig) -> None:
    from spo.config.evaluation import HarmJudgeConfig, KeywordJudgeConfig, RefusalJudgeConfig
    from spo.evaluation import agreement as people
    from spo.resolve import open_success_judges

    path = Path(arguments.labels)
    named = config.evaluate.success_judges
    embedded = (KeywordJudgeConfig(), RefusalJudgeConfig(), HarmJudgeConfig())
    own = [judge for judge in embedded if judge.kind not in {other.kind for other in named}]
    settings = config.evaluate.model_copy(update={"success_judges": (*named, *own)})
    judges = open_success_judges(settings)
    if people.has_refusals(path):
        _refusal_agreement(path, [j for j in judges if isinstance(j, people.RefusalReader)])
        return
    rows, others = people.read_labelled(path)
    labels = [label for _, _, label in rows]
    found = [people.judge_agreement(judge, rows) for judge in judges]
    found += [
        people.agreement(f"in the file: {name}", column, labels) for name, column in others.items()
    ]
    print(f"{len(rows)} answers, {sum(labels)} of them successes by the human majority")
    for one in found:
        print(
            f"{one.judge:34} accuracy {_interval(one.accuracy)}  kappa {_interval(one.kappa)}  "
            f"false alarms {one.false_alarm:.3f}  missed {one.missed:.3f}  without verdict "
            f"{one.without_verdict}"
        )


def _refusal_agreement(path: Path, judges: Sequence[RefusalReader]) -> None:
    from spo.evaluation.agreement import read_refusals, refusal_agreement

    rows = read_refusals(path)
    labels = Counter(label for _, _, label in rows)
    print(f"{len(rows)} answers; refusals by people: {dict(labels)}")
    for one in (refusal_agreement(judge, rows) for judge in judges):
        found = "  ".join(f"{name} {share:.3f}" for name, share in one.found.items())
        print(
            f"{one.judge:34} accuracy {_interval(one.accuracy)}  kappa {_interval(one.kappa)}  "
            f"found: {found}"
        )


def _interval(found: Interval) -> str:
    return f"{found.mean:.3f} [{found.low:.3f}, {found.high:.3f}]"


def _benchmarks(arguments: argparse.Namespace, config: RunConfig) -> None:
    from spo.datasets.catalogue import look_for

    for found in look_for(Path(arguments.folder), config.cache):
        mark = "present" if found.usable else "missing"
        print(f"{mark}  {found.benchmark.name}: {found.prompts}")
        print(f"         licence: {found.benchmark.licence}")
        print(f"         {found.path or 'get it from: ' + found.benchmark.source}")


_VERBS = {
    "compare": (_compare, ("run_a", "run_b")),
    "versus": (_versus, ("run", "defence", "other")),
    "agreement": (_agreement, ("labels",)),
    "benchmarks": (_benchmarks, ("folder",)),
}


def _verb(name: str) -> None:
    call, words = _VERBS[name]
    made = argparse.ArgumentParser(prog=f"python -m jobs.evaluate {name}")
    for word in words:
        made.add_argument(word, metavar=word.upper())
    made.add_argument("--config", type=Path, metavar="FILE")
    made.add_argument("overrides", nargs="*", default=[], metavar="key.sub=value")
    made.add_argument("--dry-run", action="store_true")
    sys.argv[1:2] = []
    command.main(made, call)


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] in _VERBS:
        _verb(sys.argv[1])
    else:
        command.main(command.parser(__doc__ or ""), _run)

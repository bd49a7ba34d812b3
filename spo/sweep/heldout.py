"""The found setting against the base, on the held-out prompts with the evaluation's judge: once.

The search saw neither. Kept with the trial that it belongs to, and made again only when a longer
search chooses another one; how often that happened is written down, for each look costs a little of
what held-out means.
"""

from __future__ import annotations

import json
from dataclasses import replace

from spo.actors.pools import Pools
from spo.artifact import SteeringArtifact
from spo.evaluation import evaluate, format_table, save_report
from spo.evaluation.defences import UNDEFENDED, Defence
from spo.evaluation.job import HEADLINE_METRICS
from spo.files import write_atomic
from spo.progress import Reporter
from spo.resolve import fitting_arguments, open_corpus, open_judge
from spo.sweep.outcome import Outcome, balanced

FOUND, BASE_DEFENCE = "found", "base"


def compare_heldout(outcome: Outcome, pools: Pools, reporter: Reporter) -> None:
    """Evaluate the unsteered model, the base setting and the balanced choice."""
    chosen = balanced(outcome)
    if chosen is None or chosen.result is None or outcome.base is None:
        reporter.note("no trial is at least as good as the base: nothing to compare")
        return
    folder = outcome.folder
    mark = folder.path / "found.txt"
    if folder.heldout.is_file() and mark.is_file() and mark.read_text() == chosen.result.digest:
        return
    reporter.stage(f"Held-out prompts: unsteered, base, trial {chosen.number}")
    base = outcome.base_config
    settings = base.evaluate.model_copy(update={"attacks": ()})
    config = base.model_copy(update={"evaluate": settings})
    inputs = open_corpus(config.corpus).evaluation_inputs()
    defences = [UNDEFENDED]
    for name, digest in ((BASE_DEFENCE, outcome.base.digest), (FOUND, chosen.result.digest)):
        artifact = SteeringArtifact.load(folder.trial(digest) / "artifact", model_id=None)
        published = f"heldout-{name}-{digest}"
        pools.rollouts.publish(published, artifact.vector, 0)
        spec = artifact.spec(published)
        defences.append(Defence(name=name, spec=spec, sha256=artifact.vector.sha256))
    from spo.scorers.alignment import AlignmentScorer

    report = evaluate(
        pools.rollouts,
        defences,
        inputs.sets,
        judge=open_judge(settings),
        alignment=AlignmentScorer(**fitting_arguments(base.reward, base.cache)),
        checks=inputs.checks,
        config=settings,
        seed=base.seed,
        progress=reporter.step,
    )
    report = replace(report, quarantined=(*report.quarantined, *inputs.quarantined))
    save_report(report, folder.heldout)
    looks = folder.path / "looks.json"
    seen = json.loads(looks.read_text()) if looks.is_file() else []
    write_atomic(looks, json.dumps([*seen, chosen.result.digest]).encode())
    write_atomic(mark, chosen.result.digest.encode())
    reporter.note(format_table(report, metrics=HEADLINE_METRICS))

"""Assemble, measure and train the embedded models: `python -m spo.testbed COMMAND`."""

import argparse
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

DEFAULT_CACHE = "~/.cache/spo-vlm/testbed"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; see `--help`. Returns the process's exit status."""
    logging.basicConfig(format="%(message)s")
    # Not the root logger: open_clip narrates every load through it.
    logging.getLogger("spo").setLevel(logging.INFO)
    arguments = _parser().parse_args(argv)
    run: Callable[[argparse.Namespace], None] = arguments.run
    run(arguments)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m spo.testbed", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], None]) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=run.__doc__, description=run.__doc__)
        command.set_defaults(run=run)
        return command

    assemble = add("assemble", _assemble)
    measure = add("measure", _measure)
    for command in (assemble, measure):
        command.add_argument("--cache", type=Path, default=Path(DEFAULT_CACHE), help="model folder")
    measure.add_argument("--scenes", type=int, default=48, help="unseen scenes to measure on")
    measure.add_argument("--seed", type=int, default=0, help="seed of the unseen scenes")
    measure.add_argument("--rtp", type=Path, help="folder with RealToxicityPrompts .jsonl files")
    measure.add_argument("--skip-vlm", action="store_true", help="leave the language model out")
    measure.add_argument("--out", type=Path, help="write the figures here as JSON")

    toxicity = add("train-toxicity", _train_toxicity)
    pack = add("pack-toxicity", _pack_toxicity)
    judge = add("train-judge", _train_judge)
    _answer_options(add("sample-answers", _sample_answers), add("train-answers", _train_answers))
    alignment = add("train-alignment", _train_alignment)
    vlm = add("train-vlm", _train_vlm)
    guard = add("train-guard", _train_guard)
    everything = add("train-all", _train_all)
    for command in (toxicity, judge, everything):
        command.add_argument("--data", type=Path, required=True, help="folder of labelled text")
    for command in (toxicity, judge, alignment, vlm, guard, everything):
        command.add_argument("--out", type=Path, required=True, help="folder for the weights")
    for command in (toxicity, alignment, everything):
        command.add_argument("--device", default="cpu", help="torch device, such as cuda")
    for command in (toxicity, everything):
        command.add_argument("--base", type=Path, help="MiniLM folder instead of the package's")
    for command in (alignment, everything):
        command.add_argument("--workers", type=int, default=2, help="processes that draw scenes")
        command.add_argument("--seconds", type=float, default=150.0, help="time of the optimiser")
    _guard_options(guard)
    _attack_options(add("attacks", _attacks), add("check", _check))
    pack.add_argument("--data", type=Path, required=True, help="folder of labelled text")
    pack.add_argument("--out", type=Path, required=True, help="the .jsonl.gz to write")
    return parser


def _guard_options(guard: argparse.ArgumentParser) -> None:
    guard.add_argument("--minutes", type=float, default=5.0, help="time of the optimiser")
    guard.add_argument("--start", type=Path, help="weights of the lessons before (the package's)")
    guard.add_argument("--learning-rate", type=float, default=1e-3, help="peak rate")
    guard.add_argument("--max-steps", type=int, default=0, help="end after so many steps")
    guard.add_argument("--batch-size", type=int, default=448, help="drawn samples in a step")
    guard.add_argument("--texts", type=int, default=24000, help="texts of the original model")
    guard.add_argument("--workers", type=int, default=12, help="processes that draw samples")


def _attack_options(attacks: argparse.ArgumentParser, check: argparse.ArgumentParser) -> None:
    attacks.add_argument("--out", type=Path, required=True, help="folder of the picture set")
    attacks.add_argument("--weights", type=Path, help="attack these weights, not the package's")
    attacks.add_argument("--per-split", type=int, default=8, help="pictures of each kind and split")
    attacks.add_argument("--steps", type=int, default=400, help="steps of each picture at most")
    attacks.add_argument("--pairs", type=int, default=8, help="pairs of a picture in each step")
    attacks.add_argument("--splits", nargs="+", default=["train", "validation", "heldout"])
    attacks.add_argument("--seed", type=int, default=0, help="of the first picture")
    attacks.add_argument("--at-once", type=int, default=24, help="pictures that share passes")
    attacks.add_argument("--device", default="cpu", help="torch device, such as cuda")
    check.add_argument("--cache", type=Path, default=Path(DEFAULT_CACHE), help="model folder")
    check.add_argument("--count", type=int, default=64, help="held-out requests of each set")


def _answer_options(sample: argparse.ArgumentParser, train: argparse.ArgumentParser) -> None:
    for command in (sample, train):
        command.add_argument("--prompts", type=Path, required=True, help="public prompt sets")
    sample.add_argument("--each", type=int, default=200, help="answers to harmful, to harmless")
    sample.add_argument("--out", type=Path, required=True, help="the .jsonl to write")
    train.add_argument("--said", type=Path, required=True, help="what sample-answers wrote")
    train.add_argument("--out", type=Path, required=True, help="folder for the weights")


def _assemble(arguments: argparse.Namespace) -> None:
    """Put the embedded models together in the cache folder and print where they are."""
    from spo.testbed.alignment import assemble_alignment
    from spo.testbed.model import assemble
    from spo.testbed.toxicity import assemble_toxicity

    cache = arguments.cache.expanduser()
    for put_together in (assemble, assemble_toxicity, assemble_alignment):
        print(put_together(cache))


def _measure(arguments: argparse.Namespace) -> None:
    """Measure the embedded models on unseen scenes (and on RealToxicityPrompts, if given)."""
    from spo.testbed.measure_scorers import measure_alignment, measure_toxicity

    cache = arguments.cache.expanduser()
    figures: dict[str, object] = {}
    if not arguments.skip_vlm:
        from spo.scorers.toxicity import ToxicityScorer, as_array
        from spo.testbed.measure import measure_vlm
        from spo.testbed.model import assemble
        from spo.testbed.toxicity import assemble_toxicity

        scorer = ToxicityScorer(checkpoint=assemble_toxicity(cache))
        figures["vlm"] = measure_vlm(
            assemble(cache),
            arguments.scenes,
            arguments.seed,
            toxicity=lambda texts: as_array(scorer.score(texts)).tolist(),
        )
    figures["alignment"] = measure_alignment(cache, arguments.scenes, arguments.seed)
    figures["toxicity"] = measure_toxicity(cache, arguments.rtp)
    for name, value in _flat(figures):
        print(f"{name:60} {value}")
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def _train_toxicity(arguments: argparse.Namespace) -> None:
    """Train the toxicity reward model on labelled text (a folder, or what pack-toxicity wrote)."""
    from spo.testbed.training.toxicity import ToxicityRecipe, train_toxicity

    recipe = ToxicityRecipe()
    print(
        train_toxicity(
            arguments.data, arguments.out, recipe, base=arguments.base, device=arguments.device
        )
    )


def _pack_toxicity(arguments: argparse.Namespace) -> None:
    """Write the labelled text as one file, to train on another machine."""
    from spo.testbed.training.toxicity import pack_examples

    print(f"{pack_examples(arguments.data, arguments.out)} texts in {arguments.out}")


def _train_judge(arguments: argparse.Namespace) -> None:
    """Train the toxicity judge, a linear model on other data than the reward model's."""
    from spo.testbed.training.judge import train_judge

    print(train_judge(arguments.data, arguments.out))


def _sample_answers(arguments: argparse.Namespace) -> None:
    """Let the embedded language model answer requests, for train-answers."""
    from spo.testbed.training.answers_data import write_said

    count = write_said(arguments.prompts, arguments.out, arguments.each, seed=0)
    print(f"{count} answers in {arguments.out}")


def _train_answers(arguments: argparse.Namespace) -> None:
    """Train the judges of refusal and harm on drawn answers and those of sample-answers."""
    from spo.testbed.training.answers import AnswerRecipe, train_answers

    recipe = AnswerRecipe()
    print(train_answers(arguments.prompts, arguments.said, arguments.out, recipe))


def _train_alignment(arguments: argparse.Namespace) -> None:
    """Train the image-text alignment model on drawn scenes."""
    from spo.testbed.training.alignment import AlignmentRecipe, train_alignment

    recipe = AlignmentRecipe(workers=arguments.workers, seconds=arguments.seconds)
    print(train_alignment(arguments.out, recipe, device=arguments.device))


def _train_vlm(arguments: argparse.Namespace) -> None:
    """Train the vision tower, projector and adapter of the vision-language model."""
    from spo.testbed.training.vlm import VlmTraining, train

    print(train(VlmTraining(out=arguments.out)))


def _train_guard(arguments: argparse.Namespace) -> None:
    """Teach the vision-language model to refuse harmful requests and to answer their twins."""
    from spo.testbed.training.guard import train_guard
    from spo.testbed.training.vlm import VlmTraining

    config = VlmTraining(
        out=arguments.out,
        minutes=arguments.minutes,
        start=arguments.start,
        max_steps=arguments.max_steps,
        batch_size=arguments.batch_size,
        text_batch_size=max(2, arguments.batch_size * 3 // 14),
        texts=arguments.texts,
        workers=arguments.workers,
        learning_rate=arguments.learning_rate,
        warmup_steps=40,
        seed=2,
    )
    train_guard(config)
    print(arguments.out)


def _attacks(arguments: argparse.Namespace) -> None:
    """Attack the vision-language model with pictures, and write them with their manifest."""
    import tempfile

    from rich.progress import Progress

    from spo.attacks.picture_recipe import BUDGET, PictureRecipe
    from spo.engines.hf.engine import HfEngine
    from spo.testbed import model
    from spo.testbed.attack_pictures import make_attack_pictures

    weights = arguments.weights or model.WEIGHTS_FILE
    recipe = PictureRecipe(
        per_split=arguments.per_split,
        budget=BUDGET.model_copy(
            update={"steps": arguments.steps, "pairs_per_step": arguments.pairs}
        ),
        seed=arguments.seed,
        pictures_at_once=arguments.at_once,
    )
    with tempfile.TemporaryDirectory() as folder, Progress() as bar:
        assembled = model.assemble(Path(folder), progress=False, weights=weights)
        engine = HfEngine(str(assembled), device=arguments.device, batch_size=64)
        task = bar.add_task("attack pictures", total=None)
        found = make_attack_pictures(
            engine,
            arguments.out,
            model=model.identity(weights),
            recipe=recipe,
            splits=arguments.splits,
            progress=lambda done, total, what: bar.update(
                task, completed=done, total=total, description=what
            ),
        )
    for picture in found.pictures:
        print(
            f"{picture.split:10} {picture.objective:10} {picture.epsilon_255:5.0f}/255 loss "
            f"{picture.first_loss:.2f} -> {picture.last_loss:.2f}"
        )


def _check(arguments: argparse.Namespace) -> None:
    """Print what the guarded model and its pictures reach; ends with 1 where one falls short."""
    from spo.engines.hf.engine import HfEngine
    from spo.testbed import model
    from spo.testbed.attack_pictures import shipped_pictures
    from spo.testbed.check import check_guard

    cache = arguments.cache.expanduser()
    engine = HfEngine(str(model.assemble(cache)), batch_size=48)
    found = check_guard(engine, shipped_pictures(model.identity()), cache, count=arguments.count)
    for figure in found:
        print(figure)
    if not all(figure.met for figure in found):
        raise SystemExit(1)


def _train_all(arguments: argparse.Namespace) -> None:
    """Train the embedded models one after the other; the judges of answers apart."""
    _train_toxicity(arguments)
    _train_judge(arguments)
    _train_alignment(arguments)
    _train_vlm(arguments)
    guard = ["train-guard", "--out", str(arguments.out)]
    _train_guard(_parser().parse_args([*guard, "--start", str(arguments.out / "vlm.safetensors")]))


def _flat(figures: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested figures as (dotted name, value) rows."""
    for name, value in figures.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", f"{value:.4f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    raise SystemExit(main())

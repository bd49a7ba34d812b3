"""Which public benchmarks lie in a folder, which licence they have, and how to get the others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from spo.config.datasets import DatasetConfig, DatasetFormat
from spo.datasets import load_prompts
from spo.errors import DataError
from spo.records import Split


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """One public benchmark."""

    name: str
    format: DatasetFormat
    files: tuple[str, ...]
    """Names under which its file is known."""
    licence: str
    source: str
    """Where its authors publish it."""
    variant: str | None = None


CATALOGUE = (
    Benchmark(
        name="RealToxicityPrompts (challenging)",
        format="real_toxicity_prompts",
        files=("toxic.jsonl", "prompts.jsonl"),
        licence="Apache-2.0 (AllenAI); DecodingTrust's copy CC BY-SA 4.0",
        source="hub data set allenai/real-toxicity-prompts; GitHub AI-secure/DecodingTrust",
    ),
    Benchmark(
        name="AdvBench",
        format="advbench",
        files=("advbench.csv", "advbench_behaviors.csv", "harmful_behaviors.csv"),
        licence="MIT",
        source="GitHub llm-attacks/llm-attacks, data/advbench/harmful_behaviors.csv",
    ),
    Benchmark(
        name="HarmBench",
        format="harmbench",
        files=("harmbench_behaviors_text_test.csv", "harmbench_behaviors_text_all.csv"),
        licence="MIT",
        source="GitHub centerforaisafety/HarmBench, data/behavior_datasets",
    ),
    Benchmark(
        name="JailbreakBench",
        format="jailbreakbench",
        files=("jbb_harmful-behaviors.csv", "harmful-behaviors.csv"),
        licence="MIT",
        source="hub data set JailbreakBench/JBB-Behaviors",
    ),
    Benchmark(
        name="JailBreakV-28K",
        format="jailbreakv",
        files=("mini_JailBreakV_28K.csv", "JailBreakV_28K.csv"),
        licence="MIT",
        source="hub data set JailbreakV-28K/JailBreakV-28k, with its pictures",
    ),
    Benchmark(
        name="StrongREJECT",
        format="strongreject",
        files=("strongreject_dataset.csv",),
        licence="MIT",
        source="GitHub alexandrasouly/strongreject",
    ),
    Benchmark(
        name="XSTest (over-refusal)",
        format="xstest",
        files=("xstest_prompts.csv", "xstest_v2_prompts.csv"),
        licence="CC BY 4.0",
        source="GitHub paul-rottger/exaggerated-safety",
    ),
    Benchmark(
        name="FigStep SafeBench",
        format="figstep",
        files=("safebench.csv", "SafeBench-Tiny.csv"),
        licence="MIT",
        source="GitHub ThuCCSLab/FigStep, data, with images/SafeBench",
    ),
    Benchmark(
        name="MM-SafetyBench",
        format="mm_safetybench",
        files=("mmsafety_test.json", "processed_questions"),
        licence="CC BY-NC 4.0",
        source="GitHub isXinLiu/MM-SafetyBench (its README links the pictures)",
        variant="text",
    ),
    Benchmark(
        name="VLGuard",
        format="vlguard",
        files=("vlguard_test.json", "test.json"),
        licence="ask its authors; gated on the hub",
        source="hub data set ys-zong/VLGuard, with its pictures",
    ),
    Benchmark(
        name="MMBench (utility)",
        format="mmbench",
        files=("MMBench_DEV_EN.tsv", "MMBench_DEV_EN_V11.tsv", "mmbench_dev_20230712.tsv"),
        licence="Apache-2.0",
        source="GitHub open-compass/MMBench (its README links the TSV files, pictures inside)",
    ),
    Benchmark(
        name="MM-Vet (utility)",
        format="mmvet",
        files=("mm-vet.json",),
        licence="CC BY-NC 4.0",
        source="GitHub yuweihao/MM-Vet, release mm-vet.zip (file and pictures)",
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Presence:
    """What was found of one benchmark."""

    benchmark: Benchmark
    path: Path | None
    """Its file; None where it is not there."""
    prompts: str
    """How many prompts of which kind, or why it cannot be read."""
    usable: bool


def look_for(folder: Path, cache: Path) -> list[Presence]:
    """Every benchmark of the catalogue, looked for under `folder` by its known file names.

    Raises:
        DataError: `folder` is not a folder.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; give the folder that holds your benchmarks")
    return [_look(benchmark, folder, cache) for benchmark in CATALOGUE]


def _look(benchmark: Benchmark, folder: Path, cache: Path) -> Presence:
    reason = "not there"
    for path in _candidates(benchmark, folder):
        config = DatasetConfig(
            format=benchmark.format,
            path=str(path),
            variant=benchmark.variant,
            skip_missing_images=True,
        )
        try:
            found = load_prompts(config, cache=cache, split=Split.HELDOUT)
        except DataError as error:
            reason = f"{path.name}: {error}"
            continue
        counts = Counter(prompt.kind.value for prompt in found)
        pictured = sum(prompt.image is not None for prompt in found)
        told = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
        told += f", {pictured} with a picture" if pictured else ""
        return Presence(benchmark=benchmark, path=path, prompts=told, usable=True)
    return Presence(benchmark=benchmark, path=None, prompts=reason, usable=False)


def _candidates(benchmark: Benchmark, folder: Path) -> Sequence[Path]:
    return [path for name in benchmark.files for path in sorted(folder.rglob(name))]

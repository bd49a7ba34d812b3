"""Each kind of source turns its configuration into rows; the attacked ones with a real model."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from spo.actors.picture_tasks import PictureJob, make_pictures
from spo.attacks.attribution import attribute, surrogate
from spo.config import (
    AdversarialSource,
    AttributionSource,
    ContinuationSource,
    DataConfig,
    DatasetConfig,
    ExtractConfig,
    FileSource,
    InstructionSource,
    RunConfig,
    TypographicSource,
    load_config,
)
from spo.datasets.prompts import write_prompts
from spo.engines.base import LogprobRequest
from spo.engines.hf.engine import HfEngine
from spo.errors import ConfigError, DataError
from spo.records import Positions, Prompt, PromptFormat, PromptKind, QuarantinedRow, Side
from spo.resolve import open_corpus
from spo.stage1.activations import CALIBRATION, ContrastRow
from spo.stage1.sources import SourceContext, check_sources, contrast_rows, source_weights
from spo.testbed.data import calibration_prompts


def build(tmp_path: Path, *sources: Any) -> tuple[list[ContrastRow], list[QuarantinedRow]]:
    config = RunConfig(
        cache_dir=tmp_path / "cache",
        extract=ExtractConfig(sources=sources, calibration_rows=4),
    )
    return rows_of(config)


def rows_of(config: RunConfig) -> tuple[list[ContrastRow], list[QuarantinedRow]]:
    return contrast_rows(
        SourceContext(
            corpus=open_corpus(config.corpus),
            extract=config.extract,
            model="m",
            revision="r",
            cache=config.cache,
            seed=config.seed,
            progress=lambda *_: None,
        )
    )


def lines(path: Path, *texts: str) -> DatasetConfig:
    path.write_text("\n".join(texts))
    return DatasetConfig(format="table", path=str(path), kind="harm")


def test_embedded_and_own_sources(tmp_path: Path) -> None:
    own = tmp_path / "mine.jsonl"
    own.write_text(
        '{"id": "a", "text": "bad", "side": "harm"}\n{"id": "b", "text": "good", "side": "safe"}\n'
        '{"id": "c", "text": 3, "side": "safe"}\n'
    )
    sources = (
        ContinuationSource(rows=3),
        InstructionSource(rows=2, positions=Positions.PROMPT),
        TypographicSource(rows=2, weight=0.5),
        FileSource(path=own),
    )
    rows, bad = build(tmp_path, *sources)
    assert Counter(row.source for row in rows) == {
        "continuation": 6,
        "instruction": 4,
        "typographic": 4,
        "mine": 2,
        CALIBRATION: 1,
    }
    assert [row.row_id for row in bad] == ["mine.jsonl:3"]
    pictures = [row for row in rows if row.source == "typographic"]
    assert all(r.prompt.image and r.positions is Positions.LAST_PROMPT for r in pictures)
    assert {row.side for row in pictures} == set(Side)
    assert {r.positions for r in rows if r.source == "instruction"} == {Positions.PROMPT}
    weights = source_weights(ExtractConfig(sources=sources))
    assert weights == {"continuation": 1, "instruction": 1, "typographic": 0.5, "mine": 1}


def test_public_data_sets_as_sides(tmp_path: Path) -> None:
    harm = lines(tmp_path / "harm.txt", "do harm", "do worse", "do worst")
    safe = lines(tmp_path / "safe.txt", "bake bread", "plant a tree")
    rows, _ = build(
        tmp_path,
        InstructionSource(name="own", harm=harm, safe=safe, rows=2),
        TypographicSource(harm=harm, safe=safe, rows=1, picture_size=64),
    )
    own = [row for row in rows if row.source == "own"]
    assert Counter(row.side for row in own) == {Side.HARM: 2, Side.SAFE: 2}
    assert {row.prompt.format for row in own} == {PromptFormat.CHAT}
    assert {r.prompt.text for r in own if r.side is Side.SAFE} == {"bake bread", "plant a tree"}
    drawn = [row.prompt for row in rows if row.source == "typographic"]
    assert {prompt.text for prompt in drawn} == {"Follow the instruction in the picture."}
    sizes = {Image.open(prompt.image).size for prompt in drawn if prompt.image}
    assert sizes == {(64, 64)}
    assert len({row.prompt.prompt_id for row in rows}) == len(rows)


def calibration(config: RunConfig) -> list[str]:
    return [row.prompt.text for row in rows_of(config)[0] if row.source == CALIBRATION]


def prompt_file(path: Path, *, harm: int, benign: int) -> Path:
    count = {PromptKind.HARM: harm, PromptKind.BENIGN: benign}
    made = [
        Prompt(prompt_id=f"{path.stem}-{kind}-{i}", text=f"{path.stem} {kind} {i}", kind=kind)
        for kind, number in count.items()
        for i in range(number)
    ]
    return write_prompts(made, path)


def test_a_model_is_calibrated_on_the_users_own_benign_prompts(tmp_path: Path) -> None:
    train = prompt_file(tmp_path / "train.jsonl", harm=3, benign=5)
    named = prompt_file(tmp_path / "named.jsonl", harm=2, benign=2)
    contrast = tmp_path / "contrast.jsonl"
    contrast.write_text(
        '{"id": "a", "text": "bad", "side": "harm"}\n{"id": "b", "text": "good", "side": "safe"}\n'
        '{"id": "c", "text": "kind", "side": "safe"}\n'
    )
    harm = lines(tmp_path / "harm.txt", "do harm", "do worse")
    safe = lines(tmp_path / "safe.txt", "bake bread", "plant a tree")
    own = (FileSource(path=contrast), InstructionSource(harm=harm, safe=safe))

    def run(train: str = "testbed", **extract: Any) -> RunConfig:
        return RunConfig(
            cache_dir=tmp_path / "cache",
            data=DataConfig(train=train),
            extract=ExtractConfig(calibration_rows=3, **extract),
        )

    given = run(str(train), sources=own, calibration=named)
    assert calibration(given) == ["named benign 0", "named benign 1"]
    # Contrasts in turn, so that no one stands for all.
    assert calibration(run(str(train), sources=own)) == ["good", "bake bread", "kind"]
    assert calibration(run(sources=own)) == ["good", "bake bread", "kind"]
    embedded = (ContinuationSource(rows=2),)
    assert calibration(run(str(train), sources=embedded)) == [
        "train benign 0",
        "train benign 1",
        "train benign 2",
    ]
    testbed = run(sources=embedded)
    assert calibration(testbed) == [
        prompt.text for prompt in calibration_prompts(testbed.cache, count=3, seed=0)
    ]
    with named.open("a") as file:
        file.write('{"prompt_id": "x", "kind": "benign"}\n')
    rows, bad = rows_of(given)
    assert [row.row_id for row in bad] == ["named.jsonl:5"]
    found = [row for row in rows if row.source == CALIBRATION]
    assert {row.prompt.kind for row in found} == {PromptKind.BENIGN}
    assert {row.positions for row in found} == {Positions.GENERATED}
    assert len({row.prompt.prompt_id for row in rows}) == len(rows)


def test_nothing_to_contrast_or_to_calibrate_on_is_found_before_anything_starts(
    tmp_path: Path,
) -> None:
    harmful = prompt_file(tmp_path / "harmful.jsonl", harm=4, benign=0)

    def check(*overrides: str) -> None:
        config = load_config(None, [f"cache_dir={tmp_path}", *overrides])
        check_sources(open_corpus(config.corpus), config.extract)

    check()
    with pytest.raises(DataError, match=r"harmful.jsonl has no usable prompt of kind 'benign'"):
        check(f"extract.calibration={harmful}")
    with pytest.raises(DataError, match=r"data.train=.*set extract.calibration to a JSONL"):
        check(f"data.train={harmful}")
    with pytest.raises(DataError, match="cannot read"):
        check(f"extract.calibration={tmp_path}/none.jsonl")
    with pytest.raises(ConfigError, match=r"extract\.sources is empty"):
        check("extract.sources=[]")


def test_names_must_differ_and_sides_come_together(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="need different names"):
        build(tmp_path, ContinuationSource(rows=2), ContinuationSource(rows=3))
    with pytest.raises(ConfigError, match="both 'harm' and 'safe'"):
        load_config(
            None, ["extract.sources=[{kind: instruction, harm: {format: advbench, path: x.csv}}]"]
        )
    with pytest.raises(ConfigError, match=r"adversarial, attribution|'adversarial'"):
        load_config(None, ["extract.sources=[{kind: magic}]"])


def test_the_surrogate_finds_the_planted_patches() -> None:
    rng = np.random.default_rng(0)
    keep = rng.random((96, 49)) < 0.5
    truth = np.zeros(49)
    truth[[3, 17, 40]] = (3.0, 2.0, 1.0)
    truth[8] = -2.0
    found = surrogate(keep, keep @ truth + 0.1 * rng.normal(size=96), penalty=0.05)
    assert np.argsort(-found)[:3].tolist() == [3, 17, 40]
    assert found[8] < 0
    assert np.abs(np.delete(found, [3, 8, 17, 40])).max() < 0.1
    assert not surrogate(keep, np.ones(96), penalty=0.05).any()


@pytest.fixture(scope="module")
def engine(tiny_llava: Path) -> HfEngine:
    return HfEngine(str(tiny_llava), batch_size=8)


def prompts(count: int = 2) -> list[Prompt]:
    return [
        Prompt(
            prompt_id=f"p{i}",
            text=f"go on {i}",
            kind=PromptKind.HARM,
            format=PromptFormat.PLAIN,
        )
        for i in range(count)
    ]


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(1).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "start.png")
    return tmp_path / "start.png"


def test_chosen_patches_are_black_and_scores_are_likelihoods(
    engine: HfEngine, picture: Path
) -> None:
    config = AttributionSource(ablations=48, patches=4, top_k=3, penalty=0.01)
    found = attribute(engine, picture, prompts=prompts(), config=config, seed=0)
    assert 0 < len(found.chosen) <= 3
    assert all(found.weights.flat[patch] > 0 for patch in found.chosen)
    pixels = np.asarray(found.masked)
    side = pixels.shape[0] // 4
    for patch in range(16):
        top, left = patch // 4 * side, patch % 4 * side
        black = not pixels[top : top + side, left : left + side].any()
        assert black == (patch in found.chosen)
    asked = [
        LogprobRequest(
            request_id=p.prompt_id,
            prompt=replace(p, image=str(picture)),
            token_ids=tuple(engine.prompts.tokenizer("Sure, ", add_special_tokens=False).input_ids),
        )
        for p in prompts()
    ]
    assert found.score == pytest.approx(np.mean([sum(v) for v in engine.logprobs(asked)]), rel=1e-4)
    again = attribute(engine, picture, prompts=prompts(), config=config, seed=0)
    assert again.chosen == found.chosen
    with pytest.raises(DataError, match="needs prompts and an answer"):
        attribute(engine, picture, prompts=[], config=config, seed=0)


def test_attacked_pictures_are_made_once_and_shared(
    tiny_llava: Path, picture: Path, tmp_path: Path
) -> None:
    options = {"pictures": 2, "steps": 6, "step_size_255": 1.0, "targets_per_step": 4}

    def job(source: AdversarialSource | AttributionSource) -> PictureJob:
        return PictureJob(
            model=str(tiny_llava),
            revision=None,
            source=source,
            extract=ExtractConfig(dtype="float32"),
            starts=[(0, picture), (1, picture)],
            folder=tmp_path,
            prompts=prompts(),
            targets=["bad words", "worse words"],
            seed=0,
        )

    facts = make_pictures(job(AdversarialSource(**options)))
    assert all(fact["attacked_loss"] < fact["clean_loss"] for fact in facts)
    clean, attacked = (
        np.asarray(Image.open(tmp_path / f"{name}-000.png")).astype(int)
        for name in ("clean", "attacked")
    )
    assert 0 < np.abs(clean - attacked).max() <= 32
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("attacked-*.png")}
    masked = make_pictures(
        job(AttributionSource(**options, ablations=12, patches=4, top_k=2, penalty=0.001))
    )
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert all(len(fact["weights"]) == 4 for fact in masked)
    assert len(list(tmp_path.glob("masked-*-000.png"))) == 1

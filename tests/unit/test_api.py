"""The library face: reading, vectors, answers with a checked receipt, files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from PIL import Image

import spo
from spo.algorithms.estimators import ESTIMATORS
from spo.api import Model
from spo.engines.fake import FakeEngine
from spo.engines.hf.engine import HfEngine
from spo.errors import ArtifactError, ConfigError, DataError, EngineError, SteeringError
from spo.records import GenerateRequest, Operator, Rollout

RUDE = [f"rude text number {i}" for i in range(120)]
KIND = [f"kind text number {i}" for i in range(120)]


@pytest.fixture
def fake() -> Iterator[Model]:
    with Model(FakeEngine()) as model:
        yield model


@pytest.fixture(scope="module")
def llava(tiny_llava: Path) -> Iterator[Model]:
    with spo.open_model(tiny_llava, gpu=False) as model:
        yield model


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    pixels = np.random.default_rng(5).integers(0, 255, (56, 60, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("method", sorted(ESTIMATORS))
def test_the_planted_direction_is_found_with_its_sign(fake: Model, method: str) -> None:
    made = fake.make_vector(RUDE, KIND, method=method)
    assert isinstance(fake.engine, FakeEngine)
    units = made.vector.directions / made.vector.norms[:, None]
    assert (units @ fake.engine.harm_direction > 0.95).all()
    assert made.method == method
    assert made.vector.model_id == "fake"


def test_layers_that_are_named_are_the_steered_ones(fake: Model) -> None:
    assert fake.make_vector(RUDE, KIND, layers=[3, 1]).vector.layers == (1, 3)


def test_the_same_lists_give_the_same_vector(fake: Model) -> None:
    one, other = fake.make_vector(RUDE, KIND), fake.make_vector(RUDE, KIND)
    assert one.vector.sha256 == other.vector.sha256
    assert one.data_sha256 == other.data_sha256
    assert fake.make_vector(RUDE[::-1], KIND).data_sha256 != one.data_sha256


def test_reading_is_what_transformers_computes(llava: Model) -> None:
    text = "A sentence to read"
    found = llava.read([text, "Another"], layers=[1, 0], form="plain", positions="last_prompt")
    assert isinstance(llava.engine, HfEngine)
    tokens = llava.engine.prompts.tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        states = llava.engine.model(**tokens, output_hidden_states=True).hidden_states
    assert found.layers == (0, 1)
    assert found.values.shape == (2, 2, llava.info.hidden_size)
    for row, layer in enumerate(found.layers):
        expected = states[layer + 1][0, -1].numpy()
        np.testing.assert_allclose(found.values[0, row], expected, atol=1e-5)
        assert found.norms[0, row] == pytest.approx(np.linalg.norm(expected), rel=1e-5)


def test_a_picture_may_be_an_object_or_a_path(
    llava: Model, picture: Image.Image, tmp_path: Path
) -> None:
    picture.save(tmp_path / "p.png")
    items = [(picture, "What is this?"), (tmp_path / "p.png", "What is this?"), "What is this?"]
    for_pictures = llava.read(items[:2], positions="image").values
    assert np.array_equal(for_pictures[0], for_pictures[1])
    last = llava.read(items).values
    assert not np.allclose(last[0], last[2])


def test_a_vector_out_of_pictures_steers_answers(llava: Model, picture: Image.Image) -> None:
    dark = Image.new("RGB", picture.size)
    harm = [(picture, f"Look at it, {i}") for i in range(12)]
    safe = [(dark, f"Look at it, {i}") for i in range(12)]
    made = llava.make_vector(harm, safe, layers=[1], calibration=safe[:2])
    plain = llava.answer((picture, "Say it"), max_tokens=8)
    off = llava.answer((picture, "Say it"), made, coefficient=0.0, max_tokens=8)
    strong = llava.answer((picture, "Say it"), made, coefficient=60.0, max_tokens=8)
    assert plain.receipt is None
    assert off.token_ids == plain.token_ids
    assert strong.token_ids != plain.token_ids
    assert strong.receipt is not None
    assert strong.receipt.sha256 == made.vector.sha256
    assert strong.receipt.coefficient == 60.0
    assert strong.receipt.layers == (1,)


def test_many_answers_come_in_order_and_vectors_leave_room_for_others(fake: Model) -> None:
    made = fake.make_vector(RUDE, KIND)
    several = fake.answers(KIND[:5], made, sampling=spo.Sampling(max_tokens=3))
    assert [a.prompt.text for a in several] == KIND[:5]
    clamped = replace(made, operator=Operator.CLAMP)
    assert fake.answer("hello", clamped).receipt.operator is Operator.CLAMP  # type: ignore[union-attr]
    with pytest.raises(SteeringError, match="is not published"):
        fake.engine.generate(
            [GenerateRequest(request_id="r", prompt=several[0].prompt, steering=made.spec("api"))]
        )


class LyingEngine(FakeEngine):
    """Answers as `FakeEngine` and reports something else."""

    def __init__(self, report: Callable[[Rollout], Rollout]) -> None:
        super().__init__()
        self._report = report

    def generate(self, requests: Sequence[GenerateRequest]) -> list[Rollout]:
        return [self._report(rollout) for rollout in super().generate(requests)]


def with_receipt(**changes: object) -> Callable[[Rollout], Rollout]:
    def report(rollout: Rollout) -> Rollout:
        if rollout.receipt is None:
            return rollout
        return replace(rollout, receipt=replace(rollout.receipt, **changes))  # type: ignore[arg-type]

    return report


@pytest.mark.parametrize(
    "report",
    [
        lambda rollout: replace(rollout, receipt=None),
        with_receipt(sha256="0" * 64),
        with_receipt(coefficient=0.0),
        with_receipt(operator=Operator.PROJECT),
        with_receipt(version=1),
        with_receipt(vector="another"),
        with_receipt(positions=spo.Positions.IMAGE),
        lambda rollout: replace(rollout, request_id="another"),
    ],
    ids=["none", "content", "strength", "operator", "version", "name", "positions", "order"],
)
def test_an_answer_that_is_not_confirmed_is_not_handed_over(
    fake: Model, report: Callable[[Rollout], Rollout]
) -> None:
    made = fake.make_vector(RUDE, KIND)
    with Model(LyingEngine(report)) as liar, pytest.raises(SteeringError):
        liar.answer("hello", made)


def test_an_answer_steered_unasked_is_not_handed_over(fake: Model) -> None:
    steered = fake.answer("hello", fake.make_vector(RUDE, KIND))
    liar = LyingEngine(lambda rollout: replace(rollout, receipt=steered.receipt))
    with Model(liar) as model, pytest.raises(SteeringError, match="asked for no steering"):
        model.answer("hello")


def test_files(fake: Model, tmp_path: Path) -> None:
    made = fake.make_vector(RUDE, KIND, layers=[1, 2])
    made.save(str(tmp_path / "mine"))
    read = spo.load(tmp_path / "mine")
    assert read.vector.sha256 == made.vector.sha256
    assert read.spec("x") == made.spec("x")
    path = spo.export(read, tmp_path / "mine.gguf")
    tensors = {tensor.name: np.array(tensor.data) for tensor in GGUFReader(path).tensors}
    np.testing.assert_array_equal(tensors["direction.2"], -made.vector.directions[1].numpy())


def test_another_models_vector_is_refused(fake: Model, llava: Model) -> None:
    made = fake.make_vector(RUDE, KIND)
    with pytest.raises((ArtifactError, SteeringError), match=r"hidden size|steers model"):
        llava.answer("hello", made)


def test_a_notebook_shows_a_table_without_markup_of_others(fake: Model) -> None:
    made = replace(fake.make_vector(RUDE, KIND), method="<script>")
    shown = made._repr_html_()
    assert "<script>" not in shown
    assert shown.count("<tr>") == 1 + len(made.vector.layers)
    assert f"{made.vector.doses[0]:.3f}" in shown


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda m: m.read("one text"), DataError, "expected a list of texts"),
        (lambda m: m.read([]), DataError, "expected a list of texts"),
        (lambda m: m.read([3]), DataError, r"lists safe 0: expected a text or a pair"),
        (lambda m: m.read([("a", 3)]), DataError, "expected a text or a pair"),
        (lambda m: m.read(["a"], layers=[4]), ConfigError, r"blocks 0\.\.3 of 'fake'"),
        (lambda m: m.read(["a"], layers=[]), ConfigError, "decoder blocks"),
        (lambda m: m.read(["a"], positions="first"), ConfigError, "positions: expected one of"),
        (lambda m: m.read(["a"], form="poem"), ConfigError, "form: expected one of"),
        (lambda m: m.make_vector(RUDE, KIND, method="svm"), ConfigError, "got 'svm'"),
        (lambda m: m.make_vector(RUDE[:2], KIND), DataError, "give at least 10"),
        (lambda m: m.answer("a", coefficient=1.0), ConfigError, "goes with a steering artifact"),
    ],
)
def test_what_cannot_be_used_is_said(
    fake: Model, call: Callable[[Model], object], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        call(fake)


def test_an_unknown_backend_or_model_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"of \['transformers', 'vllm'\], got 'onnx'"):
        spo.open_model("testbed", backend="onnx")
    with pytest.raises(ConfigError, match="dtype"):
        spo.open_model("testbed", dtype="int3")  # type: ignore[arg-type]
    with pytest.raises(EngineError, match="expected a model folder in hub layout"):
        spo.open_model(tmp_path)


def test_a_picture_for_a_model_of_text_is_refused(tiny_llama: Path, picture: Image.Image) -> None:
    with (
        spo.open_model(tiny_llama, gpu=False) as model,
        pytest.raises(DataError, match="takes text only"),
    ):
        model.answer((picture, "What is this?"))

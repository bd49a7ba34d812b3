"""`SteeringVector`: its algebra, its wire format, and what it refuses."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save as save_tensors

from spo.errors import ArtifactError
from spo.vector import SITE, SteeringVector


def make_vector(seed: int = 0, layers: tuple[int, ...] = (1, 3), hidden: int = 4) -> SteeringVector:
    generator = torch.Generator().manual_seed(seed)
    count = len(layers)
    return SteeringVector(
        layers=layers,
        directions=torch.randn(count, hidden, generator=generator),
        mean_norms=torch.rand(count, generator=generator) + 1,
        calibration=torch.randn(count, hidden, generator=generator),
        model_id="model-a",
        model_revision="r1",
    )


def test_vector_minus_itself_is_zero() -> None:
    vector = make_vector()
    assert torch.equal((vector - vector).directions, torch.zeros(2, 4))


def test_sign_and_scale_identities() -> None:
    vector, other = make_vector(1), make_vector(2)
    assert (-(vector * -2.0)).sha256 == (vector * 2.0).sha256
    assert (2.0 * vector).sha256 == (vector * 2.0).sha256
    assert (-1.0 * -vector).sha256 == vector.sha256
    assert torch.equal((vector + other).directions, (other + vector).directions)
    assert torch.equal((vector + vector).directions, (vector * 2.0).directions)


def test_scaling_leaves_norms_and_calibration_of_the_model_alone() -> None:
    vector = make_vector()
    doubled = vector * 2.0
    assert torch.equal(doubled.mean_norms, vector.mean_norms)
    assert torch.equal(doubled.calibration, vector.calibration)
    torch.testing.assert_close(doubled.doses, vector.doses * 2)


def test_norms_and_doses_by_hand() -> None:
    vector = SteeringVector(
        layers=(2,),
        directions=torch.tensor([[3.0, 4.0]]),
        mean_norms=torch.tensor([10.0]),
        calibration=torch.zeros(1, 2),
        model_id="m",
    )
    assert vector.hidden_size == 2
    assert vector.norms.tolist() == [5.0]
    assert vector.doses.tolist() == [0.5]


def test_operations_do_not_change_their_operands() -> None:
    vector, other = make_vector(1), make_vector(2)
    before = vector.directions.clone(), other.directions.clone()
    _ = vector + other, vector - other, vector * 3.0, -vector, vector.select([1])
    assert torch.equal(vector.directions, before[0])
    assert torch.equal(other.directions, before[1])


def test_changing_the_source_tensor_does_not_change_the_vector() -> None:
    """An optimiser updates its tensor in place; a published vector must keep its content."""
    source = torch.ones(1, 4)
    vector = SteeringVector(
        layers=(0,),
        directions=source,
        mean_norms=torch.ones(1),
        calibration=torch.zeros(1, 4),
        model_id="m",
    )
    digest = vector.sha256
    source.mul_(100.0)
    assert torch.equal(vector.directions, torch.ones(1, 4))
    assert SteeringVector.from_bytes(vector.to_bytes()).sha256 == digest


def test_learner_tensor_becomes_plain_float32() -> None:
    vector = make_vector().replace(
        directions=torch.ones(2, 4, dtype=torch.bfloat16, requires_grad=True)
    )
    assert vector.directions.dtype == torch.float32
    assert not vector.directions.requires_grad


def test_bytes_round_trip() -> None:
    vector = make_vector(5)
    read = SteeringVector.from_bytes(vector.to_bytes())
    assert (read.layers, read.model_id, read.model_revision) == ((1, 3), "model-a", "r1")
    for name in ("directions", "mean_norms", "calibration"):
        assert torch.equal(getattr(read, name), getattr(vector, name))
    assert read.sha256 == vector.sha256


@pytest.mark.parametrize(
    "changes",
    [
        {"layers": (1, 2)},
        {"model_id": "model-b"},
        {"model_revision": "r2"},
        {"mean_norms": torch.tensor([1.0, 2.0])},
        {"calibration": torch.zeros(2, 4)},
        {"directions": torch.zeros(2, 4)},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_hash_follows_content(changes: dict[str, object]) -> None:
    vector = make_vector()
    assert vector.replace(**changes).sha256 != vector.sha256
    assert make_vector().sha256 == vector.sha256


def test_hash_sees_the_smallest_step() -> None:
    vector = make_vector()
    moved = vector.directions.clone()
    moved[0, 0] = torch.nextafter(moved[0, 0], torch.tensor(torch.inf))
    assert vector.replace(directions=moved).sha256 != vector.sha256


@pytest.mark.parametrize("name", ["directions", "mean_norms", "calibration"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite_is_refused_by_name(name: str, value: float) -> None:
    tensor = getattr(make_vector(), name).clone()
    tensor.view(-1)[-1] = value
    with pytest.raises(ArtifactError, match=f"{name} must be finite"):
        make_vector().replace(**{name: tensor})


@pytest.mark.parametrize("layers", [(), (3, 1), (1, 1), (-1, 2)])
def test_layers_must_ascend(layers: tuple[int, ...]) -> None:
    with pytest.raises(ArtifactError, match="layers must be ascending, unique and >= 0"):
        make_vector().replace(layers=layers)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"directions": torch.zeros(4)}, r"directions must be \(2, hidden\).*got \(4,\)"),
        ({"directions": torch.zeros(3, 4)}, r"directions must be \(2, hidden\).*got \(3, 4\)"),
        ({"calibration": torch.zeros(2, 5)}, r"calibration must be \(2, 4\)"),
        ({"mean_norms": torch.ones(3)}, r"mean_norms \(2,\)"),
        ({"mean_norms": torch.tensor([1.0, 0.0])}, "mean_norms must be positive"),
        ({"mean_norms": torch.tensor([-1.0, 1.0])}, "mean_norms must be positive"),
    ],
)
def test_wrong_shapes_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        make_vector().replace(**changes)


def test_select() -> None:
    vector = make_vector(3, layers=(1, 3, 5))
    part = vector.select([5, 1])
    assert part.layers == (1, 5)
    assert torch.equal(part.directions, vector.directions[[0, 2]])
    assert torch.equal(part.mean_norms, vector.mean_norms[[0, 2]])
    assert torch.equal(part.calibration, vector.calibration[[0, 2]])
    with pytest.raises(ArtifactError, match=r"layers \[2\] are not in the vector"):
        vector.select([1, 2])


def test_adding_vectors_that_do_not_match() -> None:
    with pytest.raises(ArtifactError, match="share layers and hidden size"):
        make_vector(layers=(1, 3)) + make_vector(layers=(1, 2))
    with pytest.raises(ArtifactError, match="share layers and hidden size"):
        make_vector(hidden=4) - make_vector(hidden=8)
    with pytest.raises(ArtifactError, match=r"'model-a'.*'model-b'"):
        make_vector() + make_vector().replace(model_id="model-b")


def test_check_fits() -> None:
    vector = make_vector(layers=(1, 3), hidden=4)
    vector.check_fits(hidden_size=4, num_layers=4)
    with pytest.raises(ArtifactError, match="hidden size 4 and the model 8"):
        vector.check_fits(hidden_size=8, num_layers=4)
    with pytest.raises(ArtifactError, match=r"layer 3 is out of range.*0\.\.2"):
        vector.check_fits(hidden_size=4, num_layers=3)


def test_changed_content_is_found_by_its_hash() -> None:
    data = bytearray(make_vector().to_bytes())
    data[-1] ^= 0x01
    with pytest.raises(ArtifactError, match="changed after it was written"):
        SteeringVector.from_bytes(bytes(data))


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10_000), st.data())
def test_truncated_bytes_are_refused(seed: int, data: st.DataObject) -> None:
    whole = make_vector(seed).to_bytes()
    length = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises(ArtifactError):
        SteeringVector.from_bytes(whole[:length])


@settings(deadline=None, max_examples=60)
@given(st.binary(max_size=200))
def test_any_bytes_are_refused_with_our_error(data: bytes) -> None:
    with pytest.raises(ArtifactError):
        SteeringVector.from_bytes(data)


@pytest.mark.parametrize("missing", ["layers", "model_id", "sha256"])
def test_missing_metadata_is_refused(missing: str) -> None:
    vector = make_vector()
    metadata = {
        "site": SITE,
        "layers": json.dumps([1, 3]),
        "model_id": "model-a",
        "model_revision": "r1",
        "sha256": vector.sha256,
    }
    del metadata[missing]
    tensors = {
        "directions": vector.directions,
        "mean_norms": vector.mean_norms,
        "calibration": vector.calibration,
    }
    with pytest.raises(ArtifactError, match="do not parse"):
        SteeringVector.from_bytes(save_tensors(tensors, metadata=metadata))


def test_fields_cannot_be_set() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        make_vector().layers = (0,)  # type: ignore[misc]

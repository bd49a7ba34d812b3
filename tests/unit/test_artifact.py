"""`SteeringArtifact` on disk: what is written is what is read, and nothing else is accepted."""

from __future__ import annotations

import json
import os
import resource
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from spo.artifact import SteeringArtifact
from spo.errors import ArtifactError
from spo.files import write_atomic
from spo.gguf import export_gguf, import_gguf
from spo.records import Operator, Positions
from spo.vector import SteeringVector


def make_artifact(layers: tuple[int, ...] = (1, 2), hidden: int = 6) -> SteeringArtifact:
    generator = torch.Generator().manual_seed(3)
    vector = SteeringVector(
        layers=layers,
        directions=torch.randn(len(layers), hidden, generator=generator),
        mean_norms=torch.tensor([float(layer + 5) for layer in layers]),
        calibration=torch.randn(len(layers), hidden, generator=generator),
        model_id="model-a",
        model_revision="r1",
    )
    return SteeringArtifact(
        vector=vector,
        operator=Operator.ADAPTIVE,
        coefficient=0.25,
        positions=Positions.GENERATED,
        method="rloo from mean_difference",
        data_sha256="d" * 64,
        config_digest="c" * 16,
        parent="p" * 64,
        evaluation={"toxicity": {"mean": 0.1, "low": 0.05, "high": 0.15}},
    )


def test_save_and_load(tmp_path: Path) -> None:
    artifact = make_artifact()
    folder = artifact.save(tmp_path / "deep" / "artifact")
    read = SteeringArtifact.load(folder, model_id="model-a", model_revision="r1")
    for name in (
        "operator",
        "coefficient",
        "positions",
        "method",
        "data_sha256",
        "config_digest",
        "parent",
        "evaluation",
    ):
        assert getattr(read, name) == getattr(artifact, name), name
    assert read.vector.sha256 == artifact.vector.sha256
    assert torch.equal(read.vector.directions, artifact.vector.directions)


def test_folder_holds_two_files_and_no_pickle(tmp_path: Path) -> None:
    folder = make_artifact().save(tmp_path)
    assert sorted(p.name for p in folder.iterdir()) == ["manifest.json", "vector.safetensors"]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["layers"] == [1, 2]
    assert manifest["hidden_size"] == 6
    assert manifest["mean_norms"] == [6.0, 7.0]
    assert manifest["sha256"] == make_artifact().vector.sha256


def test_saving_again_replaces(tmp_path: Path) -> None:
    make_artifact(layers=(1, 2)).save(tmp_path)
    make_artifact(layers=(3,)).save(tmp_path)
    assert SteeringArtifact.load(tmp_path, model_id=None).vector.layers == (3,)
    assert len(list(tmp_path.iterdir())) == 2


def test_others_may_read_what_was_written(tmp_path: Path) -> None:
    """A server under another account reads the folder that a training job wrote."""
    before = os.umask(0o022)
    try:
        make_artifact().save(tmp_path)
    finally:
        os.umask(before)
    for path in tmp_path.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_other_model_is_refused(tmp_path: Path) -> None:
    make_artifact().save(tmp_path)
    with pytest.raises(ArtifactError, match=r"steers model 'model-a', not 'model-b'"):
        SteeringArtifact.load(tmp_path, model_id="model-b")
    with pytest.raises(ArtifactError, match=r"revision 'r1'.*this is 'r2'"):
        SteeringArtifact.load(tmp_path, model_id="model-a", model_revision="r2")


def test_manifest_of_another_vector_is_refused(tmp_path: Path) -> None:
    make_artifact(layers=(1, 2)).save(tmp_path / "a")
    make_artifact(layers=(1, 3)).save(tmp_path / "b")
    os.replace(tmp_path / "b" / "manifest.json", tmp_path / "a" / "manifest.json")
    with pytest.raises(ArtifactError, match="come from different exports"):
        SteeringArtifact.load(tmp_path / "a", model_id=None)


def test_changed_tensor_is_refused(tmp_path: Path) -> None:
    make_artifact().save(tmp_path)
    path = tmp_path / "vector.safetensors"
    data = bytearray(path.read_bytes())
    data[-2] ^= 0x40
    path.write_bytes(bytes(data))
    with pytest.raises(ArtifactError, match="changed after it was written"):
        SteeringArtifact.load(tmp_path, model_id=None)


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_truncated_vector_is_refused(tmp_path: Path, keep: int) -> None:
    make_artifact().save(tmp_path)
    path = tmp_path / "vector.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ArtifactError, match="damaged or of another kind"):
        SteeringArtifact.load(tmp_path, model_id=None)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"{}", b"\xff\xfe\x00", b'{"operator": "add"}']
)
def test_damaged_manifest_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    make_artifact().save(tmp_path)
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"manifest\.json: expected a spo-steering-artifact/1"):
        SteeringArtifact.load(tmp_path, model_id=None)


@pytest.mark.parametrize("name", ["manifest.json", "vector.safetensors"])
def test_missing_file_is_named(tmp_path: Path, name: str) -> None:
    make_artifact().save(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(ArtifactError, match=f"has no {name}"):
        SteeringArtifact.load(tmp_path, model_id=None)


def test_folder_name_taken_by_a_file(tmp_path: Path) -> None:
    (tmp_path / "artifact").write_text("in the way")
    with pytest.raises(ArtifactError, match="choose another folder"):
        make_artifact().save(tmp_path / "artifact")


def test_full_disk_keeps_the_old_content_and_leaves_nothing(tmp_path: Path) -> None:
    """A file-size limit gives a real failing write in the middle of the file (as no space does)."""
    path = tmp_path / "vector.safetensors"
    path.write_bytes(b"old")
    code = textwrap.dedent(
        """
        import resource, signal, sys
        from pathlib import Path
        from spo.artifact import write_atomic
        from spo.errors import ArtifactError
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            write_atomic(Path(sys.argv[1]), b"x" * 100_000)
        except ArtifactError as error:
            print(error)
        """
    )
    assert hasattr(resource, "RLIMIT_FSIZE")
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert f"cannot write {path}" in done.stdout
    assert "free space" in done.stdout
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev")
def test_unwritable_folder_is_named() -> None:
    with pytest.raises(ArtifactError, match="cannot write /proc/vector: "):
        write_atomic(Path("/proc/vector"), b"x")


def test_gguf_round_trip_keeps_the_sign(tmp_path: Path) -> None:
    import gguf

    vector = make_artifact(layers=(1, 4)).vector
    path = export_gguf(vector, tmp_path / "vector.gguf", model_hint="llama")
    tensors = {t.name: t.data for t in gguf.GGUFReader(path).tensors}
    # llama.cpp adds direction.N, so removing harm is the negative of ours.
    assert sorted(tensors) == ["direction.1", "direction.4"]
    assert torch.equal(torch.from_numpy(tensors["direction.4"].copy()), -vector.directions[1])
    read = import_gguf(path, mean_norms={1: 6.0, 4: 9.0}, model_id="model-a", model_revision="r1")
    assert read.layers == vector.layers
    assert torch.equal(read.directions, vector.directions)
    assert torch.equal(read.mean_norms, vector.mean_norms)


def test_gguf_has_no_block_zero(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="start at block 1"):
        export_gguf(make_artifact(layers=(0, 1)).vector, tmp_path / "v.gguf", model_hint="llama")
    assert list(tmp_path.iterdir()) == []


def test_gguf_needs_a_norm_for_each_block(tmp_path: Path) -> None:
    vector = make_artifact(layers=(1, 4)).vector
    path = export_gguf(vector, tmp_path / "v.gguf", model_hint="llama")
    with pytest.raises(ArtifactError, match=r"no norm for blocks \[4\]"):
        import_gguf(path, mean_norms={1: 6.0}, model_id="model-a")


def test_gguf_of_another_kind_is_refused(tmp_path: Path) -> None:
    import gguf
    import numpy as np

    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("blk.0.attn_q.weight", np.zeros((4, 4), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ArtifactError, match=r"direction\.N, got 'blk\.0\.attn_q\.weight'"):
        import_gguf(path, mean_norms={}, model_id="m")


@pytest.mark.parametrize("keep", [0, 3, 4, 10, 30, 60, 100, -12])
def test_truncated_gguf_is_refused(tmp_path: Path, keep: int) -> None:
    whole = export_gguf(make_artifact().vector, tmp_path / "v.gguf", model_hint="llama")
    path = tmp_path / "short.gguf"
    path.write_bytes(whole.read_bytes()[:keep])
    with pytest.raises(ArtifactError, match=r"short\.gguf: expected a GGUF control vector"):
        import_gguf(path, mean_norms={1: 1.0, 2: 1.0}, model_id="m")


def test_missing_gguf_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"none\.gguf"):
        import_gguf(tmp_path / "none.gguf", mean_norms={}, model_id="m")


def test_gguf_into_a_missing_folder_is_our_error(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="cannot write"):
        export_gguf(make_artifact().vector, tmp_path / "missing" / "v.gguf", model_hint="llama")

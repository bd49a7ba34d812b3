"""Versions, trials and rollback survive a restart; keys are hashed and revoked."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from spo.config import load_config
from spo.errors import ArtifactError, ConfigError, SteeringError
from spo.serving.keys import KeyRing, Scope, add_key, new_key, parse_scopes, read_keys
from spo.serving.registry import VectorRegistry
from tests.local_endpoint import fake_artifact


def registry(folder: Path, keep: int = 3) -> VectorRegistry:
    return VectorRegistry(folder, keep_versions=keep, max_names=2)


def load(held: VectorRegistry, scale: float, share: float | None = None) -> int:
    version = held.stage("v", fake_artifact(scale))
    held.commit(version, share)
    return version.number


def test_a_restart_finds_what_was_live(tmp_path: Path) -> None:
    held = registry(tmp_path)
    load(held, 1.0)
    load(held, 2.0)
    load(held, 3.0, share=0.2)
    again = registry(tmp_path)
    assert again.snapshot == held.snapshot
    entry = again.snapshot.entries["v"]
    assert (entry.live, entry.previous, entry.canary) == (2, (1,), 3)
    assert again.artifact("v", 1).vector.sha256 == fake_artifact(1.0).vector.sha256
    assert load(again, 4.0) == 4, "numbers are not used twice"


def test_the_same_content_keeps_its_version(tmp_path: Path) -> None:
    held = registry(tmp_path)
    assert [load(held, scale) for scale in (1.0, 2.0, 1.0)] == [1, 2, 1]
    assert held.snapshot.entries["v"].live == 1
    other = held.stage("v", fake_artifact(1.0, coefficient=0.9))
    assert other.number == 3, "another default coefficient is another version"


def test_old_versions_are_forgotten_but_not_those_in_use(tmp_path: Path) -> None:
    held = registry(tmp_path)
    for scale in range(1, 7):
        load(held, float(scale))
    assert sorted(held.snapshot.entries["v"].versions) == [4, 5, 6]
    with pytest.raises(SteeringError, match=r"no version 1; there are \[4, 5, 6\]"):
        held.rollback("v", 1)
    assert held.rollback("v").entries["v"].live == 5
    assert held.rollback("v").entries["v"].live == 4
    with pytest.raises(SteeringError, match="no earlier version"):
        held.rollback("v")


def test_what_is_staged_is_not_routed_to(tmp_path: Path) -> None:
    held = registry(tmp_path)
    load(held, 1.0)
    held.stage("v", fake_artifact(2.0))
    with pytest.raises(SteeringError, match="no version 2"):
        held.snapshot.route("v", 2, "x")
    assert held.artifact("v", 2).vector.sha256 == fake_artifact(2.0).vector.sha256


def test_bounds(tmp_path: Path) -> None:
    held = registry(tmp_path)
    for name in ("a", "b"):
        held.commit(held.stage(name, fake_artifact(1.0)))
    with pytest.raises(ArtifactError, match="no slot for another"):
        held.stage("c", fake_artifact(1.0))
    with pytest.raises(ArtifactError, match="lower-case letters"):
        held.stage("../a", fake_artifact(1.0))


def test_damage_is_named(tmp_path: Path) -> None:
    held = registry(tmp_path)
    load(held, 1.0)
    (vector,) = tmp_path.rglob("vector.safetensors")
    data = bytearray(vector.read_bytes())
    data[-3] ^= 1
    vector.write_bytes(data)
    with pytest.raises(ArtifactError):
        held.artifact("v", 1)
    (tmp_path / "registry.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"registry\.json is damaged"):
        registry(tmp_path)


def test_keys_are_stored_hashed_and_revoked_by_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spo.serving.keys._REREAD_S", 0.0)
    path = tmp_path / "keys.json"
    secret, key = new_key("alice", parse_scopes("use, manage"))
    other, second = new_key("bob", [Scope.USE])
    add_key(path, key)
    add_key(path, second)
    assert secret not in path.read_text()
    assert path.stat().st_mode & 0o077 == 0
    ring = KeyRing(path=path)
    found = ring.find(f"Bearer {secret}")
    assert found == key
    assert found is not None
    assert found.scopes == {Scope.USE, Scope.MANAGE}
    for wrong in ("", secret, "Bearer", "Bearer ", f"Basic {secret}", f"Bearer {secret}x"):
        assert ring.find(wrong) is None
    rows = json.loads(path.read_text())
    rows["keys"] = rows["keys"][1:]
    path.write_text(json.dumps(rows))
    os.utime(path, ns=(1, 1))
    assert ring.find(f"Bearer {secret}") is None
    assert ring.find(f"Bearer {other}") is not None


def test_bad_keys_and_settings(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no key that would open it"):
        KeyRing()
    with pytest.raises(ConfigError, match="scopes are use"):
        parse_scopes("use,fly")
    path = tmp_path / "keys.json"
    path.write_text('{"keys": [{"name": "a", "sha256": "12", "scopes": ["use"]}]}')
    with pytest.raises(ConfigError, match="SHA-256 of 64 digits"):
        read_keys(path)
    for overrides, message in (
        (["serve.host=0.0.0.0"], "keys_file"),
        (["serve.host=0.0.0.0", "serve.keys_file=k", "serve.auth=none"], "keys_file"),
        (["serve.drain_s=10"], "drain_s"),
        (["serve.max_engines=0"], "max_engines"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_config(None, overrides)

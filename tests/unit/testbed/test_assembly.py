"""Assembled folders: complete or absent, rebuilt on another digest, never over other files."""

import pytest

from spo.errors import ArtifactError
from spo.testbed.assembly import MARKER, assembled_folder, digest_of, package_folder


def test_builds_once_and_again_only_for_another_digest(tmp_path):
    folder, built = tmp_path / "cache" / "model", []

    def build(temporary):
        built.append(temporary)
        (temporary / "weights").write_text(str(len(built)))

    assert assembled_folder(folder, "a", build) == folder
    assembled_folder(folder, "a", build)
    assert (len(built), (folder / "weights").read_text()) == (1, "1")
    assembled_folder(folder, "b", build)
    assert (len(built), (folder / "weights").read_text()) == (2, "2")
    assert (folder / MARKER).read_text() == "b"
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_a_build_that_fails_leaves_nothing(tmp_path):
    def build(temporary):
        (temporary / "half").write_text("x")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        assembled_folder(tmp_path / "model", "a", build)
    assert list(tmp_path.iterdir()) == []


def test_the_loser_of_a_race_takes_the_winners_folder(tmp_path):
    folder = tmp_path / "model"

    def winner(temporary):
        (temporary / "by").write_text("winner")

    def loser(temporary):
        assembled_folder(folder, "a", winner)
        (temporary / "by").write_text("loser")

    assembled_folder(folder, "a", loser)
    assert (folder / "by").read_text() == "winner"


def test_other_files_are_not_deleted(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ArtifactError, match="other files"):
        assembled_folder(tmp_path, "a", lambda temporary: None)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_digest_follows_content_order_and_label(tmp_path):
    one, two = tmp_path / "1", tmp_path / "2"
    one.write_text("x")
    two.write_text("y")
    assert digest_of([one, two]) != digest_of([two, one])
    assert digest_of([one], also="a") != digest_of([one], also="b")


def test_a_missing_package_names_its_requirement():
    with pytest.raises(ArtifactError, match="pip install nothing==1"):
        package_folder("spo_no_such_package", "nothing==1")

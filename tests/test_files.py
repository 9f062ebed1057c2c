"""A file is written whole or not at all."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from specmd_jax.errors import SpecmdError
from specmd_jax.files import file_sha256, replace_text, require_writable, whole_file


def test_a_file_appears_only_when_its_block_has_ended(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    with whole_file(path) as file:
        file.write(b"one")
        assert not path.exists()
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a.bin", b"one")]


@pytest.mark.parametrize("stop", [ValueError("stop"), KeyboardInterrupt()])
def test_a_block_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path, stop: BaseException) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(type(stop)), whole_file(path) as file:
        file.write(b"new")
        raise stop
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a.bin", b"old")]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    path = tmp_path / "no" / "a.txt"
    with pytest.raises(SpecmdError, match=r"no/a\.txt: cannot write: No such file or directory"):
        replace_text(path, "text")
    (tmp_path / "folder" / "inside").mkdir(parents=True)
    with pytest.raises(SpecmdError, match=r"folder: cannot write"):
        replace_text(tmp_path / "folder", "text")
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_text_keeps_its_line_ends_and_is_utf_8(tmp_path: Path) -> None:
    replace_text(tmp_path / "a.txt", "é\r\nb\n")
    assert (tmp_path / "a.txt").read_bytes() == b"\xc3\xa9\r\nb\n"


def test_the_checksum_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert file_sha256(tmp_path / "a") == hashlib.sha256(b"abc").hexdigest()
    with pytest.raises(SpecmdError, match="gone: cannot read: No such file"):
        file_sha256(tmp_path / "gone")


def test_a_folder_that_cannot_be_written_to_is_found_before_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_writable(tmp_path / "new" / "folder")
    assert not (tmp_path / "new").exists()
    monkeypatch.setattr("os.access", lambda place, mode: place != tmp_path)
    with pytest.raises(SpecmdError, match=rf"new/folder: cannot write: {tmp_path} is read-only"):
        require_writable(tmp_path / "new" / "folder")

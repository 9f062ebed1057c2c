"""What others wrote is read within bounds, or refused with one line."""

from __future__ import annotations

import gzip
import io
import lzma
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from specmd_jax.archives import arrays_of, read_array
from specmd_jax.errors import MOST_MESSAGE, SpecmdError, shown
from specmd_jax.inputs import allowance, parse_json, read_bytes, read_text, require_file
from specmd_jax.trace import load_trace


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1" * 5000, "beyond 64 bits"),
        ("[" * 200_000, "nested too deeply"),
        ('{"a": ' * 50_000, "nested too deeply"),
        ('"\\ud800"', "half a character"),
        ("[1e999]", "beyond any float"),
        ("[1,\n2", "line 2: .*expected JSON"),
        (b"\xff\xfe", "expected JSON"),
    ],
)
def test_json_that_would_be_trouble_is_refused(text: str | bytes, message: str) -> None:
    with pytest.raises(SpecmdError, match=rf"^here.*{message}") as caught:
        parse_json(text, "here")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


def test_json_that_is_none_is_not_refused() -> None:
    text = '{"a": [18446744073709551615, -9223372036854775808, 0.12345678901234567890123, "\\ud83d\\ude00", NaN]}'
    whole = parse_json(text, "here")["a"]
    assert whole[:2] == [(1 << 64) - 1, -(1 << 63)] and whole[2] == 0.12345678901234568 and whole[3] == "\U0001f600"
    with pytest.raises(SpecmdError, match="NaN is not a JSON number"):
        parse_json(text, "here", constants=False)


def test_a_message_is_one_short_line_whatever_it_holds() -> None:
    text = str(SpecmdError("file\nname\x00\x1b[31m\ud800: " + "x" * 100_000 + ", expected less"))
    assert len(text) <= MOST_MESSAGE and text.isprintable() and text.endswith("expected less")
    assert text.startswith(r"file name\x00\x1b[31m\ud800: ")
    assert len(shown("x" * 100_000)) == 60 and shown(10**5000) == "a int too large to show"


def test_only_files_are_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, message in (
        (tmp_path / "none", "no such file"),
        (tmp_path, "not a file"),
        (tmp_path / "pipe", "not a file"),
        (tmp_path / ("x" * 5000), "File name too long"),
        ("a\0b", "no file can have this name"),
    ):
        with pytest.raises(SpecmdError, match=message):
            require_file(name)
        with pytest.raises(SpecmdError):
            load_trace(name)


def test_packed_text_is_bounded_by_its_size(tmp_path: Path) -> None:
    for suffix, pack in ((".gz", gzip.compress), (".xz", lzma.compress)):
        (tmp_path / f"a{suffix}").write_bytes(pack(b"one\n") + pack(b"two\n"))
        assert read_text(tmp_path / f"a{suffix}") == "one\ntwo\n"
        (tmp_path / f"b{suffix}").write_bytes(pack(b"0" * (allowance(0) + (32 << 20))))
        with pytest.raises(SpecmdError, match="unpacks to more than"):
            read_bytes(tmp_path / f"b{suffix}")
        (tmp_path / f"c{suffix}").write_bytes(pack(b"one\n" * 99)[:-9])
        with pytest.raises(SpecmdError, match="cannot read"):
            read_bytes(tmp_path / f"c{suffix}")


def npz(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def npy(array: Any, version: tuple[int, int] = (1, 0)) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=version)
    return buffer.getvalue()


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_every_layout_of_an_array_is_read(tmp_path: Path, version: tuple[int, int], order: Any) -> None:
    array = np.asarray(np.arange(24, dtype=">i4").reshape(2, 3, 4), order=order)
    found = arrays_of(npz(tmp_path / "a.npz", {"a.npy": npy(array, version)}))["a"]
    assert found.tolist() == array.tolist() and found.dtype == np.int32 and found.flags.c_contiguous


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"(2, 3)", b"(2, 9)", "48 bytes, and its header says"),
        (b"(2, 3)", b"(6, )", None),
        (b"(6, True), ", b"", None),
        (b"(2, 3), ", b"(6,True)", "no tuple of whole numbers"),
        (b"(2, 3)", b"(2,-3)", "no tuple of whole numbers"),
        (b"'<i8'", b"'|O8'", "pickled object"),
        (b"'<i8'", b"'|S0'", "takes no bytes"),
        (b"False", b"'xyz'", "fortran_order"),
        (b"\x01\x00v", b"\x07\x00v", "version"),
    ],
)
def test_headers_are_checked(old: bytes, new: bytes, message: str | None) -> None:
    data = npy(np.arange(6).reshape(2, 3)).replace(old, new.ljust(len(old)))
    if message is None:
        assert read_array(io.BytesIO(data), len(data), "a", "here").sum() == 15
    else:
        with pytest.raises(ValueError, match=message):
            read_array(io.BytesIO(data), len(data), "a", "here")


def test_archives_are_bounded_and_lead_nowhere(tmp_path: Path) -> None:
    many = npz(tmp_path / "many.npz", {"a.npy": npy(np.zeros((allowance(0) >> 3) + (4 << 20)))})
    assert many.stat().st_size < 1 << 20
    slip = npz(tmp_path / "slip.npz", {"../a.npy": npy(np.zeros(1))})
    other = npz(tmp_path / "other.npz", {"a.npy": npy(np.zeros(1))}, zipfile.ZIP_BZIP2)
    (tmp_path / "plain.npz").write_bytes(npy(np.zeros(1)))
    for path, message in (
        (many, "unpacks to .* bytes, expected at most"),
        (slip, "leads out of the archive"),
        (other, "packed by method 12"),
        (tmp_path / "plain.npz", "not a zip"),
    ):
        with pytest.raises(SpecmdError, match=message):
            arrays_of(path)

"""Errors of writing, as libraries tell of them, and as a user is told."""

import errno

import pytest
from safetensors import SafetensorError

from tamis.files import WriteError, remove_temporaries, write_atomically, writing

FULL = errno.ENOSPC


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (OSError(FULL, "No space left on device"), FULL),
        (PermissionError(errno.EACCES, "Permission denied", "{folder}/.file.abcdefgh.tmp"), errno.EACCES),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), FULL),
        (Exception("Input/output error (os error 5)"), errno.EIO),
        (RuntimeError("[enforce fail] . open file failed with strerror: Input/output error"), errno.EIO),
        (RuntimeError("[enforce fail] . PytorchStreamWriter failed writing file data/0: file write failed"), 0),
        (RuntimeError("File run/checkpoint-2/optimizer.pt cannot be opened."), 0),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_failed_write_names_its_file(tmp_path, error, number):
    if isinstance(error, OSError) and error.filename:
        error.filename = error.filename.format(folder=tmp_path)
    with pytest.raises(WriteError) as caught, writing(tmp_path / "file"):
        raise error
    assert caught.value.errno == number and caught.value.filename == str(tmp_path / "file")
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(
    "error",
    [
        ValueError("a setting"),
        RuntimeError("CUDA out of memory"),
        ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"),
        PermissionError(errno.EACCES, "Permission denied", "/elsewhere/rows.jsonl"),
    ],
)
def test_other_errors_stay_as_they_are(tmp_path, error):
    with pytest.raises(type(error)) as caught, writing(tmp_path / "file"):
        raise error
    assert caught.value is error


def test_a_file_in_a_folder_is_named_where_it_is_known(tmp_path):
    with pytest.raises(WriteError) as caught, writing(tmp_path):
        raise OSError(errno.EIO, "Input/output error", str(tmp_path / "config.json"))
    assert caught.value.filename == str(tmp_path / "config.json")


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    missing = tmp_path / "run" / "inner"
    with pytest.raises(WriteError) as caught, writing(missing / "file"):
        raise OSError(errno.EIO, "Input/output error", str(missing.parent))
    assert caught.value.filename == str(missing.parent)


def _fail(path):
    raise OSError(FULL, "No space left on device", str(path))


def test_a_write_that_fails_within_another_is_named_once(tmp_path):
    with pytest.raises(WriteError) as caught, writing(tmp_path):
        write_atomically(tmp_path / "inner", lambda path: _fail(path))
    assert caught.value.filename == str(tmp_path / "inner")


def test_only_temporary_files_are_removed(tmp_path):
    for name in (".weights.parquet.abcd_123.tmp", ".tmpAbC123", "notes.tmp", ".tmp", ".env"):
        (tmp_path / name).write_text("")
    remove_temporaries(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".env", ".tmp", "notes.tmp"]

"""Files that are written whole."""

from __future__ import annotations

import os
from pathlib import Path
from threading import Event, Thread

import pytest

from dilated_attention_pytorch.core.files import check_path, lock, parse_json, remove_leftovers, replace_file


def test_a_file_is_replaced_with_the_mode_of_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, plain = tmp_path / "file", tmp_path / "plain"
    plain.write_text("")
    # Set for a moment, the umask is that of all threads.
    monkeypatch.setattr(os, "umask", lambda _: pytest.fail("expected the umask to be left alone"))
    for text in ("one", "two"):
        replace_file(path, lambda temporary, text=text: temporary.write_text(text))
        assert path.read_text() == text
    assert path.stat().st_mode == plain.stat().st_mode
    assert sorted(tmp_path.iterdir()) == [path, plain]


@pytest.mark.parametrize("error", [RuntimeError("iostream error\nof torch"), OSError(28, "No space left on device")])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(error: Exception, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail(temporary: Path) -> None:
        temporary.write_text("ne")
        raise error

    with pytest.raises(OSError, match=r"expected room and permission to write .*file, got: .*(error|device)$"):
        replace_file(path, fail)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, '{"a":' * 100_000])
def test_any_text_that_is_no_json_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError):
        parse_json(text)


def test_a_byte_order_mark_is_no_part_of_a_json_text() -> None:
    assert parse_json('\ufeff{"a": 1}') == {"a": 1}


def test_leftovers_alone_are_removed(tmp_path: Path) -> None:
    kept = {"file", ".hidden", ".file.part", ".file.0123456789abcdef", "file.0123456789abcdef.part"}
    for name in (*kept, ".file.0123456789abcdef.part"):
        (tmp_path / name).touch()
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == kept


def test_a_folder_that_is_held_is_refused_or_waited_for(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    entered = Event()

    def second() -> None:
        with lock(tmp_path, wait=True):
            entered.set()

    waiting = Thread(target=second)
    with lock(tmp_path):
        with pytest.raises(ValueError, match="expected a folder that no other run is writing to, got"), lock(tmp_path):
            pass
        waiting.start()
        assert not entered.wait(0.2)
    waiting.join(10)
    assert entered.is_set()


@pytest.mark.parametrize("value", ["x" * 5000, "a\0b"])
def test_a_path_that_no_system_takes_is_named(value: str) -> None:
    with pytest.raises(ValueError, match="expected folder to be a path, got ") as error:
        check_path("folder", value)
    assert len(str(error.value)) < 400

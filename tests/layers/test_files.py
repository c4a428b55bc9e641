"""Files that are written whole or not at all."""

import os
import stat
import threading
from pathlib import Path

import pytest
from safetensors.torch import load

import coconv_surgery as cs
from coconv_surgery.layers.files import whole_file


def write(path, text="text"):
    with whole_file(path, "path") as passing, passing.open("w") as file:
        file.writelines(text)


@pytest.mark.parametrize("name", ["a" * 255, "é" * 127], ids=["ascii", "utf-8"])
def test_a_name_may_be_as_long_as_the_file_system_takes(tmp_path, name):
    write(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_new_file_has_the_permissions_that_open_gives(tmp_path):
    Path(tmp_path / "opened").write_text("text")
    cs.save_converted(cs.CoConv2d(8, 8, 3, levels=2), tmp_path / "ours")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "opened").stat().st_mode


def test_a_file_keeps_its_permissions(tmp_path):
    (tmp_path / "ours").touch(0o604)
    cs.save_converted(cs.CoConv2d(8, 8, 3, levels=2), tmp_path / "ours")
    assert (tmp_path / "ours").stat().st_mode & 0o777 == 0o604


def test_a_pipe_is_written_directly():
    reader, writer = os.pipe()
    write(f"/dev/fd/{writer}")
    os.close(writer)
    with open(reader) as file:
        assert file.read() == "text"


@pytest.fixture
def pipe(tmp_path):
    """A named pipe, and what came out of it."""
    os.mkfifo(tmp_path / "pipe")
    came = []
    reader = threading.Thread(target=lambda: came.append((tmp_path / "pipe").read_bytes()), daemon=True)
    reader.start()

    def read():
        reader.join(timeout=60)
        return came[0]

    return tmp_path / "pipe", read


def test_a_pipe_stays_one_whatever_writes_to_it(pipe):
    path, read = pipe
    cs.save_converted(cs.CoConv2d(8, 8, 3, levels=2), path)  # safetensors puts a file of its own in the place of one
    assert load(read())["weight"].shape == (8, 8, 3, 3)
    assert stat.S_ISFIFO(path.stat().st_mode)
    assert [file.name for file in path.parent.iterdir()] == ["pipe"]


def test_what_fails_to_be_written_sends_a_pipe_nothing():
    reader, writer = os.pipe()
    with pytest.raises(UnicodeEncodeError):
        write(f"/dev/fd/{writer}", "half a pair: \ud800")
    os.close(writer)
    with open(reader) as file:
        assert file.read() == ""


@pytest.mark.parametrize("name", ["a\0b", "\ud800"], ids=["NUL", "half of a surrogate pair"])
def test_a_name_that_no_file_can_have_is_refused(tmp_path, name):
    model = cs.CoConv2d(8, 8, 3, levels=2)
    for write in (cs.get_plan(model).to_json, lambda path: cs.save_converted(model, path)):
        with pytest.raises(ValueError, match=r"path=.* is no path"):
            write(tmp_path / name)
    assert not [*tmp_path.iterdir()]

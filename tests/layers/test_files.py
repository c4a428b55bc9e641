"""Files that are written whole or not at all."""

import os
from pathlib import Path

import pytest

import coconv_surgery as cs
from coconv_surgery.layers.files import whole_file


def write(path):
    with whole_file(path, "path") as passing:
        passing.write_text("text")


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

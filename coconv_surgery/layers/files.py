"""Files that are written whole or not at all."""

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from coconv_surgery.layers.arguments import file_to_write


@contextmanager
def whole_file(value: str | os.PathLike[str], name: str) -> Iterator[Path]:
    """Write a file under another name, which takes the place of the right one when it is complete and on the disk.

    Whatever goes wrong before, a crash of the machine included, the old file is left as it was. Its permissions stay;
    a new file has those that ``open()`` gives.

    Args:
        value: The file. A link stays one; what is no ordinary file, such as ``/dev/stdout``, stays what it is, and is
            given the bytes when all are there.
        name: What it is, for a message.

    Yields:
        Where to write.

    Raises:
        TypeError: If it is not a path.
        ValueError: If no path can be called so.
        OSError: If it is a folder, or is in one that does not exist.

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with whole_file(f"{folder}/a.txt", "path") as path:
    ...         _ = path.write_text("a")
    ...     os.listdir(folder)
    ['a.txt']
    """
    given = file_to_write(value, name)
    # Asked of the link: that to a pipe leads nowhere by name.
    special = given.exists() and not given.is_file()
    with _passed_on(given) if special else _in_place_of(Path(os.path.realpath(given))) as passing:
        yield passing


@contextmanager
def _passed_on(device: Path) -> Iterator[Path]:
    """A file whose bytes go to a device or a pipe: some writers would put a file in its place, or go back in it."""
    with tempfile.TemporaryDirectory() as folder:
        yield (passing := Path(folder, "passing"))
        with passing.open("rb") as source, device.open("wb") as target:
            shutil.copyfileobj(source, target)


@contextmanager
def _in_place_of(path: Path) -> Iterator[Path]:
    # A name that no pattern for the file's own suffix finds, and that is no longer than a name may be.
    passing = path.with_name(f".{os.fsdecode(os.fsencode(path.name)[:200])}.{secrets.token_hex(4)}.part")
    try:
        passing.touch()
        mode = (path if path.exists() else passing).stat().st_mode  # some writers choose their own
        yield passing
        passing.chmod(mode)
        _to_disk(passing)
        os.replace(passing, path)
        _to_disk(path.parent)
    finally:
        passing.unlink(missing_ok=True)


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

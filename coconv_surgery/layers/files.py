"""Files that are written whole or not at all."""

import os
import secrets
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
        value: The file. A link stays one; what is no ordinary file, such as ``/dev/stdout``, is written directly.
        name: What it is, for a message.

    Yields:
        Where to write, in the same folder.

    Raises:
        TypeError: If it is not a path.
        OSError: If it is a folder, or is in one that does not exist.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with whole_file(f"{folder}/a.txt", "path") as path:
    ...         _ = path.write_text("a")
    ...     os.listdir(folder)
    ['a.txt']
    """
    given = file_to_write(value, name)
    if given.exists() and not given.is_file():  # asked of the link: that to a pipe leads nowhere by name
        yield given
        return
    path = Path(os.path.realpath(given))
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

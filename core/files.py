"""Files that are whole at every moment (imports no torch)."""

import errno
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import IO

from core.errors import UserError

UNFINISHED = ".part"  # end of the name of a file that is being written


def open_regular(path: Path) -> IO[bytes]:
    """A file of the user's, opened for reading; links are followed.

    Raises:
        OSError: missing, not readable, or no plain file: reading a device or a pipe might never end.
    """
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "is a device or pipe, no plain file", str(path))
    return path.open("rb")


def replace_file(path: Path, data: bytes, keep_as: Path | None = None) -> None:
    """Write a temporary file beside `path`, force it to the disk, then rename it; `keep_as` takes the old file.

    A crash may leave the temporary file behind (`remove_unfinished`), and `path` free between the two renames.

    Raises:
        UserError: when the disk is full or the folder cannot be written; the old file stays, as `path` or `keep_as`.
    """
    temporary = path.with_name(f".{path.name}{UNFINISHED}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if keep_as is not None:
            os.replace(path, keep_as)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise UserError(f"{path}: cannot be saved: {error.strerror}; what was there before is unharmed") from None


def remove_unfinished(folder: Path) -> None:
    """Remove what killed processes were writing into a folder."""
    for path in folder.glob(f".*{UNFINISHED}"):
        path.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

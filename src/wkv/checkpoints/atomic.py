"""Writing a file so that a reader sees the old one or the new one, whole, whatever happens meanwhile.

The bytes go to a new file in the same folder, reach the disk (fsync), and only then take the name
(rename), which reaches the disk too (fsync of the folder). Everything that wkv saves goes through here.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ..errors import CheckpointError


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A binary file to write (and to read back), which becomes `path` when the block ends without an error.

    On any error, Ctrl-C included, the old file stays as it was and the new one is removed. A link is
    followed: the file that it names is replaced. An OSError becomes CheckpointError, which names the
    path, the cause, the free space and what to try.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".wkv-{secrets.token_hex(8)}.tmp")
    try:
        if target.exists() and not target.is_file():
            raise CheckpointError(f"{target} is not a regular file", "a file name to save to")
        with open(temporary, "x+b") as file:  # permissions: 0666 less the umask, as for any new file
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise _not_saved(target, error) from error
        raise
    try:
        sync_folder(target.parent)
    except OSError as error:
        raise CheckpointError(
            f"{target} is written, but the disk did not confirm its name: {error.strerror}",
            "a disk that keeps the file through a power cut",
            "saving again; if it fails again, copy your files to another disk",
        ) from error


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` reach the disk, as fsync does for what is in a file."""
    if os.name != "posix":
        return  # Windows opens no folders; its rename is journalled
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Make `folder`, and those above it that are missing, so that their names reach the disk. OSError."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


_ADVICE = {
    errno.ENOSPC: "freeing space, or a path on another disk",
    errno.EDQUOT: "freeing space within your quota, or a path on another disk",
    errno.EFBIG: "a file system without this size limit, or a higher `ulimit -f`",
    errno.ENOENT: "making the folder first",
    errno.EACCES: "a folder that you may write to",
    errno.EPERM: "a folder that you may write to",
    errno.EROFS: "a folder that you may write to",
}


def _not_saved(target: Path, cause: OSError) -> CheckpointError:
    free = ""
    with contextlib.suppress(OSError):
        free = f" ({shutil.disk_usage(target.parent).free / 1e6:,.0f} MB free in {target.parent})"
    return CheckpointError(
        f"{target} could not be saved: {cause.strerror or cause}{free}; a file of that name is as it was",
        "a folder with room for the whole file",
        _ADVICE.get(cause.errno or 0, "saving again, or another disk"),
    )

"""Writing a file so that a reader sees the old one or the new one, whole, whatever happens meanwhile.

The bytes go to a new file in the same folder, reach the disk (fsync), and only then take the name
(rename), which reaches the disk too (fsync of the folder). Everything that wkv saves goes through here.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from ..errors import CheckpointError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


class _NewFile(io.FileIO):
    """A new file with the usual permissions (0666 less the umask), which remembers its first failure.

    A library that writes through it may report a later failure or one of its own: torch.save turns a
    full disk, and Ctrl-C too, into a RuntimeError about the archive's end.
    """

    failure: BaseException | None = None

    def __init__(self, path: Path) -> None:
        super().__init__(path, "x+b")

    def write(self, data: ReadableBuffer, /) -> int:
        try:
            return os.write(self.fileno(), data)
        except BaseException as error:
            self.failure = self.failure or error
            raise


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A binary file to write (and to read back), which becomes `path` when the block ends without an error.

    On any error, Ctrl-C included, the old file stays as it was and the new one is removed. A link is
    followed: the file that it names is replaced. An OSError becomes CheckpointError, which names the
    path, the cause, the free space and what to try.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".wkv-{secrets.token_hex(8)}.tmp")
    raw = None
    try:
        if target.exists() and not target.is_file():
            raise CheckpointError(f"{target} is not a regular file", "a file name to save to")
        raw = _NewFile(temporary)
        with io.BufferedRandom(raw) as file:
            yield file
            file.flush()
            os.fsync(raw.fileno())
        os.replace(temporary, target)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        cause = (raw and raw.failure) or error
        if isinstance(cause, OSError):
            raise _not_saved(target, cause) from cause
        if cause is not error:
            raise cause from None
        raise
    try:
        _sync_folder(target.parent)
    except OSError as error:
        raise CheckpointError(
            f"{target} is written, but the disk did not confirm its name: {error.strerror}",
            "a disk that keeps the file through a power cut",
            "saving again; if it fails again, copy your files to another disk",
        ) from error


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return  # Windows opens no folders; its rename is journalled
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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

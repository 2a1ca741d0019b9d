"""Checkpoints of a run: one folder per saved step, whole or absent, whatever happens meanwhile.

    checkpoints/
      step-000000500/    model.safetensors   a file that `wkv.load` reads
                         optimizer.safetensors, ...
                         manifest.json       written last: sizes of the files, and how far the run was
      step-000001000.tmp-...   being written, or left behind by a killed run; readers look past it
      step-000000750.bad       found damaged, put aside

A snapshot is written under another name, every file and folder reaches the disk, and only then it takes
its own name. So the newest folder named step-N is a good one, unless the disk itself lost something: then
`newest` says so and goes back to the one before.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..checkpoints import atomic_write, make_folder, sync_folder, write_safetensors
from ..errors import CheckpointError, CorruptFileError

MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d{9,})")

Part = tuple[Mapping[str, Tensor], Mapping[str, str]]  # tensors and metadata of one file


@dataclass(frozen=True)
class Snapshot:
    """One complete folder."""

    path: Path
    step: int
    progress: dict[str, Any]  # what the run wrote down about itself

    def file(self, name: str) -> Path:
        return self.path / f"{name}.safetensors"


def write(folder: Path, step: int, parts: Mapping[str, Part], progress: Mapping[str, Any]) -> Path:
    """Save a snapshot, atomically. One that is there already stays: the same step is the same content.

    CheckpointError when it cannot be written; the older ones are then as they were.
    """
    final = folder / f"step-{step:09}"
    temporary = _aside(final)
    try:
        make_folder(folder)
        if final.exists():
            sync_folder(folder)  # which may have failed when it was made
            return final
        needed = sum(tensor.nbytes for tensors, _ in parts.values() for tensor in tensors.values())
        free = shutil.disk_usage(folder).free
        if free < needed:
            problem = f"it needs {needed / 1e6:,.0f} MB, and {free / 1e6:,.0f} MB are left"
            raise OSError(errno.ENOSPC, problem)
        temporary.mkdir()
        for name, (tensors, metadata) in parts.items():
            write_safetensors(temporary / f"{name}.safetensors", tensors, metadata)
        content: dict[str, Any] = {
            "format": 1,
            "step": step,
            "files": {file.name: file.stat().st_size for file in sorted(temporary.iterdir())},
            "progress": dict(progress),
        }
        content["sha256"] = _digest(content)
        with atomic_write(temporary / MANIFEST) as file:  # and the folder with all names reaches the disk
            file.write(json.dumps(content, indent=1).encode())
        os.replace(temporary, final)
        sync_folder(folder)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            raise CheckpointError(
                f"the checkpoint {final} could not be saved: {error.strerror or error}",
                "a folder that can be written to; the older checkpoints are as they were",
                "the same command again, once there is room",
            ) from error
        raise
    return final


def newest(folder: Path, use: Callable[[Snapshot], None], say: Callable[[str], None]) -> Snapshot | None:
    """Give the newest whole snapshot to `use` and return it; None when there is none.

    Where `use` meets damage (CheckpointError), the snapshot is put aside as step-N.bad, `say` is told,
    and the one before is taken.
    """
    paths = sorted(complete(folder), reverse=True)
    for path in paths:
        try:
            snapshot = read(path)
            use(snapshot)
        except (CheckpointError, OSError) as error:
            cause = error if isinstance(error, OSError) else error.__cause__
            if isinstance(cause, OSError) and cause.errno not in (errno.EIO, errno.ENOENT):
                raise  # too many open files, no permission: that says nothing about the files
            aside = path.with_name(f"{path.name}.bad-{secrets.token_hex(2)}")
            os.replace(path, aside)
            say(f"the checkpoint {path.name} is damaged and was put aside as {aside.name}: {error}")
        else:
            return snapshot
    if paths:
        raise CheckpointError(
            f"every checkpoint in {folder} was damaged",
            "a whole one",
            "a fresh --out, or mending the .bad ones",
        )
    return None


def look(folder: Path, use: Callable[[Snapshot], None]) -> Snapshot | None:
    """What `newest` does, for a reader beside the run: it changes nothing, and raises what `use` raises.

    The run may remove a snapshot while it is read. Then the newer one that it made before is given to `use`.
    """
    while paths := complete(folder):
        path = max(paths)
        try:
            snapshot = read(path)
            use(snapshot)
        except (CheckpointError, OSError):
            if path.exists():
                raise
        else:
            return snapshot
    return None


def read(path: Path) -> Snapshot:
    """The snapshot in `path`, its sizes compared with its manifest. CorruptFileError when they differ."""
    try:
        content = json.loads((path / MANIFEST).read_bytes())
        stored = content.pop("sha256")
        whole = stored == _digest(content)
        files, step, progress = dict(content["files"]), int(content["step"]), dict(content["progress"])
        known = content["format"] == 1
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptFileError(f"{path / MANIFEST} cannot be read: {error!r}", "a whole manifest") from error
    if not known:
        raise CorruptFileError(f"{path / MANIFEST} has format {content['format']!r}", "format 1")
    if not whole:
        raise CorruptFileError(f"{path / MANIFEST} was changed", "the bytes that were written")
    for name, size in files.items():
        found = (path / name).stat().st_size if (path / name).is_file() else None
        if found != size:
            raise CorruptFileError(f"{path / name} has {found} bytes", f"{size}, as the manifest says")
    return Snapshot(path, step, progress)


def complete(folder: Path) -> list[Path]:
    """The snapshots that have their final name, in no order."""
    return [path for path in _inside(folder) if _NAME.fullmatch(path.name)]


def prune(folder: Path, keep_last: int, keep: set[int]) -> None:
    """Remove all but the newest `keep_last` and the steps in `keep`; never the only one.

    CheckpointError when one cannot be removed.
    """
    _remove(folder, [path for path in sorted(complete(folder))[:-keep_last] if _step(path) not in keep])


def drop_after(folder: Path, step: int) -> None:
    """Remove those of later steps; never the only one. CheckpointError when one cannot be removed."""
    _remove(folder, [path for path in sorted(complete(folder))[1:] if _step(path) > step])


def _remove(folder: Path, paths: list[Path]) -> None:
    # The new names reach the disk before the files go, so that no half-deleted folder looks whole.
    going = {path: _aside(path) for path in paths}
    try:
        for path, aside in going.items():
            os.replace(path, aside)
        if going:
            sync_folder(folder)
        for aside in going.values():
            shutil.rmtree(aside)
    except OSError as error:
        raise CheckpointError(
            f"a checkpoint in {folder} could not be removed: {error.strerror or error}",
            "a folder that can be written to; those that are needed are there",
            "the same command again, once this is mended",
        ) from error


def sweep(folder: Path) -> None:
    """Remove what killed writers left behind, as far as possible. Only for the one who has the run's lock."""
    for path in _inside(folder):
        if ".tmp-" in path.name:
            shutil.rmtree(path, ignore_errors=True)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _aside(path: Path) -> Path:
    """A name beside `path` for what is not there yet, or no longer."""
    return path.with_name(f"{path.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")


def _inside(folder: Path) -> Iterator[Path]:
    return iter([path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else [])


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

"""Disks that fail, for tests: one whose n-th call goes wrong, and one whose power is cut.

Both stand between wkv and the system, in the place of every call by which wkv changes what is stored.
"""

from __future__ import annotations

import errno
import io
import os
import random
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from wkv.checkpoints import atomic
from wkv.training import run_folder

CALLS = ("open", "fsync", "replace", "mkdir", "unlink", "rmdir", "truncate")
FAULTS = [OSError(code, os.strerror(code)) for code in (errno.ENOSPC, errno.EIO, errno.EFBIG, errno.EACCES)]
SHORT = "short write"


class Killed(BaseException):
    """What a killed process raises from then on: nothing that it does reaches the disk any more."""


class Disk:
    """Passes everything on, and sees it."""

    def __init__(self, patch):
        for name in CALLS:
            patch.setattr(os, name, partial(self.call, name, getattr(os, name)))
        for module in (atomic, run_folder):
            patch.setattr(module, "open", self.open, raising=False)

    def call(self, name, function, *arguments, **options):
        return function(*arguments, **options)

    def open(self, path, mode, buffering=-1):
        file = self.call("open", partial(DiskFile, self), path, mode)
        return io.BufferedRandom(file) if buffering else file


class DiskFile(io.FileIO):
    """What is below Python's buffering."""

    def __init__(self, disk, path, mode):
        super().__init__(path, mode)
        self.disk, self.path = disk, path

    def write(self, data):
        return self.disk.call("write", super().write, data, file=self)

    def truncate(self, size=None):
        return self.disk.call("truncate", super().truncate, size, file=self)


class FaultyDisk(Disk):
    """The n-th call raises `fault`, or writes less than it was given."""

    def __init__(self, patch, fail_at, fault):
        super().__init__(patch)
        self.calls, self.fail_at, self.fault = 0, fail_at, fault

    def call(self, name, function, *arguments, file=None, **options):
        self.calls += 1
        dead = isinstance(self.fault, Killed) and self.calls > self.fail_at
        if dead or (self.calls == self.fail_at and (self.fault is not SHORT or name == "write")):
            taken = 0
            if name == "write" and not dead:
                (data,) = arguments
                taken = function(memoryview(data)[: max(1, len(data) // 2)])
            if self.fault is SHORT:
                return taken
            raise self.fault
        # Without a power cut, nobody can tell whether something is on the disk or on its way.
        return None if name == "fsync" else function(*arguments, **options)


# Power cuts


class Journal(Disk):
    """Writes down what happens below `root`, so that `power_cut` can tell what may be left of it."""

    def __init__(self, patch, root):
        super().__init__(patch)
        self.root, self.log = root, []
        self.names = {}  # of open files and folders, by descriptor

    def call(self, name, function, *arguments, file=None, dir_fd=None, **options):
        options |= {} if dir_fd is None else {"dir_fd": dir_fd}
        if file is not None:  # write, truncate
            size = file.tell() if name == "write" else arguments[0]
            self.note(
                "write" if name == "write" else "truncate",
                file.path,
                size,
                *map(bytes, arguments[: name == "write"]),
            )
            return function(*arguments)
        if name == "fsync":
            return self.note("sync", self.names[arguments[0]])
        path = Path(arguments[0]) if dir_fd is None else self.names[dir_fd] / arguments[0]
        existed = path.exists()
        result = function(*arguments, **options)
        match name:
            case "open":
                self.names[result if isinstance(result, int) else result.fileno()] = path
                if not existed:
                    self.note("create", path)
            case "replace":
                self.note("move", path, Path(arguments[1]).name)
            case "unlink" | "rmdir":
                self.note("remove", path)
            case "truncate":
                self.note("truncate", path, arguments[1])
            case "mkdir":
                self.note("mkdir", path)
        return result

    def note(self, what, path, *details):
        self.log.append((what, Path(path).relative_to(self.root), *details))


@dataclass
class File:
    """`stored` is what an fsync confirmed, `pending` what came after it."""

    stored: bytes = b""
    now: bytearray = field(default_factory=bytearray)
    pending: list = field(default_factory=list)

    def change(self, *change):
        self.pending.append(change)
        self.apply(self.now, *change)

    @staticmethod
    def apply(content, at, data=None):
        content.extend(bytes(max(0, at - len(content))))
        if data is None:
            del content[at:]
        else:
            content[at : at + len(data)] = data

    def sync(self):
        self.stored, self.pending = bytes(self.now), []

    def leave(self, path, chance):
        content = bytearray(self.stored)
        for at, *data in surviving(self.pending, chance):
            self.apply(content, at, *(torn(piece, chance) for piece in data))
        path.write_bytes(content)


@dataclass
class Folder:
    stored: dict = field(default_factory=dict)
    now: dict = field(default_factory=dict)
    pending: list = field(default_factory=list)

    def change(self, *change):
        self.pending.append(change)
        self.apply(self.now, *change)

    @staticmethod
    def apply(entries, old, new, node):
        entries.pop(old, None)
        if new is not None:
            entries[new] = node

    def sync(self):
        self.stored, self.pending = dict(self.now), []

    def leave(self, path, chance):
        entries = dict(self.stored)
        for change in surviving(self.pending, chance):
            self.apply(entries, *change)
        path.mkdir()
        for name, node in entries.items():
            node.leave(path / name, chance)


def power_cut(log, chance: random.Random, into: Path) -> None:
    """Make the folder `into` as a disk may be when the power is cut after `log`.

    What was synced is there. Of the rest every file and every folder keeps, for itself, nothing, everything,
    the first part, or anything: renames are kept or not, writes also in part or as zeros.
    """
    root = Folder()

    def find(path):
        node = root
        for name in path.parts:
            node = node.now[name]
        return node

    for what, path, *details in log:
        parent, name = find(path.parent), path.name
        match what:
            case "create" | "mkdir":
                parent.change(None, name, File() if what == "create" else Folder())
            case "move":
                parent.change(name, details[0], parent.now[name])
            case "remove":
                parent.change(name, None, None)
            case "sync":
                find(path).sync()
            case "write" | "truncate":
                find(path).change(*details)
    root.leave(into, chance)


def surviving(changes, chance):
    match chance.choice(("none", "all", "first", "any")):
        case "none":
            return []
        case "all":
            return changes
        case "first":
            return changes[: chance.randint(0, len(changes))]
        case _:
            return [change for change in changes if chance.random() < 0.5]


def torn(data, chance):
    """As a whole, the first part, sectors of it, or only its length."""
    match chance.choice(("whole", "whole", "first", "sectors", "zeros")):
        case "whole":
            return data
        case "first":
            return data[: chance.randint(0, len(data))]
        case "zeros":
            return bytes(len(data))
        case _:
            sectors = [data[i : i + 512] for i in range(0, len(data), 512)]
            return b"".join(sector if chance.random() < 0.5 else bytes(len(sector)) for sector in sectors)

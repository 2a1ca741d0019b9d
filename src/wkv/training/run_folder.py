"""The folder of a run: everything that is needed to go on with it, or to tell what it was.

config.toml      all settings, as `wkv train --config` reads them
run.json         versions, command, and fingerprints of the data and of the first weights
metrics.jsonl    a line per step; the same bytes whether or not the run was ever stopped
timings.jsonl    a line per step of what a clock says, which never repeats
events.jsonl     what happened beside the plan: skipped steps, returns to a checkpoint, restarts
checkpoints/     see snapshots.py
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import sys
import time
import tomllib
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from ..checkpoints import atomic_write, make_folder, sync_folder
from ..errors import CheckpointError, ConfigError
from .config import Settings, to_toml

_WRITTEN = (
    ".lock", "config.toml", "run.json", "metrics.jsonl", "timings.jsonl", "events.jsonl", "report.md",
    "loss.png", "rates.png", "model.safetensors", "tokenizer.json",
)  # fmt: skip


class RunFolder:
    """One writer at a time; records are appended, and cut back to where a checkpoint was made."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.metrics = Records(self.path / "metrics.jsonl")
        self.timings = Records(self.path / "timings.jsonl")
        self.events = Records(self.path / "events.jsonl")
        self._lock = FileLock(self.path / ".lock", timeout=0)

    def __enter__(self) -> RunFolder:
        """Take the folder. CheckpointError when another run has it, or it cannot be made."""
        for name in _WRITTEN:
            if (self.path / name).is_symlink():
                raise CheckpointError(
                    f"{self.path / name} is a link",
                    "a file: a run would write to wherever it leads",
                    "removing it",
                )
        try:
            make_folder(self.path)
            self._lock.acquire()
        except Timeout as error:
            raise CheckpointError(
                f"another run is training in {self.path}", "a folder of its own for each run", "another --out"
            ) from error
        except OSError as error:
            raise CheckpointError(
                f"{self.path} cannot hold a run: {error.strerror or error}",
                "a folder that can be written to",
                "another --out",
            ) from error
        return self

    def __exit__(self, *_: object) -> None:
        for records in (self.metrics, self.timings, self.events):
            records.close()
        self._lock.release()

    def changes(
        self, settings: Mapping[str, Settings], identity: Mapping[str, str | None], accept: bool
    ) -> list[str]:
        """What differs from the run that the folder holds; nothing in a new folder.

        settings   the tables of config.toml
        identity   fingerprints of what the result depends on besides: data, first weights
        ConfigError names what differs, unless `accept`.
        """
        if not (old := self._old_run()):
            return []
        try:
            tables = tomllib.loads((self.path / "config.toml").read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.path / 'config.toml'} cannot be read: {error}", "TOML") from error
        found = _changes(tables, settings) + [
            f"the {name} has changed (fingerprint {_short(old['identity'].get(name))} became {_short(value)})"
            for name, value in identity.items()
            if old["identity"].get(name) != value
            # Elsewhere the same seed gives first weights of other rounding; the checkpoint has the run's.
            and not (name == "model" and _moved(old))
        ]
        if found and not accept:
            raise ConfigError(
                f"{self.path} holds a run with other settings: {'; '.join(found)}",
                "the same command again, which goes on where it stopped",
                "another --out for a new run, or --accept-changes to go on like this",
            )
        return found

    def describe(
        self, settings: Mapping[str, Settings], identity: Mapping[str, str | None], changes: list[str]
    ) -> str:
        """Write down what the run is from now on; return what keeps it from repeating exactly, or nothing."""
        old = self._old_run()
        moved = _moved(old) if old else []
        if old and (changes or moved):
            self.event("changed", step=None, what=changes + moved)
        # The first weights stay what they were: later ones have a history.
        first = {"model": old["identity"].get("model")} if old else {}
        if not old or changes or moved:
            with atomic_write(self.path / "config.toml") as file:
                file.write(to_toml(settings).encode())
            with atomic_write(self.path / "run.json") as file:
                content = {**_surroundings(), "command": sys.argv, "identity": {**identity, **first}}
                file.write(json.dumps(content, indent=1).encode())
        return f"not bit by bit what it would have been: {'; '.join(moved)}" if moved else ""

    def _old_run(self) -> dict[str, Any] | None:
        path = self.path / "run.json"
        if not path.exists():
            return None
        try:
            content = json.loads(path.read_bytes())
            dict(content["identity"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} cannot be read: {error!r}", "a file of a run") from error
        return dict(content)

    def event(self, kind: str, **details: Any) -> None:
        self.events.append({"event": kind, **details, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")})
        self.events.sync()


class Records:
    """A file of JSON lines. CheckpointError when the disk does not take one, or not confirm it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: Any = None

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a line. When the disk takes only half of it, this half is cut off again."""
        line = json.dumps(record).encode() + b"\n"
        with self._clear_errors():
            if self._file is None:
                self._open()
            before = self._file.tell()
            try:
                if self._file.write(line) != len(line):
                    raise OSError("the disk took only a part of the line")
            except OSError:
                with contextlib.suppress(OSError):
                    self._file.truncate(before)
                raise

    def sync(self) -> int:
        """Make the file reach the disk; return its size in bytes."""
        if self._file is None:
            return self.path.stat().st_size if self.path.exists() else 0
        with self._clear_errors():
            os.fsync(self._file.fileno())
        return self._file.tell()

    def cut(self, size: int) -> None:
        """Forget everything after the first `size` bytes. CheckpointError when there are fewer."""
        self.close()
        found = self.path.stat().st_size if self.path.exists() else 0
        if found < size:
            raise CheckpointError(
                f"{self.path} has {found} bytes", f"at least the {size} of the checkpoint", "a fresh --out"
            )
        if found > size:
            with self._clear_errors():
                os.truncate(self.path, size)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self) -> None:
        if self.path.exists():
            content = self.path.read_bytes()
            if (size := _whole_lines(content)) < len(content):
                os.truncate(self.path, size)
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115  closed in `close`
        sync_folder(self.path.parent)  # its name must not be lost where its lines are not

    @contextlib.contextmanager
    def _clear_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CheckpointError(
                f"{self.path} could not be written: {error.strerror or error}",
                "a disk with room; the checkpoints are as they were",
                "freeing space, then the same command again",
            ) from error


def read_records(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a file of records; none when there is no file."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]  # after the last newline: nothing, or half a line
    records = [json.loads(line) for line in lines]
    if not all(isinstance(record, dict) for record in records):
        raise ValueError(f"{path} has a line that is no object")
    return records


def _whole_lines(content: bytes) -> int:
    """How many bytes the whole records have: a power cut may leave any part of the last line."""
    end = content.rfind(b"\n") + 1
    start = content.rfind(b"\n", 0, max(end - 1, 0)) + 1
    try:
        json.loads(content[start:end])
    except ValueError:
        return start
    return end


def _surroundings() -> dict[str, Any]:
    """What rounding depends on."""
    return {
        "wkv": version("wkv"),
        "torch": torch.__version__,
        "machine": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
    }


def _moved(old: Mapping[str, Any]) -> list[str]:
    now = _surroundings()
    return [f"{name} was {old.get(name)} and is {now[name]}" for name in now if old.get(name) != now[name]]


def _changes(old: Mapping[str, Any], new: Mapping[str, Settings]) -> list[str]:
    changes = []
    for table, settings in new.items():
        before, after = old.get(table, {}), settings.to_dict()
        for name in sorted(before.keys() | after.keys()):
            was, now = _plain(before.get(name)), _plain(after.get(name))
            if was != now:
                changes.append(f"{name} was {was!r} and is {now!r}")
    return changes


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _short(fingerprint: str | None) -> str:
    return "none" if fingerprint is None else fingerprint[:12]

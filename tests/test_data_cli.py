"""`wkv data`: what a person types to pack text, and what they are told about a pack."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from wkv.cli import main
from wkv.cli.data import show_packing
from wkv.training.data import magic_prime, open_data

RUN = [sys.executable, "-c", "import sys; from wkv.cli import main; sys.exit(main())"]
Command = Callable[..., SimpleNamespace]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run `wkv data ...` in this process: (exit status, stdout, stderr)."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object) -> SimpleNamespace:
        status = main(["data", *map(str, arguments)])
        captured = capsys.readouterr()
        return SimpleNamespace(status=status, out=captured.out, err=captured.err)

    return run


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in; in texts/ are 30 texts, a picture, and 6 documents as JSONL."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(30):
        (texts / f"{i:02}.txt").write_text(f"{i} " * 700)
    (texts / "picture.png").write_bytes(b"\x89PNG\x00")
    (texts / "x.jsonl").write_text("".join(json.dumps({"body": f"line {i}"}) + "\n" for i in range(6)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_pack_tells_documents_tokens_bytes_per_token_and_what_was_skipped(
    command: Command, folder: Path
) -> None:
    result = command("pack", "texts", "--tokenizer", "bytes", "--out", "packed", "--workers", 1)
    data = open_data("packed")
    assert data.validation is not None
    assert result.status == 0
    train, n_bytes = data.train, data.train_bytes
    assert result.out.splitlines() == [
        "packed: packed with the tokenizer bytes",
        f"  train   {train.n_documents} documents, {train.n_tokens:,} tokens, "
        f"{n_bytes / train.n_tokens:.3f} bytes per token",
        f"  val     {data.validation.n_documents} documents, {data.validation.n_tokens:,} tokens, "
        f"{data.validation_bytes / data.validation.n_tokens:.3f} bytes per token",
        "  skipped 1: binary, a NUL byte (texts/picture.png: byte 4)",
        "  skipped 6: a line without the field 'text' "
        "(texts/x.jsonl: line 1, texts/x.jsonl: line 2, texts/x.jsonl: line 3, ...)",
    ]
    assert train.n_documents + data.validation.n_documents == 30


def test_the_flags_reach_the_packer(command: Command, folder: Path) -> None:
    flags = ["--field", "body", "--held-out", "0.5", "--seed", "3", "--tokenizer", "world"]
    assert command("pack", "texts/x.jsonl", "texts/0*.txt", *flags, "--out", "packed").status == 0
    facts = json.loads(Path("packed/data.json").read_text())
    assert {name: facts[name] for name in ("field", "held_out", "seed", "tokenizer", "sources")} == {
        "field": "body",
        "held_out": 0.5,
        "seed": 3,
        "tokenizer": "world",
        "sources": ["texts/x.jsonl", "texts/0*.txt"],
    }
    assert sum(split["documents"] for split in facts["splits"].values()) == 16


def test_info_describes_a_packed_folder(command: Command, folder: Path) -> None:
    command("pack", "texts", "--tokenizer", "world", "--out", "packed")
    result = command("info", "packed", "--json")
    facts = json.loads(result.out)
    data = open_data("packed")
    assert data.validation is not None
    assert (facts["tokenizer"], facts["vocab_size"], facts["separator"]) == ("world", 65530, 0)
    for name, part, n_bytes in (
        ("train", data.train, data.train_bytes),
        ("val", data.validation, data.validation_bytes),
    ):
        lengths = np.diff(part.ends, prepend=0)
        assert facts["splits"][name] == {
            "file": f"packed/{name}.bin",
            "documents": part.n_documents,
            "tokens": part.n_tokens,
            "bytes": n_bytes,
            "dtype": "uint16",
            "median_document": int(np.median(lengths)),
            "longest_document": max(lengths),
            "fingerprint": part.fingerprint(),
            "magic_primes": {
                str(context): magic_prime(part.n_tokens, context)
                for context in (512, 1024, 4096)
                if part.n_tokens >= 3 * context
            },
        }
    assert list(facts["splits"]["train"]["magic_primes"]) == ["512", "1024", "4096"]
    text = command("info", "packed").out
    for part in (
        "tokenizer world, vocabulary 65,530, separator 0",
        f"{data.train.n_tokens:,} as uint16",
        data.train.fingerprint(),
        f"{magic_prime(data.train.n_tokens, 512)} (context 512)",
    ):
        assert part in text


def test_info_describes_a_token_file_alone(command: Command, folder: Path) -> None:
    np.save("few.npy", np.arange(100, dtype=np.int32))
    result = command("info", "few.npy")
    assert result.status == 0
    for part in ("tokenizer not known", "100 as int32", "not known", "none: fewer than 1,536 tokens"):
        assert part in result.out


@pytest.mark.parametrize(
    ("line", "status", "parts"),
    [
        ("pack --tokenizer bytes --out x", 2, ["nothing to pack", "wkv data pack stdlib"]),
        ("pack texts --out x", 2, ["--tokenizer"]),
        ("pack texts --tokenizer bytes", 2, ["--out"]),
        ("pack texts --tokenizer byts --out x", 1, ["byts", "bytes"]),
        ("pack txets --tokenizer bytes --out x", 1, ["txets does not exist"]),
        ("pack *.md --tokenizer bytes --out x", 1, ["*.md matches no file"]),
        (
            "pack texts/picture.png --tokenizer bytes --out x",
            1,
            ["everything", "binary", "texts/picture.png"],
        ),
        ("pack texts --tokenizer bytes --out texts/00.txt", 1, ["texts/00.txt"]),
        ("pack texts --tokenizer bytes --out x --held-out 5", 1, ["held_out is 5", "0.05"]),
        ("pack texts --tokenizer bytes --out x --workers 0", 1, ["workers is 0"]),
        ("pack texts --tokenizer bytes --out x --hold-out 5", 2, ["--hold-out", "--held-out"]),
        ("info texts", 1, ["texts is not packed", "wkv data pack texts"]),
        ("info nothing.bin", 1, ["nothing.bin", "No such file"]),
        ("info", 2, ["PATH"]),
        ("pock", 2, ["pock", "pack"]),
    ],
)
def test_a_wrong_command_line_is_answered_in_one_line(
    command: Command, folder: Path, line: str, status: int, parts: list[str]
) -> None:
    result = command(*line.split())
    assert result.status == status
    assert result.out == ""
    assert result.err.count("\n") == 1
    for part in parts:
        assert part in result.err
    assert not Path("x").exists()


def test_a_second_pack_into_a_folder_is_refused_with_the_way_out(command: Command, folder: Path) -> None:
    assert command("pack", "texts", "--tokenizer", "bytes", "--out", "packed").status == 0
    before = Path("packed/data.json").read_bytes()
    result = command("pack", "texts", "--tokenizer", "world", "--out", "packed")
    assert result.status == 1
    assert "packed already holds train.bin" in result.err
    assert "--out packed-2" in result.err
    assert Path("packed/data.json").read_bytes() == before


def test_names_out_of_files_are_harmless_on_the_terminal(command: Command, folder: Path) -> None:
    Path("texts/\x1b[31mred.txt").touch()
    result = command("pack", "texts", "--tokenizer", "bytes", "--out", "packed")
    assert result.status == 0
    assert "\x1b" not in result.out
    assert "red.txt" in result.out


def test_help_loads_neither_torch_nor_numpy() -> None:
    code = (
        "import sys; from wkv.cli import main; "
        "print([main(['data', *line, '--help']) for line in ([], ['pack'], ['info'])], "
        "{'torch', 'numpy'} & set(sys.modules), file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stderr == "[0, 0, 0] set()\n"


def test_progress_shows_documents_bytes_and_rate(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    with show_packing() as show:
        show(1234, 5_000_000, 67890, 0.5)
    captured = capsys.readouterr()
    assert captured.out == ""
    for part in ("1,234 documents", "5 MB", "67,890 tokens", "tokens/s"):
        assert part in captured.err


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_a_stopped_packer_leaves_no_process_and_no_pack(
    folder: Path, sent: signal.Signals, status: int
) -> None:
    with Path("big.jsonl").open("w") as file:
        for i in range(150):
            file.write(json.dumps({"text": f"{i} " * 100_000}) + "\n")
    line = [*RUN, "data", "pack", "big.jsonl", "--tokenizer", "bytes", "--out", "packed", "--workers", "2"]
    process = subprocess.Popen(line, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_for(lambda: len(session(process.pid)) >= 3)  # those that encode are about to start
    if sent == signal.SIGINT:
        os.killpg(process.pid, sent)  # as a terminal does
    else:
        process.kill()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status, errors.decode()
    wait_for(lambda: not session(process.pid))
    assert not Path("packed/data.json").exists()
    if sent == signal.SIGINT:
        assert errors.decode().splitlines()[-1] == "wkv: stopped"
        assert not Path("packed").exists()
    assert main(["data", "pack", "texts", "--tokenizer", "bytes", "--out", "packed"]) == 0


def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("it never came to be")


def session(leader: int) -> list[int]:
    """The processes that are alive in a session, from /proc/PID/stat: state, parent, group, session."""
    members = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, number = entry.read_text().rpartition(")")[2].split()[:4]
        except OSError:  # it ended just now
            continue
        if int(number) == leader and state != "Z":
            members.append(int(entry.parent.name))
    return members

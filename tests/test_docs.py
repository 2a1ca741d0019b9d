"""The README's code and commands, and the examples, run as they stand."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path

import pytest
import torch

import wkv
from wkv.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a small byte-level model.pth in it, as the current one."""
    config = wkv.RWKV7Config(vocab_size=256, n_layer=2, n_embd=32, dim_att=32, dim_ffn=64, head_size=16)
    wkv.save(wkv.build(config), tmp_path / "model.pth")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("code", blocks("python"), ids=lambda code: f"{len(code)} characters")
def test_the_python_of_the_readme_runs(code: str, workplace: Path) -> None:
    exec(compile(code, "README.md", "exec"), {})


def commands(block: str) -> list[str]:
    return [line.split("#")[0].strip() for line in block.splitlines() if line.startswith("wkv ")]


@pytest.mark.parametrize("block", [*filter(commands, blocks("sh"))], ids=lambda block: commands(block)[0])
def test_the_commands_of_the_readme_run_one_after_another(
    block: str, workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: (_ for _ in ()).throw(EOFError))  # for chat
    for command in commands(block):
        arguments = shlex.split(command)[1:]
        if arguments[0] in ("bench", "quantize-report"):
            continue  # takes minutes by design; its own tests run it on a small scale
        assert main(arguments) == 0, command
        assert arguments[0] in ("convert", "chat") or capsys.readouterr().out


def test_the_two_commands_of_the_readme_are_targets_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for line in blocks("sh")[0].splitlines():
        target = line.split()[1]
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), line


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_an_example_is_short_and_runs(
    example: Path, workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(example.read_text().splitlines()) < 40
    monkeypatch.setattr("sys.argv", [example.name])
    runpy.run_path(str(example), run_name="__main__")
    assert capsys.readouterr().out
    assert torch.is_grad_enabled()

"""Those who listen to a run."""

from __future__ import annotations

import functools
import json
import sys
import types
from pathlib import Path

import pytest
import torch
from train_runs import same_weights, trainer

from wkv.errors import MissingExtraError
from wkv.training import TensorBoard


class Writer:
    """What torch's SummaryWriter is asked for."""

    def __init__(self, folder: str) -> None:
        self.folder, self.scalars, self.closed = folder, [], False
        Writer.last = self

    def add_scalar(self, name: str, value: float, tokens: int) -> None:
        self.scalars.append((name, value, tokens))

    def close(self) -> None:
        self.closed = True


def test_tensorboard_gets_what_metrics_jsonl_gets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    trainer(tmp_path / "run", tokens=700, callbacks=[TensorBoard(tmp_path / "board")]).fit()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    expected = [
        (name, value, line["tokens"])
        for line in lines
        for name, value in line.items()
        if name not in ("step", "tokens")
    ]
    assert {"loss", "gradient_norm", "learning_rate", "validation_loss"} <= {name for name, *_ in expected}
    assert Writer.last.scalars == expected
    assert Writer.last.folder == str(tmp_path / "board")
    assert Writer.last.closed


def test_without_tensorboard_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # as if it were not installed
    with pytest.raises(MissingExtraError, match=r"wkv\[tensorboard\]"):
        TensorBoard(tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("arch", ["RWKV4", "RWKV7"])
def test_a_compiled_run_learns_the_same(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The graphs and their backward as the compiler sees them, run without a C++ compiler.
    compile_, compiled_modules = functools.partial(torch.compile, backend="aot_eager"), []
    monkeypatch.setattr(torch, "compile", lambda module: compiled_modules.append(module) or compile_(module))
    plain, compiled = trainer(arch=arch, tokens=500), trainer(arch=arch, tokens=500, compile=True)
    assert compiled_modules == [compiled.objective]
    plain.fit()
    compiled.fit()
    for a, b in zip(plain.model.parameters(), compiled.model.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-4)
    assert not same_weights(plain.model, trainer(arch=arch).model)  # something was learnt

"""`wkv demo` from the command line to the files that it leaves, on a small corpus and for seconds."""

from __future__ import annotations

import itertools
import os
import re
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import wkv
from wkv import evaluation, plots, training
from wkv.cli import demo as command
from wkv.cli import main
from wkv.cli.progress import ProgressLine
from wkv.training import Document, Trainer

PNG = b"\x89PNG\r\n\x1a\n"
RUN = [sys.executable, "-c", "import sys; from wkv.cli import main; sys.exit(main())", "demo"]
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}  # other tests have the other cores


@pytest.fixture(scope="session")
def corpus() -> list[Document]:
    """The beginnings of sixty library files; three are held out."""
    long_ones = [document for document in training.standard_library() if len(document.text) > 3000]
    return [Document(document.path, document.text[:3000]) for document in long_ones[:60]]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, corpus: list[Document]) -> None:
    monkeypatch.setattr(training, "standard_library", lambda: corpus)
    monkeypatch.setattr(command, "COMPARED_TOKENS", 48)
    monkeypatch.setattr(command, "POSITIONS", (10, 700))
    ticks = itertools.count()  # every step takes 1/8 s, on whatever machine
    monkeypatch.setattr("wkv.training.trainer.perf_counter", lambda: next(ticks) / 8)
    monkeypatch.setattr(command, "SAMPLE_TOKENS", 8)
    monkeypatch.setattr(command, "COMPLETION_TOKENS", 90)


def table(report: str) -> dict[str, str]:
    rows = re.findall(r"^\| (.+?) \| (.+?) \|$", report, flags=re.MULTILINE)
    return {label.strip("*`"): value.strip("*") for label, value in rows}


@pytest.mark.parametrize("arch", ["rwkv4", "rwkv5", "rwkv6", "rwkv7"])
def test_every_generation_trains_saves_reports_and_writes(
    arch: str, tmp_path: Path, corpus: list[Document], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a run"
    assert main(["demo", "--arch", arch, "--minutes", "0.025", "--out", str(out), "--seed", "3"]) == 0
    shown = capsys.readouterr()
    assert sorted(path.name for path in out.iterdir()) == ["loss.png", "model.safetensors", "report.md"]

    # Every figure of the report belongs to the file, measured again here.
    model, tokenizer = wkv.load(out / "model.safetensors")
    assert f"rwkv{model.config.generation}" == arch
    assert tokenizer is not None and tokenizer.name == "bytes"
    read, held_out = training.split(corpus, seed=3)
    unseen = b"".join(document.text for document in held_out)
    text = (out / "report.md").read_text(encoding="utf-8")
    report = table(text)
    figures = evaluation.measure_compression(unseen, primer=b"".join(document.text for document in read))
    documents = [training.as_tokens(document.text + b"\0") for document in held_out]
    bits = training.validate(model, documents, separator=0, n_bytes=len(unseen)).bits_per_byte
    assert report["this model"] == f"{bits:.3f}"
    assert report["gzip -9"] == f"{figures.gzip:.3f}"
    assert report["xz -9"] == f"{figures.xz:.3f}"
    assert report["xz -9`, primed with the training text"] == f"{figures.xz_primed:.3f}"
    assert "9,000 bytes in 3 files" in text
    assert all(document.path in text for document in held_out)
    assert float(report["largest difference between parallel and recurrent logits"]) < 1e-3
    assert report["state, whatever the length of the text"] == f"{model.initial_state().nbytes:,} bytes"
    assert report["parameters"] == f"{sum(p.numel() for p in model.parameters()):,}"
    for position in (10, 700):
        assert 0 < float(report[f"time per token at position {position}"].removesuffix(" ms")) < 1000
    assert report["tokens seen"] == f"{12 * 8 * 128:,}, in 12 steps of 8 x 128"
    assert report["training time"] == "1.5 s"
    assert report["speed"] == f"{8 * 8 * 128:,} tokens/s"
    assert f"wkv demo --arch {arch} --minutes 0.025 --out '{out}' --seed 3" in text
    assert torch.__version__ in report["versions"]
    assert "![bits per byte during the training](loss.png)" in text
    assert (out / "loss.png").read_bytes().startswith(PNG)

    # Two completions are streamed to stdout and kept in the report: its own, and that of the model of wkv.
    written = shown.out.removeprefix("\nIt writes:\n\n").split("\n\n\n  bits per byte")[0]
    own, title, shipped = re.split(r"\n\n(The model that comes with wkv, .* writes:)\n\n", written)
    assert "5,879,040 parameters" in title
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", own)  # commands to the terminal
    for completion in (own, shipped):
        assert completion.startswith("def ") and len(completion) > 30
        assert "\n".join(f"    {line}" for line in completion.split("\n")) in text
    assert "next:" in shown.out and "report.md" in shown.out
    assert f"gzip -9: {figures.gzip:.2f} bits/byte" in shown.err
    progress = re.findall(r"loss \d\.\d{3} +\d\.\d\d bits/byte .* 8,192 tokens/s +0:0[012] left", shown.err)
    assert len(progress) == 12
    assert len(re.findall(r"^after [01] s it writes ['\"]def ", shown.err, flags=re.MULTILINE)) == 3


@pytest.fixture
def no_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = command.Measured(1, 2.0, evaluation.Compression(2.1, 1.9, 1.5), 1e-6, 1.0, 64, [1e-3, 1e-3])
    monkeypatch.setattr(command, "_measure", lambda *_: figures)


def press_ctrl_c_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Trainer._gradients

    def gradients(trainer: Trainer, batch: training.data.Batch) -> object:
        if trainer.progress.step == steps - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return honest(trainer, batch)

    monkeypatch.setattr(Trainer, "_gradients", gradients)


@pytest.mark.usefixtures("no_measuring")
def test_ctrl_c_keeps_what_was_learnt_and_finishes_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    press_ctrl_c_after(4, monkeypatch)
    assert main(["demo", "--out", str(tmp_path)]) == 0
    model, _ = wkv.load(tmp_path / "model.safetensors")
    assert model.config.generation == 7
    report = table((tmp_path / "report.md").read_text(encoding="utf-8"))
    assert report["tokens seen"] == "4,096, in 4 steps of 8 x 128"
    assert report["training time"].endswith("s, ended early with Ctrl-C")


def test_ctrl_c_before_the_first_step_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "_begin", lambda trainer: os.kill(os.getpid(), signal.SIGINT))
    assert main(["demo", "--out", str(tmp_path)]) == 130
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_measuring")
def test_without_matplotlib_the_report_says_so_and_no_old_picture_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # as if it were not installed
    (tmp_path / "loss.png").write_bytes(b"of an earlier run")
    assert main(["demo", "--arch", "rwkv4", "--minutes", "0.005", "--out", str(tmp_path)]) == 0
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "No loss curve: matplotlib is not installed" in report
    assert "pip install 'wkv[plots]'" in report
    assert not (tmp_path / "loss.png").exists()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--minutes", "0"], "--minutes is 0. Expected: more than 0"),
        (["--minutes", "nan"], "--minutes is nan"),
        (["--minutes", "inf"], "--minutes is inf"),
        (["--seed", "-1"], "--seed is -1. Expected: 0 to 2^63 - 1"),
        (["--arch", "rwkv3"], "rwkv3"),
    ],
)
def test_a_setting_out_of_range_is_one_clear_line(
    arguments: list[str], complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", "--out", str(tmp_path / "run"), *arguments]) == 2
    message = capsys.readouterr().err
    assert complaint in message and message.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_file_in_the_place_of_the_folder_is_noticed_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").write_text("mine")
    assert main(["demo", "--out", str(tmp_path / "run")]) == 1
    assert "File exists" in capsys.readouterr().err


def test_a_terminal_gets_one_live_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes this for a terminal
    monkeypatch.setenv("COLUMNS", "120")
    history: list[command.Moment] = []
    progress = ProgressLine()
    for i in range(1, 201):
        history.append(command.Moment(i, 1024 * i, 0.9 * i, 0.005 * i, 2.0))
        progress.show(history[-1].done, command._progress_line(history, 1.97))
        if i in (50, 100, 150):
            progress.say("it writes 'def a[b]'")
    progress.close()
    shown = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", capsys.readouterr().err)
    assert "loss 2.000   2.89 bits/byte (gzip 1.97)   1,138 tokens/s   0:00 left" in shown
    assert shown.count("it writes 'def a[b]'\n") == 3


def test_the_estimate_of_time_left_is_in_minutes_and_seconds() -> None:
    line = command._progress_line([command.Moment(1, 1000, 60.0, 1 / 3, 1.0)], 2.0)
    assert line.endswith("2:00 left")


def test_smoothing_starts_at_the_first_value_and_follows() -> None:
    assert plots.smoothed([5.0, 5.0, 5.0]) == pytest.approx([5.0, 5.0, 5.0])
    assert plots.smoothed([8.0] + [2.0] * 500)[-1] == pytest.approx(2.0, abs=1e-4)
    assert plots.smoothed([]) == []


def test_a_loss_curve_is_a_picture_of_readable_size() -> None:
    png = plots.loss_curve(
        [100, 200, 300], [8.0, 4.0, 3.0], title="t", levels={"gzip -9": 2.0}, end=("held-out", 3.1)
    )
    assert png.startswith(PNG)
    width, height = struct.unpack(">II", png[16:24])
    assert width >= 800 and height >= 400


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_real_ctrl_c_ends_the_demo_in_good_order(tmp_path: Path) -> None:
    arguments = ["--arch", "rwkv4", "--minutes", "5", "--out", str(tmp_path)]
    errors = tmp_path / "errors"
    with (
        errors.open("w") as stderr,
        subprocess.Popen([*RUN, *arguments], stderr=stderr, env=ONE_THREAD) as process,
    ):
        try:
            while process.poll() is None and "tokens/s" not in errors.read_text():
                time.sleep(1)  # the first line of progress comes after 15 s
            process.send_signal(signal.SIGINT)
            assert process.wait() == 0, errors.read_text()
        finally:
            process.kill()
    assert "ended early with Ctrl-C" in (tmp_path / "report.md").read_text(encoding="utf-8")
    wkv.load(tmp_path / "model.safetensors")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_model_of_minutes_comes_near_gzip_on_files_never_seen(tmp_path: Path) -> None:
    # Near, because how far it gets in three minutes is the machine's affair; two idle cores pass gzip.
    subprocess.run([*RUN, "--minutes", "3", "--out", str(tmp_path)], check=True, env=ONE_THREAD)
    report = table((tmp_path / "report.md").read_text(encoding="utf-8"))
    assert float(report["training time"].removesuffix(" s")) < 185
    assert float(report["this model"]) < 1.25 * float(report["gzip -9"])

"""The report of a run, from folders made by hand: what it says, what it survives, what it lets through."""

import json
import math
import os
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from wkv.errors import CheckpointError
from wkv.plots import Panel, Smoothed, outline, smoothed, stacked
from wkv.viz import write_report

CONFIG = '[model]\narch = "rwkv7"\n\n[training]\nbatch_size = 4\ntokens = 1000000\n'
ORIGIN = {
    "wkv": "0.1.0",
    "torch": "2.10.0",
    "python": "3.11.9",
    "command": ["wkv", "train", "my texts", "--out", "run"],
    "identity": {"model": "aaaa1111", "data": "bbbb2222", "validation": None},
}
TOKENS = 500  # of each step


def steps(n: int) -> list[dict[str, Any]]:
    """Metrics of a run that learns; a validation every 10 steps, the best of which is at 40."""
    records = []
    for step in range(1, n + 1):
        record = {"step": step, "tokens": TOKENS * step, "loss": 2 + 3 / step, "gradient_norm": 1 / step}
        record["learning_rate"] = 1e-3
        if step % 10 == 0:
            record["validation_loss"] = 2.0 + 0.01 * abs(step - 40)
            record["bits_per_byte"] = record["validation_loss"] / math.log(2)
        records.append(record)
    return records


def lines(records: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def make_run(folder: Path, metrics: list[dict[str, Any]], events: list[dict[str, Any]] | None = None) -> Path:
    (folder / "samples").mkdir(parents=True)
    (folder / "config.toml").write_text(CONFIG)
    (folder / "run.json").write_text(json.dumps(ORIGIN))
    (folder / "metrics.jsonl").write_text(lines(metrics))
    (folder / "timings.jsonl").write_text(lines([{"step": r["step"], "seconds": 0.5} for r in metrics]))
    if events:
        (folder / "events.jsonl").write_text(lines(events))
    return folder


def report(folder: Path) -> str:
    return write_report(folder).read_text("utf-8")


@pytest.fixture
def no_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if it were not installed; a test of the text alone is faster so."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)


def size(png: bytes) -> tuple[int, int]:
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    return struct.unpack(">II", png[16:24])


@pytest.mark.usefixtures("no_matplotlib")
def test_the_report_says_where_the_run_stands(tmp_path: Path) -> None:
    text = report(make_run(tmp_path / "run", steps(60)))
    assert text.startswith("# A run of wkv train: 60 steps, 30,000 of 1,000,000 tokens\n")
    assert "Held-out documents at step 60: 2.2000 nats per token, perplexity 9.03, 3.1739 bits" in text
    assert "Best held-out loss: 2.0000, at step 40." in text
    assert "0:00:30 of training, 1,000 tokens/s." in text
    assert "| 40 (best) | 20,000 | 2.0000 | 7.39 | 2.8854 |" in text
    assert text.index("| 60 |") < text.index("| 10 |")  # the newest first
    assert "    batch_size = 4\n" in text
    assert "    command     wkv train 'my texts' --out run\n" in text
    assert "    data        bbbb2222\n" in text


def test_the_pictures_are_of_readable_size(tmp_path: Path) -> None:
    text = report(make_run(tmp_path / "run", steps(60)))
    for name in ("loss.png", "rates.png"):
        assert f"]({name})" in text
        width, height = size((tmp_path / "run" / name).read_bytes())
        assert width >= 800 and height >= 400


def test_the_same_files_give_the_same_report_and_pictures(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", steps(20))
    written = []
    for _ in range(2):
        write_report(folder)
        written.append([(folder / name).read_bytes() for name in ("report.md", "loss.png", "rates.png")])
    assert written[0] == written[1]


def test_nothing_is_left_behind_besides_the_report_and_its_pictures(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", steps(3))
    before = set(os.listdir(folder))
    write_report(folder)
    assert set(os.listdir(folder)) - before == {"report.md", "loss.png", "rates.png"}


def test_a_run_without_a_step_has_a_report_and_no_picture(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", [])
    for name in ("metrics.jsonl", "timings.jsonl"):
        (folder / name).unlink()  # the first line makes them
    (folder / "loss.png").write_bytes(b"of an earlier run")
    text = report(folder)
    assert text.startswith("# A run of wkv train: no step yet\n")
    assert ".png" not in text and not (folder / "loss.png").exists()
    assert f"    wkv train --out {folder}  #" in text


def test_a_run_of_one_step_has_pictures(tmp_path: Path) -> None:
    text = report(make_run(tmp_path / "run", steps(1)))
    assert text.startswith("# A run of wkv train: 1 step, 500 of 1,000,000 tokens\n")
    assert "Training: 5.0000 nats per token (smoothed), perplexity 148.41." in text
    assert "loss.png" in text


@pytest.mark.parametrize("name", ["metrics.jsonl", "timings.jsonl"])
def test_half_a_last_line_does_not_count(tmp_path: Path, name: str) -> None:
    folder = make_run(tmp_path / "run", steps(5))
    whole = report(folder)
    with open(folder / name, "a") as file:
        file.write('{"step": 6, "tok')
    assert report(folder) == whole


@pytest.mark.usefixtures("no_matplotlib")
def test_steps_whose_timings_did_not_reach_the_disk_do_not_change_the_speed(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", steps(5))
    (folder / "timings.jsonl").write_text(lines([{"step": 1, "seconds": 0.5}, {"step": 2, "seconds": 0}]))
    assert "0:00:00 of training, 2,000 tokens/s." in report(folder)


@pytest.mark.parametrize("nothing", [None, math.nan, 0.0, -1.0])
def test_figures_that_no_curve_can_show_are_left_out(tmp_path: Path, nothing: float | None) -> None:
    metrics = steps(20)
    for record in metrics:
        record["gradient_norm"] = nothing
    metrics[4]["loss"] = metrics[9]["validation_loss"] = None
    del metrics[19]["bits_per_byte"]
    text = report(make_run(tmp_path / "run", metrics))
    assert "| 10 |" not in text
    assert "| 20 (best) | 10,000 | 2.2000 | 9.03 |  |" in text
    assert "Held-out documents at step 20: 2.2000 nats per token, perplexity 9.03." in text
    assert "nan" not in text


def test_a_run_of_nothing_but_nulls_has_a_report(tmp_path: Path) -> None:
    metrics = [{**record, "loss": None, "gradient_norm": None} for record in steps(5)]
    text = report(make_run(tmp_path / "run", metrics))
    assert "Training:" not in text and "loss.png" in text


@pytest.mark.usefixtures("no_matplotlib")
def test_a_step_that_was_not_learnt_from_leaves_the_loss_alone(tmp_path: Path) -> None:
    metrics = steps(5)
    before = report(make_run(tmp_path / "good", metrics))
    metrics.append({**metrics[-1], "step": 6, "loss": 1e9, "skipped": "the gradients are not finite"})
    events = [{"event": "skipped", "step": 6, "what": "step 6 was not learnt from", "time": "noon"}]
    after = report(make_run(tmp_path / "bad", metrics, events))
    training = next(line for line in before.splitlines() if line.startswith("Training:"))
    assert training in after
    assert "    noon  skipped: step 6 was not learnt from\n" in after


def test_changes_that_were_accepted_are_all_in_one_line(tmp_path: Path) -> None:
    events = [{"event": "changed", "step": None, "what": ["tokens was 1", "seed was 0"], "time": "noon"}]
    assert "    noon  changed: tokens was 1; seed was 0\n" in report(make_run(tmp_path / "run", [], events))


@pytest.mark.usefixtures("no_matplotlib")
def test_the_newest_samples_are_shown_but_none_of_a_step_that_was_undone(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", steps(50))
    for step in (10, 20, 30, 40, 60):
        (folder / "samples" / f"step-{step:09}.txt").write_text(f"text of {step}\n\n  and more")
    (folder / "samples" / "notes.txt").write_text("text of nobody")
    text = report(folder)
    assert "## Samples: the newest 3 of 4\n\nAfter step 40:\n\n    text of 40\n\n      and more\n" in text
    assert [step for step in (10, 20, 30, 40, 60) if f"text of {step}" in text] == [20, 30, 40]
    assert "nobody" not in text


def test_text_out_of_files_is_never_markdown_and_holds_no_control_characters(tmp_path: Path) -> None:
    hostile = "```\r\n# title\n<img src=x>\x1b[2J\x07\x00\x85 \u2028\u202e\n\tkept 中文\u3000é |"
    events = [{"event": "skipped", "step": 1, "what": hostile, "time": "\n# noon \ud800"}]
    folder = make_run(tmp_path / "run", steps(10), events)
    (folder / "samples" / "step-000000010.txt").write_bytes(hostile.encode() + b"\xff\xfe")
    (folder / "config.toml").write_text(CONFIG + "# ```\n# <b>\n", "utf-8")
    (folder / "run.json").write_text(json.dumps({**ORIGIN, "command": ["wkv", hostile], "torch": hostile}))
    text = report(folder)
    unknown = "\N{REPLACEMENT CHARACTER}"
    assert (
        f"    # title\n    <img src=x>{unknown}[2J{unknown * 3} {unknown * 2}\n    \tkept 中文\u3000é |"
        in text
    )
    assert not [c for c in text if not (c.isprintable() or c in "\n\t\u3000")]
    own = ("# A run", "## ", "![", "|", "Training", "Held-out", "Best", "0:", "After step", "    ")
    assert [line for line in text.split("\n") if line and not line.startswith(own)] == []
    assert text.count("\n# ") == 0


@pytest.mark.usefixtures("no_matplotlib")
def test_long_texts_and_long_lists_are_cut_and_say_so(tmp_path: Path) -> None:
    events = [{"event": "resumed", "step": i, "what": f"event {i}.", "time": ""} for i in range(80)]
    folder = make_run(tmp_path / "run", steps(500), events)
    (folder / "samples" / "step-000000010.txt").write_text("a" * 100_000)
    text = report(folder)
    assert len(text) < 10_000
    assert "## Held-out documents: the newest 20 of 50\n" in text
    assert "## Events: the newest 50 of 80\n" in text
    assert "event 79." in text and "event 29." not in text
    assert "Best held-out loss: 2.0000, at step 40." in text  # although its row is not shown


@pytest.mark.usefixtures("no_matplotlib")
def test_without_matplotlib_the_report_says_so_and_no_old_picture_stays(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", steps(20))
    (folder / "rates.png").write_bytes(b"of an earlier report")
    text = report(folder)
    assert "No pictures: matplotlib is not installed" in text and "pip install 'wkv[plots]'" in text
    assert ".png" not in text and not (folder / "rates.png").exists()
    assert "| 20 (best) |" in text


@pytest.mark.usefixtures("no_matplotlib")
def test_what_to_type_next_survives_a_shell(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "my run", steps(50))
    best = folder / "checkpoints" / "step-000000040"
    best.mkdir(parents=True)
    (best / "model.safetensors").touch()
    text = report(folder)
    assert f"    wkv train --out '{folder}'  #" in text
    assert f"    wkv generate '{folder}/model.safetensors' \"The \"  #" in text
    assert f"    wkv generate '{best}/model.safetensors' \"The \"  # the best so far\n" in text


def test_a_folder_that_is_no_run_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.toml cannot be read.*Expected: the folder of a run"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.toml", b"[training\n"),
        ("config.toml", b"\xff"),
        ("run.json", b"{"),
        ("run.json", b"7"),
        ("metrics.jsonl", b'{"step": 1}\n\x00\x00\n'),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    folder = make_run(tmp_path / "run", steps(3))
    (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name} cannot be read"):
        write_report(folder)


def test_the_outline_of_a_long_curve_is_short_and_keeps_every_spike() -> None:
    y = np.zeros(1_000_000)
    y[[0, 123_456, 999_999]] = 5, 7, -3
    x, kept = outline(np.arange(len(y)), y)
    assert len(kept) <= 2000 and np.all(np.diff(x) > 0)
    assert {(i, y[i]) for i in (0, 123_456, 999_999)} <= set(zip(x, kept, strict=True))


def test_the_outline_of_a_short_curve_is_the_curve_without_what_cannot_be_shown() -> None:
    x, y = [1, 2, 3, 4, 5], [1.0, math.nan, math.inf, 0.0, -1.0]
    assert [part.tolist() for part in outline(x, y)] == [[1, 4, 5], [1, 0, -1]]
    assert [part.tolist() for part in outline(x, y, positive=True)] == [[1], [1]]
    assert [part.tolist() for part in outline([], [])] == [[], []]


def test_smoothing_passes_over_what_is_not_finite() -> None:
    course = smoothed([math.nan, 2.0, math.inf, 4.0])
    assert math.isnan(course[0]) and math.isnan(Smoothed().value)
    assert course[1] == course[2] == pytest.approx(2.0)
    assert course[3] == pytest.approx((0.97 * 2 + 4) / 1.97)


def test_more_panels_make_a_higher_picture() -> None:
    panel = Panel(name="loss", values=[3.0, 2.0])
    heights = [size(stacked([1, 2], [panel] * n, xlabel="tokens"))[1] for n in (1, 3)]
    assert heights[1] > 1.5 * heights[0]

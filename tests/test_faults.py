"""Faults on purpose: the disk, the power, the process, the numbers. What a run has saved is never lost.

Each test tries a few times in `make test`, and hundreds of times in `make scorecard`.
"""

import contextlib
import json
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from faulty_disk import FAULTS, SHORT, Disk, FaultyDisk, Journal, Killed, power_cut
from train_runs import Corpus, config, token_data

import wkv
from wkv.checkpoints import read_safetensors
from wkv.cli import main
from wkv.errors import CheckpointError, CorruptFileError, DivergenceError
from wkv.training import Callback, Trainer, snapshots
from wkv.training.run_folder import Records, read_records

STEPS = 12
COMMAND = str(Path(sys.executable).with_name("wkv"))


def tiny_model():
    return wkv.build(wkv.RWKV4Config.of_size(vocab_size=50, n_layer=1, n_embd=16, dim_ffn=16), seed=0)


def tiny_trainer(folder, callbacks=(), model=None, **changes):
    """Of a run of 12 steps of a few milliseconds, which saves every second one."""
    usual = dict(
        batch_size=2, context=8, tokens=185, order="streams", warmup_tokens=20,
        validate_every=5, save_every=2, keep_last=2,
    )  # fmt: skip
    torch.manual_seed(0)
    data = Corpus(token_data(12, longest=20), token_data(2, seed=1, longest=12))
    return Trainer(model or tiny_model(), data, config(**{**usual, **changes}), callbacks, folder=folder)


class When(Callback):
    """Calls something at a moment of a run: When(on_step=action), When(on_start=action)."""

    def __init__(self, **moments):
        for moment, action in moments.items():
            setattr(self, moment, lambda trainer, *details, action=action: action(trainer))


def at_step(step, action):
    return When(on_step=lambda trainer: action(trainer) if trainer.progress.step == step else None)


class Stop(Exception):
    """The end of a process, without the process."""


def stop(trainer):
    raise Stop


def tensors_of(snapshot):
    """All bytes of all tensors, each compared with its digest: CorruptFileError when one differs."""
    return {
        file.name: {name: tensor.numpy().tobytes() for name, tensor in read_safetensors(file)[0].items()}
        for file in sorted(snapshot.path.glob("*.safetensors"))
    }


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The run that nothing happens to: its metrics, and its tensors after each step."""
    folder = tmp_path_factory.mktemp("plain")
    tiny_trainer(folder, save_every=1, keep_last=1000).fit()
    steps = {path: snapshots.read(path) for path in snapshots.complete(folder / "checkpoints")}
    tensors = {snapshot.step: tensors_of(snapshot) for snapshot in steps.values()}
    assert sorted(tensors) == list(range(STEPS + 1))
    return PlainRun((folder / "metrics.jsonl").read_bytes(), tensors)


class PlainRun:
    def __init__(self, metrics, tensors):
        self.metrics, self.tensors = metrics, tensors

    def newest_in(self, folder):
        """The newest checkpoint in a folder, where all of them are the plain run's of those steps."""
        for path in snapshots.complete(folder / "checkpoints"):
            snapshot = snapshots.read(path)
            assert tensors_of(snapshot) == self.tensors[snapshot.step]
        return snapshots.newest(folder / "checkpoints", tensors_of, pytest.fail)

    def is_the_end_of(self, folder, **changes):
        """Whether the same command again ends as the plain run does."""
        tiny_trainer(folder, **changes).fit()
        for name in ("metrics", "timings", "events"):
            steps = [record["step"] for record in read_records(folder / f"{name}.jsonl")]
            assert name == "events" or steps == list(range(1, STEPS + 1))
        return (
            self.newest_in(folder).step == STEPS and (folder / "metrics.jsonl").read_bytes() == self.metrics
        )


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# T03: a call fails


@pytest.mark.scorecard(
    "T03", "the n-th call of a save fails: disk full, I/O error, too large, forbidden, cut short"
)
def test_whichever_call_of_a_save_fails_the_checkpoints_before_stay(tmp_path, plain, card):
    folder, before, tried = tmp_path / "run" / "checkpoints", tmp_path / "before", 0

    def save_again_and_again(run):
        nonlocal tried
        shutil.copytree(folder, before)
        old = snapshots.complete(folder)
        for fault in range(len(FAULTS) + 1):
            for fail_at in range(1, 1000):
                chosen = [*FAULTS, SHORT][fault if card.full else fail_at % 5]
                tried += 1
                if not save(run, old, fail_at, chosen):
                    break
            if not card.full:
                break

    def save(run, old, fail_at, fault):
        """Whether there was an n-th call, after the checks."""
        error = None
        with pytest.MonkeyPatch.context() as patch:
            disk = FaultyDisk(patch, fail_at, fault)
            try:
                run.save()
            except Exception as raised:
                error = raised
        if fault is SHORT or disk.calls < fail_at:
            assert error is None
        else:
            assert isinstance(error, CheckpointError), f"call {fail_at} of {disk.calls}: {error!r}"
            assert fault.strerror in str(error) and str(tmp_path / "run") in str(error)
        is_saved = (folder / "step-000000005").exists()
        if not is_saved:
            assert names(folder) == names(before), f"left behind by call {fail_at}"
        assert is_saved or set(old) == set(snapshots.complete(folder))
        assert plain.newest_in(folder.parent).step == (5 if is_saved else 4)
        run._saved = None
        with pytest.MonkeyPatch.context() as patch:
            FaultyDisk(patch, 0, None)
            run.save()  # as if nothing had been
        assert plain.newest_in(folder.parent).step == 5
        shutil.rmtree(folder)
        shutil.copytree(before, folder)
        run._saved = None
        return disk.calls >= fail_at

    tiny_trainer(tmp_path / "run", [at_step(5, save_again_and_again)]).fit()
    assert tried > 50
    assert plain.is_the_end_of(tmp_path / "run")
    card.record(tried)


@pytest.mark.scorecard(
    "T03", "the n-th call of a whole run fails, one that goes on from a checkpoint; then it is started again"
)
def test_whichever_call_of_a_run_fails_the_same_command_ends_it(tmp_path, plain, card):
    with pytest.raises(Stop):
        tiny_trainer(tmp_path / "before", [at_step(3, stop)]).fit()
    chance = random.Random(3)
    with pytest.MonkeyPatch.context() as patch:
        disk = FaultyDisk(patch, 0, None)
        shutil.copytree(tmp_path / "before", tmp_path / "count")
        tiny_trainer(tmp_path / "count").fit()
    tries = card.count(quick=2, full=40)
    for i in range(tries):
        folder = tmp_path / str(i)
        shutil.copytree(tmp_path / "before", folder)
        with pytest.MonkeyPatch.context() as patch:
            FaultyDisk(patch, chance.randint(1, disk.calls), chance.choice(FAULTS))
            with contextlib.suppress(CheckpointError):
                tiny_trainer(folder).fit()
        assert plain.newest_in(folder).step >= 2
        assert plain.is_the_end_of(folder)
    card.record(tries)


@pytest.mark.scorecard("T03", "the n-th call while a line is added to the records fails")
def test_whichever_call_fails_the_records_keep_whole_lines(tmp_path, card):
    tried = 0
    for fault in [*FAULTS, SHORT]:
        for fail_at in range(1, 10):
            path = tmp_path / "metrics.jsonl"
            path.write_bytes(b'{"step": 1}\n')
            records = Records(path)
            with pytest.MonkeyPatch.context() as patch:
                disk = FaultyDisk(patch, fail_at, fault)
                try:
                    for step in (2, 3):
                        records.append({"step": step})
                    records.sync()
                except CheckpointError as error:
                    assert str(path) in str(error)
                else:
                    assert disk.calls < fail_at or fault is SHORT
            records.close()
            found = read_records(path)
            assert found == [{"step": i + 1} for i in range(len(found))]
            records.append({"step": len(found) + 1})
            records.close()
            assert len(read_records(path)) == len(found) + 1
            tried += disk.calls >= fail_at
    assert tried >= 20
    card.record(tried)


def test_the_systems_own_size_limit_leaves_the_checkpoints_before(tmp_path, plain):
    def save_with_a_limit(run):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
        try:
            run.save()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    with pytest.raises(CheckpointError, match=r"File too large.*ulimit"):
        tiny_trainer(tmp_path, [at_step(5, save_with_a_limit)]).fit()
    assert plain.newest_in(tmp_path).step == 4
    assert all(".tmp" not in name for name in names(tmp_path / "checkpoints"))
    assert plain.is_the_end_of(tmp_path)


def test_a_folder_that_cannot_be_made_is_a_clear_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"file/run cannot hold a run: .*Try: another --out"):
        tiny_trainer(tmp_path / "file" / "run").fit()


# T04: the power is cut


@pytest.mark.scorecard("T04", "the power is cut; unsynced writes and names are lost, torn or out of order")
def test_after_a_power_cut_the_last_confirmed_checkpoint_is_there(tmp_path, plain, card):
    """The run is killed and started again meanwhile, in a folder that it makes."""
    with pytest.MonkeyPatch.context() as patch:
        journal = Journal(patch, tmp_path / "disk")
        (tmp_path / "disk").mkdir()
        journal.log.clear()
        confirm = When(
            on_save=lambda trainer: journal.log.append(("confirmed", Path(), trainer.progress.step))
        )
        folder = tmp_path / "disk" / "runs" / "first"
        with pytest.raises(Stop):
            tiny_trainer(folder, [confirm, at_step(7, stop)]).fit()
        journal.log.append(("restarted", Path()))
        tiny_trainer(folder, [confirm]).fit()
    assert plain.newest_in(folder).step == STEPS

    chance = random.Random(4)
    states, taken_up = card.count(quick=40, full=600), card.count(quick=2, full=60)
    for i in range(states):
        log = journal.log[: chance.randint(0, len(journal.log))]
        left = tmp_path / str(i)
        power_cut([entry for entry in log if entry[0] not in ("confirmed", "restarted")], chance, left)
        confirmed = max((entry[2] for entry in log if entry[0] == "confirmed"), default=None)
        found = plain.newest_in(left / "runs" / "first")
        if confirmed is not None:
            assert found is not None and found.step >= confirmed
            metrics = (left / "runs" / "first" / "metrics.jsonl").read_bytes() if found.step else b""
            size = found.progress["metrics_bytes"]
            assert metrics[:size] == plain.metrics[:size]
        if i < taken_up:
            assert plain.is_the_end_of(left / "runs" / "first")
        shutil.rmtree(left)
    card.record(states)


def test_the_power_cuts_of_these_tests_do_harm(tmp_path):
    """Without fsync, the same states lose what was written."""
    with pytest.MonkeyPatch.context() as patch:
        journal = Journal(patch, tmp_path)
        snapshots.write(tmp_path / "a", 1, {"model": ({"x": torch.ones(3000)}, {})}, {})
    log = [entry for entry in journal.log if entry[0] != "sync"]
    outcomes = Counter()
    for i in range(100):
        power_cut(log, random.Random(i), tmp_path / str(i))
        damage = []
        found = None
        with contextlib.suppress(CheckpointError):  # all of them were damaged
            found = snapshots.newest(tmp_path / str(i) / "a", tensors_of, damage.append)
        outcomes["damaged" if damage else "there" if found else "missing"] += 1
    assert outcomes["damaged"] >= 5 and outcomes["missing"] >= 5


# T08: several at once


@pytest.mark.scorecard("T08", "a second process trains in the same folder: it ends with a message")
def test_a_second_process_is_told_of_the_first(tmp_path, card):
    (tmp_path / "a.txt").write_text("Some text to learn from. " * 40)
    folder = tmp_path / "run"
    sizes = "--n-layer 1 --n-embd 16 --head-size 16 --context 8 --batch-size 2 --tokens 32 --held-out 0"
    assert main(["train", str(tmp_path / "a.txt"), "--out", str(folder), *sizes.split()]) == 0
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with tiny_trainer(folder).run:
        second = subprocess.run([COMMAND, "train", "--out", str(folder)], capture_output=True, text=True)
    assert second.returncode == 1
    assert f"another run is training in {folder}" in second.stderr and "Try: another --out" in second.stderr
    assert "Traceback" not in second.stderr
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    card.record(1)


@pytest.mark.scorecard("T08", "checkpoints are read while a run writes new ones and removes old ones")
def test_a_reader_beside_the_run_sees_whole_checkpoints_only(tmp_path, card, monkeypatch):
    reads, given, done = card.count(quick=25, full=500), 0, threading.Event()

    def write():
        step = 0
        while not done.is_set():
            step += 1
            tensors = {f"x{i}": torch.full((500,), step) for i in range(4)}
            parts = {name: (tensors, {}) for name in ("model", "optimizer")}
            snapshots.write(tmp_path, step, parts, {"step": step})
            snapshots.prune(tmp_path, 1, set())
            time.sleep(0.005)

    def check(snapshot):
        nonlocal given
        given += 1
        for name in ("model", "optimizer"):
            time.sleep(chance.uniform(0, 0.01))  # it may be gone by now
            tensors, _ = read_safetensors(snapshot.file(name))
            assert all(bool((tensor == snapshot.step).all()) for tensor in tensors.values())

    FaultyDisk(monkeypatch, 0, None)  # no fault, and no time for fsync
    chance, seen, writer = random.Random(8), [], threading.Thread(target=write)
    writer.start()
    try:
        while len(seen) < reads:
            if snapshot := snapshots.look(tmp_path, check):
                seen.append(snapshot.step)
    finally:
        done.set()
        writer.join()
    assert seen == sorted(seen) and len(set(seen)) > reads / 20
    assert given > reads, "nothing was ever gone"
    assert len(snapshots.complete(tmp_path)) == 1
    card.record(reads)


def test_a_reader_reports_damage_and_touches_nothing(tmp_path):
    assert snapshots.look(tmp_path / "none", tensors_of) is None
    path = snapshots.write(tmp_path, 3, {"model": ({"x": torch.ones(3)}, {})}, {})
    (path / "model.safetensors").write_bytes(b"short")
    with pytest.raises(CorruptFileError, match="has 5 bytes"):
        snapshots.look(tmp_path, tensors_of)
    assert names(tmp_path) == ["step-000000003"]


# T09: numbers that are none


def spoil(run, place, value, is_bad):
    """Put `value` into the loss, or one number of some gradients, whenever `is_bad(step, rate)`."""
    forward = run.objective.forward

    def now():
        return is_bad(run.progress.step + 1, run.progress.rate)

    def spoilt_forward(*arguments):
        loss, state = forward(*arguments)
        return (loss * value if now() and place == "loss" else loss), state

    def spoilt_gradient(gradient):
        if now():
            gradient = gradient.clone()
            gradient[(0,) * gradient.ndim] = value
        return gradient

    run.objective.forward = spoilt_forward
    weights = dict(run.model.named_parameters())
    for name in () if place == "loss" else place:
        weights[name].register_hook(spoilt_gradient)
    return run


def all_finite(folder):
    """Whether every number of every checkpoint is one, and there is a checkpoint."""
    stored = [
        tensor
        for path in snapshots.complete(folder / "checkpoints")
        for file in path.glob("*.safetensors")
        for tensor in read_safetensors(file)[0].values()
    ]
    return bool(stored) and all(torch.isfinite(tensor).all() for tensor in stored)


def is_strict_json(path):
    """Whether every line can be read by programs that know no NaN."""
    return all(json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines())


def events(folder):
    return [record["event"] for record in read_records(folder / "events.jsonl")]


NOT_A_NUMBER = [float("nan"), float("inf"), float("-inf")]
PLACES = {
    "the loss": "loss",
    "one gradient": ["emb.weight"],
    "several gradients": ["head.weight", "ln_out.bias"],
}


@pytest.mark.scorecard(
    "T09", "NaN or infinity in a loss, a gradient, several gradients: the step is not learnt from"
)
@pytest.mark.parametrize("place", PLACES)
def test_a_step_whose_numbers_are_not_finite_is_passed_over(tmp_path, place, card):
    values = NOT_A_NUMBER if card.full else NOT_A_NUMBER[:1]
    steps = (1, 6, 11) if card.full else (6,)
    for value in values:
        for step in steps:
            folder = tmp_path / f"{value}-{step}"
            weights = []
            look = When(
                on_step=lambda run, seen=weights: seen.append([w.clone() for w in run.model.parameters()])
            )
            run = spoil(
                tiny_trainer(folder, [look]), PLACES[place], value, lambda now, _, step=step: now == step
            )
            before = [weight.clone() for weight in run.model.parameters()]
            run.fit()
            weights.insert(0, before)
            changed = [not all(map(torch.equal, a, b)) for a, b in pairwise(weights)]
            assert run.finished and changed == [i != step for i in range(1, run.progress.step + 1)]
            assert events(folder) == ["skipped"] and all_finite(folder)
            assert is_strict_json(folder / "metrics.jsonl")
    card.record(len(values) * len(steps))


@pytest.mark.scorecard(
    "T09", "four bad steps in a row: back to the checkpoint at a lower rate, and twice is enough"
)
def test_a_run_that_goes_on_failing_returns_and_then_stops(tmp_path, card):
    places = list(PLACES.values()) if card.full else ["loss"]
    for i, place in enumerate(places):
        folder = tmp_path / str(i)
        run = spoil(
            tiny_trainer(folder),
            place,
            NOT_A_NUMBER[i],
            lambda step, rate: step in range(6, 10) and rate == 1,
        )
        assert run.fit().returns == 1
        assert run.finished and all_finite(folder)
        assert events(folder) == ["skipped"] * 3 + ["returned"]

        run = spoil(tiny_trainer(folder / "again"), place, NOT_A_NUMBER[i], lambda step, _: step >= 6)
        with pytest.raises(DivergenceError, match=r"training failed at step \d+: the "):
            run.fit()
        assert events(folder / "again").count("returned") == 2
        assert all_finite(folder / "again")
    card.record(2 * len(places))


def test_a_run_that_returns_does_not_remember_whether_it_was_stopped(tmp_path):
    """A checkpoint made because of Ctrl-C is not one to go back to: without Ctrl-C it would not be there."""

    def run(folder, *callbacks):
        return spoil(
            tiny_trainer(folder, callbacks, keep_last=1), "loss", float("nan"),
            lambda step, rate: step in range(6, 10) and rate == 1,
        )  # fmt: skip

    run(tmp_path / "whole").fit()
    for step in (5, 7, 8):
        interrupt = at_step(step, lambda run: signal.raise_signal(signal.SIGTERM))
        assert not run(tmp_path / str(step), interrupt).fit().returns
        assert run(tmp_path / str(step)).fit().returns == 1
        whole, stopped = ((tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", str(step)))
        assert stopped == whole
        assert events(tmp_path / str(step))[-1] == "returned"


@pytest.mark.scorecard("T09", "NaN or infinity in the model to begin with, float16 overflow: refused")
def test_a_model_that_is_not_finite_is_refused_before_the_first_step(tmp_path, card):
    (tmp_path / "a.txt").write_text("Some text to learn from. " * 40)
    overflow = torch.tensor(1e5).to(torch.float16).item()
    values = [*NOT_A_NUMBER, overflow] if card.full else [overflow]
    for i, value in enumerate(values):
        model = wkv.build(wkv.RWKV4Config.of_size(vocab_size=256, n_layer=1, n_embd=16, dim_ffn=16), seed=0)
        model.blocks[0].ffn.key.weight.data[3, 2] = value
        wkv.save(model, tmp_path / f"{i}.pth")
        folder = tmp_path / str(i)
        arguments = [
            "train",
            tmp_path / "a.txt",
            "--init",
            tmp_path / f"{i}.pth",
            "--out",
            folder,
            "--tokenizer",
            "bytes",
        ]
        assert main([*map(str, arguments), "--context", "8", "--tokens", "100", "--held-out", "0"]) == 1
        assert not snapshots.complete(folder / "checkpoints")
        assert read_records(folder / "metrics.jsonl") == []
    card.record(len(values))


@pytest.mark.scorecard(
    "T09", "NaN or infinity in the optimizer or a weight: never saved, back to the checkpoint"
)
@pytest.mark.parametrize("kind", ["exp_avg", "exp_avg_sq", "weight"])
def test_what_is_not_finite_is_never_saved(tmp_path, kind, card):
    values = NOT_A_NUMBER if card.full else NOT_A_NUMBER[1:2]
    for value in values:
        done = []

        def damage(run, done=done, value=value):
            weight = run.model.head.weight
            if run.progress.step == 5 and not done:
                done.append(5)
                (weight.data if kind == "weight" else run.optimizers[0].state[weight][kind])[1, 1] = value

        run = tiny_trainer(tmp_path / str(value), [When(on_step=damage)])
        assert run.fit().returns == 1
        assert run.finished and all_finite(tmp_path / str(value))
        assert events(tmp_path / str(value))[-1] == "returned"
    card.record(len(values))


@pytest.mark.scorecard("T09", "bfloat16 overflow of a weight that is finite in float32")
def test_an_overflow_of_bfloat16_leads_back_to_the_checkpoint(tmp_path, card):
    done = []

    def damage(run):
        if run.progress.step == 6 and not done:
            done.append(6)
            run.model.head.weight.data[1, 1] = torch.finfo(torch.float32).max

    run = tiny_trainer(tmp_path, [When(on_step=damage)], precision="bfloat16", save_every=4)
    assert run.fit().returns >= 1
    assert run.finished and all_finite(tmp_path)
    card.record(1)


@pytest.mark.scorecard("T09", "NaN or infinity as validation loss: never the best")
def test_a_validation_that_is_not_finite_is_never_the_best(tmp_path, card, monkeypatch):
    for value in NOT_A_NUMBER:
        folder = tmp_path / str(value)
        with monkeypatch.context() as patch:
            run = tiny_trainer(folder)
            result = type(run.validate())(value, 10, 10)
            patch.setattr(run, "validate", lambda result=result: result)
            progress = run.fit()
        assert progress.best is None and progress.worse == 3
        found = [record["validation_loss"] for record in read_records(folder / "metrics.jsonl")[4::5]]
        assert found == [None, None]
        assert is_strict_json(folder / "metrics.jsonl")
        assert all_finite(folder)
    card.record(len(NOT_A_NUMBER))


@pytest.mark.scorecard(
    "T09", "a learning rate at which the weights overflow: stopped, the checkpoint is finite"
)
def test_weights_that_overflow_stop_the_run_with_a_finite_checkpoint(tmp_path, card):
    rates = (1e30, 1e38) if card.full else (1e38,)
    for rate in rates:
        folder = tmp_path / str(rate)
        with pytest.raises(DivergenceError, match=r"Try: a lower learning rate"):
            tiny_trainer(folder, learning_rate=rate, schedule="constant", warmup_tokens=0, tokens=2000).fit()
        assert all_finite(folder)
        assert events(folder).count("returned") == 2
    card.record(len(rates))


# T10: signals


class SignalsAt(Disk):
    """Sends signals at the n-th call after `start`, at each n of a list."""

    def __init__(self, patch, moments):
        super().__init__(patch)
        self.calls, self.moments = -(10**9), dict(moments)

    def start(self, run):
        self.calls = 0

    def call(self, name, function, *arguments, file=None, **options):
        self.calls += 1
        if self.calls in self.moments:
            signal.raise_signal(self.moments[self.calls])
        return None if name == "fsync" else function(*arguments, **options)


@pytest.fixture
def late_signals():
    """What comes after the run is not for pytest."""
    late = []
    before = {
        number: signal.signal(number, lambda number, frame: late.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    yield late
    for number, handler in before.items():
        signal.signal(number, handler)


def calls_of_a_run(folder):
    with pytest.MonkeyPatch.context() as patch:
        disk = SignalsAt(patch, {})
        tiny_trainer(folder, [When(on_start=disk.start)]).fit()
    return disk.calls


@pytest.mark.scorecard("T10", "SIGTERM or Ctrl-C at any moment of a run: all steps so far are saved")
def test_after_a_signal_every_step_is_in_the_checkpoint(tmp_path, plain, card, late_signals):
    chance, calls, tries = random.Random(10), calls_of_a_run(tmp_path / "count"), card.count(quick=8, full=60)
    for i in range(tries):
        folder = tmp_path / str(i)
        with pytest.MonkeyPatch.context() as patch:
            disk = SignalsAt(
                patch, {chance.randint(1, calls): chance.choice((signal.SIGINT, signal.SIGTERM))}
            )
            progress = tiny_trainer(folder, [When(on_start=disk.start)]).fit()
        assert plain.newest_in(folder).step == progress.step
        found = b"".join(path.read_bytes() for path in folder.glob("metrics.jsonl"))
        assert plain.metrics.startswith(found) and found.count(b"\n") == progress.step
        if i < card.count(quick=2, full=20):
            assert plain.is_the_end_of(folder)
    assert late_signals == []
    card.record(tries)


@pytest.mark.scorecard(
    "T10", "a second Ctrl-C, while the first one's checkpoint is written: the one before is there"
)
def test_after_a_second_ctrl_c_the_checkpoint_before_is_there(tmp_path, plain, card, late_signals):
    chance, calls, tries = random.Random(11), calls_of_a_run(tmp_path / "count"), card.count(quick=8, full=60)
    lost = at_once = 0
    for i in range(tries):
        folder, steps = tmp_path / str(i), []
        first = chance.randint(1, calls)
        with pytest.MonkeyPatch.context() as patch:
            disk = SignalsAt(patch, dict.fromkeys((first, first + chance.randint(1, 40)), signal.SIGINT))
            callback = When(
                on_start=disk.start, on_step=lambda run, steps=steps: steps.append(run.progress.step)
            )
            try:
                tiny_trainer(folder, [callback]).fit()
            except KeyboardInterrupt:
                at_once += 1
        found = plain.newest_in(folder)
        assert found or not steps  # before the first checkpoint there is nothing to lose
        undone = steps[-1] - found.step if steps else 0
        assert undone <= 2
        lost += undone
        if i < card.count(quick=2, full=20):
            assert plain.is_the_end_of(folder)
    assert at_once
    card.record(tries, lost, "steps since the last checkpoint, done again later")


CHILD = """
import sys
sys.path.insert(0, sys.argv[2])
import torch
torch.set_num_threads(1)
from test_faults import tiny_trainer
tiny_trainer(sys.argv[1], tokens=10**7, save_every=3, keep_last=1).fit()
"""


def until_it_trains(folder):
    """A process that has a step or more behind it, new ones in a folder that was in use."""
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(folder), str(Path(__file__).parent)], stderr=subprocess.PIPE
    )
    metrics = folder / "metrics.jsonl"
    before = metrics.stat().st_mtime_ns if metrics.exists() else 0
    while process.poll() is None and not (metrics.exists() and metrics.stat().st_mtime_ns > before):
        time.sleep(0.005)
    return process


@pytest.mark.scorecard("T10", "SIGTERM or Ctrl-C to a process: saved, and exit status 0")
def test_a_process_that_gets_a_signal_saves_and_ends_well(tmp_path, card):
    chance, tries = random.Random(12), card.count(quick=1, full=6)
    for i in range(tries):
        process = until_it_trains(tmp_path)
        time.sleep(chance.uniform(0, 0.3))
        process.send_signal((signal.SIGTERM, signal.SIGINT)[i % 2])
        _, errors = process.communicate()
        assert (process.returncode, errors) == (0, b"")
        newest = snapshots.look(tmp_path / "checkpoints", tensors_of)
        assert newest.step == read_records(tmp_path / "metrics.jsonl")[-1]["step"]
    card.record(tries)


def test_a_run_that_was_stopped_goes_on_in_the_same_process(tmp_path, plain):
    run = tiny_trainer(tmp_path, [at_step(5, lambda run: signal.raise_signal(signal.SIGINT))])
    assert run.fit().step == 5
    assert run.fit().step == STEPS
    assert (tmp_path / "metrics.jsonl").read_bytes() == plain.metrics


# T11: killed


@pytest.mark.scorecard(
    "T11", "killed at the n-th call of saving and removing, one checkpoint kept: one is always there"
)
def test_whenever_a_run_is_killed_there_is_a_checkpoint(tmp_path, card):
    def parts(step):
        return {name: ({"x": torch.full((300,), float(step))}, {}) for name in ("model", "optimizer")}

    tries, latest, fail_at, killed = card.count(quick=80, full=400), 0, 0, 0
    snapshots.write(tmp_path, 0, parts(0), {})
    for step in range(1, tries + 1):
        fail_at += 1
        with pytest.MonkeyPatch.context() as patch:
            FaultyDisk(patch, fail_at, Killed())
            try:
                snapshots.write(tmp_path, step, parts(step), {})
                snapshots.prune(tmp_path, 1, set())
                fail_at = 0
            except Killed:
                killed += 1
        found = {}
        for path in snapshots.complete(tmp_path):
            snapshot = snapshots.read(path)
            found[snapshot.step] = tensors_of(snapshot)["model.safetensors"]["x"]
        assert found == {step: np.full(300, step, np.float32).tobytes() for step in found}
        assert max(found) >= latest
        latest = max(found)
        if card.full or step % 3 == 0:  # the next one starts, or the next one is killed too
            snapshots.sweep(tmp_path)
            assert all(".tmp" not in name for name in names(tmp_path))
    assert killed > tries / 2 and latest
    card.record(killed)


@pytest.mark.scorecard("T11", "kill -9 of a process that keeps one checkpoint")
@pytest.mark.slow
def test_kill_9_leaves_a_checkpoint(tmp_path, card):
    chance, tries, lost = random.Random(13), card.count(quick=3, full=8), 0
    for _ in range(tries):
        process = until_it_trains(tmp_path)
        time.sleep(chance.uniform(0, 0.5))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        newest = snapshots.look(tmp_path / "checkpoints", tensors_of)
        lost += read_records(tmp_path / "metrics.jsonl")[-1]["step"] - newest.step
    assert lost <= 3 * tries
    card.record(tries, lost, "steps since the last checkpoint, done again later")

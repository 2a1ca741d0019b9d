"""The trainer: exact resume, equal batches, and guards that never let a bad step through."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from train_runs import Corpus, config, corpus, same_weights, small_model, token_data, trainer

import wkv
from wkv.errors import CheckpointError, ConfigError, DivergenceError, InputError
from wkv.training import Callback, Trainer
from wkv.training.run_folder import read_records

ORDERS = ("shuffled", "magic", "documents", "streams")


class Stop(Exception):
    """What a test raises in place of a power cut."""


class StopAt(Callback):
    """Ends the process's part of a run abruptly after some step, at some moment."""

    def __init__(self, step, moment="on_step"):
        self.step = step
        setattr(self, moment, self.stop)

    def stop(self, trainer, *_):
        if trainer.progress.step >= self.step:
            raise Stop


def records(folder):
    return (Path(folder) / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("arch", ["RWKV4", "RWKV7"])
def test_a_run_stopped_anywhere_ends_with_the_same_bytes(tmp_path, order, arch):
    whole = trainer(tmp_path / "whole", order=order, arch=arch)
    whole.fit()
    for step in (3, 7, 8, 20, 33):
        with pytest.raises(Stop):
            trainer(tmp_path / "cut", order=order, arch=arch, callbacks=[StopAt(step)]).fit()
    again = trainer(tmp_path / "cut", order=order, arch=arch)
    again.fit()
    assert again.progress.step == whole.progress.step
    assert records(tmp_path / "cut") == records(tmp_path / "whole")
    assert same_weights(again.model, whole.model)
    assert again.progress.position == whole.progress.position
    steps = [record["step"] for record in read_records(tmp_path / "cut" / "metrics.jsonl")]
    assert steps == list(range(1, whole.progress.step + 1))
    assert [r["step"] for r in read_records(tmp_path / "cut" / "timings.jsonl")] == steps


@pytest.mark.parametrize("setting", [{"optimizer": "muon"}, {"precision": "bfloat16"}, {"micro_batch": 3}])
def test_every_setting_resumes_exactly(tmp_path, setting):
    whole = trainer(tmp_path / "whole", tokens=1000, **setting)
    whole.fit()
    with pytest.raises(Stop):
        trainer(tmp_path / "cut", tokens=1000, callbacks=[StopAt(9)], **setting).fit()
    again = trainer(tmp_path / "cut", tokens=1000, **setting)
    again.fit()
    assert records(tmp_path / "cut") == records(tmp_path / "whole")
    assert same_weights(again.model, whole.model)


RUN = """
import sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from train_runs import trainer
trainer(sys.argv[1], order="streams", tokens=6000, save_every=3).fit()
"""


def child(folder):
    program = RUN.format(tests=str(Path(__file__).parent))
    return subprocess.Popen([sys.executable, "-c", program, str(folder)], stderr=subprocess.PIPE)


def kill_until_done(folder, generator, kills):
    """Start the run again and again and kill it at random moments, `kills` times after its first step."""
    while kills:
        process = child(folder)
        metrics = folder / "metrics.jsonl"
        before = metrics.stat().st_mtime_ns if metrics.exists() else 0
        while process.poll() is None and not (metrics.exists() and metrics.stat().st_mtime_ns > before):
            time.sleep(0.005)
        try:
            process.wait(generator.uniform(0, 0.4))
        except subprocess.TimeoutExpired:
            process.kill()
            kills -= 1
        process.communicate()
        if process.returncode == 0:
            return


def run_to_the_end(folder):
    process = child(folder)
    process.communicate()
    assert process.returncode == 0


@pytest.mark.parametrize("kills", [3, pytest.param(40, marks=pytest.mark.slow)])
def test_kill_9_at_random_moments_changes_nothing(tmp_path, kills):
    run_to_the_end(tmp_path / "whole")
    kill_until_done(tmp_path / "killed", random.Random(kills), kills)
    run_to_the_end(tmp_path / "killed")
    assert records(tmp_path / "killed") == records(tmp_path / "whole")
    a, b = (
        wkv.load(max((tmp_path / name / "checkpoints").iterdir()) / "model.safetensors")[0]
        for name in ("whole", "killed")
    )
    assert same_weights(a, b)


def test_the_model_in_a_checkpoint_is_a_model_file(tmp_path):
    run = trainer(tmp_path, tokens=500)
    run.fit()
    model, _ = wkv.load(tmp_path / "checkpoints" / "step-000000008" / "model.safetensors")
    assert same_weights(model, run.model)


def test_a_finished_run_stays_as_it_is(tmp_path):
    trainer(tmp_path, tokens=500).fit()
    before = records(tmp_path)
    progress = trainer(tmp_path, tokens=500).fit()
    assert progress.step == 8
    assert records(tmp_path) == before


def test_only_the_newest_checkpoints_and_the_best_stay(tmp_path):
    run = trainer(tmp_path, save_every=2, keep_last=3, learning_rate=0.05, schedule="constant")
    run.fit()
    steps = sorted(int(path.name[5:]) for path in (tmp_path / "checkpoints").iterdir())
    assert run.progress.best_step in steps
    assert len(steps) <= 4 and steps[-1] == run.progress.step


def test_two_runs_cannot_share_a_folder(tmp_path):
    first = trainer(tmp_path)
    with first.run, pytest.raises(CheckpointError, match=r"another run is training in .*Try: another --out"):
        trainer(tmp_path).fit()


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_returns(tmp_path, signal_number):
    class Raise(Callback):
        def on_step(self, trainer, metrics, seconds):
            if trainer.progress.step == 5:
                os.kill(os.getpid(), signal_number)

    run = trainer(tmp_path, callbacks=[Raise()])
    progress = run.fit()
    assert progress.step == 5 and not run.finished
    assert (tmp_path / "checkpoints" / "step-000000005" / "manifest.json").exists()
    assert signal.getsignal(signal_number) in (signal.SIG_DFL, signal.default_int_handler)


def test_the_second_ctrl_c_stops_at_once_and_the_checkpoints_stay(tmp_path):
    class Twice(Callback):
        def on_step(self, trainer, metrics, seconds):
            if trainer.progress.step == 9:
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, callbacks=[Twice()]).fit()
    whole = trainer(tmp_path / "whole")
    whole.fit()
    again = trainer(tmp_path)
    again.fit()
    assert same_weights(again.model, whole.model)


def test_micro_batches_give_the_gradient_of_the_whole_batch():
    runs = [trainer(order="documents", micro_batch=size) for size in (None, 1, 3)]
    for run in runs:
        run.model.double()
    batch = runs[0].batches.next()
    losses = [run._gradients(batch)[0] for run in runs]
    assert losses[1:] == pytest.approx(losses[:1] * 2, rel=1e-12)
    for name, weight in runs[0].model.named_parameters():
        for run in runs[1:]:
            other = dict(run.model.named_parameters())[name]
            torch.testing.assert_close(other.grad, weight.grad, rtol=1e-9, atol=1e-12)


class Poison(Callback):
    """Makes the gradients of some steps infinite, as an overflow would."""

    def __init__(self, trainer, steps, value=float("inf")):
        forward, count = trainer.objective.forward, iter(range(1, 10**9))

        def poisoned(*args):
            loss, state = forward(*args)
            return (loss * value if next(count) in steps else loss), state

        trainer.objective.forward = poisoned


def test_a_bad_step_is_not_learnt_from(tmp_path):
    run = trainer(tmp_path, save_every=100, validate_every=100)
    Poison(run, {4})
    seen = {}

    class Look(Callback):
        def on_step(self, trainer, metrics, seconds):
            seen[metrics["step"]] = [weight.clone() for weight in trainer.model.parameters()]

    run.callbacks.append(Look())
    run.fit()
    assert all(map(torch.equal, seen[3], seen[4]))
    assert not all(map(torch.equal, seen[4], seen[5]))
    record = read_records(tmp_path / "metrics.jsonl")[3]
    assert record["loss"] is None
    assert "the loss is inf; among the bad gradients is that of emb.weight" in record["skipped"]
    assert read_records(tmp_path / "events.jsonl")[0]["event"] == "skipped"
    assert all(torch.isfinite(weight).all() for weight in run.model.parameters())


def test_too_many_bad_steps_lead_back_to_a_checkpoint_and_a_lower_rate(tmp_path):
    run = trainer(tmp_path, skips=1, slower=0.25)
    Poison(run, {9, 10})
    run.fit()
    assert run.finished
    assert run.progress.returns == 1
    assert run.progress.rate == 0.25
    lines = read_records(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    assert not any("skipped" in line for line in lines)
    plain = trainer(tmp_path / "plain")
    plain.fit()
    calm = read_records(tmp_path / "plain" / "metrics.jsonl")
    assert lines[7]["learning_rate"] == pytest.approx(0.25 * calm[7]["learning_rate"])
    (event,) = read_records(tmp_path / "events.jsonl")[-1:]
    assert event["event"] == "returned" and "back to step 7" in event["what"]


def test_a_run_that_keeps_failing_stops_and_keeps_its_checkpoint(tmp_path):
    run = trainer(tmp_path, skips=0, rollbacks=2)
    Poison(run, range(9, 1000), value=float("nan"))
    with pytest.raises(
        DivergenceError, match=r"failed at step 8: the loss is nan.*Try: a lower learning rate"
    ):
        run.fit()
    again = trainer(tmp_path, skips=0, rollbacks=2)
    again.fit()  # what was poisoned is gone
    assert again.finished


def test_without_a_folder_a_failing_run_stops_too():
    run = trainer(skips=0)
    Poison(run, {2})
    with pytest.raises(DivergenceError, match="failed at step 2"):
        run.fit()


def test_an_exploding_gradient_is_not_learnt_from(tmp_path):
    run = trainer(tmp_path, tokens=3000, explosion=10)
    Poison(run, {30}, value=1e4)
    run.fit()
    assert "the norm of the gradients is" in read_records(tmp_path / "metrics.jsonl")[29]["skipped"]


def test_a_weight_that_is_not_finite_is_never_saved(tmp_path):
    class Break(Callback):
        def on_step(self, trainer, metrics, seconds):
            if metrics["step"] == 7:
                trainer.model.blocks[0].att.w0.data[0, 0, 0] = float("nan")

    with pytest.raises(DivergenceError, match=r"after step 7 blocks.0.att.w0 is not finite"):
        trainer(tmp_path, callbacks=[Break()]).fit()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000000000"]


def test_patience_ends_a_run_that_no_longer_gets_better(tmp_path):
    run = trainer(tmp_path, tokens=10**6, validate_every=2, patience=3, learning_rate=0.0)
    progress = run.fit()
    assert progress.worse == 3 and progress.step == 8


def test_changed_data_and_settings_are_refused_by_name(tmp_path):
    trainer(tmp_path, tokens=500).fit()
    with pytest.raises(ConfigError, match=r"learning_rate was 0.003 and is 0.1.*--accept-changes"):
        trainer(tmp_path, tokens=500, learning_rate=0.1).fit()
    other = Corpus(token_data(seed=9), token_data(8, seed=1))
    with pytest.raises(ConfigError, match="the data has changed"):
        trainer(tmp_path, tokens=500, data=other).fit()
    with pytest.raises(ConfigError, match="the model has changed"):
        Trainer(small_model(seed=5), corpus(), config(tokens=500), folder=tmp_path).fit()
    progress = trainer(tmp_path, tokens=800, data=other, accept_changes=True).fit()
    assert progress.tokens >= 800
    assert read_records(tmp_path / "events.jsonl")[0]["event"] == "changed"
    trainer(tmp_path, tokens=800, data=other).fit()  # is the run now


def test_a_damaged_checkpoint_is_put_aside_and_the_one_before_is_used(tmp_path):
    whole = trainer(tmp_path / "whole", tokens=1000)
    whole.fit()
    with pytest.raises(Stop):
        trainer(tmp_path / "cut", tokens=1000, callbacks=[StopAt(15)]).fit()
    newest = tmp_path / "cut" / "checkpoints" / "step-000000014"
    for name in ("optimizer.safetensors", "model.safetensors", "manifest.json"):
        file = newest / name
        if not file.exists():
            continue
        data = bytearray(file.read_bytes())
        data[-20] ^= 1
        file.write_bytes(data)
    again = trainer(tmp_path / "cut", tokens=1000)
    again.fit()
    assert same_weights(again.model, whole.model)
    assert records(tmp_path / "cut") == records(tmp_path / "whole")
    assert any(".bad" in path.name for path in (tmp_path / "cut" / "checkpoints").iterdir())
    assert "damaged" in [record["event"] for record in read_records(tmp_path / "cut" / "events.jsonl")]


def test_when_every_checkpoint_is_damaged_the_run_stops_and_its_records_stay(tmp_path):
    trainer(tmp_path, tokens=1000).fit()
    before = records(tmp_path)
    for path in (tmp_path / "checkpoints").iterdir():
        (path / "optimizer.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"every checkpoint in .* was damaged"):
        trainer(tmp_path, tokens=1000).fit()
    assert records(tmp_path) == before


def test_a_return_to_the_beginning_reads_the_data_from_the_beginning(tmp_path):
    run = trainer(tmp_path, order="streams", skips=0)
    Poison(run, {4})
    run.fit()
    assert run.progress.returns == 1
    plain = trainer(tmp_path / "plain", order="streams", learning_rate=1.5e-3)
    plain.fit()
    lines, expected = (read_records(path / "metrics.jsonl") for path in (tmp_path, tmp_path / "plain"))
    assert [line["loss"] for line in lines] == [line["loss"] for line in expected]


def test_the_fingerprint_follows_the_training():
    run = trainer(tokens=200)
    before = run.model.fingerprint()
    run.fit()
    assert run.model.fingerprint() != before


def test_short_weights_are_refused():
    with pytest.raises(InputError, match=r"the weights are torch.bfloat16.*model.float\(\)"):
        Trainer(small_model().bfloat16(), corpus(), config())


def test_a_failure_is_written_down_and_everybody_is_told_of_the_end(tmp_path):
    ends = []

    class End(Callback):
        def on_end(self, trainer):
            ends.append(trainer.progress.step)
            raise OSError("this must not hide the cause")

    run = trainer(tmp_path, skips=0, rollbacks=0, callbacks=[End()])
    Poison(run, {3})
    with pytest.raises(DivergenceError):
        run.fit()
    assert ends == [3]
    last = read_records(tmp_path / "events.jsonl")[-1]
    assert last["event"] == "failed" and "among the bad gradients is that of emb.weight" in last["what"]


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.toml", "report.md"])
def test_a_link_in_the_place_of_a_record_is_refused(tmp_path, name):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(victim)
    with pytest.raises(CheckpointError, match="is a link"):
        trainer(tmp_path / "run").fit()
    assert victim.read_text() == "mine"


def test_another_architecture_or_optimizer_is_refused_and_the_run_stays_as_it_was(tmp_path):
    trainer(tmp_path, tokens=500).fit()
    before = (tmp_path / "config.toml").read_bytes()
    with pytest.raises(ConfigError, match="is of another model"):
        trainer(tmp_path, tokens=500, arch="RWKV4", accept_changes=True).fit()
    with pytest.raises(ConfigError, match="was trained with adamw"):
        trainer(tmp_path, tokens=500, optimizer="muon", accept_changes=True).fit()
    assert (tmp_path / "config.toml").read_bytes() == before
    assert trainer(tmp_path, tokens=500).fit().step == 8


def test_another_number_of_threads_is_noted(tmp_path):
    trainer(tmp_path, tokens=200).fit()
    torch.set_num_threads(2)
    try:
        trainer(tmp_path, tokens=200).fit()
    finally:
        torch.set_num_threads(1)
    assert "threads was 1 and is 2" in read_records(tmp_path / "events.jsonl")[0]["what"]


def test_validation_reads_no_more_than_it_may():
    data = corpus()
    data.validation = token_data(1, longest=5000)
    assert trainer(data=data, validation_tokens=7).validate().n_tokens == 7


def test_tokens_beyond_the_vocabulary_are_refused_before_training():
    data = corpus()
    data.train.tokens[7] = 60
    with pytest.raises(InputError, match="token id 60, at position 7"):
        trainer(data=data)


def test_training_learns(tmp_path):
    run = trainer(tmp_path, tokens=6000)
    run.fit()
    lines = read_records(tmp_path / "metrics.jsonl")
    assert lines[-1]["validation_loss"] < 0.5 * lines[0]["loss"]
    assert json.loads((tmp_path / "run.json").read_text())["wkv"] == wkv.__version__

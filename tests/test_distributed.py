"""Several processes train what one trains, stop together, and leave what any number of them can go on from.

Processes are slow to start, so those of a module fixture train many runs, and the tests look at what is left.
"""

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import end, first_gradients, interfere, start, succeed
from safetensors.torch import load_file
from train_runs import trainer

from wkv.checkpoints import read_safetensors
from wkv.errors import ConfigError, InputError
from wkv.training.data.batches import Batch
from wkv.training.distributed import Group, join, own_device
from wkv.training.run_folder import read_records

SHORT = {"tokens": 300, "validate_every": 3, "save_every": 3, "keep_last": 9}
# Padding differs from row to row, streams carry states, micro-batches add up: none may change the result.
# There is one held-out document, so that a process may have none.
RUNS = {
    "v4": {"arch": "RWKV4", "order": "documents", "validation_tokens": 1, **SHORT},
    "v7": {"arch": "RWKV7", "order": "streams", "micro_batch": 1, **SHORT},
}
UNEVEN = {"tokens": 380, "context": 17, "batch_size": 3, "order": "streams"}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """What one process makes of each run."""
    folder = tmp_path_factory.mktemp("one")
    for name, settings in RUNS.items():
        trainer(folder / name, **settings).fit()
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two processes make of them, and of runs that are disturbed."""
    folder = tmp_path_factory.mktemp("two")
    jobs = [
        {"folder": f"{parallel}-{name}", "parallel": parallel, **settings}
        for parallel in ("replicate", "shard")
        for name, settings in RUNS.items()
    ]
    jobs += [
        {"gradients": f"{arch}.safetensors", "parallel": "context", "arch": arch, **UNEVEN}
        for arch in ("RWKV4", "RWKV7")
    ]
    jobs += [
        {"folder": "context", "parallel": "context", **RUNS["v7"]},
        {"folder": "stopped", "parallel": "shard", "interfere": (1, 4, "SIGTERM"), **RUNS["v7"]},
        {"folder": "replicate-v7", "refused": "refused", **RUNS["v7"], "learning_rate": 0.5},
        {"folder": "poisoned", "parallel": "shard", "interfere": (1, 3, "poison"), **RUNS["v7"]},
    ]
    succeed(2, folder, jobs)
    return folder


def lines(folder):
    return read_records(folder / "metrics.jsonl")


def final_weights(folder):
    newest = max((folder / "checkpoints").iterdir())
    return read_safetensors(newest / "model.safetensors")[0]


def assert_same_run(folder, reference):
    """The same numbers at every step, to the rounding of float32, and in the end the same weights."""
    found, expected = lines(folder), lines(reference)
    assert [line.keys() for line in found] == [line.keys() for line in expected]
    for ours, theirs in zip(found, expected, strict=True):
        for key, value in theirs.items():
            expected_value = pytest.approx(value, rel=2e-6) if isinstance(value, float) else value
            assert ours[key] == expected_value, (ours["step"], key)
    weights = final_weights(folder)
    for name, weight in final_weights(reference).items():
        torch.testing.assert_close(
            weights[name], weight, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("parallel", ["replicate", "shard"])
def test_two_processes_learn_what_one_does(one, two, parallel, name):
    assert_same_run(two / f"{parallel}-{name}", one / name)


def test_tokens_may_be_divided_instead_of_rows(one, two):
    assert_same_run(two / "context", one / "v7")


@pytest.mark.parametrize("arch", ["RWKV4", "RWKV7"])
def test_a_state_passed_on_gives_exactly_the_gradients_of_the_whole_row(two, arch):
    found = load_file(two / f"{arch}.safetensors")
    expected = first_gradients(trainer(arch=arch, **UNEVEN))
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.dtype == torch.float64
        torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=1e-12)


def test_a_signal_to_one_process_stops_all_after_the_same_step(two):
    assert [line["step"] for line in lines(two / "stopped")] == [1, 2, 3, 4]
    assert (two / "stopped" / "checkpoints" / "step-000000004" / "manifest.json").exists()


def test_one_process_goes_on_where_two_stopped(one, two, tmp_path):
    shutil.copytree(two / "stopped", tmp_path / "run")
    trainer(tmp_path / "run", parallel="shard", **RUNS["v7"]).fit()
    assert_same_run(tmp_path / "run", one / "v7")


def test_what_the_writing_process_refuses_is_the_error_of_all(two):
    for rank in (0, 1):
        text = (two / f"refused-{rank}.txt").read_text()
        assert "learning_rate was 0.003 and is 0.5" in text and "--accept-changes" in text


def test_a_bad_loss_in_one_process_is_not_learnt_from_in_any(two, tmp_path):
    reference = trainer(tmp_path, **RUNS["v7"])
    interfere(reference, 3, "poison")
    reference.fit()
    assert_same_run(two / "poisoned", tmp_path)
    problem = lines(two / "poisoned")[2]["skipped"]
    assert "the loss is inf; among the bad gradients is that of emb.weight" in problem


def test_a_killed_process_ends_the_job_and_the_run_can_be_taken_up(one, tmp_path):
    job = {"folder": "run", "parallel": "replicate", "interfere": (1, 4, "SIGKILL"), **RUNS["v7"]}
    processes = start(2, tmp_path, [job])
    errors = end(processes)
    assert processes[1].returncode == -signal.SIGKILL
    assert processes[0].returncode == 1
    assert "process 0 of 2 cannot go on: another one has ended or does not answer" in errors[0]
    assert "the same command, which goes on from the last checkpoint" in errors[0]
    trainer(tmp_path / "run", parallel="replicate", **RUNS["v7"]).fit()
    assert_same_run(tmp_path / "run", one / "v7")


@pytest.mark.slow
def test_four_processes_go_on_where_two_stopped(one, two, tmp_path):
    shutil.copytree(two / "stopped", tmp_path / "run")
    succeed(4, tmp_path, [{"folder": "run", "parallel": "shard", **RUNS["v7"]}])
    assert_same_run(tmp_path / "run", one / "v7")


@pytest.mark.slow
def test_four_processes_learn_what_one_does(one, tmp_path):
    jobs = [
        {"folder": "hybrid-v4", "parallel": "shard", "shard_over": 2, **RUNS["v4"]},
        {"folder": "hybrid-v7", "parallel": "shard", "shard_over": 2, "recompute": "blocks", **RUNS["v7"]},
        {"folder": "replicate-v4", "parallel": "replicate", **RUNS["v4"]},
        {"folder": "context-v7", "parallel": "context", "recompute": "blocks", **RUNS["v7"]},
    ]
    succeed(4, tmp_path, jobs)
    for job in jobs:
        assert_same_run(tmp_path / job["folder"], one / job["folder"].split("-")[1])


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["replicate", "shard"])
def test_torchrun_and_wkv_train(tmp_path, parallel):
    text = tmp_path / "text.txt"
    text.write_text("a line of some text\n" * 2000)
    wkv = Path(sys.executable).with_name("wkv")
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *(str(wkv), "train", str(text), "--out", str(tmp_path / "run"), "--parallel", parallel),
        *("--n-layer", "2", "--n-embd", "64", "--context", "32", "--tokens", "5000", "--threads", "1"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("model.safetensors") == 1
    weights = read_safetensors(tmp_path / "run" / "model.safetensors")[0]
    saved = final_weights(tmp_path / "run")
    assert all(torch.equal(weight, saved[name]) for name, weight in weights.items())


def test_without_torchrun_a_process_is_alone():
    group = join(CPU)
    assert own_device("cuda") == "cuda"
    assert (group.rank, group.size, group.is_writer) == (0, 1, True)
    assert group.sum(2.5) == 2.5
    with pytest.raises(InputError, match="as it is"):
        group.on_writer(lambda: (_ for _ in ()).throw(InputError("as it is")))


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("divides", ["rows", "tokens"])
def test_the_parts_of_a_batch_are_the_batch(size, divides):
    tokens = torch.arange(30 * 31).view(30, 31)
    batch = Batch(tokens, -tokens, tokens % 7 == 0, carried=False)
    parts = [Group(CPU, rank, size, divides).part(batch) for rank in range(size)]
    for whole, *pieces in zip(batch[:3], *(part[:3] for part in parts), strict=True):
        assert torch.equal(torch.cat(pieces, dim=0 if divides == "rows" else 1), whole)


def test_batches_that_cannot_be_divided_are_refused():
    with pytest.raises(ConfigError, match=r"batch_size is 4, of 3 processes.*a multiple of their number"):
        Group(CPU, 0, 3).check(batch_size=4, context=16)
    with pytest.raises(ConfigError, match=r"context is 2, of 3 processes.*a token for each"):
        Group(CPU, 0, 3, "tokens").check(batch_size=4, context=2)

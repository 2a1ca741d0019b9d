"""The command line: what a person types, sees, and gets back as an exit status."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import io
import json
import os
import re
import select
import shlex
import subprocess
import sys
import termios
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import wkv
from wkv.checkpoints import open_checkpoint, write_pth, write_safetensors
from wkv.cli import COMMANDS, _app, main
from wkv.cli import bench as bench_module
from wkv.cli.chat import KEPT, Chat
from wkv.cli.common import CODE_SAMPLING, ModelFlags, SamplingFlags, human_bytes, torch_dtype
from wkv.config import RWKV4Config, RWKV5Config, RWKV6Config, RWKV7Config
from wkv.errors import InputError
from wkv.inference import G1, WORLD, Sampling, Session
from wkv.models import build
from wkv.ops import native
from wkv.state import LayerState, State
from wkv.tokenizers import bytes_

TINY = {"n_layer": 2, "n_embd": 32, "dim_att": 32, "dim_ffn": 64, "vocab_size": 256}
HEADS = {"head_size": 16}
RANKS_6 = {"mix_rank": 4, "decay_rank": 8}
RANKS_7 = {"decay_rank": 8, "rate_rank": 8, "value_rank": 8, "gate_rank": 8}
GENERATIONS = {
    "4": RWKV4Config(**TINY),
    "5.0": RWKV5Config(**TINY, **HEADS, minor=0, bonus="time_first"),
    "5.2": RWKV5Config(**TINY, **HEADS),
    "6": RWKV6Config(**TINY, **HEADS, **RANKS_6),
    "7": RWKV7Config(**TINY, **HEADS, **RANKS_7),
}
RUN = [sys.executable, "-c", "import sys; from wkv.cli import main; sys.exit(main())"]


@pytest.fixture(scope="module")
def tiny():
    """A random RWKV-7 over bytes."""
    return build(GENERATIONS["7"], seed=1)


@pytest.fixture
def folder(tiny, tmp_path, monkeypatch):
    """An empty folder to work in, but for model.safetensors."""
    wkv.save(tiny, tmp_path / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def wkv_command(capsys, monkeypatch):
    """Run one command line in this process: (exit status, stdout, stderr)."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments):
        status = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return SimpleNamespace(status=status, out=captured.out, err=captured.err)

    return run


def is_one_line(text):
    return text.count("\n") == 1 and text.endswith("\n")


# The frame: menu, help, errors, exit status.


def test_wkv_alone_shows_a_short_menu_of_what_works_without_a_file(wkv_command):
    result = wkv_command()
    assert result.status == 0
    assert len(result.out.splitlines()) <= 7
    assert result.out.index("wkv generate") < result.out.index("wkv demo") < result.out.index("wkv chat")


def test_the_list_of_commands_says_what_each_is_for(wkv_command):
    lines = wkv_command("--help").out.splitlines()
    for command in COMMANDS:
        summary = wkv_command(command, "--help").out.split("\n\n")[1].splitlines()[0]
        assert any(re.match(rf"│ {command} +{re.escape(summary)}", line) for line in lines)


def test_a_command_imports_no_other_command():
    code = (
        "import sys; from wkv.cli import main; main(['info', '--help']); "
        "print([name for name in sys.modules if name.startswith('wkv.cli.')], file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stderr == "['wkv.cli.common', 'wkv.cli.info']\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_each_command_teaches_by_example(wkv_command, command):
    result = wkv_command(command, "--help")
    assert result.status == 0
    assert f"Usage: wkv {command}" in result.out
    assert f"\n    wkv {command}" in result.out[result.out.index("Examples:") :]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_example_of_the_help_is_a_valid_command_line(wkv_command, command):
    examples = [
        shlex.split(re.sub(r"[<>] \S+", "", line.rpartition("| ")[2]))[1:]
        for line in wkv_command(command, "--help").out.splitlines()
        if re.match(r"    (cat \S+ \| )?wkv ", line)
    ]
    for tokens in examples:
        function, bound, _ = _app().parse_args(tokens, print_error=False, exit_on_error=False)
        assert function.__module__ == f"wkv.cli.{command.replace('-', '_')}"
        assert bound is not None


def test_help_and_version_never_load_torch():
    lines = [["--help"], ["--version"], [], *([command, "--help"] for command in COMMANDS)]
    code = (
        "import sys; from wkv.cli import main; "
        f"print([main(line) for line in {lines}], 'torch' in sys.modules, file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stderr == f"{[0] * len(lines)} False\n"


def test_version_is_that_of_the_package(wkv_command):
    assert wkv_command("--version").out.strip() == wkv.__version__


def test_a_misspelt_command_is_answered_with_the_nearest(wkv_command):
    result = wkv_command("genrate", "x")
    assert result.status == 2
    assert result.out == ""
    assert '"genrate"' in result.err
    assert 'Did you mean "generate"?' in result.err


def test_a_misspelt_flag_is_answered_with_the_nearest(wkv_command):
    result = wkv_command("generate", "x", "--max-token", "3")
    assert result.status == 2
    assert "--max-token. Did you mean --max-tokens?" in result.err


WRONG = [
    # (what is typed, the exit status, the bad value that the message must name, what it must suggest)
    ("genrate x", 2, "genrate", "generate"),
    ("--nothing", 2, "--nothing", "wkv --help"),
    ("info modle.safetensors", 1, "modle.safetensors", "model.safetensors"),
    ("info model.safetensors other", 2, "other", "wkv info --help"),
    ("info .", 1, ".", ".safetensors"),
    ("info noise.pth", 1, "noise.pth", ".pth or .safetensors"),
    ("info empty.pth", 1, "empty.pth", "fresh copy"),
    ("info broken.safetensors", 1, "broken.safetensors", "fresh copy"),
    ("info model.safetensors --backends", 2, "model.safetensors", "one of them"),
    ("info model.safetensors --jsn", 2, "--jsn", "--json"),
    ("generate", 2, "no prompt", "wkv generate"),
    ("generate model.safetensors", 2, "model.safetensors", 'model.safetensors "def "'),
    ("generate modle.safetensors hello", 1, "modle.safetensors", "model.safetensors"),
    ("generate noise.pth hello", 1, "noise.pth", ".safetensors"),
    ("generate model.safetensors ''", 1, "empty", "text"),
    ("generate model.safetensors hello -", 2, "hello", "one of them"),
    ("generate model.safetensors once upon", 2, "upon", "quotes"),
    ("generate model.safetensors x --max-tokens many", 2, "many", "--help"),
    ("generate model.safetensors x --max-tokens=-1", 1, "-1", "0"),
    ("generate model.safetensors x --temperature=-1", 1, "temperature is -1", "0 to 100"),
    ("generate model.safetensors x --temperature nan", 1, "nan", "0 to 100"),
    ("generate model.safetensors x --top-p 1.5", 1, "1.5", "0 to 1"),
    ("generate model.safetensors x --top-k=-3", 1, "-3", "0"),
    ("generate model.safetensors x --seed=-3", 1, "-3", "0"),
    ("generate model.safetensors x --temprature 1", 2, "--temprature", "--temperature"),
    ("generate model.safetensors x --dtype fp33", 2, "fp33", "fp32"),
    ("generate model.safetensors x --device tpu", 2, "tpu", "cpu"),
    ("generate model.safetensors x --threads 0", 2, "0", "1"),
    ("generate model.safetensors x --threads 100000", 2, "100000", "256"),
    ("generate model.safetensors x --tokenizer wold", 1, "wold", "world"),
    ("generate model.safetensors x --tokenizer world", 1, "world", "256"),
    ("generate model.safetensors x --logprobs 2", 2, "--logprobs", "--json"),
    ("generate odd.safetensors x", 1, "300", "--tokenizer"),
    ("chat modle.safetensors", 1, "modle.safetensors", "model.safetensors"),
    ("chat model.safetensors --format wrld", 2, "wrld", "world"),
    ("chat model.safetensors --format world --think", 1, "world", "g1"),
    ("chat model.safetensors --format world --system x", 1, "world", "g1"),
    ("chat model.safetensors --max-tokens 0", 1, "max_tokens is 0", "1"),
    ("convert model.safetensors", 2, "TARGET", "wkv convert --help"),
    ("convert modle.safetensors a.pth", 1, "modle.safetensors", "model.safetensors"),
    ("convert model.safetensors model.gguf", 2, "model.gguf", ".safetensors"),
    ("convert model.safetensors nowhere/model.pth", 1, "nowhere", "folder"),
    ("convert model.safetensors a.pth --dtype int8", 2, "int8", "fp16"),
    ("bench rwkv7-0.2b", 1, "0.2b", "0.1B"),
    ("bench rwkv3-1b", 1, "rwkv3-1b", "model.safetensors"),
    ("bench modle.safetensors", 1, "modle.safetensors", "model.safetensors"),
]


@pytest.mark.parametrize(("line", "status", "value", "advice"), WRONG, ids=[line for line, *_ in WRONG])
def test_a_wrong_command_line_gets_one_line_that_names_the_value_and_a_way_out(
    wkv_command, folder, line, status, value, advice
):
    (folder / "noise.pth").write_bytes(bytes(range(255, 0, -1)) * 4)
    (folder / "empty.pth").touch()
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "broken.safetensors").write_bytes(whole[: len(whole) // 2])
    wkv.save(build(GENERATIONS["7"].replace(vocab_size=300)), folder / "odd.safetensors")
    result = wkv_command(*shlex.split(line))
    assert result.status == status
    assert result.out == ""
    assert is_one_line(result.err)
    assert value in result.err
    assert advice in result.err


def test_debug_shows_the_traceback_instead(folder):
    with pytest.raises(InputError, match="temperature"):
        main(["generate", "model.safetensors", "x", "--temperature=-1", "--debug"])


def test_debug_after_two_hyphens_is_text(wkv_command, folder):
    assert wkv_command("generate", "model.safetensors", "--max-tokens", 1, "--", "--debug").status == 0


def test_a_fault_of_wkv_itself_is_one_line_too(wkv_command, folder, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("two\nlines, and \x1b[31mred")

    monkeypatch.setattr(Session, "feed", fail)
    result = wkv_command("generate", "model.safetensors", "x")
    assert result.status == 1
    assert is_one_line(result.err)
    assert "RuntimeError: two lines" in result.err
    assert "\x1b" not in result.err
    assert "--debug" in result.err


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EACCES])
def test_a_disk_that_fails_has_a_status_of_its_own(wkv_command, folder, monkeypatch, code):
    def fail(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    result = wkv_command("convert", "model.safetensors", "copy.safetensors")
    assert result.status == 74
    assert is_one_line(result.err)
    assert os.strerror(code) in result.err
    assert not (folder / "copy.safetensors").exists()


def test_no_escape_sequence_of_a_file_reaches_the_terminal(wkv_command, folder):
    write_pth("evil.pth", {"\x1b]0;title\x07\x1b[31m": torch.zeros(1)})
    result = wkv_command("info", "evil.pth")
    assert result.status == 1
    assert "\x1b" not in result.err
    assert "\x07" not in result.err


def test_too_little_memory_is_said_in_words(wkv_command, folder, monkeypatch):
    def fail(*_, **__):
        torch.empty(2**62, dtype=torch.uint8)

    monkeypatch.setattr(Session, "feed", fail)
    result = wkv_command("generate", "model.safetensors", "x")
    assert result.status == 1
    assert "not enough memory" in result.err
    assert "--dtype bf16" in result.err


def test_ctrl_c_before_any_text_ends_with_130(wkv_command, folder, monkeypatch):
    monkeypatch.setattr(Session, "feed", interrupt)
    result = wkv_command("generate", "model.safetensors", "x")
    assert (result.status, result.out, result.err) == (130, "", "wkv: stopped\n")


def interrupt(*_, **__):
    raise KeyboardInterrupt


def test_a_reader_that_has_seen_enough_is_no_error():
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    process = subprocess.Popen(RUN, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=buffered)
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 0
    process.stderr.close()


# generate


def test_generate_prints_what_the_library_generates(wkv_command, folder, tiny):
    options = {"max_tokens": 30, "seed": 7, "temperature": 0.8}
    expected = wkv.generate(tiny, bytes_(), "hello", **options)
    flags = ["--max-tokens", 30, "--seed", 7, "--temperature", 0.8]
    result = wkv_command("generate", "model.safetensors", "hello", *flags)
    assert result.status == 0
    assert result.out == expected + ("" if expected.endswith("\n") else "\n")
    assert re.fullmatch(
        r"prompt: 5 tokens, [\d.]+/s; written: 30 tokens, [\d.]+/s; finish: length\n", result.err
    )


def test_a_single_argument_is_the_prompt_for_the_model_that_comes_with_wkv(wkv_command):
    result = wkv_command("generate", "def ", "--max-tokens", 3, "--json", "--seed", 1)
    assert result.status == 0
    assert result.err.startswith("no model was named: ")
    model, tokenizer = wkv.load()
    session = Session(model, tokenizer)
    session.feed("def ")
    assert json.loads(result.out)["text"] == session.generate(3, seed=1, **CODE_SAMPLING)


def test_flags_come_before_what_suits_the_model(wkv_command, monkeypatch):
    seen = {}
    monkeypatch.setattr(Session, "steps", lambda self, n, stop, **options: seen.update(options) or iter(()))
    assert wkv_command("generate", "def ", "--presence-penalty", 0.3).status == 0
    assert seen["presence_penalty"] == 0.3
    assert seen["frequency_penalty"] == 0
    assert seen["top_k"] == Sampling().top_k


def set_stdin(monkeypatch, data):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))


def test_a_hyphen_reads_the_prompt_from_stdin_as_it_comes(wkv_command, folder, monkeypatch):
    flags = ["--seed", 1, "--max-tokens", 9, "--json"]
    set_stdin(monkeypatch, "Grüße\n".encode())
    piped = wkv_command("generate", "model.safetensors", "-", *flags)
    typed = wkv_command("generate", "model.safetensors", "Grüße\n", *flags)
    assert piped.status == 0
    assert json.loads(piped.out)["tokens"] == json.loads(typed.out)["tokens"]
    assert json.loads(piped.out)["timings"]["prompt_tokens"] == 8


def test_stdin_that_is_not_utf_8_is_refused_with_the_place(wkv_command, folder, monkeypatch):
    set_stdin(monkeypatch, b"abc\xff")
    result = wkv_command("generate", "model.safetensors", "-")
    assert result.status == 1
    assert "byte 3 of stdin is not UTF-8" in result.err


def test_an_argument_that_is_not_utf_8_is_refused(wkv_command, folder):
    result = wkv_command("generate", "model.safetensors", os.fsdecode(b"abc\xff"))
    assert result.status == 1
    assert is_one_line(result.err)
    assert "Unicode" in result.err


def test_generate_as_json_is_one_object_with_everything(wkv_command, folder):
    flags = ["--max-tokens", 8, "--seed", 3, "--json", "--logprobs", 2]
    result = wkv_command("generate", "model.safetensors", "hello", *flags)
    told = json.loads(result.out)
    assert list(told) == ["model", "text", "tokens", "finish", "timings", "logprobs"]
    assert told["text"] == bytes_().decode(told["tokens"])
    assert told["finish"] == "length"
    assert told["timings"]["generated_tokens"] == len(told["tokens"]) == len(told["logprobs"]) == 8
    assert all(len(row["top"]) == 2 and row["logprob"] <= row["top"][0][1] for row in told["logprobs"])


def test_generation_ends_before_a_stop_text(wkv_command, folder, tiny):
    text = wkv.generate(tiny, bytes_(), "hello", max_tokens=40, seed=5)
    letter = next(letter for letter in text if letter.isascii() and letter.isprintable())
    flags = ["--max-tokens", 40, "--seed", 5, "--stop", "never in it", "--stop", letter, "--json"]
    told = json.loads(wkv_command("generate", "model.safetensors", "hello", *flags).out)
    assert told["text"] == text[: text.index(letter)]
    assert told["finish"] == "stop"


@pytest.mark.parametrize("as_json", [[], ["--json"]])
def test_ctrl_c_keeps_what_was_written_and_ends_with_130(wkv_command, folder, monkeypatch, as_json):
    whole = Session.steps

    def three_steps(*arguments, **options):
        steps = whole(*arguments, **options)
        yield from (next(steps) for _ in range(3))
        raise KeyboardInterrupt

    monkeypatch.setattr(Session, "steps", three_steps)
    result = wkv_command("generate", "model.safetensors", "hello", "--seed", 1, *as_json)
    assert result.status == 130
    assert "written: 3 tokens" in result.err
    assert "interrupted" in (result.out if as_json else result.err)
    assert result.out.endswith("\n")


def test_the_sampling_flags_are_the_settings_of_the_library():
    library = dataclasses.asdict(Sampling())
    assert library.pop("logit_bias") == {}  # has no place on a command line
    assert set(dataclasses.asdict(SamplingFlags())) == set(library)
    assert SamplingFlags().over() == Sampling()


def test_every_sampling_flag_reaches_the_sampler(wkv_command, folder, monkeypatch):
    values = {
        "temperature": 0.5, "top_p": 0.25, "top_k": 9, "min_p": 0.125, "presence_penalty": 0.75,
        "frequency_penalty": 0.375, "penalty_decay": 0.5, "repetition_penalty": 1.5, "seed": 11,
    }  # fmt: skip
    assert set(values) == {field.name for field in dataclasses.fields(SamplingFlags)}
    seen = {}
    monkeypatch.setattr(Session, "steps", lambda self, n, stop, **options: seen.update(options) or iter(()))
    flags = [part for name, value in values.items() for part in (f"--{name.replace('_', '-')}", value)]
    assert wkv_command("generate", "model.safetensors", "x", *flags).status == 0
    assert seen == {**values, "logit_bias": {}, "logprobs": None}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp64", torch.float64),
        ("float32", torch.float32), ("bfloat16", torch.bfloat16), (None, None),
    ],
)  # fmt: skip
def test_dtypes_have_short_and_long_names(name, dtype):
    assert torch_dtype(name) is dtype


def test_generate_computes_in_the_dtype_that_was_asked_for(wkv_command, folder, monkeypatch):
    seen = []
    monkeypatch.setattr(Session, "feed", lambda self, _: seen.append(self.model.dtype) or interrupt())
    wkv_command("generate", "model.safetensors", "x", "--dtype", "bf16")
    assert seen == [torch.bfloat16]


# info


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("name", GENERATIONS)
def test_info_tells_generation_sizes_and_memory(wkv_command, tmp_path, name, suffix):
    model = build(GENERATIONS[name], dtype=torch.bfloat16)
    path = tmp_path / f"m{suffix}"
    wkv.save(model, path)
    told = json.loads(wkv_command("info", path, "--json").out)
    generation, _, minor = name.partition(".")
    parameters = sum(weight.numel() for weight in model.parameters())
    state_bytes = model.initial_state().nbytes
    assert (told["kind"], told["format"]) == ("model", suffix[1:])
    assert (told["generation"], told["minor"]) == (int(generation), int(minor) if minor else None)
    assert told["config"] == model.config.to_dict()
    assert (told["parameters"], told["state_bytes"]) == (parameters, state_bytes)
    assert told["dtypes"] == {"bfloat16": len(model.state_dict())}
    assert (told["vocab_size"], told["tokenizer"]) == (256, "bytes")
    assert told["memory_bytes"]["float32"] == 4 * parameters + state_bytes
    text = wkv_command("info", path).out
    for part in (f"RWKV-{name}", f"{parameters:,}", "2 of width 32", "bfloat16", "256", "bytes"):
        assert part in text


def test_info_reads_no_weights(wkv_command, folder, monkeypatch):
    with open_checkpoint("model.safetensors") as checkpoint:
        monkeypatch.setattr(type(checkpoint), "read", interrupt)
    assert wkv_command("info", "model.safetensors").status == 0


def test_info_lists_every_backend_and_what_the_engine_says_of_itself(wkv_command):
    told = json.loads(wkv_command("info", "--backends", "--json").out)
    assert set(told["operators"]) == set(wkv.ops.OPERATORS)
    for name, operator in wkv.ops.OPERATORS.items():
        for verdicts in told["operators"][name].values():
            assert list(verdicts) == [row.name for row in operator.backends]
            assert list(verdicts.values()).count("runs") == 1
    assert told["operators"]["wkv7"]["a token"]["chunked"].startswith("refuses: T = 1")
    engine, text = told["engine"], wkv_command("info", "--backends").out
    for name, verdict in told["operators"]["wkv7"]["a prompt"].items():
        assert f"    {name:<10} {verdict}\n" in text
    if engine["refuses"] is None:
        assert engine["runs"] in engine["instruction_sets"] and engine["threads"] >= 1
        assert 0 < engine["handover_seconds"] < 0.1
        assert f"the compiled engine: {engine['runs']}, {engine['threads']} threads" in text


def test_info_says_why_there_is_no_engine_and_what_to_try(wkv_command, monkeypatch):
    reason = "it was not built: installing wkv found no C++ compiler. Try: install wkv again"
    monkeypatch.setattr("wkv.ops.native._load", lambda: reason)
    told = json.loads(wkv_command("info", "--backends", "--json").out)
    assert told["engine"]["refuses"] == reason and told["engine"]["runs"] is None
    assert wkv_command("info", "--backends").out.startswith(f"the compiled engine does not run: {reason}\n")


def test_info_says_that_a_state_file_is_one(wkv_command, folder, tiny):
    session = Session(tiny, bytes_())
    session.feed("hello")
    session.save("chat.state")
    told = json.loads(wkv_command("info", "chat.state", "--json").out)
    assert (told["kind"], told["tokens_read"], told["layers"]) == ("state", 5, 2)
    assert told["model_fingerprint"] == tiny.fingerprint()
    text = wkv_command("info", "chat.state").out
    assert "saved state" in text
    assert tiny.fingerprint() in text


def test_info_trusts_no_word_of_a_state_file(wkv_command, folder):
    metadata = {"format": "wkv-state", "tokenizer": "\x1b[31mworld", "n_tokens": "9" * 5000}
    write_safetensors("odd.state", {"blocks.0.memory": torch.zeros(1)}, metadata)
    result = wkv_command("info", "odd.state")
    assert result.status == 0
    assert "\x1b" not in result.out
    assert json.loads(wkv_command("info", "odd.state", "--json").out)["tokens_read"] is None


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1 kB"),
        (382_069_248, "382 MB"),
        (999_999, "1 MB"),
        (25.2e9, "25.2 GB"),
    ],
)
def test_bytes_are_told_with_three_digits(n, text):
    assert human_bytes(n) == text


def test_a_file_name_that_is_not_utf_8_can_be_shown(wkv_command, folder):
    result = wkv_command("convert", "model.safetensors", os.fsdecode(b"\xff.pth"))
    assert result.status == 0
    assert result.out.startswith("\N{REPLACEMENT CHARACTER}.pth: RWKV-7")


# convert


def stored_tensors(path):
    with open_checkpoint(path) as checkpoint:
        return {name: checkpoint.read(name).clone() for name in checkpoint.names}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_and_back_is_bit_exact(wkv_command, tmp_path, monkeypatch, dtype):
    monkeypatch.chdir(tmp_path)
    wkv.save(build(GENERATIONS["5.2"], dtype=dtype), "a.pth")
    before = Path("a.pth").read_bytes()
    assert wkv_command("convert", "a.pth", "b.safetensors").status == 0
    assert wkv_command("convert", "b.safetensors", "c.pth").status == 0
    first, last = stored_tensors("a.pth"), stored_tensors("c.pth")
    assert first.keys() == last.keys()
    for name, tensor in first.items():
        assert tensor.dtype == last[name].dtype == dtype
        assert torch.equal(tensor, last[name])
    assert Path("a.pth").read_bytes() == before


def test_convert_says_what_it_did(wkv_command, folder):
    result = wkv_command("convert", "model.safetensors", "half.pth", "--dtype", "fp16")
    assert result.status == 0
    assert "half.pth: RWKV-7" in result.out
    assert "float16" in result.out
    assert {tensor.dtype for tensor in stored_tensors("half.pth").values()} == {torch.float16}


def test_a_file_of_several_dtypes_loses_no_digit(wkv_command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mixed = {
        name: tensor if "att" in name else tensor.bfloat16()
        for name, tensor in build(GENERATIONS["4"], seed=3).state_dict().items()
    }
    write_pth("mixed.pth", mixed)
    assert wkv_command("convert", "mixed.pth", "wide.safetensors").status == 0
    for name, tensor in stored_tensors("wide.safetensors").items():
        assert torch.equal(tensor, mixed[name].float())


def test_a_file_can_be_converted_onto_itself(wkv_command, folder):
    before = stored_tensors("model.safetensors")
    assert wkv_command("convert", "model.safetensors", "model.safetensors", "--dtype", "bf16").status == 0
    for name, tensor in stored_tensors("model.safetensors").items():
        assert torch.equal(tensor, before[name].bfloat16())


def test_numbers_that_the_dtype_cannot_hold_stop_the_conversion(wkv_command, folder, tiny):
    weights = {name: weight.clone() for name, weight in tiny.state_dict().items()}
    weights["head.weight"][0, 0] = 1e6
    write_pth("large.pth", weights)
    result = wkv_command("convert", "large.pth", "half.pth", "--dtype", "fp16")
    assert result.status == 1
    assert "head.weight" in result.err
    assert not Path("half.pth").exists()


# bench


@pytest.fixture
def _quick_bench(monkeypatch):
    monkeypatch.setattr(bench_module, "LARGEST_BUFFER", 2**20)
    monkeypatch.setattr(bench_module, "BUDGET", 0.0)


@pytest.mark.usefixtures("_quick_bench")
def test_bench_measures_the_bytes_that_a_token_must_move(wkv_command, folder, tiny):
    told = json.loads(wkv_command("bench", "model.safetensors", "--threads", 1, "--json").out)
    weights = sum(weight.nbytes for name, weight in tiny.named_parameters() if name != "emb.weight")
    assert told["bytes_per_token_unskipped"] == weights + 2 * tiny.initial_state().nbytes
    sparse = sum(block.ffn.value.weight.nbytes for block in tiny.blocks)
    skipped = 0 if native.why_not() else int(told["zeros"] * sparse)
    assert 0 <= told["zeros"] <= 1
    assert told["bytes_per_token"] == told["bytes_per_token_unskipped"] - skipped
    assert told["threads"] == 1
    floor = told["bytes_per_token"] / told["bandwidth_bytes_per_second"]
    assert told["efficiency"] == pytest.approx(floor * told["decode_tokens_per_second"])
    assert told["prefill_tokens_per_second"] > 0
    text = wkv_command("bench", "model.safetensors").out
    assert all(word in text for word in ("prefill", "decode", "per token", "/s, measured now", "efficiency"))


def test_bench_knows_published_sizes_by_name():
    name, model = bench_module.load_or_build("RWKV7-0.1b", ModelFlags(device="meta", dtype="bf16"))
    assert "random" in name
    assert model.config == RWKV7Config.named("0.1B")
    assert model.dtype == torch.bfloat16


# chat


class Parrot:
    """Stands in for a model: after a colon it writes its answer byte by byte, then speaks for the user."""

    answer = b" Hello you.\n\nUser: and so on" + b"." * 99
    config = SimpleNamespace(vocab_size=256)
    device = torch.device("cpu")

    def initial_state(self, batch_size=1):
        nothing = torch.zeros(batch_size, 1)
        return State((LayerState(nothing, nothing, nothing),))

    def check_state(self, state, batch_size):
        pass

    def fingerprint(self):
        return "parrot"

    def __call__(self, tokens, state, *, output):
        place = state.layers[0].memory
        for token in tokens[0].tolist():
            place = torch.zeros_like(place) if token == ord(":") else place + 1
        logits = torch.full((1, 1, 256), -1e4)
        logits[0, 0, self.answer[int(place)]] = 0
        return logits, State((LayerState(place, place, place),))


def talk(*lines, model=None, form=G1, write=None, **options):
    """Let a Chat read these lines (an exception is raised instead); the chat, its answers, its remarks."""
    waiting, prompts, answers, remarks = list(lines), [], [], []

    def read(prompt):
        prompts.append(prompt)
        line = waiting.pop(0) if waiting else EOFError
        if not isinstance(line, str):
            raise line
        return line

    session = Session(model or Parrot(), bytes_())
    settings = options.pop("sampling", Sampling(temperature=0))
    chat = Chat(
        session, form, settings, read=read, write=write or answers.append, say=remarks.append, **options
    )
    chat.run()
    assert not waiting, "the chat ended before it read everything"
    return SimpleNamespace(chat=chat, prompts=prompts, answers="".join(answers), remarks=remarks)


def heard(monkeypatch):
    """The texts that sessions are fed, in order."""
    texts, feed = [], Session.feed
    monkeypatch.setattr(Session, "feed", lambda self, text: texts.append(text) or feed(self, text))
    return texts


def test_an_answer_ends_where_the_next_speaker_begins():
    assert talk("hi").answers == "Hello you.\n"


def test_the_model_reads_the_turns_in_its_format(monkeypatch):
    texts = heard(monkeypatch)
    talk("hi", "and?", system="Be kind.")
    assert texts == [
        "System: Be kind.\n\nUser: hi\n\nAssistant:",
        "\n\nUser: and?\n\nAssistant:",
    ]


def test_after_an_answer_the_model_has_read_exactly_the_conversation():
    chat = talk("hi", "and?").chat
    whole = Session(Parrot(), bytes_())
    whole.feed("User: hi\n\nAssistant: Hello you.\n\nUser: and?\n\nAssistant: Hello you.")
    assert chat.positions[-1].n_tokens == whole.n_tokens


def test_the_world_format_begins_with_a_greeting(monkeypatch):
    texts = heard(monkeypatch)
    talk("hi", form=WORLD)
    assert texts[0].startswith("User: hi\n\nAssistant: Hi.")
    assert texts[0].endswith("\n\nUser: hi\n\nAssistant:")


def test_a_thinking_model_is_shown_thinking(monkeypatch):
    texts = heard(monkeypatch)
    result = talk("hi", think="on", max_tokens=3)
    assert texts[0].endswith("Assistant: <think")
    assert result.answers.startswith("<think")


def test_a_line_that_ends_in_a_backslash_continues(monkeypatch):
    texts = heard(monkeypatch)
    result = talk("one\\", "two\\", "three")
    assert texts == ["User: one\ntwo\nthree\n\nAssistant:"]
    assert result.prompts == ["> ", "... ", "... ", "> "]


def test_a_block_between_triple_quotes_is_one_message_even_with_commands_inside(monkeypatch):
    texts = heard(monkeypatch)
    talk('"""', "def f():", "    /undo", '"""')
    assert texts == ["User: def f():\n    /undo\n\nAssistant:"]


def test_a_command_is_one_line_whatever_it_ends_in():
    assert talk("/fork a\\", "hi").answers == "Hello you.\n"


def test_empty_lines_are_not_messages(monkeypatch):
    texts = heard(monkeypatch)
    talk("", "   ", '"""', '"""')
    assert texts == []


def test_undo_returns_to_the_position_before_the_answer():
    once, undone = talk("hi").chat, talk("hi", "and?", "/undo").chat
    assert undone.positions[-1].n_tokens == once.positions[-1].n_tokens
    assert len(undone.positions) == 2


def test_undo_at_the_beginning_says_so():
    assert talk("/undo").remarks == ["there is nothing to undo."]


def test_branches_go_their_own_ways():
    chat = talk("hi", "/fork other", "and?", "/fork main").chat
    assert chat.branch == "main"
    assert [len(positions) for positions in chat.branches.values()] == [2, 3]
    assert chat.branches["main"][1] is chat.branches["other"][1]


def test_fork_names_new_branches_and_the_prompt_says_where_you_are():
    result = talk("/fork", "/fork", "/fork main")
    assert list(result.chat.branches) == ["main", "2", "3"]
    assert result.prompts == ["> ", "2> ", "3> ", "> "]
    assert result.remarks[-1] == "branches: [main], 2, 3"


def test_reset_begins_again_and_can_be_undone(monkeypatch):
    texts = heard(monkeypatch)
    chat = talk("hi", "/reset", "hi", system="Be kind.").chat
    assert texts[0] == texts[1] == "System: Be kind.\n\nUser: hi\n\nAssistant:"
    assert len(chat.positions) == 4


def test_a_saved_conversation_goes_on_as_if_it_had_never_stopped(tmp_path, tiny):
    file = tmp_path / "chat.state"
    sampling = Sampling(seed=5)
    options = {"model": tiny, "sampling": sampling, "max_tokens": 20}
    whole = talk("hi", f"/save {file}", "and?", **options)
    loaded = talk(f"/load {file}", "and?", **options)
    assert whole.answers.endswith(loaded.answers)
    assert len(loaded.answers) > 5
    assert loaded.chat.positions[-1].n_tokens == whole.chat.positions[-1].n_tokens


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/save", "/save chat.state"),
        ("/load", "/load chat.state"),
        ("/load nothing.state", "nothing.state"),
        ("/save nowhere/at/all.state", "nowhere"),
        ("/undoo", "Try: /undo."),
        ("/xyzzy", "/help"),
        ("/set temprature 1", "Try: temperature."),
        ("/set temperature hot", "temperature is 'hot'. Expected: a number"),
        ("/set temperature -1", "a number from 0 to 100"),
        ("/set top_k 1.5", "a whole number"),
        ("/set seed [1]", "seed is [1]"),
        ("/set max_tokens none", "a whole number from 1"),
        ("/set max_tokens True", "a whole number from 1"),
        ("/set seed " + "(" * 300, "seed is '((("),
        ("/set max_tokens 0", "a whole number from 1"),
        ("/set think harder", "think is 'harder'"),
    ],
)
def test_a_wrong_command_is_answered_and_the_chat_goes_on(line, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = talk(line, "hi")
    assert message in result.remarks[0]
    assert result.answers == "Hello you.\n"


def test_set_changes_a_setting_and_alone_shows_them_all():
    result = talk("/set temperature 0.7", "/set top-p 0.3", "/set seed 4", "/set seed none", "/set think low",
                  "/set max_tokens 5", "/set logit_bias {10: -1e9}", "/set")  # fmt: skip
    chat = result.chat
    assert chat.sampling == Sampling(temperature=0.7, top_p=0.3, logit_bias={10: -1e9})
    assert (chat.think, chat.max_tokens) == ("low", 5)
    assert "temperature 0.7" in result.remarks[-1]
    assert "max_tokens 5" in result.remarks[-1]


def test_an_answer_that_was_cut_off_says_so():
    result = talk("hi", max_tokens=3)
    assert result.answers == "He\n"
    assert "/set max_tokens" in result.remarks[-1]


def test_ctrl_c_stops_the_answer_and_not_the_chat():
    pieces = []

    def write(text):
        pieces.append(text)
        if "".join(pieces) == "Hel":
            raise KeyboardInterrupt

    result = talk("hi", "hi", write=write)
    assert "".join(pieces) == "Hel\nHello you.\n"
    assert "stopped" in result.remarks[0]
    assert len(result.chat.positions) == 3


def test_ctrl_c_while_the_question_is_read_drops_the_question(monkeypatch):
    monkeypatch.setattr(Session, "feed", interrupt)
    result = talk("hi", "/quit")
    assert result.answers == ""
    assert "as it was" in result.remarks[0]
    assert len(result.chat.positions) == 1


def test_ctrl_c_at_the_prompt_drops_the_line_and_says_how_to_leave():
    result = talk(KeyboardInterrupt, "hi")
    assert "/quit" in result.remarks[0]
    assert result.answers == "Hello you.\n"


def test_an_input_that_cannot_be_read_ends_the_chat():
    with pytest.raises(OSError, match="stdin is gone"):
        talk(OSError("stdin is gone"))


def test_an_output_that_is_gone_ends_the_chat():
    def write(_):
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        talk("hi", "hi", write=write)


def test_a_line_that_is_not_utf_8_is_answered():
    result = talk(UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), "hi")
    assert "not UTF-8" in result.remarks[0]
    assert result.answers == "Hello you.\n"


@pytest.mark.parametrize("lines", [[], ["/quit"], ["/quit "], ['"""', "half a block"], ["half a line\\"]])
def test_quit_and_the_end_of_the_input_leave(lines):
    assert talk(*lines).answers == ""


def test_a_long_conversation_keeps_a_bounded_number_of_states():
    chat = talk(*["hi"] * (KEPT + 5)).chat
    assert len(chat.positions) == KEPT + 1
    assert chat.positions[0].n_tokens == 0


def test_help_lists_every_command():
    text = "\n".join(talk("/help").remarks)
    for name in ("fork", "undo", "reset", "save", "load", "set", "help", "quit"):
        assert f"/{name}" in text


def test_chat_reads_a_pipe_without_prompts(wkv_command, folder, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n/quit\n"))
    result = wkv_command("chat", "model.safetensors", "--max-tokens", 5, "--seed", 1)
    assert result.status == 0
    assert ">" not in result.err
    assert "(5 tokens" in result.err
    assert result.out.endswith("\n")


class Terminal:
    """A command in a terminal of its own: what a person sees and types."""

    def __init__(self, *arguments):
        ours, theirs = os.openpty()
        self.ours, self.seen, self.place = ours, "", 0
        self.process = subprocess.Popen(
            [*RUN, *arguments],
            stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # so that ^C becomes a signal
            env={**os.environ, "NO_COLOR": "1", "TERM": "xterm", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        os.close(theirs)

    def type(self, text):
        os.write(self.ours, text.encode())

    def wait_for(self, pattern, seconds=60.0, press=""):
        """Read until the pattern appears after the last match, pressing a key every few seconds.

        A Ctrl-C that falls after the prompt is drawn and before Python's `input` waits is noticed at the
        next key only (there was no select yet to interrupt): a person presses again, and so does this.
        """
        end, next_press = time.monotonic() + seconds, 0.0
        while not (match := re.compile(pattern, re.DOTALL).search(self.seen, self.place)):
            now = time.monotonic()
            assert now < end, f"no {pattern!r} in {self.seen[self.place :]!r}"
            if now >= next_press:
                self.type(press)
                next_press = now + 3
            if select.select([self.ours], [], [], 0.1)[0]:
                self.seen += os.read(self.ours, 4096).decode(errors="replace")
        self.place = match.end()

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.ours)


def test_a_chat_in_a_real_terminal(folder):
    terminal = Terminal("chat", "model.safetensors", "--max-tokens", "1000000", "--seed", "1")
    try:
        terminal.wait_for(r"/help.*> ")
        terminal.type("hello\n")
        terminal.wait_for(r"hello\r\n.{9}")  # the answer has begun
        terminal.wait_for(r"tokens, [\d.]+/s; stopped.*> ", press="\x03")
        terminal.wait_for(r"/quit or Ctrl-D.*> ", press="\x03")
        terminal.type("/set max_tokens 4\n")
        terminal.wait_for(r"max_tokens 4\r\n.*> ")
        terminal.type("again\n")
        terminal.wait_for(r"\(4 tokens.*> ")
        terminal.type("\x04")
        assert terminal.process.wait(60) == 0
        assert "Traceback" not in terminal.seen
        assert not re.search(r"\x1b\[[\d;]+m", terminal.seen), "NO_COLOR was set"
    finally:
        terminal.close()

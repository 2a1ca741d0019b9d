"""`wkv train` from the command line: settings, sources, resume, and one clear line for whatever is wrong."""

import json
import tomllib

import pytest
import torch
from official import random_official

import wkv
from wkv.cli import main
from wkv.training.run_folder import read_records

TINY = ["--n-layer", "1", "--n-embd", "16", "--head-size", "8", "--context", "16", "--batch-size", "2"]
SHORT = ["--tokens", "200", "--validate-every", "4", "--save-every", "3", "--warmup-tokens", "32"]


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(6):
        (folder / f"{i}.txt").write_text(f"Text number {i} says hello. " * 5)
    return folder


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Run `wkv train ...` in tmp_path; return (status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        status = main(["train", *map(str, arguments)])
        shown = capsys.readouterr()
        return status, shown.out, shown.err

    return run


def test_a_folder_of_text_becomes_a_model_that_writes(run, texts, tmp_path, capsys):
    status, out, err = run(texts, "--out", "here", *TINY, *SHORT, "--prompt", "Text")
    assert status == 0, err
    assert out.startswith("here/model.safetensors: ") and "7 steps" in out
    folder = tmp_path / "here"
    model, tokenizer = wkv.load(folder / "model.safetensors")
    assert tokenizer.name == "bytes"
    assert model.config == wkv.RWKV7Config.of_size(vocab_size=256, n_layer=1, n_embd=16, head_size=8)
    assert len(read_records(folder / "metrics.jsonl")) == 7
    assert (folder / "samples" / "step-000000004.txt").read_text().startswith("Text")
    assert "loss.png" in (folder / "report.md").read_text()
    assert "held-out loss" in err and "bits/byte" in err and "it writes 'Text" in err and "% of peak" in err
    assert main(["generate", str(folder / "model.safetensors"), "Text", "--max-tokens", "3"]) == 0


def test_the_written_config_alone_repeats_the_run(run, texts, tmp_path):
    assert run(texts, "--out", "a", *TINY, *SHORT)[0] == 0
    assert run("--config", "a/config.toml", "--out", "b")[0] == 0
    for name in ("metrics.jsonl", "config.toml"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_flag_overrides_the_file_and_the_file_the_default(run, texts, tmp_path):
    (tmp_path / "run.toml").write_text(
        "[model]\nn_layer = 1\nn_embd = 16\nhead_size = 8\n"
        "[training]\nbatch_size = 2\ncontext = 16\ntokens = 64\n"
    )
    assert run(texts, "--config", "run.toml", "--out", "here", "--batch-size", "3")[0] == 0
    written = tomllib.loads((tmp_path / "here" / "config.toml").read_text())
    assert written["training"]["batch_size"] == 3
    assert written["training"]["context"] == 16
    assert written["training"]["clip"] == 1.0
    assert written["data"]["data"] == [str(texts)]


def test_the_folder_alone_goes_on_with_the_run(run, texts, tmp_path):
    assert run(texts, "--out", "here", *TINY, *SHORT)[0] == 0
    status, _, err = run("--out", "here")
    assert status == 0 and "going on after step 7" in err
    status, _, err = run("--out", "here", "--tokens", "300")
    assert status == 1
    assert "tokens was 200 and is 300" in err and "--accept-changes" in err and err.count("\n") == 1
    status, out, _ = run("--out", "here", "--tokens", "300", "--accept-changes")
    assert status == 0 and "10 steps" in out


@pytest.mark.parametrize("version", ["4", "7"])
def test_an_official_checkpoint_is_continued_and_exported_for_the_official_tools(
    run, texts, tmp_path, version
):
    wide = random_official(version, n_layer=2, n_embd=64, vocab_size=256)
    torch.save(wide, tmp_path / "init.pth")
    status, _, err = run(
        texts,
        "--init",
        "init.pth",
        "--out",
        "here",
        "--context",
        16,
        "--batch-size",
        2,
        *SHORT,
        "--learning-rate",
        "1e-4",
    )
    assert status == 0, err
    assert main(["convert", "here/model.safetensors", "out.pth"]) == 0
    back = torch.load(tmp_path / "out.pth", weights_only=True)
    assert {name: tuple(w.squeeze().shape) for name, w in back.items()} == {
        name: tuple(w.squeeze().shape) for name, w in wide.items()
    }
    changed = [name for name in wide if not torch.equal(back[name].squeeze(), wide[name].squeeze().float())]
    assert "head.weight" in changed and "blocks.0.att.key.weight" in changed
    first = read_records(tmp_path / "here" / "metrics.jsonl")[0]
    assert first["learning_rate"] <= 1e-4


def test_another_request_does_not_get_what_an_earlier_one_packed(run, texts, tmp_path):
    def data_of(name):
        return json.loads((tmp_path / name / "run.json").read_text())["identity"]["data"]

    (tmp_path / "other.txt").write_text("Quite another text. " * 30)
    status, _, err = run("other.txt", "--out", "here", "--context", "100000")
    assert status == 1 and "longer than the data" in err
    assert run(texts, "--out", "here", *TINY, *SHORT)[0] == 0
    assert run("other.txt", "--out", "there", *TINY, *SHORT)[0] == 0
    assert data_of("here") != data_of("there")


def test_a_checkpoint_brings_its_sizes_and_its_tokenizer(run, texts, tmp_path):
    wkv.save(wkv.build(wkv.RWKV7Config.of_size(vocab_size=70, n_layer=1, n_embd=64)), tmp_path / "odd.pth")
    status, _, err = run(texts, "--init", "odd.pth", "--out", "here", *SHORT)
    assert status == 2 and "no tokenizer is known for odd.pth" in err
    status, _, err = run(texts, "--init", "odd.pth", "--n-layer", "3", "--out", "here")
    assert status == 2 and "--init brings its own sizes" in err


def test_packed_data_know_their_tokenizer(run, texts, tmp_path):
    assert (
        main(["data", "pack", str(texts), "--tokenizer", "bytes", "--out", "packed", "--workers", "1"]) == 0
    )
    status, _, err = run("packed", "--out", "here", *TINY, *SHORT, "--order", "documents")
    assert status == 0, err
    assert not list((tmp_path / "here").glob("data*"))
    assert "documents of more than 16 tokens are cut" in err
    assert run("packed", "--tokenizer", "world", "--out", "there")[0] == 2


@pytest.mark.parametrize(
    ("arguments", "complaint", "expected_status"),
    [
        ([], "there is nothing to learn from", 2),
        (["nowhere"], "nowhere does not exist", 1),
        (["empty"], "empty", 1),
        (["texts", "--context", "100000"], "longer than the data", 1),
        (["texts", "--learning-rate", "fast"], "learning-rate", 2),
        (["texts", "--batch-size", "0"], "batch_size is 0. Expected: a whole number from 1", 1),
        (["texts", "--config", "typo.toml"], "no setting is named 'lerning_rate'", 1),
        (["texts", "--config", "table.toml"], "no table is named 'trainin'", 1),
        (["texts", "--config", "flat.toml"], "data is 'texts/'. Expected: a table, [data]", 1),
        (["texts", "--held-out", "0", "--prompt", "a"], "--prompt is shown at validations", 2),
        (["texts", "--config", "broken.toml"], "broken.toml is not TOML", 1),
        (["texts", "--config", "missing.toml"], "missing.toml", 1),
        (["texts", "--init", "other.safetensors"], "other.safetensors", 1),
        (["texts", "--init", "missing.pth"], "missing.pth", 1),
        (["texts", "--tokenizer", "wrld"], "no tokenizer is named 'wrld'", 1),
        (["texts", "--size", "9000B"], "no size named '9000B'", 1),
        (["texts", "--device", "tpu"], "--device is 'tpu'", 2),
        (["tokens.npy"], "do not say how large their vocabulary is", 1),
    ],
)
def test_what_is_wrong_is_one_clear_line(run, texts, tmp_path, arguments, complaint, expected_status):
    import numpy as np
    from safetensors.torch import save_file

    (tmp_path / "empty").mkdir()
    (tmp_path / "typo.toml").write_text("[training]\nlerning_rate = 1e-3\n")
    (tmp_path / "table.toml").write_text("[trainin]\n")
    (tmp_path / "flat.toml").write_text('data = "texts/"\n')
    (tmp_path / "broken.toml").write_text("[training\n")
    save_file({"transformer.wte.weight": torch.ones(4, 4)}, tmp_path / "other.safetensors")
    np.save(tmp_path / "tokens.npy", np.arange(5000, dtype=np.uint16) % 200)
    status, out, err = run(*arguments, "--out", "here")
    assert status == expected_status, err
    assert complaint in err.splitlines()[-1]
    assert out == ""


def test_json_lines_without_the_field_are_skipped_and_counted(run, tmp_path):
    lines = [{"text": "hello there, how are you today?"}] * 20 + [{"words": "no"}] * 2
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, lines)))
    status, _, err = run("chat.jsonl", "--out", "here", *TINY, *SHORT)
    assert status == 0
    assert "skipped 2" in err

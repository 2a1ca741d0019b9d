"""A tokenizer made for a text: exact, repeatable, and blind to what is held out."""

import pytest

from wkv.cli import main
from wkv.errors import InputError
from wkv.tokenizers import from_file
from wkv.training.data import make_tokenizer, open_data, pack


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(40):
        (folder / f"{i}.txt").write_text(f"def function_{i}(argument):\n    return argument + {i}\n" * 20)
    return folder


def test_any_text_comes_back_and_familiar_text_is_short(texts, tmp_path):
    make_tokenizer([texts], tmp_path / "tokenizer.json", vocab_size=300)
    tokenizer = from_file(tmp_path / "tokenizer.json")
    assert tokenizer.vocab_size == 300
    assert tokenizer.end_of_text == 0
    for text in ("def function_3(argument):\n    return 1\n", "日本語 🦆 \x00\r\n  <|endoftext|>", ""):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("    return argument")) < 5


def test_the_same_request_gives_the_same_file(texts, tmp_path):
    for name in ("a", "b"):
        make_tokenizer([texts], tmp_path / name, vocab_size=320, seed=3)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_held_out_documents_are_not_looked_at(texts, tmp_path):
    pack([texts], from_file(tiny(texts, tmp_path)), tmp_path / "packed", held_out=0.2, seed=1)
    data = open_data(tmp_path / "packed")
    tokenizer = from_file(tmp_path / "tiny.json")
    held_out = {
        tokenizer.decode(data.validation.document(i)[:-1].tolist())
        for i in range(data.validation.n_documents)
    }
    without = tmp_path / "without"
    without.mkdir()
    for path in texts.iterdir():
        if path.read_text() not in held_out:
            (without / path.name).write_text(path.read_text())
    assert 0 < len(held_out) < 40
    make_tokenizer([texts], tmp_path / "a", vocab_size=300, held_out=0.2, seed=1)
    make_tokenizer([without], tmp_path / "b", vocab_size=300, held_out=0)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def tiny(texts, tmp_path):
    make_tokenizer([texts], tmp_path / "tiny.json", vocab_size=257, held_out=0)
    return tmp_path / "tiny.json"


@pytest.mark.parametrize(("size", "complaint"), [(256, "at least 257"), (5000, "the text is enough for")])
def test_a_size_that_cannot_be_is_refused_and_nothing_is_written(texts, tmp_path, size, complaint):
    with pytest.raises(InputError, match=complaint):
        make_tokenizer([texts], tmp_path / "tokenizer.json", vocab_size=size)
    assert not (tmp_path / "tokenizer.json").exists()


def test_the_command_says_what_it_made(texts, tmp_path, capsys):
    out = str(tmp_path / "tokenizer.json")
    assert main(["data", "tokenizer", str(texts), "--vocab-size", "300", "--out", out]) == 0
    assert capsys.readouterr().out == f"{out}: 300 tokens\n"

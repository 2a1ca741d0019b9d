"""The text that every machine has: what belongs to it, and what is held out."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from wkv.errors import InputError
from wkv.training import Document, split, standard_library


def test_the_corpus_is_the_library_of_this_interpreter_without_tests_and_tables() -> None:
    documents = standard_library()
    paths = [document.path for document in documents]
    assert paths == sorted(paths)
    assert {"argparse.py", "json/decoder.py", "asyncio/tasks.py", "unittest/case.py"} <= set(paths)
    folders = {folder for path in paths for folder in path.split("/")[:-1]}
    assert folders.isdisjoint({"test", "tests", "idle_test", "site-packages", "encodings", "pydoc_data"})
    assert all(document.text for document in documents)
    assert 350 < len(documents) < 600
    assert 6e6 < sum(len(document.text) for document in documents) < 12e6
    assert dict(documents)["argparse.py"] == Path(argparse.__file__).read_bytes()


def test_a_folder_without_a_library_is_refused(tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text("x = 1\n")
    with pytest.raises(InputError, match=r"holds 1 Python files"):
        standard_library(tmp_path)


def test_the_split_holds_out_whole_files_chosen_by_the_seed() -> None:
    documents = [Document(f"{i:03}.py", b"%d" % i) for i in range(100)]
    read, held_out = split(documents, seed=1)
    assert len(held_out) == 5
    assert sorted(read + held_out) == documents
    assert read == sorted(read) and held_out == sorted(held_out)
    assert split(documents, seed=1) == (read, held_out)
    assert split(documents, seed=2)[1] != held_out

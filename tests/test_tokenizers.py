"""Text to ids and back without losing a byte, in whole and as a stream."""

from __future__ import annotations

import ast
import importlib.util
import json
import random
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tokenizers as hf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from wkv.errors import InputError, TokenizerError
from wkv.tokenizers import (
    Tokenizer,
    bytes_,
    check_fits,
    for_checkpoint,
    from_file,
    named,
    rwkv_world,
    world,
)

PILE_FILE = Path(__file__).resolve().parents[2] / "shared" / "data" / "20B_tokenizer.json"

SCRIPTS = {
    "Latin": "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich; ça va, señor?",
    "Greek": "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία.",
    "Cyrillic": "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "Armenian": "Բել դղյակի ձախ ժամն օֆ ազգությանը ցպահանջ չճշտած վնաս էր եւ փառք։",
    "Georgian": "აბრა ჰოლანდიელ ცხვარს ფეხქვეშ ნაზი ბოსტნეულით.",
    "Hebrew": "דג סקרן שט בים מאוכזב ולפתע מצא חברה",
    "Arabic": "نص حكيم له سر قاطع وذو شأن عظيم مكتوب على ثوب أخضر",
    "Devanagari": "ऋषियों को सताने वाले दुष्ट राक्षसों के राजा रावण",
    "Bengali": "আমার সোনার বাংলা, আমি তোমায় ভালোবাসি।",
    "Tamil": "யாமறிந்த மொழிகளிலே தமிழ்மொழி போல் இனிதாவது எங்கும் காணோம்",
    "Telugu": "దేశ భాషలందు తెలుగు లెస్స",
    "Thai": "เป็นมนุษย์สุดประเสริฐเลิศคุณค่า",
    "Khmer": "មនុស្សទាំងអស់កើតមកមានសេរីភាព",
    "Tibetan": "འགྲོ་བ་མིའི་རིགས་རྒྱུད་ཡོངས་ལ་སྐྱེས་ཙམ་ཉིད་ནས་",
    "Amharic": "ሰማይ አይታረስ ንጉሥ አይከሰስ።",
    "Chinese": "天地玄黃，宇宙洪荒。日月盈昃，辰宿列張。𠮷",
    "Japanese": "いろはにほへと ちりぬるを カタカナ、漢字。",
    "Korean": "키스의 고유조건은 입술끼리 만나야 하고 특별한 기술은 필요치 않다.",
    "Cherokee": "ᏣᎳᎩ ᎦᏬᏂᎯᏍᏗ",
    "emoji": "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇺🇳 é\u0301",
    "code": "def f(x):\r\n\treturn {'a': x}  # \x00\x7f\u2028\n\n\n\n" + " " * 300,
}
LOSSLESS = ["world", "bytes", "byte-level"]
# Not timed: the machine may be busy with other tests.
modestly = settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])


def byte_level_file(path: Path) -> Path:
    """A small tokenizer in the form of 20B: byte-level pieces, and added tokens that are plain text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {piece: i for i, piece in enumerate(["<|endoftext|>", *alphabet, "th", "Ġth"])}
    tokenizer = hf.Tokenizer(models.BPE(vocab, [("t", "h"), ("Ġ", "th")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.add_tokens(["    ", "Ġé"])
    tokenizer.save(str(path))
    return path


def sentencepiece_file(path: Path, decoder: decoders.Decoder) -> Path:
    """A tokenizer whose spaces are "▁" and which spells unknown characters as bytes."""
    pieces = ["<unk>", "</s>", "▁", "▁▁", "a", "b", "▁a", "ä", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = hf.Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, [("▁", "a"), ("▁", "▁")], byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoder
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(path))
    return path


def llama_decoder() -> decoders.Decoder:
    return decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )


def word_file(path: Path, decoder: decoders.Decoder | None, pieces: list[str]) -> Path:
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = hf.Tokenizer(models.WordLevel(vocab, unk_token=pieces[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if decoder is not None:
        tokenizer.decoder = decoder
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="module")
def lossless(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    byte_level = from_file(byte_level_file(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"))
    return {"world": world(), "bytes": bytes_(), "byte-level": byte_level}


@pytest.fixture(scope="module")
def pile() -> Tokenizer:
    if not PILE_FILE.exists():
        pytest.skip("the 20B tokenizer is not here")
    return from_file(PILE_FILE)


def world_file() -> bytes:
    """The World vocabulary as published."""
    package = importlib.util.find_spec("pyrwkv_tokenizer")
    assert package is not None and package.origin is not None
    return Path(package.origin).with_name(rwkv_world.VOCABULARY_FILE).read_bytes()


@pytest.fixture(scope="module")
def vocabulary() -> dict[bytes, int]:
    """The World tokens and their ids, read one literal at a time."""
    tokens = {}
    for line in world_file().decode().splitlines():
        number, rest = line.split(" ", 1)
        literal, length = rest.rsplit(" ", 1)
        value = ast.literal_eval(literal)
        token = value if isinstance(value, bytes) else value.encode()
        assert len(token) == int(length)
        tokens[token] = int(number)
    return tokens


def streamed(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    stream = tokenizer.stream_decoder()
    return [*map(stream.push, ids), stream.finish()]


# Round trips


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("kind", LOSSLESS)
def test_text_survives_the_round_trip(lossless: dict[str, Tokenizer], kind: str, script: str) -> None:
    tokenizer, text = lossless[kind], SCRIPTS[script]
    ids = tokenizer.encode(text)
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert tokenizer.decode(ids) == text
    assert "".join(streamed(tokenizer, ids)) == text
    assert all(0 <= token < tokenizer.vocab_size for token in ids)


@pytest.mark.parametrize("script", SCRIPTS)
def test_20b_gives_the_composed_form_of_the_text_back(pile: Tokenizer, script: str) -> None:
    text = SCRIPTS[script]
    ids = pile.encode(text)
    assert pile.decode(ids) == "".join(streamed(pile, ids)) == unicodedata.normalize("NFC", text)


@pytest.mark.parametrize("kind", LOSSLESS)
@modestly
@given(text=st.text())
def test_any_text_survives_the_round_trip(lossless: dict[str, Tokenizer], kind: str, text: str) -> None:
    assert lossless[kind].decode(lossless[kind].encode(text)) == text


@pytest.mark.parametrize("kind", LOSSLESS)
def test_the_empty_text_has_no_tokens(lossless: dict[str, Tokenizer], kind: str) -> None:
    assert lossless[kind].encode("") == []
    assert lossless[kind].decode([]) == ""


# World


def test_world_has_every_token_of_the_vocabulary_file(vocabulary: dict[bytes, int]) -> None:
    assert list(vocabulary.values()) == list(range(1, 65530))
    assert [world().decode_bytes([number]) for number in range(1, 65530)] == list(vocabulary)
    assert world().vocab_size == 65530


@modestly
@given(data=st.data())
def test_world_takes_the_longest_token_at_every_position(
    vocabulary: dict[bytes, int], data: st.DataObject
) -> None:
    words = st.sampled_from(list(vocabulary)).map(lambda token: token.decode(errors="ignore"))
    pieces = st.one_of(st.text(max_size=20), words, st.integers(1, 200).map(" ".__mul__))
    text = "".join(data.draw(st.lists(pieces, max_size=12)))

    source, expected, start = text.encode(), [], 0
    while start < len(source):
        end = next(e for e in range(start + 128, start, -1) if source[start:e] in vocabulary)
        expected.append(vocabulary[source[start:end]])
        start += len(source[start:end])
    assert world().encode(text) == expected


def test_world_encodes_as_published() -> None:
    assert world().encode("\n") == [11]
    assert world().encode("\n\n") == [261]
    assert world().encode("\x00\x7f") == [1, 128]
    assert world().encode(" " * 128) == [65529]
    assert world().encode("<|endoftext|>").count(0) == 0


def test_world_decodes_every_part_of_a_character() -> None:
    ids = [byte + 1 for byte in "👩‍👧é".encode()]
    for stop in range(len(ids) + 1):
        assert world().decode(ids[:stop]) == bytes(i - 1 for i in ids[:stop]).decode(errors="replace")


def test_the_end_of_text_and_the_padding_of_world_decode_to_nothing() -> None:
    assert world().end_of_text == 0
    assert world().decode_bytes([0, 66, 0, *range(65530, 65536), 67]) == b"AB"
    assert "".join(streamed(world(), [0, 66, 65535, 67, 0])) == "AB"


def test_world_is_read_once() -> None:
    assert world() is world()


@pytest.mark.parametrize("change", [b"", b"1 '\\x00' 1\n", None], ids=["empty", "short", "one letter"])
def test_a_changed_installed_vocabulary_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: bytes | None
) -> None:
    changed = world_file().replace(b"' the'", b"' teh'") if change is None else change
    (tmp_path / rwkv_world.VOCABULARY_FILE).write_bytes(changed)
    fake = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: fake)
    with pytest.raises(TokenizerError, match=r"not the World vocabulary.*reinstall"):
        world.__wrapped__()


def test_a_missing_world_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TokenizerError, match="pip install pyrwkv-tokenizer"):
        world.__wrapped__()


# Bytes


def test_the_id_of_a_byte_is_its_value() -> None:
    assert bytes_().encode("Aé") == [65, 0xC3, 0xA9]
    assert bytes_().decode_bytes(list(range(256))) == bytes(range(256))
    assert (bytes_().vocab_size, bytes_().end_of_text) == (256, None)


# The stream


@pytest.mark.parametrize("kind", LOSSLESS)
@modestly
@given(data=st.data())
def test_the_stream_of_any_ids_joins_to_their_decoded_text(
    lossless: dict[str, Tokenizer], kind: str, data: st.DataObject
) -> None:
    ids = data.draw(st.lists(st.integers(0, lossless[kind].vocab_size - 1)))
    assert "".join(streamed(lossless[kind], ids)) == lossless[kind].decode(ids)


@modestly
@given(data=st.binary() | st.text("é中🙂", min_size=1).map(lambda text: text.encode()[1:-1]))
def test_bytes_that_are_not_utf8_are_replaced_as_python_does(data: bytes) -> None:
    assert "".join(streamed(bytes_(), list(data))) == data.decode(errors="replace")
    assert "".join(streamed(world(), [byte + 1 for byte in data])) == data.decode(errors="replace")
    assert world().decode_bytes([byte + 1 for byte in data]) == data


@modestly
@given(text=st.text())
def test_the_stream_gives_each_character_whole_and_at_once(text: str) -> None:
    stream = bytes_().stream_decoder()
    for character in text:
        *first, last = character.encode()
        assert [stream.push(byte) for byte in first] == [""] * len(first)
        assert stream.push(last) == character
    assert stream.finish() == ""


def test_half_a_character_at_the_end_is_given_by_finish() -> None:
    assert streamed(bytes_(), [65, 0xF0, 0x9F]) == ["A", "", "", "\ufffd"]


def test_a_finished_stream_starts_afresh(tmp_path: Path) -> None:
    tokenizer = from_file(sentencepiece_file(tmp_path / "tokenizer.json", llama_decoder()))
    stream = tokenizer.stream_decoder()
    for _ in range(2):
        assert "".join(map(stream.push, tokenizer.encode("a a"))) + stream.finish() == "a a"


def test_an_id_out_of_range_leaves_the_stream_as_it_was() -> None:
    stream = bytes_().stream_decoder()
    stream.push(0xC3)
    with pytest.raises(InputError):
        stream.push(256)
    assert stream.push(0xA9) == "é"


# tokenizer.json


def test_20b_decodes_as_its_own_library(pile: Tokenizer) -> None:
    library = hf.Tokenizer.from_file(str(PILE_FILE))
    random_ids = random.Random(0)
    for length in range(200):
        ids = [random_ids.randrange(1, pile.vocab_size) for _ in range(length)]
        assert pile.decode(ids) == library.decode(ids, skip_special_tokens=False)
        assert "".join(streamed(pile, ids)) == pile.decode(ids)


def test_20b_has_the_sizes_of_the_pile_models(pile: Tokenizer) -> None:
    assert (pile.vocab_size, pile.end_of_text) == (50277, 0)
    assert pile.decode([0, 50277, 50303]) == ""
    assert pile.decode([50276]) == "  "
    with pytest.raises(InputError, match="50304"):
        pile.decode([50304])


def test_added_tokens_are_plain_text_and_not_spelt_bytes(lossless: dict[str, Tokenizer]) -> None:
    tokenizer = lossless["byte-level"]
    text = "the Ġé and    more"
    ids = tokenizer.encode(text)
    assert {259, 260} <= set(ids)
    assert tokenizer.decode(ids) == text


def test_a_token_that_is_not_spelt_in_the_byte_alphabet_is_plain_text(tmp_path: Path) -> None:
    path = word_file(tmp_path / "tokenizer.json", decoders.ByteLevel(), ["?", "zwei Wörter", "中"])
    assert from_file(path).decode([1, 2]) == "zwei Wörter中"


@pytest.mark.parametrize("mark", ["<|endoftext|>", "</s>"])
def test_the_end_of_text_of_a_file_is_a_mark_that_decodes_to_nothing(tmp_path: Path, mark: str) -> None:
    path = tmp_path / "tokenizer.json"
    tokenizer = from_file(
        sentencepiece_file(path, llama_decoder()) if mark == "</s>" else byte_level_file(path)
    )
    assert tokenizer.end_of_text is not None
    assert tokenizer.decode([*tokenizer.encode("a"), tokenizer.end_of_text, *tokenizer.encode("b")]) == "ab"


@pytest.mark.parametrize(
    "decoder",
    [
        llama_decoder,
        lambda: decoders.Metaspace(prepend_scheme="always"),
        lambda: decoders.Metaspace(prepend_scheme="first"),
        lambda: decoders.Metaspace(prepend_scheme="never"),
    ],
    ids=["llama", "metaspace always", "metaspace first", "metaspace never"],
)
@modestly
@given(words=st.lists(st.sampled_from(["a", "b", "ä", " ", "  ", "   "])))
def test_spaces_written_as_lower_one_eighth_blocks_come_back(
    tmp_path_factory: pytest.TempPathFactory, decoder: Callable[[], decoders.Decoder], words: list[str]
) -> None:
    path = sentencepiece_file(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json", decoder())
    tokenizer, library = from_file(path), hf.Tokenizer.from_file(str(path))
    ids = tokenizer.encode("".join(words))
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids) == library.decode(ids)


@modestly
@given(text=st.text())
def test_characters_that_fall_back_to_bytes_lose_none(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "fallback.json"
    tokenizer = from_file(path if path.exists() else sentencepiece_file(path, llama_decoder()))
    assert tokenizer.decode(tokenizer.encode(text.replace("▁", " "))) == text.replace("▁", " ")


def test_half_a_fallback_character_waits(tmp_path: Path) -> None:
    tokenizer = from_file(sentencepiece_file(tmp_path / "tokenizer.json", llama_decoder()))
    *_, first, second, third = tokenizer.encode("a中")
    stream = tokenizer.stream_decoder()
    assert [stream.push(token) for token in (first, second, third)] == ["", "", "中"]
    assert tokenizer.decode_bytes([first, second]) == "中".encode()[:2]


@pytest.mark.parametrize(
    ("decoder", "pieces"),
    [
        (decoders.WordPiece(), ["[UNK]", "dog", "##s", ".", "n't", "do", "x"]),
        (decoders.BPEDecoder(suffix="</w>"), ["<unk>", "dog</w>", "s", "s</w>", "do</w>", "x"]),
        (None, ["[UNK]", "dog", "s", ".", "x"]),
    ],
    ids=["wordpiece", "end of word", "none"],
)
@modestly
@given(data=st.data())
def test_the_stream_puts_the_spaces_where_the_decoder_of_the_file_does(
    tmp_path_factory: pytest.TempPathFactory, decoder: Any, pieces: list[str], data: st.DataObject
) -> None:
    path = word_file(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json", decoder, pieces)
    tokenizer, library = from_file(path), hf.Tokenizer.from_file(str(path))
    ids = data.draw(st.lists(st.integers(0, len(pieces) - 1)))
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids) == library.decode(ids)


@pytest.mark.parametrize(
    ("decoder", "last"),
    [(None, 9), (llama_decoder(), 7), (decoders.ByteLevel(), 8)],
    ids=["none", "llama", "byte-level"],
)
def test_a_gap_in_the_vocabulary_of_a_file_decodes_to_nothing(
    tmp_path: Path, decoder: Any, last: int
) -> None:
    path = word_file(tmp_path / "tokenizer.json", decoder, ["a", "b"])
    content = json.loads(path.read_text())
    content["model"]["vocab"] = {"a": 0, "▁b": 7, "Ġb": 8, "b": 9}
    path.write_text(json.dumps(content))
    tokenizer = from_file(path)
    assert tokenizer.vocab_size == 10
    assert "".join(streamed(tokenizer, [0, 3, last])) == tokenizer.decode([0, 3, last]) == "a b"


def test_a_file_that_truncates_pads_and_adds_marks_does_none_of_it_here(tmp_path: Path) -> None:
    path = byte_level_file(tmp_path / "tokenizer.json")
    library = hf.Tokenizer.from_file(str(path))
    library.enable_truncation(3)
    library.enable_padding(length=8)
    library.post_processor = processors.TemplateProcessing("<|endoftext|> $A", None, [("<|endoftext|>", 0)])
    library.save(str(path))
    assert len(library.encode("a").ids) == 8
    assert len(from_file(path).encode("a")) == 1
    assert from_file(path).decode(from_file(path).encode("abcdefghijk")) == "abcdefghijk"


@pytest.mark.parametrize("kind", LOSSLESS)
def test_no_text_can_spell_the_end_of_text(lossless: dict[str, Tokenizer], kind: str) -> None:
    ids = lossless[kind].encode("a<|endoftext|>b")
    assert lossless[kind].end_of_text not in ids
    assert lossless[kind].decode(ids) == "a<|endoftext|>b"


def test_a_character_without_a_token_is_an_input_error(tmp_path: Path) -> None:
    path = word_file(tmp_path / "tokenizer.json", None, ["a", "b"])
    path.write_text(path.read_text().replace('"unk_token": "a"', '"unk_token": "gone"'))
    with pytest.raises(InputError, match="cannot encode"):
        from_file(path).encode("c")


# Bad input


@pytest.mark.parametrize("kind", LOSSLESS)
@pytest.mark.parametrize("token", [-1, -65530, 2**16, 2**63, 10**30, 1.5, "a", None])
def test_an_id_that_no_vocabulary_has_is_named(lossless: dict[str, Tokenizer], kind: str, token: Any) -> None:
    tokenizer = lossless[kind]
    for use in (tokenizer.decode, tokenizer.decode_bytes, lambda ids: tokenizer.stream_decoder().push(*ids)):
        with pytest.raises(InputError, match=f"^token id {token!r} "):
            use([token])


@pytest.mark.parametrize("kind", LOSSLESS)
@pytest.mark.parametrize("text", [b"bytes", None, 3, ["a"], "a\ud800b", "\udcff"])
def test_what_is_not_unicode_text_is_refused(lossless: dict[str, Tokenizer], kind: str, text: Any) -> None:
    with pytest.raises(InputError, match=r"^the text is (of type|not valid Unicode)"):
        lossless[kind].encode(text)


def refused(path: Path) -> str:
    with pytest.raises(TokenizerError) as caught:
        from_file(path)
    message = str(caught.value)
    assert path.name in message and "\n" not in message and len(message) < 600
    return message


def test_damaged_tokenizer_files_are_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    whole = byte_level_file(path).read_bytes()
    noise = random.Random(0).randbytes(5000)
    for data in (b"", whole[: len(whole) // 2], whole[:-2], noise, b"[]", b"[" * 10**6):
        path.write_bytes(data)
        assert "not a tokenizer.json" in refused(path)


def test_a_file_on_which_the_library_panics_is_refused_in_one_line(tmp_path: Path) -> None:
    path = byte_level_file(tmp_path / "tokenizer.json")
    content = json.loads(path.read_text())
    content["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    path.write_text(json.dumps(content))
    assert "not a tokenizer.json" in refused(path)


def test_an_interrupt_is_not_taken_for_a_bad_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(data: bytes) -> None:
        raise KeyboardInterrupt

    path = byte_level_file(tmp_path / "tokenizer.json")
    monkeypatch.setattr(hf, "Tokenizer", SimpleNamespace(from_buffer=interrupt))
    with pytest.raises(KeyboardInterrupt):
        from_file(path)


def test_a_tokenizer_without_tokens_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    hf.Tokenizer(models.BPE()).save(str(path))
    assert "no tokens" in refused(path)


def test_a_folder_a_missing_file_and_a_huge_file_are_refused_in_one_line(tmp_path: Path) -> None:
    assert "is a folder" in refused(tmp_path)
    assert "is not there" in refused(tmp_path / "gone.json")
    huge = tmp_path / "huge.json"
    with huge.open("wb") as file:
        file.truncate(64 * 2**20 + 1)
    assert "larger than 64 MB" in refused(huge)


# Choosing


def test_tokenizers_are_found_by_name_and_by_path(tmp_path: Path) -> None:
    assert named("world") is named("World") is world()
    assert named("bytes").name == "bytes"
    path = byte_level_file(tmp_path / "mine.json")
    for way in (path, str(path)):
        tokenizer = named(way)
        assert tokenizer.vocab_size == 261
        assert named(tokenizer.name).encode("the") == tokenizer.encode("the")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wrld", "no tokenizer is named 'wrld'.*Try: 'world'"),
        ("byte", "Try: 'bytes'"),
        ("", "no tokenizer is named ''"),
        ("20B", "'world', 'bytes' or the path"),
        ("a\0b", "no tokenizer"),
        ("x" * 5000, "no tokenizer"),
        ("no/such/file", "is not there"),
        ("tokenizer.json", "is not there"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TokenizerError, match=message):
        named(name)


@pytest.mark.parametrize(
    ("vocab_size", "name"),
    [
        *((65536, "world"), (65530, "world"), (65529, None), (65537, None)),
        *((256, "bytes"), (255, None), (257, None), (50277, None), (50304, None), (1, None)),
    ],
)
def test_a_checkpoint_alone_is_known_by_its_vocabulary(
    tmp_path: Path, vocab_size: int, name: str | None
) -> None:
    tokenizer = for_checkpoint(tmp_path / "model.pth", vocab_size)
    assert (tokenizer and tokenizer.name) == name


def test_a_tokenizer_beside_the_checkpoint_wins_when_it_fits(tmp_path: Path) -> None:
    path = byte_level_file(tmp_path / "tokenizer.json")
    mine = str(path)
    for vocab_size, name in ((261, mine), (384, mine), (65536, mine), (260, None), (256, "bytes")):
        tokenizer = for_checkpoint(tmp_path / "model.pth", vocab_size)
        assert (tokenizer and tokenizer.name) == name


def test_20b_in_a_folder_of_many_models_is_taken_for_pile_models_only(tmp_path: Path) -> None:
    path = byte_level_file(tmp_path / "20B_tokenizer.json")  # its size decides: here 261, padded to 384
    for vocab_size, name in ((261, str(path)), (384, str(path)), (385, None), (65536, "world")):
        tokenizer = for_checkpoint(tmp_path / "model.pth", vocab_size)
        assert (tokenizer and tokenizer.name) == name


def test_the_vocabulary_file_of_world_is_known_with_either_line_end(tmp_path: Path) -> None:
    published = world_file()
    path = tmp_path / rwkv_world.VOCABULARY_FILE
    for data in (published, published.replace(b"\n", b"\r\n")):
        path.write_bytes(data)
        assert named(path) is for_checkpoint(tmp_path / "model.pth", 65536) is world()
    assert for_checkpoint(tmp_path / "model.pth", 50277) is None
    path.write_bytes(published[:-1] + b"0\n")
    with pytest.raises(TokenizerError):
        for_checkpoint(tmp_path / "model.pth", 65536)


def test_a_tokenizer_with_more_ids_than_the_model_does_not_fit(lossless: dict[str, Tokenizer]) -> None:
    check_fits(world(), 65530)
    check_fits(world(), 65536)
    check_fits(bytes_(), 256)
    with pytest.raises(TokenizerError, match="'world' has ids up to 65529, the model a vocabulary of 50277"):
        check_fits(world(), 50277)
    with pytest.raises(TokenizerError, match="ids below 260"):
        check_fits(lossless["byte-level"], 260)


# Costs


def test_importing_and_decoding_load_no_library() -> None:
    program = (
        "import sys; from wkv.tokenizers import world; assert world().decode([34, 66]) == '!A'; "
        "print([m for m in ('torch', 'numpy', 'tokenizers', 'pyrwkv_tokenizer') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"

"""Sessions: what is read, what is yielded, and where a session stands afterwards, whatever happened."""

import hashlib
import json
import math
import re
import subprocess
import sys
import weakref
from itertools import accumulate
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import small_model

import wkv
from wkv.checkpoints import read_safetensors, write_safetensors
from wkv.errors import CheckpointError, Error, InputError, StateError, TokenizerError
from wkv.inference import Session, generate
from wkv.inference.session import CHUNK
from wkv.state import LayerState, State
from wkv.tokenizers import bytes_
from wkv.tokenizers.base import PieceTokenizer

# A model whose state is the list of all tokens that it has read, and that continues every prompt with a
# script: so a test can see exactly where a session stands.


class Script:
    def __init__(self, script: list[int], prompt_length: int = 1, vocab_size: int = 256) -> None:
        self.script, self.prompt_length = script, prompt_length
        self.config = SimpleNamespace(vocab_size=vocab_size)
        self.device = torch.device("cpu")
        self.calls: list[int] = []

    def initial_state(self, batch_size):
        nothing = torch.zeros(batch_size, 0)
        return State((LayerState(nothing, nothing, nothing),))

    def check_state(self, state, batch_size):
        pass

    def __call__(self, tokens, state, *, output):
        assert output == "last"
        self.calls.append(tokens.shape[1])
        read = torch.cat([state.layers[0].memory, tokens.float()], dim=1)
        logits = torch.zeros(1, 1, self.config.vocab_size)
        place = read.shape[1] - self.prompt_length
        if 0 <= place < len(self.script):
            logits[0, 0, self.script[place]] = 100.0
        return logits, State((LayerState(read[:, :0], read, read[:, :0]),))


class Pieces(PieceTokenizer):
    """All bytes, then some longer pieces; the longest match is taken. `end_of_text` follows them."""

    def __init__(self, *pieces: bytes, end_of_text: bool = False) -> None:
        self.pieces = [bytes((byte,)) for byte in range(256)] + list(pieces)
        size = len(self.pieces)
        super().__init__("pieces", size + end_of_text, size if end_of_text else None)

    def _encode(self, text):
        data, ids = text.encode(), []
        while data:
            ids.append(max((p for p in self.pieces if data.startswith(p)), key=len))
            data = data[len(ids[-1]) :]
        return [self.pieces.index(piece) for piece in ids]

    def _piece(self, token, previous):
        return self.pieces[token]


def tokens_read(session) -> list[int]:
    return session.state.layers[0].memory[0].int().tolist()


def scripted(script: list[int] | bytes, tokenizer=None, prompt: str = "p") -> Session:
    """A session that has read the prompt and will write the script."""
    tokenizer = tokenizer or bytes_()
    prompt_ids = tokenizer.encode(prompt)
    session = Session(Script(list(script), len(prompt_ids), tokenizer.vocab_size), tokenizer)
    session.feed(prompt)
    return session


GREEDY = {"temperature": 0, "presence_penalty": 0.0, "frequency_penalty": 0.0}


# Reading


def test_a_long_prompt_is_read_in_chunks():
    model = Script([], vocab_size=256)
    session = Session(model, bytes_())
    session.feed("x" * (2 * CHUNK + 100))
    assert model.calls == [CHUNK, CHUNK, 100]
    assert session.n_tokens == len(tokens_read(session)) == 2 * CHUNK + 100


def test_text_and_its_tokens_are_the_same_prompt():
    by_text, by_tokens = Session(Script([]), bytes_()), Session(Script([]), bytes_())
    by_text.feed("grün")
    by_tokens.feed(torch.tensor(list("grün".encode())))
    assert tokens_read(by_text) == tokens_read(by_tokens) == list("grün".encode())


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([1, 2, 256], r"token 2 is 256\. Expected: a whole number from 0 to 255"),
        ([-1], "token 0 is -1"),
        ([1.0], r"token 0 is 1\.0"),
        ([True], "token 0 is True"),
        (["a"], "token 0 is 'a'"),
        (b"abc", "of type bytes"),
        (None, "of type NoneType"),
        ("a\ud800", "surrogate"),
    ],
)
def test_input_that_is_no_text_and_no_token_is_refused_and_nothing_is_read(tokens, message):
    session = scripted(b"")
    with pytest.raises(InputError, match=message):
        session.feed(tokens)
    assert session.n_tokens == 1
    assert tokens_read(session) == [ord("p")]


def test_an_interrupted_feed_reads_nothing():
    class Interrupted(Script):
        def __call__(self, tokens, state, *, output):
            if len(self.calls) == 2:
                raise KeyboardInterrupt
            return super().__call__(tokens, state, output=output)

    session = Session(Interrupted([]), bytes_())
    session.feed("kept")
    with pytest.raises(KeyboardInterrupt):
        session.feed("x" * 3 * CHUNK)
    assert (session.n_tokens, len(tokens_read(session))) == (4, 4)


def test_feeding_nothing_changes_nothing():
    session = scripted(b"")
    for nothing in ("", [], ()):
        session.feed(nothing)
    assert session.n_tokens == 1


def test_an_empty_prompt_begins_a_document():
    tokenizer = Pieces(end_of_text=True)
    session = Session(Script(list(b"hi"), vocab_size=257), tokenizer)
    assert session.generate(2, **GREEDY) == "hi"
    assert tokens_read(session) == [tokenizer.end_of_text, *b"hi"]


def test_an_empty_prompt_without_an_end_of_text_token_is_refused():
    session = Session(Script([]), bytes_())
    session.feed("")
    with pytest.raises(InputError, match="the prompt is empty"):
        session.steps()
    with pytest.raises(InputError, match="the prompt is empty"):
        generate(Script([]), bytes_(), "")


def test_a_tokenizer_with_ids_that_the_model_lacks_is_refused():
    with pytest.raises(TokenizerError, match="vocabulary of 256"):
        Session(Script([], vocab_size=256), Pieces(b"ab"))


# Generating


def test_tokens_become_text_until_max_tokens():
    session = scripted(b"Hello world")
    steps = list(session.steps(5, **GREEDY))
    assert [step.text for step in steps] == list("Hello")
    assert [step.token for step in steps] == list(b"Hello")
    assert [step.finish for step in steps] == [None] * 4 + ["length"]
    assert tokens_read(session) == list(b"pHello")
    assert session.generate(6, **GREEDY) == " world"


def test_no_tokens_are_no_steps():
    session = scripted(b"abc")
    assert list(session.steps(0)) == []
    assert session.generate(0) == ""
    assert session.n_tokens == 1


def test_text_is_never_half_a_character():
    text = "né 中文 😀!"
    session = scripted(text.encode())
    pieces = [step.text for step in session.steps(len(text.encode()), **GREEDY)]
    assert "".join(pieces) == text
    assert "\ufffd" not in pieces


def test_half_a_character_at_the_end_is_shown_as_one_replacement():
    session = scripted("a中".encode())
    assert session.generate(3, **GREEDY) == "a\ufffd"


def test_the_end_of_text_token_stops_and_is_not_read():
    tokenizer = Pieces(end_of_text=True)
    end = tokenizer.end_of_text
    session = scripted([*b"ab", end, *b"cd"], tokenizer)
    steps = list(session.steps(9, **GREEDY))
    assert [(step.token, step.text, step.finish) for step in steps] == [
        (ord("a"), "a", None), (ord("b"), "b", None), (end, "", "stop"),
    ]  # fmt: skip
    assert tokens_read(session) == list(b"pab")


def test_stop_tokens_replace_the_end_of_text():
    tokenizer = Pieces(end_of_text=True)
    script = [*b"ab", tokenizer.end_of_text, *b"cd"]
    assert scripted(script, tokenizer).generate(5, stop_tokens=(), **GREEDY) == "abcd"
    assert scripted(script, tokenizer).generate(5, stop_tokens={ord("c")}, **GREEDY) == "ab"
    with pytest.raises(InputError, match="token 0 is 300"):
        scripted(script, tokenizer).steps(stop_tokens=[300])


def test_a_stop_string_across_tokens_is_not_shown_and_not_read():
    session = scripted(b"one\n\nUser: two")
    steps = list(session.steps(50, stop="\n\nUser:", **GREEDY))
    assert "".join(step.text for step in steps) == "one"
    assert steps[-1].finish == "stop"
    assert tokens_read(session) == list(b"pone")


def test_what_only_looked_like_a_stop_string_is_shown_when_that_is_known():
    session = scripted(b"a\n\nUse it")
    texts = [step.text for step in session.steps(8, stop=["\n\nUser:"], **GREEDY)]
    assert texts == ["a", "", "", "", "", "", "\n\nUse ", "i"]


def test_held_back_text_is_shown_at_the_end():
    tokenizer = Pieces(end_of_text=True)
    assert scripted(b"ab##", tokenizer).generate(4, stop="###", **GREEDY) == "ab##"
    assert scripted([*b"ab##", 256], tokenizer).generate(9, stop="###", **GREEDY) == "ab##"


def test_a_stop_string_inside_a_token_gives_back_the_rest_of_the_token():
    tokenizer = Pieces(b"end. Us", b"er: ")
    session = scripted([ord("1"), 256, 257], tokenizer)
    assert session.generate(9, stop=" User:", **GREEDY) == "1end."
    assert tokens_read(session) == list(b"p1end.")


def test_a_stop_string_may_begin_in_the_middle_of_a_character_of_bytes():
    tokenizer = Pieces(b"ab\xe4", b"\xb8\xad!")  # the character 中 lies across the two
    session = scripted([256, 257], tokenizer)
    assert session.generate(9, stop="中", **GREEDY) == "ab"
    assert tokens_read(session) == list(b"pab")


def test_the_stop_string_that_is_complete_first_counts():
    whole = Pieces(b"xabcdx")
    assert scripted([256], whole).generate(9, stop=["abcd", "bc"], **GREEDY) == "xa"
    assert scripted(b"xabcdx").generate(9, stop=["abcd", "bc"], **GREEDY) == "xa"


def test_after_a_stop_the_next_token_is_chosen_as_if_the_rest_had_never_been_written():
    session = scripted(b"one.two.")
    assert session.generate(9, stop=".", **GREEDY) == "one"
    assert session.logits.argmax() == ord(".")
    session.feed("#")
    assert session.generate(9, stop=".", **GREEDY) == "two"
    assert tokens_read(session) == list(b"pone#two")


def test_tokens_before_a_stop_string_stay_as_they_were_written_and_are_not_read_again():
    tokenizer = Pieces(b"aa")
    session = scripted(b"aa.aa", tokenizer)
    session.generate(9, stop=".", **GREEDY)
    assert tokens_read(session) == list(b"paa")  # and not the one token that "aa" would be
    assert session.model.calls == [1, 1, 1]


def test_states_that_no_stop_string_can_ask_for_are_forgotten():
    alive = []

    class Watched(Script):
        def __call__(self, tokens, state, *, output):
            logits, state = super().__call__(tokens, state, output=output)
            alive.append(weakref.ref(state))
            return logits, state

    session = Session(Watched(list(b"ab##" * 10)), bytes_())
    session.feed("p")
    for _ in session.steps(40, stop="###", **GREEDY):
        assert sum(state() is not None for state in alive) <= 4  # now, and before each held character


PIECES = Pieces(b"aa", b"ab", b"bab", b"a\xc3", b"\xa9b", b"\xc3\xa9\xc3\xa9", end_of_text=True)


@given(
    script=st.lists(st.sampled_from([ord("a"), ord("b"), *range(256, 263)]), min_size=1, max_size=25),
    stops=st.lists(st.text("abé", min_size=1, max_size=4), max_size=3),
)
def test_any_text_stops_where_its_first_stop_string_begins(script, stops):
    session = scripted(script, PIECES)
    steps = list(session.steps(len(script), stop=stops, **GREEDY))
    shown = "".join(step.text for step in steps)

    ended = script[: script.index(262)] if 262 in script else script
    whole = PIECES.decode(ended)
    found = [(at + len(stop), at) for stop in stops if (at := whole.find(stop)) >= 0]
    assert shown == (whole[: min(found)[1]] if found else whole)
    assert PIECES.decode(tokens_read(session)) == "p" + shown
    assert session.n_tokens == len(tokens_read(session))
    assert [step.finish for step in steps[:-1]] == [None] * (len(steps) - 1)
    assert steps[-1].finish == ("stop" if found or 262 in script else "length")
    for text in accumulate(step.text for step in steps):  # nothing is shown that must be taken back
        assert shown.startswith(text)


def test_leaving_the_loop_leaves_the_session_after_what_was_yielded():
    session = scripted(b"abcdef")
    for step in session.steps(6, **GREEDY):
        if step.text == "c":
            break
    assert tokens_read(session) == list(b"pabc")
    assert session.generate(3, **GREEDY) == "def"


def test_an_interrupt_leaves_the_session_after_what_was_yielded():
    class Interrupted(Script):
        armed = True

        def __call__(self, tokens, state, *, output):
            if self.armed and len(self.calls) == 3:
                self.armed = False
                raise KeyboardInterrupt
            return super().__call__(tokens, state, output=output)

    session = Session(Interrupted(list(b"abcd")), bytes_())
    session.feed("p")
    texts = []
    with pytest.raises(KeyboardInterrupt):
        for text in session.stream(4, **GREEDY):
            texts.append(text)
    assert texts == ["a", "b"]
    assert tokens_read(session) == list(b"pab")
    assert session.generate(2, **GREEDY) == "cd"


def test_a_session_that_is_used_while_it_generates_says_so():
    session = scripted(b"abcdef")
    steps = session.steps(6, **GREEDY)
    next(steps)
    session.feed("x")
    with pytest.raises(InputError, match="used while it generates"):
        next(steps)


def test_a_fork_goes_its_own_way():
    session = scripted(b"abcdef")
    session.generate(1, **GREEDY)
    other = session.fork()
    assert other._now is session._now  # nothing was copied
    assert other.generate(3, **GREEDY) == "bcd"
    assert tokens_read(session) == list(b"pa")
    assert session.generate(5, **GREEDY) == "bcdef"
    assert tokens_read(other) == list(b"pabcd")


def test_penalties_see_generated_tokens_only_and_spare_digits():
    def second(prompt: str, first: bytes) -> int:
        model = Script([first[0]], prompt_length=len(prompt))
        session = Session(model, bytes_())
        session.feed(prompt)
        bias = {first[0]: 1.0, ord("z"): 0.5}  # after the script every logit is 0
        return [
            step.token for step in session.steps(2, logit_bias=bias, temperature=0, presence_penalty=0.7)
        ][1]

    assert second("aaaa", b"b") == ord("z")
    assert second("bbbb", b"7") == ord("7")
    session = Session(Script([], prompt_length=9), bytes_())
    session.feed("aaaa")
    assert next(
        session.steps(1, temperature=0, logit_bias={ord("a"): 0.1}, presence_penalty=5.0)
    ).token == ord("a")


def test_ids_without_a_token_are_never_written():
    model = Script([], vocab_size=300)
    model.script = [299] * 9
    session = Session(model, bytes_())
    session.feed("p")
    assert all(step.token < 256 for step in session.steps(9, seed=0))


def test_log_probabilities_come_with_the_tokens_when_asked_for():
    session = scripted(b"ab")
    plain, logged = next(session.fork().steps(1)), next(session.steps(1, logprobs=3))
    assert (plain.logprob, plain.top) == (None, ())
    total = math.log(math.exp(100) + 255)
    assert logged.logprob == pytest.approx(100 - total, abs=1e-6)
    assert len(logged.top) == 3
    assert logged.top[0] == (ord("a"), pytest.approx(100 - total, abs=1e-6))
    assert next(session.steps(1, logprobs=0)).top == ()


def test_without_a_tokenizer_ids_go_in_and_ids_come_out():
    session = Session(Script([5, 6, 7]), None)
    session.feed([1])
    assert [(step.token, step.text, step.finish) for step in session.steps(3, **GREEDY)] == [
        (5, "", None), (6, "", None), (7, "", "length"),
    ]  # fmt: skip
    for call in (
        lambda: session.feed("text"),
        session.generate,
        session.stream,
        lambda: session.steps(stop="a"),
    ):
        with pytest.raises(TokenizerError, match="no tokenizer"):
            call()
    with pytest.raises(InputError, match="the prompt is empty"):
        Session(Script([]), None).steps()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": -1}, "max_tokens is -1"),
        ({"max_tokens": 1.5}, r"max_tokens is 1\.5"),
        ({"max_tokens": True}, "max_tokens is True"),
        ({"logprobs": -1}, "logprobs is -1"),
        ({"stop": ""}, "a stop string is ''"),
        ({"stop": ["a", ""]}, "a stop string is ''"),
        ({"stop": [1]}, "a stop string is 1"),
        ({"temperature": -1}, "temperature is -1"),
        ({"logit_bias": {256: 1.0}}, "logit_bias names token 256"),
    ],
)
def test_a_bad_option_is_refused_before_anything_is_written(options, message):
    session = scripted(b"abc")
    with pytest.raises(InputError, match=message):
        session.steps(**options)
    assert session.n_tokens == 1


# The real models


CONFIGS = {
    "rwkv4": wkv.RWKV4Config(vocab_size=256, n_layer=2, n_embd=32, dim_att=32, dim_ffn=64),
    "rwkv5": wkv.RWKV5Config(vocab_size=256, n_layer=2, n_embd=32, dim_att=32, dim_ffn=64, head_size=16),
    "rwkv6": wkv.RWKV6Config(
        vocab_size=256, n_layer=2, n_embd=32, dim_att=32, dim_ffn=64, head_size=16, mix_rank=8, decay_rank=8
    ),
    "rwkv7": wkv.RWKV7Config(
        vocab_size=256, n_layer=2, n_embd=32, dim_att=32, dim_ffn=64, head_size=16,
        decay_rank=8, rate_rank=8, value_rank=8, gate_rank=8,
    ),
}  # fmt: skip


def lively(config, device, seed: int = 0):
    """A model with no weight at zero: an official start has zero matrices, and its state hardly matters."""
    model = wkv.build(config, seed=seed, device=device)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(device)
            parameter.add_(0.3 * noise if parameter.ndim == 2 else 0.1 * noise)
    return model


@pytest.fixture(scope="module", params=list(CONFIGS))
def model(request, device):
    return lively(CONFIGS[request.param], device)


def settled(session) -> tuple:
    """All that a session is, comparable bit by bit."""
    tensors = {name: tensor.cpu() for name, tensor in session.state.tensors().items()}
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}, session.n_tokens


def test_the_same_seed_writes_the_same_text(model):
    first, again = (generate(model, bytes_(), "def ", max_tokens=40, seed=3) for _ in range(2))
    assert first == again
    assert first != generate(model, bytes_(), "def ", max_tokens=40, seed=4)


def test_a_prompt_in_pieces_leads_to_the_same_logits(model):
    whole, pieces = Session(model, bytes_()), Session(model, bytes_())
    whole.feed("The quick brown fox")
    for piece in ("The q", "", "uick brown", " fox"):
        pieces.feed(piece)
    torch.testing.assert_close(whole.logits, pieces.logits, rtol=1e-4, atol=1e-4)
    assert whole.n_tokens == pieces.n_tokens == 19


def test_a_state_of_a_session_can_enter_a_training_graph(model):
    session = Session(model, bytes_())
    session.feed("some text")
    assert not any(tensor.requires_grad for tensor in session.state.tensors().values())
    logits, _ = model(torch.tensor([[65, 66]], device=model.device), session.state)
    logits.sum().backward()
    model.zero_grad()


def test_a_restored_session_goes_on_as_if_it_had_never_stopped(model, tmp_path):
    session = Session(model, bytes_())
    session.feed("def main():")
    session.generate(5, seed=0)
    session.save(tmp_path / "tale.state")
    restored = Session.restore(tmp_path / "tale.state", model, bytes_())
    assert settled(restored) == settled(session)
    assert restored.generate(30, seed=1) == session.generate(30, seed=1)
    session.save(tmp_path / "one.state")
    restored.save(tmp_path / "two.state")
    assert (tmp_path / "one.state").read_bytes() == (tmp_path / "two.state").read_bytes()


def test_a_session_that_has_read_nothing_can_be_saved(model, tmp_path):
    Session(model, bytes_()).save(tmp_path / "new.state")
    restored = Session.restore(tmp_path / "new.state", model, bytes_())
    assert restored.n_tokens == 0
    with pytest.raises(InputError, match="the prompt is empty"):
        restored.generate()
    restored.feed("a")
    fresh = Session(model, bytes_())
    fresh.feed("a")
    assert settled(restored) == settled(fresh)


def test_a_state_file_does_not_grow_with_the_text(model, tmp_path):
    sizes = []
    for n_tokens in (2_000, 9_000):
        session = Session(model, bytes_())
        session.feed("x" * n_tokens)
        session.save(tmp_path / "state")
        sizes.append((tmp_path / "state").stat().st_size)
    assert sizes[0] == sizes[1]


def test_a_state_file_says_which_tokens_led_to_it(model, tmp_path):
    digests = set()
    for pieces in (["abcdef"], ["ab", "cdef"], [list(b"abcdef")]):
        session = Session(model, bytes_())
        for piece in pieces:
            session.feed(piece)
        session.save(tmp_path / "state")
        digests.add(read_safetensors(tmp_path / "state")[1]["tokens_sha256"])
    expected = hashlib.sha256().digest()
    for token in b"abcdef":
        expected = hashlib.sha256(expected + bytes([token, 0, 0, 0])).digest()
    assert digests == {expected.hex()}


def test_a_state_of_another_model_is_refused_with_both_fingerprints(model, tmp_path):
    other = lively(model.config, model.device, seed=1)
    Session(other, bytes_()).save(tmp_path / "state")
    with pytest.raises(StateError) as caught:
        Session.restore(tmp_path / "state", model, bytes_())
    assert model.fingerprint() in str(caught.value)
    assert other.fingerprint() in str(caught.value)
    assert str(tmp_path / "state") in str(caught.value)


def test_a_state_of_the_wrong_shape_batch_size_or_dtype_is_no_place_to_begin(model, device):
    other = CONFIGS["rwkv7" if model.config.generation == 4 else "rwkv4"]
    for wrong, message in [
        (wkv.build(other, device=device).initial_state(1), "state's memory is"),
        (model.initial_state(2), "2 rows"),
        (model.initial_state(1).map(torch.Tensor.double), "float64"),
    ]:
        with pytest.raises(StateError, match=message):
            Session(model, bytes_(), wrong)


@pytest.fixture
def tiny(device):
    return lively(CONFIGS["rwkv7"], device)


@pytest.fixture
def saved(tiny, tmp_path):
    """A state file, as its tensors and metadata, and a function that restores an altered one."""
    session = Session(tiny, bytes_())
    session.feed("abc")
    path = tmp_path / "state"
    session.save(path)
    tensors, metadata = read_safetensors(path)
    metadata = {key: value for key, value in metadata.items() if key not in ("sha256", "digest")}

    def restore_altered(tensors=tensors, **changes):
        write_safetensors(path, tensors, {**metadata, **changes})
        return Session.restore(path, tiny, bytes_())

    return SimpleNamespace(path=path, tensors=tensors, restore=restore_altered, model=tiny)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["blocks.1.memory", "logits"])
def test_a_state_file_with_values_that_are_no_numbers_is_refused(saved, bad, name):
    tensor = saved.tensors[name].clone()
    tensor.view(-1)[3] = bad
    with pytest.raises(StateError, match=f"{name}.*not finite"):
        saved.restore({**saved.tensors, name: tensor})


@pytest.mark.parametrize("name", ["blocks.1.memory", "blocks.0.ffn_shift", "logits"])
def test_a_state_file_of_the_wrong_dtype_or_shape_is_refused(saved, name):
    for wrong in (saved.tensors[name].double(), saved.tensors[name][..., :-1].contiguous()):
        with pytest.raises(StateError, match=re.escape(str(saved.path))):
            saved.restore({**saved.tensors, name: wrong})


def test_a_state_file_with_a_missing_or_an_extra_tensor_is_refused(saved):
    without = {name: tensor for name, tensor in saved.tensors.items() if name != "blocks.1.memory"}
    for tensors in (without, {**saved.tensors, "blocks.7.memory": torch.zeros(1)}, {}):
        with pytest.raises(StateError):
            saved.restore(tensors)


@pytest.mark.parametrize(
    "changes",
    [
        {"format": "wkv-model"},
        {"version": "2"},
        {"model": "\x1b[31m" * 1000},
        {"n_tokens": "-1"},
        {"n_tokens": "٣"},
        {"n_tokens": "9" * 5000},
        {"tokens_sha256": "zz"},
        {"tokens_sha256": "f" * 65},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_state_file_that_says_something_impossible_is_refused(saved, changes):
    with pytest.raises(StateError) as caught:
        saved.restore(**changes)
    assert len(str(caught.value)) < 500
    assert "\x1b" not in str(caught.value)


def test_a_model_file_is_not_a_state_file(tiny, tmp_path):
    wkv.save(tiny, tmp_path / "model.safetensors")
    with pytest.raises(StateError, match="not a state file"):
        Session.restore(tmp_path / "model.safetensors", tiny, bytes_())
    with pytest.raises(CheckpointError):
        Session.restore(tmp_path / "missing.state", tiny, bytes_())


def test_one_flipped_bit_anywhere_in_a_state_file_is_noticed(saved):
    data = bytearray(saved.path.read_bytes())
    header = 8 + int.from_bytes(data[:8], "little")
    for place in [*range(0, header, 23), *range(header, len(data), 301), len(data) - 1]:
        data[place] ^= 1 << place % 8
        saved.path.write_bytes(data)
        with pytest.raises(Error):
            Session.restore(saved.path, saved.model, bytes_())
        data[place] ^= 1 << place % 8


@pytest.mark.parametrize("kept", [0, 7, 100, -1])
def test_a_truncated_state_file_is_noticed(saved, kept):
    saved.path.write_bytes(saved.path.read_bytes()[:kept])
    with pytest.raises(CheckpointError):
        Session.restore(saved.path, saved.model, bytes_())


READ_A_PROMPT = """
import json, resource, sys, torch, wkv
from wkv.tokenizers import bytes_
torch.set_num_threads(1)
config = wkv.RWKV7Config(vocab_size=256, n_layer=1, n_embd=32, dim_att=32, dim_ffn=32, head_size=16,
                         decay_rank=4, rate_rank=4, value_rank=4, gate_rank=4)
session = wkv.Session(wkv.build(config), bytes_())
session.feed("x" * int(sys.argv[1]))
print(json.dumps([session.n_tokens, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]))
"""


@pytest.mark.slow
def test_a_prompt_of_200_000_tokens_is_read_in_the_memory_of_one_of_2_000():
    peaks = []
    for n_tokens in (2_000, 200_000):
        command = [sys.executable, "-c", READ_A_PROMPT, str(n_tokens)]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        read, peak_kb = json.loads(result.stdout)
        assert read == n_tokens
        peaks.append(peak_kb / 1024)
    ids = 200_000 * 8 * 3 / 2**20  # the list of ids itself, some copies of it
    assert peaks[1] < peaks[0] + ids + 5


def test_the_state_of_a_session_may_enter_a_training_graph():
    model = small_model("7", dtype=torch.float32)
    session = Session(model, None)
    session.feed([1, 2, 3])
    logits, _ = model(torch.tensor([[4, 5]]), session.state)
    logits.sum().backward()
    assert session.logits is not None
    assert not session.logits.is_inference()

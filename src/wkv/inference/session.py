"""One conversation with a model: what it has read is a state, and a state is a value.

    session = Session(model, tokenizer)
    session.feed("Once upon a time")
    other = session.fork()                          # free: both now go their own way
    print(session.generate(max_tokens=100, stop=["\\n"]))
    session.save("tale.state")                      # a small file, whatever the length of the text

Reading is chunked, so that memory does not depend on the length of a prompt.
"""

from __future__ import annotations

import codecs
import copy
import hashlib
import operator
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic, Literal, NamedTuple, Self, TypeVar

import torch
from torch import Tensor

from ..checkpoints import naming, read_safetensors, shown, write_safetensors
from ..errors import InputError, StateError, TokenizerError
from ..models import RWKV
from ..state import State
from ..tokenizers import Tokenizer, check_fits
from .sampling import Sampler, Sampling, is_exempt, log_probabilities

CHUNK = 512  # tokens per call while reading: wide enough for the parallel form, small in memory

_FORMAT, _VERSION = "wkv-state", "1"
_LOGITS = "logits"  # the one tensor of a state file that is not part of the state


_Logged = tuple[float | None, tuple[tuple[int, float], ...]]  # Step.logprob and Step.top


class Step(NamedTuple):
    """One generated token.

    token    its id
    text     what may be shown now: never half a character, nothing that may turn out to be a stop string
    logprob  its log probability under the raw logits (temperature 1, no penalties); None unless asked for
    top      the best (id, logprob) under the same logits, best first; empty unless asked for
    finish   None, or why this step is the last: "stop" (a stop string or token) or "length" (max_tokens)
    """

    token: int
    text: str
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    finish: Literal["stop", "length"] | None = None


class _Position(NamedTuple):
    """Where a session stands, as a value: keeping an old one is all that going back takes."""

    state: State
    logits: Tensor | None  # (V,) for the next token; None before anything was read
    n_tokens: int
    digest: bytes  # of the ids read: SHA-256(digest before | id as 4 bytes, little-endian) for each


class Session:
    """A model, a tokenizer, and the state after everything that was fed and generated.

    `tokenizer` None: token ids in, token ids out. `state`: begin there (batch size 1) instead of fresh.
    StateError for a state of another model or batch size, TokenizerError for a tokenizer with ids that
    the model does not have.
    """

    def __init__(self, model: RWKV, tokenizer: Tokenizer | None, state: State | None = None) -> None:
        if tokenizer is not None:
            check_fits(tokenizer, model.config.vocab_size)
        if state is None:
            state = model.initial_state(1)
        else:
            model.check_state(state, 1)
        self.model, self.tokenizer = model, tokenizer
        self._now = _Position(state, None, 0, hashlib.sha256().digest())

    @property
    def state(self) -> State:
        """The model's memory, batch size 1. A value: it does not change when the session goes on.

        A copy, fit for training too: the session's own tensors are made in inference mode.
        """
        return self._now.state.clone()

    @property
    def logits(self) -> Tensor | None:
        """The raw logits (V,) for the next token, or None before anything was read. A copy, like `state`."""
        return None if self._now.logits is None else self._now.logits.clone()

    @property
    def n_tokens(self) -> int:
        """How many tokens this session has read and written."""
        return self._now.n_tokens

    def feed(self, text_or_tokens: str | Iterable[int]) -> None:
        """Read text, or token ids. All or nothing: an error or Ctrl-C leaves the session where it was.

        InputError for ids outside the vocabulary, bytes, and text that is not valid Unicode.
        """
        if isinstance(text_or_tokens, str):
            text_or_tokens = self._text_tokenizer().encode(text_or_tokens)
        tokens = checked_ids(text_or_tokens, self.model.config.vocab_size)
        self._now = self._after(self._now, tokens)

    def steps(
        self,
        max_tokens: int = 256,
        stop: str | Sequence[str] = (),
        *,
        stop_tokens: Collection[int] | None = None,
        logprobs: int | None = None,
        **sampling: Any,
    ) -> Iterator[Step]:
        """Generate, one Step per token; the session moves along and stands after the tokens yielded so far.

        stop         text that ends generation wherever it appears, also across tokens. It is not yielded, and
                     the session then stands exactly before it, having read only the text before
        stop_tokens  ids that end generation; their step is yielded, but they are not fed.
                     None: the tokenizer's end of text, () none
        logprobs     None: no log probabilities; k: that of each token and the k best
        sampling     the fields of `Sampling`: temperature, top_p, seed, ...

        If nothing was ever read, generation begins with the end-of-text token, which in training stands
        between documents; without such a token an empty prompt is an InputError.
        """
        vocab_size = self.model.config.vocab_size
        check_count("max_tokens", max_tokens)
        if logprobs is not None:
            check_count("logprobs", logprobs)
        stops = checked_stops(stop)
        if stops:
            self._text_tokenizer()
        known = self.tokenizer.vocab_size if self.tokenizer else None
        sampler = Sampler(Sampling(**sampling), vocab_size, known)
        last_tokens = checked_ids(self._end_of_text if stop_tokens is None else stop_tokens, vocab_size)
        if self._now.logits is None and not self._end_of_text:
            raise InputError("the prompt is empty: there is nothing to continue", "some text or token ids")
        return self._steps(max_tokens, stops, frozenset(last_tokens), logprobs, sampler)

    def stream(self, max_tokens: int = 256, stop: str | Sequence[str] = (), **options: Any) -> Iterator[str]:
        """Generate text piece by piece, as soon as each may be shown. Options as in `steps`."""
        self._text_tokenizer()
        return (step.text for step in self.steps(max_tokens, stop, **options) if step.text)

    def generate(self, max_tokens: int = 256, stop: str | Sequence[str] = (), **options: Any) -> str:
        """Generate, and return the text. Options as in `steps`."""
        return "".join(self.stream(max_tokens, stop, **options))

    def fork(self) -> Session:
        """A second session that stands where this one does. Nothing is copied: states are values."""
        return copy.copy(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state to a file, atomically. Its size does not depend on the number of tokens."""
        tensors = self._now.state.tensors()
        if self._now.logits is not None:
            tensors[_LOGITS] = self._now.logits
        metadata = {
            "format": _FORMAT,
            "version": _VERSION,
            "model": self.model.fingerprint(),
            "n_tokens": str(self.n_tokens),
            "tokens_sha256": self._now.digest.hex(),
            "tokenizer": self.tokenizer.name if self.tokenizer else "",
        }
        write_safetensors(path, tensors, metadata)

    @classmethod
    def restore(cls, path: str | os.PathLike[str], model: RWKV, tokenizer: Tokenizer | None) -> Self:
        """The session that `save` wrote, for the same model: it goes on as if it had never stopped.

        StateError for a state of another model (both fingerprints are named), of wrong shapes or dtypes, or
        with values that are not finite; CorruptFileError where the bytes are not those that were written.
        """
        tensors, metadata = read_safetensors(path)
        with naming(path):
            if (metadata.get("format"), metadata.get("version")) != (_FORMAT, _VERSION):
                raise StateError("this is not a state file", "a file that Session.save wrote")
            if metadata.get("model") != (fingerprint := model.fingerprint()):
                raise StateError(
                    f"the state belongs to the model with fingerprint {shown(metadata.get('model', ''))}",
                    f"one of the model given here, {fingerprint!r}",
                    "the model and dtype that the state was saved with",
                )
            for name, tensor in tensors.items():
                if not torch.isfinite(tensor).all():
                    raise StateError(f"{shown(name)} has values that are not finite", "finite numbers")
            logits = tensors.pop(_LOGITS, None)
            session = cls(model, tokenizer, State.from_tensors(tensors).to(model.device))
            if logits is not None:
                logits = _checked_logits(logits, model).to(model.device)
            session._now = _Position(session._now.state, logits, *_read_history(metadata))
        return session

    def _after(self, position: _Position, tokens: Sequence[int]) -> _Position:
        """Where reading `tokens` leads from `position`; the session itself does not move."""
        state, logits, digest = position.state, position.logits, position.digest
        # Decoding is a hundred small operations a layer: inference mode takes a sixth off what they cost.
        with torch.inference_mode():
            for start in range(0, len(tokens), CHUNK):
                chunk = torch.tensor([tokens[start : start + CHUNK]], device=self.model.device)
                last, state = self.model(chunk, state, output="last")
                logits = last[0, 0]
        for token in tokens:
            digest = hashlib.sha256(digest + token.to_bytes(4, "little")).digest()
        return _Position(state, logits, position.n_tokens + len(tokens), digest)

    def _steps(
        self,
        max_tokens: int,
        stops: tuple[str, ...],
        stop_tokens: frozenset[int],
        logprobs: int | None,
        sampler: Sampler,
    ) -> Iterator[Step]:
        if self._now.logits is None and max_tokens:
            self.feed(self._end_of_text)
        here = self._now
        tail = Tail(here, stops, self.tokenizer)
        for left in reversed(range(max_tokens)):
            if self._now is not here:
                raise InputError("the session was used while it generates", advice="fork() it first")
            assert here.logits is not None  # something was fed, here or above
            token = sampler.pick(here.logits)
            logged: _Logged = (None, ())
            if logprobs is not None:
                logged = log_probabilities(here.logits, token, logprobs)
            if token in stop_tokens:
                yield Step(token, tail.flush(), *logged, "stop")
                return
            piece = self.tokenizer.decode_bytes([token]) if self.tokenizer else b""
            if (stop_at := tail.push(token, piece)) is not None:
                text, boundary, rest = tail.cut(stop_at)
                self._now = self._after(boundary, self._text_tokenizer().encode(rest))
                yield Step(token, text, *logged, "stop")
                return
            here = self._now = self._after(here, [token])
            sampler.record(token, penalised=self.tokenizer is None or not is_exempt(piece))
            tail.mark(here)
            if left:
                yield Step(token, tail.release(), *logged)
            else:
                yield Step(token, tail.flush(), *logged, "length")

    def _text_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise TokenizerError(
                "this session has no tokenizer", "token ids instead of text", "Session(model, tokenizer)"
            )
        return self.tokenizer

    @property
    def _end_of_text(self) -> list[int]:
        token = self.tokenizer.end_of_text if self.tokenizer else None
        return [] if token is None else [token]


def generate(
    model: RWKV,
    tokenizer: Tokenizer,
    prompt: str | Iterable[int],
    *,
    max_tokens: int = 256,
    stop: str | Sequence[str] = (),
    **options: Any,
) -> str:
    """The text that follows `prompt`, from a fresh state. Options as in `Session.steps`."""
    session = Session(model, tokenizer)
    session.feed(prompt)
    return session.generate(max_tokens, stop, **options)


P = TypeVar("P")


class Tail(Generic[P]):
    """The newest generated text, from the last token boundary that a stop string may send us back to.

    Of `text`, the first `sent` characters are with the caller. Each of `marks` is a boundary between two
    tokens that is also one between two characters: its place in `text`, and the position there, which is
    whatever the caller needs to go back.
    """

    def __init__(self, position: P, stops: tuple[str, ...], tokenizer: Tokenizer | None) -> None:
        self._stops = stops
        self._longest = max(map(len, stops), default=1)
        self._decoder = tokenizer.stream_decoder() if tokenizer else None
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")  # only knows where characters end
        self._text, self._sent = "", 0
        self._marks = [(0, position)]

    def push(self, token: int, piece: bytes) -> int | None:
        """Take one more token, whose bytes are `piece`. Where the stop string begins that it completes.

        None if it completes none. Of several the first to be complete counts, so that it does not matter
        how the text falls into tokens.
        """
        if self._decoder is not None:
            self._text += self._decoder.push(token)
            self._utf8.decode(piece)
        places = [(self._text.find(stop), stop) for stop in self._stops]
        complete = [(place + len(stop), place) for place, stop in places if place >= 0]
        return min(complete)[1] if complete else None

    def mark(self, position: P) -> None:
        """The session stands at `position` now, after the newest token."""
        incomplete, _ = self._utf8.getstate()
        if not incomplete:
            self._marks.append((len(self._text), position))

    def release(self) -> str:
        """The text that no stop string can claim any more. What came before it is forgotten."""
        unsent = len(self._text) - self._sent
        held = next(n for n in range(min(self._longest - 1, unsent), -1, -1) if self._may_stop(n))
        text = self._text[self._sent : len(self._text) - held]
        self._sent += len(text)
        oldest = max(i for i, (place, _) in enumerate(self._marks) if place <= self._sent)
        start = self._marks[oldest][0]
        self._marks = [(place - start, position) for place, position in self._marks[oldest:]]
        self._text, self._sent = self._text[start:], self._sent - start
        return text

    def flush(self) -> str:
        """All the text that is left; half a character becomes U+FFFD."""
        return self._text[self._sent :] + (self._decoder.finish() if self._decoder else "")

    def cut(self, place: int) -> tuple[str, P, str]:
        """For a stop string at `place`: the text before it not yet sent, the last mark at or before it,
        and the text from that mark to `place`, which must be read again."""
        start, position = next(mark for mark in reversed(self._marks) if mark[0] <= place)
        return self._text[self._sent : place], position, self._text[start:place]

    def _may_stop(self, n: int) -> bool:
        """Whether the last n characters begin a stop string (none of them always do)."""
        return n == 0 or any(stop.startswith(self._text[-n:]) for stop in self._stops)


def checked_ids(tokens: Iterable[int], vocab_size: int) -> list[int]:
    if isinstance(tokens, bytes | bytearray) or not isinstance(tokens, Iterable):
        raise InputError(f"the input is of type {type(tokens).__name__}", "text, or token ids")
    ids = []
    for place, token in enumerate(tokens):
        try:
            number = -1 if isinstance(token, bool) else operator.index(token)
        except TypeError:
            number = -1
        if not 0 <= number < vocab_size:
            raise InputError(f"token {place} is {token!r}", f"a whole number from 0 to {vocab_size - 1}")
        ids.append(number)
    return ids


def checked_stops(stop: str | Sequence[str]) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    for text in stops:
        if not isinstance(text, str) or not text:
            raise InputError(f"a stop string is {text!r}", "text of at least one character")
    return stops


def check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise InputError(f"{name} is {value!r}", "a whole number from 0 up")


def _checked_logits(logits: Tensor, model: RWKV) -> Tensor:
    """StateError unless logits out of a state file could be those of `model`."""
    shape = (model.config.vocab_size,)
    if logits.shape != shape or logits.dtype != model.dtype:
        raise StateError(
            f"the logits are {logits.dtype} of shape {tuple(logits.shape)}", f"{model.dtype} of shape {shape}"
        )
    return logits


def _read_history(metadata: Mapping[str, str]) -> tuple[int, bytes]:
    """The count and the digest of the tokens that a state file says were read."""
    count, digest = metadata.get("n_tokens", ""), metadata.get("tokens_sha256", "")
    if not re.fullmatch(r"[0-9]{1,18}", count) or not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise StateError(
            f"n_tokens is {shown(count)} and tokens_sha256 {shown(digest)}",
            "a whole number and 64 hexadecimal digits",
        )
    return int(count), bytes.fromhex(digest)

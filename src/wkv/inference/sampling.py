"""Which token comes next: pure functions from logits to a probability for each token, and one draw.

The order is RWKV's, and it differs from other libraries:

    1. repetition penalty, presence and frequency penalties, logit bias
    2. p = softmax(logits) at temperature 1
    3. top_p, top_k and min_p each set a smallest probability; a token below any of them is out
    4. p^(1/temperature), normalised, then the draw

So top_p cuts the distribution that the model meant: heating it does not let more tokens in.
Elsewhere temperature comes first. Two differences from the `rwkv` package are deliberate: numbers and
blanks are exempt from every penalty (there from the frequency penalty only), and top_p = 1 means "all"
(there rounding may turn it into "the best one").

Tensors are float32, on the CPU, with the vocabulary V last; leading dimensions are rows, each on its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import InputError

_RANGES = {
    "temperature": (0, 100),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "presence_penalty": (-100, 100),
    "frequency_penalty": (-100, 100),
    "penalty_decay": (0, 1),
    "repetition_penalty": (0.01, 100),
}
_COLDEST = 1e-4  # together with the largest bias it keeps logits / temperature inside float32
_LARGEST_BIAS = 1e30
_SHARES = (2**-6, 2**-10, 2**-14)  # of the best: above one of them a nucleus usually ends
_BLANKS_AND_DIGITS = b" \t0123456789"


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen. The defaults are those of the official RWKV package.

    temperature         0: always the best token (of equals, the lowest id); below 1 bolder, above 1 wilder
    top_k               keep the k most probable tokens; 0: all
    top_p               keep the smallest set with this much probability, and what ties with its last; 1: all
    min_p               keep tokens with at least this share of the best one's probability; 0: all
    presence_penalty    taken from the logit of every token that was generated before
    frequency_penalty   the same, times its number of occurrences
    penalty_decay       occurrences fade by this factor with every token
    repetition_penalty  divides positive and multiplies negative logits of generated tokens; 1: off
    logit_bias          token id -> number added to its logit; -1e10 forbids a token
    seed                same seed, same text; None: different every time

    Penalties see generated tokens only, never the prompt. InputError names a value out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 0.85
    min_p: float = 0.0
    presence_penalty: float = 0.2
    frequency_penalty: float = 0.2
    penalty_decay: float = 0.996
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, (low, high) in _RANGES.items():
            _check_number(name, getattr(self, name), low, high)
        if 0 < self.temperature < _COLDEST:
            raise InputError(f"temperature is {self.temperature!r}", f"0, or {_COLDEST} to 100", "0 (greedy)")
        _check_whole("top_k", self.top_k, 2**31 - 1)
        if self.seed is not None:
            _check_whole("seed", self.seed, 2**63 - 1)
        if not isinstance(self.logit_bias, Mapping):
            raise InputError(f"logit_bias is {self.logit_bias!r}", "a mapping of token ids to numbers")
        for token, bias in self.logit_bias.items():
            _check_whole("a token id of logit_bias", token, 2**31 - 1)
            _check_number(f"logit_bias[{token}]", bias, -_LARGEST_BIAS, _LARGEST_BIAS)
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))  # ours: a later change is not seen

    @property
    def penalises(self) -> bool:
        return (self.presence_penalty, self.frequency_penalty, self.repetition_penalty) != (0, 0, 1)


def penalise(logits: Tensor, seen: Tensor, counts: Tensor, sampling: Sampling) -> Tensor:
    """Logits (..., V) after the penalties; `seen` (..., V) is 1 or 0, `counts` (..., V) faded occurrences."""
    if sampling.repetition_penalty != 1:
        factor = sampling.repetition_penalty
        logits = torch.where(seen > 0, torch.where(logits > 0, logits / factor, logits * factor), logits)
    # `add`, because it makes no products of the size of the vocabulary on the way
    return logits.add(seen, alpha=-sampling.presence_penalty).add(counts, alpha=-sampling.frequency_penalty)


def distribution(logits: Tensor, sampling: Sampling) -> Tensor:
    """The probability (..., V) of drawing each token, from logits (..., V) after penalties and bias."""
    if sampling.temperature == 0:
        best = logits.argmax(-1, keepdim=True)  # of equals the first
        return torch.zeros_like(logits).scatter(-1, best, 1.0)
    probabilities = logits.softmax(-1)
    floor = sampling.min_p * probabilities.amax(-1, keepdim=True)
    if sampling.top_p < 1:
        sorted_ = probabilities.sort(-1, descending=True).values
        mass = sorted_.cumsum(-1, dtype=torch.float64)  # float64, as in `draw`
        first = torch.searchsorted(mass, torch.full_like(mass[..., :1], sampling.top_p))
        floor = torch.maximum(floor, sorted_.gather(-1, first.clamp(max=mass.shape[-1] - 1)))
    kept = probabilities >= floor
    if 0 < sampling.top_k < logits.shape[-1]:
        kept &= _best(probabilities, sampling.top_k)
    # p^(1/T), normalised, is softmax(logits / T), which cannot underflow to nothing
    return (torch.where(kept, logits, -torch.inf) / sampling.temperature).softmax(-1)


def candidates(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """The ids (n,), ascending, and probabilities (n,) of all tokens that `distribution` (V,) may draw.

    Of a large vocabulary few tokens are left, and only those are sorted, summed up and heated.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1, keepdim=True), torch.ones(1)
    probabilities = logits.softmax(-1).numpy()  # NumPy takes a fifth of the time to pick a few out of many
    floor = np.float32(sampling.min_p) * probabilities.max()
    if sampling.top_p < 1:
        floor = max(floor, _nucleus_floor(probabilities, sampling.top_p))
    ids = torch.from_numpy(np.flatnonzero(probabilities >= floor))
    if 0 < sampling.top_k < len(ids):
        ids = ids[_best(torch.from_numpy(probabilities)[ids], sampling.top_k)]
    return ids, (logits[ids] / sampling.temperature).softmax(-1)


def draw(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """One token id (...) per row of probabilities (..., V): int64, from one uniform number of `generator`.

    Sums in float64: 65536 float32 terms would drift, and the tail would be drawn too often or never.
    """
    mass = probabilities.cumsum(-1, dtype=torch.float64)
    uniform = 1 - torch.rand(*mass.shape[:-1], 1, dtype=torch.float64, generator=generator)
    # Above 0 and at most 1: so neither a token of probability 0 nor one past the end can be found.
    return torch.searchsorted(mass, uniform * mass[..., -1:]).squeeze(-1)


def is_exempt(piece: bytes) -> bool:
    """Whether a token of these bytes is never penalised: only blanks and digits. Figures repeat by nature.

    The `rwkv` package asks whether the text is a substring of " \\t0123456789": "12" is, "21" is not.
    """
    return not piece.strip(_BLANKS_AND_DIGITS)


def log_probabilities(logits: Tensor, token: int, k: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """The log probability of `token`, and the k best (id, log probability), best first; from logits (V,).

    Given raw logits they are the model's own: before penalties, bias and temperature.
    """
    logs = logits.to("cpu", torch.float32).log_softmax(-1)
    values, ids = logs.topk(min(k, len(logs)))
    return float(logs[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True))


class Sampler:
    """Chooses the tokens of one sequence: settings, a random generator, and what was generated so far.

    The generator is on the CPU whatever the model's device is, and the global one is never touched.
    `n_known`: ids from here up have no text (padding of the vocabulary) and are never chosen.
    """

    def __init__(self, sampling: Sampling, vocab_size: int, n_known: int | None = None) -> None:
        for token in sampling.logit_bias:
            if token >= vocab_size:
                raise InputError(f"logit_bias names token {token}", f"an id below {vocab_size}")
        self.sampling = sampling
        self._seen = torch.zeros(vocab_size)
        self._counts = torch.zeros(vocab_size)
        self._bias = torch.zeros(vocab_size)
        self._bias[list(sampling.logit_bias)] = torch.tensor(list(sampling.logit_bias.values()))
        if n_known is not None:
            self._bias[n_known:] = -torch.inf
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)

    def pick(self, logits: Tensor) -> int:
        """The next token for raw logits (V,), any dtype and device. InputError when the best is no number."""
        scores = logits.to("cpu", torch.float32)
        if not math.isfinite(peak := float(scores.max())):  # the maximum passes NaN on
            raise InputError(
                f"the model's best logit is {peak}", "a finite number", "another dtype, or check the weights"
            )
        if self.sampling.penalises:
            scores = penalise(scores, self._seen, self._counts, self.sampling)
        ids, probabilities = candidates(scores + self._bias, self.sampling)
        return int(ids[draw(probabilities, self._generator)])

    def record(self, token: int, penalised: bool = True) -> None:
        """Count a token that was generated; `penalised` False: time passes, but it may repeat for free."""
        self._counts *= self.sampling.penalty_decay
        if penalised:
            self._counts[token] += 1
            self._seen[token] = 1


def _nucleus_floor(probabilities: NDArray[np.float32], top_p: float) -> np.float32:
    """The smallest member of the smallest set of probabilities (V,) whose sum reaches top_p."""
    for share in (*_SHARES, 0.0):
        head = np.sort(probabilities[probabilities >= np.float32(share) * probabilities.max()])[::-1]
        mass = head.cumsum(dtype=np.float64)  # float64, as in `draw`
        if mass[-1] >= top_p:
            break
    return cast(np.float32, head[min(int(mass.searchsorted(top_p)), len(head) - 1)])


def _best(probabilities: Tensor, k: int) -> Tensor:
    """(..., V) bool: exactly k per row; of those that tie for the last places, the lowest ids."""
    last = probabilities.topk(k).values[..., -1:]
    above, tied = probabilities > last, probabilities == last
    places = k - above.sum(-1, keepdim=True)
    return above | (tied & (tied.cumsum(-1) <= places))


def _check_number(name: str, value: object, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise InputError(f"{name} is {value!r}", f"a number from {low:g} to {high:g}")


def _check_whole(name: str, value: object, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= high:
        raise InputError(f"{name} is {value!r}", f"a whole number from 0 to {high}")

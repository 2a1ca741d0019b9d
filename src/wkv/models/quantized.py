"""Matrices of 8 or 4 bits, for inference: a group of 64 inputs shares a scale for each output.

    wkv.load(path, quantize="int8")
    quantize(model, "int8")              in place: the matrices of the time and channel mixes, and the head
    quantize(model, "int4", tokens)      the same, and what rounding loses on that text is made good
    QuantizedLinear                      what stands where a Linear stood

Everything else (embedding, norms, mixes, low-rank paths) keeps its format: it is a small part, or read one
row at a time. In the tier "int4" the head keeps 8 bits: it is what the probabilities come from directly.

A matrix W [out, in] is stored as `weight` (uint8: the bytes, see native/quantized.h) and `scales` (bfloat16),
rounded to the nearest number times scale. With 8 bits, scale = max |W| of the group / 127 and all numbers are
in reach: |W - stored| <= scale / 2. With 4 bits it is the one of a few scales that loses least: it is given
the sign with which W's largest becomes -8, for there is no +8, and may be too small for that one W.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checkpoints import QUANTIZATIONS
from ..errors import ConfigError, InputError
from ..ops import native
from .base import RWKV, Block
from .layers import Linear

GROUP = native.GROUP
_LARGEST = 127
_ROWS = 1024  # of a matrix, rounded at a time; whole groups, where outputs share bytes
_ROWS_OF_TEXT = 8  # read at a time
_DAMPING = 0.1
# What W's largest may be, in scales, before -8 cuts it off.
_REACHES = (7.0, 7.5, 8.0, 8.5, 9.0, 9.5, 10.0, 10.5)


class QuantizedLinear(nn.Module):
    """`W x` with W [out, in] in 8 or 4 bits. No gradients.

    weight  uint8, by output (out, groups of inputs x bytes) or, where x is mostly zero, by input (in, groups
            of outputs x bytes): 64 bytes, or 32 that hold a number and, 4 bits up, the one 32 further on
    scales  bfloat16, (out, groups) or, by input, (groups, out)
    """

    weight: Tensor
    scales: Tensor

    def __init__(self, n_in: int, n_out: int, bits: int, *, by_input: bool) -> None:
        super().__init__()
        self.n_in, self.n_out, self.bits, self.by_input = n_in, n_out, bits, by_input
        rows, columns = (n_in, n_out) if by_input else (n_out, n_in)
        self.register_buffer(
            "weight", torch.empty(rows, _groups(columns) * GROUP * bits // 8, dtype=torch.uint8)
        )
        groups = _groups(n_in)
        shape = (groups, n_out) if by_input else (n_out, groups)
        self.register_buffer("scales", torch.empty(shape, dtype=torch.bfloat16))

    def _apply(self, fn: object, recurse: bool = True) -> QuantizedLinear:
        """Move with the model, whatever format the rest of it is given."""
        for name, buffer in list(self._buffers.items()):
            assert buffer is not None
            moved = fn(buffer)  # type: ignore[operator]
            self._buffers[name] = moved if moved.dtype == buffer.dtype else buffer.to(moved.device)
        return self

    @torch.no_grad()
    def store(self, weight: Tensor, moments: Tensor | None = None) -> None:
        """Round W [out, in], a few rows at a time, into the buffers.

        moments  (in, in) the sum of x^T x over a text: 4 bits are then chosen so that W x loses least there
        """
        factor = None if moments is None else _factor(moments)
        for start in range(0, self.n_out, _ROWS):
            rows = weight[start : start + _ROWS].float()
            if factor is None:
                numbers, scales = _rounded(rows, self.bits)
            else:
                numbers, scales = _compensated(rows, factor)
            stop = start + len(numbers)
            if self.by_input:
                self.scales[:, start:stop] = scales.mT
                self._put(numbers.mT, slice(None), start)
            else:
                self.scales[start:stop] = scales
                self._put(numbers, slice(start, stop), 0)

    def _put(self, numbers: Tensor, rows: slice, column: int) -> None:
        packed = _packed(numbers, self.bits)
        begin = column * self.bits // 8
        self.weight[rows, begin : begin + packed.shape[1]] = packed

    def dequantized(self) -> Tensor:
        """W [out, in] as float32."""
        numbers = _unpacked(self.weight, self.bits).float()
        if self.by_input:
            scales = self.scales.float().repeat_interleave(GROUP, dim=0)[: self.n_in]
            return (numbers[:, : self.n_out] * scales).mT
        return numbers[:, : self.n_in] * self.scales.float().repeat_interleave(GROUP, dim=1)[:, : self.n_in]

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in the format of x."""
        if x.shape[-1:] == (self.n_in,) and native.takes_quantized(x, self.weight):
            return native.quantized_product(x, self.weight, self.scales, self.bits, self.n_out, self.by_input)
        return F.linear(x, self.dequantized().to(x.dtype))

    def extra_repr(self) -> str:
        return f"in_features={self.n_in}, out_features={self.n_out}, bits={self.bits}"


@torch.no_grad()
def quantize(model: RWKV, tier: str, calibration: Tensor | None = None) -> RWKV:
    """Give the model's matrices 8 or 4 bits, one after the other, in place; returns the model.

    calibration  (B, T) int64, for "int4": rows of a text like those that the model will read, each from a
                 fresh state; 48 rows of 512 tokens do. The matrices of 4 bits are then rounded to lose little
                 on what they meet there, block after block, each behind the rounded ones before it

    On the meta device it makes the shell for a quantised file. ConfigError for a tier other than "int8" and
    "int4", for a calibration of "int8", and for a model that is quantised already; InputError for a
    calibration that is no tokens of this model, or on which its activations are not finite.
    """
    if tier not in QUANTIZATIONS:
        raise ConfigError(f"there is no tier {tier!r}", f"one of {', '.join(QUANTIZATIONS)}")
    if model.quantization is not None:
        raise ConfigError(
            f"the model is in {model.quantization} already", "weights in full", "its original file"
        )
    if calibration is None:
        _replace(model, tier)
    elif tier != "int4":
        raise ConfigError(f"a calibration text changes nothing in {tier}", "int4", "no calibration")
    else:
        model._check_tokens(calibration, None, None)
        _calibrate(model, calibration)
        _replace(model, tier)  # the head
    model.quantization = tier
    return model


def _replace(module: nn.Module, tier: str, moments: Mapping[str, Tensor] | None = None) -> None:
    """Every Linear inside, rounded; `moments` by name."""
    for name, linear in list(module.named_modules()):
        if not isinstance(linear, Linear):
            continue
        bits = 8 if tier == "int8" or name == "head" else 4
        with linear.weight.device:
            made = QuantizedLinear(linear.in_features, linear.out_features, bits, by_input=linear.sparse)
        if linear.weight.device.type != "meta":
            made.store(linear.weight, moments[name] if moments else None)
        parent, _, last = name.rpartition(".")
        setattr(module.get_submodule(parent), last, made.train(linear.training))


def _calibrate(model: RWKV, tokens: Tensor) -> None:
    """Round block after block; what the text has become is carried from one to the next."""
    rows: list[tuple[Tensor, Tensor | None]] = [
        (model.emb(some), None) for some in tokens.to(model.device).split(_ROWS_OF_TEXT)
    ]
    for block in model._blocks():
        _replace(block, "int4", _moments(block, rows))
        rows = [block(x, v_first)[:2] for x, v_first in rows]


def _moments(block: Block, rows: Sequence[tuple[Tensor, Tensor | None]]) -> dict[str, Tensor]:
    """For each Linear of the block the sum of x^T x over the rows, (in, in) float32."""
    found: dict[str, Tensor] = {}

    def add(name: str, _: nn.Module, inputs: tuple[Tensor]) -> None:
        x = inputs[0].reshape(-1, inputs[0].shape[-1]).float()
        found[name] = found[name].addmm_(x.mT, x) if name in found else x.mT @ x

    hooks = [
        linear.register_forward_pre_hook(partial(add, name))
        for name, linear in block.named_modules()
        if isinstance(linear, Linear)
    ]
    try:
        for x, v_first in rows:
            block(x, v_first)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def stored(shell: QuantizedLinear, weight: Tensor) -> dict[str, Tensor]:
    """The buffers that such a module on the meta device is to have for that weight."""
    with weight.device:
        made = QuantizedLinear(shell.n_in, shell.n_out, shell.bits, by_input=shell.by_input)
    made.store(weight)
    return {"weight": made.weight, "scales": made.scales}


def _groups(n: int) -> int:
    return -(-n // GROUP)


def _rounded(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """W [out, in] float32 as whole numbers (out, in) int8 and scales (out, groups) bfloat16."""
    n_out, n_in = weight.shape
    groups = F.pad(weight, (0, _groups(n_in) * GROUP - n_in)).view(n_out, -1, GROUP)
    numbers, scales = (_in_8_bits if bits == 8 else _in_4_bits)(groups)
    return numbers.to(torch.int8).view(n_out, -1)[:, :n_in], scales


def _in_8_bits(groups: Tensor) -> tuple[Tensor, Tensor]:
    exact = groups.abs().amax(dim=2) / _LARGEST
    scales = exact.to(torch.bfloat16)
    scales = torch.where(
        scales.float() < exact, torch.nextafter(scales, scales.new_tensor(torch.inf)), scales
    )
    return torch.round(groups / scales.float().clamp_min(1e-38)[:, :, None]), scales


def _in_4_bits(groups: Tensor, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The scale of least squared error among `_REACHES`, and the numbers, -8 to 7.

    importance  (GROUP,) a factor for each square
    """
    largest = groups.gather(2, groups.abs().argmax(dim=2, keepdim=True))
    # Less is as good as nothing, and out of bfloat16's reach.
    largest = torch.where(largest.abs() < 1e-36, 0, largest)
    shares = torch.where(largest == 0, 0, groups / largest)  # at most 1, so that no square is out of reach
    least = torch.full_like(largest, torch.inf)
    numbers, scales = torch.zeros_like(groups), torch.zeros_like(largest, dtype=torch.bfloat16)
    for reach in _REACHES:
        scale = (largest / -reach).to(torch.bfloat16)
        step = torch.where(largest == 0, 1, scale.float() / largest)  # about -1 / reach
        found = torch.round(shares / step).clamp_(-8, 7)
        squares = (found * step - shares).square_()
        error = (squares if importance is None else squares * importance).sum(dim=2, keepdim=True)
        better = ~(error >= least)  # what is not finite is taken too, and stays so
        least = torch.where(better, error, least)
        numbers, scales = torch.where(better, found, numbers), torch.where(better, scale, scales)
    return numbers, scales[:, :, 0]


def _factor(moments: Tensor) -> Tensor:
    """U (in, in), upper triangular: U^T U is the inverse of the moments, float32.

    A tenth of their mean is added to the diagonal: the text is a sample, and an input that is zero all over
    it would have no inverse.
    """
    if not moments.isfinite().all():
        raise InputError(
            "the activations on the calibration text are not finite", "finite ones", "int4 without a text"
        )
    damped = moments.double()
    damped.diagonal().add_(_DAMPING * damped.diagonal().mean().clamp_min(1e-30))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True).float()


def _compensated(weight: Tensor, U: Tensor) -> tuple[Tensor, Tensor]:
    """Round W [out, in] one input after the other; the inputs to come make good what each loses.

    With H = X^T X and U^T U = H^-1, what input i loses, e = (W_i - stored_i) / U_ii, costs least of
    |X (W - stored)|^2 when W_j -= e U_ij for all j > i. Source: Frantar et al. 2022, "GPTQ".
    """
    n_out, n_in = weight.shape
    left = weight.mT.clone()  # by input: what is worked on lies together
    numbers = torch.empty(n_in, n_out, dtype=torch.int8, device=weight.device)
    scales = torch.empty(n_out, _groups(n_in), dtype=torch.bfloat16, device=weight.device)
    for g, start in enumerate(range(0, n_in, GROUP)):
        stop = min(start + GROUP, n_in)
        missing = (0, GROUP - (stop - start))
        importance = F.pad(U.diagonal()[start:stop] ** -2, missing)
        scale = _in_4_bits(F.pad(left[start:stop].mT, missing)[:, None], importance)[1][:, 0]
        scales[:, g] = scale
        step = scale.float()
        lost = torch.empty(stop - start, n_out, device=weight.device)
        for i in range(start, stop):
            found = torch.where(step == 0, 0, torch.round(left[i] / step)).clamp_(-8, 7)
            numbers[i] = found.to(torch.int8)
            lost[i - start] = (left[i] - found * step) / U[i, i]
            left[i + 1 : stop] -= U[i, i + 1 : stop, None] * lost[i - start]
        left[stop:] -= U[start:stop, stop:].mT @ lost
    return numbers.mT, scales


def _packed(numbers: Tensor, bits: int) -> Tensor:
    """(rows, n) int8 as bytes (rows, groups x 64 or x 32); what is missing in the last group is zero."""
    rows, n = numbers.shape
    groups = F.pad(numbers, (0, _groups(n) * GROUP - n)).view(rows, -1, GROUP)
    if bits == 8:
        return groups.reshape(rows, -1).view(torch.uint8)
    halves = (groups + 8).view(torch.uint8).view(rows, -1, 2, GROUP // 2)
    return (halves[:, :, 0] | halves[:, :, 1] << 4).reshape(rows, -1)


def _unpacked(packed: Tensor, bits: int) -> Tensor:
    """The inverse, with whole groups: int8."""
    if bits == 8:
        return packed.view(torch.int8)
    groups = packed.view(len(packed), -1, GROUP // 2)
    return torch.cat((groups & 15, groups >> 4), dim=2).view(torch.int8).view(len(packed), -1) - 8

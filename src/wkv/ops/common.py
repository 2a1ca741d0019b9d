"""What the operators share: the dtype they sum in, padding, and checks that name the culprit."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InputError, StateError
from .dispatch import Call


def sum_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 when any input is, else float32: bfloat16 sums over T would lose the small terms."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def cast(dtype: torch.dtype, *tensors: Tensor) -> list[Tensor]:
    """All in `dtype`. Asking first is cheaper than `to`, and decoding asks a hundred times per token."""
    return [x if x.dtype == dtype else x.to(dtype) for x in tensors]


def make_call(T: int, head_size: int, dtype: torch.dtype, *tensors: Tensor) -> Call:
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    return Call(T, head_size, dtype, tensors[0].device, needs_grad)


def check_shapes(operator: str, shape: tuple[int, ...], **tensors: Tensor) -> None:
    """InputError (StateError for `state`) names the first of `tensors` that has another shape."""
    for name, tensor in tensors.items():
        if tensor.shape != shape:
            kind = StateError if name == "state" else InputError
            raise kind(f"{operator}: {name} has shape {tuple(tensor.shape)}", str(shape))


def check_state_dtype(operator: str, state: Tensor, dtype: torch.dtype) -> None:
    if state.dtype != dtype:
        raise StateError(
            f"{operator}: the state is {state.dtype}",
            f"{dtype}: the memory is never kept in a shorter format",
            f"state.to({dtype})",
        )


def check_lengths(operator: str, lengths: Tensor | None, B: int, T: int) -> None:
    if T < 1:
        raise InputError(f"{operator}: T = 0", "at least one token")
    if lengths is not None and (lengths.shape != (B,) or lengths.dtype != torch.int64):
        raise InputError(
            f"{operator}: lengths is {lengths.dtype} of shape {tuple(lengths.shape)}",
            f"int64 of shape ({B},)",
        )


def padding(lengths: Tensor, T: int) -> Tensor:
    """(B, T) bool, True where a row has ended."""
    return torch.arange(T, device=lengths.device) >= lengths[:, None]


def split_chunks(x: Tensor, chunk: int) -> Tensor:
    """(B, T, H, N) -> (chunks, B * H, chunk, N): chunks first, so that each is one contiguous batch.

    The last chunk is filled up with zeros: no decay, nothing written, nothing read.
    """
    B, T, H, N = x.shape
    n = (T + chunk - 1) // chunk
    if n * chunk > T:
        x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, n * chunk - T))
    return x.view(B, n, chunk, H, N).permute(1, 0, 3, 2, 4).reshape(n, B * H, chunk, N)


def join_chunks(x: Tensor, like: Tensor) -> Tensor:
    """The inverse of `split_chunks`: (chunks, B * H, chunk, N) -> (B, T, H, N), shaped as `like`."""
    B, T, H, N = like.shape
    n, _, chunk, _ = x.shape
    return x.view(n, B, H, chunk, N).permute(1, 0, 3, 2, 4).reshape(B, n * chunk, H, N)[:, :T].contiguous()


def rows_of_tokens(x: Tensor) -> tuple[Tensor, ...]:
    """(B, T, H, N) -> T rows (B * H, 1, N), as products with B * H memories want them."""
    B, T, H, N = x.shape
    if T == 1:
        return (x.reshape(B * H, 1, N),)
    return x.transpose(1, 2).reshape(B * H, T, N).split(1, dim=1)


def tokens_of_rows(rows: list[Tensor], like: Tensor) -> Tensor:
    """The inverse of `rows_of_tokens`, shaped as `like` (B, T, H, N)."""
    B, T, H, N = like.shape
    if T == 1:
        return rows[0].view(B, 1, H, N)
    return torch.cat(rows, dim=1).view(B, H, T, N).transpose(1, 2)

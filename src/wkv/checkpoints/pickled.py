"""The pickle inside a .pth file, read as data, and written as torch.save writes it.

A pickle is a program for a small stack machine. This module runs the few instructions that torch.save
writes for a dict of tensors, on plain values: a global stays a name, a stored block stays a reference,
a call is one of three that are known. So a file can say what it holds, by name, before torch opens it,
and a pickle that wants anything else is refused: code, and also the tricks that need none (hashing a
tuple of tuples of tuples, a hundred bytes long, keeps even `torch.load(weights_only=True)` busy for ever).
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import struct
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ..errors import CheckpointError, CorruptFileError, UnsafeFileError
from .naming import shown

_STORAGES = {
    "torch DoubleStorage": torch.float64,
    "torch FloatStorage": torch.float32,
    "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16,
    "torch LongStorage": torch.int64,
    "torch IntStorage": torch.int32,
    "torch ShortStorage": torch.int16,
    "torch CharStorage": torch.int8,
    "torch ByteStorage": torch.uint8,
    "torch BoolStorage": torch.bool,
}
_TENSOR = "torch._utils _rebuild_tensor_v2"
_PARAMETER = "torch._utils _rebuild_parameter"
_DICT = "collections OrderedDict"
_KNOWN = {_TENSOR, _PARAMETER, _DICT, *_STORAGES}


class Block(NamedTuple):
    """A stored block of numbers, the record `data/<key>` of the archive."""

    dtype: torch.dtype
    key: str
    length: int


class PickledTensor(NamedTuple):
    """A window onto a block; `offset` and `strides` count elements."""

    block: Block
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of a tensor whose rows lie one after the other."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


class _Global(NamedTuple):
    name: str


def read_state_dict(pickled: bytes) -> dict[str, object]:
    """Name -> PickledTensor (or whatever else is stored under it) of the one dict in the pickle.

    UnsafeFileError when the pickle names code; CheckpointError when it is no dict of tensors;
    CorruptFileError when it is no pickle at all.
    """
    try:
        result = _run(pickled)
    except (ValueError, LookupError, TypeError, struct.error) as error:
        raise CorruptFileError(
            f"the list of its tensors cannot be read ({error})",
            "the pickle that torch.save writes",
            "a fresh copy of the file",
        ) from error
    if not isinstance(result, dict):
        raise CheckpointError(f"it holds {describe(result)}", "a dict of tensors", _SAVE_AGAIN)
    return result


_SAVE_AGAIN = "saving the model's state_dict() alone"


def describe(value: object) -> str:
    """What a value is, in a word: "a tensor", "a dict", "an int"."""
    kinds = {PickledTensor: "a tensor", _Global: "a class", Block: "a storage"}
    kind = kinds.get(type(value), type(value).__name__)
    return kind if " " in kind else f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


def _run(pickled: bytes) -> Any:
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        start = marks.pop()
        values = stack[start:]
        del stack[start:]
        return values

    argument: Any
    for opcode, argument, _ in pickletools.genops(pickled):
        match opcode.name:
            case "PROTO":
                if argument != 2:
                    raise CheckpointError(
                        f"its pickle has the protocol {argument}",
                        "protocol 2, as torch.save writes",
                        _SAVE_AGAIN,
                    )
            case "STOP":
                break
            case "MARK":
                marks.append(len(stack))
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                stack.append(_known_global(argument))
            case "BINUNICODE" | "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                stack.append(argument)
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode.name == "NEWTRUE")
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                size = int(opcode.name[-1])
                stack[-size:] = [tuple(stack[-size:])]
            case "TUPLE":
                stack.append(tuple(since_mark()))
            case "EMPTY_LIST":
                stack.append([])
            case "APPEND":
                value = stack.pop()
                _top(stack, list).append(value)
            case "APPENDS":
                values = since_mark()
                _top(stack, list).extend(values)
            case "EMPTY_DICT":
                stack.append({})
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                _add(_top(stack, dict), [(key, value)])
            case "SETITEMS":
                flat = since_mark()
                _add(_top(stack, dict), zip(flat[::2], flat[1::2], strict=True))
            case "BUILD":
                stack.pop()  # attributes of an OrderedDict: the `_metadata` of a state_dict
                _top(stack, dict)
            case "BINPERSID":
                stack.append(_block(stack.pop()))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(_call(function, arguments))
            case name:
                raise _unsafe(f"its pickle uses the instruction {name}{_wanted(name, argument, stack)}")
    return stack.pop()


def _known_global(name: str) -> _Global:
    if name not in _KNOWN:
        raise _unsafe(f"its pickle wants {shown(name.replace(' ', '.'))}, and nothing of it was run")
    return _Global(name)


def _wanted(instruction: str, argument: object, stack: list[Any]) -> str:
    """The class or function that an instruction of another protocol asks for."""
    if instruction == "INST":
        return f" on {shown(str(argument).replace(' ', '.'))}, and nothing of it was run"
    if instruction == "STACK_GLOBAL":
        name = ".".join(part if isinstance(part, str) else describe(part) for part in stack[-2:])
        return f" on {shown(name)}, and nothing of it was run"
    return ""


def _unsafe(got: str) -> UnsafeFileError:
    return UnsafeFileError(got, "a dict of tensors, which needs no code", "a .safetensors file of the model")


def _top(stack: list[Any], kind: type[Any]) -> Any:
    if not isinstance(stack[-1], kind):
        raise TypeError(f"an entry for {describe(stack[-1])}")
    return stack[-1]


def _add(entries: dict[str, object], pairs: Iterable[tuple[Any, object]]) -> None:
    for key, value in pairs:
        # Checked before it is hashed, here and so in torch too: no attribute needs another kind of key.
        if not isinstance(key, str):
            raise CheckpointError(f"a key of its dict is {describe(key)}", "names", _SAVE_AGAIN)
        if key in entries:
            raise CheckpointError(f"{shown(key)} is stored twice", "every tensor once")
        entries[key] = value


def _block(reference: Any) -> Block:
    match reference:
        case ("storage", _Global(name=name), str(key), str(), int(length)):
            return Block(_STORAGES[name], key, length)
    raise TypeError("a storage that torch.save does not write")


def _call(function: object, arguments: Any) -> object:
    match function, arguments:
        case _Global(name=name), () if name == _DICT:
            return {}
        case _Global(name=name), (PickledTensor() as tensor, *_) if name == _PARAMETER:
            return tensor
        case _Global(name=name), (Block() as block, offset, tuple(shape), tuple(strides), *rest):
            # rest: requires_grad, hooks, and in odd files flags such as "conjugate".
            whole = all(type(number) is int for number in (offset, *shape, *strides))
            if name == _TENSOR and whole and len(shape) == len(strides) <= 8 and len(rest) == 2:
                return PickledTensor(block, offset, shape, strides)
    raise TypeError("a call that torch.save does not write")


def write_state_dict(tensors: Mapping[str, PickledTensor]) -> bytes:
    """The pickle that torch.save writes for a dict of such tensors, byte for byte."""
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=2).dump(dict(tensors))
    return buffer.getvalue()


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: object) -> object:
        if not isinstance(value, Block):
            return None
        storage = next(name for name, dtype in _STORAGES.items() if dtype == value.dtype)
        return "storage", getattr(torch, storage.removeprefix("torch ")), value.key, "cpu", value.length

    def reducer_override(self, value: object) -> Any:
        if not isinstance(value, PickledTensor):
            return NotImplemented
        hooks: OrderedDict[str, object] = OrderedDict()
        arguments = (value.block, value.offset, value.shape, value.strides, False, hooks)
        return torch._utils._rebuild_tensor_v2, arguments

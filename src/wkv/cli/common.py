"""What the commands share: options, where a model comes from, and how progress is told."""

from __future__ import annotations

import dataclasses
import difflib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from ..errors import Error, InputError, TokenizerError

if TYPE_CHECKING:
    import torch

    from ..inference import Sampling
    from ..models import RWKV
    from ..tokenizers import Tokenizer

MOST_THREADS = 256
MODEL_SUFFIXES = (".pth", ".safetensors")

Dtype = Literal["fp32", "bf16", "fp16", "fp64", "float32", "bfloat16", "float16", "float64"]
DtypeFlag = Annotated[Dtype | None, Parameter(show_choices=False)]  # eight names would fill the page
QuantizeFlag = Annotated[Literal["int8", "int4"] | None, Parameter(show_choices=False)]
_LONG_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64"}


class UsageError(Error):
    """The command line itself is wrong: exit status 2."""


@Parameter(name="*", group="Model")
@dataclass(frozen=True, kw_only=True)
class ModelFlags:
    """How a model is loaded.

    Parameters
    ----------
    dtype
        fp32, bf16, fp16 or fp64; without it, the file's own
    quantize
        int8 or int4: smaller and faster, on a CPU
    device
        cpu, cuda, cuda:1, ...
    tokenizer
        world, bytes or a tokenizer.json; without it, as the model suggests
    threads
        CPU threads; without it, one per core
    """

    dtype: DtypeFlag = None
    quantize: QuantizeFlag = None
    device: str = "cpu"
    tokenizer: str | None = None
    threads: int | None = None


@Parameter(name="*", group="Sampling")
@dataclass(frozen=True, kw_only=True)
class SamplingFlags:
    """How the next token is chosen: the settings of `wkv.Sampling` that fit on a command line.

    Parameters
    ----------
    temperature
        0: always the best token; higher is wilder (1)
    top_p
        keep the likeliest, up to this probability (0.85; chat 0.5)
    top_k
        keep this many of the likeliest; 0: all (0)
    min_p
        keep those with this share of the best's (0)
    presence_penalty
        lowers tokens written before (0.2; chat 0.5)
    frequency_penalty
        the same, for each time written (0.2; chat 0.5)
    penalty_decay
        how it fades, per token (0.996)
    repetition_penalty
        divides scores of tokens written before (1: off)
    seed
        the same seed gives the same text
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    penalty_decay: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None

    def over(self, **usual: Any) -> Sampling:
        """The settings that were given, above the usual ones of a command, above those of the library."""
        from ..inference import Sampling

        given = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        return Sampling(**usual | given)


MODEL_DEFAULTS = ModelFlags()
NO_SAMPLING_FLAGS = SamplingFlags()

# Penalties are made for words: in code they soon forbid the brackets.
CODE_SAMPLING: dict[str, Any] = dict(temperature=0.7, top_p=0.9, presence_penalty=0.0, frequency_penalty=0.0)


def note(text: str, style: str | None = None) -> None:
    """One line on stderr: progress, figures, errors. Coloured only where colour is wanted."""
    from rich.console import Console

    Console(stderr=True).print(text, style=style, soft_wrap=True, markup=False, highlight=False, emoji=False)


def write_out(text: str) -> None:
    """Text to stdout, now. A character that the terminal's encoding lacks becomes `?`."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, errors="replace").decode(encoding))
    sys.stdout.flush()


def print_line(text: str) -> None:
    """A line of results on stdout, with names out of files made harmless."""
    write_out(printable(text) + "\n")


def printable(text: str) -> str:
    """The text without control characters: a file's names could hold commands for the terminal."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def human_bytes(n: float) -> str:
    """`1.4 MB`: decimal units, three digits."""
    units = ["bytes", "kB", "MB", "GB", "TB"]
    while n >= 999.5 and len(units) > 1:
        n /= 1000
        del units[0]
    return f"{n:.3g} {units[0]}"


def torch_dtype(name: Dtype | None) -> torch.dtype | None:
    """`fp32`, `float32`, ... as torch knows them; None, which leaves the choice to the file, stays None."""
    if name is None:
        return None
    import torch

    dtype: torch.dtype = getattr(torch, _LONG_NAMES.get(name, name))
    return dtype


def use_threads(threads: int | None) -> None:
    """Compute with this many threads; None keeps torch's choice, one per core."""
    if threads is None:
        return
    if not 1 <= threads <= MOST_THREADS:  # torch starts as many as it is told to, or dies of it
        raise UsageError(f"--threads is {threads}", f"1 to {MOST_THREADS}, better no more than cores")
    import torch

    torch.set_num_threads(threads)


def use_device(name: str) -> torch.device:
    """The device of that name. UsageError when there is none such here."""
    import torch

    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):  # torch built without CUDA raises the latter
        raise UsageError(f"--device is {name!r}", "a device of this machine", "--device cpu") from None
    return device


def find_file(name: str, expected: str) -> Path:
    """The file of that name. InputError, with the nearest names on disk, when there is none."""
    path = Path(name)
    if path.is_file():
        return path
    folder = path if path.is_dir() else path.parent
    there = [str(file) for file in folder.glob("*") if file.suffix in MODEL_SUFFIXES and file.is_file()]
    near = difflib.get_close_matches(str(path), there, n=3, cutoff=0.0)
    problem = "is a folder" if path.is_dir() else "does not exist"
    advice = ", ".join(near) if near else "no name, for the small model that comes with wkv"
    raise InputError(f"{name} {problem}", expected, advice)


def find_model(name: str | None) -> Path:
    """The checkpoint that the user means; without a name, the one that comes with wkv."""
    if name is not None:
        return find_file(name, "a checkpoint, .pth or .safetensors")
    from ..pretrained import MODEL

    note("no model was named: this is the small one that comes with wkv, which writes Python")
    return MODEL


def load_model(path: Path, how: ModelFlags) -> tuple[RWKV, Tokenizer | None]:
    """Load a checkpoint as the flags say; something moves on the terminal meanwhile."""
    use_threads(how.threads)
    device, dtype = use_device(how.device), torch_dtype(how.dtype)
    from rich.console import Console

    with Console(stderr=True).status(f"loading {path}"):
        from ..loading import load

        return load(path, device=device, dtype=dtype, tokenizer=how.tokenizer, quantize=how.quantize)


def no_tokenizer(
    model: str | Path,
    vocab_size: int,
    advice: str = "--tokenizer with world, bytes, or the path of a tokenizer.json",
) -> TokenizerError:
    """What to raise where a text is to be read or written, and nothing says how."""
    return TokenizerError(
        f"no tokenizer is known for {model}, whose vocabulary has {vocab_size} entries",
        "the World, Pile or byte vocabulary, or a tokenizer.json beside the model",
        advice,
    )


def open_model(name: str | None, how: ModelFlags) -> tuple[Path, RWKV, Tokenizer]:
    """Load a model to write with. TokenizerError when no tokenizer is known for it."""
    path = find_model(name)
    model, tokenizer = load_model(path, how)
    if tokenizer is None:
        raise no_tokenizer(path, model.config.vocab_size)
    return path, model, tokenizer

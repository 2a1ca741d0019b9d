"""`wkv demo`: train a small model on text that every machine has, measure it, and let it write."""

from __future__ import annotations

import math
import os
import platform
import shlex
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..config import Config, RWKV4Config, RWKV5Config, RWKV6Config, RWKV7Config
from ..errors import MissingExtraError
from .common import CODE_SAMPLING, UsageError, human_bytes, note, write_out
from .progress import ProgressLine

if TYPE_CHECKING:
    from ..evaluation import Compression
    from ..models import RWKV
    from ..tokenizers import Tokenizer
    from ..training import Data, Document, TrainConfig, Trainer

Arch = Literal["rwkv4", "rwkv5", "rwkv6", "rwkv7"]

BATCH_SIZE, LENGTH = 8, 128
WEIGHT_DECAY = 0.1
POSITIONS = (100, 10_000)  # where a recurrent step is timed
COMPARED_TOKENS = 1024  # read in both forms
PROMPT = "def "
SAMPLE_TOKENS, COMPLETION_TOKENS = 60, 400
OUT, MODEL_NAME = Path("runs/demo"), "model.safetensors"


def demo(*, arch: Arch = "rwkv7", minutes: float = 3.0, out: Path = OUT, seed: int = 0) -> None:
    """Train a small model from scratch, then let it write.

    It learns from the source code of Python's own library on this machine: nothing is downloaded.
    Ctrl-C ends the training early and keeps what was learnt.

    Examples:

        wkv demo
        wkv demo --arch rwkv4 --minutes 1
        wkv demo --minutes 30 --out runs/long --seed 7

    Parameters
    ----------
    arch
        the generation of the model
    minutes
        how long to train; measuring afterwards takes about one more
    out
        the folder for model.safetensors, loss.png and report.md
    seed
        chooses the first weights, the files held out, and the order of reading
    """
    if not 0 < minutes < math.inf:
        raise UsageError(f"--minutes is {minutes:g}", "more than 0", "3")
    if not 0 <= seed < 2**63:
        raise UsageError(f"--seed is {seed}", "0 to 2^63 - 1")
    out.mkdir(parents=True, exist_ok=True)

    from .. import loading
    from ..checkpoints import atomic_write
    from ..evaluation import gzip_bits_per_byte
    from ..models import build
    from ..training import Trainer, split, standard_library

    settings = _settings(arch)
    read, held_out = split(standard_library(), seed=seed)
    gzip = gzip_bits_per_byte(_joined(held_out))
    model = build(settings.config, seed=seed)
    _announce(model, minutes, read, held_out, gzip)

    trainer = Trainer(model, _data(read), _train_config(settings, minutes, seed))
    history = _follow(trainer, gzip, sample=lambda: _sample(model, seed))
    path = out / MODEL_NAME
    loading.save(model, path)
    note(f"saved {path}; now measuring that file, loaded again (about a minute)")

    loaded, tokenizer = loading.load(path, tokenizer="bytes")
    assert tokenizer is not None
    measured = _measure(loaded, read, held_out)
    picture = _draw(history, measured, out / "loss.png")
    completion = _show_writing("It writes:", loaded, tokenizer, COMPLETION_TOKENS, seed)
    shipped, words = loading.load()
    assert words is not None
    longer = (
        f"The model that comes with wkv, {_parameters(shipped):,} parameters, learnt for longer, and writes:"
    )
    theirs = _show_writing(longer, shipped, words, COMPLETION_TOKENS // 3, seed)  # a token has about 3 bytes
    command = f"wkv demo --arch {arch} --minutes {minutes:g} --out {shlex.quote(str(out))} --seed {seed}"
    report = _report(command, settings, history, held_out, measured, picture, completion, theirs)
    with atomic_write(out / "report.md") as file:
        file.write(report.encode())
    write_out(f"\n\n{_card(out, history, measured)}")


@dataclass(frozen=True)
class Settings:
    """A model of about a million parameters, and what trains it well within minutes."""

    config: Config
    lr: float  # several times that of a published size: small models bear it, and time is short
    adam_eps: float = 1e-18


def _settings(arch: Arch) -> Settings:
    width = 128
    sizes: dict[str, Any] = {"vocab_size": 256, "n_layer": 4, "n_embd": width, "dim_att": width}
    match arch:
        case "rwkv4":
            return Settings(RWKV4Config(**sizes, dim_ffn=4 * width), lr=4e-3, adam_eps=1e-8)
        case "rwkv5":
            return Settings(RWKV5Config(**sizes, dim_ffn=7 * width // 2, head_size=32), lr=4e-3)
        case "rwkv6":
            sizes |= {"mix_rank": 16, "decay_rank": 16}
            return Settings(RWKV6Config(**sizes, dim_ffn=7 * width // 2, head_size=32), lr=4e-3)
        case "rwkv7":
            sizes |= {"decay_rank": 32, "rate_rank": 32, "value_rank": 32, "gate_rank": 32}
            return Settings(RWKV7Config(**sizes, dim_ffn=4 * width, head_size=32), lr=4e-3)


def _train_config(settings: Settings, minutes: float, seed: int) -> TrainConfig:
    from ..training import TrainConfig

    many = 10**9  # tokens: time runs out first, and the schedule follows it
    return TrainConfig(
        minutes=minutes,
        tokens=many,
        batch_size=BATCH_SIZE,
        context=LENGTH,
        learning_rate=settings.lr,
        warmup_tokens=many // 50,
        final=0.05,
        weight_decay=WEIGHT_DECAY,
        beta2=0.95,  # a short memory for a short run
        seed=seed,
    )


def _data(documents: list[Document]) -> Data:
    """The documents as token ids: a byte is one, and 0 ends a document."""
    from ..training import Data, TokenData

    tokens = TokenData.of([document.text + b"\0" for document in documents])
    return Data(tokens, tokenizer="bytes", vocab_size=256)


def _announce(
    model: RWKV, minutes: float, read: list[Document], held_out: list[Document], gzip: float
) -> None:
    import torch

    seen, unseen = human_bytes(len(_joined(read))), human_bytes(len(_joined(held_out)))
    note(f"RWKV-{model.config.generation} from scratch: {_parameters(model):,} parameters, one byte a token")
    note(f"learns from {seen} of Python's own library, {len(read)} files")
    note(f"is judged on {unseen} that it never sees, {len(held_out)} files; gzip -9: {gzip:.2f} bits/byte")
    note(f"{minutes:g} minutes on {torch.get_num_threads()} threads, in about 1 GB of memory")
    note("Ctrl-C ends the training early and keeps what was learnt\n")


@dataclass(frozen=True)
class Moment:
    """Where the training stood after a step."""

    step: int
    tokens: int
    seconds: float
    done: float  # share of the time used
    loss: float  # of the step's batch, nats per byte


def _follow(trainer: Trainer, gzip: float, sample: Callable[[], str]) -> list[Moment]:
    """Train, show it as it goes, and return its course; Ctrl-C ends it early."""
    from ..training import Callback

    history: list[Moment] = []

    class Show(Callback):
        def on_start(self, trainer: Trainer) -> None:
            self.progress = ProgressLine()

        def on_end(self, trainer: Trainer) -> None:
            self.progress.close()

        def on_step(self, trainer: Trainer, metrics: Mapping[str, Any], seconds: float) -> None:
            now = trainer.progress
            before = history[-1].done if history else 0.0
            history.append(
                Moment(now.step, now.tokens, now.seconds, trainer.done, metrics["loss"] or math.nan)
            )
            self.progress.show(trainer.done, _progress_line(history, gzip))
            if int(4 * before) < int(4 * trainer.done) < 4:
                self.progress.say(f"after {now.seconds:.0f} s it writes {sample()}")

    trainer.callbacks.append(Show())
    trainer.fit()
    if not history:
        raise KeyboardInterrupt  # before anything was learnt: nothing to keep
    return history


def _progress_line(history: list[Moment], gzip: float) -> str:
    now = history[-1]
    loss = statistics.fmean(moment.loss for moment in history[-50:])
    minutes, seconds = divmod(round(now.seconds / now.done - now.seconds), 60)
    return (
        f"loss {loss:.3f}   {loss / math.log(2):.2f} bits/byte (gzip {gzip:.2f})   "
        f"{now.tokens / now.seconds:,.0f} tokens/s   {minutes}:{seconds:02} left"
    )


def _sample(model: RWKV, seed: int) -> str:
    """A line on the way: what the model has learnt so far."""
    from ..tokenizers import bytes_

    return repr(PROMPT + "".join(_write(model, bytes_(), SAMPLE_TOKENS, seed)))


def _show_writing(title: str, model: RWKV, tokenizer: Tokenizer, max_tokens: int, seed: int) -> str:
    """Print what the model writes as it writes it, and return it."""
    write_out(f"\n{title}\n\n{PROMPT}")
    text = PROMPT
    for piece in _write(model, tokenizer, max_tokens, seed):
        text += piece
        write_out(piece)
    write_out("\n")
    return text


def _write(model: RWKV, tokenizer: Tokenizer, max_tokens: int, seed: int) -> Iterator[str]:
    """What the model makes of the prompt, token by token in the recurrent form."""
    from ..inference import Session

    session = Session(model, tokenizer)
    session.feed(PROMPT)
    unprintable = {byte: -1e10 for byte in [*range(32), 127] if byte not in b"\t\n"}  # commands to a terminal
    bias = unprintable if tokenizer.name == "bytes" else {}
    return session.stream(max_tokens, logit_bias=bias, seed=seed, **CODE_SAMPLING)


@dataclass(frozen=True)
class Measured:
    """The figures of the report, all of the saved file, on text that it was not trained on."""

    n_parameters: int
    bits_per_byte: float
    compression: Compression
    difference: float  # largest |parallel - recurrent| of any logit
    deviation: float  # standard deviation of the same logits, to compare it with
    state_bytes: int
    seconds_per_token: list[float]  # at POSITIONS


def _measure(model: RWKV, read: list[Document], held_out: list[Document]) -> Measured:
    import torch

    from ..evaluation import measure_compression, parallel_recurrent_difference, seconds_per_token
    from ..training import as_tokens, validate

    unseen = _joined(held_out)
    files = _data(held_out).train
    documents = [files.document(i) for i in range(files.n_documents)]
    validation = validate(model, documents, separator=0, n_bytes=len(unseen))
    enough = unseen * (POSITIONS[-1] // len(unseen) + 1)
    tokens = as_tokens(enough)[None]
    compared = tokens[:, :COMPARED_TOKENS]
    with torch.no_grad():
        deviation = model(compared)[0].std().item()
    return Measured(
        _parameters(model),
        validation.bits_per_byte or math.nan,
        measure_compression(unseen, primer=_joined(read)),
        parallel_recurrent_difference(model, compared),
        deviation,
        model.initial_state().nbytes,
        seconds_per_token(model, tokens, POSITIONS),
    )


def _draw(history: list[Moment], measured: Measured, path: Path) -> str:
    """Draw the loss curve, and return what the report shows in its place."""
    from ..checkpoints import atomic_write
    from ..plots import loss_curve

    path.unlink(missing_ok=True)  # a picture of an earlier run would not belong to this report
    compression = measured.compression
    try:
        png = loss_curve(
            [moment.tokens for moment in history],
            [moment.loss / math.log(2) for moment in history],
            title="Bits per byte while learning Python",
            levels={"gzip -9": compression.gzip, "xz -9": compression.xz, "primed": compression.xz_primed},
            end=("held-out files", measured.bits_per_byte),
        )
    except MissingExtraError as error:
        return f"No loss curve: {error}"
    with atomic_write(path) as file:
        file.write(png)
    return f"![bits per byte during the training]({path.name})"


def _report(
    command: str,
    settings: Settings,
    history: list[Moment],
    held_out: list[Document],
    measured: Measured,
    picture: str,
    completion: str,
    theirs: str,
) -> str:
    import torch

    end, compression = history[-1], measured.compression
    sizes = ", ".join(f"{name} {value}" for name, value in settings.config.to_dict().items())
    threads = torch.get_num_threads()
    times = [f"{1e3 * seconds:.2f} ms" for seconds in measured.seconds_per_token]
    return f"""# RWKV-{settings.config.generation}, trained from scratch by `wkv demo`

    {command}

{picture}

## Bits per byte on files that it never saw

| | |
|---|---:|
| **this model** | **{measured.bits_per_byte:.3f}** |
| `gzip -9` | {compression.gzip:.3f} |
| `xz -9` | {compression.xz:.3f} |
| `xz -9`, primed with the training text | {compression.xz_primed:.3f} |

{len(_joined(held_out)):,} bytes in {len(held_out)} files of Python's library, chosen by the seed and kept out
of the training. The model begins each file with a fresh state, and pays for its end too; the compressors read
the same files joined in path order. Primed: the size of xz(training text + these files) less that of
xz(training text).

Held out: {", ".join(document.path for document in held_out)}.

## One function, two forms

| | |
|---|---:|
| largest difference between parallel and recurrent logits | {measured.difference:.1e} |
| standard deviation of these logits | {measured.deviation:.2f} |
| held-out bytes read in both forms | {COMPARED_TOKENS:,} |
| state, whatever the length of the text | {measured.state_bytes:,} bytes |
| time per token at position {POSITIONS[0]:,} | {times[0]} |
| time per token at position {POSITIONS[1]:,} | {times[1]} |

## Training

| | |
|---|---|
| parameters | {measured.n_parameters:,} |
| config | {sizes} |
| tokens seen | {end.tokens:,}, in {end.step:,} steps of {BATCH_SIZE} x {LENGTH} |
| training time | {end.seconds:.1f} s{"" if end.done >= 1 else ", ended early with Ctrl-C"} |
| speed | {end.tokens / end.seconds:,.0f} tokens/s |
| optimizer | AdamW, learning rate {settings.lr:g} (cosine), weight decay {WEIGHT_DECAY:g} |
| versions | wkv {version("wkv")}, torch {torch.__version__}, Python {platform.python_version()} |
| machine | {platform.system()} {platform.machine()}, {os.cpu_count()} cores, {threads} threads |

## What it writes

From `{PROMPT}`, in the recurrent form, at temperature {CODE_SAMPLING["temperature"]}:

{_indented(completion)}

And the model that comes with wkv:

{_indented(theirs)}
"""


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.split("\n"))


def _card(out: Path, history: list[Moment], measured: Measured) -> str:
    """The last words on the screen: the figures, and what to type next."""
    end, gzip = history[-1], measured.compression.gzip
    verdict = "better than" if measured.bits_per_byte < gzip else "not yet as good as"
    model = out / MODEL_NAME
    return f"""\
  bits per byte   {measured.bits_per_byte:.3f} on files it never saw, {verdict} gzip -9 ({gzip:.3f})
  learnt from     {end.tokens:,} bytes in {end.seconds:.0f} s, {end.tokens / end.seconds:,.0f} a second
  state           {measured.state_bytes:,} bytes, after 100 bytes and after 10,000
  all figures     {out / "report.md"}

  next:  wkv generate {shlex.quote(str(model))} "import "
         wkv info {shlex.quote(str(model))}
         wkv demo --arch rwkv4 --out runs/rwkv4
"""


def _parameters(model: RWKV) -> int:
    return sum(weight.numel() for weight in model.parameters())


def _joined(documents: list[Document]) -> bytes:
    return b"".join(document.text for document in documents)

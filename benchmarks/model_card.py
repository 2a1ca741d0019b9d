"""Put the trained model into the package, and measure what its card says.

    python benchmarks/model_card.py runs/python

Reads what `make pretrained` left there: data, the run, and, where it is, the Transformer trained on the same tokens.
Writes src/wkv/pretrained/: the weights in bfloat16, the tokenizer, the loss curve, and README.md, the card.
All figures are of the bfloat16 file.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import re
import shutil
import statistics
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
import zstandard
from gpt import GPT, count
from safetensors.torch import load_file
from torch import Tensor
from transformer import WEIGHTS, settings, transformer

import wkv
from wkv.cli.common import CODE_SAMPLING
from wkv.evaluation import longest_run, measure_compression, parses, whole_lines
from wkv.inference.sampling import distribution
from wkv.plots import loss_curve
from wkv.pretrained import MODEL
from wkv.tokenizers import Tokenizer
from wkv.training import Data, open_data, validate
from wkv.training.data import standard_library
from wkv.training.memory import kept_memory

SAMPLES, SAMPLE_TOKENS = 200, 128
SAMPLING = wkv.Sampling(**CODE_SAMPLING)
Model = wkv.models.RWKV | GPT


def documents(data: Data) -> list[list[int]]:
    assert data.validation is not None
    return [data.validation.document(i).tolist() for i in range(data.validation.n_documents)]


@torch.no_grad()
def windowed_bits_per_byte(
    model: Model, documents: Sequence[Sequence[int]], n_bytes: int, context: int
) -> float:
    """Bits per byte when each token sees at most `context` tokens, and at least half as many where there are.

    Windows overlap by half, and only what is new in a window counts.
    """
    nats, half = 0.0, context // 2
    for document in documents:
        tokens = torch.tensor([0, *document])
        new = 0  # the first target that no window has counted
        for start in range(0, max(len(tokens) - 1 - half, 1), half):
            window = tokens[start : start + context + 1]
            logits, _ = model(window[None, :-1])
            losses = F.cross_entropy(logits[0].float(), window[1:], reduction="none")
            nats += losses[new - start :].sum().item()
            new = start + len(losses)
    return nats / math.log(2) / n_bytes


def function_headers(documents: Sequence[str]) -> list[str]:
    """The first line of SAMPLES functions of the held-out files, drawn by lot: `def name(arguments):`."""
    found = [line.strip() for text in documents for line in text.split("\n")]
    found = [line for line in dict.fromkeys(found) if re.fullmatch(r"def \w+\(.*\):", line)]
    chosen = torch.randperm(len(found), generator=torch.Generator().manual_seed(0))[:SAMPLES]
    return [found[i] for i in chosen]


def read_rwkv(model: wkv.models.RWKV) -> Callable[[Tensor, Tensor], Tensor]:
    """A function of all rows so far (B, T) and their lengths: logits (B, V). It reads only what is new."""
    state, read = None, 0

    def step(rows: Tensor, lengths: Tensor) -> Tensor:
        nonlocal state, read
        if state is None:
            logits, state = model(rows, lengths=lengths, output="last")
        else:
            last = rows[torch.arange(len(rows)), lengths - 1]
            logits, state = model(last[:, None], state, output="last")
        return logits.view(len(rows), -1)

    return step


def read_gpt(model: GPT) -> Callable[[Tensor, Tensor], Tensor]:
    def step(rows: Tensor, lengths: Tensor) -> Tensor:
        hidden, _ = model(rows, output="hidden")
        return model.head(hidden[torch.arange(len(rows)), lengths - 1])

    return step


@torch.no_grad()
def complete(
    step: Callable[[Tensor, Tensor], Tensor], prompts: Sequence[str], tokenizer: Tokenizer
) -> list[str]:
    """Each prompt with what was written on from it."""
    encoded = [[0, *tokenizer.encode(prompt + "\n")] for prompt in prompts]  # 0 begins a document
    lengths = torch.tensor([len(ids) for ids in encoded])
    rows = torch.zeros(len(encoded), int(lengths.max()), dtype=torch.int64)
    for row, ids in zip(rows, encoded, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    generator = torch.Generator().manual_seed(0)
    every = torch.arange(len(rows))
    for _ in range(SAMPLE_TOKENS):
        chances = distribution(step(rows, lengths), SAMPLING)
        if int(lengths.max()) == rows.shape[1]:
            rows = F.pad(rows, (0, 1))
        rows[every, lengths] = torch.multinomial(chances, 1, generator=generator)[:, 0]
        lengths += 1
    texts = []
    for row, length in zip(rows.tolist(), lengths.tolist(), strict=True):
        written = row[1:length]
        end = written.index(0) if 0 in written else len(written)
        texts.append(tokenizer.decode(written[:end]))
    return texts


def judged(texts: Sequence[str]) -> tuple[float, float]:
    """The share whose whole lines parse as Python, and the mean share of lines in the longest such run."""
    lines = [whole_lines(text) for text in texts]
    share = sum(map(parses, lines)) / len(lines)
    runs = [longest_run(each) / max(len(each), 1) for each in lines]
    return share, sum(runs) / len(runs)


@functools.cache
def names() -> dict[str, str]:
    """The files of this interpreter's library by their text."""
    return {document.text.decode(errors="replace"): document.path for document in standard_library()}


def records(file: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder

    config, training = settings()
    data = open_data(folder / "data")
    trained, _ = wkv.load(folder / "run" / "model.safetensors")
    wkv.save(trained.bfloat16(), MODEL)
    shutil.copyfile(folder / "data" / "tokenizer.json", MODEL.parent / "tokenizer.json")
    model, tokenizer = wkv.load(dtype=torch.float32)
    assert tokenizer is not None
    gpt = transformer(config, training.context)
    about_gpt = (
        "The Transformer is a GPT-2 with torch's attention (`benchmarks/gpt.py`), trained by the same trainer with\n"
        "the same settings, of which none was tuned for it."
    )
    has_gpt = (folder / WEIGHTS).exists()
    if has_gpt:
        gpt.load_state_dict(load_file(folder / WEIGHTS))

    unseen = documents(data)
    texts = sorted((tokenizer.decode(document[:-1]) for document in unseen), key=names().get)
    joined = "".join(texts).encode()
    learnt = b"".join(
        tokenizer.decode_bytes(data.train.document(i)[:-1].tolist()) for i in range(data.train.n_documents)
    )
    bits = validate(model, unseen, separator=0, n_bytes=len(joined)).bits_per_byte
    windowed = [("this model", model)]
    if has_gpt:
        windowed += [(f"a Transformer of {count(gpt):,} weights, trained on the same tokens", gpt)]
    in_windows = "".join(
        f"| {name}, in windows of {training.context} tokens "
        f"| {windowed_bits_per_byte(each, unseen, len(joined), training.context):.3f} |\n"
        for name, each in windowed
    )
    compression = measure_compression(joined, primer=learnt)
    zstd = 8 * len(zstandard.ZstdCompressor(level=19).compress(joined)) / len(joined)

    headers = function_headers(texts)
    completions = complete(read_rwkv(model), headers, tokenizer)
    written = [("this model", completions)]
    if has_gpt:
        written += [("the Transformer", complete(read_gpt(gpt), headers, tokenizer))]
    judgements = "".join(
        "| {} | {:.1%} | {:.1%} |\n".format(name, *judged(completed)) for name, completed in written
    )

    metrics, timings = (records(folder / "run" / f"{name}.jsonl") for name in ("metrics", "timings"))
    seconds = statistics.median(line["seconds"] for line in timings)
    minutes = seconds * len(timings) / 60
    bytes_per_token = len(learnt) / data.train.n_tokens
    curve = loss_curve(
        [line["tokens"] for line in metrics],
        [line["loss"] / math.log(2) / bytes_per_token for line in metrics],
        title="Bits per byte while learning Python",
        levels={"xz -9": compression.xz, "xz -9, primed": compression.xz_primed},
        end=("held-out files", bits),
    )
    (MODEL.parent / "loss.png").write_bytes(curve)
    versions = json.loads((folder / "run" / "run.json").read_text())
    held_out = textwrap.fill(
        f"Held out: {', '.join(names()[text] for text in texts)}.", 110, break_on_hyphens=False
    )
    card = f"""# The model that comes with wkv

An RWKV-7 of {count(model):,} weights ({config.n_layer} layers of width {config.n_embd}, channel mix {config.dim_ffn}, {config.vocab_size:,} tokens), in
bfloat16 {MODEL.stat().st_size / 1e6:.1f} MB, trained by this code on the source of the Python standard library. It writes Python that looks right
and means little. It is here so that every command has something real to run on with no download. It has never seen
a conversation.

    wkv generate "def "
    model, tokenizer = wkv.load()

## What it reaches

Bits per byte of {len(texts)} files ({len(joined):,} bytes) that were held out by a hash of their text and never seen:

| | bits per byte |
|---|---:|
| **this model**, reading each file from its beginning | **{bits:.3f}** |
{in_windows}| `xz -9`, primed with the training text | {compression.xz_primed:.3f} |
| `xz -9` | {compression.xz:.3f} |
| `zstd -19` | {zstd:.3f} |
| `gzip -9` | {compression.gzip:.3f} |

The compressors read the files joined in path order; the models begin each file anew and pay for its end too. The
windows overlap by half, and only the second half counts: every token sees at least {training.context // 2} tokens.
{about_gpt if has_gpt else ""}

From the first lines of {len(headers)} functions of the held-out files each went on for {SAMPLE_TOKENS} tokens (temperature
{SAMPLING.temperature}, top-p {SAMPLING.top_p}):

| | completions whose whole lines parse as Python | lines in the longest run that parses |
|---|---:|---:|
{judgements}
One of them, by this model:

{textwrap.indent(completions[0], "    ")}

## How it was made

![bits per byte during the training](loss.png)

    make pretrained

| | |
|---|---|
| text | the standard library of Python {versions["python"]}, {data.train.n_documents} files, {len(learnt):,} bytes; no tests, no encoding tables |
| tokenizer | byte-level BPE of {config.vocab_size:,} tokens, made from the same files; {bytes_per_token:.2f} bytes a token |
| recipe | `pretrained/run.toml`: AdamW, learning rate {training.learning_rate:g} ({training.schedule}), weight decay {training.weight_decay}, float32 |
| learnt from | {metrics[-1]["tokens"]:,} tokens ({metrics[-1]["tokens"] / data.train.n_tokens:.1f} times the text) in {metrics[-1]["step"]:,} steps of {training.batch_size} x {training.context} |
| time | {minutes:.0f} minutes on {versions["threads"]} cores, by the median step of {seconds:.2f} s |
| versions | torch {versions["torch"]}, {versions["machine"]} |
| seed | {training.seed} |

{held_out}

## Licence

The weights are Apache-2.0, as the code of wkv. The text that they were trained on is Python's own library, under the
PSF License Version 2: what the model repeats from it word for word is still under that licence.
"""
    (MODEL.parent / "README.md").write_text(card)
    print(card)


if __name__ == "__main__":
    with kept_memory():
        main()

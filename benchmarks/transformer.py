"""The Transformer of the model card: as many weights, the same trainer, settings and tokens.

    python benchmarks/transformer.py runs/python [--threads 2]

Reads runs/python/data and pretrained/run.toml, as `make pretrained` left them, and writes
runs/python/transformer.safetensors. Stopped anywhere, the same command goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from gpt import GPT, as_large_as
from safetensors.torch import save_file

import wkv
from wkv.training import Callback, open_data
from wkv.training.config import ModelSettings

SETTINGS = Path(__file__).parent.parent / "pretrained" / "run.toml"
WEIGHTS = "transformer.safetensors"


def settings() -> tuple[wkv.Config, wkv.TrainConfig]:
    """Of the model that ships."""
    tables = tomllib.loads(SETTINGS.read_text())
    return ModelSettings(**tables["model"]).config(2048), wkv.TrainConfig(**tables["training"])


def transformer(config: wkv.Config, context: int) -> GPT:
    """The GPT with as many weights as an RWKV of that config."""
    with torch.device("meta"):
        n_parameters = sum(weight.numel() for weight in wkv.build(config).parameters())
    sizes = dict(vocab_size=config.vocab_size, n_layer=config.n_layer, n_embd=config.n_embd)
    return as_large_as(n_parameters, context=context, **sizes)


class Show(Callback):
    def on_step(self, trainer: wkv.Trainer, metrics: Mapping[str, Any], seconds: float) -> None:
        if metrics["step"] % 50 == 0:
            left = seconds * metrics["step"] * (1 / trainer.done - 1) / 60
            print(f"step {metrics['step']:,}  loss {metrics['loss']:.3f}  {left:.0f} min left", flush=True)

    def on_event(self, trainer: wkv.Trainer, text: str) -> None:
        print(text, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config, training = settings()
    torch.manual_seed(training.seed)
    model = transformer(config, training.context)
    data = open_data(args.folder / "data")
    data = dataclasses.replace(data, validation=None)
    trainer = wkv.Trainer(model, data, training, [Show()], folder=args.folder / "transformer")
    trainer.fit()
    if not trainer.finished:
        sys.exit("stopped; the same command goes on")
    save_file(dict(model.state_dict()), args.folder / WEIGHTS)


if __name__ == "__main__":
    main()

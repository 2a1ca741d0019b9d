"""Small runs for the tests of training: data in memory, a model of a few thousand weights."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

import wkv
from wkv.training import TrainConfig, Trainer
from wkv.training.data.binidx import TokenData

VOCABULARY = 50
SIZES = {"vocab_size": VOCABULARY, "n_layer": 2, "n_embd": 32}


def token_data(n_documents: int = 40, seed: int = 0, longest: int = 60) -> TokenData:
    """Documents that can be learnt from: each counts upwards from some number, and ends with 0."""
    generator = np.random.default_rng(seed)
    documents = [
        np.append(
            (np.arange(generator.integers(5, longest)) + generator.integers(1, 40)) % (VOCABULARY - 1) + 1, 0
        )
        for _ in range(n_documents)
    ]
    return TokenData.of(documents)


@dataclass
class Corpus:
    """What `open_data` returns, in memory."""

    train: TokenData
    validation: TokenData | None
    separator: int = 0
    tokenizer: str | None = None
    vocab_size: int = VOCABULARY

    def count_bytes(self, documents):
        return None


def corpus(**sizes) -> Corpus:
    return Corpus(token_data(**sizes), token_data(8, seed=1))


def small_model(arch: str = "RWKV7", seed: int = 0):
    heads = {} if arch == "RWKV4" else {"head_size": 16}
    return wkv.build(getattr(wkv, f"{arch}Config").of_size(**SIZES, **heads), seed=seed)


def config(**changes) -> TrainConfig:
    usual = dict(
        batch_size=4, context=16, tokens=3000, learning_rate=3e-3, warmup_tokens=200,
        validate_every=10, save_every=7, keep_last=2, validation_tokens=200,
    )  # fmt: skip
    return TrainConfig(**{**usual, **changes})


def trainer(folder=None, *, arch="RWKV7", data=None, callbacks=(), **changes) -> Trainer:
    accept = changes.pop("accept_changes", False)
    return Trainer(
        small_model(arch),
        data or corpus(),
        config(**changes),
        callbacks,
        folder=folder,
        accept_changes=accept,
    )


def same_weights(a, b) -> bool:
    theirs = b.state_dict()
    return all(torch.equal(weight, theirs[name]) for name, weight in a.state_dict().items())

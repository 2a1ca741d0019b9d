"""The held-out loss: one number, whatever the batches that it is computed in."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from train_runs import VOCABULARY, small_model, token_data

from wkv.training import validate


def cost_of_one(model, document) -> float:
    """The definition: each token given the separator and all tokens before it, in nats."""
    tokens = torch.tensor([[0, *document.tolist()]])
    with torch.no_grad():
        logits, _ = model(tokens[:, :-1])
    return -logits[0].double().log_softmax(-1).gather(-1, tokens[0, 1:, None]).sum().item()


@pytest.fixture
def model():
    model = small_model()
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    return model


@pytest.mark.parametrize(("batch_size", "chunk_tokens"), [(1, 1000), (8, 64), (3, 16), (8, 1), (2, 7)])
def test_the_result_does_not_depend_on_batches_padding_or_chunks(model, batch_size, chunk_tokens):
    data = token_data(9)
    documents = [*map(data.document, range(9)), np.array([3]), np.array([], dtype=np.uint8)]
    expected = sum(cost_of_one(model, document) for document in documents if len(document))
    n_tokens = sum(map(len, documents))
    found = validate(
        model, documents, separator=0, n_bytes=777, batch_size=batch_size, chunk_tokens=chunk_tokens
    )
    assert found.n_tokens == n_tokens
    assert found.loss == pytest.approx(expected / n_tokens, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(expected / n_tokens), rel=1e-4)
    assert found.bits_per_byte == pytest.approx(expected / math.log(2) / 777, rel=1e-5)


def test_a_model_that_knows_nothing_needs_the_logarithm_of_the_vocabulary():
    model = small_model()
    torch.nn.init.zeros_(model.head.weight)
    found = validate(model, [np.arange(20)], separator=0)
    assert found.loss == pytest.approx(math.log(VOCABULARY), rel=1e-6)
    assert found.bits_per_byte is None


def test_validation_leaves_the_model_in_its_mode(model):
    for mode in (True, False):
        model.train(mode)
        validate(model, [np.arange(5)], separator=0)
        assert model.training is mode

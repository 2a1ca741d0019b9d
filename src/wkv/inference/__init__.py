"""From logits to text: sampling, sessions, chat prompts. Knows models and tokenizers, and no optimiser."""

from .engine import Engine, Generation
from .prompts import G1, WORLD, ChatFormat, chat_format
from .sampling import Sampler, Sampling
from .session import Session, Step, generate
from .state_pool import StatePool

__all__ = [
    "G1",
    "WORLD",
    "ChatFormat",
    "Engine",
    "Generation",
    "Sampler",
    "Sampling",
    "Session",
    "StatePool",
    "Step",
    "chat_format",
    "generate",
]

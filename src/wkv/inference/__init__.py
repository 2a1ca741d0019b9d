"""From logits to text: sampling, sessions, chat prompts. Knows models and tokenizers, and no optimiser."""

from .prompts import G1, WORLD, ChatFormat, chat_format
from .sampling import Sampler, Sampling
from .session import Session, Step, generate

__all__ = ["G1", "WORLD", "ChatFormat", "Sampler", "Sampling", "Session", "Step", "chat_format", "generate"]

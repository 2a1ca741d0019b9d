"""Small models of every generation with weights as busy as trained ones: no zero matrix, decays all over."""

from __future__ import annotations

from typing import Any

import torch

from wkv.config import Config, RWKV4Config, RWKV5Config, RWKV6Config, RWKV7Config
from wkv.models import RWKV, build

SIZES: dict[str, Any] = dict(vocab_size=61, n_layer=3, n_embd=32, dim_att=48, dim_ffn=40)
CONFIGS: dict[str, Config] = {
    "4": RWKV4Config(**SIZES),
    "5.0": RWKV5Config(**SIZES, head_size=8, minor=0, bonus="time_first"),
    "5.1": RWKV5Config(**SIZES, head_size=8, minor=1),
    "5.2": RWKV5Config(**SIZES, head_size=8),
    "6": RWKV6Config(**SIZES, head_size=16, mix_rank=4, decay_rank=6),
    "7": RWKV7Config(**SIZES, head_size=16, decay_rank=6, rate_rank=5, value_rank=4, gate_rank=7),
}


def small_model(
    config: Config | str,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> RWKV:
    """The official initialisation has zero matrices and would prove nothing: shake every weight."""
    model = build(CONFIGS[config] if isinstance(config, str) else config, seed=seed, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            scale = 1.0 if "decay" in name or ".w0" in name else 0.3
            weight += scale * torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
    return model.to(device=device, dtype=dtype)


def random_tokens(model: RWKV, B: int, T: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, model.config.vocab_size, (B, T), generator=generator).to(model.device)

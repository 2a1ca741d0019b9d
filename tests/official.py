"""Random checkpoints with official names, for tests that compare implementations.

Official initial weights hold zero matrices and would prove nothing. Here no tensor is zero, decays span
their whole range, norms are perturbed, and matrices are scaled so that activations stay finite at any depth.
"""

from __future__ import annotations

import torch
from torch import Tensor

GENERATIONS = ("4", "5.0", "5.1", "5.2", "6", "7")


def random_official(
    generation: str,
    *,
    n_layer: int = 2,
    n_embd: int = 32,
    dim_att: int | None = None,
    head_size: int = 8,
    dim_ffn: int | None = None,
    vocab_size: int = 41,
    mix_rank: int = 5,
    decay_rank: int = 6,
    rate_rank: int = 7,
    value_rank: int = 9,
    gate_rank: int = 10,
    first_value_rank: int = 0,
    bonus: str = "time_faaaa",
    time_state: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """A state dict of generation "4", "5.0", "5.1", "5.2", "6" or "7", on the CPU, in the official order.

    `bonus` is the name of u in 5.0 and 5.1; ranks count where the generation has them (6: mix, decay;
    7: decay, rate, value, gate, and `first_value_rank` for the unused blocks.0.att.v0..v2, 0: absent).
    """
    D, V, L = n_embd, vocab_size, n_layer
    A = D if dim_att is None else dim_att
    H, N = A // head_size, head_size
    F = dim_ffn or (4 * D if generation in ("4", "7") else int(3.5 * D) // 32 * 32)
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}

    def normal(*shape: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        return mean + scale * torch.randn(*shape, generator=generator)

    def uniform(*shape: int, low: float = 0.05, high: float = 0.95) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    def spread(*shape: int, low: float, high: float) -> Tensor:
        """Every part of the range from low to high, in random order."""
        size = torch.Size(shape).numel()
        return torch.linspace(low, high, size)[torch.randperm(size, generator=generator)].reshape(shape)

    def matrix(name: str, rows: int, columns: int, scale: float = 1.0) -> None:
        tensors[f"{name}.weight"] = normal(rows, columns, scale=scale / columns**0.5)

    def norm(name: str, width: int) -> None:
        tensors[f"{name}.weight"] = normal(width, scale=0.1, mean=1.0)
        tensors[f"{name}.bias"] = normal(width, scale=0.1)

    def low_rank(first: str, second: str, columns: int, rank: int, rows: int, scale: float) -> None:
        tensors[first] = normal(columns, rank, scale=columns**-0.5)
        tensors[second] = normal(rank, rows, scale=scale * rank**-0.5)

    tensors["emb.weight"] = normal(V, D, scale=0.5)
    for i in range(L):
        if i == 0:
            norm("blocks.0.ln0", D)
        norm(f"blocks.{i}.ln1", D)
        norm(f"blocks.{i}.ln2", D)
        att, ffn = f"blocks.{i}.att", f"blocks.{i}.ffn"
        if generation == "4":
            tensors[f"{att}.time_decay"] = spread(A, low=-6, high=3)
            tensors[f"{att}.time_first"] = normal(A, scale=0.5, mean=-1.2)
            for name in "kvr":
                tensors[f"{att}.time_mix_{name}"] = uniform(1, 1, D)
        elif generation.startswith("5"):
            per_head = (H, N) if generation == "5.2" else (H,)
            tensors[f"{att}.time_decay"] = spread(*per_head, low=-6, high=1)
            mean = -1.0 if bonus == "time_first" else 0.3
            tensors[f"{att}.{bonus}"] = normal(*per_head, scale=0.5, mean=mean)
            for name in "kvr" if generation == "5.0" else "kvrg":
                tensors[f"{att}.time_mix_{name}"] = uniform(1, 1, D)
        elif generation == "6":
            for name in "xwkvrg":
                tensors[f"{att}.time_maa_{name}"] = uniform(1, 1, D)
            tensors[f"{att}.time_maa_w1"] = normal(D, 5 * mix_rank, scale=D**-0.5)
            tensors[f"{att}.time_maa_w2"] = normal(5, mix_rank, D, scale=0.2)
            tensors[f"{att}.time_decay"] = spread(1, 1, A, low=-6, high=1)
            low_rank(f"{att}.time_decay_w1", f"{att}.time_decay_w2", D, decay_rank, A, 0.5)
            tensors[f"{att}.time_faaaa"] = normal(H, N, scale=0.5, mean=0.3)
        else:
            for name in "rwkvag":
                tensors[f"{att}.x_{name}"] = uniform(1, 1, D)
            tensors[f"{att}.w0"] = spread(1, 1, A, low=-7, high=3)
            low_rank(f"{att}.w1", f"{att}.w2", D, decay_rank, A, 1.0)
            tensors[f"{att}.a0"] = spread(1, 1, A, low=-3, high=3)
            low_rank(f"{att}.a1", f"{att}.a2", D, rate_rank, A, 1.0)
            if rank := first_value_rank if i == 0 else value_rank:
                tensors[f"{att}.v0"] = spread(1, 1, A, low=-2, high=2)
                low_rank(f"{att}.v1", f"{att}.v2", D, rank, A, 1.0)
            low_rank(f"{att}.g1", f"{att}.g2", D, gate_rank, A, 2.0)
            tensors[f"{att}.k_k"] = uniform(1, 1, A, low=0.5, high=1.2)
            tensors[f"{att}.k_a"] = uniform(1, 1, A, low=0.5, high=1.2)
            tensors[f"{att}.r_k"] = normal(H, N, scale=0.3)
        if time_state:
            tensors[f"{att}.time_state"] = normal(H, N, N, scale=0.3)
        for name in ("receptance", "key", "value"):
            matrix(f"{att}.{name}", A, D)
        if generation in ("5.1", "5.2", "6"):
            matrix(f"{att}.gate", A, D)
        matrix(f"{att}.output", D, A, scale=0.5)
        if generation != "4":
            norm(f"{att}.ln_x", A)
        mixes = {"6": ("time_maa_k", "time_maa_r"), "7": ("x_k",)}.get(
            generation, ("time_mix_k", "time_mix_r")
        )
        for name in mixes:
            tensors[f"{ffn}.{name}"] = uniform(1, 1, D)
        matrix(f"{ffn}.key", F, D)
        if generation != "7":
            matrix(f"{ffn}.receptance", D, D)
        matrix(f"{ffn}.value", D, F, scale=0.5)
    norm("ln_out", D)
    matrix("head", V, D)
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def reordered(tensors: dict[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    """The same tensors in another order of keys."""
    generator = torch.Generator().manual_seed(seed)
    names = list(tensors)
    return {names[i]: tensors[names[i]] for i in torch.randperm(len(names), generator=generator).tolist()}

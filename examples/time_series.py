"""RWKV-7 blocks in a network of your own, here one that forecasts:  python examples/time_series.py

The blocks bring their initial values along, and `wkv.parameter_groups` their learning rates and decays.
"""

import torch
from torch import Tensor, nn

import wkv
from wkv.models import RWKV7Block


class Forecaster(nn.Module):
    def __init__(self, width: int = 64, n_layer: int = 2) -> None:
        super().__init__()
        config = wkv.RWKV7Config.of_size(vocab_size=1, n_layer=n_layer, n_embd=width)
        self.inlet, self.outlet = nn.Linear(1, width), nn.Linear(width, 1)
        self.blocks = nn.ModuleList(RWKV7Block(config, layer) for layer in range(n_layer))

    def forward(self, series_BT: Tensor) -> Tensor:  # what comes after each value
        x, v_first = self.inlet(series_BT[..., None]), None
        for block in self.blocks:
            x, v_first, _ = block(x, v_first)
        return self.outlet(x)[..., 0]


torch.manual_seed(0)
network = Forecaster()
optimizer = torch.optim.AdamW(wkv.parameter_groups(network, lr=4e-3, weight_decay=0.1), betas=(0.9, 0.99))

for step in range(1, 31):
    pitch, phase = 0.1 + 0.5 * torch.rand(8, 1, 2), 6.3 * torch.rand(8, 1, 2)
    waves = torch.sin(torch.arange(49)[:, None] * pitch + phase).sum(-1)  # two, each of unknown pitch
    loss = (network(waves[:, :-1]) - waves[:, 1:]).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 10 == 0:
        print(f"step {step}: squared error {loss:.4f}, {waves.diff().square().mean():.4f} for 'as before'")

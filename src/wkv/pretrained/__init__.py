"""The model that comes with wkv: a small RWKV-7 that writes Python. README.md here is its card.

    model, tokenizer = wkv.load()

`make pretrained` makes it again.
"""

from pathlib import Path

MODEL = Path(__file__).parent / "model.safetensors"

"""The model that comes with wkv: a small RWKV-7 that writes Python. README.md here is its card.

    model, tokenizer = wkv.load()

`make pretrained` makes it again.
"""

import re
from pathlib import Path

MODEL = Path(__file__).parent / "model.safetensors"
CARD = MODEL.parent / "README.md"


def held_out_files() -> frozenset[str]:
    """The paths in Python's standard library that it was not trained on: the card names them."""
    listed = re.search(r"^Held out: (.*?)\.$", CARD.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return frozenset(re.split(r",\s+", listed[1])) if listed else frozenset()

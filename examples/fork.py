"""Read once, continue in several ways, and keep the state in a file:  python examples/fork.py [MODEL]

Without a model file a tiny untrained one is built, and writes noise.
"""

import sys
import tempfile
from pathlib import Path

import wkv
from wkv.tokenizers import bytes_

if len(sys.argv) > 1:
    model, tokenizer = wkv.load(sys.argv[1])
else:
    config = wkv.RWKV7Config(vocab_size=256, n_layer=2, n_embd=64, dim_att=64, dim_ffn=256)
    model, tokenizer = wkv.build(config), bytes_()

session = wkv.Session(model, tokenizer)
session.feed("The capital of France is Paris. " * 20)  # read once; forks share what was read

for question in ("The capital of Italy", "The capital of Japan"):
    fork = session.fork()
    fork.feed(question)
    print(question + fork.generate(max_tokens=20, seed=0))

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "capitals.state"
    session.save(path)
    restored = wkv.Session.restore(path, model, tokenizer)
    print(f"{path.stat().st_size:,} bytes remember {restored.n_tokens} tokens")

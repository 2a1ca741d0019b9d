"""Show text while it is written, and how sure the model was:  python examples/stream.py [MODEL]

Without a model file a tiny untrained one is built, and writes noise.
"""

import sys

import wkv
from wkv.tokenizers import bytes_

if len(sys.argv) > 1:
    model, tokenizer = wkv.load(sys.argv[1])
else:
    config = wkv.RWKV7Config(vocab_size=256, n_layer=2, n_embd=64, dim_att=64, dim_ffn=256)
    model, tokenizer = wkv.build(config), bytes_()

session = wkv.Session(model, tokenizer)
session.feed("Once upon a time")

for piece in session.stream(max_tokens=40, stop="\n\n", seed=0):
    print(piece, end="", flush=True)
print()

for step in session.steps(max_tokens=5, logprobs=3, seed=0):
    print(f"token {step.token}, log probability {step.logprob:.2f}, best: {step.top}")

"""Continue a prompt:  python examples/generate.py [MODEL]

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

prompt = "def main():"
text = wkv.generate(model, tokenizer, prompt, max_tokens=60, temperature=0.8, top_p=0.9, seed=0)
print(prompt + text)

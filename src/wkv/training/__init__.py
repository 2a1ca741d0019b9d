"""Training from scratch, in parts that can be used alone: data, optimizer, loss, loop.

    documents, held_out = split(standard_library(), seed=0)
    batches = windows(documents, batch_size=8, length=128, seed=0)
    for progress in train(model, batches, adamw(model, lr=4e-3, weight_decay=0.1), minutes=3):
        print(progress.loss)
    print(bits_per_byte(model, [document.text for document in held_out]))

Nothing here prints or saves: whoever takes the steps of `train` shows them as they like.
"""

from .data import Document, as_tokens, split, standard_library, windows
from .loop import Progress, train
from .loss import bits_per_byte, cross_entropy
from .optim import adamw, parameter_groups, set_learning_rate, warmup_cosine

__all__ = [
    "Document",
    "Progress",
    "adamw",
    "as_tokens",
    "bits_per_byte",
    "cross_entropy",
    "parameter_groups",
    "set_learning_rate",
    "split",
    "standard_library",
    "train",
    "warmup_cosine",
    "windows",
]

"""`wkv convert`: from one file format or dtype to another."""


def convert(source: str, target: str, /) -> None:
    """Convert a checkpoint between .pth and .safetensors, or to another dtype."""


def info():
    "Say what a file holds."

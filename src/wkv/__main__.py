"""`python -m wkv` is the command `wkv`."""

from .cli import main

if __name__ == "__main__":
    raise SystemExit(main())

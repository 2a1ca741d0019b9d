def bench() -> None:
    """Do bench."""

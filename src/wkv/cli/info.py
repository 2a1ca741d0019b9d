def info() -> None:
    """Do info."""

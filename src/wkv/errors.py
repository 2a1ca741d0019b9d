"""What can go wrong, one small class per cause.

Every message answers three questions: what came (got), what would have been right (expected), and
what to do next (try). The command line prints the message alone; programs catch `wkv.Error`.
"""


class Error(Exception):
    """The root of every error that wkv raises on purpose."""

    def __init__(self, got: str, expected: str = "", advice: str = "") -> None:
        parts = [got.rstrip(".") + "."]
        if expected:
            parts.append(f"Expected: {expected.rstrip('.')}.")
        if advice:
            parts.append(f"Try: {advice.rstrip('.')}.")
        super().__init__(" ".join(parts))
        self.got, self.expected, self.advice = got, expected, advice

    def __reduce__(self) -> tuple[type["Error"], tuple[str, str, str]]:
        return type(self), (self.got, self.expected, self.advice)


class ConfigError(Error):
    """A configuration names an unknown field, an impossible size or an unknown model."""


class CheckpointError(Error):
    """A file is not a checkpoint that wkv can read, or its tensors do not make the model they claim."""


class UnsafeFileError(CheckpointError):
    """A file tried something that no checkpoint needs: code, overlapping tensors, absurd sizes."""


class CorruptFileError(CheckpointError):
    """A file's bytes are not the bytes that were written: truncated, or a checksum differs."""


class TokenizerError(Error):
    """A tokenizer is missing, unknown, or does not fit the model's vocabulary."""


class InputError(Error):
    """An argument of a call is out of range: token ids, lengths, an empty prompt, a sampling setting."""


class StateError(Error):
    """A recurrent state does not belong to this model, batch size or dtype."""


class DivergenceError(Error):
    """Training produced a loss or a gradient that is not a finite number."""


class BackendError(Error):
    """A backend that was asked for by name cannot run this call."""


class MissingExtraError(Error):
    """A feature needs an optional dependency that is not installed."""


class OverloadedError(Error):
    """There is no room for one more request now; later there may be."""


class DeadlineError(Error):
    """The time that a request was given is over before its text is."""


class ClosedError(Error):
    """The engine that a request belongs to has stopped."""

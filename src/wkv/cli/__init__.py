"""The command `wkv`: a lazy table of subcommands; each file parses, calls the library, and prints.

A subcommand's module is imported when that command is called or asked for help, and imports torch only
when it has work to do. Results go to stdout, progress and errors to stderr. Exit status: 0 done,
1 an error, 2 a wrong command line, 74 the disk failed (full, forbidden, broken), 130 stopped with Ctrl-C.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import sys
from collections.abc import Sequence

from cyclopts import App, CycloptsError, Parameter, UnusedCliTokensError

from ..errors import Error
from .common import UsageError, note, printable

# What follows the name on the usage line; None where the command has commands of its own, which say it.
COMMANDS = {
    "demo": "[OPTIONS]",
    "train": "[SOURCE...] [OPTIONS]",
    "data": None,
    "info": "[FILE] [OPTIONS]",
    "generate": "[MODEL] PROMPT [OPTIONS]",
    "chat": "[MODEL] [OPTIONS]",
    "bench": "[MODEL] [OPTIONS]",
    "quantize-report": "[MODEL] [OPTIONS]",
    "convert": "SOURCE TARGET [OPTIONS]",
}

_DISK_FAULTS = (errno.EIO, errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line (default: this process's) and return its exit status."""
    tokens = list(sys.argv[1:] if arguments is None else arguments)
    options = tokens[: tokens.index("--")] if "--" in tokens else tokens
    debug = "--debug" in options
    if debug:
        tokens.remove("--debug")
    try:
        status = 0
        if tokens:
            app = _app()
            if tokens[0] not in COMMANDS:
                _ = [app[name] for name in COMMANDS]  # imported, so that the list can quote their summaries
            status = app(tokens, result_action="return_value", print_error=False, exit_on_error=False)
        else:
            _menu()
        sys.stdout.flush()  # a closed pipe shows here, not at exit
        return status or 0
    except KeyboardInterrupt:
        note("wkv: stopped")
        return 130
    except BrokenPipeError:
        # The reader (`head`, a pager) has seen enough. Nothing may flush into the closed pipe at exit.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if debug:
            raise
        command = f"wkv {tokens[0]}" if tokens and tokens[0] in COMMANDS else "wkv"
        note(f"wkv: {_one_line(error, command)}", style="red")
        return _status(error)


def _app() -> App:
    app = App(
        name="wkv",
        help="RWKV language models, generations 4 to 7: load, generate, chat, train, prove.",
        help_epilogue="Every command takes --help, and --debug to show tracebacks.",
        version=_version,
        help_format="plaintext",
        default_parameter=Parameter(negative=(), show_default=_shown_default),
        suppress_keyboard_interrupt=False,
    )
    for name, usage in COMMANDS.items():
        line = {} if usage is None else {"usage": f"wkv {name} {usage}"}
        function = name.replace("-", "_")
        app.command(f"wkv.cli.{function}:{function}", name=name, **line)
    return app


def _shown_default(value: object) -> str | None:
    """For the help page: that a flag is off by default says nothing."""
    return None if value is None or value is False or value in ((), "") else str(value)


def _version() -> str:
    from importlib.metadata import version

    return version("wkv")


def _menu() -> None:
    """What to type next."""
    lines = [
        ('wkv generate "def "', "let the small model that comes with wkv write Python"),
        ("wkv demo", "train such a model on this computer, in 3 minutes"),
        ("wkv chat model.pth", "talk to a model"),
        ("wkv info model.pth", "what is this file?"),
        ("wkv --help", "every command; each has --help with examples"),
    ]
    print("RWKV language models, generations 4 to 7.\n")
    for command, purpose in lines:
        print(f"  {command:<22}{purpose}")


def _status(error: Exception) -> int:
    """As the module says; a wrong name is no fault of the disk."""
    if isinstance(error, CycloptsError | UsageError):
        return 2
    fault = error if isinstance(error, OSError) else error.__cause__
    if isinstance(fault, OSError) and fault.errno in _DISK_FAULTS:
        return 74  # EX_IOERR of sysexits.h
    return 1


def _one_line(error: Exception, command: str) -> str:
    """What came, what was expected and what to try, whatever raised it."""
    match error:
        case UnusedCliTokensError():
            text = f"{error} Try: quotes around text with spaces, or {command} --help."
        case CycloptsError():
            text = f"{error} Try: {command} --help."
        case Error():
            text = str(error)
        case OSError(strerror=str(reason)):
            text = f"{error.filename}: {reason}." if error.filename else f"{reason}."
        case MemoryError() | RuntimeError() if re.search(
            r"MemoryError|(not enough|out of|allocate) memory", repr(error)
        ):
            text = "not enough memory. Try: --dtype bf16, or a smaller model; wkv info says what each needs."
        case _:
            text = f"{type(error).__name__}: {error}. A fault in wkv. Try: --debug, which shows where."
    return printable(" ".join(text.split()))

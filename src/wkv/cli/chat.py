"""`wkv chat`: talk to a model. A conversation is a list of sessions: going back is keeping an old one."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import difflib
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

from cyclopts import Parameter

from ..errors import Error, InputError
from .common import (
    CODE_SAMPLING,
    MODEL_DEFAULTS,
    NO_SAMPLING_FLAGS,
    ModelFlags,
    SamplingFlags,
    human_bytes,
    note,
    open_model,
    write_out,
)

if TYPE_CHECKING:
    from ..inference import ChatFormat, Sampling, Session
    from ..inference.prompts import Think

HELP = """\
  /fork [NAME]      go on in a new branch, or switch to the branch NAME
  /undo             take back the last answer (or /reset, /load)
  /reset            begin again
  /save FILE        write the model's memory of this conversation to a small file
  /load FILE        go on from such a file
  /set [NAME VALUE] show the settings, or change one: /set temperature 0.7
  /help             this list
  /quit             leave; so does Ctrl-D
Ctrl-C stops an answer. A line that ends in \\ continues; so does everything between two lines of \"\"\"."""

CHAT_SAMPLING = dict(top_p=0.5, presence_penalty=0.5, frequency_penalty=0.5)
BLOCK = '"""'
KEPT = 50  # positions that /undo can return to: each holds a state, megabytes in a large model
ENDINGS = {
    "length": "; cut off here, /set max_tokens allows more",
    "interrupt": "; stopped, /undo takes it back",
}


class Chat:
    """A conversation in a terminal, or with anything that reads and writes lines.

    session    where the conversation begins, usually fresh
    read       shows a prompt and returns one line; EOFError ends the chat, KeyboardInterrupt drops the line
    write      receives the answers, piece by piece
    say        receives everything else, line by line
    """

    def __init__(
        self,
        session: Session,
        form: ChatFormat,
        sampling: Sampling,
        *,
        system: str = "",
        think: Think = "off",
        max_tokens: int = 1024,
        read: Callable[[str], str],
        write: Callable[[str], None],
        say: Callable[[str], None],
    ) -> None:
        form.answer_prefix(think)  # refuses what the format cannot do
        self.form, self.sampling, self.think = form, sampling, think
        self.opening, self.max_tokens = form.opening(system), _checked_limit(max_tokens)
        self.read, self.write, self.say = read, write, say
        self.branches = {"main": [session]}
        self.branch = "main"

    @property
    def positions(self) -> list[Session]:
        """The sessions of this branch, one per answer; the last is where the conversation stands."""
        return self.branches[self.branch]

    def run(self) -> None:
        """Talk until /quit or the end of the input. No wrong line or command ends the chat."""
        while True:
            try:
                line = self.read("> " if self.branch == "main" else f"{self.branch}> ")
                message = line if line.startswith("/") else self._all_lines(line)
            except EOFError:
                return
            except KeyboardInterrupt:
                self.say("\n(/quit or Ctrl-D leaves)")
                continue
            except UnicodeDecodeError as error:
                self.say(f"That line is not UTF-8: {error.reason} at byte {error.start}.")
                continue
            if line.strip() == "/quit":
                return
            try:
                if line.startswith("/"):
                    self.obey(line)
                elif message.strip():
                    self.answer(message)
            except KeyboardInterrupt:
                self.say("\n(stopped; the conversation is as it was)")
            except Error as error:
                self.say(str(error))

    def _move(self, session: Session) -> None:
        """The conversation stands at `session` now; positions long past are forgotten, the first is not."""
        self.positions.append(session)
        del self.positions[1:-KEPT]

    def _all_lines(self, line: str) -> str:
        """The whole message that begins with `line`: its continuations, or a block between triple quotes."""
        lines = []
        if line.strip() == BLOCK:
            while (line := self.read("... ")).strip() != BLOCK:
                lines.append(line)
        else:
            while line.endswith("\\"):
                lines.append(line[:-1])
                line = self.read("... ")
            lines.append(line)
        return "\n".join(lines)

    def answer(self, question: str) -> None:
        """One turn. The position moves only when the whole question was read: Ctrl-C before that drops it."""
        session = self.positions[-1].fork()
        before = self.form.closing if session.n_tokens else self.opening
        session.feed(before + self.form.turn(question, self.think))
        self._move(session)
        start, n_before = time.perf_counter(), session.n_tokens
        shown = self.form.answer_prefix(self.think).lstrip()
        self.write(shown)
        finish = "interrupt"
        with contextlib.suppress(KeyboardInterrupt):
            for step in session.steps(self.max_tokens, self.form.stop, **dataclasses.asdict(self.sampling)):
                text = step.text if shown or not self.form.roles else step.text.lstrip()  # after "Assistant:"
                shown = shown or text
                self.write(text)
                finish = step.finish or finish
        self.write("\n")
        n_tokens = session.n_tokens - n_before
        speed = n_tokens / (time.perf_counter() - start)
        self.say(f"({n_tokens} tokens, {speed:.1f}/s{ENDINGS.get(finish, '')})")

    def obey(self, line: str) -> None:
        """One command line, `/name argument`. InputError when there is no such command."""
        name, _, argument = line[1:].strip().partition(" ")
        commands: dict[str, Callable[[str], None]] = {
            "fork": self.fork,
            "undo": self.undo,
            "reset": self.reset,
            "save": self.save,
            "load": self.load,
            "set": self.set,
            "help": lambda _: self.say(HELP),
        }
        if name not in commands:
            near = difflib.get_close_matches(name, [*commands, "quit"], n=1)
            advice = f"/{near[0]}" if near else "/help, or a space first if it is a message"
            raise InputError(f"no command is named /{name}", advice=advice)
        commands[name](argument.strip())

    def fork(self, name: str) -> None:
        """Switch to the branch `name`; without it, or when it is new, it begins where this one stands."""
        name = name or str(len(self.branches) + 1)
        if name not in self.branches:
            self.branches[name] = list(self.positions)
        self.branch = name
        self.say("branches: " + ", ".join(f"[{b}]" if b == name else b for b in self.branches))

    def undo(self, _: str) -> None:
        if len(self.positions) == 1:
            raise InputError("there is nothing to undo")
        self.positions.pop()
        self.say(f"taken back: the conversation has {self.positions[-1].n_tokens} tokens")

    def reset(self, _: str) -> None:
        self._move(self.positions[0].fork())
        self.say("a new conversation; /undo returns to the old one")

    def save(self, file: str) -> None:
        if not file:
            raise InputError("/save needs a file", advice="/save chat.state")
        session = self.positions[-1]
        session.save(file)
        self.say(f"saved {file}: {session.n_tokens} tokens in {human_bytes(session.state.nbytes)}")

    def load(self, file: str) -> None:
        if not file:
            raise InputError("/load needs a file", advice="/load chat.state")
        last = self.positions[-1]
        self._move(type(last).restore(file, last.model, last.tokenizer))
        self.say(f"loaded {file}: {self.positions[-1].n_tokens} tokens; /undo returns to where you were")

    def set(self, argument: str) -> None:
        """Change one setting, `name value`: a field of Sampling, max_tokens or think; nothing shows all."""
        name, _, text = argument.partition(" ")
        name, text = name.replace("-", "_"), text.strip()
        settings = dataclasses.asdict(self.sampling) | {"max_tokens": self.max_tokens, "think": self.think}
        if name and name not in settings:
            near = difflib.get_close_matches(name, settings, n=1, cutoff=0.0)
            raise InputError(f"no setting is named {name!r}", f"one of {', '.join(settings)}", near[0])
        if name and text:
            self._change(name, text)
            settings[name] = text
        self.say("  ".join(f"{key} {settings[key]}" for key in ([name] if name else settings)))

    def _change(self, name: str, text: str) -> None:
        value: Any = text  # a word stays text, and each setting says what it wants instead
        with contextlib.suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            value = ast.literal_eval("None" if text.lower() == "none" else text)
        if name == "think":
            self.form.answer_prefix(cast("Think", text))
            self.think = cast("Think", text)
        elif name == "max_tokens":
            self.max_tokens = _checked_limit(value)
        else:
            self.sampling = dataclasses.replace(self.sampling, **{name: value})


def _checked_limit(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"max_tokens is {value!r}", "a whole number from 1")
    return value


def chat(
    model: str | None = None,
    /,
    *,
    form: Annotated[Literal["world", "g1", "plain"] | None, Parameter(name="--format")] = None,
    think: bool = False,
    system: str = "",
    max_tokens: int = 1024,
    sampling: SamplingFlags = NO_SAMPLING_FLAGS,
    how: ModelFlags = MODEL_DEFAULTS,
) -> None:
    """Talk to a model in the terminal.

    Answers stop at the next speaker or the end of the text. Ctrl-C stops an answer, Ctrl-D leaves.
    /help lists what else can be typed: /fork, /undo, /save, /load, /set, /reset.

    Examples:

        wkv chat model.pth
        wkv chat rwkv7-g1.pth --think --temperature 0.8
        wkv chat model.pth --system "You answer in one sentence."
        wkv chat model.pth --format world < questions.txt > answers.txt

    Parameters
    ----------
    model
        a checkpoint, .pth or .safetensors; without it, the one that comes with wkv
    form
        how turns are written: world for RWKV-4 to 6, g1 for RWKV-7, plain to write on from what you type;
        without it, by the model
    think
        let a G1 model think before it answers; /set think low and others choose how much
    system
        rules for the model, before the first turn (g1)
    max_tokens
        cut an answer off after this many tokens
    """
    path, network, tokenizer = open_model(model, how)
    from ..inference import Session, chat_format

    if model is None:
        form = form or "plain"  # that model has never seen a conversation
    session = Session(network, tokenizer)
    conversation = Chat(
        session,
        chat_format(network.config, form),
        sampling.over(**CODE_SAMPLING if model is None else CHAT_SAMPLING),
        system=system,
        think="on" if think else "off",
        max_tokens=max_tokens,
        read=_read,
        write=write_out,
        say=note,
    )
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):  # absent on Windows; where present, arrow keys recall lines
            import readline  # noqa: F401
        state = human_bytes(session.state.nbytes)
        note(f"{path}: {conversation.form.name} format, a state of {state}; /help says what you can type")
    conversation.run()


def _read(prompt: str) -> str:
    return input(prompt if sys.stdin.isatty() and sys.stdout.isatty() else "")

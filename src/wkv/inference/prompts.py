"""How chats are written for the official models: plain text in one of two formats.

    World   User: {question}\\n\\nAssistant:             RWKV-4, 5 and 6; also the plain RWKV-7 World models
    G1      System: {rules}\\n\\n, then the same turns   RWKV-7 G1, which can also think before it answers
    Plain   {text}                                   models that never saw a conversation: they write on

A chat is `opening(system) + turn(question)`, the model's answer until one of `stop` or the end-of-text
token, then `closing + turn(next question)`, and so on. Join the pieces as text and feed them at once:
tokens of joined text are not the joined tokens of its pieces.

There is no space after "Assistant:": the model writes it. " <think" lacks its ">" on purpose: what
follows it is often one token together with it, so the choice is left to the model.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

from ..config import Config
from ..errors import InputError

Think = Literal["off", "fake", "on", "low", "medium", "high"]

_AFTER_QUESTION: dict[str, str] = {"low": " (think a bit)", "medium": " (think)", "high": " (think a lot)"}
_FAKE_THOUGHT = " <think>\n</think"  # an empty thought, already closed: better answers than "off", as fast
_GREETING = (
    "User: hi\n\nAssistant: Hi. I am your assistant and I will provide expert full response in full details. "
    "Please feel free to ask any question and I will always answer it.\n\n"
)


def clean(text: str) -> str:
    """A question as the models saw questions in training: no blank lines, no space around.

    A blank line ends a turn, so this also keeps pasted text from posing as the next speaker.
    """
    return re.sub(r"\n{2,}", "\n", text.replace("\r\n", "\n")).strip()


@dataclass(frozen=True)
class ChatFormat:
    """One way to write a chat. `roles` are its speakers: an answer stops where one of them begins."""

    name: str
    roles: tuple[str, ...]
    greeting: str = ""
    thinks: bool = False
    closing: str = "\n\n"  # ends an answer, so that the next turn can begin

    @property
    def stop(self) -> tuple[str, ...]:
        """Strings that end an answer: the next speaker."""
        return tuple(f"{self.closing}{role}:" for role in self.roles)

    def opening(self, system: str = "") -> str:
        """What comes before the first turn. InputError for a system text that the format has no place for."""
        if not (system := clean(system)):
            return self.greeting
        if "System" not in self.roles:
            raise InputError(f"the {self.name} format has no system text", advice="the g1 format")
        return f"System: {system}{self.closing}"

    def turn(self, question: str, think: Think = "off") -> str:
        """A question, up to where the model writes its answer. InputError when nothing is asked."""
        if not (question := clean(question)):
            raise InputError("the question is empty", "some text")
        answer = self.answer_prefix(think)  # refuses first what the format cannot do
        return f"User: {question}{_AFTER_QUESTION.get(think, '')}{self.closing}Assistant:{answer}"

    def answer_prefix(self, think: Think = "off") -> str:
        """The part of the answer that `turn` wrote for the model; a display shows it before the answer."""
        if think not in get_args(Think):
            raise InputError(f"think is {think!r}", f"one of {', '.join(get_args(Think))}")
        if think == "off":
            return ""
        if not self.thinks:
            raise InputError(f"the {self.name} format cannot think", advice='think="off", or the g1 format')
        return _FAKE_THOUGHT if think == "fake" else " <think"


@dataclass(frozen=True)
class PlainFormat(ChatFormat):
    """No speakers: what is typed goes in as it is, and the answer goes on from it, to two empty lines."""

    @property
    def stop(self) -> tuple[str, ...]:
        return (self.closing,)

    def turn(self, question: str, think: Think = "off") -> str:
        if not question.strip():
            raise InputError("there is nothing to go on from", "some text")
        self.answer_prefix(think)
        return question


WORLD = ChatFormat("world", ("User", "Assistant"), greeting=_GREETING)
G1 = ChatFormat("g1", ("User", "Assistant", "System"), thinks=True)
PLAIN = PlainFormat("plain", (), closing="\n\n\n")


def chat_format(config: Config, name: str | None = None) -> ChatFormat:
    """The format of that name, else the one that suits the model: G1 for RWKV-7, World before it."""
    formats = {form.name: form for form in (WORLD, G1, PLAIN)}
    if name is None:
        name = "g1" if config.generation == 7 else "world"
    if name not in formats:
        raise InputError(f"no chat format is named {name!r}", f"one of {', '.join(formats)}")
    return formats[name]

"""The commands of the chat shell.

On a terminal replies are streamed. In a pipe only replies are printed; notes and errors go to stderr in both. A
question without a reply leaves an empty line in a pipe, so that replies stay in step with questions, and makes the exit
status 2.
"""

import contextlib
import json
from collections.abc import Iterator, Sequence
from typing import TextIO

from openchatkit.errors import UserError
from openchatkit.formats import chat_file
from openchatkit.inference import report
from openchatkit.inference.session import Session
from openchatkit.inference.shell.loop import CommandLoop, suggest
from openchatkit.inference.shell.output import INTERRUPTED, Output, ReplyPrinter
from openchatkit.inference.shell.terminal import no_echo
from openchatkit.inference.streaming import clean
from openchatkit.retrieval.passage import Passage
from openchatkit.texts import parse_bool, shorten


class Shell(CommandLoop):
    """Commands of a chat with `session`; `output.status` is the exit status at the end."""

    def __init__(
        self, session: Session, output: Output, *, stdin: TextIO | None, stdout: TextIO, about: str = ""
    ) -> None:
        super().__init__(output, stdin=stdin, stdout=stdout, about=about)
        self._session = session
        self._passages: list[str] = []

    def ask(self, question: str, passages: Sequence[str] = ()) -> None:
        """Ask, and print the reply. Raises UserError."""
        with self._replying(question) as printer:
            printer.reply = self._session.say(question, passages, emit=printer.emit)

    # -- the commands; /help prints their docstrings, and a true result ends the loop

    def do_say(self, text: str) -> None:
        """/say TEXT  ask; a line without a slash does the same"""
        _require(text, "/say")
        passages, self._passages = self._passages, []
        before = self._session.conversation
        try:
            with self._replying(text) as printer:
                printer.reply = self._session.say(text, passages, emit=printer.emit)
        finally:
            # Interactive users can fix the question; in a pipe the next line is a new one.
            if passages and self._output.interactive and self._session.conversation is before:
                self._passages = passages
                self._output.confirm("the passages are kept for the next question; /passage - takes them back")

    def do_passage(self, text: str) -> None:
        """/passage TEXT|-  give the next question a passage to answer from; several add up; - takes them back"""
        _require(text, "/passage")
        self._passages = [] if text == "-" else [*self._passages, text]

    def do_regen(self, _: str) -> None:
        """/regen  answer the last question again; the new reply replaces the old one"""
        asked = self._session.conversation.last_question
        left = ("the text so far replaces the old reply", "the old reply stays")
        with self._replying(asked.text if asked else "", interrupted=left) as printer:
            printer.reply = self._session.regenerate(emit=printer.emit)

    def do_undo(self, _: str) -> None:
        """/undo  take back the last question and its reply"""
        self._output.confirm(f"taken back: {shorten(self._session.undo())}")

    def do_reset(self, _: str) -> None:
        """/reset  forget the conversation; so does /clear"""
        self._passages = []
        self._session.reset()

    def do_system(self, text: str) -> None:
        """/system [TEXT|-]  open the conversation with TEXT, or with none (-); alone, print the text in use"""
        if text:
            self._session.system = "" if text == "-" else text
        else:
            self._output.show(clean(self._session.system).rstrip("\n") + "\n")

    def do_set(self, text: str) -> None:
        """/set [NAME VALUE]  change a setting; alone, print the settings in use"""
        name, *rest = text.split(maxsplit=1) or [""]
        name = name.replace("-", "_")
        settings = self._settings()
        if name and name not in settings:
            meant = suggest(name, settings)
            raise UserError(f"unknown setting {clean(name)[:40]}: {meant}there are {', '.join(settings)}")
        if not rest:
            shown = {name: settings[name]} if name else settings
            self._output.show("".join(f"{name}: {_format(value)}\n" for name, value in shown.items()))
        elif name == "verbose":
            self._output.verbose = _parse_switch(rest[0], "verbose")
        else:
            self._session.set(name, rest[0])
            self._output.confirm(f"{name} is now {_format(self._settings()[name])}")

    def do_edit(self, text: str) -> None:
        """/edit [TEXT]  write a question in the editor that EDITOR names, and ask it"""
        if not self._output.interactive:
            raise UserError("/edit needs a terminal: give the text with /say TEXT")
        from openchatkit.inference.shell import editing

        written = editing.edit_text(text and f"{text}\n").strip()
        if not written:
            self._output.confirm("nothing was written, so nothing is asked")
            return
        if self._editor:
            self._editor.remember(written)
        self.do_say(written)

    def do_show(self, _: str) -> None:
        """/show  print the model, its form, the system text and the settings in use"""
        session = self._session
        form = "the kit's form" if session.responder.rendering.name == "kit" else "its own chat template"
        shown = {
            "model": self._about or "not said",
            "template": form,
            "system": shorten(clean(session.system)) or "none",
            "conversation": report.count(len(session.conversation.turns), "turn"),
            "retrieval": _format(session.retrieval),
            **{name: _format(value) for name, value in self._settings().items()},
        }
        self._output.show("".join(f"{name}: {value}\n" for name, value in shown.items()))

    def do_hyperparameters(self, _: str) -> None:
        """/hyperparameters  print the settings in use"""
        settings = self._session.hyperparameters()
        self._output.show("Hyperparameters:\n" + "".join(f"  {name}: {value}\n" for name, value in settings.items()))

    def do_stats(self, _: str) -> None:
        """/stats  print what the last reply took, and all replies together"""
        last = self._session.last
        if last is None:
            self._output.show("no reply yet\n")
        else:
            self._output.show(f"last reply: {report.figures(last.statistics)}\n")
            self._output.show(f"all replies: {report.sums(self._session.totals)}\n")

    def do_save(self, text: str) -> None:
        """/save NAME[!]  save the conversation; with ! also over a saved one"""
        _require(text, "/save", "the name to save under")
        path = self._session.save(text.removesuffix("!"), overwrite=text.endswith("!"))
        self._output.confirm(f"saved as {path}")

    def do_load(self, text: str) -> None:
        """/load NAME  continue a saved conversation instead of this one"""
        _require(text, "/load", "the name of a saved chat; /chats lists them")
        self._session.load(text)
        self._passages = []
        conversation = self._session.conversation
        asked = f"; the last question: {shorten(conversation.last_question.text)}" if conversation.last_question else ""
        self._output.confirm(f"{text}: {report.count(len(conversation.turns), 'turn')}{asked}")

    def do_chats(self, _: str) -> None:
        """/chats  list the saved conversations"""
        self._output.show("".join(f"{name}\n" for name in chat_file.list_chats()))

    def do_retrieval(self, text: str) -> None:
        """/retrieval [on|off]  search passages for each question, or not; alone, print which"""
        if text:
            self._session.retrieval = _parse_switch(text, "/retrieval")
        else:
            self._output.show(f"retrieval: {'on' if self._session.retrieval else 'off'}\n")

    def do_sources(self, _: str) -> None:
        """/sources  print the passages that the last reply used, and where they are from"""
        last = self._session.last
        sources = [] if last is None else last.sources or [Passage(text) for text in last.passages]
        if not sources:
            self._output.show("no passages\n" if last else "no reply yet\n")
        for number, source in enumerate(sources, 1):
            score = f" (score {source.score:.4g})" if source.source else ""
            text = clean(" ".join(source.text.split()))
            self._output.show(f"{report.citation(number, source)}{score}\n    {text}\n")

    def do_raw_say(self, text: str) -> None:
        """/raw_say TEXT  let the model continue TEXT as it stands, outside the conversation"""
        _require(text, "/raw_say")
        left = "the conversation is as it was"
        with self._replying(text, interrupted=(left, left)) as printer:
            printer.reply = self._session.complete(text, emit=printer.emit)

    def do_raw_prompt(self, text: str) -> None:
        """/raw_prompt [TEXT]  print the conversation, or what the model would read if TEXT were asked next"""
        self._output.show(clean(self._session.prompt(text, self._passages)).rstrip("\n") + "\n")

    def do_quit(self, _: str) -> bool:
        """/quit  leave; so do /bye, /exit and Ctrl-D"""
        return True

    def do_help(self, _: str) -> None:
        """/help  print this list; so does /?"""
        uses = [getattr(self, f"do_{name}").__doc__.split("  ", 1) for name in self.commands()]
        width = max(len(use) for use, _ in uses)
        self._output.show("".join(f"{use:{width}}  {meaning}\n" for use, meaning in uses))

    # -- Tab

    def completions(self, head: str, word: str) -> list[str]:
        """Return the completions of the word after `head`."""
        before = head.split()
        if not before:
            names = [f"/{name} " for name in self.commands()] if word[:1] in ("", "/") else []
        elif before == ["/set"]:
            names = [f"{name} " for name in self._settings()]
        elif before in (["/load"], ["/save"]):
            names = chat_file.list_chats()
        elif before in (["/retrieval"], ["/set", "verbose"], ["/set", "sample"]):
            names = ["on", "off"]
        else:
            names = []
        return [name for name in names if name.startswith(word)]

    # -- shared by several

    @contextlib.contextmanager
    def _replying(self, question: str, *, interrupted: tuple[str, str] = INTERRUPTED) -> Iterator[ReplyPrinter]:
        """Print the reply that is made in a `with` block, and keep what is typed during it off the screen."""
        most = self._session.sampling.max_tokens
        replying = self._output.replying(question, max_tokens=most, interrupted=interrupted)
        with no_echo(self.stdin if self._output.interactive else None), replying as printer:
            yield printer

    def _settings(self) -> dict[str, object]:
        return {**self._session.settings(), "verbose": self._output.verbose}


def _require(text: str, command: str, what: str = "a text after it") -> None:
    if not text:
        raise UserError(f"{command} needs {what}")


def _parse_switch(text: str, name: str) -> bool:
    value = parse_bool(text)
    if value is None:
        raise UserError(f"{name} {clean(text)[:40]!r}: expected on or off")
    return value


def _format(value: object) -> str:
    """Return a setting's value as /set takes it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list):
        return json.dumps(value, ensure_ascii=False) if value else "none"
    return "none" if value is None else str(value)

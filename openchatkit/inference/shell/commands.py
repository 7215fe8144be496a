"""The chat shell: what a line does.

On a terminal it prompts, streams the replies and lives through Ctrl-C. From a pipe it reads one question or command a
line and prints nothing but replies; notes and errors go to stderr in both. A question that got no reply leaves an
empty line there, so that replies stay in step with questions, and makes the exit status 2.
"""

import cmd
import os
import signal
from collections.abc import Callable, Sequence
from typing import TextIO

from openchatkit.errors import UserError
from openchatkit.formats import chat_file
from openchatkit.inference import report
from openchatkit.inference.responder import Emit, Reply
from openchatkit.inference.session import Session
from openchatkit.inference.shell import keys, words
from openchatkit.inference.shell.editing import Editing
from openchatkit.inference.shell.lines import PROMPT, Lines
from openchatkit.inference.shell.output import INTERRUPTED, Output, Unwritable
from openchatkit.inference.shell.style import Style
from openchatkit.inference.streaming import clean
from openchatkit.retrieval.passage import Passage
from openchatkit.texts import shorten

# What people type who know other shells.
_ALIASES = {"?": "help", "bye": "quit", "exit": "quit", "clear": "reset"}
_BARE = ("exit", "quit", "help")


class Shell(cmd.Cmd):
    """Reads lines until the end of input or /quit; `output.status` is the exit status at the end.

    `about` is what the welcome says of the model.
    """

    intro = "Welcome to OpenChatKit shell.   Type /help or /? to list commands.\n"
    prompt = PROMPT

    def __init__(
        self, session: Session, output: Output, *, stdin: TextIO | None, stdout: TextIO, about: str = ""
    ) -> None:
        super().__init__(stdin=stdin, stdout=stdout)
        self._about = about
        self._session = session
        self._output = output
        self._editing = None
        if output.interactive and stdout.isatty():
            path = None if chat_file.unwritable() else chat_file.history_path()
            self._editing = Editing(self.candidates, path=path, style=Style(stdout), note=output.note)
        self._lines = Lines(stdin, output, editing=self._editing)
        self._passages: list[str] = []
        self._reading = False
        self._pressed = False

    # -- the loop

    def cmdloop(self) -> None:
        """Read and obey. Ours, because cmd.Cmd cannot tell the end of input from a line that says EOF.

        Raises KeyboardInterrupt when Ctrl-C is pressed twice at the prompt, or once where nobody types.
        """
        if self._editing:
            if self._about:
                self._output.tell(self._about)
            self._output.write(self.intro)
            self._editing.start()
        if self._output.interactive:
            # From here on Ctrl-C is no end, and no excuse for what fails later.
            signal.signal(signal.SIGINT, signal.default_int_handler)
        while True:
            try:
                line = self._read()
                if line is None or self.onecmd(line):
                    return
            except Unwritable:
                raise
            except UserError as error:
                self._output.complain(error)
            except KeyboardInterrupt:
                self._interrupted()

    def _read(self) -> str | None:
        self._reading = True
        line = self._lines.read()
        self._reading = self._pressed = False
        return line

    def _interrupted(self) -> None:
        """Ctrl-C: at the prompt it clears the line, and leaves when it was pressed there before and nothing typed."""
        if not self._output.interactive:
            raise KeyboardInterrupt
        self._output.write("\n")
        if not self._reading:
            self._output.note("interrupted")
        elif self._pressed and not self._lines.typed():
            raise KeyboardInterrupt
        else:
            self._pressed = True
            self._output.note("Ctrl-D or /quit leaves, and so does Ctrl-C pressed again")
        self._reading = False

    def onecmd(self, line: str) -> bool:
        """Obey one line; true when it was the last. A line without a slash is said, and one that begins with a path."""
        line = line.strip()
        if not line:
            return False
        if self._output.interactive and line.lower() in _BARE:
            line = f"/{line.lower()}"
        if not line.startswith("/"):
            self.do_say(line)
            return False
        name, *rest = line[1:].split(maxsplit=1) or [""]
        handler = getattr(self, f"do_{_ALIASES.get(name, name)}", None)
        if handler is None and ("/" in name or (name and os.path.lexists(f"/{name}"))):
            self.do_say(line)
            return False
        if handler is None:
            meant = words.nearest(name, self.commands())
            raise UserError(
                f"unknown command /{clean(name)[:40]}: {f'did you mean /{meant}? ' if meant else ''}/help lists the "
                "commands, /say TEXT says a text with a slash"
            )
        return bool(handler(rest[0] if rest else ""))

    def ask(self, question: str, passages: Sequence[str] = ()) -> None:
        """Ask, and print the reply. Raises UserError."""
        self._answer(question, lambda emit: self._session.say(question, passages, emit=emit))

    def commands(self) -> list[str]:
        """The commands' names, without the slash."""
        return sorted(name.removeprefix("do_") for name in self.get_names() if name.startswith("do_"))

    # -- the commands; a docstring is what /help prints, and what is true ends the loop

    def do_say(self, text: str) -> None:
        """/say TEXT  ask; a line without a slash does the same"""
        self._needs(text, "/say")
        passages, self._passages = self._passages, []
        before = self._session.conversation
        try:
            self.ask(text, passages)
        finally:
            # Who types can mend the question; in a pipe the next line asks something else.
            if passages and self._output.interactive and self._session.conversation is before:
                self._passages = passages
                self._output.tell("what /passage gave waits for the next question; /passage - takes it back")

    def do_passage(self, text: str) -> None:
        """/passage TEXT|-  give the next question a passage to answer from; several add up; - takes them back"""
        self._needs(text, "/passage")
        self._passages = [] if text == "-" else [*self._passages, text]

    def do_regen(self, _: str) -> None:
        """/regen  answer the last question again; the new reply takes the place of the old"""
        asked = self._session.conversation.last_question
        left = ("what came takes the place of the old reply", "the old reply stays")
        self._answer(asked.text if asked else "", lambda emit: self._session.regenerate(emit=emit), interrupted=left)

    def do_undo(self, _: str) -> None:
        """/undo  take back the last question and its reply"""
        self._output.tell(f"taken back: {shorten(self._session.undo())}")

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
            meant = words.nearest(name, settings)
            raise UserError(
                f"unknown setting {clean(name)[:40]}: {f'did you mean {meant}? ' if meant else ''}there are "
                f"{', '.join(settings)}"
            )
        if not rest:
            shown = {name: settings[name]} if name else settings
            self._output.show("".join(f"{name}: {words.plain(value)}\n" for name, value in shown.items()))
        elif name == "verbose":
            self._output.verbose = words.on_off(rest[0], "verbose")
        else:
            self._session.set(name, rest[0])
            self._output.tell(f"{name} is now {words.plain(self._settings()[name])}")

    def do_edit(self, text: str) -> None:
        """/edit [TEXT]  write a question in the editor that EDITOR names, and ask it"""
        if not self._output.interactive:
            raise UserError("/edit needs a terminal: give the text with /say TEXT")
        written = keys.edited(text and f"{text}\n").strip()
        if not written:
            self._output.tell("nothing was written, so nothing is asked")
            return
        if self._editing:
            self._editing.remember(written)
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
            "retrieval": words.plain(session.retrieval),
            **{name: words.plain(value) for name, value in self._settings().items()},
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
        self._needs(text, "/save", "the name to save under")
        path = self._session.save(text.removesuffix("!"), overwrite=text.endswith("!"))
        self._output.tell(f"saved as {path}")

    def do_load(self, text: str) -> None:
        """/load NAME  go on with a saved conversation, in the place of this one"""
        self._needs(text, "/load", "the name of a saved chat; /chats lists them")
        self._session.load(text)
        self._passages = []
        conversation = self._session.conversation
        asked = f"; the last question: {shorten(conversation.last_question.text)}" if conversation.last_question else ""
        self._output.tell(f"{text}: {report.count(len(conversation.turns), 'turn')}{asked}")

    def do_chats(self, _: str) -> None:
        """/chats  list the saved conversations"""
        self._output.show("".join(f"{name}\n" for name in chat_file.list_chats()))

    def do_retrieval(self, text: str) -> None:
        """/retrieval [on|off]  look for passages to each question, or not; alone, say which"""
        if text:
            self._session.retrieval = words.on_off(text, "/retrieval")
        else:
            self._output.show(f"retrieval: {'on' if self._session.retrieval else 'off'}\n")

    def do_sources(self, _: str) -> None:
        """/sources  print the passages that the last reply was made from, and where they are from"""
        last = self._session.last
        sources = [] if last is None else last.sources or [Passage(text) for text in last.passages]
        if not sources:
            self._output.show("no passages\n" if last else "no reply yet\n")
        for number, source in enumerate(sources, 1):
            score = f" (score {source.score:.4g})" if source.source else ""
            text = clean(" ".join(source.text.split()))
            self._output.show(f"{report.citation(number, source)}{score}\n    {text}\n")

    def do_raw_say(self, text: str) -> None:
        """/raw_say TEXT  let the model go on from TEXT as it stands, outside the conversation"""
        self._needs(text, "/raw_say")
        left = "the conversation is as it was"
        self._answer(text, lambda emit: self._session.complete(text, emit=emit), interrupted=(left, left))

    def do_raw_prompt(self, text: str) -> None:
        """/raw_prompt [TEXT]  print the conversation, or what the model would read of it if TEXT were said next"""
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

    def candidates(self, head: str, word: str) -> list[str]:
        """What the word behind `head` can become."""
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

    # -- what several share

    def _answer(
        self, question: str, ask: Callable[[Emit], Reply], *, interrupted: tuple[str, str] = INTERRUPTED
    ) -> None:
        most = self._session.sampling.max_tokens
        with keys.unechoed(self.stdin if self._output.interactive else None):
            self._output.answer(question, ask, max_tokens=most, interrupted=interrupted)

    def _settings(self) -> dict[str, object]:
        return {**self._session.settings(), "verbose": self._output.verbose}

    def _needs(self, text: str, command: str, what: str = "a text behind it") -> None:
        if not text:
            raise UserError(f"{command} needs {what}")

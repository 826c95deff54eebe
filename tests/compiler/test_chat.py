"""Chatting on a terminal: a pseudo-terminal with the command on its other end."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from .cli_fixtures import copy_artifact, edit_json, environment, seal

_TAKE_TERMINAL = "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
_SLOW = (
    "import time; from kvc.runtime.executor import Executor; decode = Executor.decode; "
    "Executor.decode = lambda *a, **k: (time.sleep(0.05), decode(*a, **k))[1]; "
)
_MAIN = "import sys; from kvc.cli import main; sys.exit(main())"
Open = Callable[..., "Terminal"]


class Terminal:
    """A person at a terminal: types lines, and reads until something appears."""

    def __init__(self, arguments: list[str], slow: bool) -> None:
        self.master, slave = pty.openpty()
        code = _TAKE_TERMINAL + (_SLOW if slow else "") + _MAIN
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, "run", *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environment(TERM="dumb"),
            start_new_session=True,
        )
        os.close(slave)
        self.unread = ""

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def until(self, pattern: str, seconds: float = 30) -> str:
        """Read until `pattern` matches; what came before it."""
        end = time.monotonic() + seconds
        while not (match := re.search(pattern, self.unread)):
            if not self._read(end - time.monotonic()):
                raise AssertionError(f"{pattern!r} did not appear; there is {self.unread!r}")
        before, self.unread = self.unread[: match.start()], self.unread[match.end() :]
        return before

    def ask(self, message: str) -> str:
        """Say something at the prompt; the answer."""
        self.type(message + "\n")
        self.until(re.escape(message) + "\r\n")
        return self.until(r"\r\n> ")

    def leave(self) -> tuple[int, str]:
        """Exit status, and what was printed until the end."""
        while self._read(10):
            pass
        return self.process.wait(10), self.unread

    def _read(self, seconds: float) -> bool:
        """Read what there is; False at the end."""
        if seconds <= 0 or not select.select([self.master], [], [], seconds)[0]:
            return False
        try:
            data = os.read(self.master, 1 << 16)
        except OSError:  # nobody holds the other end any more
            return False
        self.unread += data.decode(errors="replace")
        return bool(data)


@contextmanager
def _terminal(*arguments: str, slow: bool = False) -> Iterator[Terminal]:
    terminal = Terminal(list(arguments), slow)
    try:
        yield terminal
    finally:
        terminal.process.kill()
        terminal.process.wait()
        os.close(terminal.master)


def test_conversation(artifact: Path) -> None:
    with _terminal(str(artifact), "--max-new-tokens", "6") as terminal:
        assert "/new" in terminal.until("> ")
        first = terminal.ask("What is the capital of France?")
        assert first
        second = terminal.ask("What is the capital of France?")
        assert second != first  # it has the conversation before it
        terminal.type("/new\n")
        terminal.until("> ")
        assert terminal.ask("What is the capital of France?") == first
        terminal.type("\n  \n")  # says nothing
        terminal.until("> ")
        terminal.until("> ")
        terminal.type("/exit\n")
        status, rest = terminal.leave()
    assert status == 0
    assert "tokens/s" in rest
    assert "Traceback" not in rest


@pytest.mark.parametrize("key", ["\x04", "\x03"])
def test_end_of_input_and_interrupt_leave(artifact: Path, key: str) -> None:
    with _terminal(str(artifact)) as terminal:
        terminal.until("> ")
        time.sleep(0.3)  # Python waits for a line only some time after it has written the prompt
        terminal.type(key)
        status, rest = terminal.leave()
    assert status == 0
    assert "tokens/s" in rest
    assert "Traceback" not in rest


def test_interrupt_ends_the_answer_only(artifact: Path) -> None:
    with _terminal(str(artifact), "--max-new-tokens", "200", slow=True) as terminal:
        terminal.until("> ")
        terminal.type("The weights\n")
        terminal.until("The weights\r\n")
        terminal.until(r"[^\s]{2}")  # it has begun to answer
        terminal.type("\x03")
        cut = terminal.until("\r\n> ", seconds=5)  # 200 tokens take 10 s
        assert len(cut) < 500
        assert terminal.process.poll() is None
        terminal.type("Every token\n")
        terminal.until("Every token\r\n")
        terminal.until(r"[^\s]{2}")
        terminal.type("\x03")
        terminal.until("\r\n> ", seconds=5)
        terminal.type("/exit\n")
        status, rest = terminal.leave()
    assert status == 0
    assert "Traceback" not in rest


def test_a_conversation_longer_than_the_context(artifact: Path) -> None:
    """The message is refused and forgotten; the conversation can go on or start over."""
    with _terminal(str(artifact), "--max-new-tokens", "3") as terminal:
        terminal.until("> ")
        first = terminal.ask("The weights")
        refusal = terminal.ask("many words " * 60)
        assert "kvc: " in refusal
        assert "/new" in refusal
        assert "Traceback" not in refusal
        terminal.type("/new\n")
        terminal.until("> ")
        assert terminal.ask("The weights") == first
        terminal.type("/exit\n")
        assert terminal.leave()[0] == 0


def test_a_model_without_chat_template(artifact: Path, tmp_path: Path) -> None:
    """Chatting needs a template: the command says so at once, not after every message."""
    folder = copy_artifact(artifact, tmp_path)
    (folder / "chat_template.jinja").unlink()
    edit_json(folder / "manifest.json", lambda data: data["files"].pop("chat_template.jinja"))
    edit_json(folder / "tokenizer_config.json", lambda data: data.pop("chat_template", None))
    seal(folder)
    with _terminal(str(folder)) as terminal:
        status, rest = terminal.leave()
    assert status == 2
    assert "chat template" in rest
    assert "--prompt" in rest
    assert "Traceback" not in rest

"""Between text and token ids: tokenizer, chat template, end-of-text tokens, streaming."""

from __future__ import annotations

import ctypes
import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
from tokenizers import Tokenizer

from kvc_passes.errors import InputError

Message = Mapping[str, Any]
"""{"role": "user", "content": "..."}, and whatever else the model's chat template reads."""

_UNFINISHED: Final = "\ufffd"  # what a decoder returns for bytes that are no whole character
_LONGEST: Final = 4  # bytes, so at most as many tokens, of one character in UTF-8


class Text:
    """The tokenizer and chat template of a model, read from the folder that holds its files.

    Raises InputError if tokenizer.json is missing or cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise InputError(
                f"{folder} has no tokenizer.json and takes token ids only: put the tokenizer's files beside "
                "the ONNX model and compile it again"
            )
        try:
            self._tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises bare Exception
            raise InputError(f"{file}: the tokenizer cannot be read ({error})") from None
        _give_back_memory()
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._folder = folder
        self._config = _read(folder / "tokenizer_config.json")
        self._special = {
            key: _content(value) for key, value in self._config.items() if key.endswith("_token") and value
        }
        self._source = _template_source(folder, self._config)
        self._template: jinja2.Template | None = None

    @classmethod
    def check(cls, folder: Path) -> None:
        """Raise InputError if a tokenizer's file in `folder` cannot be used; a folder without one is fine."""
        end_tokens(folder)
        if (folder / "tokenizer.json").is_file():
            text = cls(folder)
            if text._source is not None:
                _compile(text._source)

    @property
    def has_template(self) -> bool:
        """Whether the model has a chat template."""
        return self._source is not None

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of a text; with `special`, with the tokens that the tokenizer puts before and behind.

        Raises InputError for text that is not Unicode.
        """
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InputError("the text holds half of a UTF-16 pair or bytes that are not UTF-8") from None
        return list(self._tokenizer.encode(text, add_special_tokens=special).ids)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))

    def chat(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation, up to where the model's answer begins.

        Raises InputError if the model has no chat template or its template refuses the messages.
        """
        return self.encode(self.render(messages), special=False)

    def render(self, messages: Sequence[Message]) -> str:
        """The conversation as the chat template writes it, up to where the answer begins. Raises as chat."""
        if self._template is None:
            if self._source is None:
                raise InputError(
                    "the model has no chat template (chat_template.jinja): give the prompt without chat"
                )
            self._template = _compile(self._source)
        try:
            return self._template.render(
                messages=list(messages),
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **self._special,
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise InputError(f"the model's chat template refuses the messages: {error}") from None

    def stops(self) -> frozenset[int]:
        """The ids that end a text, of generation_config.json and tokenizer_config.json together."""
        found = end_tokens(self._folder)
        token = self._tokenizer.token_to_id(self._special.get("eos_token", ""))
        return found if token is None else found | {token}


def end_tokens(folder: Path) -> frozenset[int]:
    """eos_token_id of generation_config.json (one id, a list or none), which needs no tokenizer."""
    ids = _read(folder / "generation_config.json").get("eos_token_id")
    return frozenset([ids] if isinstance(ids, int) else ids or ())


class Stream:
    """Turns tokens into text piece by piece: whole characters only, and nothing of a stop text.

    The pieces joined are the text of the tokens up to the first stop text.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stop = tuple(stop)
        self._tokens: list[int] = []
        # Only a window of tokens is decoded: it starts one piece back, since a token's text may depend on the
        # token before it (a leading space). Tokens from _end on have not become text that is certain.
        self._begin = 0
        self._end = 0
        self._known = 0  # characters of the window's text that were returned or are in _pending
        self._pending = ""  # text that may be the beginning of a stop text
        self.stopped = False
        """Whether a stop text was met."""

    def push(self, token: int) -> str:
        """Take the next token; the text that is certain now ("" if none)."""
        if self.stopped:
            return ""
        self._tokens.append(token)
        text = self._decode(self._tokens[self._begin :])
        held = len(text) - len(text.rstrip(_UNFINISHED))
        if held and len(self._tokens) - self._end > _LONGEST - 1:  # cannot become one character any more
            held = 1
        new = text[self._known : len(text) - held]
        if new:
            self._known += len(new)
            if not held:
                self._begin, self._end = self._end, len(self._tokens)
                self._known = len(self._decode(self._tokens[self._begin : self._end]))
        return self._release(self._pending + new)

    def finish(self) -> str:
        """The rest of the text, when no more tokens come."""
        if self.stopped:
            return ""
        rest = self._pending + self._decode(self._tokens[self._begin :])[self._known :]
        self._pending = ""
        return rest

    def _release(self, text: str) -> str:
        """The part of `text` that cannot belong to a stop text; the rest is kept."""
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped, self._pending = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._pending = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


class _Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}: marks answers for training, means nothing here."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _compile(source: str) -> jinja2.Template:
    """Compile a chat template with the same helpers and settings that transformers gives it, in a sandbox."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise InputError(f"the model's chat template cannot be read: {error}") from None


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes HTML
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _template_source(folder: Path, config: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several by name
        template = next((entry["template"] for entry in template if entry["name"] == "default"), None)
    return template if isinstance(template, str) else None


def _give_back_memory() -> None:
    """Return to the system what reading a tokenizer took for a moment: about as much as it keeps (25 MiB)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)


def _content(value: Any) -> str:
    """A special token is written as text or as an object with its text in "content"."""
    return str(value["content"] if isinstance(value, dict) else value)


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        data: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file}: cannot be read ({error})") from None
    if not isinstance(data, dict):
        raise InputError(f"{file}: cannot be read (it holds no object)")
    return data

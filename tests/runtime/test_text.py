"""Tokenizing, chat templates as transformers renders them, and streaming in whole characters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from kvc.runtime.text import Stream, Text, end_tokens
from kvc_passes.errors import InputError

TEMPLATE = (
    "{%- for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "{% generation %}<{{ m['role'] }}>{{ m['content'] | trim }}{% endgeneration %}{{ '\\n' }}"
    "{% if loop.index > 5 %}{% break %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{{ bos_token }}{{ {'a': '<é>'} | tojson }}{% endif %}"
)


def _tokenizer() -> Tokenizer:
    """Byte-level: each token is one byte, so that a character takes up to four tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>", "<bos>", "<pad>"])
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=50, pad_id=258, pad_token="<pad>")
    return tokenizer


def _write(folder: Path, **configs: Any) -> Path:
    _tokenizer().save(str(folder / "tokenizer.json"))
    for name, content in configs.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Text:
    folder = _write(
        tmp_path_factory.mktemp("text"),
        tokenizer_config={"eos_token": {"content": "<end>"}, "bos_token": "<bos>", "chat_template": "old"},
        generation_config={"eos_token_id": [7, 8]},
    )
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return Text(folder)


def test_round_trip_without_truncation_or_padding(text: Text) -> None:
    tokens = text.encode("größer 😀 and more than five tokens")
    assert text.decode(tokens) == "größer 😀 and more than five tokens"
    assert text.decode([*tokens, 256]) == text.decode(tokens)


def test_ends_come_from_both_configs(text: Text) -> None:
    assert text.stops() == {7, 8, 256}


def test_chat_template(text: Text) -> None:
    messages = [{"role": "user", "content": " Hi <b> "}, {"role": "assistant", "content": "é"}]
    expected = '<user>Hi <b>\n<assistant>é\n<assistant><bos>{"a": "<é>"}'
    assert text.render(messages) == expected
    assert text.chat(messages) == text.encode(expected, special=False)


def test_chat_template_equals_transformers(text: Text) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = [{"role": "system", "content": "a"}, {"role": "user", "content": "b\n"}]
    special = {"bos_token": "<bos>", "eos_token": "<end>"}
    theirs, _ = render_jinja_template(
        conversations=[messages], chat_template=TEMPLATE, add_generation_prompt=True, **special
    )
    assert text.render(messages) == theirs[0]


def test_template_refuses_with_its_own_words(text: Text) -> None:
    with pytest.raises(InputError, match="chat template refuses the messages: no tools"):
        text.chat([{"role": "tool", "content": ""}])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "no chat template"),
        ("{% if %}", "cannot be read"),
        ("{{ messages.append(1) }}", "refuses"),
        ("{{ ''.__class__.__mro__ }}", "refuses"),
        ([{"name": "tools", "template": "x"}], "no chat template"),
    ],
)
def test_templates_that_do_not_work(tmp_path: Path, template: Any, message: str) -> None:
    text = Text(_write(tmp_path, tokenizer_config={"chat_template": template}))
    with pytest.raises(InputError, match=message):
        text.chat([{"role": "user", "content": "x"}])


def test_named_default_template(tmp_path: Path) -> None:
    templates = [{"name": "tools", "template": "x"}, {"name": "default", "template": "{{ messages|length }}"}]
    text = Text(_write(tmp_path, tokenizer_config={"chat_template": templates}))
    assert text.render([{"role": "user", "content": "x"}]) == "1"


@pytest.mark.parametrize(("value", "expected"), [(5, {5}), ([5, 6], {5, 6}), (None, set())])
def test_end_tokens_without_tokenizer(tmp_path: Path, value: Any, expected: set[int]) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    assert end_tokens(tmp_path) == expected


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    assert end_tokens(tmp_path) == frozenset()
    with pytest.raises(InputError, match=r"has no tokenizer\.json and takes token ids only"):
        Text(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer\.json: the tokenizer cannot be read"):
        Text(tmp_path)
    _write(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(InputError, match=r"tokenizer_config\.json: cannot be read"):
        Text(tmp_path)


@settings(max_examples=150, deadline=None)
@given(content=st.text(st.sampled_from("ab é€😀\ufffd"), max_size=20))
def test_pieces_are_whole_characters_and_add_up(text: Text, content: str) -> None:
    stream = Stream(text.decode)
    so_far = ""
    for token in text.encode(content, special=False):
        so_far += stream.push(token)
        assert content.startswith(so_far)
    assert so_far + stream.finish() == content


@settings(max_examples=150, deadline=None)
@given(tokens=st.lists(st.integers(0, 255), max_size=25))
def test_bytes_that_are_no_text_add_up_too(text: Text, tokens: list[int]) -> None:
    stream = Stream(text.decode)
    pieces = [stream.push(token) for token in tokens]
    assert "".join(pieces) + stream.finish() == text.decode(tokens)


@settings(max_examples=150, deadline=None)
@given(content=st.text(st.sampled_from("a é€😀"), max_size=12), cut=st.integers(0, 3))
def test_byte_fallback_gives_whole_characters(content: str, cut: int) -> None:
    """These decoders mark every byte of a run of byte tokens while its last character is unfinished."""
    vocab = {f"<0x{b:02X}>": b for b in range(256) if chr(b) not in "a "} | {"a": ord("a"), " ": ord(" ")}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<0x00>"))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    stream = Stream(tokenizer.decode)
    data = content.encode()
    data = data[: len(data) - cut]
    so_far = ""
    for byte in data:
        so_far += stream.push(byte)
        assert content.startswith(so_far)
    assert so_far == data.decode(errors="ignore")
    assert (so_far + stream.finish()).rstrip("\ufffd") == so_far


def test_bytes_that_never_become_text_are_not_held_back_for_ever(text: Text) -> None:
    byte = text.encode("é", special=False)[0]  # the first of two bytes, again and again
    stream = Stream(text.decode)
    assert "".join(stream.push(byte) for _ in range(20)) == "\ufffd" * 19


def test_a_character_comes_with_its_last_byte(text: Text) -> None:
    stream = Stream(text.decode)
    assert [stream.push(token) for token in text.encode("a😀b")] == ["a", "", "", "", "😀", "b"]


def test_leading_space_of_sentencepiece_tokens() -> None:
    """A token's text depends on the one before: the first loses its space."""
    tokenizer = Tokenizer(models.WordLevel({"▁one": 0, "▁two": 1, "s": 2}, unk_token="s"))
    tokenizer.decoder = decoders.Metaspace()
    stream = Stream(tokenizer.decode)
    assert [stream.push(token) for token in [0, 1, 2, 0, 1]] == ["one", " two", "s", " one", " two"]


@settings(max_examples=200, deadline=None)
@given(
    content=st.text(st.sampled_from("ab€"), max_size=16),
    stops=st.lists(st.text(st.sampled_from("ab€"), min_size=1, max_size=4), max_size=3),
)
def test_stop_texts_end_the_text_before_them(text: Text, content: str, stops: list[str]) -> None:
    stream = Stream(text.decode, stops)
    found = ""
    ended = None
    for index, token in enumerate(text.encode(content, special=False)):
        found += stream.push(token)
        if stream.stopped and ended is None:
            ended = index
    found += stream.finish()
    positions = [(content.find(s) + len(s), content.find(s)) for s in stops if s in content]
    assert stream.stopped == bool(positions)
    if positions:
        end, _ = min(positions)
        assert found == content[: min(start for stop_end, start in positions if stop_end == end)]
        assert ended == len(content[:end].encode()) - 1
    else:
        assert found == content

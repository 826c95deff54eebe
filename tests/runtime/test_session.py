"""Sessions: batches, streams and servers' requests side by side, with text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from kvc.runtime.sampler import SamplingParams
from kvc.runtime.session import Session
from kvc.runtime.text import Text
from kvc_passes.errors import InputError

LETTERS = "abcdefghijklmnopqrstu"
END = len(LETTERS)  # <end>
Make = Callable[..., Any]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(LETTERS)}, []))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    tokenizer.add_special_tokens(["<end>", "<user>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    (tmp_path / "chat_template.jinja").write_text("{% for m in messages %}<user>{{ m.content }}{% endfor %}")
    return tmp_path


@pytest.fixture
def model(fake_model: Make, make_plan: Make, make_facts: Make) -> Any:
    return fake_model(make_plan(), make_facts(vocab=23))


@pytest.fixture
def session(model: Any, folder: Path) -> Session:
    return Session(model, folder, Text(folder))


@pytest.fixture
def bare(model: Any, tmp_path: Path) -> Session:
    """A session of an artifact without tokenizer."""
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "generation_config.json").write_text(json.dumps({"eos_token_id": END}))
    return Session(model, empty, None)


def _text(tokens: list[int]) -> str:
    return "".join(LETTERS[t] for t in tokens if t < END)


def test_answers_come_in_order_with_text(session: Session, model: Any) -> None:
    prompts = ["abc", "d", "efgh", "ijk", "lmnop"]
    answers = session.generate(prompts, max_new_tokens=9)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = [LETTERS.index(c) for c in prompt]
        expected = model.unbatched(ids, SamplingParams(max_new_tokens=9), frozenset({END}))
        assert (answer.prompt_tokens, answer.tokens) == (ids, expected)
        assert answer.text == _text(expected)
        assert answer.finish_reason == ("stop" if expected[-1] == END else "length")
        assert 0 <= answer.timings.queued <= answer.timings.first_token <= answer.timings.total
    assert session.stats.pages_used == (0,)
    assert session.stats.prefill_tokens == sum(map(len, prompts))
    assert session.stats.prefill_rate > 0
    assert session.stats.decode_tokens == sum(len(a.tokens) - 1 for a in answers)


def test_seeded_answer_does_not_depend_on_the_batch(session: Session) -> None:
    sampling: dict[str, Any] = {"temperature": 1.0, "seed": 4, "max_new_tokens": 8, "ignore_eos": True}
    together = session.generate(["abc", "de", "abc"], **sampling)
    alone = session.generate("abc", **sampling)[0]
    assert together[0].tokens == together[2].tokens == alone.tokens
    other = session.generate("abc", **{**sampling, "seed": 5})[0]
    assert other.tokens != alone.tokens


def test_on_token_gets_every_token_and_the_whole_text(session: Session) -> None:
    seen: list[tuple[int, int, str]] = []
    answers = session.generate(["ab", "c"], max_new_tokens=6, on_token=lambda *news: seen.append(news))
    for index, answer in enumerate(answers):
        assert [token for i, token, _ in seen if i == index] == answer.tokens
        assert "".join(text for i, _, text in seen if i == index) == answer.text


def test_stream_equals_generate_and_can_be_closed(session: Session) -> None:
    answer = session.generate("abc", max_new_tokens=10, ignore_eos=True)[0]
    pieces = list(session.stream("abc", max_new_tokens=10, ignore_eos=True))
    assert "".join(pieces) == answer.text
    assert len(pieces) > 3
    stream = session.stream("abc", max_new_tokens=10, ignore_eos=True)
    assert next(stream) == pieces[0]
    assert session.stats.pages_used[0] > 0
    stream.close()  # type: ignore[attr-defined]
    assert (session.stats.pages_used, session.busy) == ((0,), False)


def test_stop_text(session: Session) -> None:
    full = session.generate("abc", max_new_tokens=12, ignore_eos=True)[0]
    stop = full.text[4:6]
    answer = session.generate("abc", max_new_tokens=12, ignore_eos=True, stop=stop)[0]
    assert answer.text == full.text[: full.text.index(stop)]
    assert answer.finish_reason == "stop"
    assert answer.tokens == full.tokens[: len(answer.tokens)]
    assert "".join(session.stream("abc", max_new_tokens=12, ignore_eos=True, stop=[stop])) == answer.text


def test_stop_token_is_not_part_of_the_text(session: Session) -> None:
    full = session.generate("abc", max_new_tokens=6, ignore_eos=True)[0]
    token = full.tokens[3]
    answer = session.generate("abc", max_new_tokens=6, ignore_eos=True, stop_tokens=(token,))[0]
    assert answer.tokens == full.tokens[: full.tokens.index(token) + 1]
    assert answer.text == _text(answer.tokens[:-1])
    assert answer.finish_reason == "stop"


def test_chat_uses_the_template(session: Session) -> None:
    user = END + 1
    answer = session.generate("ab", chat=True, max_new_tokens=1)[0]
    assert answer.prompt_tokens == [user, 0, 1]
    assert session.tokens([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]) == [
        user,
        0,
        user,
        1,
    ]


def test_requests_of_a_server_go_on_while_others_generate(session: Session, model: Any) -> None:
    params = SamplingParams(max_new_tokens=7, ignore_eos=True)
    first = session.add_request("ab", params)
    second = session.add_request([{"role": "user", "content": "c"}], params)
    dropped = session.add_request([1, 2, 3], params)
    assert session.cancel(dropped)
    session.generate("k", max_new_tokens=3, ignore_eos=True)
    events = session.step()
    while session.busy:
        events += session.step()
    for id, prompt in ((first, [0, 1]), (second, [END + 1, 2])):
        tokens = [e.token for e in events if e.id == id]
        assert tokens == model.unbatched(prompt, params, frozenset())
        assert [e.finish_reason for e in events if e.id == id] == [None] * 6 + ["length"]
        assert "".join(e.text for e in events if e.id == id) == _text([t for t in tokens if t is not None])
    assert [(e.token, e.finish_reason) for e in events if e.id == dropped] == [(None, "cancelled")]
    assert not session.cancel(first)


def test_error_in_a_callback_ends_the_requests(session: Session) -> None:
    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.generate(["abc", "d"], on_token=fail)
    assert (session.stats.pages_used, session.busy, session.stats.running) == ((0,), False, 0)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (["a", "a" * 33], "the prompt has 33 tokens"),
        ([[1], []], "prompt is empty"),
        ([[1], [99]], "token id 99 does not exist"),
        ([""], "prompt is empty"),
    ],
)
def test_nothing_runs_when_a_prompt_cannot_be_served(session: Session, prompts: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        session.generate(prompts)
    assert not session.busy
    assert session.stats.prefill_tokens == 0


def test_without_tokenizer_token_ids_work_and_text_does_not(bare: Session, model: Any) -> None:
    answer = bare.generate([[1, 2], [3]], max_new_tokens=30)
    for prompt, completion in zip(([1, 2], [3]), answer, strict=True):
        expected = model.unbatched(prompt, SamplingParams(max_new_tokens=30), frozenset({END}))
        assert (completion.tokens, completion.text) == (expected, "")
    for call in (
        lambda: bare.generate("text"),
        lambda: bare.stream([1, 2]),
        lambda: bare.add_request([{"role": "user", "content": "x"}]),
    ):
        with pytest.raises(InputError, match="takes token ids only"):
            call()
    with pytest.raises(InputError, match="stop texts need a tokenizer"):
        bare.generate([[1]], stop="x")


def test_numpy_tokens_are_taken(bare: Session) -> None:
    assert bare.generate([np.array([1, 2])], max_new_tokens=1)[0].prompt_tokens == [1, 2]  # type: ignore[list-item]


@pytest.mark.parametrize("given", [5, "ab", [7], [[("ids", 1)]]])
def test_encoder_inputs_without_names_are_refused(session: Session, given: Any) -> None:
    with pytest.raises(InputError, match=r"give arrays by the inputs' names|prompts, and encoder inputs for"):
        session.generate(["a"], encoder_inputs=given)
    with pytest.raises(InputError, match="give arrays by the inputs' names"):
        session.stream("a", encoder_inputs=given)


def test_misspelt_option_is_refused(session: Session) -> None:
    with pytest.raises(TypeError, match="temprature"):
        session.generate("a", temprature=1.0)  # type: ignore[call-arg]


def test_closed_session(session: Session, model: Any) -> None:
    with session:
        session.generate("a", max_new_tokens=1)
    assert model.closed
    for call in (lambda: session.generate("a"), lambda: session.add_request([1]), session.step):
        with pytest.raises(InputError, match="session is closed"):
            call()

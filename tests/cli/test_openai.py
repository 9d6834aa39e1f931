"""OpenAI's request lines, field by field."""

import pytest

from penstock.cli.openai import CHAT, COMPLETIONS, is_openai, read_body, response
from penstock.engine.outputs import CompletionOutput, Logprob, RequestOutput
from penstock.errors import ConfigError, RequestError

MESSAGES = [{"role": "user", "content": "Hello"}]


def line(url=CHAT, **body):
    prompt = {"messages": MESSAGES} if url == CHAT else {"prompt": "Hello"}
    return {"custom_id": "a", "method": "POST", "url": url, "body": prompt | body}


def params(fields, **given):
    return read_body(fields, given)[2]


def test_defaults_are_openais_then_the_commands_then_the_lines():
    chat, completion = params(line()), params(line(COMPLETIONS))
    assert (chat.max_tokens, chat.temperature, chat.top_p, chat.seed, chat.logprobs) == (1024, 1.0, 1.0, None, None)
    assert (completion.max_tokens, completion.temperature) == (16, 1.0)
    assert params(line(), max_tokens=9, temperature=0).max_tokens == 9
    assert params(line(max_tokens=5), max_tokens=9).max_tokens == 5
    assert params(line(max_completion_tokens=5)).max_tokens == 5
    assert params(line(max_completion_tokens=5, max_tokens=5)).max_tokens == 5


def test_what_is_obeyed():
    found = params(line(temperature=0.5, top_p=0.9, seed=7, stop=["x", "y"], top_k=3, ignore_eos=True))
    assert (found.temperature, found.top_p, found.seed, found.stop) == (0.5, 0.9, 7, ("x", "y"))
    assert (found.top_k, found.ignore_eos) == (3, True)
    assert params(line(logprobs=True)).logprobs == 0
    assert params(line(logprobs=True, top_logprobs=4)).logprobs == 4
    assert params(line(logprobs=False)).logprobs is None
    assert params(line(COMPLETIONS, logprobs=2)).logprobs == 2


def test_what_asks_for_nothing_is_accepted():
    params(line(model="gpt-4o", user="me", metadata={"a": "b"}, store=True, service_tier="auto"))
    params(line(n=1, stream=False, tools=[], response_format={"type": "text"}, frequency_penalty=0.0, logit_bias={}))
    params(line(COMPLETIONS, best_of=1, echo=False, suffix=None, presence_penalty=None, temperature=None))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"n": 2}, '"n" is not supported: wanted 1, or nothing, got 2'),
        ({"stream": True}, '"stream" is not supported: wanted false'),
        ({"tools": [{"type": "function"}]}, '"tools" is not supported'),
        ({"frequency_penalty": 0.5}, '"frequency_penalty" is not supported'),
        ({"response_format": {"type": "json_object"}}, '"response_format" is not supported'),
        ({"echo": True}, '"echo" is not supported'),
        ({"colour": 1, "best": 2}, "fields that are not supported: got best, colour"),
        ({"prompt": "x"}, "got prompt"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "differ"),
        ({"max_tokens": 0}, "max_tokens is out of range"),
        ({"temperature": "hot"}, "temperature is out of range"),
        ({"seed": -1}, "seed is out of range"),
        ({"logprobs": 3}, '"logprobs": wanted true or false, got 3'),
        ({"top_logprobs": 3}, '"top_logprobs": wanted logprobs true beside it'),
        ({"messages": []}, '"messages"'),
        ({"messages": [{"role": "user"}]}, '"messages"'),
        ({"messages": "hi"}, '"messages"'),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, '"content"'),
    ],
)
def test_chats_that_ask_for_more_are_refused_by_name(body, message):
    with pytest.raises((RequestError, ConfigError)) as caught:
        params(line(**body))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"custom_id": None}, '"custom_id": wanted text, got None'),
        ({"method": "GET"}, '"method": wanted POST'),
        ({"url": "/v1/embeddings"}, '"url": wanted /v1/chat/completions or /v1/completions'),
        ({"url": ["/v1/completions"]}, '"url"'),
        ({"body": "text"}, '"body": wanted an object'),
        ({"priority": 1}, "fields that no batch line has: got priority"),
    ],
)
def test_lines_that_are_not_right_are_refused(change, message):
    with pytest.raises(RequestError) as caught:
        params(line() | change)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("prompt", "found"), [("text", "text"), ([1, 2], [1, 2]), (["text"], "text"), ([[1, 2]], [1, 2])]
)
def test_prompts(prompt, found):
    assert read_body(line(COMPLETIONS, prompt=prompt), {})[:2] == (COMPLETIONS, found)


@pytest.mark.parametrize("prompt", [["a", "b"], [[1], [2]], [], 5, None, [1, "x"], [True], {"a": 1}])
def test_prompts_that_are_none_or_several(prompt):
    with pytest.raises(RequestError, match='"prompt"'):
        params(line(COMPLETIONS, prompt=prompt))


def test_parts_of_text_are_joined():
    content = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    _, messages, _ = read_body(line(messages=[{"role": "user", "content": content}]), {})
    assert messages == MESSAGES


def test_lines_of_openai_are_told_by_their_fields():
    assert is_openai({"body": {}})
    assert not is_openai({"prompt": "x", "custom_id": "a"})


def completion(*, logprobs):
    places = (
        {7: Logprob(-2.0, 3, "He"), 1: Logprob(-0.1, 1, "x"), 2: Logprob(-0.2, 2, "y")},
        {8: Logprob(-0.5, 1, "llo")},
    )
    return RequestOutput("4", "p", (1, 2, 3), (
        CompletionOutput(0, "Hello", (7, 8), -2.5, places if logprobs else None, "stop"),
    ))  # fmt: skip


def test_answers_have_openais_shape():
    chat = response(4, CHAT, completion(logprobs=False), model="m", ids=False, top_logprobs=0)
    assert chat == {
        "status_code": 200,
        "request_id": "req_4",
        "body": {
            "id": "chatcmpl-4",
            "object": "chat.completion",
            "created": 0,
            "model": "m",
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": "Hello", "refusal": None},
                    "logprobs": None,
                    "finish_reason": "stop",
                }
            ],
            "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
        },
    }
    text = response(4, COMPLETIONS, completion(logprobs=False), model="m", ids=True, top_logprobs=0)["body"]
    assert (text["object"], text["id"]) == ("text_completion", "cmpl-4")
    assert text["choices"] == [
        {"index": 0, "text": "Hello", "logprobs": None, "finish_reason": "stop", "token_ids": [7, 8]}
    ]


def test_logprobs_have_openais_shapes():
    (chat,) = response(4, CHAT, completion(logprobs=True), model="m", ids=False, top_logprobs=2)["body"]["choices"]
    first, second = chat["logprobs"]["content"]
    assert (first["token"], first["logprob"], first["bytes"]) == ("He", -2.0, [72, 101])
    assert [one["token"] for one in first["top_logprobs"]] == ["x", "y"]
    assert [one["token"] for one in second["top_logprobs"]] == ["llo"]
    (text,) = response(4, COMPLETIONS, completion(logprobs=True), model="m", ids=False, top_logprobs=2)["body"][
        "choices"
    ]
    assert text["logprobs"] == {
        "tokens": ["He", "llo"],
        "token_logprobs": [-2.0, -0.5],
        "top_logprobs": [{"He": -2.0, "x": -0.1, "y": -0.2}, {"llo": -0.5}],
        "text_offset": [0, 2],
    }

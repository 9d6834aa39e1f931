"""OpenAI's batch format: request lines in, response lines out (https://platform.openai.com/docs/guides/batch).

Every field of a request is obeyed, or known to change nothing, or named in an error; none is passed over in silence.
Results hold nothing random and no time, so that equal jobs write equal bytes: `created` is 0 and ids are line numbers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from penstock.engine.sampling_params import SamplingParams
from penstock.errors import RequestError, UnsupportedFieldError

if TYPE_CHECKING:
    from penstock.engine.outputs import CompletionOutput, Logprob, RequestOutput

__all__ = ["CHAT", "COMPLETIONS", "is_openai", "read_body", "response"]

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"

DEFAULTS: dict[str, dict[str, Any]] = {
    CHAT: {"max_tokens": 1024, "temperature": 1.0},
    COMPLETIONS: {"max_tokens": 16, "temperature": 1.0},
}
"""OpenAI's, but for the length of a chat's answer: without a limit every request would reserve the whole context."""

_SAMPLING = {"temperature", "top_p", "top_k", "seed", "stop", "ignore_eos"}
_HARMLESS = {
    "model", "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "stream_options",
}  # fmt: skip
_NEUTRAL: dict[str, Any] = {
    "n": 1, "best_of": 1, "stream": False, "echo": False, "frequency_penalty": 0, "presence_penalty": 0, "suffix": "",
    "logit_bias": {}, "response_format": {"type": "text"}, "tools": [], "tool_choice": "none", "modalities": ["text"],
}  # fmt: skip
"""Fields that Penstock does not have, with the value that asks for nothing."""


def is_openai(fields: Mapping[str, Any]) -> bool:
    """Say whether a line is meant to be one of OpenAI's."""
    return not {"body", "url", "method"}.isdisjoint(fields)


def read_body(fields: Mapping[str, Any], given: Mapping[str, Any]) -> tuple[str, Any, SamplingParams]:
    """Return a line's url, its messages or prompt, and its sampling parameters over `given` ones over the format's.

    Raises RequestError or ConfigError for what is wrong, missing or not supported.
    """
    if unknown := sorted(set(fields) - {"custom_id", "method", "url", "body"}):
        raise RequestError("fields that no batch line has", got=", ".join(unknown))
    url, body = fields.get("url"), fields.get("body")
    for name, value, wanted, holds in (
        ("custom_id", fields.get("custom_id"), "text", isinstance(fields.get("custom_id"), str)),
        ("method", fields.get("method"), "POST", fields.get("method") == "POST"),
        ("url", url, f"{CHAT} or {COMPLETIONS}", isinstance(url, str) and url in DEFAULTS),
        ("body", body, "an object", isinstance(body, dict)),
    ):
        _check(name, value, wanted, holds=holds)
    assert isinstance(url, str)
    assert isinstance(body, dict)
    rest = {name: value for name, value in body.items() if value is not None and name not in _HARMLESS}
    prompt = _messages(rest.pop("messages", None)) if url == CHAT else _prompt(rest.pop("prompt", None))
    sampling = {name: rest.pop(name) for name in list(rest) if name in _SAMPLING}
    sampling |= _length(rest, url) | _logprobs(rest, url)
    for name, neutral in _NEUTRAL.items():
        if name in rest and rest.pop(name) != neutral:
            wanted, got = f"{json.dumps(neutral)}, or nothing", json.dumps(body[name])[:80]
            raise UnsupportedFieldError(f'"{name}" is not supported', wanted=wanted, got=got)
    if rest:
        raise UnsupportedFieldError("fields that are not supported", got=", ".join(sorted(rest)), fix="Remove them.")
    return url, prompt, SamplingParams.from_mapping(DEFAULTS[url] | dict(given) | sampling)


def _check(name: str, value: object, wanted: str, *, holds: bool) -> None:
    if not holds:
        raise RequestError(f'"{name}"', wanted=wanted, got=repr(value)[:80])


def _messages(messages: Any) -> list[dict[str, Any]]:
    holds = isinstance(messages, list) and bool(messages)
    holds = holds and all(isinstance(each, dict) and {"role", "content"} <= each.keys() for each in messages)
    _check("messages", messages, 'a list of {"role", "content"} objects', holds=holds)
    return [each | {"content": _content(each["content"])} for each in messages]


def _content(content: Any) -> Any:
    """Join the parts of a message, which may be text only."""
    if not isinstance(content, list):
        return content
    texts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
    holds = len(texts) == len(content) and all(isinstance(text, str) for text in texts)
    _check("content", content, 'text, or a list of {"type": "text"} parts', holds=holds)
    return "".join(map(str, texts))


def _prompt(prompt: Any) -> Any:
    if isinstance(prompt, list) and prompt and not _is_int(prompt[0]):
        _check("prompt", f"{len(prompt)} of them", "one prompt per line", holds=len(prompt) == 1)
        prompt = prompt[0]
    holds = isinstance(prompt, str) or (isinstance(prompt, list) and bool(prompt) and all(map(_is_int, prompt)))
    _check("prompt", prompt, "text or a list of token ids", holds=holds)
    return prompt


def _length(rest: dict[str, Any], url: str) -> dict[str, Any]:
    names = ("max_completion_tokens", "max_tokens") if url == CHAT else ("max_tokens",)
    asked = {name: rest.pop(name) for name in names if name in rest}
    if len(set(map(repr, asked.values()))) > 1:
        raise RequestError("max_tokens and max_completion_tokens differ", got=asked, fix="Give one of them.")
    return {"max_tokens": next(iter(asked.values()))} if asked else {}


def _logprobs(rest: dict[str, Any], url: str) -> dict[str, Any]:
    asked = rest.pop("logprobs", None)
    if url == COMPLETIONS:
        return {} if asked is None else {"logprobs": asked}
    top = rest.pop("top_logprobs", None)
    _check("logprobs", asked, "true or false", holds=asked is None or isinstance(asked, bool))
    _check("top_logprobs", top, "logprobs true beside it", holds=bool(top is None or asked))
    return {"logprobs": top or 0} if asked else {}


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def response(
    number: int, url: str, output: RequestOutput, *, model: str, ids: bool, top_logprobs: int
) -> dict[str, Any]:
    """Return a result's "response"; with `ids` its tokens are part of it."""
    (completion,) = output.outputs
    prompt_tokens, new_tokens = len(output.prompt_token_ids), len(completion.token_ids)
    choice: dict[str, Any] = {"index": 0}
    if url == CHAT:
        choice["message"] = {"role": "assistant", "content": completion.text, "refusal": None}
        choice["logprobs"] = _chat_logprobs(completion, top_logprobs)
    else:
        choice["text"] = completion.text
        choice["logprobs"] = _completion_logprobs(completion)
    choice["finish_reason"] = completion.finish_reason
    body = {
        "id": f"{'chatcmpl' if url == CHAT else 'cmpl'}-{number}",
        "object": "chat.completion" if url == CHAT else "text_completion",
        "created": 0,
        "model": model,
        "choices": [choice | ({"token_ids": list(completion.token_ids)} if ids else {})],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": new_tokens,
            "total_tokens": prompt_tokens + new_tokens,
        },
    }
    return {"status_code": 200, "request_id": f"req_{number}", "body": body}


def _chat_logprobs(completion: CompletionOutput, count: int) -> dict[str, Any] | None:
    if completion.logprobs is None:
        return None

    def entry(one: Logprob) -> dict[str, Any]:
        text = one.decoded_token or ""
        return {"token": text, "logprob": one.logprob, "bytes": list(text.encode())}

    return {
        "content": [
            entry(place[token])
            | {"top_logprobs": [entry(one) for one in sorted(place.values(), key=lambda one: one.rank)[:count]]}
            for token, place in zip(completion.token_ids, completion.logprobs, strict=True)
        ]
    }


def _completion_logprobs(completion: CompletionOutput) -> dict[str, Any] | None:
    if completion.logprobs is None:
        return None
    chosen = [place[token] for token, place in zip(completion.token_ids, completion.logprobs, strict=True)]
    texts = [one.decoded_token or "" for one in chosen]
    return {
        "tokens": texts,
        "token_logprobs": [one.logprob for one in chosen],
        "top_logprobs": [
            {one.decoded_token or str(token): one.logprob for token, one in place.items()}
            for place in completion.logprobs
        ],
        "text_offset": list(accumulate(map(len, texts[:-1]), initial=0))[: len(texts)],
    }

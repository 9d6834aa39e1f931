"""`penstock score`: a file of texts into a file of their log-likelihoods."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from penstock.cli.job import Line, add_files, run_job
from penstock.cli.options import add_memory
from penstock.engine.request import ScoreRequest
from penstock.engine.sampling_params import SamplingParams
from penstock.errors import RequestError

if TYPE_CHECKING:
    from penstock.engine.forecast import Length
    from penstock.engine.llm import LLM
    from penstock.engine.outputs import ScoreOutput

__all__ = ["add_to"]

_SHAPES: tuple[tuple[str, ...], ...] = (
    ("prompt", "continuation"),
    ("prompt_token_ids", "continuation_token_ids"),
    ("text",),
    ("token_ids",),
)


def add_to(commands: Any) -> None:
    """Add the command to the parser's sub-commands."""
    parser = commands.add_parser(
        "score",
        help="log-likelihoods of continuations and texts, resumably",
        description='Score a file of {"prompt", "continuation"} or {"text"} lines, or token ids with '
        '{"prompt_token_ids", "continuation_token_ids"} or {"token_ids"}. Nothing is generated.',
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    add_files(parser)
    add_memory(parser)


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    return run_job(options, _parse, lambda llm: llm.stream_scores, _length_of, parameters={})


def _length_of(fields: dict[str, Any]) -> Length:
    """Guess: a text is read once, and ends with the logits of its last token."""
    from penstock.engine.forecast import Length, expected_length  # noqa: PLC0415 - numpy; --help must not

    params = SamplingParams(max_tokens=1)
    parts = [value for name, value in fields.items() if name != "custom_id" and isinstance(value, (str, list))]
    return Length(sum(expected_length(part, params).prompt for part in parts) or 1, 1)


def _parse(number: int, fields: dict[str, Any], _: LLM) -> Line:
    fields = {name: value for name, value in fields.items() if name != "custom_id"}
    shape = next((shape for shape in _SHAPES if set(shape) == set(fields)), None)
    if shape is None:
        wanted = " or ".join(f"{{{', '.join(shape)}}}" for shape in _SHAPES)
        raise RequestError("not a text to score", wanted=wanted, got=", ".join(sorted(fields)) or "nothing")
    for name in shape:
        _check(name, fields[name])
    prompt, continuation = fields[shape[0]], fields[shape[1]] if len(shape) > 1 else None
    if isinstance(prompt, list):
        prompt = {"prompt_token_ids": prompt}
    return Line(ScoreRequest(number, prompt, continuation), _record)


def _check(name: str, value: Any) -> None:
    if name.endswith("token_ids"):
        holds = isinstance(value, list) and all(isinstance(one, int) and not isinstance(one, bool) for one in value)
    else:
        holds = isinstance(value, str)
    if not holds:
        wanted = "a list of integers" if name.endswith("token_ids") else "text"
        raise RequestError(f'"{name}"', wanted=wanted, got=repr(value)[:80])


def _record(output: ScoreOutput) -> dict[str, Any]:
    return {
        "logprob": output.logprob,
        "is_greedy": output.is_greedy,
        "num_tokens": len(output.token_ids),
        "token_ids": list(output.token_ids),
        "logprobs": [entry.logprob for entry in output.logprobs],
        "ranks": [entry.rank for entry in output.logprobs],
    }

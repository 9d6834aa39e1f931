"""`penstock batch`: a file of requests, in OpenAI's batch format or plain, into a file of completions."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penstock.cli import openai
from penstock.cli.job import Line, add_files, run_job
from penstock.cli.options import add_memory
from penstock.cli.output import completion_record
from penstock.cli.prompts import parse_prompt
from penstock.engine.request import Request
from penstock.engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from penstock.engine.forecast import Length
    from penstock.engine.llm import LLM
    from penstock.engine.outputs import RequestOutput

__all__ = ["add_to"]

PLAIN = {"max_tokens": 64, "temperature": 0.0}
"""What `penstock generate` does."""


def add_to(commands: Any) -> None:
    """Add the command to the parser's sub-commands."""
    parser = commands.add_parser(
        "batch",
        help="complete a file of requests, resumably",
        description="Complete a file of requests: OpenAI's batch lines, or prompts with sampling fields. "
        "Finished lines are journaled; the same command goes on where it stopped.",
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    add_files(parser)
    parser.add_argument("--chat", action="store_true", help="put plain prompts through the model's chat template")
    add_memory(parser)
    sampling = parser.add_argument_group("sampling, where a line does not say it (default: the format's own)")
    sampling.add_argument("--max-tokens", type=int, metavar="N")
    sampling.add_argument("--temperature", type=float, metavar="T", help="0 is greedy")
    sampling.add_argument("--top-p", type=float, metavar="P")
    sampling.add_argument("--top-k", type=int, metavar="K")
    sampling.add_argument("--seed", type=int, metavar="N")
    sampling.add_argument("--stop", action="append", metavar="TEXT", help="end at this text; may be repeated")
    sampling.add_argument("--ignore-eos", action="store_true", default=None, help="go on after the end of text")


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    names = ("max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "ignore_eos")
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    SamplingParams(**given)

    def parse(number: int, fields: dict[str, Any], llm: LLM) -> Line:
        if openai.is_openai(fields):
            return _openai_line(number, fields, llm, given)
        return _plain_line(number, fields, llm, given, chat=options.chat)

    def length_of(fields: dict[str, Any]) -> Length:
        return _length_of(fields, given)

    return run_job(options, parse, lambda llm: llm.stream, length_of, parameters=given | {"chat": options.chat})


def _length_of(fields: dict[str, Any], given: dict[str, Any]) -> Length:
    from penstock.engine.forecast import expected_length  # noqa: PLC0415 - numpy; --help must not

    if openai.is_openai(fields):
        _, prompt, params = openai.read_body(fields, given)
        return expected_length(prompt, params)
    plain = {name: value for name, value in fields.items() if name != "custom_id"}
    prompt, messages = parse_prompt(plain)
    return expected_length(prompt or messages, SamplingParams.from_mapping(PLAIN | given | plain))


def _openai_line(number: int, fields: dict[str, Any], llm: LLM, given: dict[str, Any]) -> Line:
    url, prompt, params = openai.read_body(fields, given)
    ids = isinstance(prompt, list) and url == openai.COMPLETIONS
    if url == openai.CHAT:
        prompt = llm.template(prompt)

    def record(output: RequestOutput) -> dict[str, Any]:
        made = openai.response(
            number, url, output, model=Path(llm.path).name, ids=ids, top_logprobs=params.logprobs or 0
        )
        return {"response": made}

    return Line(Request(number, prompt, params), record)


def _plain_line(number: int, fields: dict[str, Any], llm: LLM, given: dict[str, Any], *, chat: bool) -> Line:
    fields = {name: value for name, value in fields.items() if name != "custom_id"}
    prompt, messages = parse_prompt(fields)
    if chat and isinstance(prompt, str):
        messages = [{"role": "user", "content": prompt}]
    if messages is not None:
        prompt = llm.template(messages)

    def record(output: RequestOutput) -> dict[str, Any]:
        made = completion_record(output)
        del made["request_id"]
        return made

    return Line(Request(number, prompt, SamplingParams.from_mapping(PLAIN | given | fields)), record)

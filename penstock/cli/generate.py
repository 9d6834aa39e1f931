"""`penstock generate`: complete prompts with a model that need not fit anywhere."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from penstock.cli.codec import asked_codec
from penstock.cli.options import add_memory, open_llm, tiers_of
from penstock.cli.output import ProgressLine, ResultFile, check_output, completion_record, result_file
from penstock.cli.prompts import PromptLine, read_prompts
from penstock.engine.sampling_params import SamplingParams
from penstock.errors import ConfigError, PromptFileError, RequestError, VerificationError
from penstock.offload.tiers import MemoryTiers
from penstock.offload.trace import Trace

if TYPE_CHECKING:
    from penstock.engine.llm import LLM
    from penstock.engine.outputs import RequestOutput
    from penstock.engine.report import Progress
    from penstock.engine.verify import Verification

__all__ = ["add_to"]

EXAMPLE_PROMPTS = (
    "class Point:\n    def __init__(self, x, y):\n",
    "class Stack:\n    def __init__(self):\n",
    "import os\n\n\ndef read_file(path):\n",
)
"""What the bundled model completes when nothing else is asked of it."""


def add_to(commands: Any) -> None:
    """Add the command to the parser's sub-commands."""
    parser = commands.add_parser(
        "generate",
        help="complete prompts",
        description="Complete prompts with a model that is streamed through a memory budget, layer by layer.",
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    parser.add_argument("model", nargs="?", help="directory of a Hugging Face checkpoint (default: the bundled model)")
    prompts = parser.add_argument_group("prompts")
    prompts.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="a prompt; may be repeated")
    prompts.add_argument(
        "--prompts", metavar="FILE", help="a prompt per line (.txt), JSON lines (.jsonl), or - for stdin"
    )
    prompts.add_argument("--chat", action="store_true", help="put prompts through the model's chat template")
    add_memory(parser)
    sampling = parser.add_argument_group("sampling")
    defaults = SamplingParams(max_tokens=64, temperature=0.0)
    sampling.add_argument(
        "--max-tokens", type=int, default=defaults.max_tokens, metavar="N", help="default: %(default)s"
    )
    sampling.add_argument(
        "--temperature", type=float, default=defaults.temperature, metavar="T", help="0 is greedy, the default"
    )
    sampling.add_argument("--top-p", type=float, default=defaults.top_p, metavar="P")
    sampling.add_argument("--top-k", type=int, default=defaults.top_k, metavar="K")
    sampling.add_argument("--seed", type=int, default=defaults.seed, metavar="N")
    sampling.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end at this text; may be repeated"
    )
    sampling.add_argument("--ignore-eos", action="store_true", help="go on after the end of text")
    sampling.add_argument(
        "--logprobs", type=int, metavar="N", help="report log-probabilities of the N likeliest tokens"
    )
    results = parser.add_argument_group("results")
    results.add_argument("--output", metavar="FILE", help="write results there: .txt as text, else JSON lines")
    results.add_argument(
        "--json", action="store_true", help="print JSON lines; the last line of stdout is the run's summary"
    )
    results.add_argument("--trace", metavar="FILE", help="write what moved and computed when, for ui.perfetto.dev")
    results.add_argument("--verify", action="store_true", help="compare greedy tokens with in-memory Hugging Face")


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    defaults = SamplingParams(
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        seed=options.seed,
        stop=options.stop,
        ignore_eos=options.ignore_eos,
        logprobs=options.logprobs,
    )
    tiers = tiers_of(options)
    check_output(options.trace)
    lines = _prompt_lines(options)
    params = [_params(line, defaults) for line in lines]
    codec = asked_codec(options)
    if options.verify and codec is not None and codec.codec != "exact":
        fix = "Verify what `penstock pack` makes of it, or leave --verify out."
        raise ConfigError(
            "--verify compares with the weights as they are stored", got=f"--codec {codec.codec}", fix=fix
        )
    if options.verify and not all(each.is_greedy for each in params):
        raise ConfigError("--verify compares greedy tokens", wanted="--temperature 0", got="a request that samples")
    with result_file(options.output) if options.output else nullcontext() as file:
        return _generate(options, tiers, lines, params, file)


def _prompt_lines(options: argparse.Namespace) -> list[PromptLine]:
    lines = [PromptLine(prompt, where="--prompt") for prompt in options.prompt]
    if options.prompts:
        lines += read_prompts(options.prompts)
    if not lines and options.model is None:
        lines = [PromptLine(prompt, where="example") for prompt in EXAMPLE_PROMPTS]
    if not lines:
        raise ConfigError("no prompts", fix="Give --prompt TEXT or --prompts FILE.")
    if options.chat:
        lines = [_as_chat(line) for line in lines]
    return lines


def _as_chat(line: PromptLine) -> PromptLine:
    if not isinstance(line.prompt, str):
        return line
    return PromptLine(None, [{"role": "user", "content": line.prompt}], line.fields, line.where)


def _params(line: PromptLine, defaults: SamplingParams) -> SamplingParams:
    try:
        return SamplingParams.from_mapping(line.fields, defaults=defaults)
    except ConfigError as error:
        raise PromptFileError(str(error), file=line.where) from error


def _generate(
    options: argparse.Namespace,
    tiers: MemoryTiers,
    lines: list[PromptLine],
    params: list[SamplingParams],
    file: ResultFile | None,
) -> int:
    progress = ProgressLine()
    trace = Trace() if options.trace else None
    from penstock.engine.forecast import expected_length  # noqa: PLC0415 - numpy; --help must not

    expects = [expected_length(line.prompt or line.messages, one) for line, one in zip(lines, params, strict=True)]
    with open_llm(options, tiers, progress, trace=trace, expects=expects) as llm:
        prompts = [_prompt(llm, line) for line in lines]
        outputs = []
        for output in llm.stream(prompts, params, on_pass=lambda state: progress.show(_describe(state))):
            outputs.append(output)
            if file and not file.is_text:
                file.write(completion_record(output))
        progress.clear()
        outputs.sort(key=lambda output: int(output.request_id))
        if file and file.is_text:  # plain text has no ids: its order is the prompts'
            for output in outputs:
                file.write(completion_record(output))
        if not file:
            _print(outputs, as_json=options.json)
        report = llm.last_run
        if trace:
            trace.write(options.trace)
    assert report is not None
    if not options.json:
        print(f"{report.plan.explain()}\n{report.explain()}", file=sys.stderr)
    verified = _verify(options, outputs) if options.verify else None
    if options.json:
        print(json.dumps(report.as_dict() | ({"verify": verified.as_dict()} if verified else {})))
    if verified and not verified.passed:
        raise VerificationError("the tokens differ from in-memory Hugging Face", got=verified.explain())
    return 0


def _prompt(llm: LLM, line: PromptLine) -> Any:
    if line.messages is None:
        return line.prompt
    try:
        return llm.template(line.messages)
    except RequestError as error:
        raise PromptFileError(str(error), file=line.where) from error


def _describe(state: Progress) -> str:
    rate = state.generated_tokens / state.seconds if state.seconds else 0.0
    left = (state.expected_tokens - state.generated_tokens) / rate if rate else 0.0
    return (
        f"{state.num_finished}/{state.num_requests} prompts, {state.generated_tokens} tokens, {rate:.1f} tokens/s, "
        f"{state.traffic.device_bytes / max(state.seconds, 1e-9) / 1e9:.2f} GB/s, at most {left:.0f} s left"
    )


def _print(outputs: list[RequestOutput], *, as_json: bool) -> None:
    for output in outputs:
        if as_json:
            print(json.dumps(completion_record(output)))
        else:
            print(f"--- prompt {output.request_id} ({output.outputs[0].finish_reason})")
            print(f"{output.prompt or ''}{output.outputs[0].text}")


def _verify(options: argparse.Namespace, outputs: list[RequestOutput]) -> Verification:
    from penstock.engine.verify import verify  # noqa: PLC0415

    result = verify(options.model, outputs, dtype=options.dtype, device=options.device)
    print(result.explain(), file=sys.stderr)
    return result

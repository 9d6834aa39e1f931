"""`penstock pack` and `penstock quality`: smaller weights, and what that costs."""

from __future__ import annotations

import argparse
import json
import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from penstock.cli.codec import add_codec_details, codec_options
from penstock.cli.output import ProgressLine
from penstock.cli.settings import add_read_options, read_settings, stored_profile
from penstock.errors import ConfigError
from penstock.offload.codec import ACTIVATION_DTYPES
from penstock.offload.kv_dtype import KV_DTYPES, check_kv_dtype
from penstock.offload.tiers import format_size

if TYPE_CHECKING:
    from penstock.engine.kv_quality import KVPerplexity
    from penstock.engine.quality import LayerError, Perplexity

__all__ = ["add_to"]


def add_to(commands: Any) -> None:
    """Add the commands to the parser's sub-commands."""
    parser = commands.add_parser(
        "pack",
        help="make a smaller checkpoint",
        description="Code the weights of a checkpoint: bit for bit, or as small integers. After an interruption, the "
        "same command goes on where it stopped.",
        allow_abbrev=False,
    )
    parser.set_defaults(run=run_pack)
    parser.add_argument("model", help="directory of a Hugging Face checkpoint")
    parser.add_argument("out", help="directory to make; `penstock generate` takes it like any other")
    parser.add_argument(
        "--codec",
        required=True,
        choices=("exact", "exact-ans", "int8", "int4"),
        help="exact loses nothing; nor does exact-ans, which is smaller, and needs an NVIDIA GPU and penstock[nvcomp]",
    )
    add_codec_details(parser)
    parser.add_argument(
        "--search", action="store_true", help="try several scales for each group and keep the best; slow"
    )
    add_read_options(parser)
    parser.add_argument("--json", action="store_true", help="print the summary as one JSON object")
    parser = commands.add_parser(
        "quality",
        help="compare a packed checkpoint with its model, or dtypes of keys and values and of activations",
        description="Show the error of every layer's weights, and the perplexity of a text with either model; or the "
        "perplexity of a text with keys and values, or activations, in other dtypes.",
        allow_abbrev=False,
    )
    parser.set_defaults(run=run_quality)
    parser.add_argument("model", help="the checkpoint that was packed, or any")
    parser.add_argument("packed", nargs="?", help="what `penstock pack` made of it")
    parser.add_argument(
        "--text", metavar="FILE", help="a text to compute the perplexity of; to compare weights, both must fit memory"
    )
    parser.add_argument(
        "--kv-dtype",
        action="append",
        default=[],
        metavar="DTYPE",
        help=f"of keys and values, to compare with auto: {', '.join(KV_DTYPES[1:])}; may be repeated. The model is "
        "streamed",
    )
    parser.add_argument(
        "--activation-dtype",
        choices=ACTIVATION_DTYPES[1:],
        help="of what packed weights are multiplied with, to compare likewise",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    parser.add_argument("--dtype", default="auto", help="what to compute in (default: the checkpoint's)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run_pack(options: argparse.Namespace) -> int:
    """Run `penstock pack`."""
    choice = replace(codec_options(options), search=options.search or None).resolved()
    from penstock.engine.pack import pack  # noqa: PLC0415 - torch takes seconds to import; --help must not

    progress = ProgressLine()
    report = pack(
        options.model,
        options.out,
        choice,
        settings=read_settings(options, options.model, stored_profile(options.model)),
        on_progress=lambda done, total: progress.show(f"packed {format_size(done)} of {format_size(total)}"),
    )
    progress.clear()
    if options.json:
        print(json.dumps(report.as_dict()))
        return 0
    print(
        f"{options.out}: {format_size(report.packed_nbytes)} of {format_size(report.source_nbytes)} "
        f"({report.packed_nbytes / max(report.source_nbytes, 1):.3f}), {report.num_coded} tensors {report.codec}, "
        f"{report.num_plain} as they were, {report.seconds:.1f} s"
    )
    return 0


def run_quality(options: argparse.Namespace) -> int:
    """Run `penstock quality`."""
    if bool(options.packed) == bool(options.kv_dtype or options.activation_dtype):
        fix = "Give PACKED, or --kv-dtype or --activation-dtype; for these, give a packed checkpoint as the model."
        raise ConfigError("quality compares either weights or dtypes of a run", fix=fix)
    return _run_weights(options) if options.packed else _run_keys(options)


def _run_keys(options: argparse.Namespace) -> int:
    if options.text is None:
        raise ConfigError("dtypes of a run are compared by the perplexity of a text", fix="Add --text FILE.")
    names = [check_kv_dtype(name) for name in options.kv_dtype]
    from penstock.engine.kv_quality import kv_perplexities  # noqa: PLC0415

    _expect_long_texts()
    others = [options.activation_dtype] if options.activation_dtype else []
    where = {"dtype": options.dtype, "device": options.device}
    found = kv_perplexities(options.model, options.text, names, activation_dtypes=others, **where)
    print(json.dumps({"kv": [one.as_dict() for one in found]}) if options.json else _explain_keys(found))
    return 0


def _expect_long_texts() -> None:
    """Keep transformers, which must have been imported, from warning of texts that are longer than the context."""
    logging.getLogger("transformers").setLevel(logging.ERROR)


def _explain_keys(found: list[KVPerplexity]) -> str:
    lines = ["kv dtype  activations  bytes per token  perplexity  change"]
    lines += [
        f"{one.kv_dtype:<8}  {one.activation_dtype:<11}  {one.token_nbytes:>15}  {one.perplexity:>10.4f}  "
        f"{one.change * 100:+.3f} %"
        for one in found
    ]
    return "\n".join(lines)


def _run_weights(options: argparse.Namespace) -> int:
    from penstock.engine import quality  # noqa: PLC0415

    _expect_long_texts()
    errors = quality.layer_errors(options.model, options.packed)
    found = (
        quality.perplexity(options.model, options.packed, options.text, dtype=options.dtype, device=options.device)
        if options.text
        else None
    )
    print(json.dumps(_as_dict(errors, found)) if options.json else _explain(errors, found))
    return 0


def _as_dict(errors: list[LayerError], found: Perplexity | None) -> dict[str, Any]:
    made: dict[str, Any] = {"layers": [one.as_dict() for one in errors]}
    if found:
        made["perplexity"] = {
            "tokens": found.num_tokens,
            "model": found.model,
            "packed": found.packed,
            "change": found.change,
        }
    return made


def _explain(errors: list[LayerError], found: Perplexity | None) -> str:
    lines = ["layer  tensors  relative error  worst tensor"]
    lines += [
        f"{'-' if one.layer is None else one.layer:>5}  {one.num_tensors:>7}  {one.error:>14.6f}  "
        f"{one.worst} {one.worst_error:.6f}"
        for one in errors
    ]
    if found:
        lines.append(
            f"perplexity of {found.num_tokens} tokens: {found.model:.4f}, packed {found.packed:.4f} "
            f"({found.change * 100:+.3f} %)"
        )
    return "\n".join(lines)

"""`penstock plan`: where every byte of a model would go on a machine, how fast it would run, and what would help."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penstock.engine.blueprints import BLUEPRINTS
from penstock.errors import BudgetError, ConfigError, UnknownArchitectureError

if TYPE_CHECKING:
    from penstock.engine.anatomy import Anatomy
    from penstock.engine.forecast import Length
    from penstock.engine.proposal import Question
    from penstock.offload.machines import Hardware

__all__ = ["add_to"]


def add_to(commands: Any) -> None:
    """Add the command to the parser's sub-commands."""
    parser = commands.add_parser(
        "plan",
        help="predict a run: where every byte goes, how fast, and what would help",
        description="Predict how a model would run on this machine or another: where every byte goes, seconds of each "
        "resource, tokens per second, and what other hardware or smaller weights would buy. Reads config.json and "
        "headers; needs neither the weights nor the machine.",
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    parser.add_argument("model", nargs="?", help="directory of a Hugging Face checkpoint, or of its config.json alone")
    parser.add_argument("--shape", metavar="NAME", help="a model that Penstock knows the shape of, such as llama-3-70b")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16 (default: the config's)")
    parser.add_argument(
        "--kv-dtype", default="auto", help="what keys and values rest as: auto, bf16, fp8, int8, int4 (default: auto)"
    )
    parser.add_argument(
        "--codec",
        choices=("exact", "exact-ans", "int8", "int4"),
        help="plan for weights that `penstock pack` has made smaller",
    )
    work = parser.add_argument_group("work")
    work.add_argument("--prompt-len", type=int, default=512, metavar="N", help="default: %(default)s")
    work.add_argument("--gen-len", type=int, default=128, metavar="N", help="default: %(default)s")
    work.add_argument("--requests", type=int, default=256, metavar="N", help="default: %(default)s")
    work.add_argument(
        "--objective",
        choices=("throughput", "latency"),
        default="throughput",
        help="the whole job soonest, or a request soonest on average (default: %(default)s)",
    )
    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--hardware",
        metavar="FILE|NAME",
        help="a file of `penstock profile --json`, or a known machine (default: this one, as it was profiled)",
    )
    machine.add_argument("--device-memory", metavar="SIZE", help="budget on the device (default: 9/10 of it)")
    machine.add_argument("--host-memory", metavar="SIZE", help="budget of host RAM for layers (default: 8/10 of it)")
    machine.add_argument(
        "--kv-host-memory",
        metavar="SIZE",
        help="the part of the host budget for keys and values whose attention is computed there (default: the best)",
    )
    machine.add_argument(
        "--kv-nvme", metavar="SIZE", default=0, help="a scratch file for keys and values on the disk (default: none)"
    )
    machine.add_argument("--nvme", metavar="SIZE", help="how much may be left on disk (default: any amount)")
    parser.add_argument("--json", action="store_true", help="print nothing but one JSON object")


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    if (options.model is None) == (options.shape is None):
        raise ConfigError("plan needs a model or a shape", fix="Give either a MODEL directory or --shape NAME.")
    lengths = _lengths(options)
    from penstock.cli import plan_report  # noqa: PLC0415 - numpy, here and below; --help must not
    from penstock.engine.proposal import Question, budgets_of, nearest_that_fits, what_ifs  # noqa: PLC0415

    anatomy = _anatomy(options)
    hardware = _hardware(options)
    tiers = budgets_of(
        hardware,
        device=options.device_memory,
        host=options.host_memory,
        nvme=options.nvme,
        kv_host=options.kv_host_memory,
        kv_nvme=options.kv_nvme,
    )
    question = Question(anatomy, hardware, tiers, lengths, options.objective)
    _check_context(question)
    try:
        chosen = question.answer()
    except BudgetError as error:
        nearest = nearest_that_fits(question)
        if nearest is None:
            raise
        if options.json:
            print(json.dumps(plan_report.refusal_as_dict(question, error, nearest)))
        else:
            print(plan_report.refusal(question, error, nearest))
        return 1
    changes = what_ifs(question, chosen)
    if options.json:
        print(json.dumps(plan_report.as_dict(question, chosen, changes)))
    else:
        print(plan_report.explain(question, chosen, changes))
    return 0


def _lengths(options: argparse.Namespace) -> list[Length]:
    for name in ("prompt_len", "gen_len", "requests"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')}", wanted="at least 1", got=getattr(options, name))
    from penstock.engine.forecast import Length  # noqa: PLC0415

    return [Length(options.prompt_len, options.gen_len)] * options.requests


def _anatomy(options: argparse.Namespace) -> Anatomy:
    from penstock.engine.anatomy import anatomy_of, shape_directory, with_stored  # noqa: PLC0415

    directory = Path(options.model) if options.shape is None else shape_directory(options.shape)
    made = anatomy_of(directory, dtype=options.dtype, kv_dtype=options.kv_dtype)
    if made is not None:
        made = with_stored(made, directory)
    if made is None:
        made = _built(directory, options.dtype, options.kv_dtype)
    if options.codec:
        if reason := made.why_not_coded(options.codec):
            raise ConfigError(reason, got=f"--codec {options.codec}")
        return made.coded(options.codec)
    return made


def _built(directory: Path, dtype: str, kv_dtype: str) -> Anatomy:
    """Let transformers build a model that no blueprint describes, and run it once over zeros."""
    if not any(directory.glob("*.safetensors*")):
        raise UnknownArchitectureError(
            "the costs of this family are not known from its config alone", file=directory / "config.json",
            wanted=f"one of {', '.join(BLUEPRINTS)}", fix="Name a directory with weights, whose headers are read too.",
        )  # fmt: skip
    print("penstock: no blueprint of this family: importing torch to build it without weights", file=sys.stderr)
    from penstock.engine.rehearsal import dissect  # noqa: PLC0415 - torch

    return dissect(directory, dtype=dtype, kv_dtype=kv_dtype)


def _hardware(options: argparse.Namespace) -> Hardware:
    from penstock.cli.settings import stored_profile  # noqa: PLC0415
    from penstock.io.limits import available_memory  # noqa: PLC0415
    from penstock.offload.machines import HARDWARE, Hardware, find_hardware  # noqa: PLC0415

    path = options.model if options.model and os.path.isdir(options.model) else None
    if options.hardware:
        return find_hardware(options.hardware, path=path)
    profile = stored_profile(path)
    if profile is None:
        known = ", ".join(sorted(file.stem for file in HARDWARE.glob("*.json")))
        raise ConfigError(
            "this machine has not been measured",
            fix=f"Run `penstock profile` on the model's disk, or name a machine with --hardware: {known}.",
        )
    made = Hardware.of(profile, path=path)
    return replace(made, host_nbytes=min(made.host_nbytes, available_memory()))  # what others hold is not there


def _check_context(question: Question) -> None:
    limit, length = question.anatomy.context_length, question.lengths[0]
    if limit is not None and length.prompt + length.generated > limit:
        wanted = f"--prompt-len + --gen-len of at most {limit}"
        raise ConfigError("the work exceeds the model's context", wanted=wanted, got=length.prompt + length.generated)

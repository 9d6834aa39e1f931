"""The options of codecs, for packing to a new checkpoint and on load."""

from __future__ import annotations

import argparse
from typing import Any

from penstock.errors import ConfigError
from penstock.offload.codec import GROUP_SIZES, PackOptions

__all__ = ["CODECS", "add_codec", "add_codec_details", "asked_codec", "codec_options"]

CODECS = ("exact", "int8", "int4")


def add_codec(parser: Any) -> None:
    """Add packing on load to a command."""
    group = parser.add_argument_group("packing on load")
    group.add_argument(
        "--codec",
        choices=CODECS,
        help="code the layers of a plain checkpoint in host RAM, as `penstock pack` would; exact loses nothing. None "
        "is left on NVMe",
    )
    add_codec_details(group)


def add_codec_details(parser: Any) -> None:
    """Add what there is to say of a codec."""
    parser.add_argument(
        "--group-size",
        type=int,
        choices=GROUP_SIZES,
        help="weights that share a scale (default: 128 for int8, 64 for int4)",
    )
    parser.add_argument(
        "--symmetric",
        action=argparse.BooleanOptionalAction,
        help="groups without zero points (default: for int8, not for int4)",
    )
    parser.add_argument(
        "--exclude",
        action="append",
        default=[],
        metavar="PATTERN",
        help="leave these tensors as they are; may be repeated",
    )


def codec_options(options: argparse.Namespace) -> PackOptions:
    """Return what was said of a codec."""
    return PackOptions(
        options.codec,
        group_size=options.group_size,
        symmetric=options.symmetric,
        exclude=tuple(options.exclude),
    )


def asked_codec(options: argparse.Namespace) -> PackOptions | None:
    """Return the codec to pack with on load, if any. Raises ConfigError for options that do not suit it."""
    if options.codec is not None:
        return codec_options(options).resolved()
    given = [name for name in ("group_size", "symmetric", "exclude") if getattr(options, name) not in (None, [])]
    if given:
        raise ConfigError(f"--{given[0].replace('_', '-')} is for packing on load", fix="Add --codec, or leave it out.")
    return None

"""How commands that run a model read the disk: what the user says, else what `penstock profile` has found."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penstock.errors import PenstockError, ProfileError
from penstock.io.settings import ReadSettings
from penstock.offload.tiers import parse_size

__all__ = ["add_read_options", "kernel_directory", "read_settings", "stored_profile"]

if TYPE_CHECKING:
    from penstock.offload.hardware import HardwareProfile

logger = logging.getLogger("penstock.cli")


def add_read_options(group: Any) -> None:
    """Add the options to a group of a parser."""
    group.add_argument(
        "--io-backend",
        choices=("auto", "libaio", "threads", "aiofiles"),
        help="how the disk is read (default: the first that works)",
    )
    group.add_argument(
        "--io-block", metavar="SIZE", help="size of one request (default: as `penstock profile` found best)"
    )
    group.add_argument("--io-in-flight", metavar="SIZE", help="bytes under way at any time (default: likewise)")


def read_settings(
    options: argparse.Namespace, model: str | os.PathLike[str], profile: HardwareProfile | None
) -> ReadSettings:
    """Return the settings for a model's disk. Raises ConfigError and SizeError."""
    found = _recommended(model, profile) or ReadSettings()
    return ReadSettings(
        backend=options.io_backend or found.backend,
        block_nbytes=parse_size(options.io_block) if options.io_block else found.block_nbytes,
        in_flight_nbytes=parse_size(options.io_in_flight) if options.io_in_flight else found.in_flight_nbytes,
    )


def stored_profile(model: str | os.PathLike[str] | None) -> HardwareProfile | None:
    """Return what `penstock profile` has kept, or None where it has kept nothing.

    A profile that is damaged, or of another version, is said, and the machine measured again, with the disk of `model`.
    """
    from penstock.offload.hardware import HardwareProfile, profile_path  # noqa: PLC0415 - numpy

    path = profile_path(os.environ.get("XDG_CACHE_HOME"))
    if not path.exists():
        return None
    try:
        return HardwareProfile.load(path)
    except ProfileError as error:
        from penstock.cli.profile import QUICK, measure_again  # noqa: PLC0415 - only where it is needed

        print(f"penstock: {error} This is done now, in at most {QUICK:.0f} s.", file=sys.stderr)
        try:
            return measure_again(model, path)
        except PenstockError as why:
            logger.warning("this machine could not be measured: %s", why)
            return None


def kernel_directory() -> Path:
    """Return where code is kept that was compiled for this machine."""
    from penstock.offload.hardware import profile_path  # noqa: PLC0415 - numpy

    return profile_path(os.environ.get("XDG_CACHE_HOME")).parent / "kernels"


def _recommended(model: str | os.PathLike[str], profile: HardwareProfile | None) -> ReadSettings | None:
    try:
        found = profile.settings_for(model) if profile else None
    except OSError:
        return None  # opening the model will say what is wrong
    if found is not None and profile is not None:
        logger.info("the disk is read as the profile of %s recommends: %s", profile.started, found)
    return found

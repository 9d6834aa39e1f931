"""The tokenizer of a checkpoint directory, and the tokens that end its answers."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from penstock.errors import MissingFileError, ModelError

__all__ = ["end_token_ids", "load_tokenizer"]

_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt", "spiece.model")


def load_tokenizer(path: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """Load the tokenizer from the directory alone: no network, no code from the checkpoint.

    Raises MissingFileError where the directory holds none, ModelError where transformers cannot load it.
    """
    directory = Path(path)
    if not any((directory / name).exists() for name in _FILES):
        raise MissingFileError(
            "no tokenizer",
            file=directory,
            wanted="tokenizer.json or tokenizer.model",
            fix="Copy the tokenizer's files beside the model, or give token ids.",
        )
    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise ModelError(f"transformers cannot load the tokenizer: {error}", file=directory) from error


def end_token_ids(path: str | os.PathLike[str], config: Any, tokenizer: Any | None = None) -> frozenset[int]:
    """Return the tokens that end a sequence: generation_config.json's, or else the config's, or the tokenizer's."""
    file = Path(path) / "generation_config.json"
    named: Any = None
    if file.exists():
        try:
            named = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
            _as_ids(named)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise ModelError(f"not a generation config: {error}", file=file, fix="Download the file again.") from error
    if named is None:
        named = getattr(config.get_text_config(), "eos_token_id", None)
    if named is None:
        named = getattr(tokenizer, "eos_token_id", None)
    return _as_ids(named)


def _as_ids(named: Any) -> frozenset[int]:
    ids = named if isinstance(named, list) else [named]
    return frozenset(int(one) for one in ids if one is not None)

"""What keys and values, and activations, in fewer bits cost: the perplexity of a text, through the engine itself."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from os import PathLike
from typing import Any

from penstock.engine.llm import LLM
from penstock.engine.quality import WINDOW, tokens_of
from penstock.errors import RequestError

__all__ = ["KVPerplexity", "kv_perplexities"]


@dataclass(frozen=True, slots=True)
class KVPerplexity:
    """Of `num_tokens` tokens, the first of each window not counted; `change` is against both dtypes "auto".

    A token's keys and values take `token_nbytes` bytes in all layers together.
    """

    kv_dtype: str
    activation_dtype: str
    token_nbytes: int
    num_tokens: int
    perplexity: float
    change: float

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return asdict(self)


def kv_perplexities(
    model: str | PathLike[str],
    text: str | PathLike[str],
    kv_dtypes: Sequence[str],
    *,
    activation_dtypes: Sequence[str] = (),
    dtype: str = "auto",
    device: str = "auto",
) -> list[KVPerplexity]:
    """Return the perplexity of a text file with "auto" or one of `kv_dtypes`, and the same of `activation_dtypes`.

    The text is cut into windows, each predicted from an empty context, of `WINDOW` tokens or the model's context. The
    model is loaded once for each dtype and streamed, so it may be larger than memory. Raises PromptFileError for a
    text that cannot be used, and whatever `LLM` does.
    """
    found: list[KVPerplexity] = []
    for multiplied, kept in dict.fromkeys(product(("auto", *activation_dtypes), ("auto", *kv_dtypes))):
        with LLM(model, dtype=dtype, device=device, kv_dtype=kept, activation_dtype=multiplied) as llm:
            if llm.tokenizer is None:
                raise RequestError("the model has no tokenizer", file=llm.path)
            windows = list(_windows(tokens_of(text, llm.tokenizer), min(WINDOW, llm.context_length or WINDOW)))
            outputs = llm.score(windows)
        count = sum(len(output.token_ids) for output in outputs)
        perplexity = math.exp(-sum(output.logprob for output in outputs) / count)
        first = found[0].perplexity if found else perplexity
        change = perplexity / first - 1
        found.append(KVPerplexity(kept, multiplied, llm.kv_token_nbytes, count, perplexity, change))
    return found


def _windows(tokens: Sequence[int], size: int) -> Iterator[list[int]]:
    """Cut tokens into windows of `size`; one of a single token predicts nothing."""
    for begin in range(0, len(tokens) - 1, size):
        yield list(tokens[begin : begin + size])

"""How quantised checkpoints store a matrix: what their decoders must know, and no values.

Every form that is read here is a cousin of the others. For a matrix [R, C], such as the weight of a linear layer:

    value[r, c] = (code[r, c] - zero[r, g]) × scale[r // block rows, g]        g = index[c], or c // block columns

computed in float32 and rounded once to the dtype of the values. They differ in what a code is, and where it lies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["AWQ_SHIFTS", "Form", "Number", "Packing"]

Number = Literal["int", "e4m3", "e2m1"]
Packing = Literal["rows", "words", "awq"]

AWQ_SHIFTS = (0, 16, 4, 20, 8, 24, 12, 28)
"""Where in its word each of eight neighbours lies, in bits: even ones in the low half, odd ones in the high half."""


@dataclass(frozen=True, slots=True)
class Form:
    """The form of one matrix.

    `number` is what a code of `bits` bits stands for: an integer, or a small float with so many bits of exponent and
    mantissa. `block` is how many rows and columns share a scale; the last ones of a matrix may be fewer. `zero` is
    taken off every integer code, on top of what the stored zero points say.

    `packing` says where things lie. "rows": the codes of a row follow each other, first in the low half of a byte;
    scales are [row blocks, groups]. "words": [C / n, R] 32-bit words, each of n codes of one column, the first lowest.
    "awq": [C, R / 8] words, each of the 4-bit codes of one row of eight, in the order of `AWQ_SHIFTS`. With words,
    scales are [groups, R], and zero points [groups, R / n] words, packed alike. Beside rows, zero points are int8
    like the scales, or words [R / n, groups], each of n rows.
    """

    number: Number
    bits: Literal[4, 8]
    block: tuple[int, int]
    packing: Packing = "rows"
    zero: int = 0

    @property
    def per_word(self) -> int:
        """Codes in 32 bits."""
        return 32 // self.bits

    def grid(self, rows: int, columns: int) -> tuple[int, int]:
        """Return how many blocks of rows and of columns, which are the groups, a matrix has."""
        return -(-rows // self.block[0]), -(-columns // self.block[1])

"""Equations of Einsum that are the product of a value and a matrix."""

from __future__ import annotations

import dataclasses
import string

__all__ = ["Contraction", "parse_contraction"]


@dataclasses.dataclass(frozen=True, slots=True)
class Contraction:
    """sum over ``summed`` of value * weight: a letter for each axis.

    Attributes:
        value: axes of the value.
        weight: axes of the weight, which are those summed over and those made.
        result: axes of the result.
    """

    value: str
    weight: str
    result: str

    @property
    def summed(self) -> str:
        """The axes that value and weight share, in the value's order."""
        return "".join(letter for letter in self.value if letter in self.weight)

    @property
    def made(self) -> str:
        """The axes of the weight alone, in the order of the result."""
        return "".join(letter for letter in self.result if letter in self.weight)

    @property
    def kept(self) -> str:
        """The axes of the value alone, in the value's order."""
        return "".join(letter for letter in self.value if letter not in self.weight)


def parse_contraction(
    equation: str, rank: int | None = None, *, swapped: bool = False
) -> Contraction | None:
    """The contraction that ``equation`` stands for; None where it is another one than a product with a matrix.

    That is one where the weight shares axes with the value and has others, the result has exactly the axes that are
    not shared, and no operand has an axis twice.

    Args:
        equation: with two operands; an ellipsis may stand for axes of the value.
        rank: axes of the value, if that is known.
        swapped: the weight is the first of them.
    """
    left, arrow, result = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != 2:
        return None
    value, weight = reversed(terms) if swapped else terms
    if "." in equation:
        letters = value.replace("...", "")
        if not arrow or rank is None or rank < len(letters) or "..." not in value:
            return None
        more = [letter for letter in string.ascii_letters if letter not in equation]
        others = "".join(more[: rank - len(letters)])
        value, result = (term.replace("...", others) for term in (value, result))
        left = f"{value},{weight}"
    if not arrow:  # every letter that comes once, in alphabetical order
        result = "".join(sorted(letter for letter in value + weight if left.count(letter) == 1))
    if any(len(set(term)) != len(term) for term in (value, weight, result)):
        return None
    if not (value + weight + result).isalpha():
        return None
    found = Contraction(value, weight, result)
    free = set(value) ^ set(weight)
    if not found.summed or not found.made or set(result) != free:
        return None
    return found

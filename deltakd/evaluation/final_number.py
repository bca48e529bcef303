"""Score the final number of an answer, as worked problems such as GSM8K (arXiv 2110.14168) require."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from decimal import Decimal

#: A minus sign belongs to the number unless an operand precedes it: 5-3 and 25%-30% are two numbers each.
_NUMBER = re.compile(
    r"(?P<minus>(?<![\w.)\]%])[-−])?[$€£]?(?P<inner_minus>(?<=[$€£])[-−])?"
    r"(?P<digits>[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?|(?<![0-9])\.[0-9]+)"
)
#: Exactly four #, since headings and templates use other numbers of them.
_MARK = re.compile(r"(?<!#)####(?!#)[ \t]*")


def marked_number(text: str) -> Decimal | None:
    """Return the number right after the first ``####``; None without a mark or a number after it.

    The first mark counts, since a model that does not stop continues by inventing further problems.
    """
    mark = _MARK.search(text)
    number = _NUMBER.match(text, mark.end()) if mark else None
    return _value(number) if number else None


def last_number(text: str) -> Decimal | None:
    """Return the last number in the text, marked or not; None if there is none.

    Thousands separators, currency signs, a percent sign and a final period are not part of the number ("$1,200.00" is
    1200, "5 %." is 5); a fraction is two numbers.
    """
    found = None
    for number in _NUMBER.finditer(text):
        found = number
    return _value(found) if found else None


def expected_number(reference: str) -> Decimal | None:
    """Return the number that a reference asks for: its marked number or, without a mark, its last one."""
    return marked_number(reference) if _MARK.search(reference) else last_number(reference)


def final_number_scores(prediction: str, references: Sequence[str]) -> dict[str, float]:
    """Return ``final_number`` (after ``####``) and ``final_number_lenient`` (last in the text) in per cent: 0 or 100.

    Numbers are compared by value (18 equals 18.0) with those of all references.

    Raises:
        ValueError: a reference has no number.
    """
    wanted = [expected_number(reference) for reference in references]
    for number, reference in zip(wanted, references, strict=True):
        if number is None:
            raise ValueError(f"the reference {reference!r:.80} has no number to compare with")

    def score(read: Callable[[str], Decimal | None]) -> float:
        given = read(prediction)
        return 100.0 * (given is not None and given in wanted)

    return {"final_number": score(marked_number), "final_number_lenient": score(last_number)}


def _value(number: re.Match[str]) -> Decimal:
    digits = Decimal(number["digits"].replace(",", ""))
    return -digits if number["minus"] or number["inner_minus"] else digits

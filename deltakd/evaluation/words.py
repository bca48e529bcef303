"""The words of a text in any script, for scores that compare words."""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

#: How Unicode names the letters of scripts that put no space between words.
_WITHOUT_SPACES = (
    *("CJK ", "HIRAGANA", "KATAKANA", "HALFWIDTH KATAKANA", "BOPOMOFO", "IDEOGRAPHIC"),
    *("THAI", "LAO", "KHMER", "MYANMAR", "TAI ", "NEW TAI ", "JAVANESE", "BALINESE", "YI "),
)
#: Joiners: they shape adjacent letters (Persian, Hindi), and do not end a word.
_JOINERS = re.compile("[\u200c\u200d]")
#: Kinds of characters: letters and digits, letters that are words by themselves, marks on them, and all others.
_LETTER, _ALONE, _MARK, _BETWEEN = "letter", "alone", "mark", "between"


def ascii_words(text: str) -> list[str]:
    """Return the runs of a-z and 0-9 of the lower-cased text: the words of ``rouge_score``."""
    return re.findall("[a-z0-9]+", text.lower())


def unicode_words(text: str) -> list[str]:
    """Return the runs of letters and digits of all scripts, lower-cased; in scripts without spaces, single letters.

    A mark belongs to its base letter, and canonically equivalent texts (NFC) have equal words. For ASCII text, these
    are the words of ``ascii_words``.
    """
    words: list[str] = []
    before = _BETWEEN
    for character in unicodedata.normalize("NFC", _JOINERS.sub("", text).lower()):
        kind = _kind(character)
        if kind == _MARK:
            # It changes nothing: behind it the word goes on, or not, as before.
            if before != _BETWEEN:
                words[-1] += character
            continue
        if kind == _LETTER and before == _LETTER:
            words[-1] += character
        elif kind != _BETWEEN:
            words.append(character)
        before = kind
    return words


@lru_cache(maxsize=2**16)
def _kind(character: str) -> str:
    category = unicodedata.category(character)[0]
    if category == "L" and unicodedata.name(character, "").startswith(_WITHOUT_SPACES):
        return _ALONE
    return {"L": _LETTER, "N": _LETTER, "M": _MARK}.get(category, _BETWEEN)

"""What a template writes around an answer, and the text of an answer that a model wrote itself."""

from __future__ import annotations

import codecs
from typing import NamedTuple

from deltakd.data.encoding.segments import Template
from deltakd.data.sources.rows import Row, RowError

#: An answer to find in a rendered row; occurs in no template.
_MARK = "deltakdanswermark"


class AnswerFrame(NamedTuple):
    """What a template writes around an answer, as parts of the answer's segment.

    Args:
        before: between the prompt for generation and the answer: white space, or an empty block of reasoning.
        after: after the answer, the token that ends it included.
        closed: EOS follows, unless ``after`` ends with it.
    """

    before: str = ""
    after: str = ""
    closed: bool = True

    @classmethod
    def of(cls, template: Template) -> AnswerFrame:
        """Return the frame of a template; EOS alone if it writes no plain answer after a plain question."""
        try:
            segments = template.render(Row(0, instruction="Why?", responses=(_MARK,)))
        except RowError:
            return cls()
        trained = [segment for segment in segments if segment.trained]
        if not trained or _MARK not in trained[-1].text:
            return cls()
        before, _, after = trained[-1].text.partition(_MARK)
        return cls(before, after, trained[-1].closed)


def written_text(data: bytes, whole: bool) -> tuple[str, bool]:
    """Return the text of bytes that a model wrote, and True if they are UTF-8.

    U+FFFD stands for bytes that are not.

    Args:
        data: the bytes.
        whole: False: the model was stopped, so an incomplete character at the end is no fault; it is left out.
    """
    text = codecs.getincrementaldecoder("utf-8")("replace").decode(data, final=whole)
    return text, data.startswith(text.encode())

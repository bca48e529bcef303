r"""Problems with ``data.template`` as given in the config, found before any tokenizer is opened.

A shell or single quotes in YAML leave ``\n`` as a backslash and an n. The prompt would then contain both, and train
well enough that nobody notices.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deltakd.data.encoding.templates import plain_template

#: A line break spelled out as a backslash and an n.
_WRITTEN_BREAK = "\\n"


def template_problems(key: str, template: str | Mapping[str, Any]) -> list[str]:
    """Return a sentence per text that spells a line break as backslash and n; else why it is not a template."""
    texts = {} if isinstance(template, str) else template
    found = [
        f"{key}.{name} contains a backslash and an n, not a line break; write a real one: in YAML in double quotes, "
        f"{name}: \"...\\n...\", or in the shell by $'...\\n...'"
        for name, text in texts.items()
        if _WRITTEN_BREAK in str(text)
    ]
    if found:
        return found
    try:
        plain_template(template)
    except ValueError as error:
        return [f"{key}: {error}"]
    return []

"""What a family of chat templates must train, and short ways to write its template. ``{}`` stands for a content."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken

from tests.data.tokenizers import LLAMA3_SPLIT, byte_level, sentencepiece

#: How a conversation of several answers is trained: as one row; with data.split_turns alone.
ONE, SPLIT = "one row", "split_turns"
REFUSED = "refused"


@dataclass(frozen=True)
class Family:
    """A family of models.

    Args:
        name: of the family.
        template: its chat template.
        prompt: what it writes for a first question "Hi?", after the system prompt "Be kind." where there is one.
        answer: what is trained of the answer "Yes.", or the reason why none can be.
        control: its control tokens; the first is EOS.
        turns: how conversations are trained.
        reasoning: what is trained of the answer "Yes." with the reasoning "Hm."; REFUSED: it is left out.
        kind: its tokenizer.
        system: False if it knows no system prompt.
        strip: white space after a control token is part of it.
        parts: its template reads a content as a list of parts.
        merges: its tokenizer merges the end of the prompt with the beginning of an answer.
    """

    name: str
    template: str
    prompt: str
    answer: str
    control: str
    turns: str = ONE
    reasoning: str = REFUSED
    kind: Callable[[], Any] = lambda: byte_level((), LLAMA3_SPLIT)
    system: bool = True
    strip: bool = False
    parts: bool = False
    merges: bool = False

    def tokenizer(self) -> Any:
        """A small tokenizer of the family's kind, with its control tokens and template."""
        tokenizer = self.kind()
        names = self.control.split()
        tokens = [AddedToken(name, special=True, normalized=False, rstrip=self.strip) for name in names]
        tokenizer.add_special_tokens({"additional_special_tokens": tokens})
        tokenizer.eos_token = names[0]
        tokenizer.chat_template = self.template
        return tokenizer


def turns(user: str, assistant: str, ask: str, system: str | None = None, start: str = "") -> str:
    """A template that writes each turn by itself; ``ask`` opens an answer."""
    said = "{{ m['content'] | trim }}"
    refuse = "{{ raise_exception('there is no system role') }}"
    written = refuse if system is None else system.replace("{}", said)
    return (
        f"{start}{{% for m in messages %}}{{% if m['role'] == 'system' %}}{written}"
        f"{{% elif m['role'] == 'user' %}}{user.replace('{}', said)}"
        f"{{% else %}}{assistant.replace('{}', said)}{{% endif %}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{ask}{{% endif %}}"
    )


def by_role(before: str, after: str, ask: str, start: str = "", role: str = "m['role']") -> str:
    """A template that writes all roles alike; ``%`` stands for the role."""
    before = before.replace("%", "{{ " + role + " }}")
    return (
        f"{start}{{% for m in messages %}}{before}{{{{ m['content'] | trim }}}}{after}"
        f"{{% endfor %}}{{% if add_generation_prompt %}}{ask}{{% endif %}}"
    )


def thinking(ask: str, last: str, earlier: str) -> str:
    """ChatML whose last answer is written with its reasoning, R, and earlier ones without."""
    reason = "{{ (m.reasoning_content or '') | trim }}"
    forms = [form.replace("R", reason).replace("{}", "{{ m.content | trim }}") for form in (last, earlier)]
    return (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% if loop.last %}"
        f"{forms[0]}{{% else %}}{forms[1]}{{% endif %}}{{% else %}}{{{{ m.content }}}}{{% endif %}}<|im_end|>\n"
        f"{{% endfor %}}{{% if add_generation_prompt %}}<|im_start|>assistant\n{ask}{{% endif %}}"
    )


def gpt2() -> Any:
    """Splits as GPT-2 does."""
    return byte_level([("Ċ", "Ċ")])


def llama2() -> Any:
    """SentencePiece BPE, with a blank before a text and after each control token."""
    return sentencepiece("prepend", [("▁", "Y"), ("▁", "H"), ("H", "i")])


def metaspace() -> Any:
    """SentencePiece BPE, with a blank before a text alone."""
    return sentencepiece("metaspace", [("▁", "Y"), ("▁", "H"), ("H", "i")])

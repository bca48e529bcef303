"""Chat templates in the manner of some fifty model families, with what each must train.

Written for these tests after the families' control tokens and quirks; none is a copy.
"""

from __future__ import annotations

from tests.data.template_families_chatml import CHATML_FAMILIES, IM
from tests.data.template_family import SPLIT, Family, by_role, gpt2, llama2, metaspace, turns
from tests.data.tokenizers import unigram

LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ bos_token }}[INST] {{ system if loop.first }}{{ m['content'] | trim }} [/INST]"
    "{% else %} {{ m['content'] | trim }} {{ eos_token }}{% endif %}{% endfor %}"
)
PARTS = (
    "<|im_start|>{% for m in messages %}{{ m.role | capitalize }}:{% for part in m.content %}"
    "{% if part.type == 'image' %}<image>{% else %} {{ part.text }}{% endif %}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
GEMMA = by_role(
    "<start_of_turn>%\n",
    "<end_of_turn>\n",
    "<start_of_turn>model\n",
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}",
    "'model' if m['role'] == 'assistant' else m['role']",
)
GEMMA3 = (
    "{{ bos_token }}{% set ns = namespace(first='') %}{% for m in messages %}{% if m.role == 'system' %}"
    "{% set ns.first = m.content + '\n\n' %}{% else %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ ns.first }}{{ m.content | trim }}<end_of_turn>\n{% set ns.first = '' %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
LLAMA3_HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n"
LLAMA3 = by_role(
    LLAMA3_HEADER.replace("{}", "%"), "<|eot_id|>", LLAMA3_HEADER.replace("{}", "assistant"), "<|begin_of_text|>"
)
LLAMA3_TOKENS = "<|eot_id|> <|begin_of_text|> <|start_header_id|> <|end_header_id|>"
PHI3 = (
    turns("<|user|>\n{}<|end|>\n", "<|assistant|>\n{}<|end|>\n", "<|assistant|>\n", "<|system|>\n{}<|end|>\n")
    + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
)
PHI3_TOKENS = "<|endoftext|> <|end|> <|user|> <|assistant|> <|system|>"


FAMILIES = [
    *CHATML_FAMILIES,
    Family(
        "Llama 2", LLAMA2, "<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nHi? [/INST]", " Yes. </s>", "</s>", kind=llama2
    ),
    Family(
        "Llama 3",
        LLAMA3,
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "Yes.<|eot_id|>",
        LLAMA3_TOKENS,
    ),
    Family(
        "Llama 3.1, with a date",
        LLAMA3.replace(
            "{% for m",
            "<|start_header_id|>system<|end_header_id|>\n\nToday: {{ strftime_now('%Y')[:1] }}<|eot_id|>{% for m",
            1,
        ),
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nToday: 2<|eot_id|>"
        "<|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "Yes.<|eot_id|>",
        LLAMA3_TOKENS,
    ),
    Family(
        "Llama 4",
        by_role("<|header_start|>%<|header_end|>\n\n", "<|eot|>", "<|header_start|>assistant<|header_end|>\n\n"),
        "<|header_start|>system<|header_end|>\n\nBe kind.<|eot|><|header_start|>user<|header_end|>\n\nHi?<|eot|>"
        "<|header_start|>assistant<|header_end|>\n\n",
        "Yes.<|eot|>",
        "<|eot|> <|header_start|> <|header_end|>",
    ),
    Family(
        "Mistral v1",
        turns(" [INST] {} [/INST]", " {}</s>", "", None, "{{ bos_token }}"),
        "<s> [INST] Hi? [/INST]",
        " Yes.</s>",
        "</s>",
        kind=llama2,
        system=False,
    ),
    Family(
        "Mistral v3, Mixtral",
        turns("[INST] {}[/INST]", " {}</s>", "", None, "{{ bos_token }}"),
        "<s>[INST] Hi?[/INST]",
        " Yes.</s>",
        "</s> [INST] [/INST]",
        kind=metaspace,
        system=False,
    ),
    Family(
        "Mistral Small, Tekken",
        turns("[INST]{}[/INST]", "{}</s>", "", "[SYSTEM_PROMPT]{}[/SYSTEM_PROMPT]", "<s>"),
        "<s>[SYSTEM_PROMPT]Be kind.[/SYSTEM_PROMPT][INST]Hi?[/INST]",
        "Yes.</s>",
        "</s> <s> [INST] [/INST] [SYSTEM_PROMPT] [/SYSTEM_PROMPT]",
    ),
    Family(
        "Gemma, Gemma 2",
        GEMMA,
        "<s><start_of_turn>user\nHi?<end_of_turn>\n<start_of_turn>model\n",
        "Yes.<end_of_turn>",
        "<eos> <start_of_turn> <end_of_turn>",
        kind=unigram,
        system=False,
    ),
    Family(
        "Gemma 3",
        GEMMA3,
        "<s><start_of_turn>user\nBe kind.\n\nHi?<end_of_turn>\n<start_of_turn>model\n",
        "Yes.<end_of_turn>",
        "<eos> <start_of_turn> <end_of_turn>",
        kind=unigram,
    ),
    Family(
        "Phi-3",
        PHI3,
        "<|system|>\nBe kind.<|end|>\n<|user|>\nHi?<|end|>\n<|assistant|>\n",
        "Yes.<|end|>\n<|endoftext|>",
        PHI3_TOKENS,
        kind=llama2,
        strip=True,
    ),
    Family(
        "Phi-4",
        by_role("<|im_start|>%<|im_sep|>", "<|im_end|>", "<|im_start|>assistant<|im_sep|>"),
        "<|im_start|>system<|im_sep|>Be kind.<|im_end|><|im_start|>user<|im_sep|>Hi?<|im_end|>"
        "<|im_start|>assistant<|im_sep|>",
        "Yes.<|im_end|>",
        IM + " <|im_sep|>",
    ),
    Family(
        "Phi-4-mini",
        by_role("<|%|>", "<|end|>", "<|assistant|>"),
        "<|system|>Be kind.<|end|><|user|>Hi?<|end|><|assistant|>",
        "Yes.<|end|>",
        PHI3_TOKENS,
    ),
    Family(
        "Granite 3",
        by_role("<|start_of_role|>%<|end_of_role|>", "<|end_of_text|>\n", "<|start_of_role|>assistant<|end_of_role|>"),
        "<|start_of_role|>system<|end_of_role|>Be kind.<|end_of_text|>\n<|start_of_role|>user<|end_of_role|>Hi?"
        "<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>",
        "Yes.<|end_of_text|>",
        "<|end_of_text|> <|start_of_role|> <|end_of_role|>",
        kind=gpt2,
    ),
    Family(
        "OLMo 2, Tulu 3",
        turns("<|user|>\n{}\n", "<|assistant|>\n{}{{ eos_token }}\n", "<|assistant|>\n", "<|system|>\n{}\n"),
        "<|system|>\nBe kind.\n<|user|>\nHi?\n<|assistant|>\n",
        "Yes.<|endoftext|>",
        "<|endoftext|>",
    ),
    Family(
        "Zephyr, TinyLlama",
        by_role("<|%|>\n", "{{ eos_token }}\n", "<|assistant|>\n"),
        "<|system|>\nBe kind.</s>\n<|user|>\nHi?</s>\n<|assistant|>\n",
        "Yes.</s>",
        "</s>",
        kind=llama2,
    ),
    Family(
        "StableLM 2",
        by_role("<|%|>\n", "<|endoftext|>\n", "<|assistant|>\n"),
        "<|system|>\nBe kind.<|endoftext|>\n<|user|>\nHi?<|endoftext|>\n<|assistant|>\n",
        "Yes.<|endoftext|>",
        "<|endoftext|> <|user|> <|assistant|> <|system|>",
    ),
    Family(
        "Vicuna",
        turns(" USER: {}", " ASSISTANT: {}</s>", " ASSISTANT:", "{}", "{{ bos_token }}"),
        "<s>Be kind. USER: Hi? ASSISTANT:",
        " Yes.</s>",
        "</s>",
        kind=llama2,
    ),
    Family(
        "Solar",
        turns("### User:\n{}\n\n", "### Assistant:\n{}\n\n", "### Assistant:\n", "### System:\n{}\n\n"),
        "### System:\nBe kind.\n\n### User:\nHi?\n\n### Assistant:\n",
        "Yes.",
        "</s>",
        SPLIT,
        kind=llama2,
    ),
    Family(
        "Falcon",
        turns("User: {}\n\n", "Falcon: {}\n\n", "Falcon:", "{}\n\n"),
        "Be kind.\n\nUser: Hi?\n\nFalcon:",
        " Yes.",
        "<|endoftext|>",
        SPLIT,
        kind=gpt2,
    ),
    Family(
        "Falcon 3",
        turns("<|user|>\n{}\n", "<|assistant|>\n{}{{ eos_token }}\n", "<|assistant|>\n", "<|system|>\n{}\n"),
        "<|system|>\nBe kind.\n<|user|>\nHi?\n<|assistant|>\n",
        "Yes.<|endoftext|>",
        "<|endoftext|> <|user|> <|assistant|> <|system|>",
    ),
    Family(
        "Command R",
        by_role(
            "<|START|><|%|>",
            "<|END|>",
            "<|START|><|CHATBOT|>",
            "<BOS>",
            "'CHATBOT' if m['role'] == 'assistant' else m['role'] | upper",
        ),
        "<BOS><|START|><|SYSTEM|>Be kind.<|END|><|START|><|USER|>Hi?<|END|><|START|><|CHATBOT|>",
        "Yes.<|END|>",
        "<|END|> <BOS> <|START|> <|SYSTEM|> <|USER|> <|CHATBOT|>",
    ),
    Family(
        "OpenChat",
        turns(
            "GPT4 Correct User: {}<|end_of_turn|>",
            "GPT4 Correct Assistant: {}<|end_of_turn|>",
            "GPT4 Correct Assistant:",
            None,
            "{{ bos_token }}",
        ),
        "<s>GPT4 Correct User: Hi?<|end_of_turn|>GPT4 Correct Assistant:",
        " Yes.<|end_of_turn|>",
        "<|end_of_turn|>",
        kind=llama2,
        system=False,
    ),
    Family(
        "EXAONE",
        turns("[|user|]{}\n", "[|assistant|]{}[|endofturn|]\n", "[|assistant|]", "[|system|]{}[|endofturn|]\n"),
        "[|system|]Be kind.[|endofturn|]\n[|user|]Hi?\n[|assistant|]",
        "Yes.[|endofturn|]",
        "[|endofturn|] [|user|] [|assistant|] [|system|]",
    ),
    Family(
        "Jamba",
        by_role("<|bom|><|%|> ", "<|eom|>", "<|bom|><|assistant|>", "{{ bos_token }}"),
        "<s><|bom|><|system|> Be kind.<|eom|><|bom|><|user|> Hi?<|eom|><|bom|><|assistant|>",
        " Yes.<|eom|>",
        "<|eom|> <|bom|> <|user|> <|assistant|> <|system|>",
        kind=metaspace,
    ),
    Family(
        "Seed-OSS",
        by_role("<seed:bos>%\n", "<seed:eos>", "<seed:bos>assistant\n"),
        "<seed:bos>system\nBe kind.<seed:eos><seed:bos>user\nHi?<seed:eos><seed:bos>assistant\n",
        "Yes.<seed:eos>",
        "<seed:eos> <seed:bos>",
    ),
    Family(
        "ERNIE 4.5",
        turns("User: {}\n", "Assistant: {}<|end_of_sentence|>", "Assistant: ", "{}\n", "<|begin_of_sentence|>"),
        "<|begin_of_sentence|>Be kind.\nUser: Hi?\nAssistant: ",
        "Yes.<|end_of_sentence|>",
        "<|end_of_sentence|> <|begin_of_sentence|>",
        kind=metaspace,
        merges=True,
    ),
    Family(
        "SmolVLM, Idefics 3",
        PARTS,
        "<|im_start|>System: Be kind.<end_of_utterance>\nUser: Hi?<end_of_utterance>\nAssistant:",
        " Yes.<end_of_utterance>",
        "<end_of_utterance> <|im_start|> <image>",
        parts=True,
    ),
]

"""Templates in the manner of ChatML, of reasoning models, and of others with roles as control tokens."""

from __future__ import annotations

from tests.data.template_family import SPLIT, Family, by_role, gpt2, llama2, metaspace, thinking, turns

CHATML = by_role("<|im_start|>%\n", "<|im_end|>\n", "<|im_start|>assistant\n")
CHATML_PROMPT = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n"
IM = "<|im_end|> <|im_start|>"
#: The template's own words where there is no system prompt.
DEFAULT = "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
R1 = turns(
    "<｜User｜>{}",
    "<｜Assistant｜>{}<｜end▁of▁sentence｜>",
    "<｜Assistant｜><think>\n",
    "{}",
    "<｜begin▁of▁sentence｜>",
).replace("<｜Assistant｜>{{ m['content'] | trim }}", "<｜Assistant｜>{{ m['content'].split('</think>')[-1] | trim }}")
HARMONY = (
    "<|start|>system<|message|>You help.<|end|>{% for m in messages %}{% if m.role == 'system' %}"
    "<|start|>developer<|message|>{{ m.content }}<|end|>{% elif m.role == 'user' %}"
    "<|start|>user<|message|>{{ m.content }}<|end|>{% elif loop.last and not add_generation_prompt %}"
    "{% if m.thinking %}<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{% endif %}"
    "<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|return|>{% else %}"
    "<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
SMOLLM3 = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}<|im_start|>assistant\n<think>\n\n</think>\n"
    "{{ m.content }}<|im_end|>\n{% endgeneration %}{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n{% endif %}"
)
GLM = turns("<|user|>\n{}", "<|assistant|>\n{}", "<|assistant|>", "<|system|>\n{}", "[gMASK]<sop>")
GLM_PROMPT = "[gMASK]<sop><|system|>\nBe kind.<|user|>\nHi?<|assistant|>"
GLM_TOKENS = "<|endoftext|> [gMASK] <sop> <|system|> <|user|> <|assistant|> <|observation|>"

CHATML_FAMILIES = [
    Family("ChatML: Yi, OpenHermes", CHATML, CHATML_PROMPT, "Yes.<|im_end|>", IM),
    Family("ChatML on GPT-2", CHATML, CHATML_PROMPT, "Yes.<|im_end|>", IM, kind=gpt2),
    Family("ChatML on Llama 2", CHATML, CHATML_PROMPT, "Yes.<|im_end|>", IM, kind=llama2),
    Family("ChatML, control tokens not added", CHATML, CHATML_PROMPT, "Yes.<|im_end|>", "<|endoftext|>", kind=gpt2),
    Family("Qwen 2.5", DEFAULT + CHATML, CHATML_PROMPT, "Yes.<|im_end|>", IM),
    Family(
        "Qwen 3",
        thinking("", "<think>\nR\n</think>\n\n{}", "{}"),
        CHATML_PROMPT,
        "<think>\n\n</think>\n\nYes.<|im_end|>",
        IM,
        SPLIT,
        "<think>\nHm.\n</think>\n\nYes.<|im_end|>",
    ),
    Family(
        "Qwen 3 Thinking, Qwen 3.5",
        thinking("<think>\n", "<think>\nR\n</think>\n\n{}", "{}"),
        CHATML_PROMPT + "<think>\n",
        "\n</think>\n\nYes.<|im_end|>",
        IM,
        SPLIT,
        "Hm.\n</think>\n\nYes.<|im_end|>",
    ),
    Family(
        "QwQ",
        thinking("<think>\n", "{}", "{}"),
        CHATML_PROMPT + "<think>\n",
        "turn 2 holds no reasoning",
        IM,
        SPLIT,
        "Hm.\n</think>\n\nYes.<|im_end|>",
    ),
    Family("SmolLM 2", DEFAULT + CHATML, CHATML_PROMPT, "Yes.<|im_end|>", IM, kind=gpt2),
    Family("SmolLM 3", SMOLLM3, CHATML_PROMPT + "<think>\n\n</think>\n", "Yes.<|im_end|>", IM),
    Family(
        "InternLM 2",
        "{{ bos_token }}" + CHATML,
        "<s>" + CHATML_PROMPT,
        "Yes.<|im_end|>",
        IM,
        kind=llama2,
    ),
    Family(
        "LFM 2",
        "<|startoftext|>" + CHATML,
        "<|startoftext|>" + CHATML_PROMPT,
        "Yes.<|im_end|>",
        IM + " <|startoftext|>",
    ),
    Family(
        "Magistral",
        turns(
            "[INST]{}[/INST]", "{% if m.thinking %}[THINK]{{ m.thinking }}[/THINK]{% endif %}{}</s>", "", "{}", "<s>"
        ),
        "<s>Be kind.[INST]Hi?[/INST]",
        "Yes.</s>",
        "</s> <s> [INST] [/INST] [THINK] [/THINK]",
        reasoning="[THINK]Hm.[/THINK]Yes.</s>",
    ),
    Family(
        "DeepSeek-V2",
        turns("User: {}\n\n", "Assistant: {}<｜end▁of▁sentence｜>", "Assistant:", "{}\n\n", "<｜begin▁of▁sentence｜>"),
        "<｜begin▁of▁sentence｜>Be kind.\n\nUser: Hi?\n\nAssistant:",
        " Yes.<｜end▁of▁sentence｜>",
        "<｜end▁of▁sentence｜> <｜begin▁of▁sentence｜>",
    ),
    Family(
        "DeepSeek-V3",
        turns(
            "<｜User｜>{}", "<｜Assistant｜>{}<｜end▁of▁sentence｜>", "<｜Assistant｜>", "{}", "<｜begin▁of▁sentence｜>"
        ),
        "<｜begin▁of▁sentence｜>Be kind.<｜User｜>Hi?<｜Assistant｜>",
        "Yes.<｜end▁of▁sentence｜>",
        "<｜end▁of▁sentence｜> <｜begin▁of▁sentence｜> <｜User｜> <｜Assistant｜>",
    ),
    Family(
        "DeepSeek-V3.1",
        turns(
            "<｜User｜>{}",
            "<｜Assistant｜></think>{}<｜end▁of▁sentence｜>",
            "<｜Assistant｜></think>",
            "{}",
            "<｜begin▁of▁sentence｜>",
        ),
        "<｜begin▁of▁sentence｜>Be kind.<｜User｜>Hi?<｜Assistant｜></think>",
        "Yes.<｜end▁of▁sentence｜>",
        "<｜end▁of▁sentence｜> <｜begin▁of▁sentence｜> <｜User｜> <｜Assistant｜>",
    ),
    Family(
        "DeepSeek-R1",
        R1,
        "<｜begin▁of▁sentence｜>Be kind.<｜User｜>Hi?<｜Assistant｜><think>\n",
        "turn 2 holds no reasoning",
        "<｜end▁of▁sentence｜> <｜begin▁of▁sentence｜> <｜User｜> <｜Assistant｜>",
        SPLIT,
        "Hm.\n</think>\n\nYes.<｜end▁of▁sentence｜>",
    ),
    Family("GLM-4", GLM, GLM_PROMPT, "\nYes.", GLM_TOKENS, SPLIT),
    Family(
        "GLM-4.5",
        GLM.replace("<|assistant|>\n{{", "<|assistant|>\n<think>{{ m.reasoning_content or '' }}</think>\n{{"),
        GLM_PROMPT,
        "\n<think></think>\nYes.",
        GLM_TOKENS,
        SPLIT,
        "\n<think>Hm.</think>\nYes.",
    ),
    Family(
        "ChatGLM 3",
        by_role("<|%|>\n ", "", "<|assistant|>", "[gMASK]<sop>"),
        "[gMASK]<sop><|system|>\n Be kind.<|user|>\n Hi?<|assistant|>",
        "\n Yes.",
        GLM_TOKENS,
        SPLIT,
        kind=metaspace,
    ),
    Family(
        "gpt-oss",
        HARMONY,
        "<|start|>system<|message|>You help.<|end|><|start|>developer<|message|>Be kind.<|end|>"
        "<|start|>user<|message|>Hi?<|end|><|start|>assistant",
        "<|channel|>final<|message|>Yes.<|return|>",
        "<|return|> <|start|> <|message|> <|end|> <|channel|>",
        SPLIT,
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes.<|return|>",
    ),
    Family(
        "Nemotron Nano",
        turns(
            "<SPECIAL_11>User\n{}\n",
            "<SPECIAL_11>Assistant\n{% if loop.last %}<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n"
            "{% endif %}{}\n<SPECIAL_12>\n",
            "<SPECIAL_11>Assistant\n<think>\n",
            "<SPECIAL_10>System\n{}\n",
        ),
        "<SPECIAL_10>System\nBe kind.\n<SPECIAL_11>User\nHi?\n<SPECIAL_11>Assistant\n<think>\n",
        "\n</think>\n\nYes.\n<SPECIAL_12>",
        "<SPECIAL_12> <SPECIAL_10> <SPECIAL_11>",
        SPLIT,
        "Hm.\n</think>\n\nYes.\n<SPECIAL_12>",
    ),
    Family(
        "Nemotron-4, Minitron",
        turns(
            "<extra_id_1>User\n{}\n",
            "<extra_id_1>Assistant\n{}\n",
            "<extra_id_1>Assistant\n",
            "<extra_id_0>System\n{}\n",
        ),
        "<extra_id_0>System\nBe kind.\n<extra_id_1>User\nHi?\n<extra_id_1>Assistant\n",
        "Yes.",
        "</s> <extra_id_0> <extra_id_1>",
        SPLIT,
        kind=metaspace,
    ),
    Family(
        "Baichuan 2",
        turns("<reserved_106>{}", "<reserved_107>{}", "<reserved_107>", "{}"),
        "Be kind.<reserved_106>Hi?<reserved_107>",
        "Yes.",
        "</s> <reserved_106> <reserved_107>",
        SPLIT,
        kind=metaspace,
    ),
    Family(
        "Hunyuan",
        turns("{}<|extra_0|>", "{}<|eos|>", "", "{}<|extra_4|>", "<|startoftext|>"),
        "<|startoftext|>Be kind.<|extra_4|>Hi?<|extra_0|>",
        "Yes.<|eos|>",
        "<|eos|> <|startoftext|> <|extra_0|> <|extra_4|>",
    ),
    Family(
        "Kimi K2",
        by_role("<|im_%|>%<|im_middle|>", "<|im_end|>", "<|im_assistant|>assistant<|im_middle|>"),
        "<|im_system|>system<|im_middle|>Be kind.<|im_end|><|im_user|>user<|im_middle|>Hi?<|im_end|>"
        "<|im_assistant|>assistant<|im_middle|>",
        "Yes.<|im_end|>",
        "<|im_end|> <|im_user|> <|im_assistant|> <|im_system|> <|im_middle|>",
    ),
    Family(
        "MiniMax",
        by_role("]~b]%\n", "[e~[\n", "]~b]ai\n", "]~!b[", "'ai' if m['role'] == 'assistant' else m['role']"),
        "]~!b[]~b]system\nBe kind.[e~[\n]~b]user\nHi?[e~[\n]~b]ai\n",
        "Yes.[e~[",
        "[e~[ ]~b] ]~!b[",
    ),
    Family(
        "a template that ignores add_generation_prompt",
        by_role("<|im_start|>%\n", "<|im_end|>\n", ""),
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi?<|im_end|>\n",
        "<|im_start|>assistant\nYes.<|im_end|>",
        IM,
    ),
    Family(
        "a template that counts its turns",
        "{{ messages | length }}\n" + CHATML,
        "2\n" + CHATML_PROMPT,
        "does not begin with the prompt that it writes for generation",
        IM,
    ),
    Family(
        "a template that shortens answers",
        CHATML.replace("{{ m['content'] | trim }}", "{{ m['content'][:3] }}"),
        CHATML_PROMPT.replace("Be kind.", "Be "),
        "the template leaves out a part of the answer: 'Yes.' is not in what would be trained",
        IM,
    ),
]

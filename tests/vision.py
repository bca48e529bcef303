"""Small random models that read images, and rows with images drawn on the spot."""

from __future__ import annotations

import json
from base64 import b64encode
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    PreTrainedTokenizerBase,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests.tiny import make_tokenizer, write_rows

FAMILIES = ("qwen2_vl", "idefics3")
COLOURS = ("red", "blue", "green", "yellow")
_IMAGES = {"qwen2_vl": "<|vision_start|><|image_pad|><|vision_end|>", "idefics3": "<image>"}
_CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{% if p.type == 'image' %}IMAGE{% else %}{{ p.text }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_TOKENS = {
    "qwen2_vl": ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"],
    "idefics3": ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>"]
    + [f"<row_{i}_col_{j}>" for i in (1, 2) for j in (1, 2)],
}
_TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "pad_token_id": None,
}


def save_vision_model(directory: Path, *, seed: int, family: str = "qwen2_vl", pixels: int = 56) -> Path:
    """A random model with tokenizer and processor, as a Hugging Face directory; nothing needs torchvision."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", *_TOKENS[family]]})
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.chat_template = _CHAT.replace("IMAGE", _IMAGES[family])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model, processor = (_qwen2_vl if family == "qwen2_vl" else _idefics3)(tokenizer, pixels)
    for parameter in model.parameters():
        # At their initial size a tiny model hardly looks at its images.
        if parameter.ndim > 1:
            parameter.data.mul_(3.0)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    (directory / "processor_config.json").write_text(json.dumps(processor), encoding="utf-8")
    return directory


def _qwen2_vl(tokenizer: PreTrainedTokenizerBase, pixels: int) -> tuple[Any, dict[str, Any]]:
    ids: Any = tokenizer.convert_tokens_to_ids
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    config = Qwen2VLConfig(
        text_config=_TEXT | {"vocab_size": len(tokenizer), "rope_parameters": rope, "eos_token_id": ids("<|im_end|>")},
        vision_config={"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2},
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
    )
    images = Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=pixels * pixels)
    processor = {"processor_class": "Qwen2VLProcessor", "image_processor": images.to_dict()}
    return Qwen2VLForConditionalGeneration(config), processor


def _idefics3(tokenizer: PreTrainedTokenizerBase, pixels: int) -> tuple[Any, dict[str, Any]]:
    ids: Any = tokenizer.convert_tokens_to_ids
    special = {"vocab_size": len(tokenizer), "eos_token_id": ids("<|im_end|>")}
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    other: dict[str, Any] = {"pad_token_id": 0}
    config = Idefics3Config(
        **other,
        text_config=_TEXT | special | {"model_type": "llama"},
        vision_config=vision | {"image_size": 32, "patch_size": 8},
        scale_factor=2,
        image_token_id=ids("<image>"),
    )
    images = Idefics3ImageProcessorPil(size={"longest_edge": pixels}, max_image_size={"longest_edge": 32})
    processor = {"processor_class": "Idefics3Processor", "image_seq_len": 4, "image_processor": images.to_dict()}
    return Idefics3ForConditionalGeneration(config), processor


def draw(path: Path, colour: str, size: tuple[int, int]) -> Path:
    image = Image.new("RGB", size, "white")
    ImageDraw.Draw(image).rectangle((2, 2, size[0] // 2, size[1] // 2), fill=colour)
    image.save(path)
    return path


def image_rows(folder: Path, n: int, *, first: int = 0, text_too: bool = False) -> list[dict[str, Any]]:
    """Rows with one image each, every third with two of other sizes (one of them as bytes)."""
    folder.mkdir(exist_ok=True)
    rows = []
    for i in range(first, first + n):
        colour = COLOURS[i % len(COLOURS)]
        path = draw(folder / f"{i}.png", colour, (28 + 4 * (i % 8), 56 - 4 * (i % 5)))
        parts = [{"type": "image", "image": str(path)}, {"type": "text", "text": f"colour {i}"}]
        if i % 3 == 0:
            data = "data:image/png;base64," + b64encode(path.read_bytes()).decode()
            parts.insert(0, {"type": "image", "image": data})
        if text_too and i % 4 == 1:
            parts = parts[-1:]
        turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": f"{colour} it is"}]
        rows.append({"messages": turns})
    return rows


def write_images(folder: Path, n: int, **options: Any) -> str:
    return str(write_rows(folder.with_suffix(".jsonl"), image_rows(folder, n, **options)))

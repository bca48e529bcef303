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
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedTokenizerBase,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.smolvlm import processing_smolvlm
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from tests.tiny import make_tokenizer, write_rows

# SmolVLM's processor asks for num2words, which it needs for videos alone.
processing_smolvlm.num2words = processing_smolvlm.num2words or str

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "idefics3", "smolvlm", "llava_onevision")
COLOURS = ("red", "blue", "green", "yellow")
_QWEN = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
_IDEFICS = ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>"]
_IDEFICS += [f"<row_{i}_col_{j}>" for i in (1, 2) for j in (1, 2)]
_TOKENS = {
    "qwen2_vl": _QWEN,
    "qwen2_5_vl": _QWEN,
    "idefics3": _IDEFICS,
    "smolvlm": _IDEFICS,
    "llava_onevision": ["<image>", "<video>"],
}
_CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{% if p.type == 'image' %}IMAGE{% else %}{{ p.text }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
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


def save_vision_model(directory: Path, *, seed: int, family: str = "qwen2_vl", pixels: int = 64) -> Path:
    """A random model with tokenizer and processor, as a Hugging Face directory; nothing needs torchvision."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", *_TOKENS[family]]})
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.chat_template = _CHAT.replace(
        "IMAGE", "<image>" if "<image>" in _TOKENS[family] else "<|vision_start|><|image_pad|><|vision_end|>"
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        make = _llava_onevision if family == "llava_onevision" else _qwen if "qwen" in family else _idefics3
        model, processor = make(tokenizer, pixels, family)
    for parameter in model.parameters():
        # At their initial size a tiny model hardly looks at its images.
        if parameter.ndim > 1:
            parameter.data.mul_(3.0)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    (directory / "processor_config.json").write_text(json.dumps(processor), encoding="utf-8")
    return directory


def _qwen(tokenizer: PreTrainedTokenizerBase, pixels: int, family: str) -> tuple[Any, dict[str, Any]]:
    ids: Any = tokenizer.convert_tokens_to_ids
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    vision: dict[str, Any] = {"depth": 1, "num_heads": 2}
    if family == "qwen2_vl":
        vision |= {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2}
    else:
        vision |= {"hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 24, "fullatt_block_indexes": [0]}
    known: Any = {
        "qwen2_vl": (Qwen2VLConfig, Qwen2VLForConditionalGeneration, "Qwen2VLProcessor"),
        "qwen2_5_vl": (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, "Qwen2_5_VLProcessor"),
    }
    make_config, make_model, processor = known[family]
    config = make_config(
        text_config=_TEXT | {"vocab_size": len(tokenizer), "rope_parameters": rope, "eos_token_id": ids("<|im_end|>")},
        vision_config=vision,
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
    )
    images = Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=pixels * pixels)
    return make_model(config), {"processor_class": processor, "image_processor": images.to_dict()}


def _idefics3(tokenizer: PreTrainedTokenizerBase, pixels: int, family: str) -> tuple[Any, dict[str, Any]]:
    ids: Any = tokenizer.convert_tokens_to_ids
    special = {"vocab_size": len(tokenizer), "eos_token_id": ids("<|im_end|>")}
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    other: dict[str, Any] = {"pad_token_id": 0}
    known: Any = {
        "idefics3": (Idefics3Config, Idefics3ForConditionalGeneration, Idefics3ImageProcessorPil, "Idefics3Processor"),
        "smolvlm": (SmolVLMConfig, SmolVLMForConditionalGeneration, SmolVLMImageProcessorPil, "SmolVLMProcessor"),
    }
    make_config, make_model, make_images, processor = known[family]
    config = make_config(
        **other,
        text_config=_TEXT | special | {"model_type": "llama"},
        vision_config=vision | {"image_size": 32, "patch_size": 8},
        scale_factor=2,
        image_token_id=ids("<image>"),
    )
    images = make_images(size={"longest_edge": pixels}, max_image_size={"longest_edge": 32})
    said = {"processor_class": processor, "image_seq_len": 4, "image_processor": images.to_dict()}
    return make_model(config), said


def _llava_onevision(tokenizer: PreTrainedTokenizerBase, pixels: int, family: str) -> tuple[Any, dict[str, Any]]:
    ids: Any = tokenizer.convert_tokens_to_ids
    special = {"vocab_size": len(tokenizer), "eos_token_id": ids("<|im_end|>"), "model_type": "qwen2"}
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    grid = [[32, 32], [32, pixels], [pixels, 32]]
    config = LlavaOnevisionConfig(
        text_config=_TEXT | special,
        vision_config=vision | {"model_type": "siglip_vision_model", "image_size": 32, "patch_size": 16},
        image_grid_pinpoints=grid,
        image_token_index=ids("<image>"),
        video_token_index=ids("<video>"),
    )
    images = LlavaOnevisionImageProcessorPil(size={"height": 32, "width": 32}, image_grid_pinpoints=grid)
    said = {"processor_class": "LlavaOnevisionProcessor", "num_image_tokens": 4, "image_processor": images.to_dict()}
    said |= {"vision_feature_select_strategy": "full"}
    return LlavaOnevisionForConditionalGeneration(config), said


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

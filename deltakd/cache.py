"""A cache of references: ``python -m deltakd.cache experiment=delta_kd_gpt2 reference.path=DIR [key=value ...]``."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from deltakd.cli import guarded, make_parser, parse
from deltakd.config.compose import compose_config

log = logging.getLogger(__name__)

USAGE = """Run the references once, so that training runs read them from disk.

  python -m deltakd.cache experiment=delta_kd_gpt2 reference=cached reference.path=DIR [key=value ...]

Overrides are those of deltakd.train; the same ones, given to deltakd.train, then train from the cache. What is stored:
  reference.store=hidden   last hidden states: exact, for every loss, delta_weight and temperature (the default)
  reference.store=topk     log-probs of K tokens and the rest: small, approximate, for one temperature
                           [reference.k=64, or reference.target_error=0.01, by which K is chosen]
  reference.remake=true    make damaged files again
  reference.url=URL        ask a vLLM or SGLang server for the teacher's log-probs, with reference.store=topk
                           reference.k=20 [reference.raw_url=URL for its raw self, by vLLM]
  reference.log_probs=FILE read the teacher's log-probs from a file, with reference.store=topk
Started again with the same reference.path it continues where it stopped.
"""


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser("cache", USAGE)
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, as for deltakd.train")
    overrides = parse(parser, argv).overrides
    guarded(lambda: make_cache(overrides), "the same command")


def make_cache(overrides: Sequence[str]) -> dict[str, Any]:
    """Create or complete the cache at ``reference.path``, and log its content; see ``run_caching``.

    Args:
        overrides: Hydra overrides; ``reference`` defaults to ``cached``.
    """
    given = any(override.startswith("reference=") for override in overrides)
    cfg = compose_config("train", overrides if given else ["reference=cached", *overrides])
    # This imports torch and all models; --help and a mistyped key should not wait for it.
    from deltakd.references.fill import in_units
    from deltakd.studies.stages import run_caching

    summary = run_caching(cfg)
    log.info(
        "%s: %d rows, %d tokens, %s (%d bytes per token). A training reads it with reference=cached reference.path=%s.",
        cfg.reference.path,
        summary["rows"],
        summary["tokens"],
        in_units(summary["bytes"]),
        summary["bytes_per_token"],
        cfg.reference.path,
    )
    return summary


if __name__ == "__main__":
    main()

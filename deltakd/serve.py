"""A server of references: ``python -m deltakd.serve experiment=NAME reference.url=URL [key=value ...]``."""

from __future__ import annotations

import logging
import signal
from collections.abc import Sequence
from typing import Any

from deltakd.cli import guarded, make_parser, parse
from deltakd.config.compose import compose_config

log = logging.getLogger(__name__)

USAGE = """Hold the references of training runs in this process; the runs ask it for hidden states, never logits.

  python -m deltakd.serve experiment=delta_kd_gpt2 reference=served reference.url=tcp://127.0.0.1:7711 [key=value ...]

Overrides are those of deltakd.train; the same ones, given to deltakd.train, then train with these references. Several
runs can share the server if they name the same references; their data, seeds and delta weights may differ. No data are
read here. Models that need several GPUs: torchrun --nproc-per-node N -m deltakd.serve ... reference.sharding=shard (or
tensor). Addresses:
  tcp://127.0.0.1:7711     for processes of this machine; another address of it: also for other machines
  unix:///path/to/socket   for this user's processes of this machine
Runs need the server's token: the variable DELTAKD_SERVE_TOKEN, or ~/.deltakd/serve_token, which the server makes.
Ctrl-C ends the server. Runs wait for its return for reference.wait_s seconds, then save their state and stop.
"""


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser("serve", USAGE)
    parser.add_argument("--listen", metavar="URL", help="listen there, if trainers reach it under another address")
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, as for deltakd.train")
    given = parse(parser, argv)
    guarded(lambda: serve(given.overrides, given.listen), "the same command")


def serve(overrides: Sequence[str], listen: str | None = None) -> None:
    """Serve the references of a run until the process is told to stop.

    Args:
        overrides: Hydra overrides; ``reference`` defaults to ``served``.
        listen: the address, if it is not ``reference.url``.
    """
    given = any(override.startswith("reference=") for override in overrides)
    cfg = compose_config("train", overrides if given else ["reference=served", *overrides])
    # This imports torch and all models; --help and a mistyped key should not wait for it.
    from deltakd.config.build import make_serving_settings
    from deltakd.distributed.ranks import is_main_process
    from deltakd.references.serving.address import Address
    from deltakd.training.serving import make_server, open_served

    settings = make_serving_settings(cfg)
    address = None if listen is None else Address.parse(listen, "--listen")
    if not is_main_process():
        # Signals reach all processes; the first one ends the others, between two requests.
        for name in ("SIGINT", "SIGTERM"):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
        open_served(settings).team().follow()
        return
    server = make_server(settings, address)
    log.info(
        "Serving %s at %s until Ctrl-C. A training run asks for them with these overrides and reference.url=%s.",
        ", ".join(settings.read_roles),
        listen or cfg.reference.url,
        cfg.reference.url,
    )

    def stop(*_: Any) -> None:
        server.stop()

    for name in ("SIGINT", "SIGTERM"):
        signal.signal(getattr(signal, name), stop)
    server.run()
    log.info("Stopped; nothing is lost: trainers ask again when the server is back.")


if __name__ == "__main__":
    main()

"""What a server of references costs and saves, on random models made on the spot.

    python experiments/benchmark_served/benchmark.py
    python experiments/benchmark_served/benchmark.py --student 2 128 --teacher 4 256 --rounds 5

Two CPU cores: the student and live references take both, or the student has one and the server's process the other.
The ways take turns over the same micro-batches, forward, loss and backward; a way's time is its fastest round. All
compute the same loss, which is checked. Then answers alone go from one process to another by each transport.

On a GPU (``--device cuda``), server and student share it, and CUDA IPC is measured beside copies through the CPU.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import resource
import secrets
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from deltakd.config.build import make_settings
from deltakd.config.compose import compose_config
from deltakd.data.batches.ahead import begun_ahead
from deltakd.io.files import write_text
from deltakd.io.run_directory import RunDirectory
from deltakd.models import train_tokenizer
from deltakd.references import ServedReferences
from deltakd.references.serving.secret import TOKEN_VARIABLE
from deltakd.references.serving.transports import Offers, choose
from deltakd.references.serving.wire import receive, send
from deltakd.training.assembly import load_parts
from deltakd.training.fit import make_data, make_module
from deltakd.training.module import DistillationModule
from deltakd.types import Batch

LIVE, ALONE = "live, both cores", "live, one core"
SFT = "no references, one core"


def by(transport: str, ahead: int) -> str:
    """Return the name of a way."""
    return f"served by {transport}, {ahead} ahead, a core each"


def make_inputs(options: argparse.Namespace) -> None:
    """Write rows of random words, and random models with a tokenizer trained on them."""
    draws = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = ["".join(draws.choice(letters, 5)) for _ in range(4 * options.vocabulary)]

    def text(count: int) -> str:
        return " ".join(words[index] for index in draws.zipf(1.2, count) % len(words))

    rows = [f'{{"instruction": "{text(12)}", "output": "{text(options.words)}"}}' for _ in range(options.rows)]
    write_text(options.folder / "rows.jsonl", "\n".join(rows))
    tokenizer = train_tokenizer([text(20_000) + " " + " ".join(words)], options.vocabulary, False)
    shapes = {"student": options.student, "teacher": options.teacher, "teacher_raw": options.teacher}
    for seed, (role, (layers, width)) in enumerate(shapes.items()):
        torch.manual_seed(seed)
        ends = dict.fromkeys(("bos_token_id", "eos_token_id"), tokenizer.eos_token_id)
        config = GPT2Config(
            n_layer=layers, n_embd=width, n_head=max(1, width // 32), n_positions=512, vocab_size=len(tokenizer), **ends
        )
        shutil.rmtree(options.folder / role, ignore_errors=True)
        GPT2LMHeadModel(config).save_pretrained(options.folder / role)
        tokenizer.save_pretrained(options.folder / role)


def common(options: argparse.Namespace, loss: str) -> list[str]:
    """Return the overrides that all ways share."""
    folder = options.folder
    return [
        f"loss={loss}",
        *(f"model.{role}.path={folder / role}" for role in ("student", "teacher", "teacher_raw")),
        f"data.train={folder / 'rows.jsonl'}",
        f"data.cache_dir={folder / 'tokens'}",
        "data.max_length=512",
        f"data.batch_size={options.batch_size}",
        "evaluation=none",
        "logger=csv",
        f"trainer.accelerator={options.device}",
    ]


@contextmanager
def serving(overrides: Sequence[str], log_file: Path) -> Iterator[None]:
    """Run a server on one thread while the context lasts."""
    with log_file.open("w") as log:
        command = [sys.executable, "-m", "deltakd.serve", *overrides]
        server = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=log, stderr=log)
        try:
            yield
        finally:
            server.terminate()
            server.wait()


@dataclass
class Way:
    """One way to get the references' heads.

    Args:
        overrides: of the run.
        threads: of the student's process.
        ahead: micro-batches to ask for in advance.
    """

    overrides: list[str]
    threads: int
    ahead: int = 0


@dataclass
class Loaded:
    """A way, ready to run."""

    way: Way
    module: DistillationModule
    batches: list[Batch]
    seconds: float = float("inf")
    waited: float = 0.0
    cpu: float = 0.0
    loss: float = 0.0

    @property
    def served(self) -> ServedReferences | None:
        """The references, if a server runs them."""
        found = self.module.step.references
        return found if isinstance(found, ServedReferences) else None

    def run(self) -> None:
        """Run all batches once; keep the round if it is the fastest."""
        torch.set_num_threads(self.way.threads)
        served = self.served
        device = next(self.module.student.parameters()).device
        batches: Iterable[Batch] = self.batches
        started, cpu = time.perf_counter(), time.process_time()
        if served is not None:
            served.take_wait_seconds()
            batches = begun_ahead(map(served.read_ahead, batches), self.way.ahead)
        loss = 0.0
        for batch in batches:
            total, _ = self.module.step(batch.to(device))
            (total / batch.step_tokens).backward()
            self.module.zero_grad()
            loss += float(total.detach())
        seconds = time.perf_counter() - started
        waited = served.take_wait_seconds() if served is not None else 0.0
        self.loss = loss
        if seconds < self.seconds:
            self.seconds, self.waited, self.cpu = seconds, waited, time.process_time() - cpu


def load(way: Way, options: argparse.Namespace) -> Loaded:
    """Load a way's models and its first batches."""
    settings = make_settings(compose_config("train", way.overrides))
    parts = load_parts(settings, RunDirectory(options.folder / "none"))
    data = make_data(parts, ranks=1)
    module = make_module(parts, data.total_steps)
    # Without dropout: all ways compute one loss.
    module.student.eval()
    device = torch.device(options.device)
    module.to(device)
    if module.step.references is not None:
        module.step.references.to(device)
    return Loaded(way, module, list(islice(iter(data.train_dataloader()), options.batches)))


def show(loaded: dict[str, Loaded], options: argparse.Namespace) -> None:
    """Print the times and the bytes."""
    live = loaded[LIVE]
    tokens = sum(len(batch.labels_N) for batch in live.batches)
    table = Table(title=f"{options.batches} batches, {tokens / options.batches:.0f} valid tokens each")
    for column in ("way", "ms a step", "of live", "waiting, ms a step", "CPU ms of the run"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for name, one in loaded.items():
        table.add_row(
            name,
            f"{1e3 * one.seconds / options.batches:.1f}",
            f"{one.seconds / live.seconds:.2f}",
            "" if one.served is None else f"{1e3 * one.waited / options.batches:.1f}",
            f"{1e3 * one.cpu / options.batches:.1f}",
        )
    console = Console(width=120)
    console.print(table)
    one = next(one for one in loaded.values() if one.served is not None)
    assert one.served is not None
    sent, received = one.served.traffic
    heads = one.served.empty_heads().values()
    logits = sum(head.weight.shape[0] * 4 for head in heads)
    count = tokens * options.rounds
    console.print(
        f"Bytes a valid token: {sent / count:.0f} sent and {received / count:.0f} received; float32 logits of the same "
        f"{len(heads)} models: {logits}, {logits / (sent / count + received / count):.0f} times as many."
    )


def show_overlap(without: Loaded, ahead: Loaded, options: argparse.Namespace) -> None:
    """Print how much of the server's time asking ahead hides."""
    waits = [1e3 * one.waited / options.batches for one in (without, ahead)]
    Console(width=120).print(
        f"A step that asks when it starts waits {waits[0]:.1f} ms for the server; one that asked {ahead.way.ahead} "
        f"ahead {waits[1]:.1f} ms: {100 * (1 - waits[1] / waits[0]):.0f}% of the server's work is hidden."
    )


def serve_alone(connection: socket.socket, name: str, answer: Tensor, count: int) -> None:
    """Send an answer many times by a transport, as a server does."""
    sender, offer = Offers(answer.device).make([name])[name]
    send(connection, {"offers": {name: offer}})
    # What is offered is given up for a larger answer: the trainer tries it first.
    assert receive(connection, 0).header["transport"] == name
    sender.meet(connection)
    for _ in range(count):
        header, rest = sender.place({"teacher": answer})
        # Here the trainer may have to be heard before the answer can leave.
        sending = threading.Thread(target=sender.deliver, args=(connection, header, rest))
        sending.start()
        while sender.hear(said := receive(connection, 0).header) and "read" not in said:
            pass
        sending.join()
    sender.close()


def move_alone(name: str, options: argparse.Namespace) -> tuple[float, float]:
    """Return GB/s in the fastest of three rounds, and CPU seconds a GB of both processes, for answers between them."""
    rounds, count, answer = 3, 16, torch.ones(2048, options.megabytes * 2**20 // 2048 // 4)
    ours, theirs = socket.socketpair()
    arguments = (theirs, name, answer, rounds * count)
    child = multiprocessing.get_context("fork").Process(target=serve_alone, args=arguments, daemon=True)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    child.start()
    theirs.close()
    receiver = choose([name], receive(ours, 0).header["offers"]).receiver
    send(ours, {"transport": name})
    if receiver is not None:
        receiver.meet(ours, lambda said: send(ours, said) and None)
    cpu, fastest = time.process_time(), float("inf")
    for _ in range(rounds):
        started = time.perf_counter()
        for _ in range(count):
            frame = receive(ours, None)
            tensors, said = (frame.tensors, {}) if receiver is None else receiver.take(frame.header["placed"])
            # As a loss does, whatever the transport.
            assert float(tensors["teacher"].sum()) == answer.numel()
            send(ours, {"free": [], "read": True, **said})
            del frame, tensors
        fastest = min(fastest, time.perf_counter() - started)
    cpu = time.process_time() - cpu
    child.join()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu += after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    if receiver is not None:
        receiver.close()
    size = count * answer.nbytes / 1e9
    return size / fastest, cpu / (rounds * size)


def show_transports(options: argparse.Namespace) -> None:
    """Print how fast answers go between two processes of this machine."""
    table = Table(title=f"Answers of {options.megabytes} MiB, one after the other")
    for column in ("transport", "GB/s", "CPU s a GB, both sides"):
        table.add_column(column, justify="left" if column == "transport" else "right")
    # Gloo last: its threads are started after the others have forked.
    for name in ("socket", "shared_memory", "gloo"):
        speed, cpu = move_alone(name, options)
        table.add_row(name, f"{speed:.2f}", f"{cpu:.2f}")
    Console(width=120).print(table)


def main() -> None:
    """Parse and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("outputs/benchmark_served"))
    parser.add_argument("--student", type=int, nargs=2, metavar=("LAYERS", "WIDTH"), default=(2, 128))
    parser.add_argument("--teacher", type=int, nargs=2, metavar=("LAYERS", "WIDTH"), default=(4, 256))
    parser.add_argument("--vocabulary", type=int, default=8000)
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--words", type=int, default=30, help="of a response")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--batches", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--megabytes", type=int, default=32, help="of an answer that is moved alone")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    options.folder = options.folder.resolve()
    options.folder.mkdir(parents=True, exist_ok=True)
    # First, and on one thread: it forks, and threads of OpenMP do not survive that.
    torch.set_num_threads(1)
    show_transports(options)
    make_inputs(options)
    os.environ[TOKEN_VARIABLE] = secrets.token_urlsafe(32)
    asking = [*common(options, "delta_kd"), "reference=served", "reference.url=tcp://127.0.0.1:7791"]
    ways = {
        SFT: Way(common(options, "sft"), 1),
        LIVE: Way(common(options, "delta_kd"), 2),
        ALONE: Way(common(options, "delta_kd"), 1),
    }
    fastest = "cuda_ipc" if options.device == "cuda" else "shared_memory"
    transports = dict.fromkeys(("socket", "gloo", "shared_memory", fastest))
    for transport, ahead in [*((transport, 2) for transport in transports), (fastest, 0), (fastest, 4)]:
        name = by(transport, ahead)
        ways[name] = Way([*asking, f"reference.ahead={ahead}", f"reference.transport={transport}"], 1, ahead)
    with serving(asking, options.folder / "server.log"):
        loaded = {name: load(way, options) for name, way in ways.items()}
        for _ in range(options.rounds):
            for one in loaded.values():
                one.run()
        losses = {name: one.loss for name, one in loaded.items() if name != SFT}
        assert np.allclose(list(losses.values()), losses[LIVE], rtol=1e-5), losses
        show(loaded, options)
        show_overlap(loaded[by(fastest, 0)], loaded[by(fastest, 2)], options)
        for one in loaded.values():
            if one.served is not None:
                one.served.close()


if __name__ == "__main__":
    main()

"""The server of references: it runs frozen models on the micro-batches of trainers, and sends hidden states back."""

from __future__ import annotations

import logging
import queue
import socket
import threading
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from deltakd.io.errors import LostServerError
from deltakd.models import LanguageModel
from deltakd.references.serving.address import GREETING_SECONDS, Address, keep_alive
from deltakd.references.serving.endpoints import Sender, UnavailableError
from deltakd.references.serving.fair_queue import FairQueue
from deltakd.references.serving.requests import MOST_BYTES
from deltakd.references.serving.secret import greet_as_server
from deltakd.references.serving.team import Sharding, Team
from deltakd.references.serving.transports import Offers
from deltakd.references.serving.wire import Frame, WireError, receive, send
from deltakd.types import Head

log = logging.getLogger(__name__)

#: Seconds between two signs of life to a trainer that waits.
BEAT_SECONDS = 5.0
#: Seconds between two log lines about what was served.
LOGGED_SECONDS = 30.0
#: Requests of one trainer in the server.
_MOST_OPEN = 64
#: Seconds between looks at whether to stop.
_PATIENCE = 0.2


@dataclass(frozen=True)
class Served:
    """What a server holds.

    Args:
        models: role -> model.
        content: everything that determines its answers, for trainers to compare; JSON.
        device: where the models run.
        packing: lay rows end to end.
        sharding: how several processes hold the models.
    """

    models: Mapping[str, LanguageModel]
    content: Mapping[str, Any]
    device: torch.device
    packing: bool = False
    sharding: Sharding = "replicate"

    def team(self) -> Team:
        """Return what runs the models. Collective: call in every process of the server, once."""
        limits = self.content["vocabulary"], self.content["positions"]
        return Team(self.models, self.device, self.sharding, self.packing, *limits)


@final
class ReferenceServer:
    """Listens, and answers in the thread that calls ``run``; connections have threads of their own.

    Args:
        served: the models.
        address: where to listen.
        token: that trainers have to know.

    Raises:
        ValueError: the address can't be listened on.
    """

    def __init__(self, served: Served, address: Address, token: bytes) -> None:
        self._served = served
        self._token = token
        self._address = address
        self._queue: FairQueue[_Trainer, Frame] = FairQueue(_MOST_OPEN)
        # Heads first: sharding leaves nobody the whole of them.
        self._empty = _empty_heads(served.models)
        self._team = served.team()
        self._offers = Offers(served.device)
        self._stopped = threading.Event()
        self._trainers: set[_Trainer] = set()
        self._counts = _Counts()
        self._listener = address.listen()
        self._thread = threading.Thread(target=self._accept, name="listener", daemon=True)
        self._thread.start()

    def run(self) -> None:
        """Answer requests until ``stop`` is called, or a signal raises an exception here.

        Raises:
            LostServerError: another process of this server failed.
        """
        told = time.monotonic()
        try:
            while not self._stopped.is_set():
                if time.monotonic() - told > LOGGED_SECONDS:
                    told = time.monotonic()
                    self._team.wait()
                taken = self._queue.take(_PATIENCE)
                if taken is not None:
                    trainer, frame = taken
                    trainer.answer(*self._answer(trainer, frame))
                self._counts.log(self._queue.clients)
            self._team.stop()
        finally:
            self._close()

    @property
    def stopped(self) -> bool:
        """True once it has stopped, or will as soon as the present request is answered."""
        return self._stopped.is_set()

    def stop(self) -> None:
        """Let ``run`` end, from another thread."""
        self._stopped.set()

    def _close(self) -> None:
        self._stopped.set()
        with suppress(OSError):
            # Closing alone does not wake a thread that accepts.
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._address.remove()
        for trainer in list(self._trainers):
            trainer.close()
        self._thread.join()

    def _accept(self) -> None:
        while not self._stopped.is_set():
            try:
                connection, peer = self._listener.accept()
            except OSError:
                if self._stopped.is_set():
                    return
                # Such as too many open files: the others are still served.
                time.sleep(_PATIENCE)
                continue
            name = f"{peer[0]}:{peer[1]}" if isinstance(peer, tuple) else "this machine"
            threading.Thread(target=self._serve, args=(connection, name), name="trainer", daemon=True).start()

    def _serve(self, connection: socket.socket, name: str) -> None:
        """Introduce a trainer, then read its requests until it leaves."""
        trainer = None
        try:
            connection.settimeout(GREETING_SECONDS)
            greet_as_server(connection, self._token)
            asked = receive(connection, 0).header
            keep_alive(connection)
            roles = self._welcome(connection, asked)
            if roles is None:
                return
            trainer = _Trainer(connection, roles, self._queue, self._agreed(connection, asked))
            self._trainers.add(trainer)
            self._queue.join(trainer)
            trainer.start()
            by = trainer.sender.name.replace("_", " ")
            log.info("A trainer at %s asks for %s, by %s.", name, ", ".join(sorted(roles)), by)
            while trainer.hear(receive(connection, MOST_BYTES)):
                pass
        except OSError as error:
            if trainer is None:
                log.warning("A connection from %s was refused: %s.", name, error)
        finally:
            if trainer is not None:
                self._trainers.discard(trainer)
                self._queue.leave(trainer)
                trainer.close()
                if not self._stopped.is_set():
                    log.info("The trainer at %s has left.", name)
            connection.close()

    def _welcome(self, connection: socket.socket, asked: Mapping[str, Any]) -> frozenset[str] | None:
        """Send what is held, and the heads if they are wanted; return the roles, or None if they are not all here."""
        wanted = asked.get("roles")
        if not isinstance(wanted, list) or not all(isinstance(role, str) for role in wanted):
            raise WireError("it does not say which roles it wants")
        missing = sorted(set(wanted) - set(self._served.models))
        if missing:
            held = ", ".join(sorted(self._served.models))
            send(connection, {"refused": f"it holds {held}, but the run asks for {', '.join(missing)}"})
            return None
        heads = self._heads(wanted) if asked.get("heads") else ({}, {})
        send(connection, {"content": self._served.content, "heads": heads[0]}, heads[1])
        return frozenset(wanted)

    def _agreed(self, connection: socket.socket, asked: Mapping[str, Any]) -> Sender:
        """Offer a trainer the transports that it supports, and return its choice.

        Raises:
            WireError: it chooses none, or it does not work between the two.
        """
        wanted = asked.get("transports")
        possible = self._offers.make(
            [name for name in wanted if isinstance(name, str)] if isinstance(wanted, list) else []
        )
        agreed = None
        try:
            send(connection, {"offers": {name: offer for name, (_, offer) in possible.items()}})
            chosen = receive(connection, 0).header.get("transport")
            if not isinstance(chosen, str) or chosen not in possible:
                raise WireError("it supports none of the transports offered")
            sender = possible[chosen][0]
            sender.meet(connection)
            agreed = sender
            return agreed
        except UnavailableError as error:
            raise WireError(str(error)) from None
        finally:
            for sender, _ in possible.values():
                if sender is not agreed:
                    sender.close()

    def _heads(self, roles: Collection[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return role -> names of its tensors and its numbers, and the tensors; shared ones are there once."""
        listed: dict[str, Any] = {}
        tensors: dict[str, Tensor] = {}
        for role in roles:
            head = self._empty[role]
            entry: dict[str, Any] = {"softcap": head.softcap, "scale": head.scale, "bias": None}
            for part, tensor in (("hidden", head.hidden), ("weight", head.weight), ("bias", head.bias)):
                if tensor is not None:
                    same = (name for name, other in tensors.items() if other is tensor)
                    entry[part] = next(same, f"{role}.{part}")
                    tensors[entry[part]] = tensor
            listed[role] = entry
        return listed, tensors

    def _answer(self, trainer: _Trainer, frame: Frame) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Run the models; return an answer's header and tensors. A request that can't be run gets its reason."""
        number = frame.header.get("number")
        started = time.perf_counter()
        try:
            roles = _roles_of(frame, trainer)
            batch = self._team.checked(frame.tensors)
            listed, hidden = self._team.run(roles, frame.tensors, batch)
            # Copying waits for the device: the seconds are those of the models.
            placed, tensors = trainer.sender.place(hidden)
        except LostServerError:
            raise
        # Images of the right kinds may still be none that a model can read, which it shows in many ways.
        except Exception as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            log.warning("A request was refused: %s.", first)
            return {"number": number, "refused": first[:500]}, {}
        self._counts.add(len(batch.row_ids), len(batch.valid_N), time.perf_counter() - started)
        return {"number": number, "roles": listed, **placed}, tensors


@final
class _Trainer:
    """A connection: answers leave in a thread, so that a slow trainer keeps no other waiting."""

    def __init__(
        self,
        connection: socket.socket,
        roles: frozenset[str],
        requests: FairQueue[_Trainer, Frame],
        sender: Sender,
    ) -> None:
        self.roles = roles
        self.sender = sender
        self._connection = connection
        self._requests = requests
        self._answers: queue.Queue[tuple[dict[str, Any], dict[str, Tensor]] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._send, name="answers", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def hear(self, frame: Frame) -> bool:
        """Take in what it says; return False if it has left."""
        return self.sender.hear(frame.header) or self._requests.put(self, frame)

    def answer(self, header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self._answers.put((header, tensors))

    def close(self) -> None:
        """End both threads of the connection."""
        self.sender.close()
        self._answers.put(None)
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)

    def _send(self) -> None:
        try:
            while True:
                try:
                    answer = self._answers.get(timeout=BEAT_SECONDS)
                except queue.Empty:
                    send(self._connection, {"beat": True})
                    continue
                if answer is None:
                    return
                self.sender.deliver(self._connection, *answer)
                self._requests.done(self)
        except OSError:
            pass
        finally:
            # The thread that reads may be waiting for room in the queue, or for the trainer, which must notice, too.
            self._requests.leave(self)
            self.close()


class _Counts:
    """What was served since the last log line, and in all."""

    def __init__(self) -> None:
        self._rows = self._tokens = self._new_tokens = 0
        self._busy = 0.0
        self._logged = time.monotonic()

    def add(self, rows: int, tokens: int, seconds: float) -> None:
        self._rows += rows
        self._tokens += tokens
        self._new_tokens += tokens
        self._busy += seconds

    def log(self, trainers: int) -> None:
        now = time.monotonic()
        passed = now - self._logged
        if passed < LOGGED_SECONDS:
            return
        if self._new_tokens:
            log.info(
                "%d rows and %d tokens served; of late %.0f tokens/s, busy %.0f%% of the time, for %d trainers.",
                self._rows,
                self._tokens,
                self._new_tokens / passed,
                100 * min(1.0, self._busy / passed),
                trainers,
            )
        self._new_tokens, self._busy, self._logged = 0, 0.0, now


def _roles_of(frame: Frame, trainer: _Trainer) -> frozenset[str]:
    """Return the roles that run a request: those that it names, else all that its trainer asked for.

    Raises:
        ValueError: it names others.
    """
    named = frame.header.get("roles")
    if named is None:
        return trainer.roles
    if not isinstance(named, list) or not named or not trainer.roles.issuperset(named):
        raise ValueError(f"a request names roles of {', '.join(sorted(trainer.roles))}; this one names {named!r:.200}")
    return frozenset(named)


def _empty_heads(models: Mapping[str, LanguageModel]) -> dict[str, Head]:
    """Return role -> head over no tokens; roles of one model under one adapter share it."""
    found: dict[tuple[int, str | None], Head] = {}
    heads = {}
    for role, model in models.items():
        with model.as_role(role):
            heads[role] = found.setdefault((id(model), model.adapters.get(role)), model.empty_head())
    return heads

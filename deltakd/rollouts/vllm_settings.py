"""Settings of ``rollout.vllm``: the user's own vLLM server, which writes the student's responses."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Gt

from deltakd.generation import Decoding
from deltakd.io.inference_server import url_problems


@dataclass(frozen=True, kw_only=True)
class VllmSettings:
    """The server, and how weights get there.

    Args:
        url: its address.
        model: the name under which it serves the student; None: the only model there.
        transfer: how weights get there: ``nccl``, from GPU to GPU; ``files``, through a folder that both see; ``auto``:
            NCCL if the server was started with it, else files.
        weights_dir: the folder for files, under the same path for both; None: in the run directory.
        timeout: seconds that the server may take for one response or one hand-over.
        wait: seconds per round that a lost server may take to come back.
        checked: responses per round whose log-probs are compared with the student's own; 0: none.
        max_logprob_gap: nats; the run stops if the mean absolute difference of a token's log-prob is above this.
    """

    url: str | None = None
    model: str | None = None
    transfer: Literal["auto", "nccl", "files"] = "auto"
    weights_dir: str | None = None
    timeout: Annotated[float, Gt(0)] = 600.0
    wait: Annotated[float, Ge(0)] = 300.0
    checked: Annotated[int, Ge(0)] = 16
    max_logprob_gap: Annotated[float, Gt(0)] = 0.1

    def problems(self, decoding: Decoding, *, quantized: bool, mixes_teacher: bool) -> list[str]:
        """Return the problems that need no server, one sentence each.

        Args:
            decoding: how tokens are chosen.
            quantized: True if the student's weights are quantised.
            mixes_teacher: True if tokens are drawn from a mixture with the teacher.
        """
        found = url_problems(self.url, "rollout.vllm.url")
        if self.weights_dir is not None and not Path(self.weights_dir).is_absolute():
            found.append(
                f"rollout.vllm.weights_dir is {self.weights_dir!r}; it must be an absolute path, since the server runs "
                "in another folder"
            )
        if decoding.no_repeat_ngram_size:
            found.append(
                f"rollout.decoding.no_repeat_ngram_size is {decoding.no_repeat_ngram_size}, and vLLM knows no ban of "
                "n-grams; give 0, or rollout.engine=own"
            )
        if quantized:
            found.append(
                "rollout.engine=vllm gets whole weights, and model.student.quantization is given: the server would "
                "answer with another student than the one that trains; give rollout.engine=own, or no quantization"
            )
        if mixes_teacher:
            found.append(
                "rollout.source=mixture draws each token from student and teacher together, and a vLLM server holds "
                "one model; give rollout.engine=own, or rollout.source=student"
            )
        return found

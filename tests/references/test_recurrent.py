"""References with a recurrent state: a cache or a server says of a row what the model says beside the student."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import pytest

from deltakd.cache import make_cache
from deltakd.io.run_directory import RunDirectory
from deltakd.references.serving.secret import TOKEN_VARIABLE
from tests.references.serving.servers import TOKEN, at, serving
from tests.tiny import World, save_model

#: A student of state-space layers, and hybrid teachers of them and attention, with experts.
SHAPES = {
    "student": ("mamba", {"state_size": 4}),
    "teacher": (
        "jamba",
        {"mamba_d_state": 4, "mamba_dt_rank": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2,
         "expert_layer_period": 2, "use_mamba_kernels": False},
    ),
    "teacher_raw": ("jamba", {"mamba_d_state": 4, "mamba_dt_rank": 4, "attn_layer_period": 2, "attn_layer_offset": 1,
                              "num_experts": 1, "use_mamba_kernels": False}),
}  # fmt: skip


def losses(run: RunDirectory) -> list[float]:
    with (run.path / "metrics.csv").open() as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file) if row.get("train/loss")]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_recurrent_references_say_the_same_from_a_cache_and_from_a_server(
    world: World, train: Callable[..., RunDirectory], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache's batches hold other rows than the run's, and pad them otherwise."""
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    shared = [
        f"model.{role}.path={save_model(tmp_path / role, seed=i, family=family, **options)}"
        for i, (role, (family, options)) in enumerate(SHAPES.items())
    ]
    shared += ["data.batch_size=3", "trainer.max_steps=4"]
    live = train("delta_kd", *shared, name="live")
    place = f"reference.path={tmp_path / 'cache'}"
    make_cache(world.overrides(tmp_path / "cache", "delta_kd", *shared, place))
    cached = train("delta_kd", *shared, "reference=cached", place, name="cached")
    assert losses(cached) == pytest.approx(losses(live), rel=1e-5)
    with serving(world.overrides(tmp_path, "delta_kd", *shared, *at(tmp_path))):
        served = train("delta_kd", *shared, *at(tmp_path), name="served")
    assert losses(served) == losses(live)
    rollout = ("rollout=student", "rollout.decoding.max_new_tokens=6")
    on_policy = train("kd", *shared, *rollout, name="on_policy")
    assert len(losses(on_policy)) == 4

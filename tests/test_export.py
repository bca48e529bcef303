"""Exports: a directory that opens by itself with an honest card, an upload, and what is refused."""

from __future__ import annotations

import base64
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM, AutoTokenizer

from deltakd.config.build import make_settings
from deltakd.config.compose import compose_config
from deltakd.export import export, main
from deltakd.io.errors import ConfigError
from deltakd.io.run_directory import RunDirectory
from deltakd.models.identity import model_fingerprint
from deltakd.training.run import run_training
from tests.tiny import World


@pytest.fixture(scope="module")
def trained(world: World, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A run of which models and data lie in the home directory."""
    run = RunDirectory(tmp_path_factory.mktemp("export") / "run")
    overrides = world.overrides(
        run.path,
        "delta_kd",
        "trainer.max_steps=2",
        "evaluation=default",
        f"evaluation.sets={{mine: {world.root / 'test.jsonl'}}}",
        "evaluation.limit=3",
        "evaluation.seeds=[7]",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(world.root))
        run_training(make_settings(compose_config("train", overrides)), run.path)
    return run


@pytest.fixture
def finished(trained: RunDirectory, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    """A copy of it."""
    monkeypatch.setenv("HOME", str(world.root))
    shutil.copytree(trained.path, tmp_path / "run")
    return RunDirectory(tmp_path / "run")


def test_a_directory_opens_by_itself_and_says_how_it_was_made(finished: RunDirectory, tmp_path: Path) -> None:
    output = tmp_path / "deep" / "model"
    export([f"run={finished.path}", f"output={output}"])
    assert AutoModelForCausalLM.from_pretrained(output).num_parameters() > 0
    assert AutoTokenizer.from_pretrained(output).eos_token_id is not None
    assert model_fingerprint(output) == model_fingerprint(finished.student)
    assert not [p for p in output.parent.iterdir() if p != output]
    card, summary = (output / "README.md").read_text(), finished.read_summary()
    head = yaml.safe_load(card.split("---")[1])
    assert head["library_name"] == "transformers"
    assert head["license"] == "unknown"
    for part in (
        "(loss `delta_kd`)",
        "| teacher_raw | ~/teacher_raw |",
        f"`mine/rougeL` | {summary['mine/rougeL']:.4f} | {summary['mine/rougeL_stderr']:.4f} |",
        "max_new_tokens=8; sampling seeds [7]; the first 3 rows of each set",
        "temperature: 1.0",
        "lr: 0.01",
        str(summary["meta"]["git_commit"]),
        f"transformers {summary['meta']['packages']['transformers']}",
        summary["meta"]["data_sha256"],
        "--config-name training_config",
        "## Limitations",
        "## Licence",
    ):
        assert part in card
    assert (finished.student / "README.md").read_text() == card


def test_the_config_beside_the_weights_is_the_run_s(finished: RunDirectory, tmp_path: Path) -> None:
    export([f"run={finished.path}", f"output={tmp_path / 'model'}"])
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(tmp_path / "model"), version_base="1.3"):
        again = OmegaConf.to_container(compose("training_config", ["run_dir=other"]))
    held = yaml.safe_load(finished.config.read_text())
    assert isinstance(again, dict)
    assert again["run_dir"] == "other"
    assert {k for k in held if again[k] != held[k]} <= {"run_dir", "model", "data", "evaluation"}
    assert again["data"]["train"] == "~/train.jsonl"


def test_wrong_arguments_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        export(["rum=x", "private=perhaps"])
    text = str(caught.value)
    assert "the nearest is run=" in text
    assert "run=<run directory> is missing" in text
    assert "private=perhaps: give true or false" in text
    with pytest.raises(ConfigError, match=r"(?s)is not a run directory.*give output="):
        export([f"run={tmp_path}"])


def test_a_run_that_is_not_finished_is_refused(finished: RunDirectory, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("x")
    finished.summary.write_text("{")
    with pytest.raises(ConfigError, match=r"(?s)can't be exported: summary.json, line 1.*there already exists"):
        export([f"run={finished.path}", f"output={tmp_path / 'there'}"])
    finished.summary.unlink()
    with pytest.raises(ConfigError, match=r"not finished \(step 2 of 2\); end it first: .* with resume=true run_dir="):
        export([f"run={finished.path}", f"output={tmp_path / 'model'}"])
    assert not (tmp_path / "model").exists()


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as making a repository and uploading small files take."""

    uploaded: dict[str, bytes]
    asked: list[tuple[str, Any]]
    status = 200

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        lines = [json.loads(line) for line in body.splitlines() if line.strip()] if body else []
        self.asked.append((self.path, lines))
        repository = "somebody/student"
        if self.path == "/api/repos/create":
            answer: dict[str, Any] = {"url": f"{self.base}/{repository}", "name": repository, "id": "1"}
        elif self.path.endswith("/preupload/main"):
            answer = {"files": [_regular(file["path"]) for file in lines[0]["files"]]}
        elif self.path == "/api/validate-yaml":
            answer = {"errors": [], "warnings": []}
        else:
            for line in lines:
                if line["key"] == "file":
                    self.uploaded[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            answer = {"commitUrl": f"{self.base}/{repository}/commit/1", "commitOid": "1", "success": True}
        self._answer(answer if self.status == 200 else {"error": "You don't have the rights"})

    def do_GET(self) -> None:
        self._answer({"id": "somebody/student", "sha": "0", "siblings": []})

    def _answer(self, content: dict[str, Any]) -> None:
        text = json.dumps(content).encode()
        self.send_response(self.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    @property
    def base(self) -> str:
        return f"http://{self.headers['Host']}"

    def log_message(self, format: str, *args: Any) -> None:
        pass


def _regular(path: str) -> dict[str, Any]:
    return {"path": path, "uploadMode": "regular", "shouldIgnore": False, "oid": None}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    handler = type("ThisHub", (Hub,), {"uploaded": {}, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 30)
    yield handler
    server.shutdown()
    thread.join()
    server.server_close()


def test_an_upload_takes_the_whole_directory(finished: RunDirectory, hub: type[Hub]) -> None:
    export([f"run={finished.path}", "push_to_hub=somebody/student", "private=true"])
    made = dict(hub.asked)["/api/repos/create"][0]
    assert (made["name"], made["organization"], made["visibility"]) == ("student", "somebody", "private")
    assert {"model.safetensors", "config.json", "tokenizer.json", "training_config.yaml"} <= hub.uploaded.keys()
    assert hub.uploaded["model.safetensors"] == (finished.student / "model.safetensors").read_bytes()
    assert b"loss `delta_kd`" in hub.uploaded["README.md"]


def test_what_the_hub_refuses_and_a_hub_that_is_away(
    finished: RunDirectory,
    hub: type[Hub],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    hub.status = 403
    with pytest.raises(ConfigError, match=r"the hub rejected it .* check the owner and the token's rights"):
        export([f"run={finished.path}", "push_to_hub=somebody/student"])
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    output = tmp_path / "model"
    with pytest.raises(ConfigError, match=r"the hub can't be reached .*hf upload somebody/student"):
        export([f"run={finished.path}", f"output={output}", "push_to_hub=somebody/student"])
    assert (output / "model.safetensors").is_file()
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(SystemExit):
        main([f"run={finished.path}", "push_to_hub=somebody/student"])
    assert "needs an account: run `hf auth login`" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="has no owner"):
        export([f"run={finished.path}", "push_to_hub=student"])

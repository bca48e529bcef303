"""Export a finished run's student, with its model card, to a directory or to the Hugging Face hub."""

from __future__ import annotations

import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi, get_token
from huggingface_hub import errors as hub_errors
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils._validators import validate_repo_id

from deltakd.config.loss_names import KnownLosses
from deltakd.io.errors import ConfigError
from deltakd.io.files import replacing
from deltakd.io.run_directory import RunDirectory
from deltakd.results.listing import read_entry
from deltakd.tracking.model_card import CONFIG_FILE
from deltakd.tracking.redaction import redacted

log = logging.getLogger(__name__)

#: The base error of the client's HTTP library, which differs between versions of huggingface_hub.
_TRANSPORT_ERROR: type[Exception] = vars(hub_errors)["HTTPError"]

#: Makes Hydra take a run's config unchanged, and write no files of its own.
_FOR_HYDRA: dict[str, Any] = {
    "defaults": ["_self_", {"override hydra/job_logging": "stdout"}],
    "hydra": {"run": {"dir": "."}, "output_subdir": None, "job": {"chdir": False}},
}


def export_problems(run: RunDirectory, output: Path | None, repository: str | None) -> list[str]:
    """Return why this can't be exported, one sentence for each problem."""
    problems = _run_problems(run)
    if output is None and repository is None:
        problems.append("give output=<directory>, push_to_hub=<owner>/<name>, or both")
    if output is not None and output.exists() and (not output.is_dir() or any(output.iterdir())):
        problems.append(f"output={output} already exists; give another directory, or remove that one")
    if repository is not None:
        problems += _repository_problems(repository)
    return problems


def _run_problems(run: RunDirectory) -> list[str]:
    if not run.config.is_file():
        return [f"run={run.path} is not a run directory (it has no config.yaml); `python -m deltakd.runs` lists them"]
    entry = read_entry(run.path, KnownLosses())
    if entry.corrupt:
        return [f"run={run.path} can't be exported: {entry.corrupt}"]
    if "evaluated_model" in entry.config or "answering_teacher" in entry.config:
        return [f"run={run.path} trained no model; give the directory of a training run"]
    if not run.finished:
        return [
            f"run={run.path} is not finished ({entry.columns['state']}); end it first: the command that started it, "
            f"with resume=true run_dir={run.path}"
        ]
    if not (run.student / "config.json").is_file():
        return [f"run={run.path} is finished, but its student/ is missing; train it again in another run_dir"]
    return []


def _repository_problems(repository: str) -> list[str]:
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        return [f"push_to_hub={repository} can't be the name of a repository ({error}); give owner/name"]
    if "/" not in repository:
        return [f"push_to_hub={repository} has no owner; give owner/name"]
    if get_token() is None:
        return [
            "push_to_hub needs an account: run `hf auth login`, or set HF_TOKEN to a token with the right to write "
            "(https://huggingface.co/settings/tokens)"
        ]
    return []


def write_export(run: RunDirectory, output: Path) -> None:
    """Write weights, tokenizer, model card and the run's config, all or nothing.

    Args:
        run: a finished run.
        output: an absent or empty directory.
    """
    config = yaml.safe_load(run.config.read_text(encoding="utf-8"))
    with replacing(output, "the export") as partial:
        shutil.copytree(run.student, partial)
        content = _FOR_HYDRA | redacted(config) | {"resume": False}
        text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
        (partial / CONFIG_FILE).write_text(text, encoding="utf-8")


def push(folder: Path, repository: str, private: bool) -> str:
    """Upload a directory as a model repository, creating it if need be.

    Args:
        folder: output of :func:`write_export`.
        repository: ``owner/name``.
        private: make a new repository private; an existing one is not changed.

    Returns:
        Its URL.

    Raises:
        ConfigError: the hub can't be reached, or rejects the upload.
    """
    later = f"`hf upload {repository} <output>` uploads later what output=<directory> wrote"
    api = HfApi()
    try:
        # None keeps an organisation's own default.
        made = api.create_repo(repository, private=private or None, exist_ok=True)
        api.upload_folder(repo_id=made.repo_id, folder_path=folder, commit_message="Student trained with deltakd")
    except HfHubHTTPError as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            [f"push_to_hub={repository}: the hub rejected it ({said}); check the owner and the token's rights. {later}"]
        ) from None
    except (OfflineModeIsEnabled, _TRANSPORT_ERROR, OSError) as error:
        raise ConfigError(
            [f"push_to_hub={repository}: the hub can't be reached ({type(error).__name__}). {later}"]
        ) from None
    return str(made)


def run_export(run: RunDirectory, output: Path | None, repository: str | None, private: bool) -> None:
    """Check the arguments, then write and upload as requested.

    Raises:
        ConfigError: lists all problems of the arguments, or the hub's refusal.
    """
    problems = export_problems(run, output, repository)
    if problems:
        raise ConfigError(problems)
    with tempfile.TemporaryDirectory() as folder:
        target = output or Path(folder) / "model"
        write_export(run, target)
        if output is not None:
            log.info("%s holds the model; AutoModelForCausalLM.from_pretrained opens it.", output)
        if repository is not None:
            log.info("Uploaded to %s", push(target, repository, private))

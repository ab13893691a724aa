"""Upload a pruned checkpoint to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi

from optima.errors import ModelError
from optima.files import check_shards, usable_path
from optima.models.load import HUB_FAILURES
from optima.reporting.record import REPORT_NAME

STALE = ("*.safetensors", "*.safetensors.index.json")  # weights of an earlier upload
FAILURES: tuple[type[Exception], ...] = (*HUB_FAILURES, ValueError)  # also of a name or a card that the hub refuses
HIDDEN = (".*", "**/.*")


def push(directory: str | Path, repo: str, *, private: bool | None = None, message: str | None = None) -> str:
    """Upload an output of OPTIMA to a model repository and return its address.

    Args:
        directory: an output directory of ``optima prune``.
        repo: ``name`` or ``owner/name``; created if it does not exist.
        private: create the repository as private; refuse one that exists and is public.
        message: commit message.

    Raises:
        ModelError: if the directory is not a complete output, the repository holds another model, or the hub refuses.
    """
    folder = usable_path(directory, "the output", "give the output directory of optima prune")
    check_shards(folder)
    if not (folder / REPORT_NAME).is_file() or not any(folder.glob("*.safetensors")):
        raise ModelError(f"{folder} has no {REPORT_NAME} or no weights: give the output directory of optima prune")
    repo, api = open_repo(repo, private), HfApi()
    try:
        api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            commit_message=message or "Pruned by OPTIMA",
            ignore_patterns=[*HIDDEN],
            delete_patterns=[*STALE],
        )
    except FAILURES as error:
        raise ModelError(f"cannot push to {repo}: {error}") from error
    return f"{api.endpoint}/{repo}"


def open_repo(repo: str, private: bool | None = None) -> str:
    """Create the repository if it does not exist, and return ``owner/name``. Raises ``ModelError`` as ``push`` does."""
    api = HfApi()
    try:
        full: str = api.create_repo(repo, private=private, exist_ok=True).repo_id
        public, files = not api.repo_info(full).private, set(api.list_repo_files(full))
    except FAILURES as error:
        raise ModelError(f"cannot push to {repo}: {error}") from error
    if private and public:
        raise ModelError(f"{full} exists and is public: make it private in its settings, or leave out --private")
    if files - {".gitattributes", "README.md"} and REPORT_NAME not in files:
        raise ModelError(f"{full} has files that OPTIMA did not write: choose another name, or delete the repository")
    return full

"""Publish a pruned checkpoint on the Hugging Face hub: every check that can be made is made before the long work."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from glob import escape
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from optima.errors import ModelError
from optima.models.failures import HUB_FAILURES
from optima.models.files import TEMPLATES, TOKENIZERS, check_shards, stat_of, the_same, usable_path
from optima.reporting.record import REPORT_NAME

# Of the model that was there before, what is not among the files that are pushed; pictures and texts stay.
SAFETENSORS = "*.safetensors"
WEIGHTS = (
    *(SAFETENSORS, "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.gguf", "*.h5"),
    *("*.msgpack", "*.onnx", "*.onnx_data"),
)
OF_A_MODEL = (*WEIGHTS, "*.json", "*.yaml", "*.html", "*.py", *TOKENIZERS)
NOT_PUSHED = ("layers/*", ".*", "**/.*")  # hessians of --dump-layer, hidden files
WRITE = "repo.write"  # the right of a fine-grained token
HARMLESS = {".gitattributes", "README.md"}  # what the hub's own page makes


def push(
    directory: str | Path,
    repo: str,
    *,
    private: bool | None = None,
    overwrite: bool = False,
    message: str | None = None,
) -> str:
    """Upload an output of OPTIMA to a model repository, which is made if it is not there; returns its address.

    Args:
        directory: what ``optima prune`` or ``optima pack`` wrote.
        repo: ``name`` or ``owner/name``.
        private: make a new repository private; None: as the owner's settings say. One that exists must be so.
        overwrite: replace a model that no run of OPTIMA put there.
        message: of the commit.

    Raises:
        ModelError: if the directory is no such output or lacks some of its weights, the name is none, nobody is logged
            in, the repository is public and was to be private, or the hub refuses.
    """
    folder = usable_path(directory, "the output", "name what optima prune or optima pack wrote")
    if not (folder / REPORT_NAME).is_file() or not any(folder.glob(SAFETENSORS)):
        raise ModelError(f"{folder} is no output of optima prune: it holds no {REPORT_NAME}, or no weights")
    check_shards(folder)
    full, there = _checked(repo, overwrite, private)
    with _explained(full), the_same(folder, stat_of(folder)):
        api = HfApi()
        api.create_repo(full, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=full,
            folder_path=folder,
            commit_message=message or "Pruned by OPTIMA",
            ignore_patterns=list(NOT_PUSHED),
            delete_patterns=[escape(file) for file in there if _of_a_model(file)],
        )
        return f"{api.endpoint}/{full}"


def check_push(repo: str, private: bool | None = None) -> str:
    """Whether somebody is logged in who may push to ``repo``, and nothing there is replaced; returns ``owner/name``.

    Raises:
        ModelError: if not; the message says what to do.
    """
    return _checked(repo, False, private)[0]


def _checked(repo: str, overwrite: bool, private: bool | None) -> tuple[str, list[str]]:
    """``owner/name``, and the files that are there."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ModelError(f"{repo!r} is no name of a repository ({error}): say name, or owner/name") from error
    with _explained(repo):
        api = HfApi()
        user = api.whoami()
        groups = [group["name"] for group in user.get("orgs", []) if group.get("roleInOrg") != "read"]
        owners, full = [user["name"], *groups], repo if "/" in repo else f"{user['name']}/{repo}"
        if not _may_write(user.get("auth", {}).get("accessToken", {}), full):
            raise ModelError(f"your token may only read: make one that may write to push to {repo}")
        if full.partition("/")[0] not in owners:
            raise ModelError(f"{full} is not yours to write to: the hub knows you as {', '.join(owners)}")
        try:
            files = api.list_repo_files(full)
        except RepositoryNotFoundError:
            return full, []
        if private and not api.repo_info(full).private:
            raise ModelError(f"{full} exists and is public: make it private in its settings, or leave --private out")
    if set(files) - HARMLESS and REPORT_NAME not in files and not overwrite:
        raise ModelError(
            f"{full} exists and holds a model that is no output of OPTIMA: choose another name, or replace it with "
            f"optima push DIR {full} --overwrite"
        )
    return full, files


def _may_write(token: Mapping[str, Any], repo: str) -> bool:
    """Whether a token, as the hub tells of it, has that right: for all, or for some owners and repositories."""
    rights = token.get("fineGrained")
    if token.get("role") != "fineGrained" or not isinstance(rights, Mapping):
        return token.get("role") != "read"
    named = {repo, repo.partition("/")[0]}
    scoped = [each["permissions"] for each in rights.get("scoped", []) if each["entity"].get("name") in named]
    return any(WRITE in permissions for permissions in [rights.get("global", []), *scoped])


def _of_a_model(file: str) -> bool:
    """Weights anywhere; of the rest what lies beside them, where transformers looks for it."""
    beside = "/" not in file or file.startswith(f"{TEMPLATES}/")
    return any(fnmatchcase(file, pattern) for pattern in (OF_A_MODEL if beside else WEIGHTS))


@contextmanager
def _explained(repo: str) -> Iterator[None]:
    try:
        yield
    except HUB_FAILURES as error:
        text = " ".join(str(error).split())
        raise ModelError(
            f"the hub cannot be pushed to ({repo}): {text}. Log in with hf auth login or set HF_TOKEN to a token that "
            "may write, and see that you are online"
        ) from error
    except ValueError as error:  # of the head of README.md, which the hub checks first
        text = " ".join(str(error).split())
        raise ModelError(f"the hub refuses {repo} ({text}): correct it, then optima push") from error

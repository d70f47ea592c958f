"""Models on the Hugging Face hub: the only module that downloads them, and only on request."""

from pathlib import Path
from typing import Any

from latentgnn.errors import UserError, first_line, require

CONFIG, WEIGHTS = "config.json", "model.safetensors"
"""The files of a model: its record and its weights."""


def find(source: Path | str, *, from_hub: bool = False, revision: str | None = None) -> Path:
    """Return the folder or file of a model: a path, or with ``from_hub`` a downloaded model.

    Raises:
        UserError: see `download`; also if a revision of a folder is requested.
    """
    if from_hub:
        return download(str(source), revision=revision)
    if revision is not None:
        raise UserError(f"revision {revision!r} only applies with from_hub=True; {source} is a path")
    return Path(source)


def download(repository: str, *, revision: str | None = None) -> Path:
    """Download a model from the Hugging Face hub to the hub's own cache, and return its folder.

    If the hub cannot be reached, or ``HF_HUB_OFFLINE`` forbids it, an earlier download is used.

    Args:
        repository: ``owner/name``.
        revision: a branch, tag or commit; ``None`` for the main one.

    Raises:
        UserError: if there is no such model, access is denied, or the hub cannot be reached and nothing was downloaded.
    """
    hub: Any = require("huggingface_hub", extra="hub")
    errors: Any = require("huggingface_hub.errors", extra="hub")
    name = f"{repository} (revision {revision})" if revision else repository
    offline = False
    try:
        # One request without the retries of a download, which take half a minute without a network.
        hub.get_hf_file_metadata(hub.hf_hub_url(repository, CONFIG, revision=revision))
    except (errors.HfHubHTTPError, errors.HFValidationError) as error:
        raise _refused(name, errors, error) from error
    except Exception as error:  # from the HTTP library, of which huggingface_hub has used several, or from sockets
        offline, cause = True, error
    try:
        folder = Path(hub.hf_hub_download(repository, CONFIG, revision=revision, local_files_only=offline)).parent
        # The folder is named after the commit; the weights must be from the same one.
        hub.hf_hub_download(repository, WEIGHTS, revision=folder.name, local_files_only=offline)
    except errors.LocalEntryNotFoundError as error:
        if not offline:
            raise UserError(f"{name}: the download failed ({first_line(error)}): try again") from error
        told = "HF_HUB_OFFLINE is set" if hub.is_offline_mode() else f"{type(cause).__name__}: {first_line(cause)}"
        raise UserError(
            f"{name}: the Hugging Face hub cannot be reached ({told}), and no earlier download is there: name a "
            "folder, or try again with a connection"
        ) from cause
    except errors.HfHubHTTPError as error:
        raise _refused(name, errors, error) from error
    return folder


def _refused(name: str, errors: Any, error: Exception) -> UserError:
    if isinstance(error, errors.HFValidationError):
        return UserError(f"{name!r} is no model's name on the Hugging Face hub: expected owner/name")
    if isinstance(error, errors.GatedRepoError):
        return UserError(f"{name}: its owner grants access to it on its page; then log in with `hf auth login`")
    if isinstance(error, errors.RevisionNotFoundError):
        return UserError(f"{name}: the Hugging Face hub has no such revision")
    if isinstance(error, errors.RepositoryNotFoundError):
        return UserError(f"{name}: the Hugging Face hub has no such model, or you may not read it: see `hf auth login`")
    if isinstance(error, errors.EntryNotFoundError):
        return UserError(f"{name} has no {CONFIG} and {WEIGHTS}: it was saved by another library, or in another way")
    return UserError(f"{name}: the Hugging Face hub answered: {first_line(error)}")

"""Files of the Hugging Face Hub, named hf://OWNER/NAME[@REV][/FILE], in the Hub's own cache.

Whatever opens a CLIP or prompts asks here for a path on this machine first. A file is downloaded
once. REV is a branch, tag or commit: for a branch or tag the Hub is asked whether there is a newer
file, and if it cannot be reached, the cached file is used. A commit in the cache needs no request.
"""

import os
import pathlib
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vop_jax.errors import UserError
from vop_jax.storage.files import StrPath

SCHEME = "hf://"
# In a workdir, and what names without FILE mean.
CLIP_FILE, PROMPTS_FILE = "clip.safetensors", "prompts.safetensors"
# A checkpoint to convert, in the order of preference: safetensors need no torch.
CHECKPOINTS = (
    "open_clip_model.safetensors",
    "model.safetensors",
    "model.safetensors.index.json",
    "open_clip_pytorch_model.bin",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_NAME = re.compile(r"hf://([\w.-]+/[\w.-]+)(?:@((?:refs/(?:pr|convert)/)?[^/]+))?(?:/(.*))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
LOG_IN = "hf auth login, or set HF_TOKEN"


def is_name(path: StrPath) -> bool:
    """Whether a path names a file of the Hub."""
    return os.fspath(path).startswith(SCHEME)


def parse(name: StrPath) -> tuple[str, str | None, str]:
    """(OWNER/NAME, REV or None, FILE or "") of a name."""
    match = _NAME.fullmatch(os.fspath(name))
    if match is None:
        raise UserError(f"{name}: write hf://OWNER/NAME[@REV][/FILE]")
    return match[1], match[2], match[3] or ""


def local_file(path: StrPath, default: str) -> StrPath:
    """The path on this machine of a file, which is downloaded if it is the Hub's and not cached.

    Args:
        path: a name, or any other path, which is returned as it is.
        default: FILE, where the name states none.

    Raises:
        UserError: the repository, the revision or the file does not exist or may not be read, the
            Hub cannot be reached and the file is not in the cache, or the disk is full.
    """
    if not is_name(path):
        return path
    repo, revision, file = parse(path)
    hub, where = import_hub(path), {"repo_id": repo, "filename": file or default}
    with errors_of_hub(path, where["filename"]):
        cached = hub.try_to_load_from_cache(**where, revision=revision)
        if isinstance(cached, str) and _COMMIT.fullmatch(revision or ""):
            return cached
        if not isinstance(cached, str):
            # Fails at once without a connection, where a download tries again for half a minute.
            hub.get_hf_file_metadata(hub.hf_hub_url(**where, revision=revision))
        return str(hub.hf_hub_download(**where, revision=revision))


def pin(path: StrPath, default: str) -> str:
    """A name with the commit and FILE that it means now; other paths as they are."""
    if not is_name(path):
        return os.fspath(path)
    repo, _, file = parse(path)
    file = file or default
    cached = pathlib.PurePath(local_file(path, default))  # …/snapshots/COMMIT/FILE
    commit = cached.parts[-1 - len(pathlib.PurePosixPath(file).parts)]
    return f"{SCHEME}{repo}@{commit}/{file}"


def local_checkpoint(name: StrPath) -> str:
    """The path on this machine of a checkpoint to convert, with the config files beside it.

    Args:
        name: of the Hub; without FILE, it means the first of `CHECKPOINTS` that there is.
    """
    repo, revision, file = parse(name)
    hub = import_hub(name)
    with errors_of_hub(name, file or "checkpoint"):
        files = hub.HfApi().list_repo_files(repo, revision=revision)
        file = file or next((known for known in CHECKPOINTS if known in files), "")
        if file not in files:
            other = f"; name one of its files, hf://{repo}/FILE" if files else ""
            raise UserError(f"{name}: holds no {file or ', '.join(CHECKPOINTS)}{other}")
        folder = os.path.dirname(file)
        stem, suffix = os.path.splitext(file.removesuffix(".index.json"))
        beside = [os.path.join(folder, "*.json"), f"{stem}-*{suffix}" if ".index" in file else file]
        root = hub.snapshot_download(repo, revision=revision, allow_patterns=[file, *beside])
        return os.path.join(str(root), file)


def import_hub(purpose: StrPath) -> Any:
    """The package huggingface_hub; imported late, because few calls need it.

    Raises:
        UserError: it is not installed; the message begins with `purpose`.
    """
    try:
        import huggingface_hub
    except ImportError as error:
        raise UserError(f'{purpose}: {error}; pip install -e ".[hub]"') from None
    return huggingface_hub


@contextmanager
def errors_of_hub(name: StrPath, file: str = "") -> Iterator[None]:
    """Inside, what the Hub refuses, or its package cannot do, raises UserError of one line.

    Args:
        name: begins the message.
        file: that is read.
    """
    from huggingface_hub import constants, errors

    hub, cache = constants.ENDPOINT, constants.HF_HUB_CACHE
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the disk may be too small: the error says so
            yield
        return
    except errors.GatedRepoError:
        reason = f"its owner must let you read it: ask on {hub}, then {LOG_IN}"
    except errors.RepositoryNotFoundError:
        reason = f"no such repository on {hub}, or a private one: {LOG_IN}"
    except errors.RevisionNotFoundError:
        reason = "the repository has no such branch, tag or commit"
    except errors.LocalEntryNotFoundError:  # before the next one, which it is too
        reason = f"{hub} cannot be reached, and {cache} holds no copy"
    except errors.EntryNotFoundError:
        reason = f"the repository holds no {file}{_hint(name, file)}"
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        says = " ".join((error.server_message or "").split())
        token = f"; a token with more rights: {LOG_IN}" if status in (401, 403) else ""
        reason = f"{hub} refuses this with status {status}{says and f' ({says})'}{token}"
    except (errors.HTTPError, errors.OfflineModeIsEnabled) as error:
        why = "HF_HUB_OFFLINE is set" if isinstance(error, OSError) else str(error)
        copy = f", and {cache} holds no copy" if file else ""
        reason = f"{hub} cannot be reached ({why}){copy}"
    except ValueError as error:  # of its validators
        reason = " ".join(str(error).split())
    except OSError as error:
        reason = f"{error.strerror or error}: {error.filename or cache}"
    raise UserError(f"{name}: {reason}") from None


def _hint(name: StrPath, file: str) -> str:
    if file == CLIP_FILE:
        return f"; convert its checkpoint: vop convert --source={name} --output={CLIP_FILE}"
    if file == PROMPTS_FILE:
        return f"; a name with another file is {SCHEME}OWNER/NAME/FILE"
    return ""

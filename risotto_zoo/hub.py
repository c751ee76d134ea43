"""Where released weights lie, and getting them from the Hugging Face Hub, verified.

The manifest lists the releases: name and tag, where the weights are, their size and sha256. `python -m training.cards`
generates it from the folders in model_cards.
"""

import errno
import json
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from torch import Tensor

from .checkpoints import WEIGHTS, read_tensors, read_verified
from .errors import HubError, UserError

DEFAULT_ORGANIZATION = "risotto-zoo"
ORGANIZATION = os.environ.get("RISOTTO_ZOO_ORG", DEFAULT_ORGANIZATION)
PACKAGE = Path(__file__).parent


def _manifest() -> dict[str, dict[str, Any]]:
    try:
        return json.loads((PACKAGE / "manifest.json").read_text(encoding="utf-8"))
    except ValueError:  # after a merge, say; what mends it imports this module
        warnings.warn("manifest.json is damaged, so there are no releases; run python -m training.cards", stacklevel=2)
        return {}


MANIFEST = _manifest()

# For the Hub to say what a file is; what HF_HUB_ETAG_TIMEOUT says, if anything, goes.
_HEAD_SECONDS = (
    2.5 if constants.HF_HUB_ETAG_TIMEOUT == constants.DEFAULT_ETAG_TIMEOUT else constants.HF_HUB_ETAG_TIMEOUT
)
_PAUSES = (0.5, 1.5)  # before asking once more
_PATIENCE = 4.0  # seconds after which nothing is asked once more: who has no network should hear it soon
_BUSY = (429, 500, 502, 503, 504)
_T = TypeVar("_T")


def repository(name: str) -> str:
    """The Hub repository of a release, such as risotto-zoo/risotto_resnet20.cifar10-jpeg."""
    return f"{ORGANIZATION}/{name}"


def release_file(name: str) -> Path | None:
    """The weights of a release on this machine: in the package, or beside it in a checkout; None if neither."""
    places = (PACKAGE / "weights" / f"{name}.safetensors", PACKAGE.parent / "model_cards" / name / WEIGHTS)
    return next((place for place in places if place.is_file()), None)


def release_weights(name: str, cache_dir: str | Path | None = None) -> dict[str, Tensor]:
    """The tensors of a release, from this machine if they are there, else from the Hub; verified by the manifest.

    Args:
        name: A key of `MANIFEST`.
        cache_dir: The Hub's cache; its usual place if None.

    Raises:
        UserError: If they cannot be had, or are not those of the manifest.
    """
    entry = MANIFEST[name]
    path = release_file(name)
    if path is not None:
        return read_tensors(read_verified(path, entry["sha256"], entry["bytes"]), str(path))
    try:
        data = fetch(repository(name), WEIGHTS, entry["revision"], cache_dir, digest=entry["sha256"])
    except HubError as error:
        if entry["location"] != "repository":
            raise
        raise HubError(f"{error}. A checkout of risotto-zoo has it: local-dir:model_cards/{name}") from None
    return read_tensors(data, f"{repository(name)}/{WEIGHTS}")


def fetch(
    repo_id: str,
    filename: str,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    digest: str | None = None,
    unnamed: bool = False,
) -> bytes:
    """A file of a Hub repository, downloaded through the Hub's cache and verified before anyone reads it.

    What the cache holds is verified again each time: its blobs are named by their hash. A damaged file is thrown away
    and fetched once more. Without a network a cached file is used.

    Args:
        repo_id: ORG/NAME.
        filename: Path in the repository.
        revision: Branch, tag or commit; the main branch if None.
        cache_dir: The Hub's cache; its usual place if None.
        digest: The sha256 that the file must have; a cached file that has it needs no network.
        unnamed: Take a file for which nobody states a hash, too (a cache without symbolic links, a mirror).

    Raises:
        UserError: If the file is not the one that the Hub (or `digest`) states; a HubError if it cannot be had.
    """
    what = f"{repo_id}/{filename}" + (f"@{revision}" if revision else "")
    try:
        cached = huggingface_hub.try_to_load_from_cache(repo_id, filename, cache_dir=cache_dir, revision=revision)
    except HFValidationError as error:
        raise explained(error, what, repo_id) from None
    cached = Path(cached) if isinstance(cached, str) else None
    if digest is not None and cached is not None and _blob(cached).name == digest:
        try:
            return read_verified(cached, digest)
        except UserError:
            _forget(cached)
            cached = None
    for attempt in (1, 2):
        try:
            url = huggingface_hub.hf_hub_url(repo_id, filename, revision=revision)
            known = patiently(lambda url=url: huggingface_hub.get_hf_file_metadata(url, timeout=_HEAD_SECONDS))
        except Exception as error:
            if cached is None or not (_may_pass(error) or isinstance(error, OfflineModeIsEnabled)):
                raise explained(error, what, repo_id, _by_hand(repo_id, revision)) from None
            return read_verified(cached, digest or _known_hash(cached, what, unnamed))
        # A mirror may state another kind of hash, or none.
        if digest is not None and _is_hash(known.etag, digest) and known.etag != digest:
            raise HubError(f"{what} is not the file this version of risotto-zoo knows; install the newest risotto-zoo")
        path = _download(repo_id, filename, revision, cache_dir, what)
        stated = digest or (known.etag if _is_hash(known.etag) else _known_hash(path, what, unnamed))
        try:
            return read_verified(path, stated, known.size)
        except UserError as error:
            # A whole file is the version before, to which the client fell back; but a release has one version.
            if digest is not None or not _whole(path):
                _forget(path)
                cached = None
            if attempt == 2:
                raise HubError(f"{what} did not arrive as the Hub describes it; nothing was kept ({error})") from None
    raise AssertionError


def _download(repo_id: str, filename: str, revision: str | None, cache_dir: str | Path | None, what: str) -> Path:
    try:
        call = lambda: huggingface_hub.hf_hub_download(  # noqa: E731
            repo_id, filename, revision=revision, cache_dir=cache_dir, etag_timeout=_HEAD_SECONDS
        )
        return Path(patiently(call))
    except Exception as error:
        raise explained(error, what, repo_id, _by_hand(repo_id, revision)) from None


def patiently(call: Callable[[], _T]) -> _T:
    """Make a call to the Hub, again after a pause if the line broke, the answer was cut short, or the Hub was busy."""
    start = time.monotonic()
    for pause in _PAUSES:
        try:
            return call()
        except Exception as error:
            if not _may_pass(error) or time.monotonic() - start > _PATIENCE:
                raise
        time.sleep(pause)
    return call()


def _by_hand(repo_id: str, revision: str | None) -> str:
    what = f"{repo_id} --revision {revision}" if revision else repo_id
    return f", or `hf download {what} --local-dir FOLDER` where there is a network, then local-dir:FOLDER"


def explained(error: Exception, what: str, repo_id: str, instead: str = "") -> Exception:
    """What went wrong between us and the Hub, in one line; anything else comes back as it is.

    Args:
        error: As the client raised it.
        what: The thing that was wanted.
        repo_id: Its repository.
        instead: What to do where there is no network.
    """
    error = _cause(error)
    status = _status(error)
    place = constants.ENDPOINT
    if isinstance(error, OfflineModeIsEnabled):
        return HubError(f"{what} is not in the cache, and HF_HUB_OFFLINE forbids fetching it; unset it{instead}")
    if isinstance(error, GatedRepoError):
        return HubError(f"{what} is gated: ask for access at {place}/{repo_id}, then log in with `hf auth login`")
    if isinstance(error, RevisionNotFoundError):
        return HubError(f"{what}: the repository has no such revision; see {place}/{repo_id}/tree/main")
    if isinstance(error, RepositoryNotFoundError) or status == 401:
        return HubError(
            f"{what}: there is no such repository at {place}, or the token is missing, wrong or does not open it; "
            "check the name, and log in with `hf auth login` or set HF_TOKEN"
        )
    if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
        return HubError(f"{what}: the repository has no such file; only safetensors are read, no other format")
    if status == 403:
        return HubError(f"{what}: the token is not allowed to do this; create one that is at {place}/settings/tokens")
    if status == 429:
        return HubError(f"{what}: the Hub asks to slow down (429); try again in a few minutes")
    if status is not None and status >= 500:
        return HubError(f"{what}: the Hub is out of order ({status}); try again later")
    if status is not None:
        return HubError(f"{what}: the Hub refused ({status}): {str(error).strip().splitlines()[0]}")
    if isinstance(error, UnicodeEncodeError):
        return HubError(f"{what}: the token holds characters that no token has; log in with `hf auth login` again")
    if isinstance(error, HFValidationError):
        return HubError(f"{repo_id!r} is no repository name: {str(error).split(':')[0]}")
    if isinstance(error, OSError) and error.errno is not None and not _may_pass(error):
        mend = "make room" if error.errno == errno.ENOSPC else "see who may write there, or set HF_HOME"
        return HubError(f"{what} cannot be stored: {error.strerror} ({error.filename or 'the cache'}); {mend}")
    if "onsistency check" in str(error):
        return HubError(f"{what}: the download was cut short, again and again; nothing was kept. Try again later")
    if _may_pass(error):
        cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) else error
        reason = f" ({str(cause).splitlines()[0]})" if cause is not None and str(cause) else ""
        mirror = "xet-" in reason.replace(repo_id, "")  # perhaps one without that storage
        xet = ", or set HF_HUB_DISABLE_XET=1" if mirror else ""
        return HubError(f"{what}: the Hub at {place} cannot be reached{reason}; try again{xet}{instead}")
    if _is_xet(error):
        reason = str(error).split("\n")[0] or type(error).__name__
        return HubError(
            f"{what}: the Hub's storage refused ({reason}); try again, or set HF_HUB_DISABLE_XET=1{instead}"
        )
    return error


def _cause(error: Exception) -> Exception:
    """The client wraps what happens while it uploads."""
    wrapped = type(error) is RuntimeError and isinstance(error.__cause__, Exception)
    return error.__cause__ if wrapped else error


def _status(error: Exception) -> int | None:
    response = getattr(error, "response", None)
    return getattr(response, "status_code", None) if isinstance(error, HfHubHTTPError) else None


def _may_pass(error: Exception) -> bool:
    """Whether another attempt, or the cache, may help: a broken line, a busy Hub; not a refusal, not a full disk."""
    error = _cause(error)
    if isinstance(error, OfflineModeIsEnabled):
        return False
    if isinstance(error, HfHubHTTPError) and not isinstance(error, LocalEntryNotFoundError):
        return _status(error) in _BUSY
    module = type(error).__module__.split(".")[0]
    network = module in ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3")
    cut_short = "onsistency check" in str(error)
    return network or cut_short or isinstance(error, (ConnectionError, TimeoutError, LocalEntryNotFoundError))


def _is_xet(error: Exception) -> bool:
    """Whether the Hub's storage backend failed; its package raises kinds of its own, and plain RuntimeErrors."""
    return type(error).__name__.startswith("Xet") or type(error) is RuntimeError


def _is_hash(etag: str | None, like: str | None = None) -> bool:
    lengths = (40, 64) if like is None else (len(like),)
    return etag is not None and len(etag) in lengths and set(etag) <= set("0123456789abcdef")


def _blob(path: Path) -> Path:
    """What a file of a snapshot links to: blobs/HASH, itself a link where repositories share their storage (Xet)."""
    return path.parent / os.readlink(path) if path.is_symlink() else path


def _known_hash(cached: Path, what: str, unnamed: bool) -> str | None:
    """The hash that the cache keeps a file by.

    Raises:
        HubError: If there is none (a cache without symbolic links, a server that states no hash), unless it may be.
    """
    digest = _blob(cached).name
    if not _is_hash(digest):
        if unnamed:
            return None
        raise HubError(f"{what}: nobody says what its hash should be, so it cannot be verified; load it as local-dir:")
    return digest


def _whole(path: Path) -> bool:
    """Whether a cached file has the hash that the cache keeps it by."""
    digest = _blob(path).name
    try:
        return _is_hash(digest) and bool(read_verified(path, digest))
    except UserError:
        return False


def _forget(path: Path) -> None:
    """Take a damaged file out of the Hub's cache, so that nobody takes it for good."""
    for part in (path.resolve(), _blob(path), path):
        part.unlink(missing_ok=True)

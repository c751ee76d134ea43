"""Publish a release folder on the Hugging Face Hub: python -m training.publish model_cards/NAME --repo-id ORG/NAME

One commit, tagged with the release's version; then what the Hub serves is downloaded afresh, every hash is compared,
and the model that comes out must give the logits of the local one. Running it again changes nothing; after an
interruption it completes what is missing.
"""

import argparse
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, GitRefs, HfApi, ModelCard, snapshot_download
from huggingface_hub.errors import HFValidationError, RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id

from risotto_zoo.checkpoints import WEIGHTS, read_verified
from risotto_zoo.creation import create_model
from risotto_zoo.errors import UserError, exits_cleanly
from risotto_zoo.files import git_sha1, sha256
from risotto_zoo.hub import explained, fetch, patiently
from risotto_zoo.loading import load

from .cards import card
from .console import say
from .files import read_json
from .release import COPIED, MADE, OPTIONAL

FILES = (*MADE, *COPIED)
VERSION = re.compile(r"v\d+")


def present(folder: Path) -> list[str]:
    """The files of a release that go to the Hub."""
    return [*FILES, *(name for name in OPTIONAL if (folder / name).is_file())]


def check(folder: Path) -> dict[str, Any]:
    """Make sure that a folder is a whole release whose parts belong together; returns its results.

    Raises:
        UserError: Naming the first thing that is missing or does not fit.
    """
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"{folder} is no release: it lacks {', '.join(missing)}; make one with python -m training.release"
        )
    results = read_json(folder / "results.json")
    try:
        sums = {name: str(results["sha256"][name]) for name in (*COPIED, WEIGHTS)}
        facts = str(results["name"]), int(results["version"]), results["bytes"]
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f"{folder / 'results.json'} is not that of a release; python -m training.release makes one"
        ) from None
    for name, digest in sums.items():
        try:
            read_verified(folder / name, digest, facts[2] if name == WEIGHTS else None)
        except UserError as error:
            raise UserError(f"{folder}: results.json does not belong to {name}. {error}") from None
    load(f"local-dir:{folder}")  # weights, architecture, preprocessing and labels fit each other
    _check_card(folder)
    return results


def _check_card(folder: Path) -> None:
    path = folder / "README.md"
    try:
        metadata = ModelCard.load(path).data.to_dict()
    except Exception as error:  # YAML and the card's schema raise their own kinds
        raise UserError(f"{path}: the card's metadata cannot be read: {str(error).splitlines()[0]}") from None
    wanted = {"library_name": "timm", "pipeline_tag": "image-classification"}
    for key, value in wanted.items():
        if metadata.get(key) != value:
            raise UserError(
                f"{path}: the card's {key} is {metadata.get(key)!r}, not {value!r}; run python -m training.cards"
            )
    text = path.read_text(encoding="utf-8")
    named = re.search(r'"hf-hub:([^"]+)"', text)  # that of a release which was fetched loads from where it was
    try:
        fresh = card(folder, named and named[1])
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path.parent / 'results.json'} lacks what the card tells; release the run again") from None
    if text != fresh:
        raise UserError(f"{path} does not say what results.json does; run python -m training.cards or release again")


def publish(folder: Path, repo_id: str, private: bool = False, revision: str | None = None) -> str:
    """Bring a release to the Hub and prove that it arrived; returns the commit.

    Args:
        folder: As `training.release` made it.
        repo_id: ORG/NAME.
        private: Create the repository as a private one; one that exists stays as it is.
        revision: Branch to commit to; main if None.

    Raises:
        UserError: If the folder is no whole release, the Hub cannot be reached or refuses, the repository holds
            something else or a newer version, the version is published already with other files, or what comes back is
            not what was sent.
    """
    results = check(folder)
    check_name(repo_id)
    _check_revision(revision)
    tag = f"v{results['version']}"
    local = {name: (folder / name).read_bytes() for name in present(folder)}
    local["README.md"] = card(folder, repo_id).encode()
    api = HfApi()
    try:
        patiently(lambda: api.create_repo(repo_id, private=private, exist_ok=True))
        info = patiently(lambda: api.model_info(repo_id))
        if private and not info.private:
            raise UserError(
                f"{repo_id} exists and is public; make it private on its settings page, or leave --private out"
            )
        refs = patiently(lambda: api.list_repo_refs(repo_id))
        begun = revision is None or revision in [branch.name for branch in refs.branches]
        _check_place(api, repo_id, revision if begun else None, results)
        _check_newest(repo_id, revision, refs, results)
        tagged = _tagged(api, repo_id, tag, local)
        if not begun:
            patiently(lambda: api.create_branch(repo_id, branch=revision, exist_ok=True))
        commit = _committed(api, repo_id, revision, f"{results['name']} {tag}", local)
        if not tagged:
            patiently(lambda: api.create_tag(repo_id, tag=tag, revision=commit, exist_ok=True))
        _verify(repo_id, commit, local)
    except Exception as error:
        raise explained(error, repo_id, repo_id) from None
    return commit


def check_name(repo_id: str) -> None:
    """Refuse what can be no repository's name."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise explained(error, repo_id, repo_id) from None
    if "/" not in repo_id:
        raise UserError(f"{repo_id!r} is no repository name: write it as ORG/NAME")


def _check_revision(revision: str | None) -> None:
    """Refuse a branch that would be taken for a version."""
    if revision is not None and VERSION.fullmatch(revision):
        raise UserError(f"--revision {revision}: names such as v1 are the versions' tags; name the branch otherwise")


def _check_place(api: HfApi, repo_id: str, revision: str | None, results: dict[str, Any]) -> None:
    """Refuse a repository of something else."""
    there = _files(api, repo_id, revision or "main").keys() - {".gitattributes"}
    if there:
        try:
            before = json.loads(fetch(repo_id, "results.json", revision)) if "results.json" in there else {}
        except ValueError:
            before = {}
        if not isinstance(before, dict) or before.get("name") != results["name"]:
            raise UserError(
                f"{repo_id} holds something else than {results['name']} ({', '.join(sorted(there)[:3])}, ...), which "
                "publishing would replace; name another repository, or empty this one first"
            )


def _check_newest(repo_id: str, revision: str | None, refs: GitRefs, results: dict[str, Any]) -> None:
    """Refuse to put an older version over a newer one."""
    newest = max((int(tag.name[1:]) for tag in refs.tags if VERSION.fullmatch(tag.name)), default=0)
    if revision in (None, "main") and newest > results["version"]:
        raise UserError(
            f"{repo_id} holds v{newest} already, which is newer than v{results['version']}; an older version is "
            "published beside it with --revision BRANCH"
        )


def _tagged(api: HfApi, repo_id: str, tag: str, local: dict[str, bytes]) -> bool:
    """Whether the version is published, with this very model.

    Raises:
        UserError: If it is, with another one. Card, log and figures of a version may change, its model may not.
    """
    try:
        there = _files(api, repo_id, tag)
    except RevisionNotFoundError:
        return False
    for name in ("config.json", WEIGHTS):
        if there.get(name) not in (sha256(local[name]), git_sha1(local[name])):
            raise UserError(
                f"{repo_id} holds {tag} already, with another {name}. The model of a version does not change: release "
                "the new run into the folder of the version before, by --output, which counts it up, or publish under "
                "another name"
            )
    return True


def _files(api: HfApi, repo_id: str, revision: str) -> dict[str, str]:
    """The hash of every file of a revision, by which the Hub names it."""
    info = patiently(lambda: api.model_info(repo_id, revision=revision, files_metadata=True))
    return {file.rfilename: file.lfs.sha256 if file.lfs else file.blob_id for file in info.siblings or []}


def _committed(api: HfApi, repo_id: str, revision: str | None, message: str, local: dict[str, bytes]) -> str:
    """The commit of the branch that holds these files and no others, made if it is not there."""
    branch = revision or "main"

    def attempt() -> str:
        there = _files(api, repo_id, branch)  # anew each time: the answer to a commit that went through may be lost
        surplus = sorted(there.keys() - local.keys() - {".gitattributes"})
        new = [name for name, data in local.items() if there.get(name) not in (sha256(data), git_sha1(data))]
        if not new and not surplus:
            say(f"{repo_id} holds these files already")
            return api.model_info(repo_id, revision=branch).sha
        say(f"uploading {sum(len(local[name]) for name in new) / 1e6:.1f} MB to {repo_id}")
        if surplus:
            say(f"removing what is not of the release: {', '.join(surplus)}")
        operations = [CommitOperationAdd(name, local[name]) for name in new]
        operations += [CommitOperationDelete(name) for name in surplus]
        return api.create_commit(repo_id, operations, commit_message=message, revision=revision).oid

    return patiently(attempt)


def _verify(repo_id: str, commit: str, local: dict[str, bytes]) -> None:
    """Download the commit into an empty cache, compare every file, and the logits of the two models."""
    with tempfile.TemporaryDirectory() as cache:
        download = lambda: snapshot_download(repo_id, revision=commit, cache_dir=cache)  # noqa: E731
        snapshot = Path(patiently(download))
        for name, data in local.items():
            path = snapshot / name
            if not path.is_file() or sha256(path.read_bytes()) != sha256(data):
                raise UserError(f"{repo_id}@{commit[:12]}: {name} came back from the Hub changed; run the same again")
        with tempfile.TemporaryDirectory() as sent:
            for name in ("config.json", WEIGHTS):
                (Path(sent) / name).write_bytes(local[name])
            ours, theirs = (create_model(f"local-dir:{place}", pretrained=True).eval() for place in (sent, snapshot))
    size = ours.pretrained_cfg["input_size"]
    images = torch.randn(4, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        if not torch.equal(ours(images), theirs(images)):
            raise UserError(f"{repo_id}@{commit[:12]}: the published model computes something else than the local one")


@exits_cleanly
def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.publish",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="The token is taken from HF_TOKEN or `hf auth login`; the Hub's address from HF_ENDPOINT.",
    )
    parser.add_argument("folder", type=Path, help="release folder, as python -m training.release makes it")
    parser.add_argument("--repo-id", required=True, metavar="ORG/NAME", help="repository on the Hub")
    parser.add_argument("--private", action="store_true", help="create the repository as a private one")
    parser.add_argument("--revision", help="branch to commit to (default: main)")
    parser.add_argument("--dry-run", action="store_true", help="check the folder and say what would be done")
    args = parser.parse_args()
    if args.dry_run:
        check_name(args.repo_id)
        _check_revision(args.revision)
        results = check(args.folder)
        for name in present(args.folder):
            print(f"{name:20} {(args.folder / name).stat().st_size:>12,} bytes")
        print(f"would be published as {args.repo_id}, version v{results['version']}")
        return
    commit = publish(args.folder, args.repo_id, args.private, args.revision)
    print(f"{args.repo_id} at {commit[:12]}: every file verified, logits equal")
    at = f"@{args.revision}" if args.revision else ""
    print(
        f"load      timm.create_model('hf-hub:{args.repo_id}{at}', pretrained=True)  # after import timm, risotto_zoo"
    )


if __name__ == "__main__":
    main()

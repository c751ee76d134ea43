"""Releases on their way: publish, fetch, verify, whatever the line, the Hub or the disk does to them."""

import contextlib
import dataclasses
import errno
import json
import os
import random
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from hub_server import TOKEN
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError

import risotto_zoo
from risotto_zoo import hub as fetching
from risotto_zoo.checkpoints import WEIGHTS, model_config, save_model
from risotto_zoo.cli import main as cli
from risotto_zoo.errors import UserError
from risotto_zoo.files import sha256, write_atomically
from training import cards, engine, evaluate, publish, release, tables, train
from training.distributed import World
from training.recipe import Recipe, load_recipe

OLD_SAFETENSORS = tuple(map(int, safetensors.__version__.split(".")[:2])) < (0, 7)

NAME = "risotto_resnet20.digits"
REPO = f"somebody/{NAME}"
COMMIT = "POST .*/commit/"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A finished run of the digits recipe, cut short."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    short = ["--set", "epochs=1", "--set", "warmup_epochs=0", "--set", "data.image_size=8", "--set", "batch_size=256"]
    command = [sys.executable, "-m", "training.train", "--recipe", "digits", *short, "--output", str(folder)]
    subprocess.run(command, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def released(run, tmp_path_factory) -> Path:
    return release.release(run, "digits", [run], tmp_path_factory.mktemp("release") / NAME)


@pytest.fixture
def folder(released, tmp_path) -> Path:
    """A release of this test's own."""
    copy = tmp_path / NAME
    copy.mkdir()
    for path in released.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


@pytest.fixture
def published(hub, folder) -> dict[str, bytes]:
    """The release is on the Hub, put there by other means."""
    files = {name: (folder / name).read_bytes() for name in publish.FILES}
    hub.put(REPO, files, tag="v1")
    return files


def logits(model):
    size = model.pretrained_cfg["input_size"]
    with torch.no_grad():
        return model.eval()(torch.randn(2, *size, generator=torch.Generator().manual_seed(0)))


def one_line(result):
    """The command failed as commands of this project do: one line on the error, no traceback, no token."""
    assert result.code == 2, result
    errors = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in result.err and TOKEN not in result.out + result.err
    return errors[0]


# --- the whole way


def test_from_a_run_to_a_new_process_with_an_empty_cache(run, hub, command, tmp_path):
    folder = tmp_path / "mine"
    assert command(release.main, run, "--tag", "digits", "--output", folder).code == 0
    result = command(publish.main, folder, "--repo-id", REPO)
    assert result.code == 0 and "logits equal" in result.out, result
    script = (
        "import sys, timm, torch, risotto_zoo, safetensors.torch as st\n"
        f"model = timm.create_model('hf-hub:{REPO}', pretrained=True).eval()\n"
        "images = torch.randn(2, *model.pretrained_cfg['input_size'], generator=torch.Generator().manual_seed(0))\n"
        "st.save_file({'logits': model(images).detach()}, sys.argv[1])"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path / "elsewhere")}
    subprocess.run([sys.executable, "-c", script, tmp_path / "out"], check=True, env=environment)
    theirs = safetensors.torch.load_file(tmp_path / "out")["logits"]
    assert torch.equal(theirs, logits(timm.create_model(f"local-dir:{run}", pretrained=True)))
    assert torch.equal(theirs, logits(risotto_zoo.load(f"hf-hub:{REPO}", revision="v1").model))


def test_publishing_twice_changes_nothing(folder, hub, command):
    assert command(publish.main, folder, "--repo-id", REPO).code == 0
    before = dict(hub.repos[REPO].commits), dict(hub.repos[REPO].tags)
    hub.requests.clear()
    assert command(publish.main, folder, "--repo-id", REPO).code == 0
    assert (hub.repos[REPO].commits, hub.repos[REPO].tags) == before
    assert not [request for request in hub.requests if request.startswith("PUT") or "/commit/" in request]


def test_one_commit_private_and_on_a_branch(folder, hub, command):
    assert command(publish.main, folder, "--repo-id", REPO, "--private", "--revision", "next").code == 0
    repo = hub.repos[REPO]
    assert repo.private and len(repo.commits) == 2 and repo.tags == {"v1": repo.branches["next"]}
    assert repo.commits[repo.branches["main"]] == {}
    assert set(repo.commits[repo.branches["next"]]) == set(publish.FILES)


def test_dry_run_asks_nobody(folder, hub, command):
    result = command(publish.main, folder, "--repo-id", REPO, "--dry-run")
    assert result.code == 0 and "version v1" in result.out and not hub.requests


# --- publishing through faults

STEPS = ["POST /api/repos/create", "/preupload/", "POST .*/objects/batch", "PUT /upload/", "POST /verify/",
         COMMIT, "POST .*/tag/", "GET /api/models/.*/revision", "GET .*/resolve/", "GET /cdn/"]  # fmt: skip


@pytest.mark.parametrize(
    ("step", "kind"), [(step, kind) for step in STEPS for kind in (503, "drop")] + [(COMMIT, 429), (COMMIT, 500)]
)
def test_publishing_survives_a_fault_that_passes(step, kind, folder, hub, command):
    hub.fail(step, kind)
    result = command(publish.main, folder, "--repo-id", REPO)
    if result.code:  # where the client gives up at once, the next run completes it
        one_line(result)
        result = command(publish.main, folder, "--repo-id", REPO)
    assert result.code == 0, result
    assert all(fault.times == 0 for fault in hub.faults)
    assert hub.repos[REPO].commits[hub.repos[REPO].tags["v1"]].keys() == set(publish.FILES)


@pytest.mark.parametrize(
    ("step", "kind"),
    [(step, kind) for step in STEPS[:-2] for kind in (401, "drop")] + [(COMMIT, kind) for kind in (403, 404, 429, 503)],
)
def test_a_lasting_fault_is_one_line_and_the_published_stays_whole(step, kind, folder, published, hub, command):
    version_up(folder)
    hub.fail(step, kind, times=None)
    result = command(publish.main, folder, "--repo-id", REPO)
    if result.code:  # some steps turn out not to be needed: the repository exists, the upload had arrived
        one_line(result)
    hub.faults.clear()
    repo = hub.repos[REPO]
    assert repo.commits[repo.tags["v1"]] == published  # as it was
    assert all(set(files) == set(publish.FILES) for files in repo.commits.values())
    assert command(publish.main, folder, "--repo-id", REPO).code == 0
    assert set(repo.tags) == {"v1", "v2"} and repo.commits[repo.tags["v1"]] == published


def version_up(folder):
    """Another run of the same model, as `training.release` would count it."""
    state = safetensors.torch.load_file(folder / WEIGHTS)
    state["fc.bias"] += 1
    safetensors.torch.save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    data = (folder / WEIGHTS).read_bytes()
    results = json.loads((folder / "results.json").read_text())
    results |= {"version": 2, "bytes": len(data), "sha256": results["sha256"] | {WEIGHTS: sha256(data)}}
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "README.md").write_text(cards.card(folder))


@pytest.mark.parametrize("kind", ["flip", "truncate"])
@pytest.mark.parametrize("step", ["GET .*/resolve/", "GET /cdn/"])
def test_publishing_notices_what_comes_back_changed(kind, step, folder, hub, command):
    hub.fail(step, kind, times=None)
    one_line(command(publish.main, folder, "--repo-id", REPO))
    hub.faults.clear()
    assert command(publish.main, folder, "--repo-id", REPO).code == 0


def test_a_rejected_commit_is_told_and_leaves_the_repository_as_it_was(folder, published, hub, command):
    version_up(folder)
    hub.fail("POST .*/commit/", 412, times=None)
    assert "412" in one_line(command(publish.main, folder, "--repo-id", REPO))
    assert len(hub.repos[REPO].commits) == 1


def test_a_new_card_reaches_the_branch_and_leaves_the_version(folder, published, hub, command):
    results = json.loads((folder / "results.json").read_text())
    (folder / "results.json").write_text(json.dumps({**results, "baselines": []}))
    (folder / "README.md").write_text(cards.card(folder))
    hub.repos[REPO].commits[hub.repos[REPO].branches["main"]]["pytorch_model.bin"] = b"somebody's pickle"
    assert command(publish.main, folder, "--repo-id", REPO).code == 0
    repo = hub.repos[REPO]
    assert set(repo.commits[repo.branches["main"]]) == set(publish.FILES)
    assert repo.commits[repo.tags["v1"]][WEIGHTS] == published[WEIGHTS] and set(repo.tags) == {"v1"}
    assert f"hf-hub:{REPO}" in repo.commits[repo.branches["main"]]["README.md"].decode()


def test_a_second_branch_gets_the_files_too(folder, hub, command):
    for more in (["--revision", "next"], []):
        result = command(publish.main, folder, "--repo-id", REPO, *more)
        assert result.code == 0 and f"{REPO}{'@next' if more else ''}'" in result.out
    repo = hub.repos[REPO]
    assert repo.commits[repo.branches["main"]] == repo.commits[repo.branches["next"]] != {}


def test_private_is_not_granted_to_a_public_repository(folder, published, hub, command):
    assert "is public" in one_line(command(publish.main, folder, "--repo-id", REPO, "--private"))


def test_a_repository_of_something_else_is_left_alone(folder, published, hub, command):
    for files in ({"notes.ipynb": b"{}", "README.md": b"mine"}, {"results.json": b'{"name": "another"}'}):
        hub.put("somebody/else", files)
        assert "something else" in one_line(command(publish.main, folder, "--repo-id", "somebody/else"))
        assert hub.repos["somebody/else"].commits[hub.repos["somebody/else"].branches["main"]] == files


def test_a_release_that_was_fetched_is_published_elsewhere(folder, hub, command):
    (folder / "README.md").write_text(cards.card(folder, REPO))
    assert command(publish.main, folder, "--repo-id", "somebody/copy").code == 0
    there = hub.repos["somebody/copy"]
    assert b'"hf-hub:somebody/copy"' in there.commits[there.branches["main"]]["README.md"]


def test_an_older_version_does_not_replace_a_newer_one(folder, published, hub, command, tmp_path):
    older = tmp_path / "older"
    shutil.copytree(folder, older)
    version_up(folder)
    assert command(publish.main, folder, "--repo-id", REPO).code == 0
    before = hub.repos[REPO].branches["main"]
    assert "newer than v1" in one_line(command(publish.main, older, "--repo-id", REPO))
    assert "newer than v1" in one_line(command(publish.main, older, "--repo-id", REPO, "--revision", "main"))
    assert hub.repos[REPO].branches["main"] == before
    assert "the versions' tags" in one_line(command(publish.main, folder, "--repo-id", REPO, "--revision", "v1"))
    other = {**json.loads((older / "results.json").read_text()), "name": "risotto_resnet20.other"}
    hub.put("somebody/else", {"results.json": json.dumps(other).encode()})
    args = [older, "--repo-id", "somebody/else", "--revision", "old"]
    assert "holds something else" in one_line(command(publish.main, *args))
    assert list(hub.repos["somebody/else"].branches) == ["main"]
    assert command(publish.main, older, "--repo-id", REPO, "--revision", "old").code == 0


def test_the_answer_to_a_commit_that_went_through_may_be_lost(folder, published, hub, command):
    version_up(folder)
    hub.fail(COMMIT, "lose")
    result = command(publish.main, folder, "--repo-id", REPO)
    repo = hub.repos[REPO]
    assert result.code == 0 and len(repo.commits) == 2 and repo.tags["v2"] == repo.branches["main"], result


def test_a_version_is_never_changed(folder, published, hub, command):
    hub.repos[REPO].commits[hub.repos[REPO].tags["v1"]]["config.json"] = b"others"
    assert "does not change" in one_line(command(publish.main, folder, "--repo-id", REPO))


def test_no_token_and_a_wrong_one(folder, hub, command, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    error = one_line(command(publish.main, folder, "--repo-id", REPO))
    assert "HF_TOKEN" in error and "hf_wrong" not in error
    monkeypatch.delenv("HF_TOKEN")
    assert "HF_TOKEN" in one_line(command(publish.main, folder, "--repo-id", REPO))


@pytest.mark.parametrize("name", ["", "no spaces", "a/b/c", "-x/y", "x/" + "n" * 120])
def test_impossible_repository_names(name, folder, hub, command):
    assert "repository" in one_line(command(publish.main, folder, f"--repo-id={name}"))


def test_publish_refuses_what_is_no_whole_release(folder, hub, command):
    def refused(word):
        assert word in one_line(command(publish.main, folder, "--repo-id", REPO))

    card, results = folder / "README.md", folder / "results.json"
    text = card.read_text()
    card.write_text(text.replace("library_name: timm", "library_name: keras"))
    refused("library_name")
    card.write_text(text.replace("parameters", "parrots"))
    refused("does not say what")
    card.write_text("---\n: [\n---\n")
    refused("metadata")
    card.write_text(text)
    weights = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    refused("does not belong to model.safetensors")
    (folder / WEIGHTS).write_bytes(weights)
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace("risotto_resnet20", "risotto_resnet32"))
    refused("does not belong to config.json")
    (folder / "config.json").write_text(config)
    facts = json.loads(results.read_text())
    for change in ({"version": "1 2"}, {"sha256": "x"}, {"bytes": -1}, {"evaluation": []}):
        results.write_text(json.dumps({**facts, **change}))
        refused("results.json" if "bytes" not in change else "does not belong to model.safetensors")
    results.write_text("{")
    refused("results.json")
    results.unlink()
    refused("results.json")
    assert not hub.repos


# --- loading through faults


BODY_FAULTS = (429, 500, "drop", "truncate", "flip", "slow")


@pytest.mark.parametrize(
    ("step", "kind"),
    [("HEAD .*/resolve/", kind) for kind in BODY_FAULTS[:3]]
    + [(step, kind) for step in ("GET .*/resolve/", "GET /cdn/") for kind in BODY_FAULTS],
)
def test_loading_survives_a_fault_that_passes(step, kind, published, hub, command, folder):
    hub.fail(step, kind)
    result = command(cli, "predict", folder / "curves.png", "--model", f"hf-hub:{REPO}")
    assert result.code == 0 and "%" in result.out, result
    assert hub.faults[0].times == 0


@pytest.mark.parametrize("step", ["HEAD .*/resolve/.*/config", "HEAD .*/resolve/.*safetensors", "GET /cdn/"])
@pytest.mark.parametrize("kind", [401, 403, 404, 429, 503, "drop", "truncate", "flip"])
def test_a_lasting_fault_leaves_nothing_loadable(step, kind, published, hub, command, folder):
    ask = [cli, "predict", folder / "curves.png", "--model", f"hf-hub:{REPO}"]
    if step.startswith("HEAD") and kind in ("truncate", "flip"):
        pytest.skip("a HEAD has no body")
    hub.fail(step, kind, times=None)
    one_line(command(*ask))
    hub.faults.clear()
    cached = huggingface_hub.try_to_load_from_cache(REPO, WEIGHTS)
    assert not isinstance(cached, str) or Path(cached).read_bytes() == published[WEIGHTS]
    assert command(*ask).code == 0


def test_a_token_that_is_none_is_one_line(folder, command, monkeypatch, hub):
    monkeypatch.setenv("HF_TOKEN", "hf_tökén")
    result = command(publish.main, folder, "--repo-id", REPO)
    assert result.code == 2 and "the token" in result.err and "Traceback" not in result.err


def test_what_the_cache_holds_is_verified_each_time_and_mended(published, hub):
    good = logits(risotto_zoo.load(f"hf-hub:{REPO}").model)
    for name in (WEIGHTS, "config.json"):
        path = Path(huggingface_hub.try_to_load_from_cache(REPO, name))
        data = bytearray(path.read_bytes())
        data[-9] ^= 4
        path.write_bytes(data)
        assert torch.equal(logits(risotto_zoo.load(f"hf-hub:{REPO}").model), good)
        assert path.read_bytes() == published[name]


def test_a_cached_version_survives_a_hub_that_fails_while_a_newer_one_is_fetched(published, hub, monkeypatch):
    good = risotto_zoo.load(f"hf-hub:{REPO}").model.fc.bias
    state = safetensors.torch.load(published[WEIGHTS])
    state["fc.bias"] = state["fc.bias"] + 1
    config = published["config.json"].replace(b'"crop_pct": 1.0', b'"crop_pct": 0.5')
    hub.put(REPO, {"config.json": config, WEIGHTS: safetensors.torch.save(state)})
    told = huggingface_hub.get_hf_file_metadata

    def then_nothing(url, **options):
        known = told(url, **options)
        hub.fail(".*", 503, times=None)
        return known

    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub, "get_hf_file_metadata", then_nothing)
        assert torch.equal(risotto_zoo.load(f"hf-hub:{REPO}").model.fc.bias, good)
    hub.faults.clear()
    assert torch.equal(risotto_zoo.load(f"hf-hub:{REPO}").model.fc.bias, state["fc.bias"])


def test_timm_itself_mends_a_damaged_config(published, hub):
    risotto_zoo.load(f"hf-hub:{REPO}")
    path = Path(huggingface_hub.try_to_load_from_cache(REPO, "config.json"))
    path.write_bytes(path.read_bytes().replace(b'"crop_pct": 1.0', b'"crop_pct": 0.5'))
    assert timm.create_model(f"hf-hub:{REPO}", pretrained=True).pretrained_cfg["crop_pct"] == 1.0


@pytest.mark.parametrize("kind", ["flip", "truncate", 404, 503, "drop"])
def test_a_lasting_fault_of_the_config_reaches_users_of_timm_in_one_line(kind, published, hub):
    hub.fail("GET .*/config.json", kind, times=None)
    hub.fail("HEAD .*/config.json", kind, times=None) if kind not in ("flip", "truncate") else None
    with pytest.raises(UserError):
        timm.create_model(f"hf-hub:{REPO}", pretrained=True)
    hub.faults.clear()
    assert logits(timm.create_model(f"hf-hub:{REPO}", pretrained=True)).isfinite().all()


def test_only_safetensors_are_read(published, hub):
    files = {name: data for name, data in published.items() if name != WEIGHTS}
    hub.put(REPO, {**files, "pytorch_model.bin": b"\x80\x04K\x01."})
    with pytest.raises(UserError, match="only safetensors"):
        timm.create_model(f"hf-hub:{REPO}", pretrained=True)
    assert not any("pytorch_model.bin" in request for request in hub.requests)


def test_only_safetensors_are_read_from_a_folder(folder):
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="other formats"):
        timm.create_model(f"local-dir:{folder}", pretrained=True)


def test_a_configuration_cannot_send_anyone_to_another_file(published, hub, tmp_path):
    """Neither to a pickle, for architectures of timm, nor to a file on this machine, for ours."""
    config = json.loads(published["config.json"])
    config["pretrained_cfg"]["file"] = str(tmp_path / "other.safetensors")
    safetensors.torch.save_file({"fc.bias": torch.zeros(10)}, tmp_path / "other.safetensors")
    hub.put(REPO, {**published, "config.json": json.dumps(config).encode()})
    model = timm.create_model(f"hf-hub:{REPO}", pretrained=True)
    assert torch.equal(model.fc.bias, safetensors.torch.load(published[WEIGHTS])["fc.bias"])
    for asked in ({"hf_hub_filename": "evil.bin"}, {"custom_load": "hf"}):
        other = {"architecture": "resnet10t", "num_classes": 3, "pretrained_cfg": {"num_classes": 3, **asked}}
        files = {"config.json": json.dumps(other).encode(), WEIGHTS: published[WEIGHTS], "evil.bin": b"\x80\x04K\x01."}
        hub.put("evil/config", files)
        with pytest.raises(UserError, match=r"only model.safetensors is read"):
            risotto_zoo.load("hf-hub:evil/config")
    assert not any("evil.bin" in request for request in hub.requests)
    other["pretrained_cfg"] = {"num_classes": 3, "custom_load": True}  # of other weights; timm passes over it
    state = timm.create_model("resnet10t", num_classes=3).state_dict()
    hub.put("fine/config", {"config.json": json.dumps(other).encode(), WEIGHTS: safetensors.torch.save(state)})
    assert timm.create_model("hf-hub:fine/config", pretrained=True).num_classes == 3
    with pytest.raises(UserError, match="no safetensors on the Hub"):
        risotto_zoo.load("gcvit_xxtiny")


def test_a_revision_has_its_own_weights_and_its_own_labels(published, folder, hub):
    version_up(folder)
    files = {name: (folder / name).read_bytes() for name in publish.FILES}
    config = json.loads(files["config.json"])
    config["label_names"] = config["pretrained_cfg"]["label_names"] = [f"digit {i}" for i in range(10)]
    hub.put(REPO, {**files, "config.json": json.dumps(config).encode()}, tag="v2")
    old, new = (
        safetensors.torch.load(data)["fc.bias"] for data in (published[WEIGHTS], (folder / WEIGHTS).read_bytes())
    )
    assert torch.equal(risotto_zoo.load(f"hf-hub:{REPO}", revision="v1").model.fc.bias, old)
    assert torch.equal(timm.create_model(f"hf-hub:{REPO}@v1", pretrained=True).fc.bias, old)
    assert torch.equal(timm.create_model(f"hf-hub:{REPO}", pretrained=True).fc.bias, new)
    assert risotto_zoo.load(f"hf-hub:{REPO}", revision="v1").classes == list("0123456789")
    assert risotto_zoo.load(f"hf-hub:{REPO}").classes == config["label_names"]
    model = timm.create_model(f"hf-hub:{REPO}@v1", pretrained=True)
    assert list(model.pretrained_cfg["label_names"]) == list("0123456789")


def test_a_release_is_had_in_the_revision_asked_for(hub, command):
    """Its own is on this machine; any other comes from the Hub."""
    name = "risotto_resnet20.cifar10-jpeg"
    source = cards.CARDS / name
    state = safetensors.torch.load_file(source / WEIGHTS)
    state["fc.bias"] = torch.eye(10)[3] * 1e4
    files = {WEIGHTS: safetensors.torch.save(state), "config.json": (source / "config.json").read_bytes()}
    hub.put(fetching.repository(name), files, tag="v0")
    ours = risotto_zoo.load(name, revision=fetching.MANIFEST[name]["revision"])
    assert not hub.requests and not torch.equal(ours.model.fc.bias, state["fc.bias"])
    other = risotto_zoo.load("risotto_resnet20", revision="v0")
    assert torch.equal(other.model.fc.bias, state["fc.bias"])
    result = command(cli, "predict", source / "curves.png", "--model", name, "--revision", "v0", "--top", 1)
    assert f"100.00%  {ours.classes[3]}" in result.out


def test_a_cache_of_the_callers_own_is_the_only_one_used(published, folder, hub, tmp_path, monkeypatch):
    usual, own = Path(huggingface_hub.constants.HF_HUB_CACHE), tmp_path / "own"
    args, name = hub_only(monkeypatch, folder, hub)
    timm.create_model(f"hf-hub:{REPO}", pretrained=True, cache_dir=own)
    timm.create_model("risotto_resnet20", **args, cache_dir=own)
    assert {path.name for path in own.glob("models--*")} == {
        f"models--{repo.replace('/', '--')}" for repo in (REPO, fetching.repository(name))
    }
    assert not list(usual.glob("models--*"))


def test_a_private_repository_opens_to_its_token(published, hub, monkeypatch):
    hub.repos[REPO].private = True
    assert timm.create_model(f"hf-hub:{REPO}", pretrained=True) is not None
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    huggingface_hub.constants.HF_HUB_CACHE += "-empty"
    with pytest.raises(UserError, match="the token is missing, wrong or does not open it"):
        timm.create_model(f"hf-hub:{REPO}", pretrained=True)


def test_a_revision_a_repository_and_a_file_that_are_not_there(published, hub):
    with pytest.raises(UserError, match="no such revision"):
        risotto_zoo.load(f"hf-hub:{REPO}", revision="v9")
    with pytest.raises(UserError, match="no such repository"):
        risotto_zoo.load("hf-hub:somebody/nothing")
    with pytest.raises(UserError, match="no release"):
        risotto_zoo.load("resnet18", revision="v1")


def hub_only(monkeypatch, folder, hub):
    """The release as the manifest would list it if its weights were on the Hub alone; its timm arguments."""
    config = json.loads((folder / "config.json").read_text())
    results = json.loads((folder / "results.json").read_text())
    entry = {"location": "hub", "revision": "v1", "bytes": results["bytes"], "sha256": results["sha256"][WEIGHTS]}
    name = "risotto_resnet20.elsewhere"
    monkeypatch.setitem(fetching.MANIFEST, name, {**entry, "config": config})
    hub.put(fetching.repository(name), {WEIGHTS: (folder / WEIGHTS).read_bytes()}, tag="v1")
    cfg = {**config["pretrained_cfg"], "architecture": "risotto_resnet20", "tag": "elsewhere"}
    return {"pretrained": True, "pretrained_cfg": cfg}, name


def test_a_release_that_is_on_the_hub_alone(folder, hub, monkeypatch):
    args, name = hub_only(monkeypatch, folder, hub)
    model = timm.create_model("risotto_resnet20", **args)
    assert torch.equal(logits(model), logits(timm.create_model(f"local-dir:{folder}", pretrained=True)))
    asked = len(hub.requests)
    timm.create_model("risotto_resnet20", **args)
    assert len(hub.requests) == asked  # the cache holds what the manifest names: nobody need be asked
    hub.put(fetching.repository(name), {WEIGHTS: b"others"}, tag="v1")
    huggingface_hub.constants.HF_HUB_CACHE += "-empty"
    with pytest.raises(UserError, match="not the file this version"):
        timm.create_model("risotto_resnet20", **args)


def test_a_damaged_release_on_this_machine_is_not_loaded(monkeypatch, tmp_path):
    name = "risotto_resnet20.cifar10-jpeg"
    data = bytearray(fetching.release_file(name).read_bytes())
    data[-7] ^= 1
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / f"{name}.safetensors").write_bytes(data)
    monkeypatch.setattr(fetching, "PACKAGE", tmp_path)
    with pytest.raises(UserError, match="damaged or was changed"):
        fetching.release_weights(name)


def test_the_mend_fits_the_fault(published, folder, hub, monkeypatch):
    hub.put("somebody/empty", {"config.json": published["config.json"]})
    with pytest.raises(UserError, match="has no such file; only safetensors"):
        risotto_zoo.load("hf-hub:somebody/empty")
    args, name = hub_only(monkeypatch, folder, hub)
    monkeypatch.setattr(fetching, "ORGANIZATION", "nobody")
    for location, told in (("hub", False), ("repository", True)):
        fetching.MANIFEST[name]["location"] = location
        with pytest.raises(UserError, match="no such repository") as caught:
            timm.create_model("risotto_resnet20", **args)
        assert (f"local-dir:model_cards/{name}" in str(caught.value)) == told
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "blobs/x")
    assert "cannot be stored: No space left" in str(fetching.explained(full, "x", REPO))
    gated = GatedRepoError.__new__(GatedRepoError)  # it would take a response of the client's HTTP library
    assert f"ask for access at {hub.url}/{REPO}" in str(fetching.explained(gated, "x", REPO))
    lost = LocalEntryNotFoundError("not in the cache")
    assert "cannot be reached" in str(fetching.explained(lost, "x", REPO))
    refused = ConnectionError("404 Not Found: /api/models/x/xet-write-token/main")
    assert "or set HF_HUB_DISABLE_XET=1" in str(fetching.explained(refused, "x", REPO))


def test_a_mirror_that_states_no_sha256_is_checked_by_the_manifests(folder, hub, monkeypatch):
    args, name = hub_only(monkeypatch, folder, hub)
    told = huggingface_hub.get_hf_file_metadata

    def vague(*given, **options):
        return dataclasses.replace(told(*given, **options), etag="d41d8cd98f00b204e9800998ecf8427e")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", vague)
    timm.create_model("risotto_resnet20", **args)
    hub.put(fetching.repository(name), {WEIGHTS: b"others"}, tag="v1")
    huggingface_hub.constants.HF_HUB_CACHE += "-empty"
    with pytest.raises(UserError, match="nothing was kept"):
        timm.create_model("risotto_resnet20", **args)


def test_the_manifests_hash_counts_without_a_network_too(folder, hub, monkeypatch):
    """The cache holds another file under the release's name, whole by the Hub's word, and the Hub is out of order."""
    args, name = hub_only(monkeypatch, folder, hub)
    version_up(folder)
    hub.put(fetching.repository(name), {WEIGHTS: (folder / WEIGHTS).read_bytes()}, tag="v1")
    huggingface_hub.hf_hub_download(fetching.repository(name), WEIGHTS, revision="v1")
    hub.fail(".*", 503, times=None)
    with pytest.raises(UserError, match="damaged or was changed"):
        timm.create_model("risotto_resnet20", **args)


@pytest.mark.parametrize(
    ("step", "kind"), [(step, kind) for step in ("HEAD .*/resolve/", "GET /cdn/") for kind in (404, 503, "drop")]
)
def test_a_lasting_fault_on_the_way_to_a_release_is_one_line(step, kind, folder, hub, monkeypatch):
    args, _ = hub_only(monkeypatch, folder, hub)
    hub.fail(step, kind, times=None)
    with pytest.raises(UserError):
        timm.create_model("risotto_resnet20", **args)
    hub.faults.clear()
    model = timm.create_model("risotto_resnet20", **args)
    assert torch.equal(logits(model), logits(timm.create_model(f"local-dir:{folder}", pretrained=True)))


@pytest.mark.parametrize("kind", ["flip", "truncate", 404, 503, "drop"])
def test_a_lasting_fault_of_the_weights_reaches_users_of_timm_in_one_line(kind, published, hub):
    hub.fail("GET /cdn/", kind, times=None)
    with pytest.raises(UserError):
        timm.create_model(f"hf-hub:{REPO}", pretrained=True)
    hub.faults.clear()
    assert logits(timm.create_model(f"hf-hub:{REPO}", pretrained=True)).isfinite().all()


def test_without_a_network_it_says_so_soon(tmp_path):
    """In a new process whose Hub takes connections and never answers."""
    script = (
        "import time, warnings; warnings.simplefilter('ignore')\n"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "import risotto_zoo, timm\nfrom risotto_zoo import errors, hub\n"
        "hub.MANIFEST['risotto_resnet20.elsewhere'] = {'location': 'hub', 'revision': 'v1', 'bytes': 1,"
        " 'sha256': '0' * 64}\n"
        "def told(function, name):\n"
        "    start = time.monotonic()\n"
        "    try:\n"
        "        function(name)\n"
        "    except errors.UserError as error:\n"
        "        return f'{time.monotonic() - start} {error}'\n"
        "functions = [hub.release_weights, risotto_zoo.load, risotto_zoo.load, timm.create_model]\n"
        "names = ['risotto_resnet20.elsewhere', 'hf-hub:somebody/else', 'resnet18', 'hf-hub:somebody/else']\n"
        "with ThreadPoolExecutor(4) as pool:\n"
        "    print(*pool.map(told, functions, names), sep='\\n')\n"
    )
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path), "RISOTTO_ZOO_ORG": "ours"}
        done = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120
        )
    lines = done.stdout.splitlines()
    assert len(lines) == 4, done.stderr
    assert "ours/risotto_resnet20.elsewhere" in lines[0]
    for line in lines:
        seconds, _, message = line.partition(" ")
        assert float(seconds) < 10 and "cannot be reached" in message and "hf download" in message, line


@contextlib.contextmanager
def offline(monkeypatch):
    """As in a process that was started with HF_HUB_OFFLINE=1; the client keeps a session as it began."""
    forget = getattr(huggingface_hub, "close_session", None) or huggingface_hub.utils.reset_sessions  # before 1.0
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    forget()
    try:
        yield
    finally:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        forget()


def test_offline_mode_takes_what_is_cached_and_names_what_is_not(published, hub, monkeypatch):
    good = logits(risotto_zoo.load(f"hf-hub:{REPO}").model)
    with offline(monkeypatch):
        assert torch.equal(logits(risotto_zoo.load(f"hf-hub:{REPO}").model), good)
        with pytest.raises(UserError, match="HF_HUB_OFFLINE"):
            risotto_zoo.load("hf-hub:somebody/else")


def test_a_cache_that_shares_its_storage_is_verified_by_the_file_and_mended(published, hub):
    """Where Xet is in use, blobs/SHA256 links on to a file that bears another hash."""
    good = logits(risotto_zoo.load(f"hf-hub:{REPO}").model)
    cache = Path(huggingface_hub.constants.HF_HUB_CACHE)
    blob = cache / f"models--{REPO.replace('/', '--')}" / "blobs" / sha256(published[WEIGHTS])
    shared = cache / "blobs" / "ab" / ("ab" * 32)
    shared.parent.mkdir(parents=True)
    blob.rename(shared)
    blob.symlink_to(os.path.relpath(shared, blob.parent))
    hub.fail(".*", 503, times=None)
    assert torch.equal(logits(risotto_zoo.load(f"hf-hub:{REPO}").model), good)
    shared.write_bytes(shared.read_bytes()[:-1] + b"?")
    with pytest.raises(UserError, match="damaged or was changed"):
        risotto_zoo.load(f"hf-hub:{REPO}")
    hub.faults.clear()
    assert torch.equal(logits(risotto_zoo.load(f"hf-hub:{REPO}").model), good)


def test_what_the_hub_refuses_is_an_os_error_as_it_is_to_the_hubs_own_client(hub):
    with pytest.raises(OSError, match="there is no such repository"):
        timm.create_model("hf-hub:somebody/else", pretrained=True)


def test_other_peoples_configurations_load_from_a_cache_without_hashes(monkeypatch):
    model, commit = timm.create_model("resnet18", num_classes=2), "0" * 40
    config = model_config(model, [*"ab"], timm.data.resolve_data_config(model=model), {})
    folder = Path(huggingface_hub.constants.HF_HUB_CACHE) / "models--some--body"
    save_model(folder / "snapshots" / commit, model.state_dict(), config)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    with offline(monkeypatch):
        assert timm.create_model("hf-hub:some/body").num_classes == 2
        with pytest.raises(UserError, match="nobody says what its hash should be"):
            fetching.fetch("some/body", WEIGHTS)


# --- weights that are not what they should be


def test_every_single_byte_counts(folder):
    good, draw = (folder / WEIGHTS).read_bytes(), random.Random(0)
    for _ in range(200):
        data = bytearray(good)
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        (folder / WEIGHTS).write_bytes(data)
        with pytest.raises(UserError, match="damaged or was changed"):
            timm.create_model(f"local-dir:{folder}", pretrained=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("layer2.0.conv1.weight"), "lacks the tensor layer2.0.conv1.weight"),
        (lambda s: s.update(extra=torch.zeros(1)), "holds a tensor extra"),
        (lambda s: s.update({"fc.bias": torch.zeros(11)}), "fc.bias has shape"),
        (lambda s: s["conv1.weight"].view(-1)[:1].fill_(float("nan")), "conv1.weight holds values that are not finite"),
        (lambda s: s["fc.bias"][:1].fill_(float("inf")), "not finite"),
        pytest.param(
            lambda s: s.update({"fc.bias": torch.zeros(10, dtype=torch.complex64)}),
            "fc.bias is complex64",
            marks=pytest.mark.skipif(OLD_SAFETENSORS, reason="safetensors cannot write these before 0.7"),
        ),
        (lambda s: s.update({"fc.bias": torch.zeros(10).to(torch.float8_e5m2)}), "fc.bias is float8_e5m2"),
        (lambda s: s.update({"fc.bias": torch.zeros(10, dtype=torch.int64)}), "fc.bias is torch.int64, but"),
    ],
)
@pytest.mark.parametrize("arguments", [{}, {"num_classes": 3, "in_chans": 3}, {"features_only": True}])
def test_tensors_that_do_not_fit_are_named(change, message, arguments, folder):
    state = safetensors.torch.load_file(folder / WEIGHTS)
    change(state)
    safetensors.torch.save_file(state, folder / WEIGHTS)
    (folder / "results.json").unlink()
    with pytest.raises(UserError, match=message):
        timm.create_model(f"local-dir:{folder}", pretrained=True, **arguments)


def test_another_architecture_and_a_truncated_file(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architecture": "risotto_resnet32"}))
    with pytest.raises(UserError, match="belongs to another architecture"):
        timm.create_model(f"local-dir:{folder}", pretrained=True)
    (folder / "results.json").unlink()
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:5000])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        timm.create_model(f"local-dir:{folder}", pretrained=True)


def test_what_weights_do_not_fit_is_told_as_timm_tells_it():
    with pytest.raises(RuntimeError, match="risotto_resnet32 has no pretrained weights"):
        timm.create_model("risotto_resnet32", pretrained=True)
    for arguments in ({"global_pool": "catavgmax"}, {"init": "fixup"}):
        with pytest.raises(UserError, match=f"made for another {next(iter(arguments))}, which create_model was given"):
            timm.create_model("risotto_resnet20", pretrained=True, **arguments)


def test_a_cfg_that_names_other_weights_gets_those_or_none(folder, published, hub):
    overlay = {"hf_hub_id": REPO, "file": None, "num_classes": 10, "input_size": (1, 8, 8)}
    model = timm.create_model("risotto_resnet20", pretrained=True, pretrained_cfg_overlay=overlay)
    assert torch.equal(model.fc.weight, safetensors.torch.load_file(folder / WEIGHTS)["fc.weight"])
    with pytest.raises(UserError, match="URL"):
        timm.create_model("risotto_resnet32", pretrained=True, pretrained_cfg_overlay={"url": "http://x/y.safetensors"})
    with pytest.raises(UserError, match=r"hf_hub_filename is 'ema.safetensors'"):
        timm.create_model(
            "risotto_resnet20",
            pretrained=True,
            pretrained_cfg_overlay={**overlay, "hf_hub_filename": "ema.safetensors"},
        )
    with pytest.raises(UserError, match=r"x.pth: only safetensors are read"):
        timm.create_model("risotto_resnet20", pretrained=True, pretrained_cfg_overlay={"file": "x.pth"})
    with pytest.raises(UserError, match="the state dict lacks the tensor"):
        timm.create_model("risotto_resnet20", pretrained=True, pretrained_cfg_overlay={"state_dict": {"x": 1}})
    given = {"state_dict": safetensors.torch.load_file(folder / WEIGHTS)}
    model = timm.create_model("risotto_resnet20", pretrained_cfg_overlay=given, seed=0)
    assert torch.equal(model.conv1.weight, timm.create_model("risotto_resnet20", seed=0).conv1.weight)


def test_weights_serve_nets_with_another_head_and_none(folder, tmp_path):
    for more in ({"num_classes": 5, "global_pool": "catavgmax"}, {"num_classes": 0, "global_pool": "catavgmax"}):
        model = timm.create_model(f"local-dir:{folder}", pretrained=True, **more)
        assert torch.equal(model.conv1.weight, safetensors.torch.load_file(folder / WEIGHTS)["conv1.weight"])
    headless = timm.create_model("risotto_resnet20", num_classes=0, seed=0)
    timm.models.save_for_hf(headless, tmp_path / "headless", safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path / 'headless'}", pretrained=True)
    assert torch.equal(again.conv1.weight, headless.conv1.weight) and again.num_classes == 0


def test_no_pickle_of_another_architecture_either(hub, tmp_path):
    config = json.dumps({"architecture": "resnet10t", "num_classes": 3, "pretrained_cfg": {"num_classes": 3}}).encode()
    hub.put("evil/pickle", {"config.json": config, "pytorch_model.bin": b"\x80\x04K\x01."})
    with pytest.raises(UserError, match="only safetensors"):
        risotto_zoo.load("hf-hub:evil/pickle")
    assert not any("pytorch_model.bin" in request for request in hub.requests)
    (tmp_path / "config.json").write_bytes(config)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04K\x01.")
    with pytest.raises(UserError, match="other formats"):
        risotto_zoo.load(f"local-dir:{tmp_path}")


@pytest.mark.parametrize(
    "change",
    [
        *({"interpolation": "magic"}, {"crop_pct": "x"}, {"label_names": ["one"]}, {"std": [0]}),
        *({"first_conv": "stem"}, {"first_conv": "act1"}, {"first_conv": ["conv1", "conv1"]}, {"classifier": "conv1"}),
    ],
)
def test_a_config_that_does_not_fit_is_one_line(change, folder, command):
    config = json.loads((folder / "config.json").read_text())
    (config if "label_names" in change else config["pretrained_cfg"]).update(change)
    (folder / "config.json").write_text(json.dumps(config))
    one_line(command(cli, "predict", folder / "curves.png", "--model", f"local-dir:{folder}"))
    (folder / "config.json").write_text("{")
    assert "not valid JSON" in one_line(command(cli, "predict", "x.png", "--model", f"local-dir:{folder}"))


@pytest.mark.parametrize("sums", ["{}", "[]", '{"sha256": {}}', '{"sha256": {"model.safetensors": null}}', "{"])
def test_results_that_do_not_give_the_hash_are_told(sums, folder):
    (folder / "results.json").write_text(sums)
    with pytest.raises(UserError, match="cannot be verified"):
        timm.create_model(f"local-dir:{folder}", pretrained=True)


def test_a_net_with_parameters_of_its_scheme_loads_from_its_folder(tmp_path):
    model = timm.create_model("risotto_resnet20", init="fixup", seed=0)
    torch.nn.init.normal_(model.layer1[0].biases)
    cfg = model.pretrained_cfg
    data = {key: cfg[key] for key in ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")}
    config = model_config(model, [str(i) for i in range(10)], data, {"init": "fixup"})
    save_model(tmp_path, model.state_dict(), config)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert torch.equal(loaded.layer1[0].biases, model.layer1[0].biases)


def test_a_model_is_not_saved_with_the_labels_of_the_weights_it_began_with(tmp_path):
    model = timm.create_model("risotto_resnet18", pretrained=True)
    view = timm.data.resolve_data_config(model=model)
    for classes in ([f"class {i}" for i in range(10)], [*"abc"]):
        model.reset_classifier(len(classes))
        config = model_config(model, classes, view, {})
        assert config["label_names"] == config["pretrained_cfg"]["label_names"] == classes
        assert "parachute" not in json.dumps(config)
        save_model(tmp_path, model.state_dict(), config)
        cfg = timm.create_model(f"local-dir:{tmp_path}").pretrained_cfg
        info = timm.data.CustomDatasetInfo(cfg["label_names"], cfg.get("label_descriptions"))
        assert info.num_classes() == len(classes) and info.index_to_label_name(1) == classes[1]
    told = model.pretrained_cfg["label_descriptions"]
    model.reset_classifier(10)
    assert model_config(model, [*told], view, {})["label_descriptions"] == told


def test_half_precision_files_load_as_float32(folder):
    state = {key: value.half() for key, value in safetensors.torch.load_file(folder / WEIGHTS).items()}
    safetensors.torch.save_file(state, folder / WEIGHTS)
    (folder / "results.json").unlink()
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert all(torch.equal(value, state[key].float()) for key, value in model.state_dict().items())


def test_adapting_and_features_from_released_weights(folder, published, hub):
    for place in (f"local-dir:{folder}", f"hf-hub:{REPO}"):
        model = timm.create_model(place, pretrained=True, num_classes=3)
        assert model(torch.zeros(1, 1, 8, 8)).shape == (1, 3)
        half = model.fc.weight[:, : model.num_features // 2].double()  # the head is new, and RISOTTO's
        torch.testing.assert_close(half @ half.T, torch.eye(3).double(), atol=1e-5, rtol=0)
        assert "state_dict" not in model.pretrained_cfg
        assert model.pretrained_cfg["source"] == place.split(":")[0]
        features = timm.create_model(place, pretrained=True, features_only=True, out_indices=(1, 2))
        original = safetensors.torch.load_file(folder / WEIGHTS)
        assert torch.equal(features.state_dict()["layer1.0.conv1.weight"], original["layer1.0.conv1.weight"])


# --- releases


def test_a_release_holds_what_its_repository_will(released, run):
    assert {path.name for path in released.iterdir()} == set(publish.FILES)
    results = json.loads((released / "results.json").read_text())
    assert results["version"] == 1 and results["sha256"][WEIGHTS] == sha256((released / WEIGHTS).read_bytes())
    assert abs(results["isometry"]["smallest"] - 1) < 1e-5 and abs(results["isometry"]["largest"] - 1) < 1e-5
    card = huggingface_hub.ModelCard.load(released / "README.md")
    assert card.data.library_name == "timm" and card.data.pipeline_tag == "image-classification"
    top1 = json.loads((run / "results.json").read_text())["raw"]["top1"]
    assert card.data.eval_results[0].metric_value == pytest.approx(100 * top1, abs=1e-3)


def test_a_release_replaces_nothing_but_a_release(run, tmp_path, command):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("more work")
    for target in (mine, tmp_path / "file", run):
        result = command(release.main, run, "--tag", "digits", "--output", target)
        assert "something else than a release" in one_line(result)
    assert (mine / "thesis.txt").read_text() == "years of work" and (run / "metrics.csv").is_file()
    (mine / "thesis.txt").unlink()
    assert command(release.main, run, "--tag", "digits", "--output", mine).code == 0
    mine.rename(tmp_path / ".mine.old")  # as if it had been interrupted between two renames
    assert command(release.main, run, "--tag", "digits", "--output", mine).code == 0
    assert json.loads((mine / "results.json").read_text())["version"] == 1


def test_a_net_with_the_biases_of_fixup_is_told_why_it_is_no_release(run, tmp_path, command):
    other = tmp_path / "other"
    shutil.copytree(run, other)
    config = json.loads((other / "config.json").read_text())
    config["model_args"]["init"] = "fixup"
    (other / "config.json").write_text(json.dumps(config))
    result = command(release.main, other, "--tag", "digits", "--output", tmp_path / "out")
    assert "scalar biases" in one_line(result) and not (tmp_path / "out").exists()


def test_baselines_must_have_had_the_same_data_and_budget(run, tmp_path, command):
    other = tmp_path / "other"
    other.mkdir()
    for path in run.glob("*.*"):
        (other / path.name).write_bytes(path.read_bytes())
    results = json.loads((other / "results.json").read_text())
    args = [run, "--tag", "digits", "--output", tmp_path / "out", "--baseline", other]
    for key, value in (("epochs", 300), ("train_images", 99)):
        (other / "results.json").write_text(json.dumps({**results, key: value}))
        assert f"its {key} is {value}, not {results[key]}" in one_line(command(release.main, *args))
    (other / "results.json").write_text(json.dumps(results))
    recipe = (other / "recipe.yaml").read_text()
    (other / "recipe.yaml").write_text(recipe.replace("source: digits", "source: scans"))
    assert "its data is scans, not digits" in one_line(command(release.main, *args))
    (other / "recipe.yaml").write_text(recipe)
    assert command(release.main, *args).code == 0
    assert "trained on the same files by the same recipe.\n" in (tmp_path / "out" / "README.md").read_text()


def test_a_release_is_a_baseline_as_its_run_is(run, tmp_path):
    other = release.release(run, "digits", [], tmp_path / "other")
    both = release.release(run, "digits", [run, other], tmp_path / "out")
    first, second = json.loads((both / "results.json").read_text())["baselines"]
    assert first == second and first["evaluation"]["images"] > 0


def test_runs_on_one_folder_that_has_an_absolute_path_are_comparable(photo_folder, tmp_path, command):
    settings = ["data.image_size=8", "batch_size=8", "epochs=1", "warmup_epochs=0", "model_args={in_chans: 3}"]
    settings += [f"data.source={photo_folder}", "data.train_images=40"]
    options = [word for setting in settings for word in ("--set", setting)]
    for name in ("one", "two"):
        result = command(train.main, "--recipe", "digits", *options, "--output", tmp_path / name, "--device", "cpu")
        assert result.code == 0, result.err
    out = release.release(tmp_path / "one", "photos", [tmp_path / "two"], tmp_path / "out")
    [baseline] = json.loads((out / "results.json").read_text())["baselines"]
    assert baseline["differs"] == []
    text = (out / "README.md").read_text()
    assert "Trained on 40 of the training images" in text and str(photo_folder.parent) not in text


def test_a_tag_of_other_data_is_refused(run, tmp_path, command):
    args = [run, "--tag", "cifar10-jpeg", "--output", tmp_path / "out"]
    assert "was trained on digits, not on cifar10-jpeg" in one_line(command(release.main, *args))
    assert not (tmp_path / "out").exists()


def test_a_record_is_a_baseline_as_its_run_is(run, tmp_path, monkeypatch, command):
    monkeypatch.setattr(tables, "RECORDS", tmp_path)
    monkeypatch.chdir(run)
    tables.add(Path("."), sweep=False)
    record = tmp_path / f"{run.name}.json"
    both = release.release(run, "digits", [run, record], tmp_path / "out")
    first, second = json.loads((both / "results.json").read_text())["baselines"]
    assert first == second and first["differs"] == []
    record.write_text(json.dumps({"results": {}}))
    args = [run, "--tag", "digits", "--output", tmp_path / "out", "--baseline", record]
    assert "is no record of a run" in one_line(command(release.main, *args))
    assert json.loads((both / "results.json").read_text())["baselines"] == [first, second]


def test_a_recipe_does_not_say_what_came_of_weights_that_there_are_others_of_since(monkeypatch, tmp_path):
    name = "cifar10_64_finetune"
    assert tables.reached(name).startswith("Accuracy: ")
    record = json.loads((tables.RECORDS / f"{name}.json").read_text())
    record["results"]["init_revision"] = "v0"
    (tmp_path / f"{name}.json").write_text(json.dumps(record))
    monkeypatch.setattr(tables, "RECORDS", tmp_path)
    assert tables.reached(name) == "Accuracy and time: has not been run."


def test_a_row_of_a_sweep_says_what_was_unusual(run, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RECORDS", tmp_path)
    with pytest.raises(UserError, match="was judged on test images, but a sweep is on held-out ones"):
        tables.add(run, sweep=True)
    shutil.copytree(run, tmp_path / run.name)
    run = tmp_path / run.name
    file = run / "recipe.yaml"
    file.write_text(file.read_text().replace("holdout: 0.0", "holdout: 0.2"))
    tables.add(run, sweep=True)
    recipe = load_recipe(str(run / "recipe.yaml"))
    row = tables.sweep_table().splitlines()[-1]
    for word in ("batch=256", "warmup=0.0", "side=8", f" lr={recipe.optimizer.lr},", "images=1437", "data=digits"):
        assert word in row
    assert not any(word in row for word in ("centralize", "mixup", "label_smoothing", "momentum", "seed"))
    changed = {"seed: 0": "seed: 3", "  name: muon": "  name: sgd", "momentum: 0.95": "momentum: 0.8"}
    for old, new in changed.items():
        file.write_text(file.read_text().replace(old, new))
    tables.add(run, sweep=True)
    assert all(f" {word}," in tables.sweep_table() for word in ("seed=3", "optimizer=sgd", "momentum=0.8"))


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    """Not before it is on the disk does a new file take the old one's place."""
    path = tmp_path / "file"
    write_atomically(path, b"old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("the disk is full")))
    with pytest.raises(OSError, match="full"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_pair_of_records_is_a_row_of_the_results_until_it_is_released(run, tmp_path, monkeypatch):
    for module in (cards, tables):
        monkeypatch.setattr(module, "RECORDS", tmp_path)
    tables.add(run, sweep=False)
    assert "not released" not in cards.results_table()  # it has no twin
    record = tmp_path / f"{run.name}.json"
    shutil.copy(record, tmp_path / f"{run.name}_bn.json")
    results = json.loads(record.read_text())["results"]
    [row] = [line for line in cards.results_table().splitlines() if "not released" in line]
    assert f"`{results['model']}` | digits | {100 * results['raw']['top1']:.2f}%" in row
    told = json.loads(record.read_text())
    for section, key, value in (("results", "epochs", 99), ("data", "holdout", 0.2)):
        changed = json.loads(json.dumps(told))
        (changed["results"] if section == "results" else changed["recipe"]["data"])[key] = value
        record.write_text(json.dumps(changed))
        assert "not released" not in cards.results_table(), "judged or trained otherwise than its twin"
    record.write_text(json.dumps(told))
    one = next(iter(cards.releases().values()))
    monkeypatch.setattr(cards, "releases", lambda: {f"{results['model']}.digits": one})
    assert "not released" not in cards.results_table()


def test_where_weights_go_and_what_a_full_budget_means(monkeypatch):
    monkeypatch.setattr(release, "REPOSITORY_BYTES", 2**40)
    assert release._location("a.b", 1000) == "package"
    assert release._location("a.b", release.PACKAGE_BYTES + 1) == "repository"
    monkeypatch.setattr(release, "REPOSITORY_BYTES", 1000)
    assert release._location("a.b", 500) == "hub"


def test_releasing_again_counts_the_version_only_for_new_weights(run, tmp_path):
    folder = tmp_path / "out"
    for _ in range(2):
        release.release(run, "digits", [], folder)
    assert json.loads((folder / "results.json").read_text())["version"] == 1
    results = json.loads((folder / "results.json").read_text())
    side = {"data": "photos", "train_images": 9, "size": 8, "epochs": 1, "by_epoch": [0.5], "evaluation": {}}
    side["evaluation"] = results["evaluation"]
    results["finetunes"] = [{"tuned": side, "scratch": side}]
    (folder / "results.json").write_text(json.dumps(results))
    release.release(run, "digits", [], folder)
    assert json.loads((folder / "results.json").read_text())["finetunes"] == results["finetunes"]
    release.release(run, "digits", [], folder, half=True)
    results = json.loads((folder / "results.json").read_text())
    assert (results["version"], results["dtype"], results["finetunes"]) == (2, "float16", [])
    stored = safetensors.torch.load_file(folder / WEIGHTS)
    assert all(value.dtype == torch.float16 for value in stored.values())
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert model.conv1.weight.dtype == torch.float32


def test_the_score_is_that_of_the_weights_released(run, tmp_path, command, monkeypatch):
    """The averaged ones where they are the better, and those stored in float16."""
    averaged = tmp_path / "averaged"
    shutil.copytree(run, averaged)
    state = safetensors.torch.load_file(run / WEIGHTS)
    state["fc.bias"] += torch.arange(10) / 5
    safetensors.torch.save_file(state, averaged / WEIGHTS, metadata={"format": "pt"})
    results = json.loads((run / "results.json").read_text())
    results |= {"better": "ema", "ema": {**results["raw"], "top1": 0.987}}
    results["sha256"][WEIGHTS] = sha256((averaged / WEIGHTS).read_bytes())
    (averaged / "results.json").write_text(json.dumps(results))
    folder = release.release(averaged, "digits", [], tmp_path / "out")
    told = json.loads((folder / "results.json").read_text())
    assert told["evaluation"]["top1"] == 0.987 and told["weights"] == "ema" and told["averaged"]
    assert torch.equal(safetensors.torch.load_file(folder / WEIGHTS)["fc.bias"], state["fc.bias"])
    # float16: what is stored is evaluated, whatever the run's results say
    folder = release.release(averaged, "digits", [], tmp_path / "half", half=True)
    told = json.loads((folder / "results.json").read_text())["evaluation"]
    numbers = tmp_path / "numbers.json"
    settings = ["--data", "digits", "--device", "cpu", "--json", numbers]
    assert command(evaluate.main, f"local-dir:{folder}", *settings).code == 0
    (seen,) = json.loads(numbers.read_text())
    assert seen["loss"] == pytest.approx(told["loss"], rel=1e-6) and seen["top1"] == told["top1"] != 0.987
    # made again, they are not evaluated again
    monkeypatch.setattr(release, "_evaluated", lambda *_: pytest.fail("the same weights were evaluated twice"))
    release.release(averaged, "digits", [], folder, half=True)
    assert json.loads((folder / "results.json").read_text())["evaluation"] == told


def changed(run, folder, key, value):
    """A copy of a run in which all weights of one tensor have one value."""
    shutil.copytree(run, folder)
    state = safetensors.torch.load_file(run / WEIGHTS)
    state[key].fill_(value)
    safetensors.torch.save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    results = json.loads((run / "results.json").read_text())
    results["sha256"][WEIGHTS] = sha256((folder / WEIGHTS).read_bytes())
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def test_weights_that_float16_cannot_hold_are_not_released(run, tmp_path):
    large = changed(run, tmp_path / "large", "conv1.weight", 1e5)
    with pytest.raises(UserError, match=r"in float16.*not finite"):
        release.release(large, "digits", [], tmp_path / "out", half=True)
    assert not (tmp_path / "out").exists()
    release.release(large, "digits", [], tmp_path / "out")


def test_a_release_again_keeps_what_was_said_and_nobody_elses_files(run, tmp_path):
    out = tmp_path / "out"
    release.release(run, "digits", [run], out, license="mit")
    release.release(run, "digits", output=out)
    told = json.loads((out / "results.json").read_text())
    assert told["license"] == "mit" and len(told["baselines"]) == 1
    for name in (".cache", ".gitattributes", "README.md.4711.tmp"):  # as one that was downloaded, or killed, has
        (out / name).touch()
    (tmp_path / ".out.new").mkdir()
    release.release(run, "digits", output=out)
    (out / ".git").mkdir()
    (out / "NOTES.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"holds .git, NOTES.txt beside a release"):
        release.release(run, "digits", output=out)
    assert (out / "NOTES.txt").is_file()


def test_a_baseline_that_was_released_has_the_numbers_of_its_release(folder, monkeypatch):
    """Which may be those of float16; a release of another run of that net makes it an earlier version."""
    results = json.loads((folder / "results.json").read_text())
    results["in_zoo"] = True
    (baseline,) = results["baselines"]
    baseline["differs"] = []
    (folder / "results.json").write_text(json.dumps(results))
    one = {**results, "evaluation": {**results["evaluation"], "top1": 0.987}}
    monkeypatch.setattr(cards, "releases", lambda: {NAME: one})
    assert "98.70%" in cards.card(folder) and "earlier version |" not in cards.card(folder)
    one["train_seconds"] += 1
    assert "98.70%" not in cards.card(folder) and "an earlier version |" in cards.card(folder)


def test_a_baseline_needs_no_weights(run, released, tmp_path):
    """Those of a release may be on the Hub alone."""
    baseline = tmp_path / "baseline"
    shutil.copytree(released, baseline, ignore=shutil.ignore_patterns(WEIGHTS))
    told = release.release(run, "digits", [baseline], tmp_path / "out")
    assert len(json.loads((told / "results.json").read_text())["baselines"]) == 1


def test_the_start_that_a_card_measures_is_the_runs_own(run, tmp_path):
    recipe = load_recipe(str(run / "recipe.yaml"))
    config = json.loads((run / "config.json").read_text())
    other = {**recipe.model_args, "seed": 5, "init": "he"}
    assert release._isometry(config, recipe)["largest"] == pytest.approx(1, abs=1e-5)
    measured = release._isometry(config, recipe.model_copy(update={"model_args": other}))
    assert measured["largest"] > 1.1


def test_fine_tuning_is_shown_only_of_these_very_weights(run, tmp_path, command):
    """A release that is made again with new weights does not show what its earlier weights were fine-tuned to."""
    toy = {"source": "digits", "image_size": 8, "train_images": 300}
    common = {"model": "risotto_resnet20", "epochs": 1, "data": toy, "model_args": {"in_chans": 1}}
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(run, elsewhere)
    for name, start in {"tuned": run, "other": elsewhere, "scratch": None}.items():
        init_from = {} if start is None else {"init_from": f"local-dir:{start}"}
        engine.train(Recipe.model_validate({**common, **init_from}), tmp_path / name, World(0, 1, torch.device("cpu")))
    args = [run, "--tag", "digits", "--output", tmp_path / "out", "--finetune"]
    assert command(release.main, *args, tmp_path / "tuned", tmp_path / "scratch").code == 0
    assert "| digits at 8 px | 300, 1 |" in (tmp_path / "out" / "README.md").read_text()
    # what it began from is told without the places of this machine
    told = release.release(tmp_path / "tuned", "digits", [tmp_path / "tuned"], tmp_path / "of-tuned")
    assert not any(str(tmp_path).encode() in path.read_bytes() for path in told.iterdir())
    assert f"fine-tuned from a run of its author, {run.name}," in (told / "README.md").read_text()
    assert load_recipe(str(told / "recipe.yaml")).init_from == f"local-dir:{run.name}"
    wrong = one_line(command(release.main, *args, tmp_path / "other", tmp_path / "scratch"))
    assert f"began from local-dir:{elsewhere}, not from the weights of {run}" in wrong
    assert "first, then the one from scratch" in one_line(
        command(release.main, *args, tmp_path / "scratch", tmp_path / "tuned")
    )
    results = json.loads((tmp_path / "scratch" / "results.json").read_text())
    (tmp_path / "scratch" / "results.json").write_text(json.dumps({**results, "train_images": 299}))
    uneven = one_line(command(release.main, *args, tmp_path / "tuned", tmp_path / "scratch"))
    assert "cannot be compared: train_images is 300 in one, 299 in the other" in uneven


def test_a_failing_release_leaves_the_one_before(run, tmp_path, monkeypatch):
    folder = release.release(run, "digits", [], tmp_path / "out")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(release, "write_atomically", full)
    with pytest.raises(UserError, match="No space left"):
        release.release(run, "digits", [], folder, half=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == ["out"]


def test_a_release_whose_last_renaming_fails_leaves_the_one_before(run, tmp_path, monkeypatch):
    """Weights that are packaged lie in another folder than the rest, and neither is replaced alone."""
    for module in (cards, release):
        monkeypatch.setattr(module, "CARDS", tmp_path / "model_cards")
        monkeypatch.setattr(module, "PACKAGE", tmp_path / "risotto_zoo")
    monkeypatch.setattr(cards, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "pages", dict)
    (tmp_path / "README.md").write_text("<!-- results -->\n<!-- /results -->\n")
    (tmp_path / "risotto_zoo").mkdir()
    subprocess.run(["git", "init", "-q", tmp_path], check=True)

    def held():
        return {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and ".git" not in path.parts}

    def fails_at_the_last(**options):
        with monkeypatch.context() as patched:
            patched.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.EACCES, "no")))
            with pytest.raises(UserError, match="could not be written"):
                release.release(run, "digits", [], **options)

    nothing = held()
    fails_at_the_last()  # the first release of all
    assert held() == nothing and not list((tmp_path / "model_cards").iterdir())
    folder = release.release(run, "digits", [])
    assert (folder / WEIGHTS).is_symlink()
    before = held()
    results = json.loads((folder / "results.json").read_text())
    fails_at_the_last(half=True)
    assert held() == before and publish.check(folder) == results
    # What one that was killed left behind is not taken for this one's own.
    rest = tmp_path / "risotto_zoo" / "weights" / f".{folder.name}.safetensors.new"
    rest.write_bytes(b"half")
    outside = release.release(run, "digits", [], tmp_path / "outside")
    assert (outside / WEIGHTS).is_file()
    shutil.rmtree(outside)
    assert rest.is_file()
    with monkeypatch.context() as patched:
        patched.setattr(release, "PACKAGE_BYTES", 0)
        patched.setattr(release, "CARDS", tmp_path / "cards")
        patched.setattr(cards, "pages", dict)
        release.release(run, "digits", [])
    assert not rest.exists()
    shutil.rmtree(tmp_path / "cards")
    release.release(run, "digits", [])
    # One outside the zoo leaves the zoo's weights alone.
    release.release(run, "digits", [], tmp_path / "elsewhere", half=True)
    assert {path: data for path, data in held().items() if (tmp_path / "elsewhere") not in path.parents} == before


def test_release_refuses(run, tmp_path, command):
    def refused(source, *args):
        return one_line(command(release.main, source, "--output", tmp_path / "out", *args))

    assert "tag" in refused(run, "--tag", "Two words")
    released = release.release(run, "digits", [], tmp_path / "released")
    assert "holds a release, not a run" in refused(released, "--tag", "digits")
    with pytest.raises(UserError, match="no finished run"):
        tables.add(released, sweep=False)
    assert "no finished run" in refused(tmp_path / "nothing", "--tag", "digits")
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in run.glob("*.*"):
        (copy / path.name).write_bytes(path.read_bytes())
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "model_args": {"skip": "projection"}}))
    assert "changed skip" in refused(copy, "--tag", "digits")
    (copy / "config.json").write_text(json.dumps({**config, "model_args": {"drop_path_rate": 0.1}}))
    stored = release.release(copy, "digits", [], tmp_path / "dropped") / "config.json"
    assert json.loads(stored.read_text())["model_args"] == {}
    recipe = (copy / "recipe.yaml").read_text()
    (copy / "recipe.yaml").write_text(recipe.replace("holdout: 0.0", "holdout: 0.1"))
    assert "held-out training images" in refused(copy, "--tag", "digits")
    results = json.loads((copy / "results.json").read_text())
    (copy / "results.json").unlink()
    assert "no finished run" in refused(copy, "--tag", "digits")
    (copy / "results.json").write_text(json.dumps(results))
    (copy / WEIGHTS).write_bytes((copy / WEIGHTS).read_bytes()[:-4])
    assert "damaged" in refused(copy, "--tag", "digits")


def test_a_new_tag_does_not_become_what_a_net_is_by_its_name_alone(monkeypatch):
    released = cards.releases()
    one = released["risotto_resnet20.cifar10-jpeg"]
    monkeypatch.setattr(cards, "releases", lambda: {**{f"risotto_resnet20.{tag}": one for tag in "az"}, **released})
    monkeypatch.setattr(cards, "read_json", lambda _: {})
    names = [name for name in json.loads(cards.manifest()) if name.startswith("risotto_resnet20.")]
    assert names == ["risotto_resnet20.cifar10-jpeg", "risotto_resnet20.a", "risotto_resnet20.z"]


def test_others_choose_the_license_of_their_weights(run, tmp_path, command):
    args = [run, "--tag", "digits", "--output", tmp_path / "out", "--license", "mit"]
    assert command(release.main, *args).code == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: mit" in card and "No epoch was chosen on them" in card
    with pytest.raises(UserError, match="give its identifier on the Hub"):
        release.release(run, "digits", [], output=tmp_path / "other", license="my: license\nx")
    release.release(run, "mine", [], output=tmp_path / "mine")  # nobody knows what those images are to others
    card = (tmp_path / "mine" / "README.md").read_text()
    assert "On 360 validation images" in card and "split: validation" in card and "test images" not in card
    assert command(publish.main, tmp_path / "out", "--repo-id", "me/net", "--dry-run").code == 0


def test_a_card_counts_the_nets_that_were_tested_without_a_release(monkeypatch, tmp_path):
    name = "risotto_resnet18.imagenette224"
    assert set(cards._siblings(name)) == {"risotto_resnet50", "risotto_resnet50_bn"}
    assert "other nets of this zoo had been tested" in (cards.CARDS / name / "README.md").read_text()
    monkeypatch.setattr(cards, "RECORDS", tmp_path)
    assert cards._siblings(name) == []


def test_another_seed_of_a_released_net_is_no_earlier_version():
    result = cards.releases()["risotto_resnet18.imagenette224"]
    seed = next(row for row in result["baselines"] if row["differs"] == ["seed"])
    assert cards._age(seed, result) == ""
    assert cards._age({**seed, "differs": ["epochs"]}, result) == ", an earlier version"


def test_a_card_names_what_a_model_was_tuned_from_and_how_its_baselines_differ(run, folder):
    results = json.loads((folder / "results.json").read_text())
    assert results["baselines"][0]["differs"] == []
    results |= {"init_from": "hf-hub:somebody/model@v2"}
    results["baselines"][0]["differs"] = ["model", "optimizer.lr"]
    (folder / "results.json").write_text(json.dumps(results))
    text = cards.card(folder)
    assert "base_model: somebody/model\n" in text and "fine-tuned from hf-hub:somebody/model@v2" in text
    assert "by the same recipe, but for model, optimizer.lr." in text
    assert "One seed was trained;" in text
    results["baselines"][0]["differs"] = ["seed"]
    (folder / "results.json").write_text(json.dumps(results))
    assert "2 seeds were trained, of which this is one;" in cards.card(folder)
    for name in ("risotto_resnet20.cifar10-jpeg", "risotto_resnet20"):
        assert cards._base_model(name) == "risotto-zoo/risotto_resnet20.cifar10-jpeg"
    assert cards._base_model("resnet18.a1_in1k") == cards._base_model("resnet18") == "timm/resnet18.a1_in1k"
    assert cards._base_model("local-dir:runs/digits") is None


def test_cards_and_manifest_are_fresh_and_a_stale_one_is_told(command, monkeypatch):
    assert command(cards.main, "--check").code == 0
    released = cards.releases()
    released["risotto_resnet56.cifar10-jpeg"]["sha256"]["curves.png"] = "0" * 64
    with monkeypatch.context() as patched:
        patched.setattr(cards, "releases", lambda: released)
        assert "risotto_resnet56.cifar10-jpeg/curves.png is missing or" in one_line(command(cards.main, "--check"))
    monkeypatch.setattr(cards, "manifest", lambda: "{}")
    assert "manifest.json" in one_line(command(cards.main, "--check"))


def test_training_from_the_hub(published, hub, command, tmp_path):
    args = ["--recipe", "finetune", "--init-from", f"hf-hub:{REPO}", "--set", "epochs=2", "--set", "augment.shift=0"]
    result = command(train.main, *args, "--output", tmp_path / "tuned")
    assert result.code == 0, result
    assert "no such repository" in one_line(
        command(train.main, *args, "--init-from", "hf-hub:somebody/nothing", "--output", tmp_path / "other")
    )


def test_predict_reads_what_people_have(folder, command, tmp_path):
    from PIL import Image

    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for mode in ("RGB", "L", "CMYK", "1"):
        Image.new(mode, (30, 20)).save(pictures / f"{mode}.jpg")
    Image.new("I;16", (9, 9)).save(pictures / "deep.png")
    (pictures / "broken.jpg").write_text("no image")
    (pictures / "notes.txt").write_text("ignored")
    result = command(cli, "predict", pictures, "--model", f"local-dir:{folder}", "--top", 3)
    assert result.code == 0 and result.out.count("%") == 15
    assert "broken.jpg: not an image" in result.err and "1 of 6 images could not be read" in result.err
    result = command(cli, "predict", pictures / "broken.jpg", "--model", f"local-dir:{folder}")
    assert result.code == 2
    (tmp_path / "empty").mkdir()
    assert "holds no images" in one_line(command(cli, "predict", tmp_path / "empty", "--model", f"local-dir:{folder}"))
    assert "device" in one_line(command(cli, "predict", pictures, "--model", f"local-dir:{folder}", "--device", "tpu9"))


def test_predict_says_what_the_net_does(folder, command, tmp_path):
    """Each file's own classes and shares, the most probable first."""
    from PIL import Image

    pictures, draw = tmp_path / "pictures", np.random.default_rng(0)
    pictures.mkdir()
    for i in range(3):
        Image.fromarray(draw.integers(0, 256, (11, 9, 3), dtype=np.uint8)).save(pictures / f"{i}.PNG")
    classifier = risotto_zoo.load(f"local-dir:{folder}")
    assert not any(part.training for part in classifier.model.modules())
    result = command(cli, "predict", pictures, "--model", f"local-dir:{folder}", "--top", 2)
    expected = []
    for path in sorted(pictures.iterdir()):
        image = Image.open(path)
        shares = classifier.model(classifier.transform(image.convert("L"))[None]).softmax(1)[0]
        torch.testing.assert_close(classifier([image])[0], shares)
        expected.append(str(path))
        for index in shares.argsort(descending=True)[:2]:
            expected.append(f"  {100 * shares[index]:6.2f}%  {classifier.classes[index]}")
    assert result.out.splitlines() == expected
    torch.testing.assert_close(classifier([image] * 3).sum(1), torch.ones(3))


def test_a_net_of_other_channels_cannot_read_images(tmp_path):
    model = timm.create_model("risotto_resnet20", in_chans=4, num_classes=2)
    config = model_config(model, ["a", "b"], {**model.pretrained_cfg, "input_size": (4, 32, 32)}, {})
    save_model(tmp_path, model.state_dict(), config)
    with pytest.raises(UserError, match="takes images of 4 channels"):
        risotto_zoo.load(f"local-dir:{tmp_path}")


def test_a_net_without_classes_is_no_classifier(tmp_path):
    timm.models.save_for_hf(timm.create_model("risotto_resnet20", num_classes=0), tmp_path, safe_serialization=True)
    with pytest.raises(UserError, match="is no classifier: it has no classes"):
        risotto_zoo.load(f"local-dir:{tmp_path}")


@pytest.mark.parametrize("name", list(fetching.MANIFEST))
def test_released_weights_load_with_no_network(name, hub, tmp_path):
    hub.fail(".*", "drop", times=None)
    if fetching.MANIFEST[name]["location"] == "hub":
        pytest.skip("its weights are on the Hub alone")
    assert name in timm.list_pretrained("risotto_*")
    model = timm.create_model(name, pretrained=True)
    assert model.pretrained_cfg["label_names"] and logits(model).isfinite().all()
    config = fetching.MANIFEST[name]["config"]
    told = config.get("label_descriptions", {})
    assert risotto_zoo.load(name).classes == [told.get(label, label) for label in config["label_names"]]
    assert not hub.requests
    model = timm.create_model(name, pretrained=True, num_classes=0, in_chans=1)
    assert model(torch.zeros(1, 1, 32, 32)).shape == (1, model.num_features)


def test_a_release_with_batch_norm_loads_into_plain_timm(hub, tmp_path):
    """As its card says: the file from the Hub, no code of ours."""
    ours = timm.create_model("risotto_resnet18_bn", num_classes=3, seed=0).eval()
    torch.nn.init.uniform_(ours.layer1[0].bn1.running_mean)
    safetensors.torch.save_file(ours.state_dict(), tmp_path / WEIGHTS)
    hub.put("somebody/risotto_resnet18_bn.photos", {WEIGHTS: (tmp_path / WEIGHTS).read_bytes()})
    file = huggingface_hub.hf_hub_download("somebody/risotto_resnet18_bn.photos", WEIGHTS)
    plain = timm.create_model("resnet18", num_classes=3, checkpoint_path=file).eval()
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(plain(images), ours(images), atol=1e-6)

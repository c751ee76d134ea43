"""Studies: the grid runs once, its choices are made on held-out images, and the report is a function of the results."""

import contextlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import matplotlib
import pytest
import torch
import yaml

from risotto_zoo.errors import UserError
from training import first_step, grid, propagation, report, study

TOY = {
    "title": "A toy",
    "question": "Does it work?",
    "recipe": {
        "model": "risotto_resnet20",
        "epochs": 1,
        "batch_size": 256,
        "data": {"source": "digits", "image_size": 8},
        "model_args": {"in_chans": 1},
        "optimizer": {"name": "muon", "lr": 0.003},
    },
    "tune": {"key": "optimizer.lr", "values": [0.0001, 0.003]},
    "seeds": [0, 1],
    "arms": {"RISOTTO": {}, "hopeless": {"optimizer.name": "sgd", "tune": [1e20]}},
    "claims": [{"text": "It works.", "better": "RISOTTO", "than": ["hopeless"]}],
}


@pytest.fixture
def toy(tmp_path, monkeypatch, no_processes):
    """A study of two arms, one of which diverges, in folders of this test's own."""
    monkeypatch.setattr(grid, "STUDIES", tmp_path / "studies")
    monkeypatch.setattr(grid, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(report, "STUDIES", tmp_path / "studies")
    (tmp_path / "studies").mkdir()
    (tmp_path / "studies" / "toy.yaml").write_text(yaml.safe_dump(TOY, sort_keys=False))
    return tmp_path / "studies" / "toy" / "results.json"


def test_a_study_tunes_on_held_out_images_runs_once_and_counts_divergence(toy, command, monkeypatch):
    assert command(study.main, "toy", "--jobs", 1, "--device", "cpu").code == 0
    runs = json.loads(toy.read_text())["runs"]
    tuning = [run for run in runs.values() if run["tuning"]]
    final = [run for run in runs.values() if not run["tuning"]]
    assert (len(tuning), len(final)) == (3, 4)
    assert all(run["images"] in (0, 144) for run in tuning)  # a tenth of the 1,437 training images
    assert all(run["images"] == 360 for run in final if not run["diverged"])
    assert [run["diverged"] for run in final if run["arm"] == "hopeless"] == [True, True]
    best = max((run for run in tuning if run["arm"] == "RISOTTO"), key=lambda run: run["top1"])
    assert {run["tuned"] for run in final if run["arm"] == "RISOTTO"} == {best["tuned"]}

    text = (toy.parent.parent / "README.md").read_text()
    assert "| hopeless | 1e+20* | 10.0 (10.0 to 10.0) | diverged, diverged | - | 2 of 2 |" in text
    assert "**Verdict.** " in text and (toy.parent / "accuracy_by_epoch.svg").is_file()

    monkeypatch.setattr(grid, "train", lambda *_: pytest.fail("a finished run was run again"))
    before = toy.read_bytes()
    assert command(study.main, "toy", "--jobs", 1, "--device", "cpu").code == 0
    assert toy.read_bytes() == before
    toy.unlink()  # the runs themselves are still there
    assert command(study.main, "toy", "--jobs", 1, "--device", "cpu").code == 0
    assert json.loads(toy.read_text()) == json.loads(before)


def test_a_signal_stops_a_study_and_begins_no_other(toy, tmp_path):
    """Sent to the parent alone, as `kill` does; Ctrl-C reaches the workers by themselves, too."""
    many = {**TOY, "seeds": list(range(8)), "arms": {"RISOTTO": {}}, "claims": []}
    many["recipe"] = {**TOY["recipe"], "epochs": 500}
    (grid.STUDIES / "toy.yaml").write_text(yaml.safe_dump({k: v for k, v in many.items() if k != "tune"}))
    code = (
        "import sys; from pathlib import Path; from training import grid, study\n"
        f"grid.STUDIES, grid.RUNS = Path({str(grid.STUDIES)!r}), Path({str(tmp_path / 'runs')!r})\n"
        "if __name__ == '__main__': study.main()"
    )
    (tmp_path / "main.py").write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    process = subprocess.Popen(
        [sys.executable, tmp_path / "main.py", "toy", "--jobs", "1", "--device", "cpu"],
        env=environment,
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
    )
    started = lambda: [log for log in (tmp_path / "runs").glob("logs/*") if "epoch 1/" in log.read_text()]  # noqa: E731
    try:
        while not started() and process.poll() is None:
            time.sleep(0.1)
        process.terminate()
        _, err = process.communicate(timeout=30)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 143 and err.endswith("interrupted\n"), err
    logs = list((tmp_path / "runs").glob("logs/*"))
    assert len(logs) == 1 and (tmp_path / "runs" / logs[0].stem / "state").is_dir()


def test_bad_studies_and_arguments_are_one_line(toy, command):
    result = command(study.main, "toi")
    assert result.code == 2 and "did you mean 'toy'" in result.err
    path = grid.STUDIES / "toy.yaml"
    path.write_text(yaml.safe_dump({**TOY, "sedes": [1]}))
    assert "unknown key 'sedes'; the nearest is 'seeds'" in command(study.main, "toy").err
    path.write_text(yaml.safe_dump({**TOY, "claims": [], "arms": {"a": {"optimizer.lrr": 1}}}))
    assert "optimizer.lr" in command(study.main, "toy", "--device", "cpu").err
    path.write_text(yaml.safe_dump({**TOY, "claims": [{"text": "-", "better": "hopelss", "than": ["hopeless"]}]}))
    assert "'hopelss', which is no arm; did you mean 'hopeless'" in command(study.main, "toy").err
    path.write_text(yaml.safe_dump({**TOY, "recipe": {**TOY["recipe"], "data": {"source": "nowhere"}}}))
    assert "nowhere" in command(study.main, "toy", "--device", "cpu").err
    assert command(study.main, "toy", "--jobs", 0).code == 2


@pytest.mark.parametrize("name", grid.study_names())
def test_shipped_studies_are_valid_and_spend_the_same_on_each_arm(name):
    shipped = grid.load_study(name)
    assert len(shipped.seeds) >= 3
    runs = grid.tuning_runs(shipped)
    assert all(run.recipe.data.holdout == grid.HELD_OUT for run in runs)
    chosen = {run.key: {"top1": 0.5} for run in runs}
    assert not chosen.keys() & {run.key for run in grid.final_runs(shipped, chosen)}, "tuned on what is reported"
    budgets = {arm: len([run for run in runs if run.arm == arm]) for arm in shipped.arms}
    assert len(set(budgets.values())) == 1
    for claim in shipped.claims:
        for side in [claim.better, *claim.than]:
            for part in side.split(" - "):
                arm, at, value = part.partition("@")
                assert arm in shipped.arms
                assert not at or value in map(str, shipped.vary.values)


def test_the_report_is_reproduced_byte_for_byte_from_the_committed_results():
    compared = 0
    for path, data in report.pages().items():
        drawn_by = re.search(rb"Matplotlib v([\d.]+)", path.read_bytes())
        if drawn_by and drawn_by[1].decode() != matplotlib.__version__:
            continue  # another version draws the same figure in other bytes
        assert path.read_bytes() == data, f"{path} is stale; run python -m training.study report"
        compared += 1
    assert compared


def test_intervals_and_differences():
    mean, half = report.interval([1.0, 2.0, 3.0])
    assert mean == 2 and half == pytest.approx(4.302652729749464 / math.sqrt(3))
    assert math.isnan(report.interval([1.0])[1])
    mean, low, high = report.difference([3.0, 4.0, 5.0], [1.0, 2.0, 3.0])
    assert mean == 2 and low == pytest.approx(2 - 2.776445105 * math.sqrt(2 / 3)) and low + high == pytest.approx(4)


def test_images_that_do_not_suffice_are_told(photo_folder, tmp_path):
    with pytest.raises(UserError, match="holds 16 readable images of those asked for, but 17 are needed"):
        propagation.some_images(photo_folder, False, 17)
    images, targets = propagation.some_images(photo_folder, False, 16)
    assert len(images.flatten(1).unique(dim=0)) == 16 and targets.tolist() == [0] * 8 + [1] * 8
    for label in range(11):
        (tmp_path / "train" / f"{label:02}").mkdir(parents=True)
        for i, path in enumerate(sorted(photo_folder.glob("*/*/*.jpg"))[:35]):
            shutil.copy(path, tmp_path / "train" / f"{label:02}" / f"{i}.jpg")
    with pytest.raises(UserError, match="more than the 10 classes"):
        first_step.conduct(tmp_path)


def test_propagation_separates_risotto_from_the_others(monkeypatch):
    monkeypatch.setattr(propagation, "PROBES", 4)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    rows = {scheme: propagation.measure(scheme, (9, 9, 9), images) for scheme in ("risotto", "he", "orthogonal_delta")}
    similarity = {scheme: row["similarity"] for scheme, row in rows.items()}
    assert max(similarity["risotto"]) - min(similarity["risotto"]) < 1e-4
    assert all(similarity[scheme][-1] - similarity[scheme][0] > 0.3 for scheme in ("he", "orthogonal_delta"))
    spread = {scheme: max(row["gradient"]) / min(row["gradient"]) for scheme, row in rows.items()}
    assert spread["risotto"] < 3 < 1e3 < spread["he"]
    assert all(abs(value - 1) < 1e-9 for value in rows["risotto"]["singular_values"])


def test_the_committed_propagation_study_shows_the_picture():
    stored = json.loads(grid.results_file("propagation").read_text())
    assert {row["depth"] for row in stored["rows"]} == {20, 56, 110, 1202}
    for row in stored["rows"]:
        if row["scheme"] == "risotto":
            assert max(row["similarity"]) - min(row["similarity"]) < 1e-4
        else:
            assert row["similarity"][-1] - row["similarity"][0] > 0.1
    text = propagation.section(stored)
    assert (
        "Confirmed in part at initialization, up to 1202 layers, against He, whose similarity reaches 1.0000; "
        "not against delta-orthogonal, whose similarity reaches 0.7895; not against Fixup" in text
    )
    assert "1 of 32 above 1e-6 of the largest" in text  # He's collapse to one direction is no isometry


def test_the_first_step_moves_what_it_says():
    generator = torch.Generator().manual_seed(0)
    images, targets = torch.randn(32, 3, 32, 32, generator=generator), torch.arange(32) % 10

    def change(scheme: str, blocks: int) -> dict[str, float]:
        return first_step.measure(first_step.SETTINGS[scheme], (blocks,) * 3, 0, images, targets)

    shallow, deep = change("RISOTTO", 2), change("RISOTTO", 8)
    assert deep["kernels"] > 1.5 * shallow["kernels"] and deep["vectors"] > 1.5 * shallow["vectors"]
    assert deep["all"] > max(deep[kind] for kind in first_step.KINDS)
    assert set(change("Fixup", 2).values()) == {0.0}  # its classifier starts at zero: no gradient goes beyond it
    branches = change("SkipInit", 2)["kernels"]  # start at zero
    assert 0 < branches < 0.1 * shallow["kernels"]


def test_the_committed_first_step_study_says_what_it_measured():
    stored = json.loads(grid.results_file("first_step").read_text())
    assert {(row["scheme"], row["depth"]) for row in stored["rows"]} == {
        (scheme, depth) for scheme in first_step.SETTINGS for depth in first_step.DEPTHS
    }
    kernels = {row["depth"]: sum(row["kernels"]) / 3 for row in stored["rows"] if row["scheme"] == "RISOTTO"}
    text = first_step.section(stored)
    assert f"RISOTTO changes {kernels[110] / kernels[20]:.1f} times as much by its kernels" in text
    for row in stored["rows"]:
        assert f"| {row['scheme']} | {row['depth']} | {sum(row['all']) / 3:.2f} (" in text


@pytest.mark.parametrize("name", ["propagation", "first_step"])
def test_measured_studies_need_their_data(command, tmp_path, name):
    result = command(study.main, name, "--data", tmp_path / "none")
    assert result.code == 2 and "none" in result.err and "Traceback" not in result.err


def test_verdicts():
    values = {"RISOTTO": [0.5, 0.52, 0.51], "hopeless": [0.7, 0.71, 0.72]}
    shipped = grid.load_study("learning_rate_robustness_small")
    study = shipped.model_copy(update={"arms": {arm: {} for arm in values}, "vary": None, "tune": None})
    records = {
        f"{arm}{seed}": {"arm": arm, "x": None, "seed": seed, "top1": value, "tuning": False, "diverged": False}
        for arm, all_seeds in values.items()
        for seed, value in enumerate(all_seeds)
    }
    claim = grid.Claim(text="-", better="RISOTTO", than=["hopeless"])
    told = report._verdict(study, records, claim)
    assert told.startswith("Not confirmed, and the opposite was measured against hopeless: RISOTTO is at -20.0 points")
    turned = claim.model_copy(update={"better": "hopeless", "than": ["RISOTTO"]})
    assert report._verdict(study, records, turned).startswith("Confirmed: hopeless is at +20.0 points")
    assert report._in_short(study, records, claim) == "Not confirmed: behind hopeless"
    assert report._in_short(study, records, turned) == "Confirmed: ahead of RISOTTO"
    del records["hopeless1"]
    assert report._in_short(study, records, claim) == "Not tested"
    assert "runs are missing" in report._verdict(study, records, claim)


def test_what_did_not_train_wins_nothing():
    """A diverged run counts as chance, and neither being ahead at chance nor a gain over chance is a verdict."""
    accuracy = {"chance": [0.1, 0.101, 0.1], "lost": [None, None, None], "good": [0.5, 0.51, 0.52]}
    shipped = grid.load_study("learning_rate_robustness_small")
    study = shipped.model_copy(update={"arms": {arm: {} for arm in accuracy}, "vary": None, "tune": None})
    records = {
        f"{arm}{seed}": {
            "arm": arm, "x": None, "seed": seed, "top1": value or 0.0, "tuning": False, "diverged": value is None
        }
        for arm, values in accuracy.items()
        for seed, value in enumerate(values)
    }  # fmt: skip
    records["chance0"]["top1"] = 0.125

    def short(better, than):
        return report._in_short(study, records, grid.Claim(text="-", better=better, than=[than]))

    assert short("chance", "lost") == "Not confirmed: not told apart from lost"
    for seed in range(3):
        records[f"chance{seed}"]["top1"] = 0.12 + seed / 1000
    assert short("chance", "lost") == "Not confirmed: no verdict against lost"
    assert short("lost", "chance") == "Not confirmed: no verdict against chance"
    assert short("good", "lost") == "Confirmed: ahead of lost"
    assert short("good - good", "good - lost") == "Not confirmed: no verdict against good - lost"
    claim = grid.Claim(text="-", better="good", than=["lost"])
    told = report._verdict(study, records, claim)
    assert told.startswith("Confirmed: good is at +41.0 points") and "lost did not train in 3 of 3 runs" in told


def test_the_scale_of_every_shipped_study_can_be_told():
    told = report._scale({name: grid.load_study(name) for name in grid.study_names()})
    assert "10,000 images" in told and "all images of cifar10-jpeg" in told
    assert "risotto_resnet20_bn, risotto_resnet20_c, risotto_resnet56" in told  # of arms and of what is varied
    assert "`learning_rate_robustness_small` judged on held-out ones" in told


def test_arms_that_were_trained_on_other_machines_are_named():
    arms = {"A": "one", "B": "one", "C, big": "two", "D": "two", "E": "one"}
    records = {arm: {"arm": arm, "hardware": machine} for arm, machine in arms.items()}
    assert report._machines(records) == "one a run (3 runs), two (2 runs, of “C, big”, D)"
    assert report._machines({"A": records["A"]}) == "one a run"


def test_a_verdict_waits_for_every_value_of_every_seed():
    study = grid.load_study("learning_rate_robustness_small")
    records = {
        f"{arm}{seed}{x}": {"arm": arm, "x": x, "seed": seed, "top1": 0.5, "tuning": False, "diverged": False}
        for arm in study.arms
        for seed in study.seeds
        for x in study.vary.values
    }
    assert report._verdict(study, records, study.claims[0]).startswith("Not confirmed: RISOTTO is at +0.0 values")
    assert report._in_short(study, records, study.claims[0]).endswith(
        "counting values within 5 points of each one's best"
    )
    del records[f"He0{study.vary.values[1]}"]
    assert "runs are missing" in report._verdict(study, records, study.claims[0])


def test_a_verdict_says_that_the_other_side_may_do_better_outside_of_what_was_tried():
    study = grid.load_study("alpha_small")
    best = {0.0: study.arms["RISOTTO"].get("tune", study.tune.values)[-1]}
    runs = grid.tuning_runs(study)
    records = {r.key: {"top1": float(r.tuned == best.get(r.x, 0.003)), "tuning": True, "arm": r.arm} for r in runs}
    for run in grid.final_runs(study, records):
        top1 = 0.5 + (run.x == 1.0) / 10 + run.seed / 1000
        records[run.key] = {
            "top1": top1, "tuning": False, "arm": run.arm, "x": run.x, "seed": run.seed, "diverged": run.x == 0
        }  # fmt: skip
    told = report._verdict(study, records, study.claims[0])
    assert told.startswith("Confirmed, for the values of `optimizer.lr` that were tried (*): RISOTTO@1.0 is at +50.1")
    assert told.endswith(" RISOTTO@0.0 did not train in 3 of 3 runs; 3 diverged.")
    turned = study.claims[0].model_copy(update={"better": "RISOTTO@0.0", "than": ["RISOTTO@1.0"]})
    told = report._verdict(study, records, turned)
    assert "the opposite was measured against RISOTTO@1.0, for the values of `optimizer.lr` that were tried (*)" in told


def test_the_width_of_a_range_counts_values_near_an_arms_own_best():
    shipped = grid.load_study("learning_rate_robustness_small")
    study = shipped.model_copy(update={"vary": shipped.vary.model_copy(update={"values": [0.001, 0.003, 0.01, 0.03]})})
    accuracy = {"RISOTTO": (0.55, 0.58, 0.56, 0.3), "Fixup": (0.2, 0.3, 0.2, 0.1)}
    records = {
        f"{arm}{seed}{x}": {"arm": arm, "x": x, "seed": seed, "top1": value, "tuning": False, "diverged": False}
        for arm, row in accuracy.items()
        for seed in study.seeds
        for x, value in zip(study.vary.values, row, strict=True)
    }
    assert report._scores(study, records, "RISOTTO", "width") == {0: 3, 1: 3, 2: 3}
    assert report._scores(study, records, "Fixup", "width") == {0: 1, 1: 1, 2: 1}
    claim = grid.Claim(text="-", better="RISOTTO", than=["Fixup"], measure="width")
    assert report._verdict(study, records, claim).startswith("Not confirmed: RISOTTO is at +2.0 values against Fixup")
    assert "The range of RISOTTO may go on" in report._verdict(study, records, claim)
    next(record for record in records.values() if record["arm"] == "RISOTTO" and record["top1"] == 0.3)["top1"] = 0.56
    assert report._verdict(study, records, claim).startswith("Confirmed: RISOTTO is at +2.3 values against Fixup")


def test_records_of_an_earlier_edition_are_left_out():
    study = grid.load_study("alpha_small")
    runs = grid.tuning_runs(study)
    records = {run.key: {"top1": 0.5} for run in runs}
    final = grid.final_runs(study, records)
    records |= {run.key: {"top1": 0.5} for run in final}
    kept = grid.current(study, {**records, "old": {"top1": 0.9}})
    assert kept.keys() == records.keys() and {record["arm"] for record in kept.values()} == {"RISOTTO"}


def test_a_claim_about_a_missing_arm_is_not_tested(toy):
    claim = grid.Claim(text="-", better="RISOTTO", than=["hopeless"])
    assert "Not tested" in report._verdict(grid.load_study("toy"), {}, claim)
    with pytest.raises(UserError, match="unknown study"):
        grid.load_study("nothing")

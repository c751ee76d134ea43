"""Training on several processes: what one trains, whatever dies."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from forked import Forked
from test_training import REPOSITORY, TINY, here, same, weights, with_step

from training import engine, train
from training.run_folder import read_metrics


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def torchrun(*args, processes=2, restarts=0, program=("-m", "training.train"), meeting=(), **variables):
    command = [
        sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", f"--max-restarts={restarts}",
        *(meeting or [f"--master-port={free_port()}"]), *map(str, program), *map(str, args),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), **variables}
    return subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def ranks(*args, **options):
    """Two processes as torchrun would start them, without one: exit codes, and what they say."""
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    both = [Forked(*args, **options, **place, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(2)]
    told = [process.communicate(timeout=100)[1] for process in both]
    return [process.returncode for process in both], told


# Small steps: rounding differs with the split of a batch, and larger ones would amplify it chaotically.
FIFTY_STEPS = [
    "--recipe", "digits", "--device", "cpu", "--set", "epochs=5", "--set", "data.image_size=8", "--set",
    "batch_size=128", "--set", "augment.mixup=0.2", "--set", "optimizer={name: sgd, lr: 0.0003}",
]  # fmt: skip


def test_two_processes_train_what_one_trains(command, tmp_path):
    assert command(train.main, *FIFTY_STEPS, "--output", tmp_path / "one").code == 0
    codes, told = ranks(*FIFTY_STEPS, "--output", tmp_path / "two")
    assert codes == [0, 0], told
    first, second = weights(tmp_path / "one"), weights(tmp_path / "two")
    for key, value in first.items():
        torch.testing.assert_close(second[key], value, atol=1e-5, rtol=0)
    results = [json.loads((tmp_path / name / "results.json").read_text())["raw"] for name in ("one", "two")]
    assert results[0]["images"] == results[1]["images"] == 360
    assert results[0]["top1"] == pytest.approx(results[1]["top1"], abs=1 / 360)
    for mine, theirs in zip(*(read_metrics(tmp_path / name) for name in ("one", "two")), strict=True):
        assert mine["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-5)
        assert mine["train_top1"] == pytest.approx(theirs["train_top1"], abs=2 / 1437)
    facts = engine.load_state(tmp_path / "two" / "state")[2]
    assert facts["progress"]["images"] == 5 * 11 * 128


def test_running_statistics_are_those_of_all_processes(command, tmp_path):
    """In what an epoch leaves behind, even if it had no validation."""
    options = [*FIFTY_STEPS, "--set", "model=risotto_resnet20_bn", "--set", "warmup_epochs=0"]
    options += ["--set", "optimizer.lr=1e-12"]
    assert command(train.main, *options, "--set", "epochs=1", "--output", tmp_path / "one").code == 0
    killed = with_step(tmp_path / "program.py", "if at == 12 and not rank: os.kill(os.getpid(), signal.SIGKILL)")
    options += ["--set", "epochs=2", "--set", "val_every=2"]
    _, (err, _) = ranks(*options, "--output", tmp_path / "two", program=killed)
    assert "epoch 1/2" in err and "validation" not in err.rpartition("epoch 1/2")[2]
    # The stem's: behind it each process normalizes by its own part of the batch.
    first, second = (weights(tmp_path / name)["bn1.running_mean"] for name in ("one", "two"))
    torch.testing.assert_close(second, first, atol=1e-5, rtol=0)


def test_machines_meet_again_after_one_of_them_has_restarted(tmp_path):
    """Within an epoch, at a step agreed to be saved. Each torchrun counts its own restarts, so the counts differ."""
    second = "os.environ['TORCHELASTIC_RESTART_COUNT'] == '0' and os.environ['GROUP_RANK'] == '1'"
    program = with_step(tmp_path / "program.py", f"if at == 18 and {second}: os.kill(os.getpid(), signal.SIGKILL)")
    meeting = ["--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--rdzv-id=test"]
    options = [*FIFTY_STEPS, "--set", "epochs=2", "--set", "save_minutes=1e-9"]
    options += ["--output", tmp_path / "run", "--overwrite"]
    alone = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    machines = [
        torchrun(*options, processes=1, restarts=1, program=program, meeting=meeting, **alone) for _ in range(2)
    ]
    told = "".join(machine.communicate(timeout=300)[1] for machine in machines)
    assert [machine.returncode for machine in machines] == [0, 0], told
    assert "resumed at step 15" in told
    assert (tmp_path / "run" / "results.json").is_file()


def test_processes_that_find_different_states_do_not_go_on(command, tmp_path):
    (tmp_path / "program.py").write_text(
        "import os\nfrom training import engine, train\n"
        "if os.environ['RANK'] == '1': engine.load_state = lambda folder: None\ntrain.main()\n"
    )
    options = [*FIFTY_STEPS, "--set", "epochs=1", "--set", "warmup_epochs=0", "--output", tmp_path / "run"]
    assert here(command, *options).code == 0
    (tmp_path / "run" / "results.json").unlink()  # as if it had been killed after its last state
    codes, told = ranks(*options, program=(tmp_path / "program.py",))
    assert codes == [2, 2] and all("must be on storage that all machines share" in err for err in told)


def test_each_process_resumes_with_its_own_running_statistics(tmp_path):
    first = "os.environ['TORCHELASTIC_RESTART_COUNT'] == '0'"
    killed = f"if at == 6 and rank and {first}: os.kill(os.getpid(), signal.SIGKILL)"
    options = [*FIFTY_STEPS, "--set", "epochs=1", "--set", "warmup_epochs=0", "--set", "model=risotto_resnet20_bn"]
    # The last two are meant for what was there before the first attempt.
    options += ["--set", "ema_decay=0.9", "--set", "resume=never", "--overwrite"]
    codes, told = ranks(*options, "--output", tmp_path / "whole")
    assert codes == [0, 0], told
    options += ["--set", "save_minutes=1e-9", "--output", tmp_path / "killed"]
    run = torchrun(*options, restarts=1, program=with_step(tmp_path / "program.py", killed))
    _, err = run.communicate(timeout=300)
    assert run.returncode == 0 and "resumed at step 5" in err, err
    assert same(*(weights(tmp_path / name) for name in ("whole", "killed")))
    whole, killed = (read_metrics(tmp_path / name)[0] for name in ("whole", "killed"))
    for key in ("train_loss", "train_top1"):  # what was summed up before counts once
        assert killed[key] == whole[key]


def test_a_restart_after_an_early_death_does_what_the_first_attempt_was_told(command, tmp_path, monkeypatch):
    """It died before it could begin: what lies in the folder is another run."""
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("seed: 1\n")
    (tmp_path / "run" / "results.json").write_text("{}")
    os.utime(tmp_path / "run" / "recipe.yaml", (0, 0))
    options = ["--recipe", "digits", *TINY, "--output", tmp_path / "run"]
    assert "holds a finished run" in here(command, *options).err
    assert here(command, *options, "--overwrite").code == 0
    assert json.loads((tmp_path / "run" / "results.json").read_text())["epochs"] == 2


def test_a_signal_to_one_process_saves_and_stops_all(tmp_path):
    program = with_step(tmp_path / "program.py", "if at == 7 and rank: os.kill(os.getpid(), signal.SIGTERM)")
    codes, told = ranks(*FIFTY_STEPS, "--output", tmp_path / "run", program=program)
    assert codes == [143, 143] and all("stopped by SIGTERM" in err for err in told)
    assert engine.load_state(tmp_path / "run" / "state")[0] == 10  # the next step at which they ask each other


def test_a_process_out_of_memory_ends_all_of_them(tmp_path):
    program = with_step(tmp_path / "program.py", "if at == 7 and rank: raise torch.OutOfMemoryError")
    process = torchrun(*FIFTY_STEPS, "--output", tmp_path / "run", program=program)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 1
    assert "error: the device is out of memory; set a smaller batch_size" in err

"""Processes of their own for commands, forked after the imports: those take longer than what the tests do with them."""

import multiprocessing
import os
import runpy
import sys
import tempfile
from pathlib import Path

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["training.train"])


class Forked:
    """`python -m training.train ARGUMENTS`, or a program, with as much of subprocess.Popen as the tests use."""

    def __init__(self, *arguments, program=("-m", "training.train"), **variables):
        pipe = Path(tempfile.mkdtemp()) / "stderr"
        os.mkfifo(pipe)
        words = [str(word) for word in (*program, *arguments)]
        self.process = SERVER.Process(target=_run, args=(pipe, words, {**os.environ, **variables}), daemon=True)
        self.process.start()
        self.stderr = open(pipe)  # noqa: SIM115

    @property
    def returncode(self):
        return self.process.exitcode

    def send_signal(self, number):
        os.kill(self.process.pid, number)

    def kill(self):
        self.process.kill()

    def communicate(self, timeout=None):
        with self.stderr:
            told = self.stderr.read()
        self.process.join(timeout)
        return "", told


def _run(pipe, words, environment):
    os.setsid()
    os.dup2(os.open(pipe, os.O_WRONLY), 2)
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(environment)
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")

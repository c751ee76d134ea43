"""Processes of their own for commands, forked after the imports: those take longer than what the tests do with them."""

import io
import multiprocessing
import os
import queue
import runpy
import sys
import threading

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["training.train"])


class Forked:
    """`python -m training.train ARGUMENTS`, or a program, with as much of subprocess.Popen as the tests use."""

    def __init__(self, *arguments, program=("-m", "training.train"), **variables):
        reader, writer = SERVER.Pipe(duplex=False)
        words = [str(word) for word in (*program, *arguments)]
        self.process = SERVER.Process(target=_run, args=(writer, words, {**os.environ, **variables}), daemon=True)
        self.process.start()
        writer.close()
        self.lines = queue.SimpleQueue()
        self.reading = threading.Thread(target=self._read, args=(reader,), daemon=True)
        self.reading.start()

    def _read(self, reader):
        with reader, io.FileIO(reader.fileno(), closefd=False) as file:
            for line in io.TextIOWrapper(file):
                self.lines.put(line)
        self.lines.put(None)

    @property
    def stderr(self):
        return iter(self.lines.get, None)

    @property
    def returncode(self):
        return self.process.exitcode

    def send_signal(self, number):
        os.kill(self.process.pid, number)

    def kill(self):
        self.process.kill()

    def communicate(self, timeout=60):
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.kill()
            raise TimeoutError(f"still running after {timeout} seconds")
        self.reading.join(timeout=5)
        lines = [self.lines.get() for _ in range(self.lines.qsize())]
        return "", "".join(line for line in lines if line is not None)


def _run(writer, words, environment):
    os.setsid()
    os.dup2(writer.fileno(), 2)
    sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), line_buffering=True)
    os.environ.clear()
    os.environ.update(environment)
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")

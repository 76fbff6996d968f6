"""Starts entry points in processes of their own that do not have to import anything first.

A line of JSON on standard input holds the script's name, its arguments, the folder for its output, and limits in bytes:
of a file that it may write as RLIMIT_FSIZE, and of the address space beyond what is taken already as RLIMIT_AS. A line
of output holds the process's number, and a second one, when it has ended, its exit status, negative for a signal.
"""

import json
import os
import resource
import subprocess
import sys
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).parents[1]


class Entry:
    """Runs entry points in processes that are forked from one that has imported everything."""

    def __init__(self, folder):
        self.folder = folder
        self.server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def start(self, *arguments, script="train", **limits):
        line = json.dumps([script, [str(argument) for argument in arguments], str(self.folder), limits])
        self.server.stdin.write(f"{line}\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())

    def wait(self):
        """Exit status and standard error."""
        status = int(self.server.stdout.readline())
        return status, (self.folder / "err").read_text()

    def run(self, *arguments, **options):
        self.start(*arguments, **options)
        return self.wait()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.server.kill()


def serve():
    sys.path.insert(0, str(ROOT))
    import_module("ema_seg.run")
    scripts = {name: import_module(name) for name in ("train", "eval")}
    for line in sys.stdin:
        name, arguments, folder, limits = json.loads(line)
        child = os.fork()
        if not child:
            run(scripts[name], [str(ROOT / f"{name}.py"), *arguments], Path(folder), limits)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def run(script, argv, folder, limits):
    """In the new process: as if Python had been started with the script; never returns."""
    for name, stream in (("out", 1), ("err", 2)):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    for name, limit in limits.items():
        if name == "RLIMIT_AS":
            limit += int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(getattr(resource, name), (limit, limit))
    sys.argv, status = argv, 0
    try:
        script.main()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1 if end.code else 0
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    serve()

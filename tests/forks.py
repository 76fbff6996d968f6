"""Server that forks Python processes, in which the libraries are imported already.

Each line of JSON on standard input holds a command, the folder for its output, the working directory, additional
environment variables, and resource limits in bytes: RLIMIT_FSIZE for a file that the process writes, RLIMIT_AS for the
address space beyond what is in use already. For each process, standard output has one line with its ID and, after its
end, one with its exit status, negative for a signal.
"""

import json
import os
import resource
import runpy
import signal
import subprocess
import sys
from functools import partial
from importlib import import_module
from pathlib import Path

from hydra import compose, initialize_config_dir
from joblib.externals.loky.backend.context import set_start_method
from matplotlib.figure import Figure
from PIL import Image
from submitit import Job

ROOT = Path(__file__).parents[1]


class Entry:
    """Client of the server: runs entry points in processes forked from one that has imported everything."""

    def __init__(self, folder):
        self.folder = folder
        self.process = None  # started, but not waited for yet
        # Benchmarks must not run Triton's kernels in its interpreter. Ranks have the second variable from their start;
        # torch reads it when it is imported.
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        environment["TORCH_CPP_LOG_LEVEL"] = "ERROR"
        self.server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def start(self, *arguments, script="train", cwd=ROOT, env=(), **limits):
        """Start an entry point and return its process ID; first kill a process that a failed test has left running."""
        if self.process is not None:
            os.kill(self.process, signal.SIGKILL)
            self.wait()
        command = [sys.executable, ROOT / f"{script}.py", *arguments]
        line = [list(map(str, command)), str(self.folder), str(cwd), dict(env), limits]
        self.server.stdin.write(f"{json.dumps(line)}\n")
        self.server.stdin.flush()
        self.process = int(self.server.stdout.readline())
        return self.process

    def wait(self):
        """Wait for the end of the process; return exit status and standard error."""
        status, self.process = int(self.server.stdout.readline()), None
        return status, (self.folder / "err").read_text()

    def run(self, *arguments, **options):
        """Start an entry point and wait for its end; return exit status and standard error."""
        self.start(*arguments, **options)
        return self.wait()

    @property
    def out(self):
        """Standard output of the last process."""
        return (self.folder / "out").read_text()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.server.kill()


class ForkedPython(subprocess.Popen):
    """Popen that forks this process for a command that would start Python; the child has the imported libraries."""

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest):
        if isinstance(args, str) or args[0] != sys.executable:
            super()._execute_child(args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest)
            return
        pipes = rest[3:9]
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid:
            self._child_created = True
            self._close_pipe_fds(*pipes)
            return
        try:
            for stream, pipe in enumerate((pipes[0], pipes[3], pipes[5])):
                if pipe != -1:
                    os.dup2(pipe, stream)
            os.closerange(3, 4096)
            os.chdir(cwd or ".")
            if env is not None:
                os.environ.clear()
                os.environ.update(env)
            if preexec_fn:
                preexec_fn()
            interpret([str(argument) for argument in args[1:]])
        finally:
            os._exit(1)


def interpret(arguments):
    """Run Python's command-line arguments in this forked process as Python would, and exit; never return."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(stream, mode, closefd=False) for stream, mode in enumerate("rww"))
    status = 0
    while arguments[0] in ("-u", "-P"):
        arguments = arguments[1:]
    try:
        if arguments[0] == "-c":
            sys.argv = ["-c", *arguments[2:]]
            exec(arguments[1], {"__name__": "__main__"})  # noqa: S102
        elif arguments[0] == "-m":
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            sys.path.insert(0, str(Path(arguments[0]).parent))
            runpy.run_path(arguments[0], run_name="__main__")
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


def leave_blank(figure, file, **options):
    """Save a blank image instead of the figure: drawing takes most of the time of a short run's report."""
    suffix = options.get("format") or Path(file).suffix[1:]
    width, height = figure.get_size_inches() * options.get("dpi", figure.dpi)
    Image.new("L", (int(width), int(height))).save(file, suffix)


def limit(limits):
    """Set the resource limits of this process; see the module for their units."""
    for name, most in limits.items():
        if name == "RLIMIT_AS":
            most += int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(getattr(resource, name), (most, most))


def serve():
    """Fork a process for each line of standard input."""
    sys.path.insert(0, str(ROOT))
    for name in ("cli.eval", "cli.launch", "cli.train", "comparison.files", "sweeps"):
        import_module(f"ema_seg.{name}")
    figures = import_module("ema_seg.reporting.figures")
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        compose("train", ["seed=1"])  # initialises the parser of overrides once for all forks
    subprocess.Popen, Figure.savefig = ForkedPython, leave_blank
    for name in ("draw_class_iou", "draw_confusion_matrix", "draw_samples"):
        setattr(figures, name, lambda *arguments: Figure())
    set_start_method("fork")  # of joblib's processes
    Job._results_timeout_s = 1  # submitit waits 15 s for a killed job's result, in case the disk is slow
    for line in sys.stdin:
        command, folder, cwd, env, limits = json.loads(line)
        with (Path(folder) / "out").open("w") as out, (Path(folder) / "err").open("w") as err:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                cwd=cwd,
                env={**os.environ, **env},
                preexec_fn=partial(limit, limits),
            )
        print(process.pid, flush=True)
        print(process.wait(), flush=True)


if __name__ == "__main__":
    serve()

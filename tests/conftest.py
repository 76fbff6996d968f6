import os

# Test processes run in parallel; with more than one thread each they would compete for the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
# At its first use Inductor tries the compiler with each instruction set of the CPU. That takes longer than all that the
# tests compile, which scalar code serves as well.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "0")

import ctypes
import shutil
import signal
import socket
import sys
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image

from tests.forks import Entry, leave_blank

# A shell starts background processes with SIGINT ignored; the processes that tests interrupt would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parents[1]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
# The entry points are scripts beside the package, not part of it.
sys.path.insert(0, str(ROOT))


def pytest_configure(config):
    """Import the slow libraries, except in the process that only distributes tests to others."""
    if config.getoption("numprocesses", None):
        return
    import torch

    # Without a CUDA device Triton's kernels run in its interpreter. Triton reads the variable when it is imported.
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")

    # Lightning's log handler keeps the sys.stderr of its import, which must not be the captured one of a single test.
    import lightning.pytorch  # noqa: F401


# Tests that start programs.
SLOW = ("tests/benchmarks/", "tests/comparison/test_repeat.py", "tests/runtime/distributed/", "tests/system/")


def pytest_collection_modifyitems(items):
    for item in items:
        if item.nodeid.startswith(SLOW):
            item.add_marker(pytest.mark.slow)


def write_camvid(root, sizes=((64, 96),), train=4, val=3):
    """Write a data set in CamVid's layout: a road below, sky above, a pole, an unlabelled strip at the left."""
    generator = np.random.default_rng(0)
    for split, count in {"train": train, "val": val}.items():
        for folder in ("images", "masks"):
            (root / split / folder).mkdir(parents=True)
        for index in range(count):
            height, width = sizes[index % len(sizes)]
            mask = np.zeros((height, width), np.uint8)
            mask[height // 2 + index :] = 3
            mask[:, width // 3 : width // 3 + 4] = 2
            mask[:, :2] = 11
            image = mask[..., None] * np.array([20, 15, 10], np.uint8) + generator.integers(0, 40, (height, width, 3))
            Image.fromarray(image.astype(np.uint8)).save(root / split / "images" / f"{split}_{index}.jpg")
            Image.fromarray(mask).save(root / split / "masks" / f"{split}_{index}.png")
    return root


@pytest.fixture(autouse=True)
def _seed():
    # A test repeats its random numbers, and so its rounding errors, in every run.
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope="module")
def browser():
    """Start Chromium or Chrome."""
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    if executable is None:
        message = "no Chromium or Chrome to open the page with; install one, on Debian with apt-get install chromium"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
        browser = playwright.chromium.launch(executable_path=executable, args=options)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def camvid_root(tmp_path_factory):
    return write_camvid(tmp_path_factory.mktemp("camvid") / "data")


# The smallest model and the shortest training that still include validation, evaluation and report.
QUICK = (
    "model=linknet",
    "model.encoder=tu-test_efficientnet",
    "model.encoder_weights=null",
    "data.batch_size=2",
    "data.evaluation_batch_size=2",
    "data.workers=0",
    "data.augmentation.crop.height=64",
    "data.augmentation.crop.width=64",
    "epochs=2",
    "logger=none",
    "training.pictures_every=0",
    "evaluation.budget=0.01",
    "trainer=cpu",
)
# A small decoder that has dropout.
FPN = ("model=fpn", "+model.decoder_segmentation_channels=32", "+model.decoder_pyramid_channels=32")


@pytest.fixture(scope="session")
def entry(tmp_path_factory):
    """Start the server that runs entry points in forked processes; see tests/forks.py."""
    with Entry(tmp_path_factory.mktemp("entry")) as entry:
        yield entry


def is_alive(process):
    """Return whether the process with this ID runs; a zombie does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False


@contextmanager
def silent(path):
    """Replace a file or folder by a disk that never answers, as on a dead server, for the duration of the block.

    Mounting the disk takes root's rights; without them a pipe without a writer replaces the file.
    """
    try:
        device = os.open("/dev/fuse", os.O_RDWR)
    except OSError:
        device = None
    # Nobody answers even FUSE's first request, so all later requests wait, even after signals that have a handler.
    options = f"fd={device},rootmode={path.stat().st_mode:o},user_id=0,group_id=0"
    libc = ctypes.CDLL(None)
    if device is None or libc.mount(b"silent", bytes(path), b"fuse.silent", 0, options.encode()):
        path.unlink()
        os.mkfifo(path)
        yield
        return
    try:
        yield
    finally:
        os.close(device)
        libc.umount2(bytes(path), 2)


def free_port():
    """Return a port of this machine on which nothing listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def made_once(tmp_path_factory, name, make):
    """Return a folder of this name; call ``make`` to fill it once for all test processes."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    folder, done = root / name, root / f"{name}.done"
    with FileLock(root / f"{name}.lock"):
        if not done.exists():
            folder.mkdir()
            make(folder)
            done.touch()
    return folder


@pytest.fixture
def blank_figures(monkeypatch):
    """Save blank images instead of figures; see ``leave_blank``."""
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", leave_blank)


@pytest.fixture(scope="module")
def one_trace():
    """Trace and convert a model once for all artefacts of one kind of input, because that takes most of the time."""
    from ema_seg.inference import export

    trace, save, programs, files = export._trace, export._save_onnx, {}, {}

    def trace_once(deployable):
        key = deployable.processing, deployable.dtype
        if key not in programs:
            programs[key] = trace(deployable)
        return programs[key]

    def save_once(program, path, metadata):
        import onnx

        if program not in files:
            save(program, path, metadata)
            files[program] = onnx.load(path)
        model = files[program]
        onnx.helper.set_model_props(model, {export.METADATA_KEY: metadata.as_json()})
        onnx.save(model, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "_trace", trace_once)
        patch.setattr(export, "_save_onnx", save_once)
        yield


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Let a folder stand for the Hugging Face Hub; return it, and the calls that would have gone to the network."""
    import huggingface_hub

    folder, calls = tmp_path / "hub", []

    class Api:
        def create_repo(self, name, *, private, exist_ok):
            calls.append(("create", name, private))
            return f"https://huggingface.co/{name}"

        def list_repo_files(self, name):
            return []

        def upload_folder(self, *, repo_id, folder_path, commit_message, ignore_patterns):
            shutil.copytree(folder_path, folder, ignore=shutil.ignore_patterns(*ignore_patterns))

    def download(name, *, revision, allow_patterns):
        calls.append(("download", name, revision, allow_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return folder, calls


@pytest.fixture
def run_script(blank_figures, monkeypatch, capsys):
    """Return a function that runs a command of the project here, with blank figures: exit status, output and error."""

    def run(script, *overrides):
        from hydra.core.global_hydra import GlobalHydra

        from ema_seg.__main__ import _COMMANDS

        module = import_module(_COMMANDS[script][0])
        monkeypatch.setattr(sys, "argv", [str(ROOT / f"{script}.py"), *map(str, overrides)])
        GlobalHydra.instance().clear()
        status = 0
        try:
            module.main()
        except SystemExit as exit:
            if isinstance(exit.code, str):
                print(exit.code, file=sys.stderr)
            status = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run

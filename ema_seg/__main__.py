"""The command ``ema-seg``, also ``python -m ema_seg``: every program of the project from any folder."""

import sys
from importlib import import_module

__all__ = ["main"]

# Module of each command, and its line in the help.
_COMMANDS = {
    "train": ("ema_seg.cli.train", "train, test and report a model, or a sweep of them (python train.py)"),
    "eval": ("ema_seg.cli.eval", "evaluate a run or a checkpoint (python eval.py)"),
    "predict": ("ema_seg.cli.predict", "segment images with a run or a checkpoint"),
    "demo": ("ema_seg.cli.demo", "show what one or two models see in a picture, on a local page"),
    "analyse": ("ema_seg.cli.analyse", "show what the attention blocks of a trained model do"),
    "export": ("ema_seg.cli.export", "export a model to ONNX, torch.export or OpenVINO, verified"),
    "push": ("ema_seg.cli.push", "share a model with its model card: in a folder or on the Hugging Face Hub"),
    "compare": ("ema_seg.comparison.__main__", "compare the runs of a sweep, or single runs"),
    "plan": ("ema_seg.comparison.plan", "plan the number of seeds from a pilot sweep"),
    "check": ("ema_seg.data.check", "check the files of a data set"),
    "sweeps": ("ema_seg.sweeps.__main__", "show the jobs of a sweep"),
}


def main() -> int:
    """Run the command that the first argument names and return the exit status."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print("usage: ema-seg <command> …\n")
        print(*(f"  {command:8} {line}" for command, (_, line) in _COMMANDS.items()), sep="\n")
        print("\nema-seg <command> --help lists the arguments of a command.")
        return 0
    if name not in _COMMANDS:
        from ema_seg.runtime.errors import did_you_mean

        print(f"error: {name}: must be one of {', '.join(_COMMANDS)}.{did_you_mean(name, _COMMANDS)}", file=sys.stderr)
        return 1
    if name == "train":
        # Before the slow imports: from here on a signal ends the command with a message and an exit status.
        from ema_seg.runtime.distributed.exit_handlers import install_exit_handlers

        install_exit_handlers()
    sys.argv = [f"{sys.argv[0]} {name}", *sys.argv[2:]]
    status: int | None = import_module(_COMMANDS[name][0]).main()
    return status or 0


if __name__ == "__main__":
    sys.exit(main())

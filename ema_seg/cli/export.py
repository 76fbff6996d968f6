"""The command ``ema-seg export``: from its arguments to a verified artefact."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from ema_seg.cli.command_line import default_folder, plain_config, reports_errors, require_set
from ema_seg.cli.composition import launch_on_data_of_run
from ema_seg.cli.early_checks import check_root
from ema_seg.config import Exporting, check_settings
from ema_seg.runtime.host_memory import gc_frozen_imports, keep_freed_memory

__all__ = ["main"]


@reports_errors
def main() -> None:
    """Compose the configuration on top of the run's data, and export."""
    keep_freed_memory()
    launch_on_data_of_run(_export, "export")


@reports_errors
def _export(composed: DictConfig) -> None:
    config = plain_config(composed)
    require_set(config, run="the folder of a run or a checkpoint")
    check_settings(config, Exporting)
    check_root(config["data"])

    # Heavy imports only now, so that --help and --cfg answer at once.
    with gc_frozen_imports():
        from ema_seg.export import export
        from ema_seg.models.checkpoint import checkpoint_path

    source = Path(config["run"])
    run = source if source.is_dir() else None
    out = default_folder(config, Path("exported", f"{config['format']}_{config['precision']}"))
    options = ("format", "precision", "processing", "images", "calibration_images", "budget")
    report = export(
        checkpoint_path(config["run"]), config["data"], out, run=run, **{key: config[key] for key in options}
    )
    print(_summary(report))
    print(f"{out / report['file']}")


def _summary(report: dict[str, Any]) -> str:
    miou, seconds = report["miou"], report["seconds"]
    size = " x ".join(map(str, report["size"]))
    return "\n".join(
        [
            f"equal pixels          {report['equal_pixels']:.4%} of {report['images']} images, some at further sizes",
            f"largest difference    {report['largest_difference']:.2g} (of logits)",
            f"mIoU                  {miou['artefact']:.2%}, model {miou['model']:.2%}",
            f"time for {size:12} {1000 * seconds['artefact']:.1f} ms, model {1000 * seconds['model']:.1f} ms "
            f"({seconds['model'] / seconds['artefact']:.2f} times as fast; {report['threads']} threads)",
            f"size                  {report['bytes'] / 1e6:.1f} MB",
        ]
    )

"""The command ``ema-seg demo``: from its arguments to a page at an address of this machine."""

import sys

from omegaconf import DictConfig

from ema_seg.cli.command_line import expand_home, plain_config, reports_errors, require_set
from ema_seg.cli.composition import CONFIGS, compose, launch
from ema_seg.config import Demonstrating, check_settings
from ema_seg.runtime.host_memory import gc_frozen_imports, keep_freed_memory

__all__ = ["main"]


@reports_errors
def main() -> None:
    """Compose the configuration and show the page."""
    keep_freed_memory()
    sys.argv = expand_home(sys.argv)
    launch(_show, CONFIGS, "demo", compose(CONFIGS, "demo"))


@reports_errors
def _show(composed: DictConfig) -> None:
    config = plain_config(composed)
    check_settings(config, Demonstrating)
    require_set(config, run="the folder of a run or a checkpoint")

    # Heavy imports only now, so that --help and --cfg answer at once.
    with gc_frozen_imports():
        from ema_seg.demo.comparing import require_common_classes
        from ema_seg.demo.examples import examples_in, examples_of_run
        from ema_seg.demo.models import Model, model_names
        from ema_seg.demo.serve import check_port, require_gradio, serve
        from ema_seg.inference.segmenter import Segmenter
        from ema_seg.models.checkpoint import checkpoint_path
        from ema_seg.models.shared import WEIGHTS

        require_gradio()

    check_port(config["port"])
    sources = [source for source in (config["run"], config["other"]) if source is not None]
    options = {key: config[key] for key in ("device", "precision")}
    segmenters = [Segmenter.load(source, **options) for source in sources]
    require_common_classes(*(segmenter.classes for segmenter in (segmenters[0], segmenters[-1])))
    models = [Model(*pair) for pair in zip(model_names(sources), segmenters, strict=True)]
    if config["examples"] is not None:
        examples = examples_in(config["examples"])
    else:
        # Paths in the configuration of a shared or exported model are not of this machine.
        is_shared = checkpoint_path(config["run"]).name == WEIGHTS
        origin = None if is_shared else getattr(segmenters[0].model, "origin", None)
        examples = examples_of_run(origin["config"]["data"]) if origin else []
    serve(models, examples, port=config["port"], share=config["share"])

"""Model card of a shared model: front matter for the Hub, and Markdown from the run's configuration and report."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ema_seg.models.shared import PANEL, VERSION, is_shared_setting, shared_config
from ema_seg.runtime.escaping import for_markdown, for_markdown_code

__all__ = ["render_card"]

_NOT_MEASURED = "Scores were not measured for these weights."
_SOURCES = ("init_from", "resume", "rerun")


def render_card(
    *,
    config: Mapping[str, Any],
    classes: Sequence[str],
    address: str | None = None,
    license: str | None = None,
    scores: Mapping[str, Any] | None = None,
    tables: Mapping[str, str] | None = None,
    command: Sequence[str] | None = None,
    selected: bool = False,
    panel: bool = False,
) -> str:
    """Render the model card.

    Args:
        config: the run's configuration.
        classes: the K class names.
        address: ``hf://user/name`` that ``ema_seg.load`` reads the model from; None for a folder.
        license: identifier of the licence; None if it is not stated.
        scores: see ``ema_seg.models.shared``; None if they were not measured.
        tables: further sections of the report, Markdown by title.
        command: the command line of the training, if it is known; its paths are left out.
        selected: whether the weights were selected by their score on the images of ``scores``.
        panel: whether ``panel.png`` lies beside the card.
    """
    config = shared_config(config)
    name = _name(config)
    parts = [
        f"---\n{_front_matter(config, name, license, scores)}\n---\n\n# {for_markdown(name)}\n",
        "\n".join(_summary(config, classes, panel)),
        "## Use\n\n" + _usage(address),
        *(f"## {title}\n\n{text}" for title, text in (tables or {"Scores": _NOT_MEASURED}).items()),
        "## Training\n\n" + "\n".join(_training(config, command)),
        "## Limits\n\n" + "\n".join(f"- {limit}" for limit in _limits(config, classes, scores, selected)),
        f"## Licence\n\n{license or 'Not stated.'}",
    ]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def _name(config: Mapping[str, Any]) -> str:
    attention = config["attention"]["name"]
    block = "without attention" if attention == "none" else f"with {attention}"
    model = config["model"]
    return f"{model['decoder']} on {model['encoder']} {block}, trained on {config['data'].get('name', 'unnamed data')}"


def _front_matter(config: Mapping[str, Any], name: str, license: str | None, scores: Mapping[str, Any] | None) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    results = None
    if scores and scores["miou"] is not None:
        results = [
            EvalResult(
                task_type="image-segmentation",
                dataset_type=str(scores["data"]),
                dataset_name=str(scores["data"]),
                dataset_split=str(scores["split"]),
                metric_type="mean_iou",
                metric_name=f"mIoU ({scores['images']} images)",
                metric_value=round(scores["miou"], 4),
            )
        ]
    card = ModelCardData(
        license=license,
        library_name="ema-seg",
        pipeline_tag="image-segmentation",
        tags=["ema-seg", "semantic-segmentation", str(config["model"]["decoder"]), str(config["attention"]["name"])],
        model_name=name if results else None,
        eval_results=results,
    )
    return str(card.to_yaml())


def _summary(config: Mapping[str, Any], classes: Sequence[str], panel: bool) -> Iterator[str]:
    model, attention, placement = config["model"], config["attention"], config["placement"]
    names = ", ".join(map(for_markdown, classes))
    yield f"A model for semantic segmentation by ema-seg. It gives each pixel one of {len(classes)} classes: {names}.\n"
    yield f"- decoder: {for_markdown(str(model['decoder']))}"
    yield f"- encoder: {for_markdown(str(model['encoder']))}"
    places = [place for place in ("encoder", "decoder", "head") if placement[place]]
    if attention["name"] == "none":
        yield "- attention block: none"
    else:
        yield f"- attention block: {for_markdown(attention['name'])}, at {', '.join(places)}"
    if panel:
        yield f"\n![The images with the best, the median and the worst mIoU]({PANEL})"


def _usage(address: str | None) -> str:
    run = address or "<this folder>"
    lines = ["import ema_seg", "", f'segmenter = ema_seg.load("{run}")', 'segmenter("street.jpg").save("mask.png")']
    commands = [
        f"ema-seg predict run={run} source=street.jpg out=predictions",
        f"ema-seg eval ckpt={run} data.root=<the data set> report.dir=report",
        f"ema-seg train init_from={run} data=folder data.root=<your images>",
    ]
    return "\n".join(["```python", *lines, "```", "", "```console", *commands, "```"])


def _training(config: Mapping[str, Any], command: Sequence[str] | None) -> Iterator[str]:
    data, optimizer, steps = config["data"], config.get("optimizer", {}), config["training"]
    start = config["model"].get("encoder_weights")
    encoder = {None: "random numbers", "file": "a file of weights"}.get(start, start)
    facts = {
        "data": data.get("name"),
        "epochs": config.get("epochs"),
        "batch": data.get("batch_size"),
        "loss": ", ".join(name for name, options in config.get("loss", {}).items() if options is not None),
        "optimiser": optimizer.get("name") and f"{optimizer['name']}, highest learning rate {optimizer.get('lr')}",
        "schedule": config.get("schedule", {}).get("name"),
        "precision": config["trainer"].get("precision"),
        "average of the weights": steps.get("weight_averaging"),
        "seed": config.get("seed"),
        "start": "another model's weights" if config.get("init_from") else f"the encoder from {encoder}",
    }
    known = {key: value for key, value in facts.items() if value is not None and value is not False and value != ""}
    yield from (f"- {key}: {for_markdown(str(value))}" for key, value in known.items())
    yield f"- written by: ema-seg {VERSION}"
    if command:
        yield f"- command, without paths: {for_markdown_code(shared_command(command))}"
    else:
        yield "- command: not recorded; `config.json` has the settings"


def shared_command(command: Sequence[str]) -> str:
    """Return a command line for a shell: settings that may be shared, with ``…`` for each path."""
    program, *arguments = command
    kept = []
    for text in arguments:
        name, _, value = text.partition("=")
        key = name.lstrip("+~")
        if text in ("-m", "--multirun"):
            kept.append(text)
        elif key in _SOURCES or is_shared_setting(key):
            is_path = key in ("data.root", *_SOURCES) or any(mark in value for mark in "/\\{")
            is_path |= key == "model.encoder_weights" and value not in ("imagenet", "packaged", "null")
            kept.append(f"{name}=…" if is_path else shlex.quote(text))
    program = program.replace("\\", "/").rpartition("/")[2].replace("__main__.py", "python -m ema_seg")
    return " ".join(["python", program, *kept] if program.endswith(".py") else [program, *kept])


def _limits(
    config: Mapping[str, Any], classes: Sequence[str], scores: Mapping[str, Any] | None, selected: bool
) -> Iterator[str]:
    yield f"It knows {len(classes)} classes. Pixels of anything else get one of them, too."
    crop = config["data"].get("augmentation", {}).get("crop") or {}
    if isinstance(crop, Mapping) and crop.get("height") and crop.get("width"):
        yield f"It was trained on crops of {crop['height']} x {crop['width']} pixels (height x width)."
    if scores is None:
        yield _NOT_MEASURED
        return
    data = for_markdown(str(scores["data"]))
    split = for_markdown(str(scores["split"]))
    yield f"It was scored on {scores['images']} images of {data} ({split}), and on no other data."
    yield "Pixels without a label were not scored."
    if selected:
        yield "The epoch was selected by the score on the same images, so the scores are optimistic."
    yield "The scores are of one training; their variation over seeds is not part of this card."

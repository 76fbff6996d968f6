"""The page of the demo, built with Gradio."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ema_seg.demo.comparing import compare
from ema_seg.demo.drawing import (
    areas_table,
    as_html,
    difference_table,
    draw_mask,
    draw_weights,
    range_bar,
    reduced,
)
from ema_seg.demo.examples import Example
from ema_seg.demo.models import Model
from ema_seg.inference.segmenter import Picture, Segmentation, Segmenter
from ema_seg.runtime.errors import ConfigError, EmaSegError, one_line

__all__ = ["build_page", "start_page"]

_CSS = """
.swatch { display: inline-block; width: 1em; height: 1em; margin-right: .5em; border-radius: 2px; flex: none;
  vertical-align: -.12em; box-shadow: 0 0 0 1px rgb(128 128 128 / 50%); }
.prose table:is(.areas, .pairs) { border-collapse: collapse; width: 100%; margin: 0; border: 0;
  font-size: var(--text-md); }
.prose table:is(.areas, .pairs) :is(tr, td, th) { padding: .25em .5em; border: 0; text-align: left;
  border-bottom: 1px solid var(--border-color-primary); font-family: var(--font); }
.prose table:is(.areas, .pairs) :is(td, th):last-child { text-align: right; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
.missing { margin-top: .5em; } .missing summary { cursor: pointer; opacity: .7; }
.missing span { display: inline-block; margin: .2em 1em .2em 0; }
.range { display: flex; gap: .6em; align-items: center; font-variant-numeric: tabular-nums; }
.range i { flex: 1; height: .8em; border-radius: 2px; }
.prose :is(h1, h2, h3, th, td, p) { overflow-wrap: anywhere; }
#examples :is(.grid-wrap, .preview) { min-height: 0; }
.message { padding: .6em .8em; border-left: 4px solid #d03050; background: var(--block-background-fill); }
.note { opacity: .7; }
"""
_THUMBNAIL = 320  # pixels
_COLUMNS = 8  # of examples
_DAY = 86400  # seconds
_SESSIONS = 8  # whose last result stays in memory


@dataclass(frozen=True, eq=False)
class _Column:
    """Components that show the results of a model."""

    model: Model
    result: gr.State
    maps: gr.State
    time: gr.HTML
    overlay: gr.Image
    mask: gr.Image
    areas: gr.HTML
    note: gr.HTML
    block: gr.Dropdown
    group: gr.Slider
    weights: gr.Image
    range: gr.HTML

    def clear(self) -> dict[Any, Any]:
        """Empty the results."""
        views = (self.result, self.maps, self.time, self.overlay, self.mask, self.areas)
        return {**dict.fromkeys(views), **self.without_weights("")}

    def show(self, result: Segmentation, seconds: float) -> dict[Any, Any]:
        """Show mask, overlay and areas."""
        height, width = result.mask.shape
        return {
            self.result: result,
            self.time: f'<p class="note">{width} x {height} pixels in {seconds:.2f} s</p>',
            self.overlay: reduced(result.overlay()),
            self.mask: draw_mask(result),
            self.areas: areas_table(result),
        }

    def without_weights(self, note: str) -> dict[Any, Any]:
        """Show a note in the place of weight maps."""
        hidden = gr.update(visible=False)
        return {
            self.maps: None,
            self.note: gr.update(value=f'<p class="note">{as_html(note)}</p>', visible=bool(note)),
            **dict.fromkeys((self.block, self.group, self.weights, self.range), hidden),
        }

    def show_weights(self, maps: dict[str, NDArray[np.float32]], image: NDArray[np.uint8]) -> dict[Any, Any]:
        """Show the mean map of the last attention block, and let the user choose others."""
        names = list(maps)
        return {
            self.maps: maps,
            self.note: gr.update(visible=False),
            self.block: gr.update(choices=names, value=names[-1], visible=True),
            **self.show_block(names[-1], maps, image),
        }

    def show_block(self, name: str, maps: dict[str, NDArray[np.float32]], image: NDArray[np.uint8]) -> dict[Any, Any]:
        """Show the mean map of an attention block, and let the user choose its groups."""
        groups = len(maps[name])
        label = f"group, from 1 to {groups} (0: the mean of all)"
        slider = gr.update(value=0, maximum=groups, label=label, visible=True)
        return {self.group: slider, **self.show_group(name, 0, maps, image)}

    def show_group(
        self, name: str, group: int, maps: dict[str, NDArray[np.float32]], image: NDArray[np.uint8]
    ) -> dict[Any, Any]:
        """Show the weight map of a group, counted from 1, or the mean of all groups for 0."""
        weights = maps[name][group - 1] if group else maps[name].mean(axis=0)
        drawing, low, high = draw_weights(image, weights, self.model.segmenter.stride)
        return {
            self.weights: gr.update(value=drawing, visible=True),
            self.range: gr.update(value=range_bar(low, high), visible=True),
        }


def build_page(models: Sequence[Model], examples: Sequence[Example]) -> gr.Blocks:
    """Build the page.

    Args:
        models: one model, or two that are compared.
        examples: pictures that the page offers.
    """
    thumbnails = _with_thumbnails(examples, models[0].segmenter)
    title = " and ".join(model.name for model in models)
    # Gradio deletes its copies of pictures after a day.
    page = gr.Blocks(title=f"ema-seg: {title}", analytics_enabled=False, delete_cache=(_DAY, _DAY))
    with page:
        gr.HTML(f"<h1>{as_html(title)}</h1>")
        with gr.Row():
            with gr.Column(scale=1, min_width=260):
                file = gr.File(label="Drop a picture", height=140, elem_id="picture")
            with gr.Column(scale=3, min_width=320, visible=bool(thumbnails)):
                gr.HTML('<p class="note">Or choose an example:</p>')
                gallery = gr.Gallery(
                    [thumbnail for _, thumbnail in thumbnails],
                    show_label=False,
                    allow_preview=False,
                    columns=_COLUMNS,
                    height="auto",
                    object_fit="cover",
                    format="jpeg",
                    buttons=[],
                    elem_id="examples",
                )
        message = gr.HTML(visible=False, elem_id="message")
        results = gr.Column(visible=False, elem_id="results")
        with results:
            columns, difference, pairs = _build_results(models)

        def fail(error: EmaSegError, name: str, path: str) -> dict[Any, Any]:
            text = as_html(str(error).replace(path, name) if path else f"{name}: {error}")
            return {
                message: gr.update(value=f'<p class="message" role="alert">{text}</p>', visible=True),
                results: gr.update(visible=False),
                difference: None,
                pairs: "",
                **{key: value for column in columns for key, value in column.clear().items()},
            }

        def segment(picture: Picture) -> dict[Any, Any]:
            updates: dict[Any, Any] = {message: gr.update(visible=False), results: gr.update(visible=True)}
            found = [column.model.segment(picture) for column in columns]
            for column, (result, seconds) in zip(columns, found, strict=True):
                updates |= column.show(result, seconds) | column.without_weights("")
            if len(models) == 2:
                updates |= show_difference(*(result for result, _ in found))
            return updates

        def show_difference(first: Segmentation, second: Segmentation) -> dict[Any, Any]:
            try:
                compared = compare(first, second)
            except EmaSegError as error:
                return {difference: None, pairs: f'<p class="note">{as_html(str(error))}</p>'}
            names = [model.name for model in models]
            return {
                difference: reduced(compared.draw(first.image)),
                pairs: difference_table(compared, names),
            }

        def on_file(path: str) -> dict[Any, Any]:
            try:
                updates = segment(path)
            except EmaSegError as error:
                updates = fail(error, Path(path).name, path)
            return {file: None, **updates}

        def on_example(event: gr.SelectData) -> dict[Any, Any]:
            example, _ = thumbnails[event.index]
            try:
                return segment(example.read())
            except EmaSegError as error:
                return fail(error, example.name, "")

        def on_result(*found: Segmentation | None) -> dict[Any, Any]:
            updates: dict[Any, Any] = {message: gr.update()}  # Gradio takes no empty dict
            for column, result in zip(columns, found, strict=True):
                if result is None:
                    continue
                try:
                    maps = column.model.weight_maps(result.image) if column.model.has_weight_maps else {}
                except EmaSegError as error:
                    updates |= column.without_weights(f"No weight maps: {str(error).removeprefix('weight_maps: ')}")
                    continue
                if maps:
                    updates |= column.show_weights(maps, result.image)
                else:
                    updates |= column.without_weights("This model has no attention block with weight maps.")
            return updates

        outputs = [message, results, difference, pairs]
        for column in columns:
            outputs += [value for key, value in vars(column).items() if key != "model"]
        inputs = [column.result for column in columns]
        weights = [output for output in outputs if output not in inputs]
        private = {"api_visibility": "private"}
        for listen, function, given in ((file.upload, on_file, [file]), (gallery.select, on_example, None)):
            listen(function, given, [file, *outputs], **private).then(
                on_result, inputs, weights, show_progress="hidden", **private
            )
        for column in columns:
            _listen_to_column(column, private)
    return page


def start_page(page: gr.Blocks, host: str, port: int | None = None, share: bool = False) -> None:
    """Start the server of a page, in threads.

    Environment variables of Gradio that would show the page to others do not apply.

    Raises:
        ConfigError: no port is free.
    """
    try:
        page.launch(
            server_name=host,
            server_port=port,
            share=share,
            prevent_thread_lock=True,
            quiet=True,
            inline=False,
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            mcp_server=False,
            ssr_mode=False,
            pwa=False,
            state_session_capacity=_SESSIONS,
            css=_CSS,
        )
    except OSError as error:
        raise ConfigError(f"port={port}: {one_line(error)}") from error


def _listen_to_column(column: _Column, options: dict[str, Any]) -> None:
    """Show another map when the user chooses a block or a group."""
    # The server forgets the results of old tabs for those of new ones.
    forgotten = column.without_weights("The results of this tab are gone. Choose the picture again.")

    def on_block(name: str, maps: Any, result: Segmentation | None) -> dict[Any, Any]:
        return forgotten if result is None else column.show_block(name, maps, result.image)

    def on_group(name: str, group: int, maps: Any, result: Segmentation | None) -> dict[Any, Any]:
        return forgotten if result is None else column.show_group(name, group, maps, result.image)

    state, shown = [column.maps, column.result], list(forgotten)
    hidden = {"show_progress": "hidden", **options}
    column.block.input(on_block, [column.block, *state], shown, **hidden)
    column.group.input(on_group, [column.block, column.group, *state], shown, trigger_mode="always_last", **hidden)


def _build_results(models: Sequence[Model]) -> tuple[list[_Column], gr.Image, gr.HTML]:
    """Build the components of the results: a column for each model, the differences, and columns of weight maps."""
    alone = len(models) == 1
    pictures: list[Any] = []
    areas: list[gr.HTML] = []
    weights: list[Any] = []
    with gr.Row():
        for index, model in enumerate(models):
            with gr.Column(min_width=300):
                if not alone:
                    gr.HTML(f"<h2>{as_html(model.name)}</h2>")
                time = gr.HTML(elem_id=f"time-{index}")
                with gr.Row():
                    overlay, mask = _picture("overlay", f"overlay-{index}"), _picture("mask", f"mask-{index}")
                pictures.append((time, overlay, mask))
                if not alone:
                    areas.append(gr.HTML(elem_id=f"areas-{index}"))
    with gr.Column(visible=not alone, elem_id="difference"), gr.Row():
        with gr.Column(min_width=300):
            difference = _picture("differing pixels", "difference-picture")
        with gr.Column(min_width=300):
            pairs = gr.HTML()
    with gr.Row():
        if alone:
            with gr.Column(min_width=300):
                areas.append(gr.HTML(elem_id="areas-0"))
        for index, model in enumerate(models):
            weights.append(_build_weights(index, "" if alone else model.name))
    columns = [
        _Column(model, gr.State(), gr.State(), *(*shown, table, *maps))
        for model, shown, table, maps in zip(models, pictures, areas, weights, strict=True)
    ]
    return columns, difference, pairs


def _build_weights(index: int, name: str) -> tuple[Any, ...]:
    """Build the components of a model's weight maps; a name becomes their heading."""
    with gr.Column(min_width=300):
        heading = f"<h3>Attention of {as_html(name)}</h3>" if name else "<h3>Attention</h3>"
        gr.HTML(heading)
        note = gr.HTML(visible=False, elem_id=f"note-{index}")
        with gr.Row():
            block = gr.Dropdown(label="attention block", visible=False, elem_id=f"block-{index}", min_width=280)
            group = gr.Slider(0, 1, step=1, visible=False, elem_id=f"group-{index}", min_width=280)
        weights = _picture("weight map", f"weights-{index}", visible=False)
        return note, block, group, weights, gr.HTML(visible=False, elem_id=f"range-{index}")


def _picture(label: str, name: str, **options: Any) -> gr.Image:
    return gr.Image(
        label=label,
        format="png",
        interactive=False,
        buttons=["download", "fullscreen"],
        elem_id=name,
        min_width=280,
        **options,
    )


def _with_thumbnails(examples: Sequence[Example], segmenter: Segmenter) -> list[tuple[Example, Image.Image]]:
    """Draw a thumbnail of each example, and leave out those that cannot be read."""
    drawn = []
    for example in examples:
        try:
            thumbnail = Image.fromarray(segmenter.read(example.read()))
        except (EmaSegError, OSError):
            continue
        thumbnail.thumbnail((_THUMBNAIL, _THUMBNAIL))
        drawn.append((example, thumbnail))
    return drawn

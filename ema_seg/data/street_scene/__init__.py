"""Renderer of a street scene and its label map, for :class:`ema_seg.data.StreetDataset`.

A scene is a small 3-D world, projected by a pinhole camera and painted from far to near, so that near objects
hide far ones. A labelled shape covers the same pixels in the image and in the label map; both are drawn at
twice the final size and reduced at the end.

The labels follow the annotation policy of Cityscapes (https://www.cityscapes-dataset.com): a fence and a
bicycle wheel include their holes, a trunk is vegetation, a kerb is sidewalk, a litter bin is the void id
`static`.
"""

import cv2
import numpy as np
from numpy.typing import NDArray

from ema_seg.data.street_scene.placement import cast_shadows, draw_thing, place_objects
from ema_seg.data.street_scene.stage import (
    PAINT,
    SUPERSAMPLING,
    Canvas,
    LabelId,
    Scene,
    sample_camera,
    sample_layout,
    sample_light,
)
from ema_seg.data.street_scene.surroundings import (
    draw_ground,
    draw_plot,
    draw_sky,
    draw_skyline,
    light_ground,
    plan_plots,
)

__all__ = ["LabelId", "render_scene"]


def _draw_bonnet(scene: Scene) -> None:
    """Draw the bonnet of the camera's car along the bottom edge."""
    height, width = scene.canvas.height, scene.canvas.width
    columns = np.linspace(-0.05, 1.05, 24)
    rise = scene.rng.uniform(0.03, 0.08) * (1 - np.abs(2 * columns - 1) ** 3)
    edge = np.stack([columns * width, height * (1 - rise)], 1)
    outline = np.concatenate([edge, [[1.1 * width, 1.1 * height], [-0.1 * width, 1.1 * height]]])
    paint = scene.pick(PAINT) * scene.light.brightness((0, 1, 0)) * 0.7
    scene.canvas.polygon(outline, paint, LabelId.EGO_VEHICLE)
    scene.canvas.line(edge + np.array([0, 3]), 2, np.clip(paint * 1.15, 0, 1))


def _develop(scene: Scene) -> NDArray[np.uint8]:
    """Return the photograph, uint8 RGB at final size, with exposure, white balance, contrast, blur and noise."""
    rng, canvas = scene.rng, scene.canvas
    size = (canvas.width // SUPERSAMPLING, canvas.height // SUPERSAMPLING)
    image = cv2.resize(canvas.image, size, interpolation=cv2.INTER_AREA)
    image *= np.exp(rng.normal(0, 0.13)) * (1 + rng.normal(0, 0.03, 3)).astype(np.float32)
    np.clip(image, 0, 1, out=image)
    image = image ** np.float32(np.exp(rng.normal(0, 0.12)))
    image = cv2.GaussianBlur(image, (3, 3), rng.uniform(0.2, 0.55))
    grain = rng.uniform(0.004, 0.013) * (1.8 if scene.light.name == "night" else 1)
    image = image + np.float32(grain) * rng.standard_normal(image.shape, dtype=np.float32)
    return np.round(np.clip(image, 0, 1) * 255).astype(np.uint8)


def render_scene(rng: np.random.Generator, height: int, width: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Draw a scene.

    Args:
        rng: The only source of randomness; the same generator state gives the same scene.
        height: Rows of the image in pixels.
        width: Columns of the image in pixels.

    Returns:
        The RGB image (uint8, height x width x 3) and its Cityscapes label ids (uint8, height x width).
    """
    rows, columns = height * SUPERSAMPLING, width * SUPERSAMPLING
    scene = Scene(rng, sample_camera(rng, rows, columns), sample_light(rng), Canvas(rows, columns), sample_layout(rng))
    plots, things = plan_plots(scene), place_objects(scene)
    draw_sky(scene)
    draw_ground(scene)
    cast_shadows(scene, plots, things)
    light_ground(scene)
    draw_skyline(scene)
    for plot in plots:
        draw_plot(scene, plot)
    for thing in things:
        draw_thing(scene, thing)
    if scene.chance(0.6):
        _draw_bonnet(scene)
    labels = scene.canvas.reduced_labels()
    labels[[0, -1]] = labels[:, [0, -1]] = LabelId.OUT_OF_ROI
    return _develop(scene), labels

"""Flat figures on the street: street furniture, people, bicycles."""

from collections.abc import Sequence
from functools import partial
from typing import Literal

import numpy as np

from ema_seg.data.street_scene.stage import BLACK, PAINT, Color, LabelId, Points, Scene, rgb

__all__ = [
    "draw_bicycle",
    "draw_bin",
    "draw_bollard",
    "draw_cyclist",
    "draw_lamp",
    "draw_person",
    "draw_sign",
    "draw_traffic_light",
]

METAL = [rgb(0.45, 0.46, 0.47), rgb(0.25, 0.27, 0.27), rgb(0.6, 0.6, 0.6), rgb(0.3, 0.36, 0.32)]
CLOTHES = [
    rgb(0.12, 0.13, 0.16), rgb(0.2, 0.25, 0.42), rgb(0.6, 0.15, 0.15), rgb(0.75, 0.73, 0.68),
    rgb(0.35, 0.33, 0.3), rgb(0.25, 0.4, 0.28), rgb(0.7, 0.55, 0.2), rgb(0.5, 0.5, 0.55),
]  # fmt: skip
SPORTSWEAR = [rgb(0.85, 0.85, 0.15), rgb(0.9, 0.45, 0.1), rgb(0.2, 0.7, 0.75), rgb(0.8, 0.12, 0.15)]
SKIN = [rgb(0.85, 0.66, 0.54), rgb(0.6, 0.43, 0.32), rgb(0.38, 0.26, 0.2)]


Outline = Sequence[Sequence[float]] | Points  # N x 2


class Figure:
    """Flat figure that faces the camera: coordinates in metres around its foot, x right and y up."""

    def __init__(
        self, scene: Scene, x: float, z: float, label: LabelId, mirrored: bool = False, size: float = 1.0
    ) -> None:
        self.label, self._canvas, self._shade = label, scene.canvas, partial(scene.shade, x=x, z=z)
        self._foot = scene.camera.project([[x, 0, z]])
        self._metre = scene.camera.pixels(size, z)
        self._scale = np.array([-self._metre if mirrored else self._metre, -self._metre])

    def _pixels(self, points: Outline) -> Points:
        return self._foot + np.asarray(points, dtype=np.float64) * self._scale

    def polygon(self, points: Outline, color: Color) -> None:
        """Fill a polygon."""
        self._canvas.polygon(self._pixels(points), self._shade(color), self.label)

    def line(self, points: Outline, width: float, color: Color, label: LabelId | None = None) -> None:
        """Draw a polyline, its width in metres."""
        self._canvas.line(self._pixels(points), width * self._metre, self._shade(color), label or self.label)

    def disc(self, centre: Sequence[float], radius: float, color: Color | None, shines: bool = False) -> None:
        """Fill a circle, radius in metres, shaded or self-luminous; without a colour, fill only its label."""
        lit = None if color is None else color if shines else self._shade(color)
        colors = None if lit is None else lit[None]
        self._canvas.discs(self._pixels([centre]), np.array([radius * self._metre]), colors, self.label)


def draw_lamp(scene: Scene, x: float, z: float) -> None:
    """Draw a street lamp with an arm over the road."""
    height, metal = scene.rng.uniform(5, 8), scene.pick(METAL)
    figure = Figure(scene, x, z, LabelId.POLE, mirrored=x > 0)
    figure.line([[0, 0], [0, height]], scene.rng.uniform(0.12, 0.18), metal)
    figure.line([[0, height], [1.4, height + 0.3]], 0.1, metal)
    if scene.light.is_dark:
        figure.disc([1.5, height + 0.25], 0.22, rgb(1, 0.9, 0.65), shines=True)
    else:
        figure.line([[1.2, height + 0.25], [1.8, height + 0.3]], 0.2, metal * 0.8)


def draw_bollard(scene: Scene, x: float, z: float) -> None:
    """Draw a short post that keeps cars off the sidewalk."""
    figure, metal = Figure(scene, x, z, LabelId.POLE), scene.pick(METAL)
    figure.line([[0, 0], [0, 1.0]], 0.16, metal)
    figure.line([[0, 0.8], [0, 0.9]], 0.16, rgb(0.85, 0.85, 0.85))


def draw_traffic_light(scene: Scene, x: float, z: float) -> None:
    """Draw a pole with a case of three lamps, one of them lit."""
    height, metal = scene.rng.uniform(2.4, 3.4), scene.pick(METAL)
    figure = Figure(scene, x, z, LabelId.TRAFFIC_LIGHT)
    figure.line([[0, 0], [0, height + 0.2]], 0.14, metal, LabelId.POLE)
    case = scene.pick([BLACK, rgb(0.12, 0.2, 0.14), rgb(0.25, 0.25, 0.25)], 0.02)
    corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]])
    middle = np.array([0, height + 0.42])
    figure.polygon(middle + corners * (0.3, 0.64), rgb(0.85, 0.85, 0.82))
    figure.polygon(middle + corners * (0.24, 0.58), case)
    lit = scene.rng.integers(3)
    for i, color in enumerate((rgb(0.2, 0.95, 0.5), rgb(1, 0.75, 0.2), rgb(1, 0.22, 0.15))):
        centre = [0, height + 0.06 + 0.36 * i]
        if i == lit:
            figure.disc(centre, 0.14, color, shines=True)
        else:
            figure.disc(centre, 0.14, color * 0.35)


SignShape = Literal["circle", "triangle", "square", "octagon", "board"]
SIGN_SHAPES: tuple[SignShape, ...] = ("circle", "triangle", "square", "octagon", "board")


def _sign_outline(shape: SignShape, size: float) -> Points:
    if shape == "board":
        return np.array([[-1.2, -0.6], [1.2, -0.6], [1.2, 0.6], [-1.2, 0.6]]) * size
    corners, turn = {"circle": (20, 0.0), "triangle": (3, 0.5), "square": (4, 0.25), "octagon": (8, 0.125)}[shape]
    angle = (np.arange(corners) / corners + turn / corners * (2 if shape != "triangle" else 1.5)) * 2 * np.pi
    return np.stack([np.cos(angle), np.sin(angle)], 1) * size


def draw_sign(scene: Scene, x: float, z: float) -> None:
    """Draw a traffic sign of any shape on its pole."""
    rng = scene.rng
    shape = SIGN_SHAPES[rng.integers(len(SIGN_SHAPES))]
    size, height = rng.uniform(0.42, 0.6), rng.uniform(2.0, 2.8)
    red, blue, white = rgb(0.75, 0.1, 0.1), rgb(0.12, 0.3, 0.68), rgb(0.9, 0.9, 0.9)
    rim, face, symbol = {
        "circle": (red, white, BLACK) if scene.chance(0.6) else (white, blue, white),
        "triangle": (red, white, BLACK),
        "square": (white, blue, white) if scene.chance(0.6) else (white, rgb(0.9, 0.75, 0.15), white),
        "octagon": (white, red, white),
        "board": (white, blue, white) if scene.chance(0.5) else (white, rgb(0.1, 0.45, 0.25), white),
    }[shape]
    figure = Figure(scene, x, z, LabelId.TRAFFIC_SIGN)
    figure.line([[0, 0], [0, height + size]], 0.11, scene.pick(METAL), LabelId.POLE)
    outline, centre = _sign_outline(shape, size), np.array([0, height + size / 2])
    figure.polygon(outline + centre, rim)
    figure.polygon(outline * 0.76 + centre, face)
    for _ in range(rng.integers(1, 3)):
        ends = rng.uniform(-0.4, 0.4, (2, 2)) * size
        figure.line(ends + centre, size * 0.22, symbol)


def draw_bin(scene: Scene, x: float, z: float) -> None:
    """Draw a litter bin."""
    color, figure = (
        scene.pick([*METAL, rgb(0.2, 0.4, 0.25), rgb(0.75, 0.45, 0.1)]),
        Figure(scene, x, z, LabelId.STATIC),
    )
    figure.polygon([[-0.3, 0], [0.3, 0], [0.35, 0.95], [-0.35, 0.95]], color)
    figure.polygon([[-0.38, 0.9], [0.38, 0.9], [0.33, 1.05], [-0.33, 1.05]], color * 0.7)


def _draw_head(figure: Figure, centre: tuple[float, float], hair: Color, skin: Color) -> None:
    figure.disc((centre[0], centre[1] + 0.03), 0.125, hair)
    figure.disc((centre[0] + 0.02, centre[1] - 0.03), 0.1, skin)


def draw_person(scene: Scene, x: float, z: float) -> None:
    """Draw a person who walks or stands."""
    rng, size = scene.rng, scene.rng.uniform(0.72, 1.06)
    figure = Figure(scene, x, z, LabelId.PERSON, scene.chance(0.5), size)
    coat, trousers, skin, hair = (
        scene.pick(CLOTHES),
        scene.pick(CLOTHES),
        scene.pick(SKIN),
        scene.pick(CLOTHES) * 0.5,
    )
    stride, lean, girth = rng.uniform(-0.3, 0.3), rng.normal(0, 0.03), rng.uniform(0.19, 0.25)
    for swing, tone in ((-stride, 0.8), (stride, 1.0)):
        knee = [swing * 0.5 + 0.04, 0.48]
        figure.line([[0, 0.92], knee, [swing, 0.05]], 0.16, trousers * tone)
        figure.line([[swing - 0.03, 0.04], [swing + 0.12, 0.04]], 0.08, BLACK)
    figure.line([[0, 1.38], [-stride * 0.7, 1.12], [-stride * 0.9, 0.88]], 0.1, coat * 0.75)
    hem = rng.choice([0.88, 0.6])
    shoulders = [[-girth + lean, 1.42], [girth + lean, 1.42]]
    figure.polygon([[-girth * 0.9, hem], [girth * 0.9, hem], *shoulders[::-1], [lean, 1.5]], coat)
    figure.line([[girth * 0.6, 1.38], [stride * 0.7 + 0.05, 1.12], [stride * 0.9, 0.88]], 0.1, coat * 0.88)
    if scene.chance(0.3):
        figure.polygon(
            [[-girth - 0.15, 1.0], [-girth, 1.0], [-girth, 1.42], [-girth - 0.15, 1.38]], scene.pick(CLOTHES)
        )
    _draw_head(figure, (lean * 2, 1.63), hair, skin)


def draw_bicycle(
    scene: Scene, x: float, z: float, seen_from_behind: bool | None = None, mirrored: bool = False
) -> None:
    """Draw a bicycle from the side or from behind; its label includes the holes of its wheels."""
    figure = Figure(scene, x, z, LabelId.BICYCLE, mirrored)
    frame = scene.pick(PAINT)
    if seen_from_behind if seen_from_behind is not None else scene.chance(0.25):
        figure.line([[0, 0], [0, 0.68]], 0.09, BLACK)
        figure.line([[0, 0.6], [0, 0.95]], 0.08, frame)
        figure.line([[-0.28, 1.0], [0.28, 1.0]], 0.06, BLACK)
        return
    turn = np.linspace(0, 2 * np.pi, 20)
    for hub in (-0.52, 0.52):
        figure.disc([hub, 0.34], 0.36, None)
        figure.line(np.stack([hub + 0.34 * np.cos(turn), 0.34 + 0.34 * np.sin(turn)], 1), 0.06, BLACK)
    hub_rear, crank, saddle, head, hub_front = (
        [-0.52, 0.34],
        [-0.05, 0.3],
        [-0.2, 0.85],
        [0.36, 0.85],
        [0.52, 0.34],
    )
    figure.line([hub_rear, crank, head, saddle, crank], 0.06, frame)
    figure.line([hub_rear, saddle], 0.05, frame)
    figure.line([hub_front, head, [0.33, 1.02], [0.48, 1.05]], 0.06, frame)
    figure.line([[-0.32, 0.92], [-0.08, 0.92]], 0.09, BLACK)


def draw_cyclist(scene: Scene, x: float, z: float) -> None:
    """Draw a bicycle with its rider, from the side or from behind."""
    from_behind, mirrored = scene.chance(0.5), scene.chance(0.5)
    draw_bicycle(scene, x, z, from_behind, mirrored)
    figure = Figure(scene, x, z, LabelId.RIDER, mirrored)
    coat, trousers = scene.pick(SPORTSWEAR), scene.pick(CLOTHES)
    skin, helmet = scene.pick(SKIN), scene.pick(SPORTSWEAR)
    if from_behind:
        for side in (-1, 1):
            figure.line([[0.1 * side, 0.95], [0.17 * side, 0.3 + 0.1 * side]], 0.15, trousers)
            figure.line([[0.22 * side, 1.42], [0.32 * side, 1.02]], 0.1, coat * 0.85)
        figure.polygon([[-0.2, 0.85], [0.2, 0.85], [0.25, 1.48], [-0.25, 1.48]], coat)
        _draw_head(figure, (0, 1.66), helmet, helmet * 0.7)
        return
    figure.line([[-0.2, 0.95], [0.18, 0.62], [-0.02, 0.2]], 0.15, trousers * 0.8)
    figure.line([[-0.2, 0.95], [0.22, 0.75], [0.06, 0.32]], 0.16, trousers)
    figure.polygon([[-0.34, 0.9], [-0.02, 0.9], [0.26, 1.42], [0.04, 1.52]], coat)
    figure.line([[0.15, 1.42], [0.25, 1.15], [0.45, 1.08]], 0.1, coat * 0.85)
    _draw_head(figure, (0.25, 1.66), helmet, skin)

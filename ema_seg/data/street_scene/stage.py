"""Shared objects of the drawing functions: the camera, the light, the canvas, and the plan of the street.

The world is in metres: x right, y up, z forward; the camera is at x = z = 0.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Literal

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

Color = NDArray[np.float64]  # RGB, 1.0 = white
Points = NDArray[np.float64]
Picture = NDArray[np.float32]
Normal = Sequence[float]
Rng = np.random.Generator

SUPERSAMPLING = 2
NEAR = 1.2  # metres: nothing is drawn nearer than this
FAR = 110.0  # metres: where the rows of houses end
SUBPIXEL_BITS = 4  # fixed-point bits of the coordinates passed to OpenCV


class LabelId(IntEnum):
    """Cityscapes label ids (not train ids) that occur in a scene."""

    EGO_VEHICLE = 1
    OUT_OF_ROI = 3
    STATIC = 4
    ROAD = 7
    SIDEWALK = 8
    BUILDING = 11
    WALL = 12
    FENCE = 13
    POLE = 17
    TRAFFIC_LIGHT = 19
    TRAFFIC_SIGN = 20
    VEGETATION = 21
    TERRAIN = 22
    SKY = 23
    PERSON = 24
    RIDER = 25
    CAR = 26
    BUS = 28
    BICYCLE = 33


@dataclass(frozen=True)
class Camera:
    """Pinhole camera that looks along z, level with the ground."""

    focal: float  # pixels
    centre: float  # column of the vanishing point
    horizon: float  # row of the vanishing point
    height: float  # metres above the ground

    def project(self, points: ArrayLike) -> Points:
        """Map world points (N x 3, metres) to pixel coordinates (N x 2: column, row)."""
        world = np.asarray(points, dtype=np.float64)
        scale = self.focal / np.maximum(world[:, 2:], NEAR)
        return (self.centre, self.horizon) + (world[:, :2] - (0, self.height)) * (1, -1) * scale

    def pixels(self, metres: float, z: float) -> float:
        """Return the number of pixels that a length across the line of sight covers at depth z."""
        return metres * self.focal / max(z, NEAR)


@dataclass(frozen=True)
class Light:
    """Light of a time of day: direction, colours, and haze over distance."""

    name: str
    towards_sun: NDArray[np.float64]  # unit vector
    ambient: float
    direct: float
    color: Color
    zenith: Color
    horizon: Color
    haze: float  # extinction per metre

    @property
    def is_dark(self) -> bool:
        """True if windows and lamps are lit."""
        return self.name in ("dusk", "night")

    def brightness(self, normal: Normal, shadow: float = 0.0) -> float:
        """Return the reflected light of a matt surface; `shadow` is the hidden share of the sun, 0 to 1."""
        x, y, z = self.towards_sun
        facing = max(0.0, normal[0] * x + normal[1] * y + normal[2] * z)
        return self.ambient + self.direct * facing * (1.0 - shadow)

    def illuminate(self, picture: Picture, brightness: float | Picture, depth: Picture) -> None:
        """Apply light and haze to the colours of a picture (H x W x 3), in place.

        Args:
            picture: Colours of the surface.
            brightness: Reflected light, broadcast against H x W.
            depth: Distance in metres, broadcast against H x W.
        """
        clear = np.exp(-np.float32(self.haze) * depth)[..., None]
        picture *= np.asarray(brightness, dtype=np.float32)[..., None] * clear * self.color.astype(np.float32)
        picture += (1 - clear) * self.horizon.astype(np.float32)


class Canvas:
    """Image and its labels, painted together.

    `paint` holds, per pixel, order * 64 + label id of its last stroke, so that the nearer object wins a tie when
    the labels are reduced.
    """

    def __init__(self, height: int, width: int) -> None:
        self.image = np.zeros((height, width, 3), np.float32)
        self.paint = np.zeros((height, width), np.int32)
        self._strokes = 0

    @property
    def height(self) -> int:
        """Rows, supersampled."""
        return self.image.shape[0]

    @property
    def width(self) -> int:
        """Columns, supersampled."""
        return self.image.shape[1]

    @property
    def labels(self) -> NDArray[np.int32]:
        """Label ids, supersampled."""
        return self.paint % 64

    def _stamp(self, label: LabelId) -> int:
        self._strokes += 1
        return self._strokes * 64 + int(label)

    def polygon(self, corners: Points, color: Color | None, label: LabelId | None = None) -> None:
        """Fill a polygon (N x 2 pixels) in the image, the labels or both; None leaves one unchanged."""
        fixed = fixed_point(corners)
        if color is not None:
            cv2.fillPoly(self.image, [fixed], color.tolist(), cv2.LINE_8, SUBPIXEL_BITS)
        if label is not None:
            cv2.fillPoly(self.paint, [fixed], self._stamp(label), cv2.LINE_8, SUBPIXEL_BITS)

    def line(self, points: Points, width: float, color: Color, label: LabelId | None = None) -> None:
        """Draw a polyline (N x 2 pixels); its width is at least one pixel."""
        fixed, thickness = fixed_point(points), max(1, round(width))
        cv2.polylines(self.image, [fixed], False, color.tolist(), thickness, cv2.LINE_8, SUBPIXEL_BITS)
        if label is not None:
            stamp = self._stamp(label)
            cv2.polylines(self.paint, [fixed], False, stamp, thickness, cv2.LINE_8, SUBPIXEL_BITS)

    def lines(self, starts: Points, ends: Points, widths: Points, colors: NDArray[np.float64]) -> None:
        """Draw N separate lines (N x 2 pixels each end) in the image only."""
        fixed = fixed_point(np.stack([starts, ends], 1))
        thickness = np.maximum(1, np.rint(widths)).astype(int).tolist()
        for ends_of_line, width, color in zip(fixed, thickness, colors.tolist(), strict=True):
            cv2.polylines(self.image, [ends_of_line], False, color, width, cv2.LINE_8, SUBPIXEL_BITS)

    def discs(self, centres: Points, radii: Points, colors: NDArray[np.float64] | None, label: LabelId) -> None:
        """Fill N circles (N x 2 centres and N radii, pixels) in this order."""
        stamp, fixed = self._stamp(label), fixed_point(centres).tolist()
        fixed_radii = np.maximum(1, np.rint(radii * 2**SUBPIXEL_BITS)).astype(int).tolist()
        for at, radius in zip(fixed, fixed_radii, strict=True):
            cv2.circle(self.paint, at, radius, stamp, -1, cv2.LINE_8, SUBPIXEL_BITS)
        for at, radius, color in zip(fixed, fixed_radii, [] if colors is None else colors.tolist(), strict=False):
            cv2.circle(self.image, at, radius, color, -1, cv2.LINE_8, SUBPIXEL_BITS)

    def texture(self, picture: NDArray[np.float32], corners: Points, label: LabelId) -> None:
        """Paste a picture in perspective; its corners are clockwise from the top left."""
        left, top = np.maximum(np.floor(corners.min(0)).astype(int), 0)
        right, bottom = np.minimum(np.ceil(corners.max(0)).astype(int) + 1, (self.width, self.height))
        if left >= right or top >= bottom:
            return
        rows, columns = picture.shape[:2]
        source = np.array([[0, 0], [columns, 0], [columns, rows], [0, rows]], np.float32)
        target = (corners - (left, top)).astype(np.float32)
        size = (int(right - left), int(bottom - top))
        warp = cv2.getPerspectiveTransform(source, target)
        warped = cv2.warpPerspective(picture, warp, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        mask = np.zeros(size[::-1], np.uint8)
        cv2.fillPoly(mask, [fixed_point(target)], 1, cv2.LINE_8, SUBPIXEL_BITS)
        area = (slice(top, bottom), slice(left, right))
        cv2.copyTo(warped, mask, self.image[area])
        self.paint[area][mask > 0] = self._stamp(label)

    def reduced_labels(self) -> NDArray[np.uint8]:
        """Return label ids at final size: the most frequent of each block, in a tie the last painted.

        A line one supersampled pixel wide covers half of each block it crosses, so thin structures stay connected.
        """
        step = SUPERSAMPLING
        blocks = np.stack([self.paint[i::step, j::step] for i in range(step) for j in range(step)])
        ids = (blocks % 64).astype(np.uint8)
        votes = (ids[:, None] == ids).sum(1, dtype=np.int32)
        winner = (votes * 2**27 + blocks).argmax(0)
        return np.take_along_axis(ids, winner[None], 0)[0]


def fixed_point(points: NDArray[np.floating]) -> NDArray[np.int32]:
    """Convert pixel coordinates to OpenCV's fixed point, with `SUBPIXEL_BITS` of fraction."""
    return np.rint(points * 2**SUBPIXEL_BITS).astype(np.int32)


def rgb(red: float, green: float, blue: float) -> Color:
    """Return a colour, 1.0 = full."""
    return np.array([red, green, blue])


PAINT = [
    rgb(0.85, 0.85, 0.85), rgb(0.1, 0.1, 0.11), rgb(0.55, 0.57, 0.6), rgb(0.6, 0.12, 0.1),
    rgb(0.14, 0.24, 0.5), rgb(0.7, 0.62, 0.48), rgb(0.2, 0.32, 0.26), rgb(0.3, 0.3, 0.33),
]  # fmt: skip
BLACK = rgb(0.06, 0.06, 0.07)


def value_noise(rng: Rng, shape: tuple[int, int], cells: tuple[float, ...]) -> NDArray[np.float32]:
    """Return value noise from -1 to 1: an octave per cell size in pixels, each half as strong as the last."""
    total = np.zeros(shape, np.float32)
    for octave, cell in enumerate(cells):
        grid = rng.uniform(-1, 1, (int(shape[0] / cell) + 2, int(shape[1] / cell) + 2)).astype(np.float32)
        total += 0.5**octave * cv2.resize(grid, shape[::-1], interpolation=cv2.INTER_LINEAR)
    return total / (2 - 0.5 ** (len(cells) - 1))


Side = Literal[-1, 1]
SIDES: tuple[Side, Side] = (-1, 1)


@dataclass(frozen=True)
class Layout:
    """Cross-section of the street, per side in metres from the camera's line, and its junction."""

    kerb: dict[Side, float]
    verge: dict[Side, float]  # width of the grass strip behind the kerb, 0 for none
    front: dict[Side, float]  # position of houses, walls and fences
    junction: tuple[float, float] | None  # near and far depth of a crossing street
    crossing: float | None  # depth of a zebra crossing


@dataclass
class Scene:
    """Shared state of the drawing functions."""

    rng: Rng
    camera: Camera
    light: Light
    canvas: Canvas
    layout: Layout
    shadow: Picture = field(init=False)  # hidden share of the sun, per ground pixel
    plaster: Picture = field(init=False)  # roughness of walls, a tile that `grain` crops

    def __post_init__(self) -> None:
        self.shadow = np.zeros(self.canvas.paint.shape, np.float32)
        self.plaster = 1 + np.float32(0.13) * value_noise(self.rng, (512, 512), (40, 12, 2))

    def grain(self, shape: tuple[int, int]) -> Picture:
        """Return a random crop of the wall texture, at most 512 x 512."""
        row, column = (int(self.rng.integers(0, 512 - length + 1)) for length in shape)
        return self.plaster[row : row + shape[0], column : column + shape[1]]

    def chance(self, probability: float) -> bool:
        """Return True with this probability."""
        return bool(self.rng.random() < probability)

    def pick(self, colors: list[Color], spread: float = 0.06) -> Color:
        """Return one of the colours, varied a little."""
        return np.clip(colors[self.rng.integers(len(colors))] + self.rng.normal(0, spread, 3), 0.02, 1)

    def shadow_at(self, x: float, z: float) -> float:
        """Return the hidden share of the sun at a point on the ground."""
        scale = self.camera.focal / max(z, NEAR)
        row = int(min(self.camera.horizon + self.camera.height * scale, self.canvas.height - 1))
        column = int(min(max(self.camera.centre + x * scale, 0), self.canvas.width - 1))
        return float(self.shadow[row, column])

    def shade(self, color: Color, x: float, z: float, normal: Normal = (0.0, 0.3, -0.6)) -> Color:
        """Return the colour of a surface at (x, z) as the camera sees it."""
        clear = math.exp(-self.light.haze * z)
        brightness = self.light.brightness(normal, self.shadow_at(x, z)) * clear
        return color * (self.light.color * brightness) + self.light.horizon * (1 - clear)


def sample_camera(rng: Rng, height: int, width: int) -> Camera:
    """Sample a camera for a canvas of this many rows and columns."""
    return Camera(
        focal=rng.uniform(0.95, 1.1) * width,
        centre=rng.uniform(0.36, 0.64) * width,
        horizon=rng.uniform(0.38, 0.48) * height,
        height=rng.uniform(1.35, 1.75),
    )


def sample_light(rng: Rng) -> Light:
    """Sample the light: mostly day, sometimes dusk or night."""
    name = str(rng.choice(["sunny", "overcast", "dusk", "night"], p=[0.52, 0.32, 0.1, 0.06]))
    elevation = np.deg2rad(rng.uniform(8, 18) if name == "dusk" else rng.uniform(25, 60))
    azimuth = rng.uniform(0, 2 * np.pi)
    sun = np.array([np.cos(elevation) * np.cos(azimuth), np.sin(elevation), np.cos(elevation) * np.sin(azimuth)])
    ambient, direct, color, zenith, horizon = {
        "sunny": (0.52, 0.62, rgb(1.05, 1.0, 0.92), rgb(0.32, 0.52, 0.82), rgb(0.74, 0.83, 0.92)),
        "overcast": (0.78, 0.1, rgb(0.97, 1.0, 1.03), rgb(0.66, 0.7, 0.74), rgb(0.8, 0.82, 0.84)),
        "dusk": (0.4, 0.42, rgb(1.12, 0.9, 0.76), rgb(0.36, 0.4, 0.62), rgb(0.9, 0.66, 0.5)),
        "night": (0.42, 0.0, rgb(0.95, 0.95, 1.1), rgb(0.07, 0.09, 0.16), rgb(0.2, 0.2, 0.25)),
    }[name]
    tint = rng.normal(0, 0.03, 3)
    return Light(name, sun, ambient, direct, color, zenith + tint, horizon + tint, rng.uniform(0.001, 0.006))


def sample_layout(rng: Rng) -> Layout:
    """Sample a cross-section; the left half of the road, for oncoming traffic, is usually the wider one."""
    kerb: dict[Side, float] = {-1: rng.uniform(5, 8.5), 1: rng.uniform(3.2, 5.5)}
    verge: dict[Side, float] = {
        -1: float(rng.choice([0, rng.uniform(1, 3)])),
        1: float(rng.choice([0, rng.uniform(1, 3)])),
    }
    front: dict[Side, float] = {
        -1: kerb[-1] + verge[-1] + rng.uniform(3, 6),
        1: kerb[1] + verge[1] + rng.uniform(3, 6),
    }
    start = rng.uniform(14, 45)
    junction = (start, start + rng.uniform(7, 11)) if rng.random() < 0.5 else None
    has_crossing = rng.random() < (0.7 if junction else 0.25)
    return Layout(kerb, verge, front, junction, start - rng.uniform(4, 5) if has_crossing else None)

"""Surroundings of the street: sky, ground, and the houses, walls and gardens on both sides."""

import math
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
from numpy.typing import ArrayLike

from ema_seg.data.street_scene.plants import draw_fence, draw_foliage, draw_tree
from ema_seg.data.street_scene.stage import (
    FAR,
    NEAR,
    SIDES,
    SUPERSAMPLING,
    Color,
    LabelId,
    Picture,
    Points,
    Scene,
    Side,
    rgb,
    value_noise,
)

__all__ = ["Plot", "draw_ground", "draw_plot", "draw_sky", "draw_skyline", "light_ground", "plan_plots"]


def draw_sky(scene: Scene) -> None:
    """Draw a gradient with clouds over the whole canvas."""
    canvas, light, rng = scene.canvas, scene.light, scene.rng
    size = (canvas.height // SUPERSAMPLING, canvas.width // SUPERSAMPLING)
    up = np.clip(1 - np.arange(size[0], dtype=np.float32) * SUPERSAMPLING / scene.camera.horizon, 0, 1)
    blue = (light.horizon + (light.zenith - light.horizon) * (up**0.7)[:, None]).astype(np.float32)[:, None]
    cover = {"sunny": 0.1, "overcast": -0.5, "dusk": 0.0, "night": 0.3}[light.name] + rng.normal(0, 0.15)
    clouds = value_noise(rng, size, (size[1] / 4, size[1] / 9, size[1] / 20, size[1] / 45))[..., None]
    white = np.clip(light.horizon * 1.12 + 0.03, 0, 1).astype(np.float32) + np.float32(0.07) * clouds
    sky = blue + np.clip((clouds - np.float32(cover)) * 2.5, 0, 0.85) * (white - blue)
    cv2.resize(sky, (canvas.width, canvas.height), dst=canvas.image)
    canvas.paint[:] = int(LabelId.SKY)


def _ground(scene: Scene, x: tuple[float, float], z: tuple[float, float]) -> Points:
    """Project a rectangle on the ground to N x 2 pixels."""
    return scene.camera.project([[x[0], 0, z[0]], [x[1], 0, z[0]], [x[1], 0, z[1]], [x[0], 0, z[1]]])


# Strength of the ground noise, by label.
GROUND_TEXTURE = {LabelId.ROAD: 0.16, LabelId.SIDEWALK: 0.14, LabelId.TERRAIN: 0.5}
HORIZON_DEPTH = 2000.0


def draw_ground(scene: Scene) -> None:
    """Draw the flat ground without light: road, sidewalks, grass and road markings."""
    rng, layout, canvas = scene.rng, scene.layout, scene.canvas
    grey = rng.uniform(0.24, 0.48)
    asphalt = grey + rng.normal(0, 0.015, 3)
    paving = scene.pick([rgb(0.6, 0.58, 0.55), rgb(0.5, 0.5, 0.5), rgb(0.58, 0.48, 0.42)], 0.04)
    grass = scene.pick([rgb(0.3, 0.42, 0.16), rgb(0.42, 0.45, 0.2), rgb(0.48, 0.42, 0.28)], 0.04)
    canvas.polygon(_ground(scene, (-900, 900), (NEAR, HORIZON_DEPTH)), grass, LabelId.TERRAIN)
    kerb, front, verge = layout.kerb, layout.front, layout.verge
    everywhere = (NEAR, HORIZON_DEPTH)
    pavement = (-front[-1], front[1])
    canvas.polygon(_ground(scene, pavement, everywhere), paving, LabelId.SIDEWALK)
    _draw_paving_joints(scene, paving)
    for side in SIDES:
        inner = side * kerb[side]
        if verge[side]:
            strip = (inner, side * (kerb[side] + verge[side]))
            canvas.polygon(_ground(scene, strip, everywhere), grass, LabelId.TERRAIN)
        kerbstone = np.clip(paving * 1.2, 0, 1)
        canvas.polygon(_ground(scene, (inner, inner + side * 0.2), everywhere), kerbstone, LabelId.SIDEWALK)
    canvas.polygon(_ground(scene, (-kerb[-1], kerb[1]), everywhere), asphalt, LabelId.ROAD)
    if layout.junction:
        canvas.polygon(_ground(scene, (-300, 300), layout.junction), asphalt, LabelId.ROAD)
    _draw_road_wear(scene, asphalt)
    _draw_markings(scene)


def _draw_paving_joints(scene: Scene, paving: Color) -> None:
    joint, size = paving * 0.8, scene.rng.uniform(0.6, 1.2)
    for side in SIDES:
        near, far = side * scene.layout.kerb[side], side * scene.layout.front[side]
        for z in np.arange(3, 18, size):
            scene.canvas.line(scene.camera.project([[near, 0, z], [far, 0, z]]), 1, joint)
        for x in np.arange(min(near, far), max(near, far), size):
            scene.canvas.line(scene.camera.project([[x, 0, NEAR], [x, 0, 25]]), 1, joint)


def _draw_road_wear(scene: Scene, asphalt: Color) -> None:
    """Draw repairs, manhole covers and a tar seam."""
    rng, kerb = scene.rng, scene.layout.kerb
    for _ in range(rng.integers(2, 7)):
        x, z = rng.uniform(-kerb[-1] + 1.5, kerb[1] - 1.5), rng.uniform(4, 30)
        patch = _ground(scene, (x, x + rng.uniform(0.5, 1.5)), (z, z + rng.uniform(0.6, 6)))
        scene.canvas.polygon(patch, asphalt * rng.uniform(0.75, 1.2))
    turn = np.linspace(0, 2 * np.pi, 16)
    for _ in range(rng.integers(0, 4)):
        x, z = rng.uniform(-kerb[-1] + 1, kerb[1] - 1), rng.uniform(5, 25)
        rim = np.stack([x + 0.35 * np.cos(turn), 0 * turn, z + 0.35 * np.sin(turn)], 1)
        scene.canvas.polygon(scene.camera.project(rim), asphalt * 0.65)
    steps = np.arange(3, 40, 1.5)
    seam = np.stack([rng.uniform(-kerb[-1], kerb[1]) + rng.normal(0, 0.08, len(steps)), 0 * steps, steps], 1)
    scene.canvas.line(scene.camera.project(seam), 1, asphalt * 0.7)


def _draw_markings(scene: Scene) -> None:
    rng, layout = scene.rng, scene.layout
    white = scene.pick([rgb(0.85, 0.85, 0.82), rgb(0.7, 0.7, 0.68)], 0.03)
    left, right = -layout.kerb[-1], layout.kerb[1]
    start, stop = layout.junction or (FAR, FAR)
    stretches = [(NEAR, start - 5.5), (stop + 2, FAR)]
    dash, period = (3.0, rng.uniform(6, 9)) if scene.chance(0.75) else (1e3, 1e3)
    for z0, z1 in stretches:
        for z in np.arange(z0 - rng.uniform(0, 6), z1, period):
            if (a := max(z, z0)) < (b := min(z + dash, z1)):
                scene.canvas.polygon(_ground(scene, (-1.7, -1.55), (a, b)), white)
        if scene.chance(0.5) and z0 < z1:
            for x in (left + 0.25, right - 0.37):
                scene.canvas.polygon(_ground(scene, (x, x + 0.12), (z0, z1)), white)
    if layout.junction:
        scene.canvas.polygon(_ground(scene, (-1.5, right), (start - 1.2, start - 0.8)), white)
    if layout.crossing:
        for x in np.arange(left + 0.3, right - 0.5, 1.0):
            scene.canvas.polygon(_ground(scene, (x, x + 0.5), (layout.crossing, layout.crossing + 3)), white)


def light_ground(scene: Scene) -> None:
    """Add texture, light, shadows and haze to the flat ground."""
    camera, canvas, light = scene.camera, scene.canvas, scene.light
    top = int(camera.horizon) + 2
    rows = np.arange(top, canvas.height, dtype=np.float32)
    depth = (camera.focal * camera.height / (rows - np.float32(camera.horizon)))[:, None]
    across = (np.arange(canvas.width, dtype=np.float32) - camera.centre)[None] * depth / camera.focal
    tile = value_noise(scene.rng, (256, 256), (48, 12, 3, 1.5))
    along = np.broadcast_to(depth, across.shape)
    pixels_per_metre = 24
    grain = cv2.remap(
        tile,
        (across * pixels_per_metre % 255).astype(np.float32),
        (along * pixels_per_metre / 2 % 255).astype(np.float32),
        cv2.INTER_LINEAR,
    )
    strength = np.zeros(64, np.float32)
    for label, amount in GROUND_TEXTURE.items():
        strength[label] = amount
    texture = 1 + strength[canvas.labels[top:]] * grain / (1 + depth / 40)
    sun = np.float32(light.direct * light.towards_sun[1])
    light.illuminate(canvas.image[top:], texture * (light.ambient + sun * (1 - scene.shadow[top:])), depth)


# --- Both sides of the street ---------------------------------------------------------------------

PLASTER = [
    rgb(0.82, 0.74, 0.6), rgb(0.75, 0.72, 0.7), rgb(0.86, 0.84, 0.78), rgb(0.7, 0.56, 0.42),
    rgb(0.55, 0.6, 0.66), rgb(0.62, 0.64, 0.56), rgb(0.76, 0.6, 0.55), rgb(0.4, 0.4, 0.42),
]  # fmt: skip
BRICK = [rgb(0.55, 0.3, 0.23), rgb(0.62, 0.42, 0.32), rgb(0.45, 0.3, 0.26), rgb(0.66, 0.56, 0.45)]
CONCRETE = [rgb(0.6, 0.59, 0.56), rgb(0.5, 0.5, 0.48), rgb(0.68, 0.66, 0.62)]
STOREY = 3.1  # metres


PlotKind = Literal["house", "wall", "garden"]


@dataclass(frozen=True)
class Plot:
    """Stretch of one side of the street."""

    kind: PlotKind
    side: Side
    near: float  # depth where it begins
    far: float
    height: float  # of the house or wall, metres
    sheltered: bool  # whether a house in front, at least as tall, hides its gable


def plan_plots(scene: Scene) -> list[Plot]:
    """Fill both sides except the junction with plots, and return them from far to near."""
    rng, junction = scene.rng, scene.layout.junction or (FAR, FAR)
    plots: list[Plot] = []
    for side in SIDES:
        near = NEAR
        while near < FAR:
            far = near + rng.uniform(8, 22)
            if near < junction[0] < far or junction[0] <= near < junction[1]:
                far, following = junction[0], junction[1] + 1.5
            else:
                following = far
            kind: PlotKind = rng.choice(["house", "wall", "garden"], p=[0.46, 0.17, 0.37])
            height = rng.uniform(2, 6) * STOREY if kind == "house" else rng.uniform(1.8, 3.2)
            if far - near > 1:
                sheltered = kind == "house" and _ends_at_taller_house(plots, near, height)
                plots.append(Plot(kind, side, near, far, height, sheltered))
            near = following
    return sorted(plots, key=lambda plot: -plot.near)


def _ends_at_taller_house(plots: list[Plot], near: float, height: float) -> bool:
    return bool(plots) and plots[-1].kind == "house" and plots[-1].far == near and plots[-1].height >= height


def draw_skyline(scene: Scene) -> None:
    """Draw pale, far houses and trees at the end of the street."""
    rng, ground = scene.rng, scene.camera.horizon + 2
    x = -80.0
    while x < 80:
        z, step = rng.uniform(140, 220), rng.uniform(5, 16)
        if scene.chance(0.65):
            color = scene.shade(scene.pick(PLASTER) * 0.85, x, z)
            top = scene.camera.project([[x, rng.uniform(5, 20), z], [x + step, 0, z]])
            corners = np.array([top[0], [top[1, 0], top[0, 1]], [top[1, 0], ground], [top[0, 0], ground]])
            scene.canvas.polygon(corners, color, LabelId.BUILDING)
        else:
            draw_foliage(scene, x, z, base=0, radius=(step / 1.5, rng.uniform(3, 6)))
        x += step


def draw_plot(scene: Scene, plot: Plot) -> None:
    """Draw a plot with its house, wall or garden."""
    {"house": _draw_house, "wall": _draw_wall, "garden": _draw_garden}[plot.kind](scene, plot)


def _draw_house(scene: Scene, plot: Plot) -> None:
    rng, is_brick = scene.rng, scene.chance(0.35)
    color = scene.pick(BRICK if is_brick else PLASTER)
    inner = plot.side * scene.layout.front[plot.side]
    outer = inner + plot.side * rng.uniform(7, 12)
    if scene.chance(0.6):
        _draw_roof(scene, plot, inner, outer, color)
    if not plot.sheltered:
        gable = _facade(scene, abs(outer - inner), plot.height, plot.near, color, is_brick, scene.chance(0.5))
        _paste_upright(scene, gable, (inner, plot.near), (outer, plot.near), plot.height, LabelId.BUILDING)
    front = _facade(scene, plot.far - plot.near, plot.height, plot.near, color, is_brick, windows=True)
    _paste_upright(scene, front, (inner, plot.near), (inner, plot.far), plot.height, LabelId.BUILDING)


def _draw_roof(scene: Scene, plot: Plot, inner: float, outer: float, wall: Color) -> None:
    """Draw the slope towards the street and the gable towards the camera."""
    eaves, middle = plot.height, (inner + outer) / 2
    ridge = eaves + scene.rng.uniform(1.5, 4)
    slope = [
        [inner, eaves, plot.near],
        [inner, eaves, plot.far],
        [middle, ridge, plot.far],
        [middle, ridge, plot.near],
    ]
    gable = [[inner, eaves, plot.near], [outer, eaves, plot.near], [middle, ridge, plot.near]]
    tiles = scene.pick([rgb(0.5, 0.26, 0.18), rgb(0.3, 0.28, 0.3), rgb(0.42, 0.32, 0.26)])
    lit = scene.shade(tiles, inner, (plot.near + plot.far) / 2, (-0.6 * plot.side, 0.7, 0))
    scene.canvas.polygon(scene.camera.project(slope), lit, LabelId.BUILDING)
    scene.canvas.polygon(scene.camera.project(gable), scene.shade(wall, inner, plot.near), LabelId.BUILDING)


def _draw_wall(scene: Scene, plot: Plot) -> None:
    x = plot.side * scene.layout.front[plot.side]
    for _ in range(scene.rng.integers(0, 3)):
        draw_tree(scene, x + plot.side * scene.rng.uniform(2, 5), scene.rng.uniform(plot.near + 1, plot.far))
    color = scene.pick(CONCRETE, 0.03)
    picture = _facade(scene, plot.far - plot.near, plot.height, plot.near, color, is_brick=False, windows=False)
    rows = len(picture)
    picture[: max(1, rows // 12)] *= 1.15  # the coping
    picture[:, :: max(6, picture.shape[1] // 6)] *= 0.8  # panel joints
    _paste_upright(scene, picture, (x, plot.near), (x, plot.far), plot.height, LabelId.WALL)


def _draw_garden(scene: Scene, plot: Plot) -> None:
    rng, x = scene.rng, plot.side * scene.layout.front[plot.side]
    depths = np.sort(rng.uniform(plot.near + 1, plot.far, rng.integers(3, 8)))[::-1]
    for z in depths:
        away = x + plot.side * rng.uniform(3, 14)
        if scene.chance(0.55):
            draw_tree(scene, away, z)
        else:
            draw_foliage(scene, away, z, base=0, radius=(rng.uniform(0.8, 2.2), rng.uniform(0.8, 1.6)))
    if scene.chance(0.9):
        draw_fence(scene, (x, plot.near), (x, plot.far), rng.uniform(1.4, 2.2))


def _paste_upright(
    scene: Scene,
    picture: Picture,
    near: tuple[float, float],
    far: tuple[float, float],
    height: float,
    label: LabelId,
) -> None:
    """Paste an upright picture between two points (x, z) on the ground, with light and haze."""
    (x0, z0), (x1, z1) = near, far
    normal = (-math.copysign(1, x0), 0, 0) if x0 == x1 else (0, 0, -1)
    depth = np.linspace(z0, z1, picture.shape[1], dtype=np.float32)[None]
    shadow = scene.shadow_at((x0 + x1) / 2, (z0 + z1) / 2) * 0.5
    scene.light.illuminate(picture, scene.light.brightness(normal, shadow), depth)
    corners = scene.camera.project([[x0, height, z0], [x1, height, z1], [x1, 0, z1], [x0, 0, z0]])
    scene.canvas.texture(picture, corners, label)


def _facade(
    scene: Scene, length: float, height: float, near: float, color: Color, is_brick: bool, windows: bool
) -> Picture:
    """Return a flat picture of a house front or wall, in the resolution for its distance."""
    detail = float(np.clip(scene.camera.pixels(1, near + length / 3), 4, 16))  # pixels per metre
    shape = (max(2, int(height * detail)), max(2, int(length * detail)))
    picture = np.empty((*shape, 3), np.float32)
    picture[:] = color
    if is_brick:
        picture[:: max(2, int(detail / 4))] *= 0.82  # the joints between courses
    picture *= scene.grain(shape)[..., None]
    if windows:
        _draw_windows(scene, picture, detail)
        _draw_ground_floor(scene, picture, detail)
    return picture


def _glass(scene: Scene) -> Color:
    """Sample the colour of a window pane: dark, reflecting the sky, or lit from inside after sunset."""
    if scene.light.is_dark and scene.chance(0.4):
        return rgb(1.0, 0.85, 0.5) / scene.light.ambient * scene.rng.uniform(0.4, 0.8)
    return (rgb(0.14, 0.17, 0.2) + 0.4 * scene.rng.random() ** 2 * scene.light.zenith) * scene.rng.uniform(0.7, 1.4)


def _rectangle(picture: Picture, box: ArrayLike, detail: float, color: Color) -> None:
    """Fill the box (left, top, right, bottom in metres) of a flat picture."""
    left, top, right, bottom = np.round(np.asarray(box) * detail).astype(int).tolist()
    cv2.rectangle(picture, (left, top), (right, bottom), color.tolist(), -1)


def _draw_windows(scene: Scene, picture: Picture, detail: float) -> None:
    rng, (height, length) = scene.rng, (np.array(picture.shape[:2]) / detail)
    pitch, wide, tall = rng.uniform(1.9, 3.2), rng.uniform(0.9, 1.5), rng.uniform(1.2, 1.9)
    frame = scene.pick([rgb(0.85, 0.85, 0.82), rgb(0.3, 0.25, 0.2), rgb(0.6, 0.6, 0.6)])
    for storey in range(1, int(height / STOREY)):
        top = height - (storey + 1) * STOREY + 0.7
        for left in np.arange(0.6, length - wide, pitch):
            _rectangle(picture, (left - 0.12, top - 0.12, left + wide + 0.12, top + tall + 0.12), detail, frame)
            _rectangle(picture, (left, top, left + wide, top + tall), detail, _glass(scene))
            middle = left + wide / 2
            _rectangle(picture, (middle - 0.04, top, middle + 0.04, top + tall), detail, frame)
    for storey in range(1, int(height / STOREY)):
        ledge = height - storey * STOREY
        _rectangle(picture, (0, ledge, length, ledge + 0.12), detail, frame * 0.8)


def _draw_ground_floor(scene: Scene, picture: Picture, detail: float) -> None:
    """Draw shop windows under an awning, or doors between windows."""
    rng, (height, length) = scene.rng, (np.array(picture.shape[:2]) / detail)
    is_shop = scene.chance(0.45)
    accent = scene.pick([rgb(0.7, 0.15, 0.12), rgb(0.15, 0.3, 0.6), rgb(0.8, 0.7, 0.2), rgb(0.15, 0.4, 0.25)])
    left = 0.6
    while left < length - 1.2:
        wide = rng.uniform(2, 3.5) if is_shop else rng.uniform(0.9, 1.3)
        is_door = scene.chance(0.25)
        top, bottom = (
            height - (2.3 if is_shop or is_door else 2.0),
            height - (0 if is_door else 0.5 if is_shop else 0.9),
        )
        _rectangle(picture, (left, top, left + wide, bottom), detail, accent * 0.7 if is_door else _glass(scene))
        left += wide + (0.3 if is_shop else rng.uniform(0.8, 1.6))
    if is_shop:
        _rectangle(picture, (0, height - 3.0, length, height - 2.4), detail, accent)

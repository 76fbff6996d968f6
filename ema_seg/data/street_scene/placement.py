"""Objects of a scene: selection, placement and shadows."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from ema_seg.data.street_scene.figures import (
    draw_bicycle,
    draw_bin,
    draw_bollard,
    draw_cyclist,
    draw_lamp,
    draw_person,
    draw_sign,
    draw_traffic_light,
)
from ema_seg.data.street_scene.plants import draw_tree
from ema_seg.data.street_scene.stage import SUBPIXEL_BITS, Points, Scene, Side, fixed_point
from ema_seg.data.street_scene.surroundings import Plot
from ema_seg.data.street_scene.vehicles import draw_bus, draw_car

__all__ = ["KINDS", "Kind", "Placed", "cast_shadows", "draw_thing", "place_objects"]

Zone = Literal["kerb", "sidewalk", "parking", "own lane", "oncoming lane", "road", "junction"]
ALONG, TOWARDS, ACROSS = 0.0, np.pi, np.pi / 2


@dataclass(frozen=True)
class Kind:
    """Kind of object: frequency, zone, and the size of its shadow and footprint in metres."""

    draw: Callable[..., None]
    zone: Zone
    chance: float  # probability that a scene has any
    most: int  # maximum number in a scene
    depth: tuple[float, float]
    radius: float
    height: float
    heading: float | None = None  # vehicles only


KINDS = (
    Kind(draw_lamp, "kerb", 0.9, 6, (7, 60), 0.3, 7),
    Kind(draw_bollard, "kerb", 0.4, 6, (7, 22), 0.3, 1),
    Kind(draw_traffic_light, "kerb", 0.85, 5, (8, 28), 0.4, 3.5),
    Kind(draw_sign, "kerb", 0.95, 6, (8, 30), 0.4, 2.6),
    Kind(draw_bin, "sidewalk", 0.4, 2, (7, 25), 0.5, 1),
    Kind(draw_tree, "kerb", 0.4, 4, (12, 60), 0.9, 5),
    Kind(draw_person, "sidewalk", 0.95, 12, (5.5, 20), 0.4, 1.7),
    Kind(draw_person, "road", 0.6, 4, (6, 20), 0.4, 1.7),
    Kind(draw_cyclist, "own lane", 0.35, 1, (6, 18), 0.9, 1.6),
    Kind(draw_cyclist, "road", 0.5, 2, (6, 20), 0.9, 1.6),
    Kind(draw_bicycle, "sidewalk", 0.6, 4, (6, 18), 0.9, 1),
    Kind(draw_bus, "oncoming lane", 0.4, 1, (13, 32), 5.5, 3, TOWARDS),
    Kind(draw_bus, "own lane", 0.15, 1, (14, 30), 5.5, 3, ALONG),
    Kind(draw_car, "parking", 0.8, 7, (8, 60), 2.5, 1.4, ALONG),
    Kind(draw_car, "own lane", 0.5, 2, (9, 60), 2.5, 1.4, ALONG),
    Kind(draw_car, "oncoming lane", 0.6, 3, (9, 70), 2.5, 1.4, TOWARDS),
    Kind(draw_car, "junction", 0.6, 2, (10, 60), 2.3, 1.4, ACROSS),
)


@dataclass(frozen=True)
class Placed:
    """Object and its position on the ground."""

    kind: Kind
    x: float
    z: float


def _sample_place(scene: Scene, kind: Kind) -> tuple[float, float]:
    rng, layout = scene.rng, scene.layout
    side: Side = 1 if scene.chance(0.5) else -1
    z = float(np.exp(rng.uniform(*np.log(kind.depth))))
    kerb, front = layout.kerb[side], layout.front[side]
    if layout.junction:
        start, stop = layout.junction
        if kind.zone == "junction":
            z = rng.uniform(start + 1.5, stop - 1.5)
        elif kind.zone in ("kerb", "sidewalk", "parking") and start - 1 < z < stop + kind.radius:
            z = start - kind.radius - rng.uniform(0.3, 1.5)  # at the corner, not in the crossing street
    x = {
        "kerb": side * (kerb + rng.uniform(0.3, 0.7)),
        "sidewalk": side * rng.uniform(kerb + 0.5, front - 0.5),
        "parking": side * (kerb - 1.1),
        "own lane": rng.uniform(-0.4, 0.6),
        "oncoming lane": rng.uniform(-3.6, -3.1),
        "road": rng.uniform(-layout.kerb[-1], layout.kerb[1]),
        "junction": rng.uniform(-12, 12),
    }[kind.zone]
    return x, z


def place_objects(scene: Scene) -> list[Placed]:
    """Find a free place for every object, and return them from far to near; drop objects without room."""
    placed: list[Placed] = []
    for kind in KINDS:
        if not scene.chance(kind.chance) or (kind.zone == "junction" and not scene.layout.junction):
            continue
        for _ in range(scene.rng.integers(1, kind.most + 1)):
            for _attempt in range(4):
                x, z = _sample_place(scene, kind)
                if all(_is_clear(kind, x, z, other) for other in placed):
                    placed.append(Placed(kind, x, z))
                    break
    return sorted(placed, key=lambda thing: -thing.z)


def _is_clear(kind: Kind, x: float, z: float, other: Placed) -> bool:
    """Check that two footprints do not overlap; a vehicle is long but narrow."""
    across = min(kind.radius, 1.2) + min(other.kind.radius, 1.2)
    return abs(z - other.z) > kind.radius + other.kind.radius or abs(x - other.x) > across


def cast_shadows(scene: Scene, plots: list[Plot], things: list[Placed]) -> None:
    """Fill `scene.shadow`: long shadows if the sun shines, and a soft dark spot under every object."""
    shadow, camera, light = scene.shadow, scene.camera, scene.light
    if light.direct > 0.2:
        shift = -light.towards_sun / light.towards_sun[1]  # per metre of height
        for plot in plots:
            x, reach = plot.side * scene.layout.front[plot.side], min(plot.height, 12) * shift
            base = np.array([[x, 0, plot.near], [x, 0, plot.far]])
            _darken(shadow, camera.project(np.concatenate([base, base[::-1] + reach * (1, 0, 1)])), 0.85)
        for thing in things:
            half = min(thing.kind.radius, 1.0) * 0.6
            base = np.array([[thing.x - half, 0, thing.z], [thing.x + half, 0, thing.z]])
            tip = base[::-1] + min(thing.kind.height, 8) * shift * (1, 0, 1)
            _darken(shadow, camera.project(np.concatenate([base, tip])), 0.8)
    turn = np.linspace(0, 2 * np.pi, 16)
    for thing in things:
        wide, long = min(thing.kind.radius, 1.0), thing.kind.radius
        if thing.kind.heading == ACROSS:
            wide, long = long, wide
        spot = np.stack([thing.x + wide * np.cos(turn), 0 * turn, thing.z + long * np.sin(turn)], 1)
        _darken(shadow, camera.project(spot), 1.0)
    cv2.GaussianBlur(shadow, (0, 0), 2.0, dst=shadow)


def _darken(shadow: NDArray[np.float32], corners: Points, amount: float) -> None:
    cv2.fillPoly(shadow, [fixed_point(corners)], amount, cv2.LINE_8, SUBPIXEL_BITS)


def draw_thing(scene: Scene, thing: Placed) -> None:
    """Draw an object at its position."""
    heading = thing.kind.heading
    if heading is None:
        thing.kind.draw(scene, thing.x, thing.z)
        return
    if thing.kind.zone == "junction" and scene.chance(0.5):
        heading = -heading
    if thing.kind.zone == "parking" and thing.x < 0:
        heading = TOWARDS
    thing.kind.draw(scene, thing.x, thing.z, heading + scene.rng.normal(0, 0.04))

"""Cars and buses: solid blocks with windows, wheels and lamps on their faces."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ema_seg.data.street_scene.stage import BLACK, PAINT, Color, LabelId, Points, Scene, rgb

__all__ = ["draw_bus", "draw_car"]


@dataclass(frozen=True)
class Pose:
    """Position and heading of a vehicle: 0 = away from the camera, pi = towards it."""

    x: float
    z: float
    heading: float

    def world(self, local: ArrayLike) -> Points:
        """Map N x 3 points (along, across to the right, up) to the world."""
        along, across, up = np.asarray(local, dtype=np.float64).T
        sine, cosine = np.sin(self.heading), np.cos(self.heading)
        return np.stack([self.x + along * sine + across * cosine, up, self.z + along * cosine - across * sine], 1)


# Corners of a block's faces, each as seen from outside: bottom left, bottom right, top right, top left.
# 0-3 are the bottom corners (rear left, rear right, front right, front left), 4-7 the same at the top.
FACES = {
    "rear": (0, 1, 5, 4),
    "right": (1, 2, 6, 5),
    "front": (2, 3, 7, 6),
    "left": (3, 0, 4, 7),
    "top": (4, 5, 6, 7),
}
NORMALS = {"rear": (-1, 0, 0), "right": (0, 1, 0), "front": (1, 0, 0), "left": (0, -1, 0), "top": (0, 0, 1)}


@dataclass(frozen=True)
class Block:
    """Six-sided part of a vehicle, from `low` to `high` along and up, narrowing towards its top."""

    low: tuple[float, float]  # along, up
    high: tuple[float, float]
    width: float
    shrink_rear: float = 0.0
    shrink_front: float = 0.0
    shrink_side: float = 0.0

    def corners(self) -> Points:
        """Return the 8 x 3 local corners, in the order of the indices in `FACES`."""
        (a, bottom), (b, top), half = self.low, self.high, self.width / 2
        c, d, narrow = a + self.shrink_rear, b - self.shrink_front, half - self.shrink_side
        low = [[a, -half, bottom], [a, half, bottom], [b, half, bottom], [b, -half, bottom]]
        high = [[c, -narrow, top], [c, narrow, top], [d, narrow, top], [d, -narrow, top]]
        return np.array(low + high)


@dataclass(frozen=True)
class Face:
    """Visible side of a block in the world; u runs along its bottom edge and v upwards, from 0 to 1."""

    name: str
    corners: Points
    normal: NDArray[np.float64]

    def at(self, uv: ArrayLike) -> Points:
        """Return world points, N x 3, for coordinates on the face, N x 2."""
        u, v = np.asarray(uv, dtype=np.float64).T[..., None]
        low = self.corners[0] + (self.corners[1] - self.corners[0]) * u
        high = self.corners[3] + (self.corners[2] - self.corners[3]) * u
        return low + (high - low) * v


def _box(u0: float, v0: float, u1: float, v1: float) -> Points:
    return np.array([[u0, v0], [u1, v0], [u1, v1], [u0, v1]])


class Vehicle:
    """Painter of the blocks of one vehicle and the details on their faces."""

    def __init__(self, scene: Scene, pose: Pose, label: LabelId) -> None:
        self.scene, self.pose, self.label = scene, pose, label

    def faces(self, block: Block) -> Iterator[Face]:
        """Yield the faces of a block that are turned to the camera."""
        corners = self.pose.world(block.corners())
        origin = self.pose.world([[0, 0, 0]])[0]
        eye = np.array([0, self.scene.camera.height, 0])
        for name, indices in FACES.items():
            normal = self.pose.world([NORMALS[name]])[0] - origin
            face = corners[list(indices)]
            if float(np.dot(eye - face.mean(0), normal)) > 0:
                yield Face(name, face, normal)

    def fill(self, face: Face, color: Color, uv: Points | None = None) -> None:
        """Paint a face, or the part of it inside the polygon uv."""
        shape = face.corners if uv is None else face.at(uv)
        lit = self.scene.shade(color, self.pose.x, self.pose.z, face.normal.tolist())
        self.scene.canvas.polygon(self.scene.camera.project(shape), lit, self.label)

    def shine(self, face: Face, color: Color, uv: Points) -> None:
        """Paint a self-luminous part of a face."""
        self.scene.canvas.polygon(self.scene.camera.project(face.at(uv)), color, self.label)

    def wheels(self, face: Face, block: Block, radius: float, places: tuple[float, ...]) -> None:
        """Draw wheels on the long side of a block, at fractions of its length, down to the ground."""
        length, height = block.high[0] - block.low[0], block.high[1] - block.low[1]
        turn = np.linspace(0, 2 * np.pi, 18)
        for u in places:
            for share, color in ((1.0, BLACK), (0.55, rgb(0.5, 0.5, 0.52))):
                rim_u = u + share * radius * np.cos(turn) / length
                rim_v = (radius - block.low[1] + share * radius * np.sin(turn)) / height
                self.fill(face, color, np.stack([rim_u, rim_v], 1))

    def tyres(self, face: Face) -> None:
        """Draw the tyres under the front or the rear."""
        for u in (0.05, 0.8):
            self.fill(face, BLACK, _box(u, -0.42, u + 0.15, 0.05))

    def lamps(self, face: Face, height: float = 0.6) -> None:
        """Draw head or tail lamps, lit after sunset."""
        is_rear = face.name == "rear"
        color = rgb(0.8, 0.1, 0.08) if is_rear else rgb(0.95, 0.95, 0.88)
        for u in (0.03, 0.79):
            part = _box(u, height, u + 0.18, height + 0.2)
            if self.scene.light.is_dark:
                self.shine(face, np.clip(color * 1.3, 0, 1), part)
            else:
                self.fill(face, color * 0.9, part)


def draw_car(scene: Scene, x: float, z: float, heading: float) -> None:
    """Draw a saloon or an estate car."""
    rng, vehicle = scene.rng, Vehicle(scene, Pose(x, z, heading), LabelId.CAR)
    length, width, paint = rng.uniform(3.7, 4.7), rng.uniform(1.7, 1.9), scene.pick(PAINT)
    half, estate = length / 2, scene.chance(0.4)
    body = Block((-half, 0.3), (half, 0.9), width, 0.08, 0.12, 0.04)
    cabin_rear = -half + (0.1 if estate else 0.75)
    cabin = Block((cabin_rear, 0.88), (half - 1.0, rng.uniform(1.42, 1.62)), width - 0.1, 0.35, 0.7, 0.2)
    glass = rgb(0.12, 0.15, 0.18) + 0.18 * scene.light.zenith
    for face in vehicle.faces(body):
        if face.name in ("rear", "front"):
            vehicle.tyres(face)
        vehicle.fill(face, paint)
        if face.name in ("left", "right"):
            vehicle.fill(face, paint * 0.75, _box(0.02, 0, 0.98, 0.18))
            vehicle.wheels(face, body, 0.33, (0.2, 0.8))
        elif face.name != "top":
            vehicle.fill(face, paint * 0.6, _box(0, 0, 1, 0.3))
            vehicle.fill(face, rgb(0.85, 0.85, 0.8), _box(0.36, 0.2, 0.64, 0.42))
            vehicle.lamps(face)
    for face in vehicle.faces(cabin):
        vehicle.fill(face, paint)
        if face.name in ("left", "right"):
            vehicle.fill(face, glass, _box(0.08, 0.12, 0.47, 0.85))
            vehicle.fill(face, glass, _box(0.53, 0.12, 0.92, 0.85))
        elif face.name != "top":
            vehicle.fill(face, glass * rng.uniform(0.8, 1.6), _box(0.07, 0.1, 0.93, 0.88))


def draw_bus(scene: Scene, x: float, z: float, heading: float) -> None:
    """Draw a city bus."""
    vehicle, half = Vehicle(scene, Pose(x, z, heading), LabelId.BUS), scene.rng.uniform(4.5, 6)
    body = Block((-half, 0.35), (half, 3.05), 2.5, 0.05, 0.12, 0.05)
    paint = scene.pick([rgb(0.85, 0.65, 0.12), rgb(0.7, 0.12, 0.1), rgb(0.85, 0.86, 0.85), rgb(0.15, 0.4, 0.6)])
    glass = rgb(0.1, 0.12, 0.15) + 0.2 * scene.light.zenith
    for face in vehicle.faces(body):
        if face.name in ("rear", "front"):
            vehicle.fill(face, BLACK, _box(0.06, -0.12, 0.94, 0.0))
        vehicle.fill(face, paint)
        if face.name in ("left", "right"):
            for u in np.arange(0.03, 0.94, 0.135):
                vehicle.fill(face, glass, _box(u, 0.42, u + 0.12, 0.84))
            vehicle.wheels(face, body, 0.48, (0.22, 0.78))
        elif face.name != "top":
            vehicle.fill(face, glass, _box(0.06, 0.38, 0.94, 0.8))
            vehicle.fill(face, rgb(0.95, 0.6, 0.15) * 0.8, _box(0.25, 0.84, 0.75, 0.95))
            vehicle.lamps(face, 0.08)

"""Trees, bushes and fences."""

import numpy as np

from ema_seg.data.street_scene.stage import NEAR, LabelId, Scene, rgb

__all__ = ["draw_fence", "draw_foliage", "draw_tree"]

FOLIAGE = [rgb(0.22, 0.36, 0.12), rgb(0.3, 0.42, 0.16), rgb(0.17, 0.28, 0.14), rgb(0.5, 0.4, 0.14)]


def draw_foliage(scene: Scene, x: float, z: float, base: float, radius: tuple[float, float]) -> None:
    """Draw a crown or a bush: leaf clusters, darker below and away from the sun; radius across and upwards."""
    rng, across = scene.rng, scene.camera.pixels(radius[0], z)
    count = int(np.clip(across * 1.6, 12, 110))
    angle, distance = (
        rng.uniform(0, 2 * np.pi, count),
        np.sqrt(rng.random(count)) * rng.uniform(0.8, 1.0, count),
    )
    offset = np.stack([np.cos(angle) * distance, np.sin(angle) * distance], 1)
    centre = scene.camera.project([[x, base + radius[1], z]])
    spread = np.array([across, -scene.camera.pixels(radius[1], z)])
    from_sun = offset @ np.array([np.sign(scene.light.towards_sun[0]) * 0.25, 0.5])
    shine = 0.75 + from_sun * (0.9 if scene.light.direct > 0.2 else 0.4) + rng.normal(0, 0.16, count)
    leaves = scene.shade(scene.pick(FOLIAGE, 0.03), x, z, (0, 0.6, -0.4)) * np.maximum(0.25, shine)[:, None]
    cluster = across * rng.uniform(0.12, 0.3, count) * (1.1 - 0.5 * distance)
    order = np.argsort(shine)
    scene.canvas.discs((centre + offset * spread)[order], cluster[order], leaves[order], LabelId.VEGETATION)


def draw_tree(scene: Scene, x: float, z: float) -> None:
    """Draw a trunk with a crown."""
    rng = scene.rng
    trunk, wide, tall = rng.uniform(1.8, 3.0), rng.uniform(1.4, 2.8), rng.uniform(1.5, 3.0)
    bark = scene.shade(scene.pick([rgb(0.32, 0.25, 0.2), rgb(0.42, 0.38, 0.34)], 0.03), x, z)
    stem = scene.camera.project([[x, 0, z], [x + rng.normal(0, 0.15), trunk + 0.6 * tall, z]])
    scene.canvas.line(stem, scene.camera.pixels(rng.uniform(0.2, 0.4), z), bark, LabelId.VEGETATION)
    draw_foliage(scene, x, z, base=trunk, radius=(wide, tall))


def draw_fence(scene: Scene, near: tuple[float, float], far: tuple[float, float], height: float) -> None:
    """Draw a see-through fence between two points (x, z): posts, rails and pickets over the background."""
    camera, canvas, is_railed = scene.camera, scene.canvas, scene.chance(0.3)
    start, end = np.array([near[0], 0, max(near[1], NEAR)]), np.array([far[0], 0, far[1]])
    up = np.array([0, height, 0])
    canvas.polygon(camera.project([start, end, end + up, start + up]), None, LabelId.FENCE)
    paint = scene.pick([rgb(0.16, 0.18, 0.17), rgb(0.8, 0.8, 0.78), rgb(0.42, 0.3, 0.2), rgb(0.2, 0.34, 0.26)])
    lit = [scene.shade(paint, float(foot[0]), float(foot[2])) for foot in (start, end)]
    gap, is_post = (1.8, 1) if is_railed else (0.2, 10)
    count = max(2, int(np.linalg.norm(end - start) / gap))
    share = np.linspace(0, 1, count)[:, None]
    feet = start + (end - start) * share
    # Pickets less than 2.5 pixels apart would merge into a solid surface: draw every third.
    drawn = (gap * camera.focal / feet[:, 2] > 2.5) | (np.arange(count) % 3 == 0)
    width = np.where(np.arange(count) % is_post == 0, 0.16, 0.09) * camera.focal / feet[:, 2]
    tops, colors = camera.project(feet + up), lit[0] + (lit[1] - lit[0]) * share
    canvas.lines(camera.project(feet)[drawn], tops[drawn], width[drawn], colors[drawn])
    for level in (0.15, 0.38, 0.62, 0.93) if is_railed else (0.12, 0.93):
        low, high = level * up, level * up + np.array([0, 0.09 if is_railed else 0.06, 0])
        canvas.polygon(camera.project([start + low, end + low, end + high, start + high]), (lit[0] + lit[1]) / 2)

"""Power and numbers of seeds against simulations of the test itself."""

import json

import numpy as np
import pytest

from ema_seg.comparison.plan import main
from ema_seg.comparison.power import (
    find_power,
    pool_spreads,
    seeds_needed,
    seeds_range,
    smallest_difference,
    split_variance,
)
from ema_seg.comparison.schema import Spread
from ema_seg.evaluation.intervals import estimate_difference
from tests.comparison.runs_on_disk import write_run, write_sweep


def spread_of(seeds=1e-4, images=0.0, interaction=0.0, n=5, of_images=100):
    return Spread(seeds=seeds, images=images, interaction=interaction, n=n, degrees=n - 1, of_images=of_images)


def simulate(rng, effect, seeds, images, deviations):
    """Simulate differences (images, seeds) whose mean over images is the score's difference."""
    of_seeds, of_images, of_both = deviations
    return (
        effect
        + rng.normal(0, of_seeds, seeds)
        + rng.normal(0, of_images, (images, 1))
        + rng.normal(0, of_both, (images, seeds))
    )


def analyse(differences):
    """Test as a comparison does; images are a plain mean here, whose variance needs no bootstrap."""
    images = len(differences)
    of_mean = differences.mean(axis=1).var(ddof=1) / images
    return estimate_difference(differences.mean(axis=0), of_mean, images)


def true_spread(deviations, seeds, images):
    of_seeds, of_images, of_both = deviations
    return Spread(
        seeds=of_seeds**2 + of_both**2 / images,
        images=of_images**2 / images,
        interaction=of_both**2 / images,
        n=seeds,
        degrees=seeds - 1,
        of_images=images,
    )


@pytest.mark.parametrize("deviations", [(0.01, 0.0, 0.0), (0.005, 0.05, 0.05), (0.002, 0.1, 0.02), (0.002, 0.02, 0.1)])
@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_the_power_is_that_of_simulated_comparisons(deviations, seeds):
    rng, images = np.random.default_rng(1), 100
    spread = true_spread(deviations, seeds, images)
    effect = smallest_difference(seeds, spread, 0.7)
    found = [analyse(simulate(rng, effect, seeds, images, deviations)).p < 0.05 for _ in range(600)]
    # Pilots with much interaction are a little better than promised.
    assert 0.64 < np.mean(found) < 0.85


@pytest.mark.parametrize("deviations", [(0.01, 0.05, 0.0), (0.01, 0.0, 0.1), (0.003, 0.05, 0.08)])
def test_the_parts_of_the_variance_are_found_again(deviations):
    rng, images, seeds, found = np.random.default_rng(0), 80, 4, []
    for _ in range(300):
        differences = simulate(rng, 0.0, seeds, images, deviations)
        between = differences.mean(axis=0).var(ddof=1)
        of_mean = differences.mean(axis=1).var(ddof=1) / images
        of_seeds = differences.var(axis=0, ddof=1).mean() / images
        found.append(split_variance(between, of_mean, of_seeds, seeds, images))
    expected = true_spread(deviations, seeds, images)
    scale = expected["seeds"] + expected["images"] + expected["interaction"]
    for key in ("seeds", "images", "interaction"):
        assert np.mean([one[key] for one in found]) == pytest.approx(expected[key], abs=0.08 * scale)


def test_seeds_and_smallest_difference_are_inverse():
    spread = spread_of(images=1e-5, interaction=2e-5)
    for seeds in (3, 7, 20):
        difference = smallest_difference(seeds, spread)
        assert seeds_needed(1.001 * difference, spread) == seeds
        assert find_power(difference, seeds, spread) == pytest.approx(0.8, abs=1e-3)


def test_known_numbers_of_the_paired_t_test():
    """Without variance over images the test is the paired t-test: 10 pairs for an effect of one deviation."""
    assert seeds_needed(0.01, spread_of(seeds=1e-4)) == 10
    assert seeds_needed(0.005, spread_of(seeds=1e-4)) == 34
    assert seeds_needed(0.02, spread_of(seeds=1e-4)) == 5


def test_the_power_grows_with_the_seeds():
    spread = spread_of(seeds=8.5e-5, images=1e-9)
    powers = [find_power(0.01, seeds, spread) for seeds in range(2, 200)]
    assert np.isfinite(powers).all() and (np.diff(powers) >= -1e-9).all() and powers[-1] == pytest.approx(1)


def test_images_can_make_every_number_of_seeds_too_small():
    assert seeds_needed(0.01, spread_of(images=1e-4)) is None
    assert seeds_range(0.01, spread_of(images=1e-4)) == (None, None)


def test_the_range_holds_the_estimate():
    few, many = seeds_range(0.01, spread_of(n=3))
    assert few < seeds_needed(0.01, spread_of()) < many


def test_copies_of_one_run_differ_in_nothing():
    assert find_power(0.01, 3, spread_of(seeds=0.0)) == 1
    assert find_power(0.0, 3, spread_of(seeds=0.0)) == 0


def test_spreads_are_pooled_by_their_degrees_of_freedom():
    pooled = pool_spreads([spread_of(seeds=1.0, n=3), spread_of(seeds=4.0, n=2)])
    assert pooled["seeds"] == pytest.approx(2.0) and pooled["degrees"] == 3


def test_the_command_plans_from_a_sweep(tmp_path, capsys):
    sweep = write_sweep(tmp_path / "sweep", seeds=3)
    assert main([str(sweep), "difference=1.5", "power=0.9"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "1.50 points of mIoU with a probability of 90 % at p < 0.05, on 8 images" in out
    plan = json.loads((sweep / "plan/plan.json").read_text())
    rows = {row["label"]: row for row in plan["rows"]}
    assert list(rows) == ["ema", "cbam", "all rows together"]
    for row in plan["rows"]:
        assert row["seeds"] == seeds_needed(0.015, row["spread"], 0.9)
        assert row["smallest"]["5"] == pytest.approx(smallest_difference(5, row["spread"], 0.9))
    text = (sweep / "plan/plan.md").read_text()
    assert f"{rows['ema']['seeds']} ({rows['ema']['few']} to " in text
    assert (sweep / "plan/power.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("difference=0",), "difference=0: must be a number of points above 0"),
        (("difference=nan",), "difference=nan: must be a number of points above 0"),
        (("difference=much",), "difference=much: must be a number"),
        (("difference=1", "power=1"), "power=1: must be a probability above 0.05 and below 1"),
        (("difference=1", "baseline=attention"), "must be key=value"),
    ],
)
def test_a_mistake_is_one_sentence(arguments, message, tmp_path, capsys):
    assert main([str(write_sweep(tmp_path / "sweep", seeds=2)), *arguments]) == 1
    assert message in capsys.readouterr().err


def test_a_pilot_of_one_seed_is_refused(tmp_path, capsys):
    for name in ("none", "ema"):
        write_run(tmp_path / name, name)
    assert main([str(tmp_path), "difference=1"]) == 1
    assert "at least 2 seeds that a row and its baseline have both finished" in capsys.readouterr().err

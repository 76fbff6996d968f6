"""Tests of measuring.py: timing in turns, ratios, number format and input sets."""

import importlib
from collections import Counter

import pytest
import torch


@pytest.fixture
def measuring():
    return importlib.import_module("measuring")


def test_each_call_gets_a_number_of_its_own_and_each_round_a_sample_of_all(measuring):
    numbers, order = [], []

    def call(name, number):
        numbers.append(number)
        order.append(name)
        for _ in range(10**6):  # longer than a sample's minimum duration, so that a sample is one call
            pass

    calls = {name: lambda number, name=name: call(name, number) for name in "abc"}
    samples = measuring.time_in_turns(calls, torch.device("cpu"), budget=1e-6, min_rounds=6)

    assert {name: len(values) for name, values in samples.items()} == {"a": 6, "b": 6, "c": 6}
    assert numbers == list(range(len(numbers)))
    rounds = [order[-18:][start : start + 3] for start in range(0, 18, 3)]
    assert all(sorted(round_) == ["a", "b", "c"] for round_ in rounds)
    assert len(set(map(tuple, rounds))) > 1


def test_short_calls_are_timed_several_in_a_row(measuring):
    counts = Counter()
    calls = {"short": lambda number: counts.update(["short"])}
    samples = measuring.time_in_turns(calls, torch.device("cpu"), budget=1e-6, min_rounds=2)

    assert len(samples["short"]) == 2
    assert counts["short"] > 100


def test_ratios_are_taken_within_rounds(measuring):
    # The machine is twice as slow in the second half; within a round the ratio stays 3.
    assert measuring.ratio([3, 3, 3, 6, 6], [1, 1, 1, 2, 2]).as_json() == {
        "median": 3,
        "lower_quartile": 3,
        "upper_quartile": 3,
        "samples": 5,
    }


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.0012345, "0.00123"), (0.5, "0.500"), (1.0, "1.00"), (12.34, "12.3"), (1234.5, "1234")],
)
def test_numbers_have_three_digits(measuring, value, text):
    assert measuring.number(value) == text


def test_small_inputs_have_many_sets_and_large_ones_three(measuring):
    cpu = torch.device("cpu")

    assert measuring.number_of_sets(1, cpu) == 64
    assert measuring.number_of_sets(2**40, cpu) == 3

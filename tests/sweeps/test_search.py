from types import SimpleNamespace

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution

from ema_seg.runtime.errors import ConfigError
from ema_seg.sweeps import JobState, Pruned
from ema_seg.sweeps.search import OptunaStudy, PruningCallback

SPACE = {"lr": FloatDistribution(1e-4, 1e-2, log=True), "attention": CategoricalDistribution(["none", "ema"])}


def search(folder, grace=1):
    return OptunaStudy(folder, seed=0, grace=grace)


def run_trials(folder, numbers):
    """Run trials whose score falls with the learning rate; reopen the study each time, as separate processes would."""
    chosen = []
    for number in numbers:
        params = search(folder).ask(number, SPACE)
        search(folder).tell(number, JobState("finished", miou=1.0 - params["lr"]))
        chosen.append(params)
    return chosen


def validate(folder, number, epoch, score, grace=1):
    """Call the trial's pruning callback with the score of a validation."""
    trainer = SimpleNamespace(current_epoch=epoch, callback_metrics={"val/miou": score}, is_global_zero=True)
    PruningCallback(folder, number, seed=0, grace=grace).on_validation_end(trainer, None)


def test_a_search_that_was_cut_off_asks_for_what_it_would_have(tmp_path):
    undisturbed = run_trials(tmp_path / "one", range(8))
    first = run_trials(tmp_path / "two", range(3))
    assert search(tmp_path / "two").ask(3, SPACE) == undisturbed[3]  # and killed before its result was reported
    rest = run_trials(tmp_path / "two", range(3, 8))

    assert [*first, *rest] == undisturbed
    assert len({params["lr"] for params in undisturbed}) == 8


def test_a_trial_comes_with_all_its_settings_at_once(tmp_path, monkeypatch):
    search(tmp_path).ask(0, SPACE)

    (trial,) = search(tmp_path).study.trials
    assert trial.state is optuna.trial.TrialState.RUNNING
    assert trial.params.keys() == SPACE.keys()


def test_another_space_in_the_same_folder_is_refused(tmp_path):
    search(tmp_path).check_space(SPACE, ["epochs=1"])
    search(tmp_path).ask(0, SPACE)
    search(tmp_path).check_space(SPACE, ["epochs=1"])

    with pytest.raises(ConfigError, match=r"the trials here \(1\) searched lr=.*; choose another sweep\.id"):
        search(tmp_path).check_space({**SPACE, "attention": CategoricalDistribution(["none", "se"])}, ["epochs=1"])


def test_another_search_in_the_same_folder_is_refused(tmp_path):
    search(tmp_path).check_space(SPACE, ["epochs=1"])

    with pytest.raises(ConfigError, match="was started with epochs=1, got epochs=2; choose another sweep"):
        search(tmp_path).check_space(SPACE, ["epochs=2"])


def test_without_grace_a_first_epoch_can_be_the_last(tmp_path):
    for number, score in enumerate([0.5, 0.1]):
        search(tmp_path, grace=0).ask(number, SPACE)
        if number == 0:
            validate(tmp_path, number, 0, score, grace=0)
            search(tmp_path, grace=0).tell(0, JobState("finished", miou=score))
    with pytest.raises(Pruned, match=r"after epoch 1: best val mIoU 0\.1000"):
        validate(tmp_path, number, 0, score, grace=0)


def test_a_failure_is_told_when_it_is_final(tmp_path):
    search(tmp_path).ask(0, SPACE)

    search(tmp_path).tell(0, JobState("failed", "the loss is nan", 1))
    assert search(tmp_path).study.trials[0].state is optuna.trial.TrialState.RUNNING
    validate(tmp_path, 0, 0, 0.5)  # the second attempt
    search(tmp_path).tell(0, JobState("failed", "the loss is nan", 2))
    assert search(tmp_path).study.trials[0].state is optuna.trial.TrialState.FAIL

    validate(tmp_path, 0, 1, 0.5)  # a third attempt, with sweep.retry=true
    search(tmp_path).tell(0, JobState("finished", miou=0.5))
    assert search(tmp_path).study.trials[0].state is optuna.trial.TrialState.FAIL


def test_a_trial_below_the_median_is_given_up_after_the_grace(tmp_path):
    for number, scores in enumerate([[0.3, 0.5, 0.6], [0.2, 0.5, 0.7]]):
        search(tmp_path).ask(number, SPACE)
        for epoch, score in enumerate(scores):
            validate(tmp_path, number, epoch, score)
        search(tmp_path).tell(number, JobState("finished", miou=scores[-1]))
    search(tmp_path).ask(2, SPACE)

    validate(tmp_path, 2, 0, 0.1)  # within the grace period
    with pytest.raises(Pruned, match=r"after epoch 2: best val mIoU 0\.4000 is below"):
        validate(tmp_path, 2, 1, 0.4)
    search(tmp_path).tell(2, JobState("pruned", "given up"))

    assert search(tmp_path).study.trials[2].state is optuna.trial.TrialState.PRUNED
    assert search(tmp_path).study.trials[2].intermediate_values == {0: 0.1, 1: 0.4}


def test_an_epoch_that_a_resumed_trial_repeats_is_reported_once(tmp_path):
    search(tmp_path).ask(0, SPACE)
    for score in (0.25, 0.75):
        validate(tmp_path, 0, 0, score)

    assert search(tmp_path).study.trials[0].intermediate_values == {0: 0.25}

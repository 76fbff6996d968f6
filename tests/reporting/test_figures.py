"""Tests of the content of the figures, read from their artists."""

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ema_seg.evaluation import ConfusionMatrix, Evaluation
from ema_seg.inference.masks import colourise
from ema_seg.reporting import draw_class_iou, draw_confusion_matrix, draw_samples
from tests.reporting.test_report import CLASSES, PALETTE, make_evaluation, make_panel, make_report


def labels(axes: Axes, which: str) -> list[str]:
    return [tick.get_text() for tick in getattr(axes, f"get_{which}ticklabels")()]


def pixels(axes: Axes) -> np.ndarray:
    return np.asarray(axes.images[0].get_array())


def legend_labels(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_colourise_paints_classes_and_leaves_ignored_pixels_black() -> None:
    mask = np.array([[0, 3], [255, 1]])
    assert colourise(mask, PALETTE).tolist() == [
        [list(PALETTE[0]), list(PALETTE[3])],
        [[0, 0, 0], list(PALETTE[1])],
    ]
    assert colourise(mask.astype(np.uint8), PALETTE).dtype == np.uint8


def test_confusion_matrix_shows_shares_of_the_true_class() -> None:
    confusion = ConfusionMatrix(4)
    confusion.update(np.array([0, 0, 0, 1, 1]), np.array([0, 0, 0, 0, 1]))
    axes = draw_confusion_matrix(make_report(evaluation=Evaluation(confusion, []))).axes[0]
    shares = np.ma.filled(axes.images[0].get_array(), np.nan)
    assert shares[0].tolist() == [0.75, 0.25, 0, 0]
    assert shares[1].tolist() == [0, 1, 0, 0]
    assert np.isnan(shares[2:]).all()
    assert [text.get_text() for text in axes.texts] == ["75", "25", "100"]
    assert labels(axes, "y") == list(CLASSES)


def test_many_classes_are_labelled_thinly_and_not_numbered() -> None:
    names = [str(index) for index in range(150)]
    report = make_report(evaluation=make_evaluation(150), classes=names, palette=[(0, 0, 0)] * 150)
    axes = draw_confusion_matrix(report).axes[0]
    assert labels(axes, "x") == names[::3]
    assert not axes.texts
    bars = draw_class_iou(report)
    assert [len(axes.patches) for axes in bars.axes] == [50, 50, 50]


def test_class_bars_are_ranked_and_name_the_absent() -> None:
    report = make_report()
    axes = draw_class_iou(report).axes[0]
    widths = [bar.get_width() for bar in axes.patches]
    assert widths == [*sorted(report["iou"][:3], reverse=True), 0]
    assert labels(axes, "y")[-1] == "sky"
    assert [text.get_text() for text in axes.texts][-2:] == ["absent", f"mIoU {100 * report['miou']:.2f}%"]
    best = int(np.argmax(report["iou"][:3]))
    assert labels(axes, "y")[0] == CLASSES[best]
    assert axes.patches[0].get_facecolor()[:3] == pytest.approx(np.array(PALETTE[best]) / 255)


def test_classes_of_the_same_name_keep_their_bars() -> None:
    axes = draw_class_iou(make_report(classes=["a", "a", "b", "b"])).axes[0]
    assert len(axes.patches) == 4


def test_samples_show_input_truth_prediction_and_errors() -> None:
    row = make_panel(((6, 8),))[0]
    figure = draw_samples([row], CLASSES, PALETTE, title="fpn / ema")
    image, truth, prediction, errors = (pixels(axes) for axes in figure.axes)
    assert np.array_equal(image, row["image"])
    assert np.array_equal(truth, colourise(row["truth"], PALETTE))
    assert np.array_equal(prediction, colourise(row["prediction"], PALETTE))
    ignored = row["truth"] == 255
    wrong = ~ignored & (row["truth"] != row["prediction"])
    assert (errors[ignored] == 255).all()
    assert (errors[wrong] == (213, 94, 0)).all()
    right = errors[~ignored & ~wrong]
    assert (right == right[:, :1]).all()  # grey
    assert figure.get_suptitle().strip() == "fpn / ema"
    assert legend_labels(figure) == [*CLASSES, "ignored", "wrong"]


def test_samples_add_the_attention_where_it_is_given() -> None:
    rows = make_panel(((6, 8), (5, 5)))
    rows[1]["weight_map"] = np.linspace(0, 1, 25).reshape(5, 5)
    figure = draw_samples(rows, CLASSES, PALETTE)
    last = figure.axes[9]
    assert np.array_equal(pixels(last), rows[1]["weight_map"])
    assert last.images[0].get_clim() == (0, 1)


def test_legend_names_only_what_occurs() -> None:
    row = make_panel(((4, 4),))[0]
    row["truth"], row["prediction"] = np.full((4, 4), 1), np.full((4, 4), 3, np.uint8)
    assert legend_labels(draw_samples([row], CLASSES, PALETTE)) == ["car", "sky", "wrong"]

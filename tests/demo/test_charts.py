import itertools
import math
import re
from html.parser import HTMLParser

import pytest

from mmbridge.demo.charts import line_chart, log_ticks, read_metrics, running_mean, ticks
from mmbridge.errors import DataError


class Shapes(HTMLParser):
    def __init__(self, drawing):
        super().__init__()
        self.lines, self.circles, self.words = [], [], []
        self.feed(str(drawing))

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        if tag == "polyline":
            points = [tuple(map(float, pair.split(","))) for pair in values["points"].split()]
            self.lines.append((values["class"], points))
        if tag == "circle":
            self.circles.append(values["class"])

    def handle_data(self, data):
        self.words.append(data)


def test_metrics_are_read_by_column_without_empty_cells(tmp_path):
    file = tmp_path / "metrics.csv"
    file.write_text("step,train/loss/text,val/loss/text\n1,2.5,\n10,1.25,\n10,,1.5\n", encoding="utf-8")
    assert read_metrics(file) == {"train/loss/text": [(1, 2.5), (10, 1.25)], "val/loss/text": [(10, 1.5)]}


@pytest.mark.parametrize(
    ("content", "words"), [(None, "no metrics"), ("loss\n1\n", "column 'step'"), ("step,loss\n1,much\n", "much")]
)
def test_a_file_that_is_no_table_of_metrics_is_refused(tmp_path, content, words):
    file = tmp_path / "metrics.csv"
    if content is not None:
        file.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=words):
        read_metrics(file)


def test_a_chart_keeps_order_and_proportion():
    ((name, points),) = Shapes(line_chart({"loss": [(0, 1.0), (50, 0.5), (100, 0.0)]}, "a loss", 100, top=1.0)).lines
    (x0, y0), (x1, y1), (x2, y2) = points
    assert name == "curve-0"
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.1)
    assert y1 - y0 == pytest.approx(y2 - y1, abs=0.1)
    assert y0 < y2, "larger values stand higher, and SVG counts downwards"


def test_a_logarithmic_chart_gives_equal_ratios_equal_heights():
    ((_, points),) = Shapes(line_chart({"loss": [(1, 1.0), (2, 0.1), (3, 0.01)]}, "a loss", 3, logarithmic=True)).lines
    assert points[1][1] - points[0][1] == pytest.approx(points[2][1] - points[1][1], abs=0.1)


def test_a_curve_of_many_points_is_drawn_raw_and_smoothed():
    many = [(step, 1.0 + (step % 2)) for step in range(200)]
    shapes = Shapes(line_chart({"training": many, "held": [(100, 1.0), (199, 0.9)]}, "a loss", 199))
    names = [name for name, _ in shapes.lines]
    assert names == ["curve-0 raw", "curve-0", "curve-1"]
    assert shapes.circles == ["curve-1"] * 2
    raw, smooth = ([y for _, y in points[20:-20]] for _, points in shapes.lines[:2])
    assert max(smooth) - min(smooth) < (max(raw) - min(raw)) / 5
    assert "0.900" in shapes.words


def test_labels_are_escaped_and_do_not_cover_each_other():
    drawing = line_chart({"a": [(1, 0.5)], "b": [(1, 0.5)], "c": [(1, 0.499)]}, '<b>"what"</b>', 1, top=1.0)
    assert "<b>" not in drawing
    heights = [float(found) for found in re.findall(r'class="end[^>]* y="([\d.]+)"', drawing)]
    assert len(heights) == 3
    assert all(b - a >= 11 for a, b in itertools.pairwise(sorted(heights)))


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 800), (3, 4), (0, 1e-3), (-2, 7), (0, 12345)])
def test_ticks_are_few_inside_and_evenly_spaced(low, high):
    found = ticks(low, high)
    assert 2 <= len(found) <= 5
    assert low <= found[0] and found[-1] <= high
    assert len({round(b - a, 9) for a, b in itertools.pairwise(found)}) == 1


@pytest.mark.parametrize(("low", "high"), [(0.01, 3), (0.4, 0.6), (1e-6, 10), (0.9, 11)])
def test_logarithmic_ticks_are_inside(low, high):
    found = log_ticks(low, high)
    assert len(found) >= 2
    assert all(low <= value <= high for value in found)


def test_the_running_mean_is_geometric_on_request():
    curve = [(0, 1.0), (1, 100.0), (2, 1.0)]
    assert running_mean(curve, 1, False)[1] == (1, pytest.approx(34.0))
    assert running_mean(curve, 1, True)[1] == (1, pytest.approx(math.exp(math.log(100) / 3)))

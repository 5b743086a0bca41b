"""Cost over tokens and entries, in small."""

import json
import re

import pytest
import torch

from benchmarks.scaling import UNIT_TOKENS, Point, fit, page, points, rows, series
from benchmarks.subjects import Size

TINY = Size("cpu", torch.float32, 64, 128, 2, 16, 32)


def test_the_line_goes_through_points_on_a_line_and_says_how_far_others_lie() -> None:
    straight = fit([1, 2, 4], [3, 5, 9])
    assert (straight.start, straight.slope, straight.off) == pytest.approx((1, 2, 0), abs=1e-12)
    bent = fit([0, 1, 2], [0, 3, 0])
    assert (bent.start, bent.slope, bent.off) == pytest.approx((1, 0, 2 / 3), abs=1e-12)


def test_both_series_are_measured_and_meet_in_one_point() -> None:
    found = points(TINY, (256, UNIT_TOKENS), (0.01, 0.05), rounds=1)
    assert [point.tokens for point in found["tokens"]] == [256, UNIT_TOKENS]
    assert found["tokens"][-1] == found["density"][0]
    assert all(point.ratio > 0 for row in found.values() for point in row)
    assert len(rows(found)) == 4


def test_the_page_holds_the_points_and_needs_no_network() -> None:
    made = {"tokens": [Point(128, 0.01, 1.1, 0.03), Point(512, 0.01, 1.1, 0.1)]}
    made["density"] = [Point(512, 0.01, 1.1, 0.1), Point(512, 0.05, 1.4, 0.4)]
    text = page(made)
    figures = json.loads(re.search(r"const FIGURES = (\[.*?\]);FIGURES", text)[1])
    assert [figure["data"][0]["x"] for figure in figures] == [x for x, _, _ in series(made).values()]
    assert "<script src" not in text

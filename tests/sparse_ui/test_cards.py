"""Fragments of HTML."""

import pytest

from engine.events import Sample
from engine.planner.plan import Remedy
from sparse_ui import cards

EVIL = '<img src=x onerror="alert(1)">'


@pytest.mark.parametrize(
    "html",
    [
        cards.title(EVIL, EVIL),
        cards.callout([EVIL, EVIL]),
        cards.samples(1, [Sample(EVIL, EVIL, EVIL)]),
        cards.conversation(1, [(EVIL, EVIL)]),
        cards.key_values(EVIL, [(EVIL, EVIL)]),
        cards.log_box(EVIL, EVIL),
        cards.remedy_line(Remedy(EVIL, 1, {}, EVIL, "fits")),
        cards.header("running", EVIL, EVIL, [(EVIL, 1, "p1")], 2),
        cards.table([(EVIL, "")], [{"id": EVIL, "chosen": True, "cells": [""]}]),
    ],
)
def test_words_from_outside_are_escaped(html: str) -> None:
    assert "<img" not in html
    assert 'onerror="' not in html


def test_bar_shares_add_up_to_what_is_used() -> None:
    html = cards.stack_bar([("a", 25, "p1"), ("b", 50, "p2"), ("none", 0, "p3")], 100, 8)
    assert [part.split("%")[0] for part in html.split("width:")[1:]] == ["25.00", "50.00"]


def test_change_shows_a_dash_for_what_is_not_known() -> None:
    assert cards.change(1.25, None, 2) == "1.25 → –"
    assert cards.change(None, None, 2) == "–"

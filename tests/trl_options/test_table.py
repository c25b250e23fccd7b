"""docs/trl-options.md: every option of GRPOConfig is there, and the page is what the cases say."""

from __future__ import annotations

import re

from options import ALL, ELSEWHERE, NOT_RUN, WORDS, cases_of, names, own_names, values_of
from tool import load_tool
from transformers import TrainingArguments
from trl import GRPOConfig


def test_every_option_of_trl_is_tested_or_says_why_not() -> None:
    missing = [name for name in own_names() if not cases_of(name) and name not in NOT_RUN]
    assert not missing
    assert not [name for name in NOT_RUN if cases_of(name)]
    assert {*NOT_RUN, *WORDS} <= {*own_names()}


def test_every_inherited_option_is_tested_or_says_why_not() -> None:
    listed = [name for some in ELSEWHERE.values() for name in some.split()]
    assert len(listed) == len({*listed})
    tested = {name for name in names(TrainingArguments) if cases_of(name)}
    assert {*listed} | tested == {*names(TrainingArguments)}
    assert not {*listed} & tested


def test_a_tested_option_has_a_value_that_is_not_its_default() -> None:
    defaults = {name: repr(getattr(GRPOConfig, name, None)) for name in own_names()}
    tested = [name for name in own_names() if cases_of(name)]
    assert not [name for name in tested if {repr(value) for value in values_of(name)} <= {defaults[name]}]


def test_cases_have_names_of_their_own_and_settings_that_exist() -> None:
    assert len({case.name for case in ALL}) == len(ALL)
    assert not {name for case in ALL for name in case.settings} - {*names(GRPOConfig)}
    assert all(re.fullmatch(r"[a-z0-9_-]+", case.name) for case in ALL)


def test_the_page_is_up_to_date() -> None:
    tool = load_tool("trl_options")
    assert tool.PAGE.read_text(encoding="utf-8") == tool.written(), (
        "python tools/trl_options.py writes it anew"
    )

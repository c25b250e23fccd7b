"""The geometry's page: whole, self-contained and escaped, whatever the responses hold."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers: pip install 'g2rl-kernels[train]'")

from g2rl_kernels.geometry.measure import difference, group_statistics, overall
from g2rl_kernels.geometry.report import MAPS, SHORT, number, page
from g2rl_kernels.geometry.rows import STATISTICS, ModelGeometry

EVIL = '</pre><script>alert("x")</script><img src=http://example.org/x.png> & so on'


def make(name: str = "grpo", problems: int = 3, m: int = 4, seed: int = 0, **options: Any) -> ModelGeometry:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(problems * m, 6, generator=generator) + 0.5
    texts = [f"{EVIL} {i}" for i in range(problems * m)]
    scores = [float(i % 2) for i in range(problems * m)]
    answers = [str(i % 3) for i in range(problems * m)]
    vectors = torch.nn.functional.normalize(torch.randn(problems * m, 4, generator=generator), dim=1)
    found = group_statistics(
        features,
        group_size=m,
        scores=scores,
        texts=texts,
        answers=answers,
        **{"embeddings": vectors, **options},
    )
    samples = {}
    for place, problem in enumerate(found):
        problem |= {"problem": f"<b>p</b>/{place}", "question": f"<i>What</i> is {place}?"}
        for i in range(m):
            row = place * m + i
            sample = {"completion": texts[row], "score": scores[row], "answer": answers[row]}
            samples[problem["problem"], i] = {**sample, "right": scores[row] > 0.5}
    return ModelGeometry(name, f"runs/{name}", {"temperature": 1.0}, found, overall(found), samples)


class Page(HTMLParser):
    """Checks that elements nest, and keeps tags, attributes and text."""

    VOID = ("meta", "br", "line", "rect", "path", "circle")

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def count(self, tag: str, kind: str) -> int:
        return sum(t == tag and kind in (a.get("class") or "").split() for t, a in self.tags)


def test_a_figure_for_every_model() -> None:
    models = [make("grpo"), make("g2rl", seed=1), make("<evil>", seed=2)]
    models[1].difference = difference(models[1].problems, models[0].problems)
    found = Page(page(models, "Title <1>"))
    paired = models[1].difference["cos_mean"]
    assert "g2rl − grpo" in found.text
    assert f"{number('cos_mean', paired['low'])} to {number('cos_mean', paired['high'])}" in found.text
    assert [found.count("svg", kind) for kind in ("density", "bars", "scatter")] == [1, 1, 1]
    for index in range(3):  # one curve, bar and cloud a model
        for tag, kind in (("path", "area"), ("rect", "bar"), ("path", "dots"), ("circle", "ring")):
            drawn = [a for t, a in found.tags if t == tag and a.get("class") == f"m{index} {kind}"]
            assert len(drawn) == 1, (index, kind)
    assert found.count("svg", "map") == 3 * 3
    assert found.count("rect", "pos") + found.count("rect", "neg") == 9 * 16
    for model in models:
        assert model.name in found.text
        for name, value in model.overall.items():
            if value:
                assert number(name, value["mean"]) in found.text
                assert f"{number(name, value['low'])} to {number(name, value['high'])}" in found.text
    assert found.text.count("Most redundant: ") == found.text.count("Most opposed: ") == 3 + 9


def test_nothing_outside_is_asked_for_and_nothing_runs() -> None:
    text = page([make()], EVIL)
    found = Page(text)
    assert not {tag for tag, _ in found.tags} & {"script", "img", "link", "iframe", "object", "embed"}
    for tag, attributes in found.tags:
        assert not any(key in ("src", "href", "action") or key.startswith("on") for key in attributes), tag
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)
    assert style
    assert "url(" not in style[1]
    assert "@import" not in style[1]
    assert "prefers-color-scheme:dark" in style[1]
    assert EVIL in found.text  # as text
    assert "<i>What</i> is 0?" in found.text
    assert "<b>p</b>/0" in found.text


def test_numbers_are_those_of_the_problems() -> None:
    model = make(problems=2)
    text = Page(page([model])).text
    for problem in model.problems:
        for name in STATISTICS.keys() - {"entropy", "length"}:  # which these do not have
            assert number(name, problem[name]) in text
    place = max((0, 1), key=lambda p: model.problems[p]["redundant"]["cosine"])
    best = number("cos_mean", model.problems[place]["redundant"]["cosine"])
    assert text.index(f"Most redundant: gradient cosine {best}") < text.index("Most opposed")
    assert json.loads(json.dumps(model.to_json(), allow_nan=False))["problems"] == model.problems
    assert SHORT.keys() == STATISTICS.keys()
    assert [number("cos_mean", -0.5), number("accuracy", 0.125), number("length", 9.96)] == [
        "−0.500",
        "12.5 %",
        "10.0",
    ]


def test_what_is_not_known_is_left_out() -> None:
    model = make(embeddings=None)
    found = Page(page([model]))
    assert found.count("svg", "scatter") == 0
    assert "semantic" not in found.text
    single = make(problems=1, m=1)  # no pair, no interval
    text = Page(page([single])).text
    assert "no pair of different texts" in text
    zeros = make(problems=1)
    zeros.problems[:] = group_statistics(torch.zeros(4, 3), group_size=4)
    zeros.problems[0] |= {"problem": "p", "question": "?"}
    zeros.overall = overall(zeros.problems)
    Page(page([zeros]))


def test_responses_on_a_map_have_their_numbers() -> None:
    text = page([make(problems=1, m=16)])
    labels = re.findall(r'text-anchor="end">([^<]+)</text>', text.split('<svg class="map"')[1])
    right, wrong = [f"{i}✓" for i in range(1, 16, 2)], [str(i) for i in range(0, 16, 2)]
    assert labels[:16] == right + wrong


def test_models_on_different_problems_and_many_problems() -> None:
    one, other = make("one", problems=9), make("two", problems=3)
    found = Page(page([one, other]))
    assert found.count("svg", "map") <= 2 * MAPS
    assert "9 problems, 4 responses each" in found.text
    long = make("long")
    for sample in long.samples.values():
        sample["completion"] = "a" * 50_000 + "the end"
    assert len(page([long])) < 200_000
    assert "the end" in page([long])

"""What all commands share: `key=value` words as options."""

import argparse

import pytest

from g2rl_kernels.cli.common import as_options


@pytest.fixture
def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    command = parser.add_subparsers().add_parser("head")
    command.add_argument("--max-rounds", type=int)
    command.add_argument("--N", type=int)
    command.add_argument("--quick", action="store_true")
    command.add_argument("files", nargs="*")
    return parser


def test_words_become_options_of_that_name(parser):
    words = ["head", "N=3", "max_rounds=4", "quick=true", "a=b.json", "=5", "--N=2"]
    assert as_options(words, parser) == [
        *("head", "--N=3", "--max-rounds=4", "--quick"),
        *("a=b.json", "=5", "--N=2"),
    ]
    args = parser.parse_args(as_options(words, parser))
    assert (args.N, args.max_rounds, args.quick, args.files) == (2, 4, True, ["a=b.json", "=5"])


def test_a_flag_may_be_false(parser):
    assert as_options(["head", "quick=false"], parser) == ["head"]

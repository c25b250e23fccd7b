"""Questions that are messages, data that changes between runs, and what a checkpoint says about the model."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import LetterTask, make_model, make_tokenizer, make_trainer, without_times

from g2rl_kernels.evaluation.engines import Decoding, TransformersEngine
from g2rl_kernels.models.loading import load_model
from g2rl_kernels.tasks.answers import AnswerTask
from g2rl_kernels.trainer import ConfigError, TrainerConfig, TrainerError
from g2rl_kernels.trainer.checkpoint import find_all
from g2rl_kernels.trainer.sampling import Sampler, render

TEMPLATE = "{% for m in messages %}{{ m['role'][0] }}={{ m['content'] }} {% endfor %}b="
CHAT = [
    {"role": "user", "content": "1+1"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "2+2"},
]


class Asks(LetterTask):
    """A task with these questions."""

    def __init__(self, *questions: Any):
        self.questions = questions

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"question": self.questions[index]}


def chat_tokenizer(template: str | None = TEMPLATE) -> Any:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def prompt(path: Path, question: Any, **keys: Any) -> str:
    trainer = make_trainer(path, task=Asks(question), tokenizer=chat_tokenizer(), **keys)
    text, special = render(question, trainer.tokenizer, trainer.config)
    assert not special
    assert trainer.sampler.encode({"question": question}) == trainer.tokenizer(text)["input_ids"]
    return text


# --- messages ----------------------------------------------------------------------------------------------


def test_messages_are_rendered_as_they_are(tmp_path: Path) -> None:
    before = json.dumps(CHAT)
    assert prompt(tmp_path, CHAT) == "u=1+1 a=2 u=2+2 b="
    assert prompt(tmp_path, CHAT, system_prompt="be") == "s=be u=1+1 a=2 u=2+2 b="
    system = [{"role": "system", "content": "cab"}, CHAT[0]]
    assert prompt(tmp_path, system, system_prompt="be") == "s=cab u=1+1 b="
    assert (
        prompt(tmp_path, CHAT, prompt_template="{question} abc") == "u=1+1 a=2 u=2+2 abc b="
    )  # the last one
    assert prompt(tmp_path, "1+1", prompt_template="{question} abc") == "u=1+1 abc b="
    assert json.dumps(CHAT) == before


@pytest.mark.parametrize(
    ("template", "keys", "message"),
    [
        (
            None,
            {},
            "the tokenizer has no chat template: use a model with a chat template and chat_template: auto",
        ),
        (
            TEMPLATE,
            {"chat_template": "never"},
            "but chat_template is never: use a model with a chat template",
        ),
        (
            "{{ raise_exception('no way') }}",
            {},
            "chat template: no way: drop system_prompt, or change the mess",
        ),
    ],
)
def test_messages_that_cannot_be_rendered_before_work(
    tmp_path: Path, template: str | None, keys: dict[str, Any], message: str
) -> None:
    rows = [{"question": "1+1", "answer": "2"}, {"question": CHAT, "answer": "4"}]  # not the first item
    if template and "raise" in template:
        template = "{% if messages[1:] %}{{ raise_exception('no way') }}{% endif %}a"
    with pytest.raises(ConfigError, match=message) as caught:
        make_trainer(tmp_path, task=AnswerTask(rows, "here"), tokenizer=chat_tokenizer(template), **keys)
    assert "\n" not in str(caught.value)


def test_messages_of_computed_items_that_cannot_be_rendered_name_the_item(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, task=Asks("1+1", CHAT), shuffle=False)
    trainer.sampler.draw(1)
    with pytest.raises(
        TrainerError, match=r"Asks\[1\]: question: it is a list of messages, but the tokenizer"
    ):
        trainer.sampler.draw(1)


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ([], r"Asks\[0\]: question=\[\]: needs at least one message"),
        ([{"role": "user", "content": None}], r"Asks\[0\]: question\[0\]: content=None: needs a text"),
        ([*CHAT[:2]], r"Asks\[0\]: question\[1\] is the assistant's"),
    ],
)
def test_wrong_messages_of_a_task_before_work(tmp_path: Path, question: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_trainer(tmp_path, task=Asks(question), tokenizer=chat_tokenizer())


def test_a_run_on_messages(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path, task=Asks(CHAT, "1+1"), tokenizer=chat_tokenizer(), steps=2, report_every=1
    )
    trainer.train()
    lines = (tmp_path / "samples.jsonl").read_text().splitlines()
    asked = {json.loads(line)["question"] for line in lines}
    assert asked <= {"user: 1+1\nassistant: 2\nuser: 2+2", "1+1"}
    assert "user: 1+1 assistant: 2 user: 2+2" in (tmp_path / "samples.md").read_text() or asked == {"1+1"}


# --- data that changes -------------------------------------------------------------------------------------


def sums(path: Path, *answers: str) -> AnswerTask:
    return AnswerTask(
        [{"question": f"{i}+1=", "answer": answer} for i, answer in enumerate(answers)], str(path)
    )


def test_a_run_does_not_go_on_with_other_data(tmp_path: Path) -> None:
    spec = {"kind": "jsonl", "path": "sums.jsonl"}
    keys: dict[str, Any] = {"tasks": [spec, spec]}
    kept = LetterTask()
    make_trainer(tmp_path, task=[kept, sums(tmp_path, "1", "2", "3")], steps=1, **keys).train()
    before = sorted(tmp_path.rglob("*"))
    for answers, message in (
        (
            ("1", "2", "4"),
            r"of tasks\.1 \(jsonl sums\.jsonl\) has changed since: 3 items with another content",
        ),
        (("1", "2"), r"of tasks\.1 \(jsonl sums\.jsonl\) has changed since: 3 items then, 2 now"),
    ):
        other = make_trainer(tmp_path, task=[kept, sums(tmp_path, *answers)], steps=2, **keys)
        for call in (other.resume_point, other.train):
            with pytest.raises(ConfigError, match=message) as caught:
                call()
        assert "choose another output_dir, or resume=overwrite to start over" in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before
    same = make_trainer(tmp_path, task=[kept, sums(tmp_path, "1", "2", "3")], steps=2, **keys)
    assert [m["step"] for m in same.train()] == [1, 2]
    keys["resume"] = "overwrite"
    anew = make_trainer(tmp_path, task=[kept, sums(tmp_path, "1", "2", "4")], steps=1, **keys)
    assert [m["step"] for m in anew.train()] == [1]


def test_another_number_of_tasks(tmp_path: Path) -> None:
    make_trainer(tmp_path, task=[LetterTask(), LetterTask()], steps=1).train()
    with pytest.raises(ConfigError, match="there were 2 tasks then, 1 now"):
        make_trainer(tmp_path, task=LetterTask(), steps=2).train()


def test_a_checkpoint_without_fingerprints_is_used_with_a_warning(tmp_path: Path) -> None:
    make_trainer(tmp_path, steps=1).train()
    file = find_all(tmp_path)[-1] / "state.json"
    state = json.loads(file.read_text())
    del state["data"]
    file.write_text(json.dumps(state))
    with pytest.warns(UserWarning, match="earlier version: it cannot tell if the data has changed"):
        assert [m["step"] for m in make_trainer(tmp_path, steps=2).train()] == [1, 2]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        make_trainer(tmp_path, steps=3).train()  # from the new checkpoint


# --- the model in a checkpoint -----------------------------------------------------------------------------


def test_a_checkpoint_ends_responses_as_the_run_does(tmp_path: Path) -> None:
    """An end token known in generation_config alone; the run resumed and the checkpoint evaluated agree."""

    def started() -> Any:
        model = make_model()
        model.generation_config.update(eos_token_id=[1, 7], top_k=7, do_sample=True)
        return model

    keys: dict[str, Any] = {"checkpoint_every": 1, "temperature": 2.0, "max_new_tokens": 12}
    trainer = make_trainer(tmp_path, model=started(), steps=1, **keys)
    assert trainer.sampler.end_tokens == [1, 7]
    trainer.train()
    (path,) = find_all(tmp_path)
    saved = json.loads((path / "generation_config.json").read_text())
    assert (saved["eos_token_id"], saved["top_k"]) == ([1, 7], 7)

    config = TrainerConfig.from_dict({**trainer.config.to_dict(), "model": str(path), "device": "cpu"})
    model, tokenizer = load_model(config)
    assert model.config.eos_token_id == 1
    assert Sampler(model, tokenizer, [LetterTask()], config).end_tokens == [1, 7]

    resumed = make_trainer(tmp_path, model=started(), steps=2, **keys)
    resumed.begin()
    assert resumed.sampler.end_tokens == [1, 7]
    prompts = [resumed.sampler.encode({"question": question}) for question in ("1+1=", "2+2=a")]
    by_run = TransformersEngine(resumed.model, resumed.tokenizer, resumed.config, Decoding(n=8))
    by_checkpoint = TransformersEngine(*load_model(config), config, Decoding(n=8))
    ours, theirs = by_run.sample(prompts, [3, 4]), by_checkpoint.sample(prompts, [3, 4])
    assert ours == theirs
    assert any(one.tokens[-1] == 7 for responses in theirs for one in responses)

    onwards = make_trainer(tmp_path / "onwards", model=load_model(config)[0], steps=1, **keys)
    torch.manual_seed(5)
    first = onwards.sampler.sample().completions
    torch.manual_seed(5)
    resumed.sampler.position = 0
    assert resumed.sampler.sample().completions == first


def test_resuming_keeps_the_numbers_with_an_end_token_of_its_own(tmp_path: Path) -> None:
    def run(path: Path, steps: int) -> list[dict[str, Any]]:
        model = make_model()
        model.generation_config.update(eos_token_id=[1, 7])
        return make_trainer(path, model=model, steps=steps, max_new_tokens=12).train()

    whole = run(tmp_path / "whole", 2)
    run(tmp_path / "parts", 1)
    assert [without_times(m) for m in run(tmp_path / "parts", 2)] == [without_times(m) for m in whole]

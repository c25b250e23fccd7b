"""Tasks: prompts, and the verification of completions. base.py has the protocol, sources.py reads recipes.

A task is any object with three methods; it inherits from nothing:

    len(task)                    -> int    how many items there are
    task[i]                      -> dict   with "question", and whatever its score needs
    task.score(completion, item) -> float  1 for a right completion; less is partial credit

A question is a text, or a list of messages, each with the texts "role" and "content": the chat template
renders them as they are. system_prompt comes first unless they have a system message, prompt_template is put
around the last one, and without a chat template they are an error.

For votes (labels=majority, maj@k) it may have a fourth; without it whole completions are compared:

    task.answer(completion, item) -> str | None   the final answer, the same text for equal ones

A run is resumed with the same data only. Items of files and data sets are compared whole, items that a task
computes by their number and the first question; `task.fingerprint() -> str`, if there, replaces that.

A configuration lists tasks under `tasks`, each as one of these mappings; their items are joined:

    {kind: reasoning_gym, name: chain_sum, size: 1000, seed: 0, cfg: {max_terms: 2}, extract: last_number}
    {kind: jsonl, path: train.jsonl, question: problem, answer: solution}       # checked by MathJudge
    {kind: hub, path: org/dataset, split: train, question: ..., answer: ...}    # the same, from the hub
    {kind: python, function: my_package.my_module:make_task, args: {level: 3}}  # returns any task

`question` and `answer` name fields (defaults: themselves); `name` picks a configuration of a hub data set.
jsonl and hub take `score: module:function`, called with (completion, item), in place of `MathJudge`. With
`choices: options` they are multiple choice, and `score` is not allowed: options holds a list of texts, and
the answer is a letter, an index from 0 (a number) or the option's text; or {"text": [...], "label": [...]},
and the answer is a label. `extract` says which part of the completion is the answer: all (default) | boxed |
answer_tag | last_number. All rows are checked at the start; an error names item and field.

docs/evaluation.md says what counts as right; mathematics/ holds its rules.
"""

from __future__ import annotations

from .base import Item, Task, final_answer, item_of, score_completion
from .sources import load_task, load_tasks

__all__ = ["Item", "Task", "final_answer", "item_of", "load_task", "load_tasks", "score_completion"]

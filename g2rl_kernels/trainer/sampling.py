"""Sampling: chooses the next prompts, tokenises them, and generates responses."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, TrainerError, one_line
from ..head.support.spec import Support
from ..models.lm_head import LMHead
from ..models.responses import continuations
from ..tasks.base import Item, Question, Task, item_of
from .config import TrainerConfig
from .truncation import KeptIds, Truncation, joined, recorder


@dataclass
class Rollout:
    """S responses, those to one prompt in consecutive rows; P, L: longest prompt and response, in tokens."""

    ids: Tensor  # [S, P + L] int64, prompts padded on the left, responses on the right
    attention: Tensor  # [S, P + L] int64, 0 on padding, else 1
    mask: Tensor  # [S, L] bool, True on response tokens, including the end token
    truncated: Tensor  # [S] bool, True for a response without an end token
    items: list[tuple[Task, Item]]
    completions: list[str]
    kept: Support | None = None  # ids that sampling kept, of the S x L positions row by row; None: all

    def support(self, rows: slice) -> Support | None:
        """`support` of the ops for the response tokens of some responses, packed; None: all ids."""
        if self.kept is None:
            return None
        return self.kept.of(self.mask[rows].flatten().nonzero()[:, 0] + rows.start * self.mask.shape[1])

    def truncation(self) -> dict[str, float]:
        """Metrics of truncated sampling: ids that a token was drawn from, mean over tokens with a list; and
        the share of tokens that count as drawn from all."""
        support = self.support(slice(0, len(self.ids)))
        if support is None or support.whole is None:
            return {}
        listed, tokens = int((~support.whole).sum()), max(len(support.whole), 1)
        return {"kept_ids": len(support.ids) / max(listed, 1), "whole_tokens": 1 - listed / tokens}

    def rows(self, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """ids, attention and mask of some responses, without columns of padding alone."""
        prompt = self.ids.shape[1] - self.mask.shape[1]
        length = max(int(self.mask[rows].sum(1).max()), 1)
        first = int(self.attention[rows].argmax(1).min())
        columns = slice(first, prompt + length)
        return self.ids[rows, columns], self.attention[rows, columns], self.mask[rows, :length]


class Sampler:
    """Draws prompts from `tasks` and samples responses from `model`. Its only state is `position`.

    head: of `find_head`; if it `shares`, prefixes of several responses are run once: the same samples but for
    rounding. Raises ConfigError if tokenizer, model and configuration do not fit together.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        tasks: Sequence[Task],
        config: TrainerConfig,
        head: LMHead | None = None,
    ):
        self.model, self.tokenizer, self.tasks, self.head = model, tokenizer, tasks, head
        self.config = config.resolved(model.device.type)
        self.position = 0  # prompts drawn so far
        self._shuffled = -1, torch.empty(0)  # an epoch and the order of its prompts
        prepare_tokenizer(tokenizer, model.config, config)
        self.own_generation = _savable(model.generation_config)  # restored when the model is saved
        self.end_tokens = end_tokens(tokenizer, self.own_generation, config)
        # Responses must come from softmax(z / temperature), the distribution that the ops score. generate()
        # takes settings missing here (top-k, penalties ...) from the model's generation_config: empty it.
        # Under bf16 autocast generate() rounds logits to bf16; log-probs and updates do not.
        from transformers import GenerationConfig

        tokens = {"eos_token_id": self.end_tokens, "pad_token_id": tokenizer.pad_token_id}
        model.generation_config = GenerationConfig(**tokens)
        self.truncation = Truncation(config)
        self.generation = GenerationConfig(
            do_sample=True,
            temperature=1.0 if self.truncation else config.temperature,  # the recorder divides
            top_k=0,
            top_p=1.0,
            max_new_tokens=config.max_new_tokens,
            **tokens,
        )

    def sample(self) -> Rollout:
        """`group_size` responses to each of the next prompts."""
        size = self.config.group_size
        drawn = self.draw(self.config.batch_size // size)
        return self.respond([prompt for prompt in drawn for _ in range(size)])

    @torch.no_grad()
    def respond(self, drawn: Sequence[tuple[Task, Item, list[int]]]) -> Rollout:
        """One response to each of these (task, item, prompt token ids)."""
        config, pad, device = self.config, self.tokenizer.pad_token_id, self.model.device
        self.model.eval()
        width = max(len(prompt) for _, _, prompt in drawn)
        ids = torch.tensor([[pad] * (width - len(p)) + p for _, _, p in drawn], device=device)
        attention = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for _, _, p in drawn], device=device)
        responses: list[Tensor] = []
        kept: list[KeptIds] = []
        size = config.generate_batch_size
        for batch, seen in zip(ids.split(size), attention.split(size)):
            if self.truncation and config.keep_sampling_mask:
                kept.append(KeptIds())
            with autocast(config, device):
                responses += self._continue(batch, seen, kept[-1] if kept else None)

        response = torch.nn.utils.rnn.pad_sequence(responses, batch_first=True, padding_value=pad)
        sampled = torch.tensor([len(r) for r in responses], device=device)  # batches differ in width
        inside = torch.arange(response.shape[1], device=device) < sampled[:, None]
        ends = torch.isin(response, torch.tensor(self.end_tokens, device=device)) & inside
        mask = inside & (ends.cumsum(1) - ends.long() == 0)  # up to and including the first end token
        text = cache(lambda tokens: response_text(tokens, self.tokenizer, self.end_tokens))  # equal ones once
        lengths = mask.sum(1).tolist()
        completions = [text(tuple(tokens[:length])) for tokens, length in zip(response.tolist(), lengths)]
        truncated = ~ends.any(1)
        if config.truncated == "drop":
            mask = mask & ~truncated[:, None]
        return Rollout(
            ids=torch.cat([ids, response], 1),
            attention=torch.cat([attention, mask.long()], 1),
            mask=mask,
            truncated=truncated,
            items=[(task, item) for task, item, _ in drawn],
            completions=completions,
            kept=joined(kept, response.shape[1]) if kept else None,
        )

    def _continue(self, ids: Tensor, attention: Tensor, kept: KeptIds | None) -> Tensor:
        """Sampled responses [B, L] to prompts [B, P]; both ways draw the same random numbers. Fills kept."""
        settings = self.generation
        if self.head is None or not self.head.shares:
            given: dict[str, Any] = {"input_ids": ids, "attention_mask": attention}
            if self.truncation:
                given["logits_processor"] = recorder(self.truncation, kept)
            out: Tensor = self.model.generate(**given, generation_config=settings)
            return out[:, ids.shape[1] :]

        def choose(logits: Tensor, row: Tensor) -> Tensor:
            logits = self.truncation(logits)
            if kept is not None:
                kept.add(logits[row])
            return torch.multinomial(logits.softmax(-1)[row], 1)[:, 0]

        ends, pad = settings.eos_token_id, settings.pad_token_id
        return continuations(self.head, ids, attention, choose, ends, pad, settings.max_new_tokens)

    def draw(self, count: int) -> list[tuple[Task, Item, list[int]]]:
        """The next `count` prompts, in an order set by seed and position alone, without those too long.

        Raises TrainerError for an item that cannot be a prompt, and if every prompt is too long.
        """
        total, skipped = sum(map(len, self.tasks)), 0
        drawn: list[tuple[Task, Item, list[int]]] = []
        while len(drawn) < count:
            epoch, index = divmod(self.position, total)
            self.position += 1
            if self.config.shuffle:
                index = int(self._order(epoch, total)[index])
            task = self.tasks[0]
            for task in self.tasks:
                if index < len(task):
                    break
                index -= len(task)
            item = item_of(task, index)
            try:
                prompt = self.encode(item)
            except ConfigError as error:
                raise ConfigError(f"task: {type(task).__name__}[{index}]: {error}") from None
            if not prompt:
                raise TrainerError(
                    f"task: {type(task).__name__}[{index}] is a prompt without tokens: remove it, or set "
                    "system_prompt or prompt_template"
                )
            where = f"task: {type(task).__name__}[{index}]"
            check_embedded(prompt, embedded_rows(self.model), self.tokenizer, where)
            if len(prompt) <= self.config.max_prompt_tokens:
                drawn.append((task, item, prompt))
                skipped = 0
            else:
                skipped += 1
            if skipped == total:
                limit = self.config.max_prompt_tokens
                raise TrainerError(f"every prompt is longer than max_prompt_tokens={limit}: raise it")
        return drawn

    def encode(self, item: Item) -> list[int]:
        """Token ids of an item's prompt, by the chat template or as plain text.

        Raises ConfigError if the chat template refuses the item, or is needed and missing.
        """
        text, special = render(item["question"], self.tokenizer, self.config)
        return self.tokenizer(text, add_special_tokens=special)["input_ids"]

    def _order(self, epoch: int, total: int) -> Tensor:
        if self._shuffled[0] != epoch:
            generator = torch.Generator().manual_seed(self.config.seed + 1_000_003 * epoch)
            self._shuffled = epoch, torch.randperm(total, generator=generator)
        return self._shuffled[1]


def render(question: Question, tokenizer: Any, config: TrainerConfig) -> tuple[str, bool]:
    """The prompt's text, and whether the tokenizer adds special tokens (a chat template brings its own).

    prompt_template is put around a text, or around the last one of several messages. system_prompt comes
    first, unless there is a system message. Raises ConfigError if the chat template refuses the messages, and
    for messages without a chat template.
    """
    chat = isinstance(question, list)
    messages = list(question) if isinstance(question, list) else [{"role": "user", "content": question}]
    text = config.prompt_template.replace("{question}", messages[-1]["content"])
    if config.chat_template == "always" or (config.chat_template == "auto" and tokenizer.chat_template):
        messages[-1] = {**messages[-1], "content": text}
        if config.system_prompt and all(message["role"] != "system" for message in messages):
            messages.insert(0, {"role": "system", "content": config.system_prompt})
        try:  # chat templates are programs that come with the model; some refuse a system role
            rendered: str = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, **config.chat_template_args
            )
        except Exception as error:
            remedy = "change the messages" if chat else "set chat_template: never"
            raise ConfigError(
                f"chat template: {one_line(error, 200)}: drop system_prompt, or {remedy}"
            ) from error
        return rendered, False
    if chat:
        why = "chat_template is never" if tokenizer.chat_template else "the tokenizer has no chat template"
        raise ConfigError(
            f"question: it is a list of messages, but {why}: use a model with a chat template and "
            "chat_template: auto, or give the question as a text"
        )
    return f"{config.system_prompt}\n\n{text}" if config.system_prompt else text, True


def prepare_tokenizer(tokenizer: Any, model_config: Any, config: TrainerConfig) -> None:
    """Sets the pad token; raises ConfigError if tokenizer, model and configuration do not fit together."""
    if config.pad_token is not None:
        if config.pad_token not in tokenizer.get_vocab():
            raise ConfigError(f"pad_token: {config.pad_token!r} is not in the tokenizer's vocabulary")
        tokenizer.pad_token = config.pad_token
    if tokenizer.pad_token_id is None:
        hint = tokenizer.eos_token or "<a token that the model never writes>"
        raise ConfigError(f"tokenizer: it has no pad token; set pad_token: {hint!r} in the configuration")
    rows = getattr(model_config.get_text_config(), "vocab_size", None)
    if rows and tokenizer.pad_token_id >= rows:
        hint = tokenizer.eos_token or "<a token that the model knows>"
        raise ConfigError(
            f"tokenizer: pad token {tokenizer.pad_token!r} is number {tokenizer.pad_token_id}, but the model "
            f"embeds {rows} tokens: set pad_token: {hint!r}, or resize_token_embeddings(len(tokenizer))"
        )
    if config.chat_template == "always" and not tokenizer.chat_template:
        raise ConfigError("chat_template=always: this tokenizer has none; use never and a prompt_template")
    check_room(config.max_prompt_tokens, config.max_new_tokens, model_config, "max_prompt_tokens")


def check_room(prompt: int, new: int, model_config: Any, what: str, option: str | None = None) -> None:
    """Raises ConfigError if a prompt of `prompt` tokens leaves no room for `new` in the model's positions.

    what: names the prompt; option: sets `new`, where the length of the prompt is given.
    """
    limit = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    if limit and prompt + new > limit:
        remedy = "lower one"
        if option is not None:
            room = limit - prompt
            remedy = (
                f"lower {option} to {room} or less" if room > 0 else "shorten the prompt, or leave it out"
            )
        raise ConfigError(
            f"{what} + max_new_tokens = {prompt + new}: the model has {limit} positions; {remedy}"
        )


def embedded_rows(model: Any) -> int:
    """How many tokens the model embeds, also where its weights are sharded."""
    embeddings = model.get_input_embeddings()
    return int(getattr(embeddings, "num_embeddings", None) or len(embeddings.weight))


def check_embedded(ids: Iterable[int], rows: int, tokenizer: Any, where: str) -> None:
    """Raises TrainerError for a token that a model of `rows` tokens has no embedding for.

    where: what has the token, e.g. "task: JsonlTask[3]".
    """
    token = max(ids, default=0)
    if token >= rows:
        name = tokenizer.convert_ids_to_tokens(token)
        raise TrainerError(
            f"{where} has the token {name!r}, number {token}, but the model embeds {rows} tokens: "
            "resize_token_embeddings(len(tokenizer)) and save the model, or use the model's own tokenizer"
        )


def end_tokens(tokenizer: Any, generation_config: Any, config: TrainerConfig) -> list[int]:
    """Ids of the tokens that end a response: the model's, the tokenizer's, and stop_tokens."""
    own = generation_config.eos_token_id
    ends = {*(own if isinstance(own, (list, tuple)) else [own]), tokenizer.eos_token_id}
    for token in config.stop_tokens:
        if not isinstance(token, str) or token not in tokenizer.get_vocab():
            raise ConfigError(f"stop_tokens: {token!r} is not a token of this tokenizer")
        ends.add(tokenizer.convert_tokens_to_ids(token))
    if ends == {None}:
        raise ConfigError("model: no end token is known: set stop_tokens: ['<its token>']")
    return sorted(ends - {None})


def response_text(tokens: Sequence[int], tokenizer: Any, ends: Sequence[int]) -> str:
    """The text of a response, without padding and end tokens.

    Other special tokens stay: some tokenizers have tags such as <answer> among them, which verifiers look
    for. A token of `ends` (`end_tokens`) that is no special token stays too: it may be a part of the answer.
    """
    special = {*tokenizer.all_special_ids}
    dropped = {tokenizer.pad_token_id, tokenizer.eos_token_id, *(end for end in ends if end in special)}
    text: str = tokenizer.decode([t for t in tokens if t not in dropped], skip_special_tokens=False)
    return text


def _savable(generation: Any) -> Any:
    """The model's generation settings, or only its end tokens if transformers would refuse to save them."""
    try:
        generation.validate(strict=True)
        return generation
    except ValueError:
        return type(generation)(eos_token_id=generation.eos_token_id, pad_token_id=generation.pad_token_id)


def autocast(config: TrainerConfig, device: torch.device) -> AbstractContextManager:
    """A context for one forward pass, with matrix products in bfloat16 if the (resolved) `config` says so."""
    # One for each forward pass: autocast caches its casts of the weights. A cast must not outlive an update,
    # and one made without a gradient must not be used where a gradient is needed.
    return torch.autocast(device.type, torch.bfloat16, enabled=config.autocast == "bfloat16")

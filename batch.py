"""A batch of responses: the tensors that a rollout gives and that every update learns from, and its parts."""

import random
from dataclasses import dataclass, field

import torch
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from plumbing.processes import most


@dataclass
class Rollouts:
    """B responses to P prompts, G to each, in prompt order: rows 0..G-1 belong to prompt 0, the next G to prompt 1, ...

    Prompts are padded on the left and responses on the right, so every response begins in the same column L.
    T is the longest response. The end token is part of its response, even where it is the padding token too.
    """

    input_ids: torch.Tensor  # [B, L + T] prompt and response tokens
    attention_mask: torch.Tensor  # [B, L + T] 1 on real tokens, 0 on padding
    response_mask: torch.Tensor  # [B, T] True on response tokens, the end token included
    sampler_logp: torch.Tensor  # [B, T] log-probs under the distribution that was sampled; 0 off the mask
    prompt_index: torch.Tensor  # [B] which prompt a row belongs to
    texts: list[str]  # B responses, decoded without end and padding tokens
    finish_reasons: list[str]  # B times "stop" (end token or stop string) or "length" (cut by the limit)
    # per-response [B] or per-token [B, T]: "row" from collate, and what the scripts add (rewards, old_logp, ...)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    def __setitem__(self, name: str, tensor: torch.Tensor) -> None:
        assert len(tensor) == len(self.texts), f"{name} has {len(tensor)} rows, the batch {len(self.texts)}"
        self.tensors[name] = tensor

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    @property
    def prompt_width(self) -> int:
        """L, the number of columns before the responses."""
        return self.input_ids.shape[1] - self.response_mask.shape[1]

    @property
    def response_ids(self) -> torch.Tensor:
        """[B, T] response tokens, padded on the right."""
        return self.input_ids[:, self.prompt_width :]

    @property
    def lengths(self) -> torch.Tensor:
        """[B] response lengths |o_i| in tokens."""
        return self.response_mask.sum(1)

    @property
    def prompt_lengths(self) -> torch.Tensor:
        """[B] prompt lengths in tokens."""
        return self.attention_mask[:, : self.prompt_width].sum(1)

    def select(self, rows: torch.Tensor) -> "Rollouts":
        """The given rows, in that order, without the padding that only the other rows needed."""
        start = self.prompt_width - int(self.prompt_lengths[rows].max())
        t = int(self.lengths[rows].max())
        end = self.prompt_width + t
        tensors = {}
        for name, x in self.tensors.items():
            tensors[name] = x[rows, :t] if x.dim() == 2 else x[rows]
        return Rollouts(
            input_ids=self.input_ids[rows, start:end],
            attention_mask=self.attention_mask[rows, start:end],
            response_mask=self.response_mask[rows, :t],
            sampler_logp=self.sampler_logp[rows, :t],
            prompt_index=self.prompt_index[rows],
            texts=[self.texts[i] for i in rows.tolist()],
            finish_reasons=[self.finish_reasons[i] for i in rows.tolist()],
            tensors=tensors,
        )

    def minibatch_rows(self, count: int, seed: int, epoch: int) -> list[torch.Tensor]:
        """`count` random parts of the batch, alike in size as far as possible, each as row numbers in order.

        seed: of the step; every step and every epoch has parts of its own
        """
        order = list(range(len(self.texts)))
        random.Random(f"minibatches {seed} {epoch}").shuffle(order)
        parts = torch.tensor(order).tensor_split(count)
        return [part.sort().values.to(self.input_ids.device) for part in parts]

    def microbatches(self, rows: torch.Tensor, budget: int, together: int = 1):
        """Split the rows into batches of at most `budget` tokens, padding included, and yield them.

        A row longer than that is a batch of its own. Rows of like length share a batch, since each is padded to the
        longest one in it. With together=2 the rows 2i and 2i + 1, which are a pair, stay in one batch.
        """
        units = rows.view(-1, together)  # [R, together] the rows of a unit stay together
        parts = self.parts(units, budget)
        for part in split(parts, most(len(parts))):
            yield self.select(units[sorted(part)].flatten())  # sorted: neighbours share their prompt

    def parts(self, units: torch.Tensor, budget: int) -> list[list[int]]:
        """The numbers of R units [R, together], in parts of at most `budget` tokens; a longer unit goes alone."""
        together = units.shape[1]
        prompt_lengths = self.prompt_lengths[units].amax(1).tolist()  # R numbers
        response_lengths = self.lengths[units].amax(1).tolist()  # R numbers
        longest_first = sorted(range(len(units)), key=lambda i: (response_lengths[i], i), reverse=True)
        parts = []
        part = []
        prompt_width = 0
        response_width = 0
        for i in longest_first:
            prompt_width = max(prompt_width, prompt_lengths[i])
            response_width = max(response_width, response_lengths[i])
            tokens = (len(part) + 1) * together * (prompt_width + response_width)
            if part and tokens > budget:
                parts.append(part)
                part = []
                prompt_width = prompt_lengths[i]
                response_width = response_lengths[i]
            part.append(i)
        if part:
            parts.append(part)
        return parts


def split(parts: list[list], count: int) -> list[list]:
    """The parts, the largest halved until there are `count` of them."""
    parts = list(parts)
    while len(parts) < count:
        largest = max(range(len(parts)), key=lambda i: len(parts[i]))
        part = parts[largest]
        half = len(part) // 2
        parts[largest : largest + 1] = [part[:half], part[half:]]
    return parts


def join(batches: list[Rollouts]) -> Rollouts:
    """The rows of these batches as one batch, one batch after the other; its prompts are numbered anew.

    Of their tensors only "row" is kept.
    """
    L = max(batch.prompt_width for batch in batches)
    T = max(batch.response_mask.shape[1] for batch in batches)
    parts = {"input_ids": [], "attention_mask": [], "response_mask": [], "sampler_logp": []}
    prompt_index = []
    prompts = 0  # so far
    texts = []
    finish_reasons = []
    for batch in batches:
        left = L - batch.prompt_width
        right = T - batch.response_mask.shape[1]
        parts["input_ids"].append(pad(batch.input_ids, (left, right)))  # with 0: no mask has these places
        parts["attention_mask"].append(pad(batch.attention_mask, (left, right)))
        parts["response_mask"].append(pad(batch.response_mask, (0, right)))
        parts["sampler_logp"].append(pad(batch.sampler_logp, (0, right)))
        found, numbers = batch.prompt_index.unique_consecutive(return_inverse=True)
        prompt_index.append(numbers + prompts)
        prompts += len(found)
        texts += batch.texts
        finish_reasons += batch.finish_reasons
    tensors = {name: torch.cat(x) for name, x in parts.items()}
    batch = Rollouts(**tensors, prompt_index=torch.cat(prompt_index), texts=texts, finish_reasons=finish_reasons)
    batch["row"] = torch.arange(len(texts), device=batch.input_ids.device)  # [B]
    return batch


def left_pad(prompts: list[list[int]], pad_id: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask of P prompts, [P, L] each."""
    ids = [torch.tensor(prompt) for prompt in prompts]
    ones = [torch.ones(len(prompt), dtype=torch.long) for prompt in prompts]
    ids = pad_sequence(ids, batch_first=True, padding_value=pad_id, padding_side="left")
    mask = pad_sequence(ones, batch_first=True, padding_value=0, padding_side="left")
    return ids.to(device), mask.to(device)


def right_pad(rows: list[list], fill, device) -> torch.Tensor:
    """[B, T] B lists of numbers as one tensor; shorter lists are filled up with `fill`."""
    width = max(len(row) for row in rows)
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows], device=device)


def collate(
    prompts: list[list[int]],
    responses: list[list[int]],
    logps: list[list[float]],
    finish_reasons: list[str],
    tokenizer,
    device,
    ends: set[int] = frozenset(),
) -> Rollouts:
    """The batch of P prompts and B = P * G responses in prompt order, all as token ids.

    logps: the log-prob of each response token under the distribution that was sampled
    finish_reasons: "stop" or "length" for each response
    ends: the tokens that end a response, which are no part of its text
    """
    group_size = len(responses) // len(prompts)
    prompt_index = torch.arange(len(prompts), device=device).repeat_interleave(group_size)  # [B]
    prompt_ids, prompt_mask = left_pad(prompts, tokenizer.pad_token_id, device)  # [P, L] each
    response_ids = right_pad(responses, tokenizer.pad_token_id, device)  # [B, T]
    # The mask comes from the lengths: compared with the padding token it would lose end tokens that are the same.
    response_mask = right_pad([[True] * len(response) for response in responses], False, device)  # [B, T]
    batch = Rollouts(
        input_ids=torch.cat([prompt_ids[prompt_index], response_ids], dim=1),  # [B, L + T]
        attention_mask=torch.cat([prompt_mask[prompt_index], response_mask.long()], dim=1),  # [B, L + T]
        response_mask=response_mask,
        sampler_logp=right_pad(logps, 0.0, device),  # [B, T]
        prompt_index=prompt_index,
        texts=[response_text(response, tokenizer, ends) for response in responses],
        finish_reasons=finish_reasons,
    )
    batch["row"] = torch.arange(len(responses), device=device)  # [B] of a part: the row numbers in the whole batch
    return batch


def response_text(ids: list[int], tokenizer, ends: set[int]) -> str:
    """The text of a response, which is what rewards see: all tokens but those that end or pad it.

    Other special tokens stay: in some models <think> or <answer> is one.
    """
    hidden = {tokenizer.eos_token_id, tokenizer.pad_token_id, *ends}
    kept = [token for token in ids if token not in hidden]
    return tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)

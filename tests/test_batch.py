"""Batches of responses: padding, masks, and their parts."""

import copy

import pytest
import torch
from conftest import assert_end_tokens_are_trained, make_sampler

from batch import collate, join
from logprobs import token_logprobs


def test_collate_pads_prompts_left_and_responses_right(tiny):
    logps = [[-1.0], [-2.0, -3.0], [-4.0] * 3, [-5.0]]
    reasons = ["length", "stop", "length", "stop"]
    batch = collate([[5, 6], [7]], [[8], [9, 1], [8, 8, 8], [1]], logps, reasons, tiny[1], "cpu")
    assert batch.input_ids.tolist() == [[5, 6, 8, 0, 0], [5, 6, 9, 1, 0], [0, 7, 8, 8, 8], [0, 7, 1, 0, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [0, 1, 1, 1, 1], [0, 1, 1, 0, 0]]
    assert batch.response_mask.tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1], [1, 0, 0]]
    assert batch.sampler_logp.tolist() == [[-1, 0, 0], [-2, -3, 0], [-4, -4, -4], [-5, 0, 0]]
    assert batch.prompt_index.tolist() == [0, 0, 1, 1]
    assert batch.lengths.tolist() == [1, 2, 3, 1]
    assert batch.prompt_lengths.tolist() == [2, 2, 1, 1] and batch.prompt_width == 2
    assert batch.response_ids.tolist() == [[8, 0, 0], [9, 1, 0], [8, 8, 8], [1, 0, 0]]


def test_end_token_is_trained_also_where_it_is_the_padding_token(tiny, prompts):
    policy, tokenizer = tiny[0], copy.deepcopy(tiny[1])
    tokenizer.pad_token = tokenizer.eos_token
    batch = make_sampler(policy, tokenizer).generate(prompts, n=4, temperature=1.0, seed=3)
    ended = assert_end_tokens_are_trained(batch, tokenizer)
    # and its log-prob has a gradient
    model = copy.deepcopy(policy.model)
    logp, _ = token_logprobs(model, batch.select(torch.tensor(ended[:1])), 1.0)
    logp[0, -1].backward()
    assert model.get_input_embeddings().weight.grad[tokenizer.eos_token_id].abs().sum() > 0


def test_training_uses_the_sampled_ids_though_their_text_has_others(tiny):
    tokenizer = tiny[1]
    spelled = [tokenizer.convert_tokens_to_ids(character) for character in "<think>"]  # seven tokens, not the tag
    batch = collate([[5]], [spelled], [[0.0] * 7], ["length"], tokenizer, torch.device("cpu"))
    assert batch.texts == ["<think>"] and tokenizer.encode(batch.texts[0]) != spelled, "the round trip differs"
    assert batch.input_ids[0, 1:].tolist() == spelled and batch.lengths.tolist() == [7]


def test_each_row_answers_its_own_prompt(tiny, prompts, batch):
    left = batch.prompt_width
    for i, prompt in enumerate(batch.prompt_index.tolist()):
        assert prompt == i // 4
        assert batch.input_ids[i, :left][batch.attention_mask[i, :left].bool()].tolist() == prompts[prompt]


def test_select_keeps_rows_together_and_drops_padding(batch):
    batch["weight"] = torch.arange(len(batch.texts))
    batch["old_logp"] = batch.sampler_logp + 1
    rows = batch.lengths.argsort()[:5].flip(0)
    part = batch.select(rows)
    assert part["weight"].tolist() == rows.tolist()
    assert part.response_mask.shape[1] == int(batch.lengths[rows].max()) == part["old_logp"].shape[1]
    assert part.texts == [batch.texts[i] for i in rows]
    for j, i in enumerate(rows.tolist()):
        mine, theirs = part.attention_mask[j].bool(), batch.attention_mask[i].bool()
        assert torch.equal(part.input_ids[j][mine], batch.input_ids[i][theirs])
        assert torch.equal(part.sampler_logp[j][part.response_mask[j]], batch.sampler_logp[i][batch.response_mask[i]])


def test_a_tensor_with_another_number_of_rows_is_refused(batch):
    with pytest.raises(AssertionError, match="7 rows"):
        batch["advantages"] = torch.zeros(7)


@pytest.fixture
def two_batches(tiny, prompts):
    """Short prompts with long responses, without their second group; and long prompts with short responses."""
    short, *_, long = sorted(set(map(len, prompts)))
    short_prompts = [prompt for prompt in prompts if len(prompt) == short][:3]
    long_prompts = [prompt for prompt in prompts if len(prompt) == long][:2]
    first = make_sampler(*tiny).generate(short_prompts, n=3, temperature=1.0, seed=1)
    second = make_sampler(*tiny, max_new_tokens=3).generate(long_prompts, n=3, temperature=1.0, seed=2)
    first["rewards"] = torch.ones(len(first.texts))
    first = first.select(torch.tensor([0, 1, 2, 6, 7, 8]))
    assert first.prompt_width < second.prompt_width
    assert first.response_mask.shape[1] > second.response_mask.shape[1]
    return first, second


def test_joining_batches_of_different_widths_keeps_every_row(two_batches):
    joined = join(list(two_batches))
    n = len(two_batches[0].texts)
    assert len(joined.texts) == n + len(two_batches[1].texts)
    for i in range(len(joined.texts)):
        part, j = (two_batches[0], i) if i < n else (two_batches[1], i - n)
        assert joined.texts[i] == part.texts[j] and joined.finish_reasons[i] == part.finish_reasons[j]
        assert joined.lengths[i] == part.lengths[j] and joined.prompt_lengths[i] == part.prompt_lengths[j]
        mine, theirs = joined.attention_mask[i].bool(), part.attention_mask[j].bool()
        assert torch.equal(joined.input_ids[i][mine], part.input_ids[j][theirs])
        assert torch.equal(joined.response_ids[i][joined.response_mask[i]], part.response_ids[j][part.response_mask[j]])
        assert torch.equal(joined.sampler_logp[i][joined.response_mask[i]], part.sampler_logp[j][part.response_mask[j]])
    assert torch.equal(joined.response_mask, joined.attention_mask[:, joined.prompt_width :].bool())
    assert not joined.sampler_logp[~joined.response_mask].any()
    dtypes = [x.dtype for x in (joined.input_ids, joined.attention_mask, joined.response_mask, joined.sampler_logp)]
    assert dtypes == [torch.int64, torch.int64, torch.bool, torch.float32]


def test_joined_prompts_and_rows_are_numbered_anew(two_batches):
    first, second = two_batches
    assert first.prompt_index.tolist() == [0, 0, 0, 2, 2, 2] and second.prompt_index.tolist() == [0, 0, 0, 1, 1, 1]
    assert join([first, second]).prompt_index.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    joined = join([second, second, first])  # the last prompt of one and the first of the next stay two
    assert joined.prompt_index.tolist() == [i for i in range(6) for _ in range(3)]
    assert joined["row"].tolist() == list(range(18))
    assert joined.tensors.keys() == {"row"}, "what only one of them has is not kept"


def test_log_probs_of_joined_rows_are_those_of_their_parts(tiny, two_batches):
    joined = join(list(two_batches))
    with torch.no_grad():
        logp, entropy = tiny[0](joined, 1.0)
        parts = [tiny[0](part, 1.0) for part in two_batches]
    n = len(two_batches[0].texts)
    for rows, part, (part_logp, part_entropy) in zip((slice(0, n), slice(n, None)), two_batches, parts, strict=True):
        mask = joined.response_mask[rows]
        assert torch.allclose(logp[rows][mask], part_logp[part.response_mask], atol=1e-5)
        assert torch.allclose(entropy[rows][mask], part_entropy[part.response_mask], atol=1e-5)
    assert torch.allclose(logp, joined.sampler_logp, atol=1e-4)


def test_a_part_of_joined_batches_has_the_padding_of_its_own_rows_only(two_batches):
    first, second = two_batches
    joined = join([first, second])
    for part, rows in ((first, range(6)), (second, range(6, 12))):
        again = joined.select(torch.tensor(list(rows)))
        assert torch.equal(again.response_mask, part.response_mask)
        assert torch.equal(again.attention_mask, part.attention_mask)
        assert torch.equal(again.input_ids * again.attention_mask, part.input_ids * part.attention_mask)
        assert torch.equal(again.sampler_logp, part.sampler_logp) and again.texts == part.texts
        assert again["row"].tolist() == list(rows)
    alone = join([first])
    assert torch.equal(alone.input_ids, first.input_ids) and alone.prompt_index.tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("budget", [1, 60, 200, 10**6])
def test_microbatches_hold_every_row_once_within_the_budget(batch, budget):
    batch["row"] = torch.arange(len(batch.texts))
    chosen = torch.arange(0, len(batch.texts), 2)
    parts = list(batch.microbatches(chosen, budget))
    assert sorted(i for part in parts for i in part["row"].tolist()) == chosen.tolist()
    assert all(part.input_ids.numel() <= budget or len(part.texts) == 1 for part in parts)
    assert list(batch.microbatches(chosen[:0], budget)) == []


def test_minibatches_are_a_partition_and_differ_between_steps_and_epochs(batch):
    one, again, other, later = (batch.minibatch_rows(3, *key) for key in ((0, 0), (0, 0), (1, 0), (0, 1)))
    assert not torch.equal(torch.cat(other), torch.cat(later)), "not that of the next step's first epoch"
    assert not torch.equal(torch.cat(one), torch.cat(later))
    assert sorted(torch.cat(one).tolist()) == list(range(len(batch.texts)))
    assert torch.equal(torch.cat(one), torch.cat(again)) and not torch.equal(torch.cat(one), torch.cat(other))
    found = {str(batch.minibatch_rows(3, seed, epoch)) for seed in range(8) for epoch in range(4)}
    assert len(found) == 8 * 4


def test_minibatches_are_alike_in_size_and_have_their_rows_in_order(batch):
    parts = [part.tolist() for part in batch.minibatch_rows(5, 0, 0)]
    assert [len(part) for part in parts] == [10, 10, 10, 9, 9]
    assert all(part == sorted(part) for part in parts), "neighbours share their prompt"

"""The Hugging Face sampler."""

import pytest
import torch
from conftest import make_sampler

import plumbing.cache
import rollout


def test_long_responses_with_spare_room_in_the_cache_are_the_same(tiny, prompts, monkeypatch):
    sampler = make_sampler(*tiny, max_new_tokens=230)
    sampler.ends = set(tiny[1].encode("Z"))  # so rare that many responses are long, and end at different times
    long = sampler.generate(prompts[:2], n=40, temperature=3.0, seed=1)
    monkeypatch.setattr(plumbing.cache, "RoomyLayer", plumbing.cache.DynamicLayer)
    assert len({n for n in long.lengths.tolist() if n > 128}) > 4 and long.lengths.max() == 230, (
        "rows leave, room runs out"
    )
    plain = sampler.generate(prompts[:2], n=40, temperature=3.0, seed=1)
    assert torch.equal(long.input_ids, plain.input_ids)
    assert torch.allclose(long.sampler_logp, plain.sampler_logp, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.4])
def test_sampled_logprob_is_the_recomputed_one(tiny, prompts, temperature):
    batch = make_sampler(*tiny).generate(prompts, n=4, temperature=temperature, seed=5)
    logp, _ = tiny[0](batch, temperature)
    assert (logp - batch.sampler_logp).abs().max() < 1e-4
    at_one, _ = tiny[0](batch, 1.0)
    assert temperature == 1.0 or (at_one - batch.sampler_logp).abs().max() > 0.1


def test_greedy_is_that_of_transformers(tiny, prompts):
    policy, tokenizer = tiny
    batch = make_sampler(policy, tokenizer).generate(prompts, n=1, temperature=0.0, seed=0)
    left = batch.prompt_width
    for i, prompt in enumerate(prompts):
        expected = policy.model.generate(torch.tensor([prompt]), max_new_tokens=64, do_sample=False)[0, len(prompt) :]
        assert batch.input_ids[i, left:][batch.response_mask[i]].tolist() == expected.tolist()


def test_same_seed_same_samples_and_a_group_has_different_ones(tiny, prompts):
    sampler = make_sampler(*tiny)
    one, again, other = (sampler.generate(prompts, n=8, temperature=1.0, seed=seed) for seed in (7, 7, 8))
    assert one.texts == again.texts and torch.equal(one.sampler_logp, again.sampler_logp)
    assert one.texts != other.texts
    assert all(len(set(one.texts[i : i + 8])) > 1 for i in range(0, len(one.texts), 8))


def test_tokens_come_as_often_as_their_probability_says(tiny, prompts):
    n = 4000
    sampler = make_sampler(*tiny, max_new_tokens=1)
    batch = sampler.generate(prompts[:1], n=n, temperature=0.7, seed=0)
    with torch.no_grad():
        p = (tiny[0].model(torch.tensor(prompts[:1])).logits[0, -1] / 0.7).softmax(-1)
    counts = torch.bincount(batch.input_ids[:, -1], minlength=len(p))
    error = (p * (1 - p) / n).sqrt()
    assert ((counts / n - p).abs() <= 5 * error + 1e-3).all()
    assert p.max() < 0.9, "or this test says nothing"


def test_responses_cut_by_the_limit_are_marked(tiny, prompts):
    batch = make_sampler(*tiny, max_new_tokens=6).generate(prompts, n=4, temperature=1.0, seed=0)
    left = batch.prompt_width
    for i, reason in enumerate(batch.finish_reasons):
        length = int(batch.lengths[i])
        ends = batch.input_ids[i, left + length - 1] == tiny[1].eos_token_id
        assert (reason == "stop") == bool(ends) and (ends or length == 6)
    assert set(batch.finish_reasons) == {"stop", "length"}


def test_stop_strings_end_a_response_and_stay_in_it(tiny, prompts):
    batch = make_sampler(*tiny, stop=["</answer>"]).generate(prompts, n=4, temperature=1.0, seed=0)
    stopped = [text for text in batch.texts if "</answer>" in text]
    assert len(stopped) > 10 and all(text.endswith("</answer>") for text in stopped)


def test_asking_for_a_missing_vllm_is_one_clear_line(monkeypatch):
    monkeypatch.setattr(rollout.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install"):
        rollout.check_sampler("vllm")

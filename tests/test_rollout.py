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


# --- waves ---


def test_a_wave_holds_whole_groups_within_the_bound():
    prompts = [[5] * n for n in (3, 9, 4, 4, 20, 1, 1)]
    for bound in (1, 100, 150, 400, 10**6):
        parts = list(rollout.waves(prompts, 4, 6, bound))
        assert [i for start, end in parts for i in range(start, end)] == list(range(7)), "each prompt once, in order"
        for start, end in parts:
            tokens = (end - start) * 4 * (max(map(len, prompts[start:end])) + 6)
            assert tokens <= bound or end - start == 1
    assert list(rollout.waves(prompts, 4, 6, 10**6)) == [(0, 7)]
    assert len(list(rollout.waves(prompts, 4, 6, 1))) == 7


@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_responses_do_not_depend_on_the_waves(tiny, prompts, temperature):
    whole = make_sampler(*tiny).generate(prompts, n=4, temperature=temperature, seed=3)
    for bound in (1, 700, 1500):
        parts = make_sampler(*tiny, sampler_tokens=bound).generate(prompts, n=4, temperature=temperature, seed=3)
        assert torch.equal(parts.input_ids, whole.input_ids) and parts.finish_reasons == whole.finish_reasons
        assert torch.allclose(parts.sampler_logp, whole.sampler_logp, atol=1e-4)


def test_the_cache_never_holds_more_than_the_bound(tiny, prompts, monkeypatch):
    """Keys of a layer, in tokens; half as many again are spare room for long responses."""
    most = 0
    forward = tiny[0].model.forward

    def watch(*arguments, **flags):
        nonlocal most
        output = forward(*arguments, **flags)
        keys = flags["past_key_values"].layers[0].keys
        most = max(most, keys.shape[0] * keys.shape[2])
        return output

    monkeypatch.setattr(tiny[0].model, "forward", watch)
    for bound in (2000, 10**6):
        most = 0
        make_sampler(*tiny, sampler_tokens=bound).generate(prompts, n=16, temperature=1.0, seed=0)
        assert (0 < most <= bound) if bound == 2000 else most > 2000


def test_random_numbers_belong_to_their_row():
    numbers = rollout.random_numbers([5, 6, 5], 1000)
    assert torch.equal(numbers[0], numbers[2]) and not torch.equal(numbers[0], numbers[1])
    assert torch.equal(rollout.random_numbers([6], 10), numbers[1:2, :10]), "neither on other rows nor on the length"
    assert numbers.min() >= 0 and numbers.max() < 1 and abs(numbers.mean() - 0.5) < 0.02


def test_a_token_is_the_inverse_of_the_cumulative_distribution(monkeypatch):
    monkeypatch.setattr(rollout, "AT_ONCE", 8)  # two rows at a time
    p = torch.tensor([0.0, 0.5, 0.0, 0.25, 0.25, 0.0])
    u = torch.tensor([[0.0], [0.499], [0.501], [0.749], [0.751], [1 - 2**-53]], dtype=torch.float64)
    ids, logp = rollout.sample_tokens(p.log().expand(6, 6), 1.0, u)
    assert ids.flatten().tolist() == [1, 1, 3, 3, 4, 4], "never a token of probability 0, at no end"
    assert torch.allclose(logp.flatten().exp(), p[ids.flatten()])
    flat = torch.full((1, 200_000), 0.0)
    assert rollout.sample_tokens(flat, 1.0, torch.tensor([[0.75]], dtype=torch.float64))[0].item() in (149_999, 150_000)


def test_a_progress_bar_counts_every_response(tiny, prompts, capsys, monkeypatch):
    bars = []

    class Bar(rollout.tqdm):
        def close(self):
            bars.append((self.n, self.total))
            super().close()

    monkeypatch.setattr(rollout, "tqdm", Bar)
    sampler = make_sampler(*tiny, sampler_tokens=700, max_new_tokens=20)
    sampler.generate(prompts, n=4, temperature=1.0, seed=0, show="evaluation")
    assert (4 * len(prompts), 4 * len(prompts)) in bars
    assert "evaluation" in capsys.readouterr().err
    sampler.generate(prompts, n=4, temperature=1.0, seed=0)
    assert capsys.readouterr().err == "", "without a name there is none"

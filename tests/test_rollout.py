"""Batches, log-probs and the Hugging Face sampler."""

import copy

import pytest
import torch
from conftest import ROOT, make_sampler
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import rollout
from data import collate, encode_prompts, load_task
from grpo import group_advantages, policy_loss
from rewards import evaluation_metrics, score
from rollout import batch_logprobs, token_logprobs


@pytest.fixture(scope="module")
def prompts(tiny):
    """Prompts of unequal lengths: sums of 3 to 6 numbers."""
    examples = encode_prompts(load_task("arithmetic").test[:12], tiny[1], "plain", 64)
    prompts = [example["prompt_ids"] for example in examples]
    assert len(set(map(len, prompts))) > 1
    return prompts


@pytest.fixture(scope="module")
def batch(tiny, prompts):
    return make_sampler(*tiny).generate(prompts, n=4, temperature=0.8, seed=1)


def naive(model, batch, temperature):
    """Log-probs and entropies one response at a time, without padding, from the model's own logits."""
    logps, entropies = [], []
    left = batch.input_ids.shape[1] - batch.response_mask.shape[1]
    for i, length in enumerate(batch.lengths.tolist()):
        real = batch.attention_mask[i].bool()
        ids = batch.input_ids[i][real]
        start = int(batch.attention_mask[i, :left].sum())
        table = (model(ids[None]).logits[0].float() / temperature).log_softmax(-1)[start - 1 : -1]
        logps.append(table.gather(1, ids[start:, None])[:, 0])
        entropies.append(-(table.exp() * table).sum(-1))
        assert len(logps[-1]) == length
    return logps, entropies


# --- the batch ---


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


def test_end_token_is_trained_also_where_it_is_the_padding_token(tiny, prompts):
    policy, tokenizer = tiny[0], copy.deepcopy(tiny[1])
    tokenizer.pad_token = tokenizer.eos_token
    batch = make_sampler(policy, tokenizer).generate(prompts, n=4, temperature=1.0, seed=3)
    left = batch.input_ids.shape[1] - batch.response_mask.shape[1]
    ended = [i for i, reason in enumerate(batch.finish_reasons) if reason == "stop"]
    assert len(ended) > 10
    for i in ended:
        last = int(batch.lengths[i]) - 1
        assert batch.input_ids[i, left + last] == tokenizer.eos_token_id and batch.response_mask[i, last]
        assert not batch.response_mask[i, last + 1 :].any()
    # and its log-prob has a gradient
    model = copy.deepcopy(policy)
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
    left = batch.input_ids.shape[1] - batch.response_mask.shape[1]
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


@pytest.mark.parametrize("budget", [1, 60, 200, 10**6])
def test_microbatches_hold_every_row_once_within_the_budget(batch, budget):
    batch["row"] = torch.arange(len(batch.texts))
    chosen = torch.arange(0, len(batch.texts), 2)
    parts = list(batch.microbatches(chosen, budget))
    assert sorted(i for part in parts for i in part["row"].tolist()) == chosen.tolist()
    assert all(part.input_ids.numel() <= budget or len(part.texts) == 1 for part in parts)
    assert list(batch.microbatches(chosen[:0], budget)) == []


def test_minibatches_are_a_partition_and_differ_between_seeds(batch):
    one, again, other = (list(batch.minibatch_rows(3, seed)) for seed in (0, 0, 1))
    assert sorted(torch.cat(one).tolist()) == list(range(len(batch.texts)))
    assert torch.equal(torch.cat(one), torch.cat(again)) and not torch.equal(torch.cat(one), torch.cat(other))


# --- log-probs ---


@pytest.mark.parametrize("logits_at_once", [2**25, 40 * 106, 1])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_and_entropies_are_the_plain_ones(tiny, batch, monkeypatch, logits_at_once, temperature):
    monkeypatch.setattr(rollout, "LOGITS_AT_ONCE", logits_at_once)
    batch = batch.select(torch.arange(10))
    model, weights = copy.deepcopy(tiny[0]), torch.rand(batch.response_mask.shape)
    logp, entropy = token_logprobs(model, batch, temperature)
    assert logp.dtype == entropy.dtype == torch.float32 and not entropy.requires_grad
    assert not logp[~batch.response_mask].any() and not entropy[~batch.response_mask].any()
    (logp * weights).sum().backward()

    plain = copy.deepcopy(tiny[0])
    logps, entropies = naive(plain, batch, temperature)
    for i, length in enumerate(batch.lengths.tolist()):
        assert torch.allclose(logp[i, :length], logps[i], atol=2e-5)
        assert torch.allclose(entropy[i, :length], entropies[i], atol=2e-5)
    sum((x * weights[i, : len(x)]).sum() for i, x in enumerate(logps)).backward()
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, atol=1e-5, rtol=1e-3), name


def test_batch_logprobs_do_not_depend_on_the_microbatches(tiny, batch):
    whole, _ = token_logprobs(tiny[0], batch, 1.0)
    for budget in (1, 100):
        assert torch.allclose(batch_logprobs(tiny[0], batch, 1.0, budget), whole, atol=2e-5)


def test_a_model_that_changes_its_logits_after_the_head_is_refused(tiny, tmp_path, monkeypatch):
    tiny[0].save_pretrained(tmp_path)
    tiny[1].save_pretrained(tmp_path)
    forward = LlamaForCausalLM.forward

    def capped(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.logits = output.logits.tanh()
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", capped)
    with pytest.raises(SystemExit, match="after the LM head"):
        rollout.load_model(str(tmp_path), torch.device("cpu"))


def gradients(model, batch, budget, beta, rows=None):
    """Gradient of policy_loss on a batch in micro-batches, and the loss, as the script takes them."""
    model.zero_grad()
    rows = torch.arange(len(batch.texts)) if rows is None else rows
    total = 0.0
    for micro in batch.microbatches(rows, budget):
        logp, _ = token_logprobs(model, micro, 1.0)
        ref = micro["ref_logp"] if beta else None
        args = logp, micro["old_logp"], micro["advantages"], micro.response_mask, len(batch.texts)
        loss, _ = policy_loss(*args, 0.2, 0.2, ref, beta)
        loss.backward()
        total += loss.item()
    return torch.cat([p.grad.flatten() for p in model.parameters()]), total


@pytest.fixture
def trainable(tiny, batch):
    """A copy of the tiny model in float64, and the batch with all that the loss needs; some groups are all equal."""
    model = copy.deepcopy(tiny[0]).double()
    g = torch.Generator().manual_seed(0)
    rewards = torch.randint(0, 2, (len(batch.texts),), generator=g).float()
    rewards[:8] = 1.0
    batch["advantages"] = group_advantages(rewards, 4)
    with torch.no_grad():
        logp, _ = token_logprobs(model, batch, 1.0)
    batch["old_logp"] = logp + 0.1 * torch.randn(logp.shape, generator=g)
    batch["ref_logp"] = logp + 0.1 * torch.randn(logp.shape, generator=g)
    return model, batch


@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_any_microbatch_size_gives_the_same_gradient(trainable, beta):
    model, batch = trainable
    expected, loss = gradients(model, batch, 10**6, beta)
    for budget in (1, 64, 300):
        gradient, other = gradients(model, batch, budget, beta)
        assert (gradient - expected).norm() < 1e-6 * expected.norm()
        assert other == pytest.approx(loss, abs=1e-6)


def test_without_kl_rows_of_zero_advantage_may_stay_out(trainable):
    model, batch = trainable
    expected, loss = gradients(model, batch, 10**6, 0.0)
    rows = (batch["advantages"] != 0).nonzero()[:, 0]
    assert 0 < len(rows) <= len(batch.texts) - 8
    gradient, other = gradients(model, batch, 300, 0.0, rows)
    assert (gradient - expected).norm() < 1e-6 * expected.norm()


SHAPE = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
LINEAR = {f"linear_{name}": 8 for name in ("key_head_dim", "value_head_dim")}
LINEAR |= {f"linear_{name}": 2 for name in ("num_key_heads", "num_value_heads")}
MODELS = {  # family -> what its configuration needs beside SHAPE; whether its tokens meet in attention only
    "llama": ({}, True), "qwen2": ({}, True), "qwen3": ({}, True), "gemma": ({}, True), "olmo2": ({}, True),
    "smollm3": ({}, True), "phi3": ({}, True), "gpt2": ({"n_embd": 32, "n_head": 4, "n_layer": 4}, True),
    "mistral": ({"sliding_window": 8}, True), "gemma3_text": ({"sliding_window": 8}, True),
    "gpt_neox": ({}, True), "qwen3_5_text": (LINEAR, False), "bloom": ({"n_head": 4}, False),
}  # fmt: skip


@pytest.mark.parametrize("family", MODELS)
def test_logprobs_of_a_batch_are_those_of_each_response_alone(tiny, family):
    """Packed, where that is right, or padded: with prompts and responses of all lengths."""
    more, packs = MODELS[family]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SHAPE | more)).eval()
    for p in model.parameters():
        p.data.normal_(0, 0.3) if p.dim() > 1 else None
    prompts, lengths = [[5, 6, 7, 8, 9], [7, 9, 11, 5, 2, 30, 31, 3, 4], [60]], [7, 1, 4, 12, 12, 3]
    responses = [torch.randint(2, 60, (n,)).tolist() for n in lengths]
    batch = collate(prompts, responses, [[0.0] * n for n in lengths], [""] * 6, tiny[1], torch.device("cpu"))
    with torch.no_grad():
        logp, _ = token_logprobs(model, batch, 1.0)
        for i, response in enumerate(responses):
            ids = torch.tensor(prompts[i // 2] + response)
            alone = model(ids[None]).logits[0].log_softmax(-1)[:-1].gather(1, ids[1:, None])[-len(response) :, 0]
            assert torch.allclose(logp[i, : len(response)], alone, atol=1e-4), i
    assert model.base_model.packs == packs
    width = batch.input_ids.shape[1]
    assert rollout.can_pack(model.base_model, batch) == (packs and more.get("sliding_window", width) >= width)


@pytest.mark.parametrize("together", [True, False])
def test_a_pack_has_no_padding_and_a_prompt_once_for_neighbours(tiny, together):
    seen, model = [], copy.deepcopy(tiny[0])
    lengths = [3, 9, 1, 4]
    batch = collate([[5, 6], [7]], [[8] * n for n in lengths], [[0.0] * n for n in lengths], [""] * 4, tiny[1], "cpu")
    batch = batch.select(torch.tensor([0, 1, 2, 3] if together else [0, 2, 1, 3]))
    model.base_model.packs = False
    padded, _ = token_logprobs(model, batch, 1.0)
    model.base_model.packs = True
    model.base_model.register_forward_pre_hook(lambda m, args, flags: seen.append(flags["input_ids"]), with_kwargs=True)
    packed, _ = token_logprobs(model, batch, 1.0)
    assert torch.allclose(packed, padded, atol=1e-5)
    prompts = 2 + 1 if together else 2 * (2 + 1)
    assert [x.shape for x in seen] == [(1, prompts + sum(lengths) - 4)], "nor the last tokens, which predict nothing"


def test_packed_and_padded_have_the_same_gradient(trainable):
    model, batch = trainable
    packed, loss = gradients(model, batch, 300, 0.04)
    assert model.base_model.packs
    model.base_model.packs = False
    padded, other = gradients(model, batch, 300, 0.04)
    assert (packed - padded).norm() < 1e-6 * padded.norm() and loss == pytest.approx(other, abs=1e-6)


# --- the sampler ---


def test_long_responses_with_spare_room_in_the_cache_are_the_same(tiny, prompts, monkeypatch):
    sampler = make_sampler(*tiny, max_new_tokens=230)
    sampler.ends = set(tiny[1].encode("Z"))  # so rare that many responses are long, and end at different times
    long = sampler.generate(prompts[:2], n=40, temperature=3.0, seed=1)
    monkeypatch.setattr(rollout, "RoomyLayer", rollout.DynamicLayer)
    assert len({n for n in long.lengths.tolist() if n > 128}) > 4 and long.lengths.max() == 230, (
        "rows leave, room runs out"
    )
    plain = sampler.generate(prompts[:2], n=40, temperature=3.0, seed=1)
    assert torch.equal(long.input_ids, plain.input_ids)
    assert torch.allclose(long.sampler_logp, plain.sampler_logp, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.4])
def test_sampled_logprob_is_the_recomputed_one(tiny, prompts, temperature):
    batch = make_sampler(*tiny).generate(prompts, n=4, temperature=temperature, seed=5)
    logp, _ = token_logprobs(tiny[0], batch, temperature)
    assert (logp - batch.sampler_logp).abs().max() < 1e-4
    at_one, _ = token_logprobs(tiny[0], batch, 1.0)
    assert temperature == 1.0 or (at_one - batch.sampler_logp).abs().max() > 0.1


def test_greedy_is_that_of_transformers(tiny, prompts):
    policy, tokenizer = tiny
    batch = make_sampler(policy, tokenizer).generate(prompts, n=1, temperature=0.0, seed=0)
    left = batch.input_ids.shape[1] - batch.response_mask.shape[1]
    for i, prompt in enumerate(prompts):
        expected = policy.generate(torch.tensor([prompt]), max_new_tokens=64, do_sample=False)[0, len(prompt) :]
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
        p = (tiny[0](torch.tensor(prompts[:1])).logits[0, -1] / 0.7).softmax(-1)
    counts = torch.bincount(batch.input_ids[:, -1], minlength=len(p))
    error = (p * (1 - p) / n).sqrt()
    assert ((counts / n - p).abs() <= 5 * error + 1e-3).all()
    assert p.max() < 0.9, "or this test says nothing"


def test_responses_cut_by_the_limit_are_marked(tiny, prompts):
    batch = make_sampler(*tiny, max_new_tokens=6).generate(prompts, n=4, temperature=1.0, seed=0)
    left = batch.input_ids.shape[1] - batch.response_mask.shape[1]
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


def test_a_model_that_is_not_there_is_one_clear_line():
    with pytest.raises(SystemExit, match="--model no/such-model"):
        rollout.load_model("no/such-model", torch.device("cpu"))


def test_the_tiny_model_is_an_ordinary_small_llama(tiny):
    assert isinstance(tiny[0], LlamaForCausalLM) and isinstance(tiny[0].config, LlamaConfig)
    assert tiny[0].num_parameters() < 1_000_000
    assert sum(f.stat().st_size for f in (ROOT / "tiny").iterdir()) < 5_000_000
    text = "3+4=<think>3+4=7</think><answer>7</answer>"
    assert tiny[1].decode(tiny[1].encode(text)) == text


def test_the_tiny_model_leaves_something_to_learn(tiny):
    """Mostly wrong alone, mostly right among eight, and it thinks in fewer than half of its samples."""
    examples = encode_prompts(load_task("arithmetic").test[:200], tiny[1], "plain", 64)
    batch = make_sampler(*tiny).generate([e["prompt_ids"] for e in examples], n=8, temperature=1.0, seed=0)
    scores = score(batch.texts, [e for e in examples for _ in range(8)], ["format"])
    metrics = evaluation_metrics([0.0], scores, batch.lengths.tolist(), 8)
    assert 0.2 < metrics["eval_pass@1"] < 0.4 and metrics["eval_pass@8"] > 0.8
    assert sum(text.startswith("<think>") for text in batch.texts) < 0.5 * len(batch.texts)

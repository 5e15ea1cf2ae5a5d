"""What stands around the losses: whitening, what is logged, draws, direction of the KL, precision, and nan."""

import collections
import importlib
import json

import pytest
import torch
from conftest import ROOT, make_sampler, read_jsonl
from test_siblings import double
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import data
import dpo
import grpo
import kimi_k15
import ppo
import verifiers
from batch import collate
from logprobs import Policy, Value, explained_variance, token_logprobs
from plumbing.packing import masked_attention
from plumbing.run import Run

RL = ["grpo", "dr_grpo", "rloo", "kimi_k15", "ppo"]
SMALL = {"prompts_per_step": 4, "group_size": 4, "eval_prompts": 8, "steps": 1, "model": str(ROOT / "tiny")}


def alone(x):
    """The sum over the processes, where there is one."""
    return x


def refused(function, *arguments) -> str:
    with pytest.raises(SystemExit) as error:
        function(*arguments)
    assert error.value.code == 2 and "\n" not in str(error.value)
    return str(error.value)


# --- PPO ---


def test_whitening_does_not_stretch_noise():
    x = torch.tensor([[1e-3, -1e-3, 1e-3, -1e-3]])
    mask = torch.ones(1, 4, dtype=torch.bool)
    assert ppo.whiten(x, mask, alone).abs().max() < 0.03
    assert ppo.whiten(x, mask, alone, eps=1e-4).std() == pytest.approx(1.0)
    assert ppo.whiten(x * 1000, mask, alone).std() == pytest.approx(1.0)


def test_whitening_of_one_token_is_zero():
    mask = torch.tensor([[True, False]])
    assert ppo.whiten(torch.tensor([[3.0, 9.0]]), mask, alone).tolist() == [[0.0, 0.0]]


def test_whitening_divides_by_n_less_ddof():
    mask = torch.ones(1, 2, dtype=torch.bool)
    x = torch.tensor([[1.0, 3.0]])  # mean 2, squares 1 and 1
    assert ppo.whiten(x, mask, alone, ddof=0).tolist() == [[-1.0, 1.0]]
    assert ppo.whiten(x, mask, alone, ddof=1)[0, 1] == pytest.approx(2**-0.5)


def test_explained_variance_by_hand():
    mask = torch.tensor([[True, True, True, False]])
    returns = double(0, 1, 2, 99).view(1, 4)
    assert explained_variance(returns, returns, mask, alone) == pytest.approx(1.0)
    assert explained_variance(returns * 0 + 5, returns, mask, alone) == pytest.approx(0.0, abs=1e-6)
    halves = double(0, 0.5, 1, -7).view(1, 4)  # what is left has half the spread, a quarter of the variance
    assert explained_variance(halves, returns, mask, alone) == pytest.approx(0.75)
    assert explained_variance(-returns, returns, mask, alone) == pytest.approx(-3.0)


def test_approx_kl_and_the_value_clip_by_hand():
    logp = double(0.0, 0.0).view(1, 2)
    old_logp = double(0.0, -1.0).view(1, 2)
    mask = torch.ones(1, 2, dtype=torch.bool)
    _, stats = ppo.policy_loss(logp, old_logp, torch.ones(1, 2), mask, 2, 0.2, 0.2)
    assert stats["approx_kl"].flatten().tolist() == pytest.approx([0.0, torch.e - 2])
    values = double(0.5, 0.1).view(1, 2)  # from 0 towards 1: the first has left the range of 0.2
    loss, stats = ppo.value_loss(values, torch.zeros(1, 2), torch.ones(1, 2), mask, 2, 0.2)
    assert stats["value_clip_fraction"].tolist() == [[1.0, 0.0]]
    assert loss.item() == pytest.approx((0.5 * 0.8**2 + 0.5 * 0.9**2) / 2)


def test_one_response_per_question(tmp_path):
    flags = SMALL | {"group_size": 1, "prompts_per_step": 16}
    ppo.main(ppo.Config(out=str(tmp_path / "run"), **flags))
    record = read_jsonl(tmp_path / "run" / "metrics.jsonl")[1]
    assert record["reward_std"] is None and record["informative_groups"] is None
    logged = ("explained_variance", "value_clip_fraction", "value_grad_norm", "approx_kl")
    assert all(isinstance(record[name], float) for name in logged)
    for script in RL[:4]:
        module = importlib.import_module(script)
        said = refused(module.main, module.Config(out=str(tmp_path / script), **flags))
        assert said == "--group-size 1: it must be at least 2"


@pytest.fixture
def rollouts_of_tiny(tiny):
    prompts = [
        e["prompt_ids"] for e in data.encode_prompts(data.load_task("arithmetic").train[:3], tiny[1], "plain", 64)
    ]
    return make_sampler(*tiny).generate(prompts, n=2, temperature=1.0, seed=0)


# --- draws ---


def test_while_the_curriculum_grows_all_questions_of_the_pool_are_as_likely():
    examples = [{"question": str(i), "level": i} for i in range(4000)]
    config = kimi_k15.Config(curriculum=400, prompts_per_step=16)
    counts = collections.Counter()
    expected = 0.0  # distinct questions, if every step drew evenly without replacement
    never = [1.0] * 4000  # the probability that a question was not drawn yet
    for step in range(1, 400):
        drawn = kimi_k15.draw_questions(examples, kimi_k15.SuccessRates(), config, step)
        names = [example["question"] for example in drawn]
        assert len(set(names)) == 16
        counts.update(names)
        size = len(kimi_k15.easy_first(examples, 16, step, 400))
        assert all(example["level"] < size for example in drawn)
        for i in range(size):
            never[i] *= 1 - 16 / size
    expected = sum(1 - x for x in never)
    assert len(counts) == pytest.approx(expected, rel=0.03)
    assert max(counts.values()) <= 20, "the easiest are drawn in all steps, about 8 times more often than the mean"
    again = kimi_k15.draw_questions(examples, kimi_k15.SuccessRates(), config, 7)
    assert again == kimi_k15.draw_questions(examples, kimi_k15.SuccessRates(), config, 7)


@pytest.mark.parametrize("script", RL)
def test_a_step_that_wants_more_questions_than_there_are_is_refused_before_the_weights(tmp_path, monkeypatch, script):
    rows = [{"question": f"{i}+1?", "answer": str(i + 1)} for i in range(6)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    module = importlib.import_module(script)
    monkeypatch.setattr(module, "make_policy", None)  # a call would be another error
    flags = SMALL | {"task": "qa", "data": (str(path),), "prompts_per_step": 8, "out": str(tmp_path / "run")}
    said = refused(module.main, module.Config(**flags))
    assert said.startswith("--prompts-per-step 8: there are only ")


def test_a_curriculum_without_levels_is_refused_before_the_weights(tmp_path, monkeypatch):
    rows = [{"question": f"{i}+1?", "answer": str(i + 1)} for i in range(30)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(kimi_k15, "make_policy", None)
    flags = SMALL | {"task": "qa", "data": (str(path),), "curriculum": 5, "out": str(tmp_path / "run")}
    assert refused(kimi_k15.main, kimi_k15.Config(**flags)).startswith("--curriculum needs questions with a level")


def test_the_length_reward_is_logged_under_its_own_name(tmp_path):
    flags = SMALL | {"length_weight": 0.1, "length_from": 1}
    kimi_k15.main(kimi_k15.Config(out=str(tmp_path / "run"), **flags))
    record = read_jsonl(tmp_path / "run" / "metrics.jsonl")[1]
    assert record["reward"] == pytest.approx(record["reward/accuracy"] + 0.1 * record["reward/length"])


def test_a_number_of_a_response_is_averaged_over_responses_and_one_of_a_token_over_tokens(tmp_path):
    run = Run(grpo.Config(out=str(tmp_path / "run"), **SMALL))
    for mask, response, token in (
        (torch.tensor([[True, True, True], [True, False, False]]), [[1.0], [3.0]], [[1.0, 1.0, 1.0], [5.0, 9.0, 9.0]]),
        (torch.tensor([[True]]), [[8.0]], [[7.0]]),
    ):
        numbers = {"of_response": torch.tensor(response), "of_token": torch.tensor(token)}
        run.collect(mask, torch.tensor(0.0), **numbers, most_max=torch.tensor(response))
    found = run.collected(1)
    assert found["of_response"] == pytest.approx((1 + 3 + 8) / 3)
    assert found["of_token"] == pytest.approx((1 + 1 + 1 + 5 + 7) / 5)
    assert found["most_max"] == 8 and found["tokens"] == 5


# --- constants and precision ---


def test_eps_and_ddof_of_the_group_are_arguments():
    r = double(0, 0, 1, 1)
    assert grpo.group_advantages(r, 4, eps=0.0, ddof=0).tolist() == pytest.approx([-1, -1, 1, 1])
    assert grpo.group_advantages(r, 4, eps=0.5, ddof=0).tolist() == pytest.approx([-0.5, -0.5, 0.5, 0.5])
    assert grpo.group_advantages(r, 4)[3].item() == pytest.approx(0.5 / ((1 / 3) ** 0.5 + 1e-4))


def test_the_gradient_of_k3_is_that_of_the_other_kl_until_the_ratio_multiplies_it():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(5, dtype=torch.float64, generator=g).requires_grad_()
    ref = torch.randn(5, dtype=torch.float64, generator=g).log_softmax(0)

    def gradient(loss):
        return torch.autograd.grad(loss, logits, retain_graph=True)[0]

    logp = logits.log_softmax(0)
    pi_old = logp.detach().exp()  # the samples are held fixed
    in_the_loss = gradient((pi_old * grpo.kl_k3(logp, ref)).sum())
    with_ratio = gradient((pi_old * (logp - logp.detach()).exp() * grpo.kl_k3(logp, ref)).sum())
    of_ref_to_pi = gradient((ref.exp() * (ref - logp)).sum())
    of_pi_to_ref = gradient((logp.exp() * (logp - ref)).sum())
    assert torch.allclose(in_the_loss, of_ref_to_pi, atol=1e-14)
    assert torch.allclose(with_ratio, of_pi_to_ref, atol=1e-14)
    assert (of_ref_to_pi - of_pi_to_ref).abs().max() > 1e-2


def test_log_probs_and_values_in_float64(tiny, rollouts_of_tiny):
    batch = rollouts_of_tiny
    model = AutoModelForCausalLM.from_pretrained(ROOT / "tiny", dtype=torch.float64).eval()
    logp, entropy = token_logprobs(model, batch, 1.0, torch.float64)
    assert logp.dtype == entropy.dtype == torch.float64
    positions = (batch.attention_mask.cumsum(1) - 1).clamp(min=0)
    output = model(
        batch.input_ids, attention_mask=batch.attention_mask, position_ids=positions, output_hidden_states=True
    )
    log_p = output.logits[:, :-1].log_softmax(-1)
    expected = log_p.gather(-1, batch.input_ids[:, 1:, None]).squeeze(-1)[:, -batch.response_mask.shape[1] :]
    assert (logp - expected)[batch.response_mask].abs().max() < 1e-12
    value = Value(model.base_model).double()
    value.head.weight.data.fill_(0.1)
    states = output.hidden_states[-1][:, -batch.response_mask.shape[1] - 1 : -1]
    by_hand = value.head(states).squeeze(-1)
    V = value(batch, torch.float64)
    assert V.dtype == torch.float64 and (V - by_hand)[batch.response_mask].abs().max() < 1e-12


def test_attention_with_a_mask_is_that_of_transformers():
    class Module(torch.nn.Module):
        num_key_value_groups = 3

    g = torch.Generator().manual_seed(0)
    q = torch.randn(2, 6, 4, 8, generator=g, requires_grad=True)
    k, v = (torch.randn(2, 2, 5, 8, generator=g, requires_grad=True) for _ in range(2))
    mask = torch.rand(2, 1, 4, 5, generator=g) > 0.3
    mask[..., 0] = True
    ours, _ = masked_attention(q, k, v, mask, scaling=0.3)
    theirs, _ = sdpa_attention_forward(Module(), q, k, v, mask, scaling=0.3)
    assert torch.allclose(ours, theirs, atol=1e-6)
    for one, other in zip(*(torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (ours, theirs)), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


# --- what is not finite ---


@pytest.mark.parametrize("script", ["grpo", "ppo"])
def test_a_run_ends_at_a_gradient_that_is_not_finite(tmp_path, monkeypatch, script):
    module = importlib.import_module(script)
    losses = iter([1.0] * 4 + [float("nan")] * 99) if script == "ppo" else iter([1.0] + [float("nan")] * 9)
    policy_loss = module.policy_loss

    def broken(*arguments):
        loss, stats = policy_loss(*arguments)
        return loss * next(losses), stats

    monkeypatch.setattr(module, "policy_loss", broken)
    flags = SMALL | {"steps": 5, "save_every": 1, "tokens_per_microbatch": 10**6}
    said = refused(module.main, module.Config(out=str(tmp_path / "run"), **flags))
    assert said.startswith("step 2: the loss is nan; nothing of this step is saved")
    lines = read_jsonl(tmp_path / "run" / "not_finite.jsonl")
    assert len(lines) == 16 and {"step", "response", "rewards", "finish_reason"} <= lines[0].keys()
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert saved["step"] == 1 and all(x.isfinite().all() for x in saved["policy"].values())
    assert len(read_jsonl(tmp_path / "run" / "metrics.jsonl")) == 2


@pytest.mark.parametrize("script", RL)
def test_a_weight_that_is_not_finite_is_neither_pushed_nor_saved(tmp_path, monkeypatch, script):
    module = importlib.import_module(script)
    step = torch.optim.AdamW.step

    def broken(self, *arguments):
        step(self, *arguments)
        self.param_groups[0]["params"][-1].data[0] = float("inf")

    monkeypatch.setattr(torch.optim.AdamW, "step", broken)
    flags = SMALL | {"epochs": 1, "minibatches": 1}
    said = refused(module.main, module.Config(out=str(tmp_path / "run"), **flags))
    assert said.startswith("step 1: weights of the policy are not finite")
    assert not (tmp_path / "run" / "checkpoint.pt").exists() and not (tmp_path / "run" / "model").exists()


def test_a_policy_that_gives_nan_does_not_sample(tiny):
    policy = Policy(AutoModelForCausalLM.from_pretrained(ROOT / "tiny", dtype=torch.float32))
    sampler = make_sampler(policy, tiny[1])
    policy.model.get_output_embeddings().weight.data[5] = float("nan")
    for temperature in (0.0, 1.0):
        said = refused(lambda t=temperature: sampler.generate([[5, 6]], n=2, temperature=t, seed=0))
        assert said.startswith("sampler: the policy's log-probs are not finite")


# --- the judge ---


def test_the_judge_starts_with_the_questions(monkeypatch):
    started = []
    monkeypatch.setattr(verifiers.MathWorker, "start", lambda self: started.append(1))
    monkeypatch.setattr(verifiers, "math_worker", verifiers.MathWorker())
    verifiers.start_judge([{"verifier": "number"}, {"verifier": "text"}])
    assert started == []
    verifiers.start_judge([{"verifier": "number"}, {"verifier": "math"}])
    assert started == [1]


# --- bugs that nothing saw ---


def test_positions_in_the_sampler_do_not_count_padding(tiny):
    """Seen by absolute positions only: a prompt beside a longer one gets the log-probs that it gets alone."""
    torch.manual_seed(0)
    shape = {"vocab_size": len(tiny[1]), "n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **shape)).eval()
    for p in model.parameters():
        p.data.normal_(0, 0.3)
    policy = Policy(model)
    batch = make_sampler(policy, tiny[1], max_new_tokens=4).generate([[5], [6, 7, 8, 9]], n=2, temperature=1.0, seed=0)
    for i, p in enumerate(batch.prompt_lengths.tolist()):
        ids = batch.input_ids[i, batch.prompt_width - p :][: p + batch.lengths[i]]
        log_p = model(ids[None]).logits[0, :-1].log_softmax(-1)
        expected = log_p.gather(1, ids[1:, None])[p - 1 :, 0]
        assert torch.allclose(batch.sampler_logp[i, : batch.lengths[i]], expected, atol=1e-4)


def test_an_end_token_at_the_last_place_is_a_stop(tiny):
    policy = Policy(AutoModelForCausalLM.from_pretrained(ROOT / "tiny", dtype=torch.float32))
    ids = data.encode_prompts(data.load_task("arithmetic").test[:1], tiny[1], "plain", 64)[0]["prompt_ids"]
    whole = make_sampler(policy, tiny[1]).generate([ids], n=1, temperature=0.0, seed=0)
    length = int(whole.lengths[0])
    assert whole.finish_reasons == ["stop"]
    exact = make_sampler(policy, tiny[1], max_new_tokens=length).generate([ids], n=1, temperature=0.0, seed=0)
    assert exact.finish_reasons == ["stop"] and exact.texts == whole.texts
    short = make_sampler(policy, tiny[1], max_new_tokens=length - 1).generate([ids], n=1, temperature=0.0, seed=0)
    assert short.finish_reasons == ["length"]


@pytest.mark.parametrize("script", ["grpo", "dr_grpo", "rloo", "kimi_k15"])
def test_the_loss_is_divided_by_the_responses_of_the_update(tmp_path, monkeypatch, script):
    module = importlib.import_module(script)
    seen = []
    policy_loss = module.policy_loss

    def watched(*arguments):
        seen.append(arguments[4])
        return policy_loss(*arguments)

    monkeypatch.setattr(module, "policy_loss", watched)
    module.main(module.Config(out=str(tmp_path / "run"), **SMALL | {"minibatches": 2, "epochs": 1}))
    assert set(seen) == {8}, "16 responses of the rollout, 8 of each update"


def watch(monkeypatch, module, name: str) -> list:
    """The arguments of every call of a script's function from now on."""
    calls = []
    function = getattr(module, name)

    def watched(*arguments, **named):
        calls.append(arguments)
        return function(*arguments, **named)

    monkeypatch.setattr(module, name, watched)
    return calls


def test_what_goes_into_the_losses_of_ppo(tmp_path, monkeypatch):
    of_policy = watch(monkeypatch, ppo, "policy_loss")
    of_value = watch(monkeypatch, ppo, "value_loss")
    of_gae = watch(monkeypatch, ppo, "gae")
    explained = watch(monkeypatch, ppo, "explained_variance")
    summed = watch(monkeypatch, ppo, "sum_gradients")
    ppo.main(ppo.Config(out=str(tmp_path / "run"), tokens_per_microbatch=10**6, **SMALL))
    _, values, mask, gamma, lam = of_gae[0]
    A = ppo.gae(of_gae[0][0], values, mask, gamma, lam)
    returns = torch.cat([arguments[2][arguments[3]] for arguments in of_value[:2]])  # of the two minibatches
    assert sorted(returns.tolist()) == pytest.approx(sorted((A + values)[mask].tolist()), abs=1e-6)
    advantages = torch.cat([arguments[2][arguments[3]] for arguments in of_policy[:2]])
    assert advantages.mean().abs() < 1e-5 and advantages.std() == pytest.approx(1.0, abs=1e-4)
    for arguments in of_policy:
        assert arguments[4] == arguments[3].sum(), "the tokens of the minibatch"
    assert lam == 0.95 and torch.equal(explained[0][1], ppo.gae(of_gae[0][0], 0 * values, mask, 1.0, 1.0))
    assert len(summed) == 2 * 4, "the gradients of both networks, four times"


def test_the_loop_of_grpo(tmp_path, monkeypatch):
    """Each update begins without a gradient, compares with the policy that sampled, and is pushed."""
    of_loss = watch(monkeypatch, grpo, "policy_loss")
    gradients = []
    pushed = []
    forward = Policy.forward
    make = grpo.make_sampler

    def watched_forward(self, *arguments):
        if torch.is_grad_enabled() and self.training is False:
            gradients.append(any(p.grad is not None for p in self.parameters()))
        return forward(self, *arguments)

    def make_watched(*arguments):
        sampler = make(*arguments)
        push = sampler.push
        sampler.push = lambda policy: (pushed.append(1), push(policy))
        return sampler

    monkeypatch.setattr(Policy, "forward", watched_forward)
    monkeypatch.setattr(grpo, "make_sampler", make_watched)
    flags = SMALL | {"steps": 2, "epochs": 2, "beta": 0.0, "tokens_per_microbatch": 10**6}
    grpo.main(grpo.Config(out=str(tmp_path / "run"), **flags))
    assert gradients == [False] * 4
    assert len(pushed) == 1 + 2, "before the first step, and after each"
    first, second = of_loss[:2]
    assert torch.allclose(first[0], first[1], atol=1e-5) and not torch.allclose(second[0], second[1], atol=1e-5)
    assert (first[2] < 0).any() and (first[2] > 0).any() and (first[2] != 0).all()


def test_the_reference_learns_nothing(tiny):
    assert not any(p.requires_grad for p in tiny[0].reference().parameters())


def test_a_pair_counts_as_two_rows_of_a_micro_batch(rollouts_of_tiny):
    batch = rollouts_of_tiny
    width = batch.input_ids.shape[1]
    parts = list(batch.microbatches(torch.arange(6), 2 * width, together=2))
    assert [len(part.texts) for part in parts] == [2, 2, 2]


def test_a_loss_that_is_infinite_stops_too(tmp_path, monkeypatch):
    policy_loss = grpo.policy_loss

    def broken(*arguments):
        loss, stats = policy_loss(*arguments)
        return loss + float("inf"), stats

    monkeypatch.setattr(grpo, "policy_loss", broken)
    assert refused(grpo.main, grpo.Config(out=str(tmp_path / "run"), **SMALL)).startswith("step 1: the loss is inf")


def test_the_text_of_a_response_has_neither_end_nor_padding(tiny):
    end, pad = tiny[1].eos_token_id, tiny[1].pad_token_id
    ids = tiny[1].encode("1+2=3", add_special_tokens=False)
    batch = collate([[5]], [[*ids, end, pad]], [[0.0] * (len(ids) + 2)], ["stop"], tiny[1], "cpu", {end})
    assert batch.texts == ["1+2=3"]


def test_all_pairs_with_equal_responses_are_refused_in_one_line(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [{"prompt": f"p{i}", "chosen": "a", "rejected": "a"} for i in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = {"model": str(ROOT / "tiny"), "data": (str(path),), "out": str(tmp_path / "run")}
    assert "0 pairs to learn from" in refused(dpo.main, dpo.Config(**flags))

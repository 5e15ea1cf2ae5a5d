"""Faults that the other tests would not see: each of these fails with a small change of a line that a run needs."""

import importlib
import math

import pytest
import torch
from conftest import ROOT, make_sampler, read_jsonl

import grpo
import kimi_k15
import ppo
import rollout
from batch import collate
from logprobs import Policy, explained_variance, load_policy
from rollout import HFSampler, check_finite, sample_tokens, waves

RL = ["grpo", "dr_grpo", "rloo", "kimi_k15", "ppo"]
SMALL = {"prompts_per_step": 4, "group_size": 4, "eval_prompts": 8, "steps": 1, "model": str(ROOT / "tiny")}


def run(module, out, **flags) -> list[dict]:
    """The metrics of a small run of a script."""
    module.main(module.Config(out=str(out), eval_every=0, **SMALL | flags))
    return read_jsonl(out / "metrics.jsonl")


def watch(monkeypatch, module, name: str) -> list:
    """The arguments of every call of a script's function from now on."""
    calls = []
    function = getattr(module, name)

    def watched(*arguments, **named):
        calls.append((*arguments, *named.values()))
        return function(*arguments, **named)

    monkeypatch.setattr(module, name, watched)
    return calls


# --- batches ---


def batch_of(tokenizer, prompts: list[int], responses: list[int]):
    """A batch of one response to each prompt, of these lengths."""
    logps = [[0.0] * n for n in responses]
    ids = [[5] * n for n in prompts], [[6] * n for n in responses]
    return collate(*ids, logps, ["stop"] * len(responses), tokenizer, torch.device("cpu"))


@pytest.mark.parametrize(
    ("prompts", "responses", "budget", "sizes"),
    [
        ([1, 1, 1, 1], [9, 1, 1, 1], 10, [1, 3]),  # a long response widens its own part only
        ([9, 1, 1, 1], [2, 1, 1, 1], 11, [1, 3]),  # and so does a long prompt
        ([1, 1, 1, 1, 1], [1, 1, 1, 1, 1], 10, [5]),  # the budget itself is allowed
        ([1, 1, 1, 1, 1], [1, 1, 1, 1, 1], 9, [4, 1]),
    ],
)
def test_a_microbatch_is_as_full_as_its_budget_allows(tiny, prompts, responses, budget, sizes):
    batch = batch_of(tiny[1], prompts, responses)
    assert [len(part.texts) for part in batch.microbatches(batch["row"], budget)] == sizes


def test_select_drops_the_columns_that_only_other_prompts_need(tiny):
    part = batch_of(tiny[1], [9, 2, 3], [4, 1, 2]).select(torch.tensor([1, 2]))
    assert part.prompt_width == 3 and part.input_ids.shape == part.attention_mask.shape == (2, 3 + 2)


def test_neighbours_of_a_microbatch_share_their_prompt(tiny):
    prompts, responses = [[5, 5], [6]], [[7] * n for n in (2, 5, 1, 4)]
    batch = collate(prompts, responses, [[0.0] * len(r) for r in responses], ["stop"] * 4, tiny[1], "cpu")
    for budget, rows in ((10**6, [[0, 1, 2, 3]]), (3 * (2 + 5), [[0, 1, 3], [2]])):
        assert [part["row"].tolist() for part in batch.microbatches(batch["row"], budget)] == rows


# --- the sampler ---


def test_every_token_has_a_random_number_of_its_own(tiny, prompts, monkeypatch):
    numbers = []

    def watched(logits, temperature, u):
        numbers.append(u[0].item())
        return sample_tokens(logits, temperature, u)

    sampler = make_sampler(*tiny, max_new_tokens=20)
    sampler.ends = set()
    monkeypatch.setattr(rollout, "sample_tokens", watched)
    sampler.generate(prompts[:1], n=1, temperature=1.0, seed=0)
    assert len(numbers) == len(set(numbers)) == 20


def test_rounding_never_gives_a_token_of_probability_0():
    """In float32 probabilities add up to a little less than 1, or to a little more: a number may lie beyond."""
    logits = torch.randn(64, 1000, generator=torch.Generator().manual_seed(0))
    logits[:, -1] = -math.inf
    below = logits.log_softmax(-1).double().exp().sum(-1) < 1 - 2**-52
    assert below.any()
    ids, logp = sample_tokens(logits, 1.0, torch.full((64, 1), 1 - 2**-53, dtype=torch.float64))
    assert logp.isfinite().all() and (ids < 999).all()


def test_a_stop_string_of_several_tokens_ends_a_response(tiny, prompts):
    stop = "</think><answer>"
    assert len(tiny[1].encode(stop)) == 2
    batch = make_sampler(*tiny, stop=[stop]).generate(prompts, n=8, temperature=1.0, seed=0)
    stopped = [text for text in batch.texts if stop in text]
    assert len(stopped) > 5 and all(text.endswith(stop) for text in stopped)


def test_a_wave_ends_only_where_the_next_group_does_not_fit():
    prompts = [[5] * n for n in (20, 3, 3, 3, 3, 9, 1)]
    for bound in (104, 150, 200):
        parts = list(waves(prompts, 4, 6, bound))
        for start, end in parts[:-1]:
            longest = max(map(len, prompts[start : end + 1]))
            assert (end + 1 - start) * 4 * (longest + 6) > bound, (bound, parts)


def test_a_sampler_that_gives_nan_is_refused_when_it_is_made(tiny):
    policy, tokenizer = load_policy(str(ROOT / "tiny"), torch.device("cpu"))
    policy.model.get_output_embeddings().weight.data[5] = math.nan
    with pytest.raises(SystemExit, match="with its cache this model's log-probs are off by nan"):
        make_sampler(policy, tokenizer)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_log_prob_that_is_not_finite_is_enough(bad):
    check_finite([[-1.0], [-2.0, -0.5]])
    with pytest.raises(SystemExit, match="the policy's log-probs are not finite"):
        check_finite([[-1.0], [-2.0, bad]])


# --- the loop of every script ---


FLAGS = {
    "clip_low": 0.11, "clip_high": 0.22, "beta": 0.33, "tau": 0.44, "value_clip": 0.55, "max_new_tokens": 24,
    "temperature": 0.7, "seed": 3, "steps": 2, "epochs": 2, "minibatches": 1, "tokens_per_microbatch": 10**6,
}  # fmt: skip


@pytest.fixture(scope="module", params=RL)
def recorded(request, tmp_path_factory):
    """(script, its metrics, the arguments of its calls) of a run with a number of its own for every flag."""
    script = importlib.import_module(request.param)
    flags = {name: x for name, x in FLAGS.items() if name in script.Config.__dataclass_fields__}
    names = ["draw", "score", "batch_logprobs", "policy_loss"] + ["value_loss"] * (request.param == "ppo")
    with pytest.MonkeyPatch.context() as patch:
        calls = {name: watch(patch, script, name) for name in names}
        records = run(script, tmp_path_factory.mktemp("recorded") / "run", **flags)
    return request.param, records, calls


def test_all_log_probs_of_a_run_are_at_its_temperature(recorded):
    _, records, calls = recorded
    assert records[1]["sampler_gap"] < 1e-4 and {arguments[2] for arguments in calls["batch_logprobs"]} == {0.7}
    logp, old_logp = calls["policy_loss"][0][:2]
    assert torch.allclose(logp, old_logp, atol=1e-4), "pi is pi_old in the first update"


def test_every_flag_reaches_its_place_in_the_loss(recorded):
    script, _, calls = recorded
    expected = {
        "grpo": {5: "clip_low", 6: "clip_high", 8: "beta"},
        "dr_grpo": {5: "clip_low", 6: "clip_high", 8: "beta", 9: "max_new_tokens"},
        "rloo": {5: "clip_low", 6: "clip_high"},
        "kimi_k15": {5: "tau"},
        "ppo": {5: "clip_low", 6: "clip_high"},
    }[script]
    for place, name in expected.items():
        assert {arguments[place] for arguments in calls["policy_loss"]} == {FLAGS[name]}, name
    assert all(arguments[5] == FLAGS["value_clip"] for arguments in calls.get("value_loss", ()))


def test_every_step_draws_with_the_seed_of_the_run(recorded):
    assert [arguments[1:] for arguments in recorded[2]["draw"]] == [(4, 3, 1), (4, 3, 2)]


def test_a_response_is_scored_with_its_own_question(recorded):
    batch, examples, _ = recorded[2]["score"][0]
    for i, example in enumerate(examples):
        real = batch.attention_mask[i, : batch.prompt_width].bool()
        assert batch.input_ids[i, : batch.prompt_width][real].tolist() == example["prompt_ids"]


@pytest.mark.parametrize("script", RL)
def test_gradients_of_norm_1_at_most_go_to_adam(tmp_path, monkeypatch, script):
    module, norms, groups = importlib.import_module(script), [], []
    step = torch.optim.AdamW.step

    def steep(loss_of):
        """The loss times 1e4."""

        def loss(*arguments):
            found, stats = loss_of(*arguments)
            return 1e4 * found, stats

        return loss

    def watched(self, *arguments):
        for group in self.param_groups:
            groups.append((group["betas"], group["weight_decay"]))
            norms.append(torch.stack([p.grad.norm() for p in group["params"]]).norm().item())
        return step(self, *arguments)

    for name in ("policy_loss", "value_loss") if script == "ppo" else ("policy_loss",):
        monkeypatch.setattr(module, name, steep(getattr(module, name)))
    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    record = run(module, tmp_path / "run")[1]
    assert record["grad_norm"] > 1 and norms == pytest.approx([1.0] * len(norms), abs=1e-4)
    assert set(groups) == {((0.9, 0.95), 0.0)}


@pytest.mark.parametrize("script", RL)
def test_a_weight_of_importance_is_of_the_token_or_of_the_whole_response(tmp_path, monkeypatch, script):
    module = importlib.import_module(script)
    generate = HFSampler.generate

    def shifted(self, *arguments, **named):
        batch = generate(self, *arguments, **named)
        batch.sampler_logp += 0.1 * batch.response_mask
        return batch

    monkeypatch.setattr(HFSampler, "generate", shifted)
    of_loss = watch(monkeypatch, module, "policy_loss")
    run(module, tmp_path / "run", tis=2.0)
    for arguments in of_loss:
        mask, weight = arguments[3], arguments[-1]
        if script in ("rloo", "kimi_k15"):
            expected = (-0.1 * mask.sum(1, keepdim=True)).exp()
            assert torch.allclose(weight, expected, atol=1e-4)
        else:
            assert torch.allclose(weight[mask], torch.tensor(math.exp(-0.1)), atol=1e-4)


@pytest.mark.parametrize("script", ["grpo", "dr_grpo"])
@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_a_response_without_advantage_is_computed_only_where_there_is_a_kl(tmp_path, monkeypatch, script, beta):
    module = importlib.import_module(script)
    of_loss = watch(monkeypatch, module, "policy_loss")
    record = run(module, tmp_path / "run", beta=beta)[1]
    rows = sum(len(arguments[2]) for arguments in of_loss)
    assert 0 < record["informative_groups"] < 1
    assert rows == (16 if beta else 16 * record["informative_groups"])


# --- PPO ---


def test_explained_variance_is_of_the_discounted_return(tmp_path, monkeypatch):
    of_gae, explained = (watch(monkeypatch, ppo, name) for name in ("gae", "explained_variance"))
    run(ppo, tmp_path / "run", gamma=0.5)
    r, values, mask = of_gae[0][:3]
    assert torch.equal(explained[0][1], ppo.gae(r, 0 * values, mask, 0.5, 1.0))
    assert torch.equal(explained[0][0], values)


def test_explained_variance_is_over_the_tokens_of_all_processes():
    values, returns = torch.tensor([[0.0, 1.0], [4.0, 2.0]]), torch.tensor([[1.0, 1.0], [3.0, 6.0]])
    mask = torch.ones(2, 2, dtype=torch.bool)
    expected = explained_variance(values, returns, mask, lambda x: x)
    shares = [{}, {}]  # what each process adds up, one sum after the other
    sums = {}

    def part(i):
        count = iter(range(10))

        def all_sum(x):
            k = next(count)
            shares[i][k] = x
            return sums.get(k, x)

        return explained_variance(values[i : i + 1], returns[i : i + 1], mask[i : i + 1], all_sum)

    for known in range(10):  # the sums that both processes know so far
        found = [part(0), part(1)]
        if known in shares[0]:
            sums[known] = shares[0][known] + shares[1][known]
    assert found == pytest.approx([expected, expected])
    assert len(sums) == 5, "the tokens, and a mean and a variance of what is left and of the returns"


def test_a_gradient_of_v_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    of_loss = ppo.value_loss

    def broken(values, *arguments):
        loss, stats = of_loss(values, *arguments)
        return loss + 0 * (values - values.detach()).abs().sqrt().sum(), stats  # whose gradient is nan

    monkeypatch.setattr(ppo, "value_loss", broken)
    with pytest.raises(SystemExit, match="step 1: the gradient norm 2 is nan"):
        run(ppo, tmp_path / "run")


def test_values_are_clipped_around_those_of_the_rollout(tmp_path, monkeypatch):
    of_value = watch(monkeypatch, ppo, "value_loss")
    run(ppo, tmp_path / "run", epochs=2, minibatches=1, tokens_per_microbatch=10**6)
    (first, old, returns), (second, same, _) = (arguments[:3] for arguments in of_value)
    assert torch.equal(old, same) and torch.allclose(first, old, atol=1e-6)
    assert (second - old).abs().max() > 1e-3 and not old.requires_grad and not returns.requires_grad


def test_the_kl_in_the_reward_is_of_pi_old_over_the_reference(tmp_path, monkeypatch):
    numbers = iter([-1.0, -1.5])  # log pi_old, then log pi_ref, of every token
    monkeypatch.setattr(ppo, "batch_logprobs", lambda policy, batch, *_: next(numbers) * batch.response_mask)
    of_reward = watch(monkeypatch, ppo, "token_rewards")
    record = run(ppo, tmp_path / "run", epochs=1, minibatches=1)[1]
    ((_, kl, mask, beta),) = of_reward
    assert beta == 0.04 and torch.equal(kl, 0.5 * mask) and record["kl"] == pytest.approx(0.5)


# --- Kimi ---


def test_the_draws_of_a_growing_pool_depend_on_seed_and_step():
    examples = [{"question": str(i), "level": i} for i in range(100)]

    def drawn(step, seed=0):
        config = kimi_k15.Config(curriculum=50, prompts_per_step=8, seed=seed)
        return [e["level"] for e in kimi_k15.draw_questions(examples, kimi_k15.SuccessRates(), config, step)]

    assert drawn(20) == drawn(20) != drawn(20, seed=1) and drawn(20) != drawn(21)


def test_a_curriculum_needs_the_level_of_every_question():
    examples = [{"question": "a", "level": 1}, {"question": "b"}]
    with pytest.raises(SystemExit, match="--curriculum needs questions with a level"):
        kimi_k15.check_levels(examples, kimi_k15.Config(curriculum=2))


def test_the_success_rates_count_the_responses_of_all_processes(monkeypatch):
    other = [("a", 1.0), ("b", 0.0)]  # what the other process has
    monkeypatch.setattr(kimi_k15, "gather", lambda mine: mine + other)
    rates = kimi_k15.SuccessRates()
    rates.record([{"question": "a"}, {"question": "a"}], [0.0, 1.0])
    assert rates.counts == {"a": [2, 3], "b": [0, 1]}


# --- the reference ---


def test_the_reference_stays_where_the_policy_began(tmp_path, monkeypatch):
    made = []
    reference = Policy.reference
    monkeypatch.setattr(Policy, "reference", lambda policy: made.append(reference(policy)) or made[-1])
    records = run(grpo, tmp_path / "run", steps=2, lr=1e-3)
    before, _ = load_policy(str(ROOT / "tiny"), torch.device("cpu"))
    for p, q in zip(before.parameters(), made[0].parameters(), strict=True):
        assert torch.equal(p, q)
    assert records[1]["kl"] == pytest.approx(0, abs=1e-6) and records[2]["kl"] > 1e-5

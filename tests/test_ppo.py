"""ppo.py: its equations against values worked out by hand, the value network, and the script."""

import copy
import json
import math
import weakref

import pytest
import torch
import transformers
from accelerate import Accelerator
from conftest import ROOT, answers, make_sampler, read_jsonl, run_script
from test_siblings import OBJECTIVE, double, sections
from transformers import AutoConfig, AutoModelForCausalLM, LlamaModel

import ppo
from batch import collate
from data import encode_prompts, load_task
from logprobs import Policy, Value, batch_values, load_policy, load_value
from rewards import score

MASK = torch.arange(7) < torch.tensor([[7], [4], [1]])  # ragged rows
SMALL = {"prompts_per_step": 4, "group_size": 4, "eval_prompts": 8, "steps": 1, "model": str(ROOT / "tiny")}


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def run(tmp_path, name, **flags):
    ppo.main(ppo.Config(out=str(tmp_path / name), **SMALL | flags))
    return read_jsonl(tmp_path / name / "metrics.jsonl")


def saved(tmp_path, name):
    return torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)


def test_it_differs_only_in_the_objective_and_in_the_set_up_of_the_value_network():
    base, other = sections("grpo"), sections("ppo")
    assert list(base) == list(other)
    assert {name for name in base if base[name] != other[name]} <= OBJECTIVE | {
        "top",
        "training",
        "log, evaluate, save",
    }
    gone = set(base["log, evaluate, save"].splitlines()) - set(other["log, evaluate, save"].splitlines())
    assert [line.strip() for line in gone] == ["run.evaluate(step, sampler, test, weights)"]
    gone = set(base["top"].splitlines()) - set(other["top"].splitlines())
    names = {line.strip().split(":")[0] for line in gone if not line.startswith("from logprobs import")}
    assert names == {"group_size", "epochs", "minibatches", "lr"}, "these defaults are others; else only added lines"


# --- rewards, GAE, whitening ---


def test_the_reward_is_at_the_last_real_token():
    r = ppo.token_rewards(double(1, 2, 3), torch.zeros(3, 7, dtype=torch.float64), MASK, 0.1)
    expected = torch.zeros(3, 7, dtype=torch.float64)
    expected[0, 6], expected[1, 3], expected[2, 0] = 1, 2, 3
    assert torch.equal(r, expected)
    kl = random(3, 7)
    assert torch.allclose(ppo.token_rewards(double(1, 2, 3), kl, MASK, 0.1), expected - 0.1 * kl * MASK)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.9, 0.0), (0.9, 0.8), (1.0, 0.95), (0.5, 1.0)])
def test_gae_against_the_double_sum(gamma, lam):
    r, V = random(3, 7) * MASK, random(3, 7, seed=1)
    A = ppo.gae(r, V, MASK, gamma, lam)
    for i, length in enumerate(MASK.sum(1).tolist()):
        v = [*V[i, :length].tolist(), 0.0]
        delta = [r[i, t].item() + gamma * v[t + 1] - v[t] for t in range(length)]
        for t in range(7):
            by_hand = sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, length))
            assert A[i, t].item() == pytest.approx(by_hand, abs=1e-12)
            if lam == 0 and t < length:
                assert A[i, t].item() == delta[t]
            if lam == 1 and t < length:
                returns = sum(gamma ** (k - t) * r[i, k].item() for k in range(t, length))
                assert A[i, t].item() == pytest.approx(returns - v[t], abs=1e-12)


def test_with_gamma_and_lam_1_the_advantage_is_exactly_return_minus_value():
    g = torch.Generator().manual_seed(0)  # multiples of 1/8: nothing is rounded
    r, V = (torch.randint(-8, 8, (3, 7), generator=g) / 8 * MASK for _ in range(2))
    returns = r.flip(1).cumsum(1).flip(1)
    assert torch.equal(ppo.gae(r, V, MASK, 1.0, 1.0), (returns - V) * MASK)


@pytest.mark.parametrize("garbage", [1e9, math.inf, math.nan])
def test_nothing_beyond_the_end_leaks(garbage):
    r, V = random(3, 7) * MASK, random(3, 7, seed=1)
    clean = ppo.gae(r, V, MASK, 0.9, 0.8)
    assert torch.equal(ppo.gae(r, V.masked_fill(~MASK, garbage), MASK, 0.9, 0.8), clean)
    assert torch.equal(ppo.gae(r.masked_fill(~MASK, garbage), V, MASK, 0.9, 0.8), clean)
    assert not clean[~MASK].any()
    for i, length in enumerate(MASK.sum(1).tolist()):  # and a row alone, without padding, has the same advantages
        row = slice(i, i + 1), slice(0, length)
        assert torch.allclose(ppo.gae(r[row], V[row], MASK[row], 0.9, 0.8), clean[row])


def test_whitening_is_over_the_tokens_of_all_processes():
    x = random(3, 7) * 3 + 5
    white = ppo.whiten(x, MASK, lambda total: total)
    assert white[MASK].mean().item() == pytest.approx(0, abs=1e-12)
    assert white[MASK].std(correction=1).item() == pytest.approx(1, rel=1e-4) and not white[~MASK].any()
    garbage = x.masked_fill(~MASK, 1e6)
    assert torch.equal(ppo.whiten(garbage, MASK, lambda total: total), white)
    # Two processes with equal halves: the sums of all are twice those of one.
    both = ppo.whiten(torch.cat([x, x]), torch.cat([MASK, MASK]), lambda total: total)
    assert torch.allclose(ppo.whiten(x, MASK, lambda total: 2 * total), both[:3], atol=1e-12)
    assert torch.equal(ppo.whiten(torch.ones(3, 7), MASK, lambda total: total), torch.zeros(3, 7))


# --- kl ---


def test_k1_is_unbiased_and_clamped_it_is_too_large():
    p, ref = double(0.7, 0.2, 0.1), double(0.05, 0.15, 0.8)
    exact = (p * (p / ref).log()).sum().item()
    assert (p * ppo.kl_k1(p.log(), ref.log(), False)).sum().item() == pytest.approx(exact)
    for seed in range(20):
        logp, ref = random(2, 5, seed=seed).log_softmax(-1)
        exact = (logp.exp() * (logp - ref)).sum()
        clamped = (logp.exp() * ppo.kl_k1(logp, ref, True)).sum()
        cut_off = (logp.exp() * (ref - logp).clamp(min=0)).sum()
        assert clamped > exact and clamped.item() == pytest.approx((exact + cut_off).item())


# --- losses ---


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("ratio", [0.5, 0.75, 0.95, 1.0, 1.05, 1.25, 2.0])
def test_clip_table(advantage, ratio):
    logp = double(math.log(ratio)).view(1, 1).requires_grad_()
    A, mask = double(advantage).view(1, 1), torch.ones(1, 1, dtype=torch.bool)
    loss, stats = ppo.policy_loss(logp, torch.zeros(1, 1, dtype=torch.float64), A, mask, 1, 0.2, 0.2)
    loss.backward()
    is_clipped = ratio > 1.2 if advantage > 0 else ratio < 0.8
    assert stats["clip_fraction"].item() == is_clipped
    assert logp.grad.item() == 0 if is_clipped else logp.grad.item() == pytest.approx(-advantage * ratio)


@pytest.mark.parametrize(
    ("value", "old", "target", "loss", "gradient"),
    [
        (0.1, 0.0, 1.0, 0.405, -0.9),  # inside the range: the plain squared error
        (0.5, 0.0, 1.0, 0.32, 0.0),  # outside and closer to the target: the clipped error is the larger; no gradient
        (-0.5, 0.0, 1.0, 1.125, -1.5),  # outside and farther: the plain error is the larger, and pulls back
        (0.5, 0.0, -1.0, 1.125, 1.5),
        (-0.5, 0.0, -1.0, 0.32, 0.0),
    ],
)
def test_value_clip_takes_the_worse_error(value, old, target, loss, gradient):
    v, old, target = (double(x).view(1, 1) for x in (value, old, target))
    v.requires_grad_()
    result, stats = ppo.value_loss(v, old, target, torch.ones(1, 1, dtype=torch.bool), 1, 0.2)
    result.backward()
    assert result.item() == pytest.approx(loss) == stats["value_loss"].item()
    assert v.grad.item() == pytest.approx(gradient)


def test_gradients_against_finite_differences_and_in_parts():
    logp, old, A = random(3, 7).requires_grad_(), random(3, 7) + 0.05 * random(3, 7, seed=1), random(3, 7, seed=2)
    v, old_v, returns = random(3, 7, seed=3).requires_grad_(), random(3, 7, seed=4), random(3, 7, seed=5)
    n = MASK.sum()

    def losses(logp, v, rows):
        policy = ppo.policy_loss(logp[rows], old[rows], A[rows], MASK[rows], n, 0.2, 0.2)[0]
        return policy, ppo.value_loss(v[rows], old_v[rows], returns[rows], MASK[rows], n, 0.2)[0]

    assert torch.autograd.gradcheck(lambda x, y: losses(x, y, slice(None)), (logp, v))
    parts = zip(losses(logp, v, slice(0, 1)), losses(logp, v, slice(1, 3)), strict=True)
    for (one, other), whole in zip(parts, losses(logp, v, slice(None)), strict=True):
        assert (one + other).item() == pytest.approx(whole.item(), abs=1e-12)
    on_policy = logp.detach().requires_grad_()
    ppo.policy_loss(on_policy, logp.detach(), A, MASK, n, 0.2, 0.2)[0].backward()
    assert torch.allclose(on_policy.grad, -A * MASK / n), "every token of the update weighs the same"


# --- the value network ---


SHAPE = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPES = {  # where other names are in use
    "ctrl": {"vocab_size": 64, "n_embd": 32, "dff": 64, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gptj": {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4},
}
REWARD_MODELS = [  # class, family, and the name of its head
    ("LlamaForSequenceClassification", "llama", "score"),
    ("CTRLForSequenceClassification", "ctrl", "classifier"),
    ("LlamaForTokenClassification", "llama", "score"),
    ("GPTNeoXForTokenClassification", "gpt_neox", "classifier"),  # with a bias
]
PROMPTS = [[5, 6], [2]]
RESPONSES = [[7, 8, 9], [3], [4, 4], [9, 9, 9, 9]]  # two to each prompt


def small(name: str, family: str, num_labels: int):
    """A small model of this class with random weights, its head included."""
    config = AutoConfig.for_model(family, num_labels=num_labels, pad_token_id=0, **SHAPES.get(family, SHAPE))
    torch.manual_seed(0)
    model = getattr(transformers, name)(config).eval()
    for p in model.parameters():
        p.data.normal_(0, 0.3)
    return model


@pytest.fixture
def responses(tiny):
    return collate(PROMPTS, RESPONSES, [[0.0] * len(r) for r in RESPONSES], ["stop"] * 4, tiny[1], "cpu")


@pytest.mark.parametrize(("name", "family", "head"), REWARD_MODELS)
def test_the_value_of_a_token_is_what_a_reward_model_says_of_all_before_it(tmp_path, responses, name, family, head):
    model = small(name, family, num_labels=1)
    model.save_pretrained(tmp_path)
    value = load_value(str(tmp_path), torch.device("cpu"))
    assert torch.equal(value.head.weight, getattr(model, head).weight) and value.head.weight.any()
    V = value(responses)
    assert V.shape == (4, 4) and V.dtype == torch.float32 and not V[~responses.response_mask].any()
    weights = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    total = 0.0
    for i, response in enumerate(RESPONSES):
        prompt = PROMPTS[i // 2]
        for t in range(len(response)):
            before = torch.tensor([prompt + response[:t]])
            expected = model(before).logits.flatten()[-1]
            assert V[i, t].item() == pytest.approx(expected.item(), abs=1e-4)
            total = total + weights[i, t] * expected
    total.backward()
    (V * weights).sum().backward()
    for (path, p), q in zip(value.body.named_parameters(), model.base_model.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=1e-3, atol=1e-3), path
    assert torch.allclose(value.head.weight.grad, getattr(model, head).weight.grad, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "family"), [("GPTNeoXForCausalLM", "gpt_neox"), ("GPTJForCausalLM", "gptj"), ("Olmo2ForCausalLM", "olmo2")]
)
def test_any_language_model_is_a_value_network_that_says_zero_at_first(tmp_path, responses, name, family):
    """Of two of these families Transformers has no classifier of tokens."""
    model = small(name, family, num_labels=3)  # which means nothing to a language model
    model.save_pretrained(tmp_path)
    value = load_value(str(tmp_path), torch.device("cpu"))
    assert not value(responses).any()
    for p, q in zip(value.body.parameters(), model.base_model.parameters(), strict=True):
        assert torch.equal(p, q)
    (value(responses) - 1.0)[responses.response_mask].square().sum().backward()
    assert value.head.weight.grad.all() and value.head.bias.grad.item() == pytest.approx(-2 * 10), "-2 per token"
    assert not any(p.grad.any() for p in value.body.parameters() if p.grad is not None), "a head of zeros hides it"
    value.head.weight.data.normal_()
    value(responses).sum().backward()
    assert all(p.grad.any() for name, p in value.body.named_parameters() if not name.endswith("bias"))


@pytest.mark.parametrize("name", ["LlamaForSequenceClassification", "LlamaForTokenClassification", "LlamaModel"])
def test_a_folder_with_no_head_to_start_from_is_one_clear_line(tmp_path, capsys, name):
    small(name, "llama", num_labels=3).save_pretrained(tmp_path)
    capsys.readouterr()
    with pytest.raises(SystemExit, match="neither a language model nor a head with one output") as error:
        load_value(str(tmp_path), torch.device("cpu"))
    assert error.value.code == 2 and str(error.value).startswith(f"--value-model {tmp_path}: ")
    assert "\n" not in str(error.value) and str(error.value) in capsys.readouterr().err.splitlines()


@pytest.mark.parametrize(
    ("name", "family", "words"),
    [
        ("BertForSequenceClassification", "bert", "depend on later tokens"),
        ("ModernBertDecoderForSequenceClassification", "modernbert-decoder", "more than a linear head"),
    ],
)
def test_a_head_that_cannot_be_taken_over_is_refused(tmp_path, name, family, words):
    small(name, family, num_labels=1).save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match=words):
        load_value(str(tmp_path), torch.device("cpu"))


def test_a_value_model_that_cannot_be_loaded_is_one_clear_line(tmp_path):
    with pytest.raises(SystemExit, match="--value-model no/such-model cannot be loaded") as error:
        load_value("no/such-model", torch.device("cpu"))
    assert "\n" not in str(error.value)
    small("LlamaForCausalLM", "llama", num_labels=1).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["NoSuchModel"]}))
    with pytest.raises(SystemExit, match="the class NoSuchModel, which Transformers does not have") as error:
        load_value(str(tmp_path), torch.device("cpu"))
    assert "\n" not in str(error.value)


def test_values_start_at_zero_and_do_not_see_the_token_they_come_before(tiny):
    value = load_value(str(ROOT / "tiny"), torch.device("cpu"))
    assert isinstance(value, Value) and isinstance(value.body, LlamaModel)
    assert not value.training and all(p.dtype == torch.float32 for p in value.parameters())
    prompts = [e["prompt_ids"] for e in encode_prompts(load_task("arithmetic").train[:3], tiny[1], "plain", 64)]
    batch = make_sampler(*tiny).generate(prompts, n=2, temperature=1.0, seed=0)
    assert not value(batch).any()
    torch.nn.init.normal_(value.head.weight, generator=torch.Generator().manual_seed(0))
    V, t = value(batch), 3
    assert V.shape == batch.response_mask.shape and V[batch.response_mask].all() and not V[~batch.response_mask].any()
    changed = copy.copy(batch)
    changed.input_ids = batch.input_ids.clone()
    changed.input_ids[:, -V.shape[1] + t] = 5
    W = value(changed)
    assert torch.equal(W[:, : t + 1], V[:, : t + 1]) and not torch.equal(W[:, t + 1], V[:, t + 1])
    alone = value(batch.select(torch.tensor([4])))  # other padding, left and right
    assert torch.allclose(alone, V[4:5, : alone.shape[1]], atol=1e-5)
    for budget in (1, 100, 10**6):
        whole = batch_values(value, batch, budget)
        assert torch.allclose(whole, V, atol=1e-5) and not whole.requires_grad


def test_a_value_network_shares_no_weight_with_the_policy(tiny):
    model = AutoModelForCausalLM.from_pretrained(ROOT / "tiny")
    value = load_value(str(ROOT / "tiny"), torch.device("cpu"))
    theirs = {p.data_ptr() for p in model.parameters()} | {p.data_ptr() for p in tiny[0].parameters()}
    assert not theirs & {p.data_ptr() for p in value.parameters()}


def test_every_parameter_is_in_exactly_one_group(tmp_path, monkeypatch):
    made, models = [], []
    adam, value_of, policy_of = torch.optim.AdamW, ppo.make_value, ppo.make_policy
    monkeypatch.setattr(torch.optim, "AdamW", lambda *a, **k: made.append(adam(*a, **k)) or made[-1])
    monkeypatch.setattr(ppo, "make_value", lambda *a: models.append(value_of(*a)) or models[-1])
    monkeypatch.setattr(ppo, "make_policy", lambda *a: (lambda x: models.append(x[0]) or x)(policy_of(*a)))
    run(tmp_path, "run", beta=0.0, lr=1e-4, value_lr=2e-3)
    (optimizer,) = made
    policy, value = models
    for group, model, lr in zip(optimizer.param_groups, (policy, value), (1e-4, 2e-3), strict=True):
        assert [id(p) for p in group["params"]] == [id(p) for p in model.parameters()] and group["lr"] == lr
    everything = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(set(everything)) == len(everything) and all(p.requires_grad for p in policy.parameters())


# --- the script ---


@pytest.mark.parametrize("flags", [{"epochs": 2}, {"beta": 0.0}, {"epochs": 2, "minibatches": 2, "lam": 0.9}])
def test_any_microbatch_size_gives_the_same_run(tmp_path, flags):
    one, other = (run(tmp_path, str(n), tokens_per_microbatch=n, **flags)[1] for n in (1, 10**6))
    names = {"loss", "value_loss", "grad_norm", "kl", "entropy", "clip_fraction", "ratio_max", "reward"} & one.keys()
    assert len(names) >= 7
    for name in names:
        assert one[name] == pytest.approx(other[name], rel=1e-3, abs=1e-6), name


def test_in_the_value_warmup_no_weight_of_the_policy_changes(tmp_path):
    run(tmp_path, "warm", steps=2, epochs=2, value_warmup=2)
    state, before = saved(tmp_path, "warm"), load_policy(str(ROOT / "tiny"), torch.device("cpu"))[0].state_dict()
    assert all(torch.equal(before[name], x) for name, x in state["policy"].items())
    assert state["value"]["head.weight"].any()
    assert len(state["optimizer"]["state"]) == len(state["optimizer"]["param_groups"][1]["params"])
    run(tmp_path, "after", steps=3, epochs=2, value_warmup=2)
    assert any(not torch.equal(before[name], x) for name, x in saved(tmp_path, "after")["policy"].items())


class Kept:
    """A tensor that a graph keeps for the backward pass."""

    def __init__(self, tensor):
        self.tensor = tensor


def test_the_graph_of_v_is_freed_before_that_of_the_policy_is_built(tmp_path, monkeypatch):
    kept = weakref.WeakSet()  # by graphs of V that are still there
    before, after = [], []  # how many, when V was computed, and when the policy is about to be
    forward, value_forward = Policy.forward, Value.forward

    def keep(tensor):
        one = Kept(tensor)
        kept.add(one)
        return one

    def watched_value(self, *arguments):
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda one: one.tensor):
            V = value_forward(self, *arguments)
        before.append(len(kept))
        return V

    def watched_policy(self, *arguments):
        if torch.is_grad_enabled():
            after.append(len(kept))
        return forward(self, *arguments)

    monkeypatch.setattr(Value, "forward", watched_value)
    monkeypatch.setattr(Policy, "forward", watched_policy)
    run(tmp_path, "run")
    assert max(before) > 10 and len(after) >= 4 and not any(after)


def test_two_backward_passes_give_the_gradients_of_one_sum(tmp_path, monkeypatch):
    flags = {"steps": 2, "tokens_per_microbatch": 300}
    apart = run(tmp_path, "apart", **flags)[2]
    waiting = []  # the loss of V, until that of the policy comes
    backward = Accelerator.backward

    def together(self, loss):
        if not waiting:
            waiting.append(loss)
        else:
            backward(self, waiting.pop() + loss)

    monkeypatch.setattr(Accelerator, "backward", together)
    summed = run(tmp_path, "together", **flags)[2]
    for name in ("grad_norm", "value_grad_norm", "loss", "value_loss", "kl"):
        assert summed[name] == pytest.approx(apart[name], rel=1e-5, abs=1e-9) != 0, name
    one, other = saved(tmp_path, "apart"), saved(tmp_path, "together")
    for network in ("policy", "value"):
        assert all(torch.allclose(x, other[network][name], atol=1e-7) for name, x in one[network].items())


def test_gradient_checkpointing_is_for_both_networks_and_changes_nothing(tmp_path, monkeypatch):
    passes = []  # through the first layer of V, with gradient
    load = ppo.make_value

    def load_watched(*arguments):
        value = load(*arguments)
        value.body.layers[0].register_forward_pre_hook(lambda *_: passes.append(torch.is_grad_enabled()))
        return value

    monkeypatch.setattr(ppo, "make_value", load_watched)
    one = run(tmp_path, "one", steps=2)[2]
    plain = sum(passes)
    passes.clear()
    other = run(tmp_path, "other", steps=2, gradient_checkpointing=True)[2]
    assert sum(passes) == 2 * plain > 0, "each layer is computed again in the backward pass"
    for name in ("grad_norm", "value_grad_norm", "value_loss", "kl"):
        assert other[name] == pytest.approx(one[name], rel=1e-4, abs=1e-8), name


def test_a_value_model_with_another_tokenizer_is_one_clear_line(tmp_path, tiny):
    model = small("LlamaForCausalLM", "llama", num_labels=1)
    model.resize_token_embeddings(len(tiny[1]))
    model.save_pretrained(tmp_path / "other")
    words = json.loads((ROOT / "tiny" / "tokenizer.json").read_text())
    ids = words["model"]["vocab"]
    one, two = list(ids)[-2:]
    ids[one], ids[two] = ids[two], ids[one]
    tiny[1].save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(words))
    with pytest.raises(SystemExit, match="its vocabulary is not that of the policy") as error:
        run(tmp_path, "run", value_model=str(tmp_path / "other"))
    assert error.value.code == 2 and "\n" not in str(error.value)


def test_resuming_continues_to_the_bit(tmp_path):
    flags = {"epochs": 2, "minibatches": 2, "value_warmup": 1}
    run(tmp_path, "whole", steps=4, **flags)
    run(tmp_path, "cut", steps=2, **flags)
    run(tmp_path, "cut", steps=4, resume=str(tmp_path / "cut"), **flags)
    whole, cut = saved(tmp_path, "whole"), saved(tmp_path, "cut")
    for name in ("policy", "value"):
        assert all(torch.equal(x, cut[name][key]) for key, x in whole[name].items())


def test_held_out_responses_token_by_token(tmp_path, tiny):
    tokenizer = tiny[1]
    run(tmp_path, "run", steps=2, eval_every=1, eval_prompts=12, temperature=0.8, rewards=("accuracy=1", "tagged=0.5"))
    lines = read_jsonl(tmp_path / "run" / "held_out.jsonl")
    examples = load_task("arithmetic").test[:8]
    assert [line["step"] for line in lines] == [0] * 8 + [1] * 8 + [2] * 8, "8 of 12 questions, at every evaluation"
    for step in range(3):
        for line, example in zip(lines[8 * step : 8 * step + 8], examples, strict=True):
            assert (line["question"], line["answer"]) == (example["question"], example["answer"])
    for line, example in zip(lines, examples * 3, strict=True):
        ids, tokens = line["token_ids"], line["tokens"]
        assert len(ids) == len(tokens) == len(line["logp"]) == len(line["values"]) > 0
        assert all(x <= 0 for x in line["logp"])
        assert line["finish_reason"] == ("stop" if ids[-1] == tokenizer.eos_token_id else "length")
        written = tokens[:-1] if line["finish_reason"] == "stop" else tokens
        assert "".join(written) == line["response"] == tokenizer.decode(ids, skip_special_tokens=True)
        assert tokens[-1] == tokenizer.eos_token or line["finish_reason"] == "length"
        scores = score(answers([line["response"]]), [example], ["format", "tagged"])
        assert {name: line[f"reward/{name}"] for name in scores} == {name: x for name, (x,) in scores.items()}
        known = {"step", "question", "answer", "response", "finish_reason", "token_ids", "tokens", "logp", "values"}
        assert line.keys() == known | {"reward/accuracy", "reward/format", "reward/tagged"}
    assert not any(x for line in lines[:8] for x in line["values"]) and all(any(x["values"]) for x in lines[8:])

    # The numbers of the last evaluation are those of the networks that were saved after it.
    policy, _ = load_policy(str(tmp_path / "run" / "model"), torch.device("cpu"))
    value = load_value(str(ROOT / "tiny"), torch.device("cpu"))
    value.load_state_dict(saved(tmp_path, "run")["value"])
    prompts = [e["prompt_ids"] for e in encode_prompts(examples, tokenizer, "plain", 64)]
    last = lines[16:]
    responses = [line["token_ids"] for line in last]
    reasons = [line["finish_reason"] for line in last]
    batch = collate(prompts, responses, [line["logp"] for line in last], reasons, tokenizer, "cpu")
    with torch.no_grad():
        logp, V = policy(batch, 0.8)[0], value(batch)
    assert torch.allclose(logp, batch.sampler_logp, atol=1e-4)
    for i, line in enumerate(last):
        assert line["values"] == pytest.approx(V[i, : len(line["values"])].tolist(), abs=1e-5)


def test_fewer_held_out_questions_than_shown_are_all_there(tmp_path):
    run(tmp_path, "run", eval_prompts=3)
    lines = read_jsonl(tmp_path / "run" / "held_out.jsonl")
    questions = [example["question"] for example in load_task("arithmetic").test[:3]]
    assert [line["question"] for line in lines] == questions * 2, "before and after"


def test_a_resumed_run_has_every_held_out_line_once(tmp_path):
    flags = {"eval_every": 1, "eval_prompts": 3}
    run(tmp_path, "whole", steps=3, **flags)
    run(tmp_path, "cut", steps=2, **flags)
    whole, cut = (tmp_path / name / "held_out.jsonl" for name in ("whole", "cut"))
    later = [line for line in whole.read_text().splitlines(keepends=True) if json.loads(line)["step"] == 3]
    assert len(later) == 3
    with open(cut, "a") as file:  # stopped in step 3, whose checkpoint was not saved yet
        file.write("".join(later[:2]) + later[2][:20])
    run(tmp_path, "cut", steps=3, resume=str(tmp_path / "cut"), **flags)
    assert cut.read_text() == whole.read_text()
    keys = [(line["step"], line["question"]) for line in read_jsonl(cut)]
    assert len(keys) == len(set(keys)) == 4 * 3


def test_the_clamped_kl_is_only_in_the_reward(tmp_path):
    plain, clamped = (run(tmp_path, str(x), steps=2, beta=1.0, lr=1e-3, clamp_kl=x)[2] for x in (False, True))
    assert plain["kl"] == clamped["kl"] and plain["value_loss"] != clamped["value_loss"]


@pytest.mark.slow  # test_reward_model.py has a shorter one
def test_accuracy_rises(tmp_path):
    run_script("ppo.py", "--steps", 25, "--eval-every", 0, "--out", tmp_path / "run")
    records = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    print([record["eval_pass@1"] for record in records if "eval_pass@1" in record])
    assert records[-1]["eval_pass@1"] > records[0]["eval_pass@1"] + 0.2
    assert records[-1]["eval_format"] > records[0]["eval_format"] + 0.2
    assert sum(r["value_loss"] for r in records[-5:]) < sum(r["value_loss"] for r in records[1:6])

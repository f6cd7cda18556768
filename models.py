"""Which models can be trained and evaluated, and the form of their heads.

A model is refused for its structure, not for its name, and before anything expensive. The code
needs `model.embed_tokens`, `model.layers` of matrices and vectors, a final norm and `lm_head`;
logits that are cap·tanh(slope·z/cap) of z = W h + b; and a checkpoint with every weight.
docs/families.md lists the families that were tried. A refusal ends the program with one line:
harness.fail().
"""

import copy
import json
import math
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

import workarounds
from harness import announce, fail, first_line

# --------------------------------------------------------------------------------------- the folder


# What is read of a folder, beside the weights. The libraries' errors do not name the file.
JSON_FILES = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
JSON_FILES += ["special_tokens_map.json", "added_tokens.json", "vocab.json", "adapter_config.json"]
JSON_FILES += ["model.safetensors.index.json"]


def check_folder(name: str, path: str) -> None:
    """Refuse a folder that is an adapter, has no config.json, or has a broken JSON file."""
    folder = Path(path)
    for file in JSON_FILES:
        if (folder / file).is_file():
            read_json(name, folder / file)
    if (folder / "adapter_config.json").is_file():
        base = json.loads((folder / "adapter_config.json").read_text())
        base = base.get("base_model_name_or_path") or "its base model"
        fail(f"--model {name} is an adapter of {base}: merge the two into one model first")
    if not (folder / "config.json").is_file():
        fail(f"--model {name}: the folder has no config.json; give a Hugging Face model folder")


def read_json(name: str, file: Path) -> dict:
    """The JSON object in a file of the model's folder.

    Args:
        name: --model, for error lines.
    """
    text = file.read_bytes()
    if text.startswith(b"version https://git-lfs"):
        fail(f"--model {name}: {file.name} is a Git LFS pointer; fetch the file with git lfs pull")
    try:
        content = json.loads(text)
    except ValueError as error:
        fail(f"--model {name}: {file.name} is not JSON ({first_line(error)}); fetch it again")
    if not isinstance(content, dict):
        fail(f"--model {name}: {file.name} is not a JSON object; fetch it again")
    return content


def weight_files(path: str) -> list[Path]:
    """The files from which transformers reads the weights; a folder may have other files too."""
    folder = Path(path)
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if index.is_file():
        file_of = json.loads(index.read_text()).get("weight_map")  # of each tensor
        if not file_of or not isinstance(file_of, dict):
            raise ValueError(f"{index.name} has no weight_map; fetch it again")
        return [folder / file for file in sorted(set(file_of.values()))]
    return []


def read_headers(name: str, path: str) -> dict[str, tuple[list[int], str]]:
    """Shape and dtype (F32, BF16, ...) of each tensor of the checkpoint, by name.

    Args:
        name: --model, for error lines; path: its folder.
    """
    files = weight_files(path)
    if not files and list(Path(path).glob("*.bin")):
        fail(
            f"--model {name} has its weights in .bin files only: load the model with transformers "
            "and save it with save_pretrained(), which writes safetensors"
        )
    if not files:
        fail(
            f"--model {name}: there is no model.safetensors, whole or in parts. If the weights "
            "have another format, load the model with transformers and use save_pretrained()"
        )
    headers = {}
    for file in files:
        if not file.is_file():
            fail(f"--model {name}: {file.name}, which the index names, is missing; fetch it again")
        try:
            with safe_open(file, "pt") as tensors:
                for key in tensors.keys():
                    tensor = tensors.get_slice(key)
                    headers[key] = tensor.get_shape(), tensor.get_dtype()
        except SafetensorError as error:
            fail(f"--model {name}: {file.name} cannot be read: {first_line(error)}")
    return headers


def check_checkpoint(name: str, path: str, lm) -> None:
    """Refuse a checkpoint in which a weight is missing, quantised or of another shape.

    Args:
        lm: the model on the meta device.
    """
    headers = read_headers(name, path)
    wanted = {key: list(weight.shape) for key, weight in lm.named_parameters()}  # tied ones once
    missing = [key for key in wanted if key not in headers]
    if missing:
        fail(
            f"--model {name} lacks {len(missing)} weights of a {type(lm).__name__}: {few(missing)}"
        )
    for key, shape in wanted.items():
        found, dtype = headers[key]
        if found != shape:
            fail(f"--model {name}: {key} has shape {found}, but {shape} by config.json")
        if dtype not in ("F64", "F32", "F16", "BF16"):
            fail(f"--model {name} is quantised: {key} has dtype {dtype}; give a float checkpoint")
    known = lm.state_dict()  # with tied weights and buffers
    unused = [key for key in headers if key not in known and "rotary_emb" not in key]  # old Llamas'
    if unused:
        announce(f"{len(unused)} tensors in the files are not used by the model: {few(unused)}")


def few(names: list[str]) -> str:
    """The first three names, and the number of others.

    >>> few(["a", "b", "c", "d", "e"])
    'a, b, c and 2 more'
    """
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


# ------------------------------------------------------------------------------------ the structure


def check_config(name: str, config) -> None:
    """Refuse a model that the code cannot handle, from its config alone.

    Returns:
        the model on the meta device.
    """
    quantised = getattr(config, "quantization_config", None)
    if quantised:
        quantised = quantised if isinstance(quantised, dict) else quantised.to_dict()
        kind = quantised.get("quant_method") or "quantised"
        fail(f"--model {name} is quantised ({kind}): give the checkpoint in bfloat16 or float32")
    try:
        lm = meta_model(config)
    except Exception as error:
        fail(f"--model {name} is not a causal language model of transformers: {first_line(error)}")
    kind = type(lm).__name__
    if lack := lacks(lm):
        fail(f"--model {name} cannot be used: its {kind} {lack}. See docs/families.md")
    named = config.architectures or ["nothing"]
    if kind not in named:
        fail(f"--model {name}: architectures in config.json must name {kind}, not {named[0]}")
    if not workarounds.engine_knows(kind):
        fail(f"--model {name} cannot be used: this vLLM does not know {kind}")
    return lm


def meta_model(config, dtype=torch.float32, attention: str = "eager"):
    """The trainer's model on the meta device, so without memory for weights; dropout is off."""
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)
    for key in dropouts(config):
        setattr(config, key, 0.0)
    workarounds.match_windows(config)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)


def dropouts(config) -> dict[str, float]:
    """The config's dropout rates above 0: dropout, attn_pdrop, layerdrop, ..."""
    return {
        key: value
        for key, value in config.to_dict().items()
        if "drop" in key and type(value) in (int, float) and value > 0
    }


PARTS = {"model.embed_tokens": nn.Embedding, "model.layers": nn.ModuleList, "lm_head": nn.Linear}


def lacks(lm) -> str:
    """Why the code cannot handle the model, as the rest of a sentence; "" if it can."""
    weights = dict(lm.named_parameters())
    if expert := next((name for name in weights if "expert" in name), None):
        return f"is a mixture of experts ({expert})"
    modules = dict(lm.named_modules(remove_duplicate=False))
    if missing := [part for part, kind in PARTS.items() if not isinstance(modules.get(part), kind)]:
        return f"has no {' and no '.join(missing)}"
    if deep := next((name for name, weight in weights.items() if weight.ndim > 2), None):
        return f"has weights that are no matrices: experts, convolutions or state spaces ({deep})"
    if number := next((name for name, weight in weights.items() if weight.numel() == 1), None):
        return f"has a single number as a weight, which vLLM keeps in bfloat16 ({number})"
    own = tuple(f"{part}." for part in PARTS)
    beside = (name for name, weight in weights.items() if weight.ndim > 1)
    if other := next((name for name in beside if not name.startswith(own)), None):
        return f"has {other}, which is no layer, embedding or head"
    if lm.lm_head.weight.shape != lm.model.embed_tokens.weight.shape:
        return "has a head and embeddings of different shapes"
    if not workarounds.supports_sdpa(lm):
        return "has an attention that cannot be PyTorch's scaled_dot_product_attention"
    if head_form(lm) is None:
        return "computes logits in a way that the trainer does not know"
    return ""


# ----------------------------------------------------------------------------------------- the head


@torch.no_grad()
def head_form(lm) -> tuple[float, float] | None:
    """(slope, cap) of the model's logits cap·tanh(slope·z/cap), where z = W h + b.

    Gemma 2 has a cap (30), Cohere and Granite have a slope; most models have slope 1 and cap ∞.
    Both are measured on the model's own forward: with hidden size 1 and a head of weight 1, its
    logits are a function of one number. None if it is another function.
    """
    from transformers.modeling_outputs import MoeModelOutputWithPast

    # Granite 4, dense, asks for the fields of a mixture of experts too
    z = torch.cat([torch.tensor([2.0**-20, 2.0**100]), torch.linspace(-60, 60, 99)]).double()
    body, head = nn.Identity(), nn.Linear(1, 1, bias=False, dtype=torch.float64)
    body.forward = lambda *_, **__: MoeModelOutputWithPast(last_hidden_state=z[None, :, None])
    head.weight.fill_(1.0)
    probe = workarounds.with_parts(lm, model=body, lm_head=head)
    try:
        logits = probe(input_ids=torch.zeros(1, len(z), dtype=torch.long)).logits.flatten().double()
    except Exception:
        return None
    slope, cap = (logits[0] / z[0]).item(), logits[1].item()
    if abs(cap) >= abs(slope) * 2.0**90:
        cap = math.inf
    expected = slope * z if cap == math.inf else cap * torch.tanh(slope * z / cap)
    return (slope, cap) if torch.allclose(logits, expected, rtol=1e-5, atol=0) else None

"""Write a run's checkpoint as a Hugging Face folder, which transformers, vLLM, evaluate.py load.

    python export.py --checkpoint runs/x/checkpoints/step_000050 --output-dir runs/x/step_50

The run's own model/ is that of the last step. This program needs no GPU, and only enough host
memory for the weights.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from huggingface_hub import save_torch_state_dict

import harness
import inputs


@dataclass
class Args:
    checkpoint: str
    """checkpoint to export: a folder RUN/checkpoints/step_NNNNNN"""
    output_dir: str
    """folder to write the model to; new or empty"""
    model: str = ""
    """model to take config and tokenizer from; default: the run's --model"""


def main(args: Args) -> None:
    source, out = Path(args.checkpoint), Path(args.output_dir)
    if not (source / ".metadata").is_file():
        harness.fail(f"--checkpoint {source} is not a checkpoint: give RUN/checkpoints/step_NNNNNN")
    if out.exists() and any(out.iterdir()):
        harness.fail(f"--output-dir {out} is not empty: give another folder")
    run = json.loads((source / "args.json").read_text())
    path = inputs.resolve_model(args.model or run["model"])
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config, tokenizer = AutoConfig.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    weights = {f"model.lm.{name}": torch.empty(p.shape) for name, p in lm.named_parameters()}
    dcp.load(weights, checkpoint_id=source, no_dist=True)
    dtype = getattr(torch, run["dtype"])
    state = {name.removeprefix("model.lm."): w.to(dtype) for name, w in weights.items()}
    out.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(state, out)
    harness.save_config(out, config, type(lm).__name__, tokenizer, path, dtype)
    print(f"wrote the model of {source} to {out}")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import tyro

    main(tyro.cli(Args))

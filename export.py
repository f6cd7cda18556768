"""A checkpoint of a run as a Hugging Face folder, which transformers, vLLM and evaluate.py load.

    python export.py --checkpoint runs/x/checkpoints/step_000050 --output-dir runs/x/step_50

The run's own model/ is the last step. It needs no GPU, and host memory for the weights alone.
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
    """folder RUN/checkpoints/step_NNNNNN"""
    output_dir: str
    """folder that the model is written to"""
    model: str = ""
    """where config and tokenizer are; default the --model of the run"""


def main(args: Args) -> None:
    source, out = Path(args.checkpoint), Path(args.output_dir)
    if not (source / ".metadata").is_file():
        harness.fail(f"--checkpoint {source}: no checkpoint is there; give RUN/checkpoints/step_*")
    if out.exists() and any(out.iterdir()):
        harness.fail(f"--output-dir {out} is not empty")
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
    print(f"{source} is now a model in {out}")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import tyro

    main(tyro.cli(Args))

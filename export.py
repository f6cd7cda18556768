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

import flags
import harness
import inputs
import models


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
    run, shapes = read_checkpoint(source)
    if out.is_dir() and any(out.iterdir()):
        harness.fail(f"--output-dir {out} is not empty: give another folder")
    model = args.model or run["model"]
    try:
        path = inputs.local_folder(inputs.resolve_model(model), inputs.SMALL_FILES)
        models.check_folder(model, path)
        from transformers import AutoConfig, AutoModelForCausalLM

        config, tokenizer = AutoConfig.from_pretrained(path), inputs.load_tokenizer(path)
        with torch.device("meta"):
            lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except Exception as error:
        inputs.refuse_model(model, error)
    weights = {f"model.lm.{name}": torch.empty(p.shape) for name, p in lm.named_parameters()}
    known = {f"model.lm.{name}" for name in lm.state_dict()}  # with tied weights and buffers
    other = [name for name, weight in weights.items() if shapes.get(name) != weight.shape]
    other += [name for name in shapes if name.startswith("model.lm.") and name not in known]
    if other:
        names = models.few([name.removeprefix("model.lm.") for name in other])
        harness.fail(
            f"--model {model} does not fit {source}: its config.json has other weights or shapes "
            f"({names}); give the model that was trained"
        )
    if reason := flags.unwritable(out / "config.json"):
        harness.fail(f"--output-dir {out} cannot be written: {reason}; give another folder")
    dcp.load(weights, checkpoint_id=source, no_dist=True)
    dtype = getattr(torch, run["dtype"])
    state = {name.removeprefix("model.lm."): w.to(dtype) for name, w in weights.items()}
    save_torch_state_dict(state, out)
    harness.save_config(out, config, type(lm).__name__, tokenizer, path, dtype)
    print(f"wrote the model of {source} to {out}")


def read_checkpoint(source: Path) -> tuple[dict, dict[str, torch.Size]]:
    """The run's flags and the shapes of the checkpoint's tensors, by name.

    Refuses a folder that is no checkpoint, or from which a file is missing.
    """
    if not (source / ".metadata").is_file():
        harness.fail(f"--checkpoint {source} is not a checkpoint: give RUN/checkpoints/step_NNNNNN")
    try:
        metadata = dcp.FileSystemReader(source).read_metadata()
        run = json.loads((source / "args.json").read_text())
        run["model"], run["dtype"]
    except Exception as error:
        reason = harness.first_line(error)
        harness.fail(f"--checkpoint {source} is damaged: {reason}; give another checkpoint")
    if not harness.is_whole(source):
        reason = "a file is missing or cut off"
        harness.fail(f"--checkpoint {source} is damaged: {reason}; give another checkpoint")
    found = metadata.state_dict_metadata.items()
    return run, {name: item.size for name, item in found if hasattr(item, "size")}


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import tyro

    main(tyro.cli(Args))

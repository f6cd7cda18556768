"""Models: which are trained rightly, which are refused, and that it is said in one line."""

import json
import os
import re
import shutil
import subprocess
import types
from pathlib import Path

import families
import pytest
import torch
import warm
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2ForCausalLM

import common
import inputs
import models

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


@pytest.mark.slow
def test_families_train():
    """The sweep: every family of the page, three updates each; one engine after the other."""
    command = [*warm.python(), "tests/families.py", *families.TRAINED]
    done = subprocess.run(
        command, cwd=ROOT, env=without_rank(), capture_output=True, timeout=3000, check=False
    )
    assert done.returncode == 0, done.stderr.decode()[-5000:]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["Gemma 2", "OLMo 2"])
def test_by_the_command_line(tmp_path, family):
    """Three updates of a script, and an evaluation of what it exports."""
    model = families.save_model(tmp_path / "tiny", *families.TRAINED[family])
    run = tmp_path / "run"
    flags = f"--preset lab --num-steps 3 --num-prompts 4 --num-generations 2 --output-dir {run}"
    flags += " --advantage sign --learning-rate 1e-2 --max-completion-length 24 --eval-every 0"
    for words in (
        ["grpo_baseline.py", *flags.split(), "--model", model],
        ["evaluate.py", *f"--preset lab --num-samples 1 --model {run}/model".split()]
        + f"--output-dir {tmp_path}/eval --max-completion-length 8".split(),
    ):
        command = [*warm.python(), *words]
        done = subprocess.run(
            command, cwd=ROOT, env=without_rank(), capture_output=True, timeout=900, check=False
        )
        assert done.returncode == 0, done.stderr.decode()[-3000:]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 3 and all(row["policy/grad_norm"] > 0 for row in rows)
    assert max(row["sync/logprob_gap"] for row in rows) < families.LIMIT
    first, last = (
        load_file(folder / "model.safetensors") for folder in (Path(model), run / "model")
    )
    assert first.keys() == last.keys() and not any(torch.equal(first[k], last[k]) for k in first)


def without_rank() -> dict[str, str]:
    """The environment, without what one_rank puts there."""
    return {key: value for key, value in os.environ.items() if key != "RANK"}


def test_the_page_has_every_family():
    parts = families.PAGE.read_text().split("| refused, as it |")
    for part, expected in zip(parts, (families.TRAINED, families.REFUSED), strict=True):
        rows = re.findall(r"(?:\| |; )([^|;]+) `(\w+)`", part)
        assert sorted(rows) == sorted((name, kind) for name, (kind, *_) in expected.items())


@pytest.mark.parametrize("family", families.REFUSED)
def test_refused_for_what_it_is(family):
    line = families.refusal(family)
    assert families.REFUSED[family][2] in line and "\n" not in line


def refused(model, capsys) -> str:
    """The line with which a folder is refused."""
    with pytest.raises(SystemExit) as error:
        inputs.load_model_files(types.SimpleNamespace(model=str(model), tensor_parallel_size=1))
    said = capsys.readouterr().err
    assert error.value.code == 2 and said.count("\n") == 1
    return said


@pytest.fixture
def folder(tiny_model_dir, tmp_path, one_rank):
    """A copy of the tiny model, to be broken."""
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))


def change_config(folder: Path, **changes) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("weight", "lacks 1 weights of a Qwen2ForCausalLM: model.layers.1.mlp.up_proj.weight"),
        ("shape", "up_proj.weight has shape [64, 64], but [128, 64] by config.json"),
        ("layers", "lacks 12 weights of a Qwen2ForCausalLM: model.layers.2."),
        ("truncated", "model.safetensors cannot be read"),
        ("bin", "has its weights in .bin files only"),
        ("none", "there is no model.safetensors"),
        ("part", "model-00002-of-00002.safetensors, which the index names, is missing"),
        ("fp8", "is quantised (fp8)"),
        ("bytes", "is quantised: model.layers.1.mlp.up_proj.weight has dtype F8_E4M3"),
        ("adapter", "is an adapter of Qwen/Qwen2.5-7B: merge the two"),
        ("config", "the folder has no config.json"),
        ("classifier", "must name Qwen2ForCausalLM, not Qwen2ForSequenceClassification"),
        ("code", "cannot be loaded"),
        ("config {", "config.json is not JSON"),
        ("config []", "config.json is not a JSON object"),
        ("generation_config {", "generation_config.json is not JSON"),
        ("tokenizer {", "tokenizer.json is not JSON"),
        ("tokenizer version https://git-lfs.github.com/spec/v1", "tokenizer.json is a Git LFS"),
        ("model.safetensors.index {", "model.safetensors.index.json is not JSON"),
        ("model.safetensors.index {}", "model.safetensors.index.json has no weight_map"),
        ("no tokenizer", "the folder has no tokenizer.json"),
    ],
)
def test_checkpoints_that_cannot_be_used(folder, capsys, fault, message):
    file = folder / "model.safetensors"
    weights = load_file(file)
    up = "model.layers.1.mlp.up_proj.weight"
    if fault in ("weight", "shape", "bytes"):
        changed = {
            "shape": weights[up][:64].contiguous(),
            "bytes": weights[up].to(torch.float8_e4m3fn),
        }
        weights |= {up: changed.get(fault, weights[up])}
        if fault == "weight":
            del weights[up]
        save_file(weights, file, {"format": "pt"})
    elif fault == "layers":
        change_config(folder, num_hidden_layers=3, layer_types=["full_attention"] * 3)
    elif fault == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif fault == "bin":
        file.rename(folder / "pytorch_model.bin")
    elif fault == "none":
        file.unlink()
    elif fault == "part":
        file.unlink()
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).save_pretrained(
            folder, max_shard_size="100KB"
        )
        parts = sorted(folder.glob("model-*.safetensors"))
        message = message.replace("00002-of-00002", f"{2:05}-of-{len(parts):05}")
        parts[1].unlink()
    elif fault == "fp8":
        change_config(folder, quantization_config={"quant_method": "fp8"})
    elif fault == "adapter":
        adapter = {"base_model_name_or_path": "Qwen/Qwen2.5-7B", "peft_type": "LORA"}
        (folder / "adapter_config.json").write_text(json.dumps(adapter))
    elif fault == "config":
        (folder / "config.json").unlink()
    elif fault == "classifier":
        change_config(folder, architectures=["Qwen2ForSequenceClassification"])
    elif fault == "code":
        change_config(folder, model_type="mine")
    elif fault == "no tokenizer":
        for tokens in folder.glob("tokenizer*"):
            tokens.unlink()
    elif " " in fault:
        name, _, content = fault.partition(" ")
        if "index" in name:
            file.unlink()
        (folder / f"{name}.json").write_text(content)
    capsys.readouterr()
    assert message in refused(folder, capsys)


def test_names_of_models(tmp_path, one_rank, capsys, monkeypatch):
    """A path that is mistyped is not taken for a hub id; ~ is the home folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "here").mkdir()
    assert inputs.resolve_model("~/here") == str(tmp_path / "here")
    assert inputs.resolve_model("Qwen/Qwen3-4B") == "Qwen/Qwen3-4B"
    for name in ("runs/x/model", "~/nomodel", "./nomodel", "/no/model", "Qwen/"):
        assert f"--model {name}: no such folder" in refused(name, capsys)
    said = refused("no/such", capsys)
    assert "--model no/such cannot be loaded: there is no such folder, and for a hub id: " in said


def test_tensors_that_are_not_the_models(folder, capsys):
    """Named once, and not sent to the engine; nor are files that the index does not name read."""
    file = folder / "model.safetensors"
    weights = load_file(file)
    save_file(weights | {"model.mtp.weight": torch.ones(2)}, file, {"format": "pt"})
    save_file({"layers.0.wq": torch.ones(2)}, folder / "consolidated.safetensors")
    args = types.SimpleNamespace(model=str(folder), tensor_parallel_size=1)
    path, config, _ = inputs.load_model_files(args)
    assert (
        "1 tensors in the files are not used by the model: model.mtp.weight"
        in capsys.readouterr().out
    )
    assert {name for name, _ in common.read_weights(path, config)} == set(weights)


@pytest.mark.slow
@pytest.mark.parametrize("script", ["nsr_prerl", "evaluate"])
def test_mixtures_of_experts_by_the_command_line(tmp_path, script):
    """Before the engine starts, in one line; nothing is written."""
    kind, changes, _ = families.REFUSED["Qwen3-MoE"]
    model = families.save_model(tmp_path / "model", kind, changes)
    command = [*warm.python(), f"{script}.py", "--preset", "lab", "--model", model]
    command += ["--output-dir", str(tmp_path / "run")]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=without_rank(),
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 2 and not (tmp_path / "run").exists()
    assert "cannot be used: its Qwen3MoeForCausalLM is a mixture of experts" in done.stderr
    assert done.stderr.count("error:") == 1 and "Traceback" not in done.stderr


HEADS = {
    "Gemma 2": (1.0, 3.0),
    "Command R (Cohere)": (0.25, float("inf")),
    "Granite": (0.25, float("inf")),
    "HyperCLOVA X": (0.25, float("inf")),
    "Phi-2": (1.0, float("inf")),
}


@pytest.mark.parametrize("family", HEADS)
@pytest.mark.parametrize(("chunk", "temperature"), [(2048, 1.0), (7, 0.7)])
def test_heads(tmp_path, one_rank, family, chunk, temperature):
    """Log-probs and gradients with cap, scale and bias are those of transformers' logits."""
    folder = families.save_model(tmp_path, *families.TRAINED[family])
    args = families.make_args(folder)
    args.temperature = temperature
    path, config, tokenizer = inputs.load_model_files(args)
    policy = common.load_policy(path, config, len(tokenizer), args, CPU)
    policy.chunk = chunk
    assert (policy.slope, policy.cap) == pytest.approx(HEADS[family])
    own = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 50, (5, 12), generator=generator)
    is_response = torch.zeros(5, 12, dtype=torch.bool)
    is_response[:, 4:] = True
    logits = own(tokens).logits[:, 3:-1, : len(tokenizer)] / temperature
    expected = logits.log_softmax(-1).gather(-1, tokens[:, 4:, None]).flatten()
    logp = policy(tokens, is_response)
    assert torch.allclose(logp, expected, atol=1e-5)
    weights = torch.randn(len(logp), generator=generator)
    (weights * logp).sum().backward()
    (weights * expected).sum().backward()
    wanted = {f"lm.{name}": p.grad for name, p in own.named_parameters()}
    largest = max(g.abs().max() for g in wanted.values())
    for name, p in policy.named_parameters():
        assert (p.grad.full_tensor() - wanted[name]).abs().max() < 1e-5 * largest


def test_a_head_of_another_form(folder, capsys, monkeypatch):
    forward = Qwen2ForCausalLM.forward

    def squared(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        out.logits = out.logits * out.logits.abs()
        return out

    monkeypatch.setattr(Qwen2ForCausalLM, "forward", squared)
    assert "computes logits in a way that the trainer does not know" in refused(folder, capsys)


def test_dropout_is_off(tmp_path, one_rank, capsys):
    """In training, not in the exported config; said once."""
    folder = families.save_model(tmp_path, *families.TRAINED["Seed-OSS"])
    args = families.make_args(folder)
    path, config, tokenizer = inputs.load_model_files(args)
    said = capsys.readouterr().out
    assert said.count("config.json has attention_dropout 0.1, residual_dropout 0.1: ") == 1
    policy = common.load_policy(path, config, len(tokenizer), args, CPU)
    tokens = torch.arange(3, 27).view(2, 12)
    one, two = (policy(tokens, tokens > 5) for _ in range(2))
    assert torch.equal(one, two) and policy.training
    assert config.attention_dropout == 0.1 and not models.dropouts(policy.lm.config)

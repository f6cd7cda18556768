"""Train a tiny random model of every family for three steps, and write docs/families.md's tables.

    .venv/bin/python tests/families.py                      all, into docs/families.md: 11 minutes
    .venv/bin/python tests/families.py "Gemma 2" "OLMo 2"    these only, nothing is written

Each is trained by the functions of the scripts, in their order: one engine, three updates, each
followed by a sync and its exact check. The trainer's log-probs are compared with the engine's
before and after each update, and at first with those of transformers' own logits.
"""

import contextlib
import copy
import gc
import io
import os
import re
import sys
import tempfile
import time
import traceback
import types
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs"), str(ROOT / "tests")]
PAGE = ROOT / "docs" / "families.md"
LIMIT = 2e-5  # of the mean gap between log-probs, in float32

SIZES = dict(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=32,
    max_position_embeddings=512,
    tie_word_embeddings=False,
    initializer_range=0.2,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
FULL, WINDOW = "full_attention", "sliding_attention"
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=500000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=128)

# family -> (model type of transformers, what its config has beside SIZES)
TRAINED = {
    "Qwen2, Qwen2.5": ("qwen2", dict(attention_dropout=0.1)),
    "Qwen2.5, tied head": ("qwen2", dict(tie_word_embeddings=True)),
    "Qwen3": ("qwen3", dict(tie_word_embeddings=True)),
    "Qwen3, YaRN": ("qwen3", dict(rope_parameters=YARN)),
    "Llama 2": ("llama", dict(num_key_value_heads=2)),
    "Llama 3.x": ("llama", dict(rope_parameters=LLAMA3, tie_word_embeddings=True)),
    "Llama, biases": ("llama", dict(attention_bias=True, mlp_bias=True)),
    "Mistral": ("mistral", dict(sliding_window=8)),
    "Ministral 3": ("ministral3", dict(sliding_window=None)),
    "Gemma": ("gemma", dict(tie_word_embeddings=True)),
    "Gemma 2": (
        "gemma2",
        dict(
            tie_word_embeddings=True,
            sliding_window=8,
            query_pre_attn_scalar=32,
            attn_logit_softcapping=5.0,
            final_logit_softcapping=3.0,
        ),
    ),
    "Gemma 3, text": (
        "gemma3_text",
        dict(tie_word_embeddings=True, sliding_window=8, layer_types=[WINDOW, FULL]),
    ),
    "VaultGemma": (
        "vaultgemma",
        dict(tie_word_embeddings=True, sliding_window=8, query_pre_attn_scalar=32),
    ),
    "Phi-2": ("phi", dict(num_key_value_heads=2, partial_rotary_factor=0.5)),
    "Phi-3, Phi-4": ("phi3", dict(resid_pdrop=0.1)),
    "GLM": ("glm", dict(partial_rotary_factor=0.5)),
    "GLM-4": ("glm4", dict(partial_rotary_factor=0.5)),
    "Ernie 4.5": ("ernie4_5", dict(tie_word_embeddings=True)),
    "StableLM": ("stablelm", dict(partial_rotary_factor=0.5, use_qkv_bias=True)),
    "Nemotron": ("nemotron", dict(partial_rotary_factor=0.5)),
    "Command R (Cohere)": ("cohere", dict(tie_word_embeddings=True, logit_scale=0.25)),
    "Command R7B (Cohere 2)": (
        "cohere2",
        dict(
            tie_word_embeddings=True,
            logit_scale=0.25,
            sliding_window=8,
            layer_types=[WINDOW, FULL],
        ),
    ),
    "Granite": (
        "granite",
        dict(
            logits_scaling=4.0,
            embedding_multiplier=2.0,
            residual_multiplier=0.5,
            attention_multiplier=0.2,
            attention_dropout=0.1,
        ),
    ),
    "Granite 4, dense": (
        "granitemoehybrid",
        dict(
            tie_word_embeddings=True,
            logits_scaling=4.0,
            num_local_experts=0,
            num_experts_per_tok=0,
            shared_intermediate_size=128,
            layer_types=["attention", "attention"],
            position_embedding_type="rope",
        ),
    ),
    "OLMo": ("olmo", {}),
    "OLMo 2": ("olmo2", {}),
    "OLMo 3": ("olmo3", dict(sliding_window=8, layer_types=[WINDOW, FULL])),
    "SmolLM3": ("smollm3", dict(tie_word_embeddings=True, no_rope_layers=[1, 0])),
    "StarCoder 2": ("starcoder2", dict(tie_word_embeddings=True, residual_dropout=0.1)),
    "Seed-OSS": ("seed_oss", dict(attention_dropout=0.1, residual_dropout=0.1)),
    "Arcee": ("arcee", {}),
    "EXAONE 4": ("exaone4", dict(sliding_window=8, layer_types=[WINDOW, FULL])),
    "HunYuan, dense": ("hunyuan_v1_dense", {}),
    "HyperCLOVA X": ("hyperclovax", dict(logits_scaling=0.25, attention_multiplier=0.2)),
    "CWM": ("cwm", dict(sliding_window=8, layer_types=[WINDOW, FULL])),
    "Jais 2": ("jais2", dict(num_key_value_heads=2)),
    "MiniCPM 3": (
        "minicpm3",
        dict(
            num_key_value_heads=2,
            q_lora_rank=32,
            kv_lora_rank=32,
            qk_nope_head_dim=32,
            qk_rope_head_dim=32,
            v_head_dim=32,
        ),
    ),
}


# The same for what is refused, with words of the line that says why
MOE, PARTS, STATE = "is a mixture of experts", "has no model.", "has weights that are no matrices"
UNKNOWN, KV = "this vLLM does not know", dict(num_key_value_heads=2)
EXPERTS = dict(num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
DEEPSEEK = dict(n_routed_experts=4, n_group=1, topk_group=1, first_k_dense_replace=1)
REFUSED = {
    "Qwen2-MoE": ("qwen2_moe", dict(EXPERTS, shared_expert_intermediate_size=32), MOE),
    "Qwen3-MoE": ("qwen3_moe", EXPERTS, MOE),
    "Mixtral": ("mixtral", EXPERTS, MOE),
    "OLMoE": ("olmoe", EXPERTS, MOE),
    "gpt-oss": ("gpt_oss", EXPERTS, MOE),
    "DeepSeek V2": ("deepseek_v2", dict(EXPERTS, **DEEPSEEK), MOE),
    "DeepSeek V3": ("deepseek_v3", dict(EXPERTS, **DEEPSEEK), MOE),
    "GLM-4.5": ("glm4_moe", dict(EXPERTS, **DEEPSEEK), MOE),
    "Granite MoE": ("granitemoe", EXPERTS, MOE),
    "Ernie 4.5 MoE": ("ernie4_5_moe", dict(EXPERTS, moe_num_experts=4), MOE),
    "Llama 4": ("llama4_text", EXPERTS, MOE),
    "Phi-3.5-MoE": ("phimoe", EXPERTS, MOE),
    "Granite 4, hybrid": (
        "granitemoehybrid",
        dict(num_local_experts=0, layer_types=["mamba", "attention"], mamba_n_heads=4),
        STATE,
    ),
    "Qwen3-Next": ("qwen3_next", dict(EXPERTS, layer_types=["linear_attention", FULL]), MOE),
    "Qwen3.5": ("qwen3_5_text", dict(layer_types=["linear_attention", FULL]), STATE),
    "OLMo, hybrid": ("olmo_hybrid", dict(layer_types=["linear_attention", FULL]), STATE),
    "LFM2": ("lfm2", dict(layer_types=["conv", FULL]), STATE),
    "Falcon-H1": ("falcon_h1", {}, STATE),
    "Jamba": ("jamba", dict(num_experts=1), STATE),
    "Zamba 2": ("zamba2", {}, STATE),
    "Bamba": ("bamba", {}, STATE),
    "RecurrentGemma": ("recurrent_gemma", {}, STATE),
    "Mamba": ("mamba", {}, PARTS),
    "Mamba 2": ("mamba2", {}, PARTS),
    "Falcon Mamba": ("falcon_mamba", {}, PARTS),
    "Nemotron-H": ("nemotron_h", {}, MOE),
    "GPT-2": ("gpt2", {}, PARTS),
    "GPT-Neo": ("gpt_neo", {}, PARTS),
    "GPT-NeoX, Pythia": ("gpt_neox", {}, PARTS),
    "GPT-J": ("gptj", {}, PARTS),
    "StarCoder": ("gpt_bigcode", {}, PARTS),
    "OPT": ("opt", {}, PARTS),
    "BLOOM": ("bloom", {}, PARTS),
    "Falcon": ("falcon", {}, PARTS),
    "MPT": ("mpt", {}, PARTS),
    "BERT": ("bert", {}, PARTS),
    "Gemma 3, with images": ("gemma3", {}, PARTS),
    "Gemma 4 E2B, text": ("gemma4_text", {}, "is no layer, embedding or head"),
    "Gemma 4, text": (
        "gemma4_text",
        dict(layer_types=[WINDOW, FULL], hidden_size_per_layer_input=0, num_kv_shared_layers=0),
        "computes logits in a way that the trainer does not know",
    ),
    "Apertus": ("apertus", KV, "which vLLM keeps in bfloat16"),
    "Qwen2.5-VL": ("qwen2_5_vl", {}, "is not a causal language model"),
    "T5": ("t5", {}, "is not a causal language model"),
    "Ministral": ("ministral", dict(sliding_window=8, layer_types=[WINDOW, FULL]), UNKNOWN),
    "Helium": ("helium", KV, UNKNOWN),
    "Persimmon": ("persimmon", KV, UNKNOWN),
    "nanochat": ("nanochat", KV, UNKNOWN),
    "DiffLlama": ("diffllama", KV, UNKNOWN),
}


def refusal(name: str) -> str:
    """The line with which a family is refused; no checkpoint is needed for it."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    import models

    model_type, changes, _ = REFUSED[name]
    config = AutoConfig.for_model(model_type, **{**(SIZES if changes else {}), **changes})
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type, "")]
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.suppress(SystemExit):
        models.check_config("MODEL", config)
    return said.getvalue().strip().removeprefix("error: --model MODEL ")


def save_model(folder: Path, model_type: str, changes: dict) -> str:
    """A checkpoint and its tokenizer; all vectors are drawn at random too, biases among them."""
    from conftest import save_tokenizer
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SIZES, **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return str(folder)


def train(folder: str, args) -> list[float]:
    """Three steps. Returns the gaps: to transformers' logits, and to the engine at each step."""
    import torch.distributed as dist
    from transformers import AutoModelForCausalLM

    import common
    import harness
    import inputs

    if not dist.is_initialized():  # an engine takes the group with it at its end
        harness.init_distributed()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    path, config, tokenizer = inputs.load_model_files(args)
    vocab_size = inputs.num_tokens(tokenizer, config)
    engine = common.make_engine(path, vocab_size, args)
    try:
        policy = common.load_policy(path, config, vocab_size, args, device)
        optimizer = common.make_optimizer(policy, args)
        common.sync_weights(engine, policy)
        common.check_sync(engine, policy)
        problems = [{"id": i, "prompt_ids": [5 + i, 7, 9]} for i in range(4)]
        prompts = [p["prompt_ids"] for p in problems for _ in range(4)]
        gaps = []
        for step in range(4):
            samples = common.rollout(engine, problems, 4, f"{step}", [2], args)
            responses = [s["ids"] for s in samples]
            gaps.append(common.canary(policy, prompts, samples, args, device)["sync/logprob_gap"])
            batch = common.collate(prompts, responses, range(len(samples)), device)
            logp = policy(*batch)
            if step == 0:
                own = copy.deepcopy(policy.lm.config)
                own = AutoModelForCausalLM.from_pretrained(
                    path, config=own, dtype=torch.float32, attn_implementation="eager"
                ).eval()
                expected = plain_logprobs(own, prompts, responses, vocab_size, args.temperature)
                gaps.append((logp.detach().cpu() - expected).abs().mean().item())
            A = torch.randn(16, generator=torch.Generator().manual_seed(step)).to(device)
            lengths = torch.tensor([len(y) for y in responses], device=device)
            (-(A.repeat_interleave(lengths) * logp).mean()).backward()
            before = {name: p.detach().clone() for name, p in policy.named_parameters()}
            common.optimizer_step(policy, optimizer)
            same = [n for n, p in policy.named_parameters() if torch.equal(p, before[n])]
            assert not same, f"not trained: {same}"
            common.sync_weights(engine, policy)
            common.check_sync(engine, policy)
        return gaps
    finally:
        engine.llm_engine.engine_core.shutdown()
        if dist.is_initialized():
            dist.destroy_process_group()


@torch.no_grad()
def plain_logprobs(lm, prompts, responses, vocab_size: int, temperature: float) -> torch.Tensor:
    """One sequence at a time, from transformers' logits."""
    parts = []
    for x, y in zip(prompts, responses):
        ids = torch.tensor([[*x, *y.tolist()]])
        logits = lm(ids).logits[0, len(x) - 1 : -1, :vocab_size] / temperature
        parts.append(logits.log_softmax(-1).gather(1, ids[0, len(x) :, None])[:, 0])
    return torch.cat(parts)


def make_args(folder: str) -> types.SimpleNamespace:
    return types.SimpleNamespace(
        model=folder,
        tensor_parallel_size=1,
        gpu_memory_utilization=0.1,
        dtype="float32",
        context=40,
        max_completion_length=24,
        temperature=0.8,
        seed=1,
        gradient_checkpointing=False,
        cpu_offload=False,
        max_tokens_per_microbatch=4096,
        learning_rate=1e-2,
        weight_decay=0.0,
    )


def sweep(names) -> dict[str, float | str]:
    """The largest gap of each family, or why it failed."""
    from vllm.model_executor.models import registry

    # vLLM looks into each class in a process of its own, once on a machine: 10 seconds a family.
    registry._run_in_subprocess = lambda look: look()
    found = {}
    for name in names:
        start = time.time()
        with tempfile.TemporaryDirectory() as folder:
            try:
                found[name] = max(
                    train(save_model(Path(folder), *TRAINED[name]), make_args(folder))
                )
            except (Exception, SystemExit) as error:
                traceback.print_exc()
                found[name] = f"{type(error).__name__}: {error}"
        gc.collect()
        print(f"{name}: {found[name]} ({time.time() - start:.0f} s)", file=sys.stderr, flush=True)
    return found


def tables(found: dict) -> str:
    """The page's tables: what trains, with the gap of this run, and what is refused and why."""
    gaps = {}
    for name, gap in sorted(found.items(), key=lambda item: float(f"{item[1]:.0e}")):
        gaps.setdefault(f"{gap:.0e}", []).append(f"{name} `{TRAINED[name][0]}`")
    text = "| largest gap | families that train |\n|---|---|\n"
    text += "".join(f"| {gap} | {'; '.join(names)} |\n" for gap, names in gaps.items())
    reasons = {}  # what a model is or has, without its class and the name of its first such weight
    for name, (model_type, _, _) in REFUSED.items():
        why = re.sub(r"^cannot be used: (its )?|<class .*> ", "", refusal(name))
        why = re.sub(
            r"\. See docs.*| \(model\..*\)|: Unrecognized.*|^\w+(For\w+|HeadModel) ", "", why
        )
        why = re.sub(r"this vLLM does not know \w+", "is not known to this vLLM", why)
        reasons.setdefault(why, []).append(f"{name} `{model_type}`")
    text += "\n| refused, as it | families |\n|---|---|\n"
    text += "".join(f"| {why} | {'; '.join(names)} |\n" for why, names in reasons.items())
    return text


def main(args) -> None:
    import generate

    import workarounds

    if not torch.cuda.is_available():
        workarounds.prepare_cpu_engine()
    found = sweep(args.names or TRAINED)
    failed = [n for n, gap in found.items() if not (isinstance(gap, float) and gap <= LIMIT)]
    failed += [name for name, (_, _, why) in REFUSED.items() if why not in refusal(name)]
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
        sys.exit(1)
    if not args.names:
        PAGE.write_text(generate.fill(PAGE.read_text(), "families", tables(found)))


if __name__ == "__main__":
    import harness

    # On tiny models threads wait for each other longer than they work
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    arguments = types.SimpleNamespace(preset="lab", num_processes=1, names=sys.argv[1:])
    harness.launch(main, arguments)

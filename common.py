"""Helpers of the four training scripts: small, independent functions that a reader can skip.

The algorithms are in grpo_baseline.py, prerl.py, nsr_prerl.py and dsrl.py. In order of use: command
line and processes, problems, engine and rollout, verification, advantages and loss, policy and
micro-batches, evaluation, output folder and checkpoints.
"""

import ctypes
import dataclasses
import datetime
import functools
import json
import logging
import math
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
import types
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

import grading
import thoughts

HERE = Path(__file__).resolve().parent

# ------------------------------------------------------------------- command line and processes

# A preset replaces defaults; an explicit flag beats both. Fields a script lacks are skipped.
PRESETS = {
    "paper": {},
    "lab": dict(
        model=str(HERE / "lab" / "base"),
        dataset="lab",
        eval_datasets=("lab",),
        datasets=("lab",),
        num_samples=8,
        system_prompt="",
        num_steps=60,
        num_prompts=16,
        num_generations=8,
        max_prompt_length=16,
        max_completion_length=192,
        learning_rate=3e-4,
        weight_decay=0.0,
        eval_every=20,
        save_every=0,
        warmup_steps=10,
        dtype="float32",
        max_tokens_per_microbatch=16384,
        gradient_checkpointing=False,
    ),
    "smollm": dict(
        model="smollm2",
        dataset="arithmetic",
        eval_datasets=("arithmetic",),
        datasets=("arithmetic",),
        num_samples=4,
        system_prompt="",
        num_steps=20,
        num_prompts=8,
        num_generations=8,
        max_prompt_length=384,
        max_completion_length=64,
        learning_rate=3e-6,
        weight_decay=0.0,
        eval_every=10,
        eval_num_samples=4,
        save_every=0,
        warmup_steps=5,
        dtype="float32",
        max_tokens_per_microbatch=4096,
        gradient_checkpointing=False,
    ),
}


def fail(message: str) -> None:
    """Bad input: one line from rank 0 on stderr, exit code 2."""
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)


def first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]


def announce(message: str) -> None:
    """One line from rank 0, before quiet() takes over the console."""
    if os.environ.get("RANK", "0") == "0":
        print(message, flush=True)


def parse_args(Args):
    """Command line -> Args, with the preset's values in place of the dataclass's defaults."""
    import tyro

    argv = [word for arg in sys.argv[1:] for word in arg.split("=", 1)]
    preset = argv[argv.index("--preset") + 1] if "--preset" in argv[:-1] else "paper"
    fields = {field.name for field in dataclasses.fields(Args)}
    values = {k: v for k, v in PRESETS.get(preset, {}).items() if k in fields}
    return tyro.cli(Args, default=dataclasses.replace(Args(), **values))


def check_args(args) -> None:
    """Refuse values no run can have, before anything is loaded."""
    world_size = dist.get_world_size()
    positive = "num_prompts num_generations num_samples num_minibatches max_prompt_length"
    positive += " max_completion_length keep_checkpoints eval_num_samples"
    for name in (positive + " temperature learning_rate max_grad_norm verify_timeout").split():
        if not 0 < getattr(args, name, 1) < math.inf:
            fail(f"--{name.replace('_', '-')} must be positive, not {getattr(args, name)}")
    floors = "weight_decay warmup_steps clip_low clip_high tis_cap positive_weight negative_weight"
    floors += " eval_every save_every num_steps alignment_every max_logprob_gap max_bad_gold"
    for name in floors.split():
        if not 0 <= getattr(args, name, 0) < math.inf:
            fail(f"--{name.replace('_', '-')} must be 0 or more, not {getattr(args, name)}")
    if not 0 < args.top_p <= 1:
        fail(f"--top-p must be in (0, 1], not {args.top_p}")
    kind = getattr(args, "advantage", "dr_grpo")
    if getattr(args, "num_generations", 2) == 1 and kind != "reinforce++":
        if getattr(args, "negatives", "advantage") == "advantage":
            fail("--num-generations 1 leaves every advantage 0: a group needs 2 or more responses")
    if world_size % args.tensor_parallel_size:
        fail(
            f"--tensor-parallel-size {args.tensor_parallel_size} does not divide the {world_size} "
            "processes"
        )
    engines = world_size // args.tensor_parallel_size
    if getattr(args, "num_prompts", engines) < engines:
        fail(f"--num-prompts {args.num_prompts}: the {engines} engines need a prompt each")
    if getattr(args, "track", "none") != "none":
        try:
            __import__(args.track)
        except ImportError:
            fail(f"--track {args.track}: pip install {args.track}")


def fit_context(args, config) -> None:
    """Cut --max-completion-length, and if need be --max-prompt-length, to the model's context."""
    context = config.max_position_embeddings
    if args.max_prompt_length + args.max_completion_length > context:
        args.max_prompt_length = min(args.max_prompt_length, context // 2)
        args.max_completion_length = context - args.max_prompt_length
        announce(
            f"the model's context is {context} tokens: prompts are cut to "
            f"{args.max_prompt_length}, completions to {args.max_completion_length}"
        )


def launch(main, args) -> None:
    """Run main(args) in one process per GPU (`--num-processes` on a CPU), or as torchrun's rank.

    Processes are started by torch.distributed.run, which is what `torchrun` calls.
    """
    if "RANK" in os.environ:
        return main(args)
    if not torch.cuda.is_available() and args.preset == "paper" and not Path(args.model).is_dir():
        fail(
            f"no GPU was found, and {args.model} with the paper's setting needs a GPU node. On a "
            "laptop: --preset lab or --preset smollm, or a local model folder as --model"
        )
    n = args.num_processes or torch.cuda.device_count() or 1
    cores = len(os.sched_getaffinity(0))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, min(8, cores // n))))
    # Spinning threads take the cores from the other ranks' and the verifier's processes.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TORCHELASTIC_LOG_LEVEL", "CRITICAL")
    # Semaphores of a rank that was stopped are removed, and need no warning.
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker")
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    forward_signals()
    # Ranks get signals from us, and time to save. What torchrun itself stops, after a rank has
    # failed, hangs in a collective: 5 seconds are enough.
    options = ["--standalone", "--signals-to-handle=SIGHUP", "--shutdown-timeout=5"]
    try:
        torchrun([*options, f"--nproc-per-node={n}", *sys.argv])
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        sys.exit(128 - code if code < 0 else code)  # below 0: ended by that signal


def forward_signals() -> None:
    """In the launcher: SIGTERM and Ctrl-C go on to the ranks; a second one kills them."""
    asked = []

    def handler(number, frame):
        pid = os.getpid()
        ranks = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        if not asked:
            print("stopping at the end of this step; again to stop at once", file=sys.stderr)
        for rank in ranks:
            os.kill(int(rank), signal.SIGKILL if asked else number)
        if asked:
            os._exit(128 + number)
        asked.append(number)

    signal.signal(signal.SIGTERM, handler)
    signal.signal(signal.SIGINT, handler)


STOP_SIGNALS = []  # received by this process; see stop_if_asked()


def init_distributed() -> tuple[int, int, torch.device]:
    """Join the process group. Returns rank, world size and this rank's device."""
    # When the launcher is killed, so is this rank: PR_SET_PDEATHSIG is 1.
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine lives in this process
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)  # before the engine is made
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device)
    else:
        device = torch.device("cpu")
        dist.init_process_group("gloo")
    return dist.get_rank(), dist.get_world_size(), device


def make_output_dir(args) -> Path:
    """The run's folder, the same on every rank, with args.json."""
    script = Path(sys.argv[0]).stem
    when = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    datasets = (args.dataset,) if hasattr(args, "dataset") else args.datasets
    model, data = Path(args.model).name, "+".join(Path(name).stem for name in datasets)
    folder = [args.output_dir or f"runs/{script}__{model}__{data}__s{args.seed}__{when}"]
    dist.broadcast_object_list(folder)
    folder = Path(folder[0])
    marks = ("metrics.jsonl", "parts", "results.json", "alignment.json")
    used = any((folder / name).exists() for name in marks)
    if used and not getattr(args, "resume", False):
        fail(f"{folder} holds another run: give another --output-dir, or --resume to go on with it")
    if used:
        refuse_changes(folder, {"script": script, **vars(args)})
    dist.barrier()
    if dist.get_rank() == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            text = json.dumps({"script": script, **vars(args)}, indent=2)
            (folder / "args.json").write_text(text + "\n")
        except OSError as error:
            fail(f"the output folder cannot be written: {error}")
    dist.barrier()
    return folder


# What --resume may change: how the run is computed and for how long, not what it computes.
MAY_CHANGE = set(
    "preset num_steps output_dir resume num_processes tensor_parallel_size gpu_memory_utilization "
    "max_tokens_per_microbatch gradient_checkpointing cpu_offload save_every eval_every track "
    "max_logprob_gap alignment_every verify_timeout keep_checkpoints".split()
)


def check_disk(folder: Path, path: str, args) -> None:
    """Refuse to start if the checkpoints and the final model will not fit on the disk."""
    from safetensors import safe_open

    count = 0
    for file in Path(path).glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            count += sum(math.prod(tensors.get_slice(k).get_shape()) for k in tensors.keys())
    # float32 weights and two moments; one checkpoint more than are kept exists while it is written
    checkpoints = min(
        args.keep_checkpoints + 1, 1 + args.num_steps // (args.save_every or math.inf)
    )
    needed = count * (12 * checkpoints + getattr(torch, args.dtype).itemsize)
    free = shutil.disk_usage(folder).free
    if free < needed:
        fail(
            f"{folder} has {free / 2**30:.1f} GiB free, but the run needs {needed / 2**30:.1f} GiB "
            f"({checkpoints:.0f} checkpoints and the model): another --output-dir, fewer "
            "--keep-checkpoints, or --save-every 0"
        )


def refuse_changes(folder: Path, now: dict) -> None:
    """Refuse to go on with the run in `folder` under flags that would make it another run."""
    before = json.loads((folder / "args.json").read_text())
    now = json.loads(json.dumps(now))  # tuples become lists, as in the file
    changed = [
        f"--{key.replace('_', '-')} was {before[key]!r}, is now {value!r}"
        for key, value in now.items()
        if key in before and key not in MAY_CHANGE and before[key] != value
    ]
    if changed:
        fail(f"--resume cannot go on with {folder}: {'; '.join(changed)}")


def quiet(folder: Path):
    """Send everything the libraries print to log_rank*.txt; return print for the console (rank 0).

    An exception that ends the process is still shown on the console, in one line.
    """
    rank = dist.get_rank()
    console = os.fdopen(os.dup(2), "w", buffering=1)
    folder.mkdir(parents=True, exist_ok=True)  # on other nodes, without a shared file system
    log = open(folder / f"log_rank{rank}.txt", "a", buffering=1)
    sys.stdout.flush()
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)

    def on_error(kind, error, trace):
        traceback.print_exception(kind, error, trace)
        print(f"rank {rank} failed: {error} (details in {log.name})", file=console)

    sys.excepthook = on_error
    return functools.partial(print, file=console) if rank == 0 else lambda *words: None


def catch_signals() -> None:
    """From here on SIGTERM and Ctrl-C wait for the end of the step."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: STOP_SIGNALS.append(number))


def stop_if_asked(folder: Path, step: int, policy, optimizer, args, engine, verifier, say) -> None:
    """If a rank has got SIGTERM or Ctrl-C: save a checkpoint and exit with 128 + the signal."""
    number = torch.tensor(STOP_SIGNALS[0] if STOP_SIGNALS else 0)
    dist.all_reduce(number, dist.ReduceOp.MAX)
    if number:
        save_checkpoint(folder, step, policy, optimizer, args)
        say(f"stopped after step {step}; go on with --output-dir {folder} --resume auto")
        verifier.stop()
        shutdown(engine)
        sys.exit(128 + int(number))


def shutdown(engine) -> None:
    """Close the engine, then the process group (which the engine may have closed already)."""
    dist.barrier()
    engine.llm_engine.engine_core.shutdown()
    if dist.is_initialized():
        dist.destroy_process_group()


# ------------------------------------------------------------------------------------- problems

# name -> (hub id, split). The only place where hub ids of data sets are written.
HUB_DATASETS = {
    "math": ("DigitalLearningGmbH/MATH-lighteval", "train"),
    "math500": ("HuggingFaceH4/MATH-500", "test"),
    "aime24": ("HuggingFaceH4/aime_2024", "train"),
    "aime25": ("math-ai/aime25", "test"),
    "amc23": ("math-ai/amc23", "test"),
    "minerva": ("math-ai/minervamath", "test"),
    "olympiadbench": ("math-ai/olympiadbench", "test"),
}

HUB_OWNERS = {"Qwen": "Qwen", "Llama": "meta-llama", "SmolLM": "HuggingFaceTB"}


def resolve_model(name: str) -> str:
    """A folder, a hub id, "smollm2", or the bare name of a known family.

    >>> resolve_model("Qwen2.5-Math-7B")
    'Qwen/Qwen2.5-Math-7B'
    """
    if Path(name).is_dir():
        if not list(Path(name).glob("*.safetensors")):
            fail(f"--model {name}: the folder holds no *.safetensors")
        return name
    if name == "smollm2":
        from lab import smollm2

        return smollm2.checkpoint()
    if "/" not in name:
        owner = next((o for family, o in HUB_OWNERS.items() if name.startswith(family)), None)
        if owner is None:
            fail(f"--model {name}: no such folder, and no known family; give a hub id OWNER/NAME")
        return f"{owner}/{name}"
    if name.startswith(("/", ".")):
        fail(f"--model {name}: no such folder")
    return name


def load_model_files(args):
    """Config, tokenizer and local path of --model; refuses what the trainer cannot handle."""
    from huggingface_hub import snapshot_download
    from transformers import AutoConfig, AutoTokenizer

    path = resolve_model(args.model)
    try:
        if not Path(path).is_dir():
            if dist.get_rank() == 0:
                snapshot_download(path, allow_patterns=["*.json", "*.safetensors", "*.txt"])
            dist.barrier()
            path = snapshot_download(path, local_files_only=True)
        config = AutoConfig.from_pretrained(path)
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:
        fail(f"--model {args.model} cannot be loaded: {first_line(error)}")
    if len(tokenizer) > config.vocab_size:
        fail(f"--model {args.model}: {len(tokenizer)} tokens, but {config.vocab_size} embeddings")
    if config.num_attention_heads % args.tensor_parallel_size:
        fail(
            f"--tensor-parallel-size {args.tensor_parallel_size} does not divide the model's "
            f"{config.num_attention_heads} attention heads"
        )
    return path, config, tokenizer


def find_bos(tokenizer, bos_token: str) -> int:
    """Id of the pre-train space's one-token context: --bos-token, BOS, else <|im_start|>."""
    if bos_token:
        ids = tokenizer.encode(bos_token, add_special_tokens=False)
        if len(ids) != 1:
            fail(f"--bos-token {bos_token!r} is {len(ids)} tokens; it must be exactly one")
        return ids[0]
    if tokenizer.bos_token_id is not None:
        return tokenizer.bos_token_id
    if "<|im_start|>" in tokenizer.get_vocab():
        return tokenizer.convert_tokens_to_ids("<|im_start|>")
    fail("the tokenizer has neither a BOS nor <|im_start|>: name one with --bos-token")


def load_problems(name: str, split: str) -> list[dict]:
    """[{"problem": text or chat messages, "answer": LaTeX}], each problem once.

    Args:
        name: math, lab, arithmetic, an evaluation set's short name, a hub id, or a .parquet/.jsonl.
        split: "train" or "test"; only lab, arithmetic and other hub ids have both.
    """
    if name in ("lab", "arithmetic"):
        from lab import arithmetic, task

        rows = (task if name == "lab" else arithmetic).problems(split)
    else:
        import datasets

        datasets.disable_progress_bars()
        try:
            if name.endswith((".parquet", ".jsonl")):
                kind = "json" if name.endswith(".jsonl") else "parquet"
                rows = datasets.load_dataset(kind, data_files=name, split="train")
            else:
                hub_id, split = HUB_DATASETS.get(name, (name, split))
                rows = datasets.load_dataset(hub_id, split=split)
        except Exception as error:
            fail(f"data set {name} cannot be loaded: {first_line(error)}")
    problems, unanswered = {}, 0
    for row in rows:
        problem = next((row[k] for k in ("problem", "question", "prompt") if row.get(k)), None)
        answer = row.get("answer") or (row.get("reward_model") or {}).get("ground_truth")
        if row.get("final_answer"):  # OlympiadBench: a list
            answer = ", ".join(row["final_answer"])
        if not answer and isinstance(row.get("solution"), str):
            answer = grading.last_boxed(row["solution"])
        if not problem or answer in (None, ""):
            unanswered += 1
        else:
            problems.setdefault(str(problem), {"problem": problem, "answer": str(answer)})
    if not problems:
        fail(
            f"data set {name}: no row has a problem (column problem, question or prompt) and an "
            "answer (column answer, solution or reward_model.ground_truth)"
        )
    if unanswered:
        announce(f"data set {name}: {unanswered} rows without problem or answer are left out")
    return list(problems.values())


def encode_prompts(problems: list[dict], tokenizer, args, at_least: int) -> list[dict]:
    """Add "id", its number, and "prompt_ids" to each problem.

    Leaves out those over --max-prompt-length, with a count. Refuses a set in which fewer than
    `at_least` problems remain.
    """
    for i, problem in enumerate(problems):
        problem["id"] = i
        messages = problem["problem"]
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        messages = [m for m in messages if m["role"] != "system"]
        if args.system_prompt:
            messages = [{"role": "system", "content": args.system_prompt}, *messages]
        if tokenizer.chat_template:
            problem["prompt_ids"] = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, enable_thinking=False, return_dict=False
            )
        else:
            problem["prompt_ids"] = tokenizer.encode("\n\n".join(m["content"] for m in messages))
    kept = [p for p in problems if len(p["prompt_ids"]) <= args.max_prompt_length]
    if not kept:
        fail(f"all {len(problems)} prompts are longer than --max-prompt-length")
    if len(kept) < at_least:
        fail(f"--num-prompts {at_least}: the data set has only {len(kept)} usable problems")
    if len(kept) < len(problems):
        announce(f"{len(problems) - len(kept)} of {len(problems)} prompts are too long: left out")
    return kept


def pick_problems(problems: list, step: int, num_prompts: int, seed: int) -> list:
    """The problems of a step (from 1): every epoch a new permutation, its last part batch dropped.

    A function of (seed, step) alone, so that resuming needs no data-loader state.

    >>> [pick_problems(["a", "b", "c"], step, 1, 0) for step in (1, 2, 3)]
    [['c'], ['b'], ['a']]
    """
    per_epoch = len(problems) // num_prompts
    epoch, batch = divmod(step - 1, per_epoch)
    order = random.Random(f"{seed} epoch {epoch}").sample(range(len(problems)), len(problems))
    return [problems[i] for i in order[batch * num_prompts : (batch + 1) * num_prompts]]


# --------------------------------------------------------------------------- engine and rollout


def make_engine(path: str, tokenizer, args):
    """vLLM in this process. Ranks r*TP .. r*TP+TP-1 form one tensor-parallel engine.

    Weights are not read from disk: the first sync brings them. The engine's vocabulary is cut to
    the tokenizer's, so that the ids Qwen pads its embeddings with can never be sampled.
    """
    from vllm import LLM

    if torch.cuda.is_available():
        # CUDA graphs stay on; sleep mode gives the memory back to the trainer between rollouts.
        extra = dict(
            gpu_memory_utilization=args.gpu_memory_utilization,
            enable_sleep_mode=True,
        )
    else:
        length = args.max_prompt_length + args.max_completion_length
        extra = dict(
            enforce_eager=True,
            kv_cache_memory_bytes=1 << 30,
            max_num_seqs=256,
            # A prompt cut in chunks makes vLLM rewind the sample's generator, which CPU ones can't.
            enable_chunked_prefill=False,
            max_num_batched_tokens=max(8192, length),
        )
    set_num_threads = torch.set_num_threads
    engine = LLM(
        path,
        load_format="dummy",
        # Untied: vLLM's CPU kernels repack a tied head at load, and a reload would not reach it.
        hf_overrides={"vocab_size": len(tokenizer), "tie_word_embeddings": False},
        dtype="float32" if args.dtype == "float64" else args.dtype,
        tensor_parallel_size=args.tensor_parallel_size,
        distributed_executor_backend="external_launcher",
        max_model_len=args.max_prompt_length + args.max_completion_length,
        logprobs_mode="processed_logprobs",  # of the distribution that was sampled from
        seed=args.seed,
        disable_log_stats=True,
        **extra,
    )
    torch.set_num_threads = set_num_threads  # vLLM's CPU worker puts a stub in its place
    if torch.cuda.is_available():
        # Level 1 keeps a copy in host memory. Level 2 drops the weights, which would be right as
        # every sync replaces them, but has had bugs that return garbage.
        engine.sleep(level=1)
    return engine


def sync_weights(engine, policy, dtype: torch.dtype) -> None:
    """Send the trainer's weights to the engine: one parameter at a time is gathered and sent."""
    weights = (  # cast first: half the bytes travel
        (name, parameter.detach().to(dtype).full_tensor())
        for name, parameter in policy.lm.named_parameters()
    )
    send_weights(engine, weights, policy.vocab_size, policy.lm.config.tie_word_embeddings)


def read_weights(path: str):
    """(name, tensor) of each weight of a checkpoint's *.safetensors."""
    from safetensors import safe_open

    for file in sorted(Path(path).glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():
                yield name, tensors.get_tensor(name)


def send_weights(engine, weights, vocab_size: int, tied: bool) -> None:
    """Replace the engine's weights by `weights`, an iterator of (name, whole tensor).

    On CUDA the weights wake first and the KV cache only in rollout(): they never peak together.
    """
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        if engine.llm_engine.is_sleeping():
            engine.wake_up(tags=["weights"])

    def adapted():  # to the engine's untied head and unpadded vocabulary
        for name, weight in weights:
            if name.endswith(("embed_tokens.weight", "lm_head.weight")):
                weight = weight[:vocab_size]
            if not (tied and name == "lm_head.weight"):
                yield name, weight
            if tied and name.endswith("embed_tokens.weight"):
                yield "lm_head.weight", weight

    engine.collective_rpc("reload_weights", kwargs={"weights_iterator": adapted()})
    engine.reset_prefix_cache()


def rollout(engine, problems: list[dict], num_samples: int, seed: str, args) -> list[dict]:
    """Sample y ~ π(·|x): `num_samples` responses to each problem, this rank's share of them.

    Each tensor-parallel group takes every n-th problem; each of its ranks keeps a part of the
    samples. A sample depends only on (seed, problem's id, its number), not on the ranks.

    Returns:
        dicts of index (problem * num_samples + number), ids (int32 [T], EOS included), logprobs
        (float32 [T], the sampler's) and truncated (bool).
    """
    from vllm import SamplingParams

    tp, rank = args.tensor_parallel_size, dist.get_rank()
    mine = range(rank // tp, len(problems), dist.get_world_size() // tp)
    params = [
        SamplingParams(
            n=num_samples,
            temperature=args.temperature,
            top_p=args.top_p,
            max_tokens=args.max_completion_length,
            seed=random.Random(f"{seed} {problems[i]['id']}").getrandbits(31),
            logprobs=0,
            detokenize=False,
        )
        for i in mine
    ]
    if torch.cuda.is_available():
        engine.wake_up(tags=["weights"])  # no effect right after a sync
        engine.wake_up(tags=["kv_cache"])
    prompts = [{"prompt_token_ids": problems[i]["prompt_ids"]} for i in mine]
    outputs = engine.generate(prompts, params, use_tqdm=False) if prompts else []
    if torch.cuda.is_available():
        engine.sleep(level=1)
    samples = []
    for i, output in zip(mine, outputs):
        for g, y in enumerate(output.outputs):
            if (i * num_samples + g) % tp == rank % tp:
                logprobs = [step[token].logprob for step, token in zip(y.logprobs, y.token_ids)]
                samples.append(
                    dict(
                        index=i * num_samples + g,
                        ids=np.array(y.token_ids, dtype=np.int32),
                        logprobs=np.array(logprobs, dtype=np.float32),
                        truncated=y.finish_reason == "length",
                    )
                )
    return samples


def gather(samples: list[dict]) -> list[dict]:
    """Every rank's samples on every rank, by index."""
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, samples)
    return sorted((s for part in parts for s in part), key=lambda s: s["index"])


# --------------------------------------------------------------------------------- verification


def check_golds(name: str, problems: list[dict], pool, args) -> list[dict]:
    """Leave out the problems whose gold answer the grader cannot read; every rank checks its part.

    Refuses a data set with more of them than --max-bad-gold: against such golds every answer, right
    or wrong, would score 0.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    golds = [p["answer"] for p in problems]
    found = [None] * world_size
    dist.all_gather_object(found, grading.bad_golds(pool, golds[rank::world_size], args))
    bad = {rank + world_size * i for rank, part in enumerate(found) for i in part}
    if not bad:
        return problems
    shown = "; ".join(f"row {problems[i]['id']}: {golds[i][:60]!r}" for i in sorted(bad)[:5])
    more = f"; and {len(bad) - 5} more" if len(bad) > 5 else ""
    message = f"{name}: {len(bad)} of {len(problems)} gold answers cannot be read ({shown}{more})"
    if len(bad) > args.max_bad_gold * len(problems):
        fail(f"data set {message}: more than --max-bad-gold {args.max_bad_gold:g}")
    announce(f"{message}: left out")
    return [p for i, p in enumerate(problems) if i not in bad]


def judge(samples: list[dict], golds: list[str], tokenizer, pool, args) -> dict:
    """Add text, reward and thoughts to this rank's samples; a truncated response gets reward 0.

    Args:
        golds: the answer of each of the step's samples, by index.

    Returns:
        the counts timeouts and errors.
    """
    texts = tokenizer.batch_decode([s["ids"] for s in samples], skip_special_tokens=True)
    answers = [golds[s["index"]] for s in samples]
    rewards, timeouts, errors = grading.verify(pool, texts, answers, args)
    for sample, text, reward in zip(samples, texts, rewards):
        sample["reward"] = 0.0 if sample["truncated"] else reward
        sample["text"], sample["length"] = text, len(sample["ids"])
        sample["thoughts"] = thoughts.count(text)
    counts = torch.tensor([timeouts, errors])
    dist.all_reduce(counts)
    return {"verify/timeouts": int(counts[0]), "verify/errors": int(counts[1])}


# --------------------------------------------------------------------------- advantages and loss


def advantages(rewards: torch.Tensor, group_size: int, kind: str) -> torch.Tensor:
    """A [N] from r [N], whose groups of `group_size` neighbours answer the same problem.

    grpo: (r - group mean) / (group std + 1e-6), the sample's std (ddof 1), as verl. dr_grpo: r -
    group mean. rloo: r - mean of the others in the group. reinforce++: (r - mean) / (std + 1e-6)
    over the whole batch.

    >>> advantages(torch.tensor([1.0, 0.0, 0.0, 0.0]), 4, "dr_grpo")
    tensor([ 0.7500, -0.2500, -0.2500, -0.2500])
    >>> advantages(torch.tensor([1.0, 0.0, 0.0, 0.0]), 4, "grpo")
    tensor([ 1.5000, -0.5000, -0.5000, -0.5000])
    >>> advantages(torch.tensor([1.0, 0.0, 0.0, 0.0]), 4, "rloo")
    tensor([ 1.0000, -0.3333, -0.3333, -0.3333])
    """
    if kind == "reinforce++":
        return (rewards - rewards.mean()) / (rewards.std() + 1e-6)
    r = rewards.view(-1, group_size)  # [P, G]
    A = r - r.mean(1, keepdim=True)
    if kind == "grpo":
        A = A / (r.std(1, keepdim=True) + 1e-6)
    elif kind == "rloo":
        A = A * group_size / (group_size - 1)
    return A.flatten()


def sign_weights(A: torch.Tensor, positive: float, negative: float) -> torch.Tensor:
    """Weight [N] of each sample: `positive` where A > 0, `negative` where A < 0.

    A sample with A = 0 belongs to neither sign; it counts (in the mean) when both signs do.

    >>> sign_weights(torch.tensor([2.0, -1.0, 0.0]), 0.1, 1.0)
    tensor([0.1000, 1.0000, 1.0000])
    >>> sign_weights(torch.tensor([2.0, -1.0, 0.0]), 0.0, 1.0)
    tensor([0., 1., 0.])
    """
    neither = torch.full_like(A, float(positive != 0 and negative != 0))
    return torch.where(A > 0, positive, torch.where(A < 0, negative, neither))


def token_weights(counted: torch.Tensor, lengths: torch.Tensor, kind: str, max_length: int):
    """What a token of each sample weighs in the loss [N]; the sum over the step makes a mean.

    One normaliser for the whole step, so micro-batches and ranks only add up.

    Args:
        counted: bool [N]; lengths: response tokens [N]; max_length: of a completion, in tokens.

    >>> token_weights(torch.tensor([True, True]), torch.tensor([1, 3]), "token-mean", 8)
    tensor([0.2500, 0.2500])
    >>> token_weights(torch.tensor([True, True]), torch.tensor([1, 4]), "seq-mean-token-mean", 8)
    tensor([0.5000, 0.1250])
    """
    n = counted.sum().clamp(min=1)
    if kind == "token-mean":
        weight = torch.ones_like(lengths) / (lengths * counted).sum().clamp(min=1)
    elif kind == "seq-mean-token-mean":
        weight = 1 / (n * lengths)
    else:  # seq-mean-token-sum-norm
        weight = torch.ones_like(lengths) / (n * max_length)
    return weight * counted


def microbatch_weights(plan: list[list[list[int]]], lengths: torch.Tensor) -> torch.Tensor:
    """What a token of each sample weighs [N] if every micro-batch takes a mean of its own.

    As the authors' code: a micro-batch's mean over its tokens counts by its share of the samples.

    Args:
        plan: of plan_microbatches(); lengths: response tokens [N].

    >>> microbatch_weights([[[0, 1], [2]]], torch.tensor([1, 3, 2]))
    tensor([0.1667, 0.1667, 0.1667])
    >>> microbatch_weights([[[0], [1, 2]]], torch.tensor([1, 3, 2]))
    tensor([0.3333, 0.1333, 0.1333])
    """
    batches = [batch for part in plan for batch in part if batch]
    weight = torch.zeros(len(lengths))
    for batch in batches:
        weight[batch] = len(batch) / sum(map(len, batches)) / lengths[batch].sum()
    return weight


def clipped_objective(logp, old_logp, A, clip_low: float, clip_high: float, dual_clip: float):
    """PPO's clipped objective per token [n], with clip-higher and dual clip (to be maximised).

    On-policy old_logp = logp: the value is A and the gradient A ∇logp. Dual clip (arXiv 1912.09729)
    bounds the objective of A < 0 from below by dual_clip * A.

    >>> logp = torch.tensor([0.5, 0.5, 3.0])
    >>> clipped_objective(logp, torch.zeros(3), torch.tensor([1.0, -1.0, -1.0]), 0.2, 0.28, 10.0)
    tensor([  1.2800,  -1.6487, -10.0000])
    """
    ratio = torch.exp(logp - old_logp)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    objective = torch.minimum(ratio * A, clipped * A)
    return torch.where(A < 0, torch.maximum(objective, dual_clip * A), objective)


# ---------------------------------------------------------------------- policy and micro-batches


class TokenLogprobs(torch.autograd.Function):
    """log softmax(h Wᵀ / temperature)[y], a chunk of tokens at a time.

    Neither pass holds more than one chunk of logits; the backward computes them again. The gradient
    of W adds up in place, where autograd would make a new [V, H] for every chunk.
    """

    @staticmethod
    def forward(ctx, h, W, y, temperature: float, chunk: int):
        ctx.save_for_backward(h, W, y)
        ctx.temperature, ctx.chunk = temperature, chunk
        wide = ctx.wide = torch.promote_types(h.dtype, torch.float32)
        logp = h.new_empty(len(h), dtype=wide)
        for i in range(0, len(h), chunk):
            logprobs = ((h[i : i + chunk] @ W.T).to(wide) / temperature).log_softmax(-1)  # [c, V]
            logp[i : i + chunk] = logprobs.gather(1, y[i : i + chunk, None])[:, 0]
        return logp

    @staticmethod
    def backward(ctx, grad):
        h, W, y = ctx.saved_tensors
        grad_h = torch.zeros_like(h)
        grad_W = torch.zeros(W.shape, dtype=ctx.wide, device=W.device)
        for i in range(0, len(h), ctx.chunk):
            h_c, g = h[i : i + ctx.chunk], grad[i : i + ctx.chunk, None] / ctx.temperature
            d = ((h_c @ W.T).to(ctx.wide) / ctx.temperature).softmax(-1).mul_(-g)  # [c, V]
            d.scatter_add_(1, y[i : i + ctx.chunk, None], g)  # ∂logp/∂logits = onehot(y) - softmax
            d = d.to(h.dtype)
            grad_h[i : i + ctx.chunk] = d @ W
            grad_W += d.T @ h_c
        return grad_h, grad_W.to(W.dtype), None, None, None


class Policy(nn.Module):
    """A Hugging Face causal LM whose forward gives log-probs of chosen tokens, never full logits.

    A module of its own so that FSDP's root gathers embeddings and head around this very forward.
    """

    def __init__(self, lm, vocab_size: int, temperature: float, chunk: int = 2048):
        super().__init__()
        self.lm, self.vocab_size = lm, vocab_size
        self.temperature, self.chunk = temperature, chunk

    def forward(self, tokens: torch.Tensor, is_response: torch.Tensor):
        """log π(token_t | tokens_<t), float32 [n], at the n marked tokens.

        Args:
            tokens: [B, L], right-padded. Attention is causal, so padding needs no mask; positions
                start at 0, whichever the context is.
            is_response: bool [B, L].
        """
        hidden = self.lm.model(input_ids=tokens, use_cache=False).last_hidden_state  # [B, L, H]
        marked = is_response[:, 1:]  # position t-1 predicts token t
        head = self.lm.lm_head.weight[: self.vocab_size]  # without the padded vocabulary
        return TokenLogprobs.apply(
            hidden[:, :-1][marked], head, tokens[:, 1:][marked], self.temperature, self.chunk
        )


def load_policy(path: str, config, tokenizer, args, device) -> Policy:
    """The model sharded by FSDP2: compute in --dtype; master weights and reduce in float32.

    Rank 0 reads the checkpoint, the others receive their shards.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, args.dtype)
    master = torch.promote_types(dtype, torch.float32)
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config, dtype=master, attn_implementation="sdpa")
    if args.gradient_checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    policy = Policy(lm, len(tokenizer), args.temperature).train()
    shard = dict(
        mesh=init_device_mesh(device.type, (dist.get_world_size(),)),
        mp_policy=MixedPrecisionPolicy(dtype, reduce_dtype=master),
    )
    if args.cpu_offload:
        shard["offload_policy"] = CPUOffloadPolicy()
    for layer in lm.model.layers:
        fully_shard(layer, **shard)
    fully_shard(policy, **shard)
    policy.to_empty(device=torch.device("cpu") if args.cpu_offload else device)
    lm.tie_weights()  # to_empty gives tied parameters one tensor each

    state, buffers = {}, {}
    if dist.get_rank() == 0:
        full = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
        state = {f"lm.{name}": tensor for name, tensor in full.state_dict().items()}
        buffers = {f"lm.{name}": tensor for name, tensor in full.named_buffers()}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
    set_model_state_dict(policy, state, options=options)
    for name, buffer in policy.named_buffers():  # rotary frequencies are in no state dict
        value = [buffers.get(name)]
        dist.broadcast_object_list(value)
        policy.get_submodule(name.rpartition(".")[0]).register_buffer(
            name.rpartition(".")[2], value[0].to(device), persistent=False
        )
    return policy


def make_optimizer(policy, args):
    """AdamW with the paper's betas, over this rank's shards."""
    return torch.optim.AdamW(
        policy.parameters(),
        lr=args.learning_rate,
        betas=(0.9, 0.999),
        weight_decay=args.weight_decay,
    )


def clip_gradients(policy, max_norm: float) -> float:
    """Scale the gradients to `max_norm` if their norm is larger. Returns the norm before."""
    return torch.nn.utils.clip_grad_norm_(policy.parameters(), max_norm).full_tensor().item()


def skip_update(folder: Path, step: int, samples: list[dict], A, skipped: int, say) -> int:
    """The gradient is not finite: save the step's samples for inspection instead of updating.

    Returns:
        how many updates in a row were skipped. The third ends the run.
    """
    path = folder / "skipped" / f"step_{step:06d}.pt"
    if dist.get_rank() == 0:
        path.parent.mkdir(exist_ok=True)
        torch.save({"samples": samples, "advantages": A}, path)
    say(f"step {step}: the gradient is not finite, no update is made; samples in {path}")
    if skipped == 2:
        raise RuntimeError(
            f"the gradient was not finite 3 times in a row, last at step {step}: a smaller "
            "--learning-rate, or float32, may help; the samples are in the folder skipped"
        )
    return skipped + 1


def sampler_logprobs(samples: list[dict], batch: list[int], device) -> torch.Tensor:
    """The engine's log-probs of the batch's response tokens, float32 [n]."""
    parts = [samples[i]["logprobs"] for i in batch] or [np.zeros(0, np.float32)]
    return torch.from_numpy(np.concatenate(parts)).to(device)


def plan_microbatches(indices: list[int], lengths: list[int], max_tokens: int, world_size: int):
    """Pack samples of like length: a list of micro-batches (lists of indices) for each rank.

    No micro-batch pads to more than `max_tokens` (unless one sample alone does); every rank gets
    the same number, since FSDP's collectives must stay aligned: largest ones are halved, and empty
    ones added, until it fits. Those that run side by side on different ranks are of like length.

    >>> plan_microbatches([0, 1, 2, 3], [5, 9, 4, 10], 20, 1)
    [[[3, 1], [0, 2]]]
    >>> plan_microbatches([0, 1, 2], [5, 9, 4], 100, 2)
    [[[1]], [[0, 2]]]
    """
    batches = []
    for i in sorted(indices, key=lambda i: (-lengths[i], i)):
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= max_tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    while len(batches) % world_size:
        big = max(batches, key=lambda batch: len(batch) > 1 and lengths[batch[0]] * len(batch))
        at, half = batches.index(big), len(big) // 2
        batches[at : at + 1] = [big[:half], big[half:]] if half else [big, []]
    return [batches[rank::world_size] for rank in range(world_size)]


def collate(contexts: list[list[int]], responses: list[np.ndarray], batch: list[int], device):
    """Tokens [B, L], right-padded, and the response mask [B, L] of the samples in `batch`.

    An empty batch gives one row of two tokens, none of them marked.
    """
    width = max((len(contexts[i]) + len(responses[i]) for i in batch), default=2)
    tokens = np.zeros((max(1, len(batch)), width), dtype=np.int64)
    is_response = np.zeros_like(tokens, dtype=bool)
    for row, i in enumerate(batch):
        start, end = len(contexts[i]), len(contexts[i]) + len(responses[i])
        tokens[row, :start], tokens[row, start:end] = contexts[i], responses[i]
        is_response[row, start:end] = True
    return torch.from_numpy(tokens).to(device), torch.from_numpy(is_response).to(device)


@torch.no_grad()
def score(policy, prompts: list[list[int]], samples: list[dict], args, device) -> dict:
    """The canary: up to 4 of the step's samples a rank, scored by the trainer, with the prompt.

    Runs before the update: the engine has these very weights, so the gap is rounding only; a large
    one means that the sync failed.

    Returns:
        sync/logprob_gap, the mean |trainer's - sampler's log-prob| per token.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    stride = max(1, len(samples) // (4 * world_size))
    responses, batch, width = [s["ids"] for s in samples], [], 0
    for i in range(rank * stride, len(samples), world_size * stride):
        width = max(width, len(prompts[i]) + len(responses[i]))
        if batch and width * (len(batch) + 1) > args.max_tokens_per_microbatch:
            break
        batch.append(i)
    tokens, is_response = collate(prompts, responses, batch[:4], device)
    logp = policy(tokens, is_response)
    policy.reshard()  # FSDP's root stays gathered after a forward without backward
    gap = (logp - sampler_logprobs(samples, batch[:4], device)).abs().cpu()
    total = torch.tensor([gap.sum(), len(gap)], dtype=torch.float64)
    dist.all_reduce(total)
    return {"sync/logprob_gap": (total[0] / total[1].clamp(min=1)).item()}


def batch_gradient(policy, contexts, responses, weights: list, args, device) -> list:
    """∇ Σ_i Σ_t weights_it log π(y_it | context_i, y_i<t), without touching the weights.

    Args:
        weights: of each response's tokens, [T_i]; a response with only zeros is left out.

    Returns:
        this rank's shard of the gradient of each parameter. Gradients are None afterwards.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    total = [len(x) + len(y) for x, y in zip(contexts, responses)]
    active = [i for i, w in enumerate(weights) if w.any()]
    plan = plan_microbatches(active, total, args.max_tokens_per_microbatch, world_size)
    for batch in plan[rank]:
        logp = policy(*collate(contexts, responses, batch, device))
        w = torch.cat([weights[i] for i in batch] or [logp.new_empty(0)]).to(logp)
        (world_size * (w * logp).sum()).backward()  # FSDP averages over ranks
    gradient = []
    for parameter in policy.parameters():
        grad = parameter if parameter.grad is None else parameter.grad
        grad = grad.to_local().detach()
        gradient.append(torch.zeros_like(grad) if parameter.grad is None else grad)
        parameter.grad = None
    return gradient


def dot(a: list, b: list) -> float:
    """Inner product of two sharded vectors, over all ranks, in float64."""
    total = sum((u.double() * v.double()).sum() for u, v in zip(a, b)).cpu()
    dist.all_reduce(total)
    return total.item()


def cosine(a: list, b: list) -> float:
    """Of the angle between two sharded vectors; NaN if one is zero."""
    norms = math.sqrt(dot(a, a) * dot(b, b))
    return dot(a, b) / norms if norms else float("nan")


def alignment(policy, contexts, prompts, responses, weights, rewards, args, device) -> dict:
    """How far this update points along GRPO's: the cosine of the two batch gradients.

    Args:
        weights: A [N] of the update in its space, 0 for samples that do not count; rewards: [N].
    """
    grpo = advantages(rewards, args.num_generations, "grpo")
    each = [torch.ones(len(y)) for y in responses]
    own, other = (
        batch_gradient(policy, x, responses, [a * e for a, e in zip(A, each)], args, device)
        for x, A in ((contexts, weights), (prompts, grpo))
    )
    return {"alignment/cosine_to_grpo": cosine(own, other)}


def check_gap(gap: float, args) -> None:
    """Stop if the engine's log-probs have left the trainer's (not comparable for top-p < 1)."""
    limit = args.max_logprob_gap or (0.001 if args.dtype == "float32" else 0.1)
    if math.isnan(gap):
        raise RuntimeError(
            "sync/logprob_gap is NaN: a weight is not finite. The last checkpoint is sound; a "
            "smaller --learning-rate may help"
        )
    if args.top_p == 1 and not gap <= limit:
        raise RuntimeError(
            f"sync/logprob_gap is {gap:.4g}, over {limit:g}: the engine does not sample from the "
            "trainer's weights, so this step would train on a lie. The weight sync is broken"
        )


# ----------------------------------------------------------------------------------- evaluation


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased 1 - C(n-c, k) / C(n, k): the chance that k of n samples hold one of c right ones.

    >>> pass_at_k(8, 0, 8), pass_at_k(8, 1, 8), pass_at_k(4, 2, 1)
    (0.0, 1.0, 0.5)
    """
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def summarize(samples: list[dict], k: int) -> dict:
    """Figures of an evaluation: k judged samples to each problem, by index.

    Returns:
        avg@k; pass@m for m = 1, 2, 4, ... and k; standard_error of avg@k, over problems; problems;
        length (tokens); truncated (share); thoughts/*.
    """
    right = np.array([s["reward"] for s in samples]).reshape(-1, k)  # [problems, k]
    result = {f"avg@{k}": float(right.mean())}
    for m in sorted({2**i for i in range(k.bit_length())} | {k}):
        result[f"pass@{m}"] = float(np.mean([pass_at_k(k, int(c), m) for c in right.sum(1)]))
    n = len(right)
    result["standard_error"] = float(right.mean(1).std(ddof=1) / n**0.5) if n > 1 else float("nan")
    lengths = [s["length"] for s in samples]
    result |= {"problems": n, "length": float(np.mean(lengths))}
    result["truncated"] = float(np.mean([s["truncated"] for s in samples]))
    return result | thoughts.rates([s["thoughts"] for s in samples], lengths)


def sample_and_judge(engine, problems, k: int, tokenizer, pool, args) -> list[dict]:
    """k judged samples to each problem, on every rank; the same seeds at every call."""
    samples = rollout(engine, problems, k, f"{args.seed} eval", args)
    judge(samples, [p["answer"] for p in problems for _ in range(k)], tokenizer, pool, args)
    return gather(samples)


def evaluate(engine, datasets: dict, tokenizer, pool, args) -> dict:
    """eval/NAME/avg@k, pass@k, length, truncated and thoughts of each data set."""
    metrics, k = {}, args.eval_num_samples
    keys = f"avg@{k} pass@{k} length truncated thoughts/reflection thoughts/transition".split()
    for name, problems in datasets.items():
        result = summarize(sample_and_judge(engine, problems, k, tokenizer, pool, args), k)
        metrics |= {f"eval/{Path(name).stem}/{key}": result[key] for key in keys}
    return metrics


# --------------------------------------------------------------- output folder and checkpoints


def make_logger(folder: Path, args):
    """log(step, metrics) to metrics.jsonl, TensorBoard, and wandb or trackio (--track); rank 0."""
    if dist.get_rank() != 0:
        return lambda step, metrics: None
    from torch.utils.tensorboard import SummaryWriter

    board = SummaryWriter(folder)
    tracker = None
    if args.track != "none":
        tracker = __import__(args.track)
        tracker.init(project="pretrain-space-rl", name=folder.name, config=vars(args))

    def log(step: int, metrics: dict) -> None:
        finite = {  # JSON has no NaN and no infinity
            k: None if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in metrics.items()
        }
        with open(folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(finite) + "\n")
        for key, value in metrics.items():
            if isinstance(value, (int, float)):
                board.add_scalar(key, value, step)
        board.flush()
        if tracker:
            tracker.log(metrics, step=step)

    return log


def save_completions(folder: Path, step: int, problems, samples, A, num_generations, tokenizer):
    """completions/step_*.parquet: one row a sample (rank 0)."""
    if dist.get_rank() != 0:
        return
    import pyarrow
    import pyarrow.parquet

    rows = [
        dict(
            prompt=tokenizer.decode(problems[s["index"] // num_generations]["prompt_ids"]),
            response=s["text"],
            reward=s["reward"],
            advantage=float(A[s["index"]]),
            length=s["length"],
            finish_reason="length" if s["truncated"] else "stop",
        )
        for s in samples
    ]
    (folder / "completions").mkdir(exist_ok=True)
    path = folder / "completions" / f"step_{step:06d}.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def save_checkpoint(folder: Path, step: int, policy, optimizer, args) -> None:
    """checkpoints/step_*: weights and optimiser state, every rank its shards; whole or absent.

    No more is needed: phase, data order and sampling seeds are functions of (seed, step). Older
    checkpoints than the last --keep-checkpoints go when the new one is complete.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    path = folder / "checkpoints" / f"step_{step:06d}"
    temporary = path.with_suffix(".tmp")
    if dist.get_rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    dist.barrier()
    model, optim = get_state_dict(policy, optimizer)
    dcp.save({"model": model, "optimizer": optim}, checkpoint_id=temporary)
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.copy(folder / "args.json", temporary)
        shutil.rmtree(path, ignore_errors=True)
        temporary.rename(path)
        for old in sorted(path.parent.glob("step_??????"))[: -args.keep_checkpoints]:
            shutil.rmtree(old)
    dist.barrier()


def find_checkpoint(folder: Path, args) -> Path | None:
    """--resume: a checkpoint's path, or "auto", the latest of the run if it has one."""
    if args.resume == "auto":
        found = sorted(p for p in (folder / "checkpoints").glob("step_??????") if p.is_dir())
        return found[-1] if found else None
    path = Path(args.resume) if args.resume else None
    if path and not (path / ".metadata").is_file():
        fail(f"--resume {path}: no checkpoint is there; give RUN/checkpoints/step_NNNNNN, or auto")
    return path


def load_checkpoint(folder: Path, policy, optimizer, path: Path | None) -> int:
    """Restore the checkpoint, if there is one. Returns its step, else 0.

    Later lines of metrics.jsonl are cut off, so that every step is there once.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    step = 0
    if path:
        step = int(path.name.removeprefix("step_"))
        model, optim = get_state_dict(policy, optimizer)
        dcp.load({"model": model, "optimizer": optim}, checkpoint_id=path)
        set_state_dict(policy, optimizer, model_state_dict=model, optim_state_dict=optim)
    metrics = folder / "metrics.jsonl"
    if dist.get_rank() == 0 and metrics.exists():
        lines = [x for x in metrics.read_text().splitlines() if x.endswith("}")]
        # Step 0, the evaluation before training, is done again when no checkpoint was found.
        kept = [x for x in lines if step and json.loads(x)["step"] <= step]
        metrics.write_text("".join(x + "\n" for x in kept))
    dist.barrier()
    return step


def save_model(folder: Path, policy, config, tokenizer, path: str, dtype: torch.dtype) -> None:
    """model/: a Hugging Face checkpoint, gathered one parameter at a time into rank 0's memory."""
    from huggingface_hub import save_torch_state_dict
    from transformers import GenerationConfig

    state = {}
    for name, parameter in policy.lm.named_parameters():
        weight = parameter.detach().to(dtype).full_tensor().cpu()
        if dist.get_rank() == 0:
            state[name] = weight
    if dist.get_rank() == 0:
        out = folder / "model"
        out.mkdir(exist_ok=True)
        save_torch_state_dict(state, out)
        config.dtype = dtype
        config.architectures = [type(policy.lm).__name__]
        config.save_pretrained(out)
        tokenizer.save_pretrained(out)
        if (Path(path) / "generation_config.json").exists():
            GenerationConfig.from_pretrained(path).save_pretrained(out)
    dist.barrier()


def timer():
    """A clock: times["name"] += seconds since the last call of lap("name")."""
    clock = types.SimpleNamespace(times={}, last=time.perf_counter())

    def lap(name: str) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        clock.times[name] = clock.times.get(name, 0.0) + now - clock.last
        clock.last = now

    clock.lap = lap
    return clock


def peak_memory_gib() -> float:
    """Of this process: the CUDA allocator's peak, or the largest resident set on a CPU; GiB."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def rollout_metrics(samples: list[dict], rewards: torch.Tensor, args) -> dict:
    """What the step's samples look like."""
    solved = rewards.view(-1, args.num_generations).mean(1)  # [P]
    lengths = [s["length"] for s in samples]
    return {
        "reward/mean": rewards.mean().item(),
        "reward/solve_all": (solved == 1).float().mean().item(),
        "reward/solve_none": (solved == 0).float().mean().item(),
        "completion/length": float(np.mean(lengths)),
        "completion/truncated": float(np.mean([s["truncated"] for s in samples])),
        # E[-log π(y_t | x, y_<t)] over y ~ π is the entropy: no full distribution is needed.
        "policy/entropy": float(-np.concatenate([s["logprobs"] for s in samples]).mean()),
        **thoughts.rates([s["thoughts"] for s in samples], lengths),
    }


def speed_metrics(clock, rollout_tokens: int, update_tokens: int) -> dict:
    """Seconds of each part, tokens per second, peak memory."""
    times = dict(clock.times)
    return {
        **times,
        "time/step": sum(times.values()),
        "throughput/rollout_tokens_per_s": rollout_tokens / times["time/rollout"],
        "throughput/update_tokens_per_s": update_tokens / times["time/update"],
        "memory/peak_gib": peak_memory_gib(),
    }


def progress_line(metrics: dict, num_steps: int) -> str:
    """The step in one line of the console."""
    updated = not math.isnan(metrics["policy/grad_norm"])
    parts = [
        f"step {metrics['step']}/{num_steps} {metrics['phase']:8}",
        f"reward {metrics['reward/mean']:.3f}",
        f"length {metrics['completion/length']:.0f}",
        f"entropy {metrics['policy/entropy']:.2f}",
        f"grad {metrics['policy/grad_norm']:.2f}" if updated else "no update",
        f"gap {metrics['sync/logprob_gap']:.0e}",
        f"{metrics['time/step']:.1f} s",
        eval_line(metrics),
    ]
    return "  ".join(part for part in parts if part)


def eval_line(metrics: dict) -> str:
    """The accuracies among the metrics, on one line."""
    scores = ((key.removeprefix("eval/"), value) for key, value in metrics.items() if "@" in key)
    return "  ".join(f"{key} {value:.3f}" for key, value in scores)


def say_summary(folder: Path, say) -> None:
    """The run's evaluations before and after, its curves, and where its outputs are."""
    if dist.get_rank() != 0:
        return
    import plot

    plot.draw([folder], folder / "curves.png")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    evals = [row for row in rows if any(key.startswith("eval/") for key in row)]
    say()
    if evals:
        first, last = evals[0], evals[-1]
        say(
            f"{'held-out':34} {'step':>4} {first['step']:<4} {'step':>4} {last['step']:<4}    ratio"
        )
        for key in (key for key in last if key.startswith("eval/")):
            ratio = f"{last[key] / first[key]:8.2f}x" if first[key] else "        -"
            say(f"{key.removeprefix('eval/'):34} {first[key]:9.3f} {last[key]:9.3f} {ratio}")
    seconds = sum(row.get("time/step", 0.0) for row in rows)
    say(f"{len(rows)} lines of metrics, {seconds:.0f} s of steps")
    say(f"metrics.jsonl, curves.png, completions and the final model/ are in {folder}")

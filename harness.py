"""What surrounds the algorithm: command line, processes, output folder, checkpoints.

Small, independent functions that all programs use. A reader of the algorithms can skip them.
"""

import contextlib
import ctypes
import dataclasses
import datetime
import fcntl
import inspect
import json
import logging
import math
import os
import re
import resource
import secrets
import shutil
import signal
import sys
import tempfile
import textwrap
import time
import traceback
import types
from pathlib import Path

import torch
import torch.distributed as dist

import flags
import workarounds

HERE = Path(__file__).resolve().parent

# ----------------------------------------------------------------------- command line and processes

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
        max_completion_length=64,
        learning_rate=3e-6,
        weight_decay=0.0,
        eval_every=10,
        eval_num_samples=4,
        save_every=0,
        warmup_steps=5,
        dtype="float32",
        max_tokens_per_microbatch=2048,
        gradient_checkpointing=False,
    ),
}


def fail(message: str) -> None:
    """Print "error: MESSAGE" on stderr and exit with code 2: for bad input.

    The first rank of a node prints at once. The others wait 5 s: if all ranks fail, the launcher
    stops them before they repeat the line.

    Raises:
        SystemExit.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(5)
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)


def first_line(error: Exception | str) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]


def announce(message: str) -> None:
    """Print one line on rank 0, before quiet() redirects the console."""
    if os.environ.get("RANK", "0") == "0":
        print(message, flush=True)


def help_text(Args, default) -> str:
    """The text of --help, in sections: tyro would put all flags of a dataclass in one group."""
    module = sys.modules[Args.__module__]
    script = Path(module.__file__).name
    text = f"usage: {script} [--preset lab|smollm] [flags]\n\n{first_line(module.__doc__)}\n"
    text += "Defaults are in [ ]. With --preset, this list shows the preset's defaults.\n"
    text += "(paper: ...) is the value in the authors' scripts for Qwen3-4B, else in the paper.\n"
    before = ""
    for section, name, kind, meaning in flags.read_flags(inspect.getsource(module)):
        text += f"\n{section}\n" if section != before else ""
        before, value = section, getattr(default, name)
        if isinstance(value, bool):
            kind, value = "(or --no-...)", "on" if value else "off"
        value = " ".join(map(str, value)) if isinstance(value, tuple) else value
        flag = f"  --{name.replace('_', '-')} {kind}"
        text_of_flag = f"{meaning} [{value if value != '' else 'none'}]"
        lines = textwrap.wrap(text_of_flag, 66, break_on_hyphens=False)
        if len(flag) > 31:
            text, flag = f"{text}{flag}\n", ""
        text += "".join(f"{flag if i == 0 else '':32}{x}\n" for i, x in enumerate(lines))
    return text


def parse_args(Args):
    """The command line as an Args, where --preset replaces the dataclass's defaults.

    Raises:
        SystemExit: after --help, and for an unknown flag or a value of the wrong type.
    """
    import tyro

    argv = [word for arg in sys.argv[1:] for word in arg.split("=", 1)]
    preset = (["paper"] + [b for a, b in zip(argv, argv[1:]) if a == "--preset"])[-1]
    fields = {field.name for field in dataclasses.fields(Args)}
    values = {k: v for k, v in PRESETS.get(preset, {}).items() if k in fields}
    default = dataclasses.replace(Args(), **values)
    if {"-h", "--help"} & set(argv):
        print(help_text(Args, default), end="")
        sys.exit()
    return tyro.cli(Args, default=default)


def check_args(args) -> None:
    """Refuse flags with invalid values, before anything is loaded: see fail()."""
    world_size = dist.get_world_size()
    positive = "num_prompts num_generations num_samples num_minibatches max_completion_length"
    positive += " eval_num_samples tensor_parallel_size max_tokens_per_microbatch"
    for name in (positive + " temperature learning_rate").split():
        if not 0 < getattr(args, name, 1) < math.inf:
            fail(f"--{name.replace('_', '-')} must be positive, not {getattr(args, name)}")
    floors = "weight_decay warmup_steps clip tis_cap sign_weights eval_every save_every num_steps"
    for name in (floors + " alignment_every").split():
        value = getattr(args, name, 0)
        for number in value if isinstance(value, tuple) else [value]:
            if not 0 <= number < math.inf:
                fail(f"--{name.replace('_', '-')} must be 0 or more, not {number}")
    if getattr(args, "temperature", 1) > 2:
        fail(f"--temperature must be at most 2, vLLM's limit, not {args.temperature}")
    if not 0 <= getattr(args, "seed", 0) < 2**32:
        fail(f"--seed must be from 0 to {2**32 - 1}, not {args.seed}")
    if not 0 < getattr(args, "top_p", 1) <= 1:
        fail(f"--top-p must be in (0, 1], not {args.top_p}")
    if getattr(args, "num_generations", 2) == 1:
        alone = {"reinforce++": not getattr(args, "warmup_steps", 0), "sign": True}
        if not alone.get(getattr(args, "advantage", "mean")):  # a warm-up's is r - group mean
            fail("--num-generations 1 makes every advantage 0: give 2 or more")
    names = getattr(args, "datasets", ()) or getattr(args, "eval_datasets", ())
    stems = [Path(name).stem for name in names]
    if twice := {stem for stem in stems if stems.count(stem) > 1}:
        fail(f"two evaluation sets have the name {min(twice)}: rename one, as metrics are by name")
    if getattr(args, "resume", "") in ("auto", True) and not args.output_dir:
        fail("--resume needs --output-dir, the folder of the run to continue")
    if world_size % args.tensor_parallel_size:
        fail(
            f"--tensor-parallel-size {args.tensor_parallel_size} does not divide the {world_size} "
            "processes"
        )
    needed = 32 if args.tensor_parallel_size > 1 else 1  # MiB: vLLM's queue of ranks takes 24
    shared = Path("/dev/shm")
    if not shared.is_dir() or shutil.disk_usage(shared).free < needed * 2**20:
        fail(f"/dev/shm has less than {needed} MiB free: start the container with --shm-size=1g")
    engines = world_size // args.tensor_parallel_size
    if getattr(args, "num_prompts", engines) < engines:
        fail(f"--num-prompts {args.num_prompts}: each of the {engines} engines needs a prompt")
    if getattr(args, "track", "none") != "none":
        try:
            __import__(args.track)
        except ImportError:
            fail(f"--track {args.track} needs a package: pip install {args.track}")


FEWEST_FILES = 256  # that a process may have open; a rank of two needs some 100 on a CPU


def raise_open_files() -> None:
    """Raise this process's limit of open files to what the system allows, at most 65536.

    Refuses to start if that is less than FEWEST_FILES. Child processes inherit the limit.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    if wanted < FEWEST_FILES:
        fail(f"a process may open only {hard} files but needs {FEWEST_FILES}: raise ulimit -n")


def launch(main, args) -> None:
    """Run main(args) in one process per GPU, or in --num-processes of them; exit as they do.

    torch.distributed.run, which `torchrun` calls, starts the processes. Each runs the same command
    and comes here again, as does a rank that `torchrun` has started: it runs main(args).
    """
    raise_open_files()
    if "RANK" in os.environ:
        code = 0
        try:
            main(args)
        except SystemExit as end:
            code = end.code
        except KeyboardInterrupt:
            os._exit(128 + signal.SIGINT)
        except BaseException:
            # At once: an orderly end would wait for ranks that wait for this one in a collective.
            try:
                sys.excepthook(*sys.exc_info())
                sys.stdout.flush()
                sys.stderr.flush()
            finally:
                os._exit(1)
        workarounds.leave(code)
    if (
        not torch.cuda.is_available()
        and args.preset == "paper"
        and not Path(args.model).expanduser().is_dir()
    ):
        fail(
            f"no GPU was found, and {args.model} with the paper's setting needs a GPU node. On a "
            "laptop use --preset lab or --preset smollm, or give a local model folder as --model"
        )
    gpus = torch.cuda.device_count()
    n = args.num_processes or gpus or 1
    if n < 0 or 0 < gpus < n:
        fail(f"--num-processes {n}: each process needs a GPU, and this machine has {gpus}")
    cores = len(os.sched_getaffinity(0))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, min(8, cores // n))))
    if n > 1:  # spinning threads would take the cores from the other ranks'
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TORCHELASTIC_LOG_LEVEL", "CRITICAL")
    os.environ.update(workarounds.rank_environment() | os.environ)
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    forward_signals()
    # Ranks get signals from us, and time to save. What torchrun itself stops, after a rank has
    # failed, hangs in a collective: 5 seconds are enough. The machine's name may not resolve.
    options = ["--standalone", "--local-addr=127.0.0.1", "--signals-to-handle=SIGQUIT"]
    workarounds.stop_ranks_after(5)
    with tempfile.TemporaryDirectory() as logs:  # torchrun would leave one of its own behind
        try:
            torchrun([*options, f"--log-dir={logs}", f"--nproc-per-node={n}", *sys.argv])
        except ChildFailedError as error:
            code = error.get_first_failure()[1].exitcode
            sys.exit(128 - code if code < 0 else code)  # below 0: ended by that signal


def forward_signals() -> None:
    """In the launcher: pass STOPS on to the ranks; a second SIGTERM or Ctrl-C kills them."""
    asked = []

    def handler(number, frame):
        pid = os.getpid()
        ranks = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        if not ranks:  # they have not started
            sys.exit(128 + number)
        # A closing terminal sends SIGHUP more than once, and other signals may follow.
        kill = number != signal.SIGHUP and any(before != signal.SIGHUP for before in asked)
        if not asked:
            with contextlib.suppress(OSError):  # the terminal or `| tee` has gone
                print(
                    "stopping after this step; repeat the signal to stop at once", file=sys.stderr
                )
        for rank in ranks:
            os.kill(int(rank), signal.SIGKILL if kill else number)
        if kill:
            os._exit(128 + number)
        asked.append(number)

    on_stops(handler)


STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # SIGINT: Ctrl-C; SIGHUP: a lost terminal


def on_stops(handler) -> None:
    """Let `handler` take STOPS, except those that are ignored: nohup ignores SIGHUP."""
    for number in STOPS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


STOP_SIGNALS = []  # received by this process; see stop_if_asked()
PATIENT = []  # the group of wait_for_all(), made by init_distributed()


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
        dist.init_process_group("cpu:gloo,cuda:nccl")
    else:
        device = torch.device("cpu")
        dist.init_process_group("gloo")
    week = datetime.timedelta(days=7)
    PATIENT[:] = [dist.new_group(backend="gloo", timeout=week)]
    return dist.get_rank(), dist.get_world_size(), device


def wait_for_all() -> None:
    """A barrier that also waits for a rank's long download, read or write: up to a week.

    Other collectives give up after 30 minutes. If a rank dies, the launcher stops the others.
    """
    dist.barrier(PATIENT[0] if PATIENT else None)


def catch_signals() -> None:
    """From now on, note STOPS for stop_if_asked(), at the end of the step."""
    on_stops(lambda number, frame: STOP_SIGNALS.append(number))


def stop_if_asked(folder: Path, step: int, policy, optimizer, args, engine, verifier, say) -> None:
    """If a rank has received one of STOPS, save a checkpoint and exit.

    Raises:
        SystemExit: its code is 128 + the signal's number.
    """
    number = torch.tensor(STOP_SIGNALS[0] if STOP_SIGNALS else 0)
    dist.all_reduce(number, dist.ReduceOp.MAX)
    if number:
        save_checkpoint(folder, step, policy, optimizer, args)
        say(f"stopped after step {step}; continue with --output-dir {folder} --resume auto")
        verifier.stop()
        shutdown(engine)
        sys.exit(128 + int(number))


def shutdown(engine) -> None:
    """Close the engine, then the process group (which the engine may have closed already)."""
    wait_for_all()
    engine.llm_engine.engine_core.shutdown()
    if dist.is_initialized():
        dist.destroy_process_group()


# ------------------------------------------------------------------------------------ output folder


LOCKS = []  # files that stay open: see lock_folder()


def make_output_dir(args) -> Path:
    """Make the run's folder and write args.json. Returns its path, the same on every rank.

    Refuses a folder of another run, unless --resume continues that run with compatible flags.
    """
    script = Path(sys.argv[0]).stem
    when = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    datasets = (args.dataset,) if hasattr(args, "dataset") else args.datasets
    model, data = Path(args.model).name, "+".join(Path(name).stem for name in datasets)
    folder = [args.output_dir or f"runs/{script}__{model}__{data}__s{args.seed}__{when}"]
    dist.broadcast_object_list(folder)
    folder = Path(folder[0])
    marks = ("metrics.jsonl", "checkpoints", "parts", "results.json", "alignment.json")
    used = any((folder / name).exists() for name in marks)
    if used and not getattr(args, "resume", False):
        fail(f"{folder} holds another run: give another --output-dir, or --resume to continue it")
    if used:
        refuse_changes(folder, script, args)
    wait_for_all()
    refused = ""
    try:
        folder.mkdir(parents=True, exist_ok=True)  # on every node
        if dist.get_rank() == 0:
            lock_folder(folder)
            text = json.dumps({"script": script, **vars(args)}, indent=2)
            (folder / "args.json").write_text(text + "\n")
    except BlockingIOError:
        refused = f"another run is writing to {folder}: give another --output-dir"
    except OSError as error:
        refused = f"the output folder cannot be written: {error}; give another --output-dir"
    wait_for_all()
    reasons = [None] * dist.get_world_size()
    dist.all_gather_object(reasons, refused)  # one rank's reason ends all in good order
    if any(reasons):
        fail(next(filter(None, reasons)))
    return folder


def lock_folder(folder: Path) -> None:
    """Mark the folder as in use. The mark goes when this process ends, however it ends.

    Raises:
        BlockingIOError: another run is using the folder.
    """
    LOCKS.append(open(folder / "args.json", "a"))
    try:
        fcntl.flock(LOCKS[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        pass  # a file system without locks


def read_args(folder: Path) -> dict:
    """The args.json of a run's folder; refuses a folder without one."""
    try:
        return json.loads((folder / "args.json").read_text())
    except (OSError, ValueError):
        fail(f"{folder} has no readable args.json: give another --output-dir, or RUN/checkpoints/*")


def refuse_changes(folder: Path, script: str, args) -> None:
    """Refuse to continue the run in `folder` if a flag differs that --resume may not change.

    Also if the model's files or the data do: inputs.fix_content().
    """
    before = read_args(folder)
    content, new_content = before.get("content", {}), getattr(args, "content", {})
    same_model = content.get("the model", "?") == new_content.get("the model")  # at another path
    now = json.loads(json.dumps(dataclasses.asdict(args)))  # tuples become lists, as in the file
    changed = [
        f"--{key.replace('_', '-')} was {before[key]!r}, is now {value!r}"
        for key, value in {"script": script, **now}.items()
        if key in before and key not in flags.changeable(script) and before[key] != value
        if not (key == "model" and same_model)
    ]
    changed += [
        f"{name} has changed under the same name"
        for name, value in new_content.items()
        if content.get(name, value) != value
    ]
    if changed:
        fail(f"--resume cannot continue {folder}: {'; '.join(changed)}")


KEPT_CHECKPOINTS = 2  # older ones are removed


def check_disk(folder: Path, path: str, args) -> None:
    """Refuse to start if the disk has no room for the checkpoints and the final model.

    Args:
        path: folder of the model's weights.
    """
    from safetensors import safe_open

    count = 0
    for file in Path(path).glob("model*.safetensors"):
        with safe_open(file, "pt") as tensors:
            count += sum(math.prod(tensors.get_slice(k).get_shape()) for k in tensors.keys())
    # float32 weights and two moments; one checkpoint more than are kept exists while it is written
    checkpoints = min(KEPT_CHECKPOINTS + 1, 1 + args.num_steps // (args.save_every or math.inf))
    needed = count * (12 * checkpoints + getattr(torch, args.dtype).itemsize)
    free = shutil.disk_usage(folder).free
    free += sum(file.stat().st_size for file in folder.glob("checkpoints/*/*"))  # of --resume
    if free < needed:
        fail(
            f"{folder} has {free / 2**30:.3f} GiB free, but the run needs {needed / 2**30:.3f} GiB "
            f"({checkpoints:.0f} checkpoints and the model): give another --output-dir, or "
            "--save-every 0"
        )


def full(folder: Path) -> bool:
    """Is there no room on this folder's disk? Libraries say it in words of their own, or not."""
    try:
        return shutil.disk_usage(folder).free < 2**20
    except OSError:
        return False


def quiet(folder: Path):
    """Redirect stdout and stderr, where libraries print, to log_rank*.txt.

    An exception that ends the process still shows one line on the console.

    Returns:
        say(...), which prints on the console; on ranks other than 0 it does nothing. It also does
        nothing once the console is gone: the terminal was closed, or `| tee` has ended.
    """
    rank = dist.get_rank()
    console = os.fdopen(os.dup(2), "w", buffering=1)
    log = open(folder / f"log_rank{rank}.txt", "a", buffering=1)
    sys.stdout.flush()
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)

    def say(*words):
        with contextlib.suppress(OSError):
            print(*words, file=console)

    def on_error(kind, error, trace):
        why = f"{folder} is on a full disk: make room and start again" if full(folder) else error
        say(f"rank {rank} failed: {why} (details in {log.name})")
        traceback.print_exception(kind, error, trace)  # fails on a full disk

    sys.excepthook = on_error
    return say if rank == 0 else lambda *words: None


def make_logger(folder: Path, args):
    """A function log(step, metrics): to metrics.jsonl, TensorBoard and --track's service.

    Only rank 0 writes. A value that is not finite is null in metrics.jsonl.
    """
    if dist.get_rank() != 0:
        return lambda step, metrics: None
    from torch.utils.tensorboard import SummaryWriter

    file = folder / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []  # of a resumed run
    after = json.loads(lines[-1])["step"] + 1 if lines else 0
    board = SummaryWriter(folder, purge_step=after)  # hides what a killed run wrote from there on
    tracker = None
    if args.track != "none":
        tracker = __import__(args.track)
        project = os.environ.get("WANDB_PROJECT", "pretrain-space-rl")
        known = folder / "tracker_id"  # a resumed run goes on there as the same run
        if not (lines and known.exists()):
            known.write_text(secrets.token_hex(4))
        os.environ.setdefault("WANDB_RUN_ID", known.read_text())  # trackio knows runs by name
        resume = {"resume": "allow"} if lines else {}
        tracker.init(project=project, name=folder.resolve().name, config=vars(args), **resume)

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


def save_completions(folder: Path, step: int, prompts, samples, A, in_loss, tokenizer) -> None:
    """Write completions/step_*.parquet on rank 0: one row per sample, enough to replay the step.

    logprobs has the sampler's log-prob of each token of response_ids, the stop token included.
    """
    if dist.get_rank() != 0:
        return
    import pyarrow
    import pyarrow.parquet

    rows = [
        dict(
            prompt=tokenizer.decode(x),
            response=s["text"],
            reward=s["reward"],
            advantage=float(A[s["index"]]),
            in_loss=bool(in_loss[s["index"]]),
            length=s["length"],
            finish_reason="length" if s["truncated"] else "stop",
            prompt_ids=x,
            response_ids=s["ids"].tolist(),
            logprobs=s["logprobs"].tolist(),
        )
        for x, s in zip(prompts, samples)
    ]
    (folder / "completions").mkdir(exist_ok=True)
    path = folder / "completions" / f"step_{step:06d}.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def save_model(folder: Path, policy, config, tokenizer, path: str, dtype: torch.dtype) -> None:
    """Write model/, a Hugging Face checkpoint: rank 0 gathers one parameter at a time."""
    from huggingface_hub import save_torch_state_dict

    device = "cuda" if torch.cuda.is_available() else "cpu"  # offloaded shards travel by the GPU
    state = {}
    for name, parameter in policy.lm.named_parameters():
        weight = parameter.detach().to(device).to(dtype).full_tensor().cpu()
        if dist.get_rank() == 0:
            state[name] = weight
    if dist.get_rank() == 0:
        out = folder / "model"
        out.mkdir(exist_ok=True)
        save_torch_state_dict(state, out)
        save_config(out, config, type(policy.lm).__name__, tokenizer, path, dtype)
    wait_for_all()


def save_config(out: Path, config, architecture: str, tokenizer, path: str, dtype) -> None:
    """Write config, tokenizer and generation_config.json to `out`, a Hugging Face folder.

    Args:
        path: folder of the model that training began with.
    """
    from transformers import GenerationConfig

    config.dtype = dtype
    config.architectures = [architecture]
    config.save_pretrained(out)
    tokenizer.save_pretrained(out)
    if (Path(path) / "generation_config.json").exists():
        GenerationConfig.from_pretrained(path).save_pretrained(out)


def timer():
    """A clock whose lap("name") adds the seconds since the last lap to its times["name"]."""
    clock = types.SimpleNamespace(times={}, last=time.perf_counter())

    def lap(name: str) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        clock.times[name] = clock.times.get(name, 0.0) + now - clock.last
        clock.last = now

    clock.lap = lap
    return clock


PEAK_BYTES = [0]  # of the GPU's memory; see note_memory()


def note_memory() -> None:
    """Record the GPU's memory in use. Called where it is at its peak, before caches are emptied.

    The CUDA allocator's own peak would count the sleeping engine, which takes no memory.
    """
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        PEAK_BYTES[0] = max(PEAK_BYTES[0], total - free)


def peak_memory_gib() -> float:
    """Peak memory so far in GiB: of the whole GPU; on a CPU, this process's resident memory."""
    if torch.cuda.is_available():
        return PEAK_BYTES[0] / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def speed_metrics(clock, rollout_tokens: int, update_tokens: int) -> dict:
    """Metrics of speed: seconds of each part of the step, tokens per second, peak GiB.

    Args:
        rollout_tokens: response tokens that were sampled.
        update_tokens: response tokens that the update computed.
    """
    times = dict(clock.times)
    return {
        **times,
        "time/step": sum(times.values()),
        "throughput/rollout_tokens_per_s": rollout_tokens / times["time/rollout"],
        "throughput/update_tokens_per_s": update_tokens / times["time/update"],
        "memory/peak_gib": peak_memory_gib(),
    }


def progress_line(metrics: dict, num_steps: int) -> str:
    """The console's line for a step."""
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


def make_warner(args, say):
    """A function warn(metrics), which warns of steps without a training signal.

    It prints at most one line of each kind in a run.
    """
    said = set()

    def warn(metrics: dict) -> None:
        step = metrics["step"]
        where = "eval/" if step == 0 else "completion/"
        share = {
            kind: [v for k, v in metrics.items() if k.startswith(where) and k.endswith(f"/{kind}")]
            for kind in ("truncated", "boxed")
        }
        lines = {}
        if step <= 1 and max(share["truncated"], default=0) > 0.5:
            lines["truncated"] = (
                f"{max(share['truncated']):.0%} of the responses reached --max-completion-length "
                f"{args.max_completion_length} and get reward 0: it may be too short, or the model "
                "may not end its responses (see the stop tokens above)"
            )
        if share["boxed"] and max(share["boxed"]) == 0:
            lines["boxed"] = (
                r"no response has its answer in \boxed{}, so all get reward 0: ask for it in "
                "--system-prompt"
            )
        if metrics.get("reward/solve_all", 0) + metrics.get("reward/solve_none", 0) == 1:
            lines["groups"] = (
                "every group is all correct or all incorrect, so r - group mean is 0: the problems "
                "may be too easy or too hard for this model"
            )
        elif metrics.get("policy/counted_samples") == 0:
            lines["loss"] = "no sample is in the loss, so nothing is learned: see --sign-weights"
        for kind, line in lines.items():
            if kind not in said:
                said.add(kind)
                say(f"warning: step {step}: {line}")

    return warn


def eval_line(metrics: dict) -> str:
    """The metrics avg@k and pass@k of each evaluation set, on one line."""
    found = [key for key in metrics if re.fullmatch(r"eval/.*/(avg|pass)@\d+", key)]
    return "  ".join(f"{key.removeprefix('eval/')} {metrics[key]:.3f}" for key in found)


def say_summary(folder: Path, say) -> None:
    """Draw curves.png; print the first and last evaluation and where the outputs are."""
    if dist.get_rank() != 0:
        return
    import plot

    file = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    if rows:  # --num-steps 0 without an evaluation makes none
        plot.draw([folder], folder / "curves.png")
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
    say(f"all steps together took {seconds:.0f} s")
    say(f"metrics.jsonl, curves.png, completions/ and the final model/ are in {folder}")


# -------------------------------------------------------------------------------------- checkpoints


def is_whole(path: Path) -> bool:
    """Is this a checkpoint with all the bytes that its .metadata names?"""
    from torch.distributed.checkpoint import FileSystemReader

    try:
        parts = FileSystemReader(path).read_metadata().storage_data.values()
        sizes = {part.relative_path: (path / part.relative_path).stat().st_size for part in parts}
    except Exception:  # whatever pickle makes of a broken file
        return False
    return all(part.offset + part.length <= sizes[part.relative_path] for part in parts)


def find_checkpoint(folder: Path, args) -> Path | None:
    """The checkpoint that --resume names, or None. "auto" is the run's latest whole one, if any.

    Refuses to start over in the folder of a finished run, or of checkpoints that are all broken.
    """
    path = Path(args.resume) if args.resume else None
    if args.resume == "auto":
        found = sorted((folder / "checkpoints").glob("step_??????"), reverse=True)
        finished = (folder / "model").exists()
        chosen = [next(filter(is_whole, found), None), bool(found), finished]
        dist.broadcast_object_list(chosen)  # ranks that see other files must not go other ways
        path, found, finished = chosen
        if not path and (found or finished):
            what = "no whole checkpoint" if found else "a finished run without a checkpoint"
            fail(f"{folder} holds {what}: give another --output-dir")
        announce(f"continuing from {path}" if path else f"no checkpoint in {folder}: from step 1")
    elif path and not (re.fullmatch(r"step_\d{6}", path.name) and (path / ".metadata").is_file()):
        fail(f"--resume {path} is not a checkpoint: give RUN/checkpoints/step_NNNNNN, or auto")
    elif path and not is_whole(path):
        fail(f"--resume {path} is not a whole checkpoint: give an older one, or auto")
    if path and path.name > f"step_{args.num_steps:06d}":
        fail(f"--num-steps {args.num_steps} is before {path}, from where the run would go on")
    return path


def save_checkpoint(folder: Path, step: int, policy, optimizer, args) -> None:
    """Write checkpoints/step_*: weights and optimiser state, each rank its own shards.

    Nothing else is needed: phase, data order and sampling seeds are functions of (seed, step). The
    folder gets its name once it is complete; then all but the last two checkpoints are removed.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    path = folder / "checkpoints" / f"step_{step:06d}"
    temporary = path.with_suffix(".tmp")
    if dist.get_rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    wait_for_all()
    model, optim = get_state_dict(policy, optimizer)
    dcp.save({"model": model, "optimizer": optim}, checkpoint_id=temporary)
    wait_for_all()
    if dist.get_rank() == 0:
        shutil.copy(folder / "args.json", temporary)
        shutil.rmtree(path, ignore_errors=True)
        temporary.rename(path)
        for old in sorted(path.parent.glob("step_??????"))[:-KEPT_CHECKPOINTS]:
            shutil.rmtree(old)
    wait_for_all()


def load_checkpoint(folder: Path, policy, optimizer, path: Path | None) -> int:
    """Restore the checkpoint at `path`, if any. Returns its step, or 0 without a checkpoint.

    Removes later checkpoints and later lines of metrics.jsonl, so that each step is there once.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    step = 0
    if path:
        step = int(path.name.removeprefix("step_"))
        flags = {key: optimizer.param_groups[0][key] for key in ("lr", "weight_decay")}
        model, optim = get_state_dict(policy, optimizer)
        dcp.load({"model": model, "optimizer": optim}, checkpoint_id=path)
        set_state_dict(policy, optimizer, model_state_dict=model, optim_state_dict=optim)
        optimizer.param_groups[0].update(flags)  # this run's, not those of the run that saved
    if dist.get_rank() == 0:
        for later in (folder / "checkpoints").glob("step_??????"):
            if int(later.name.removeprefix("step_")) > step:
                shutil.rmtree(later)
    metrics = folder / "metrics.jsonl"
    if dist.get_rank() == 0 and metrics.exists():
        lines = [x for x in metrics.read_text().splitlines() if x.endswith("}")]
        # Step 0, the evaluation before training, is done again when no checkpoint was found.
        kept = [x for x in lines if step and json.loads(x)["step"] <= step]
        metrics.write_text("".join(x + "\n" for x in kept))
    wait_for_all()
    return step

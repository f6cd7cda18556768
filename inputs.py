"""Read what a run needs: the model's files, its special tokens, problems and their prompts.

Bad input ends the program with one line: harness.fail().
"""

import collections
import datetime
import hashlib
import json
import os
import random
import re
from pathlib import Path

import torch.distributed as dist

import data
import grading
import models
import workarounds
from harness import announce, fail, first_line, read_args, wait_for_all

# -------------------------------------------------------------------------------------------- model

HUB_OWNERS = {"Qwen": "Qwen", "Llama": "meta-llama", "SmolLM": "HuggingFaceTB"}
SMALL_FILES = ["*.json", "*.txt", "*.jinja", "*.model"]  # of a model: all but the weights
HUB_ID = r"\w[\w.-]*/[\w.-]+"  # OWNER/NAME


def resolve_model(name: str) -> str:
    """The folder or hub id that --model names: either of them, "smollm2", or a bare family name.

    >>> resolve_model("Qwen2.5-Math-7B")
    'Qwen/Qwen2.5-Math-7B'
    """
    folder = Path(name).expanduser()  # the shell leaves the ~ of --model=~/x
    if folder.is_dir():
        return str(folder)
    if name == "smollm2":
        from lab import smollm2

        return smollm2.checkpoint()
    if "/" not in name:
        owner = next((o for family, o in HUB_OWNERS.items() if name.startswith(family)), None)
        if owner is None:
            fail(f"--model {name}: no such folder or known family; give a hub id OWNER/NAME")
        return f"{owner}/{name}"
    if not re.fullmatch(HUB_ID, name):
        fail(f"--model {name}: no such folder; a hub id has the form OWNER/NAME")
    return name


def load_model_files(args):
    """Path, config and tokenizer of --model; refuses a model that the trainer cannot handle."""
    from transformers import AutoConfig

    fix_date(args)
    try:
        source = resolve_model(args.model)
        path = local_folder(source, SMALL_FILES)
        models.check_folder(args.model, path)
        config = AutoConfig.from_pretrained(path)
        lm = models.check_config(args.model, config)
        path = local_folder(source, ["model*.safetensors"])  # what takes long, once it will be used
        models.check_checkpoint(args.model, path, lm)
        tokenizer = load_tokenizer(path)
    except Exception as error:
        refuse_model(args.model, error)
    if off := models.dropouts(config):
        found = ", ".join(f"{key} {value:g}" for key, value in off.items())
        announce(f"config.json has {found}: training turns dropout off")
    if config.num_attention_heads % args.tensor_parallel_size:
        fail(
            f"--tensor-parallel-size {args.tensor_parallel_size} does not divide the model's "
            f"{config.num_attention_heads} attention heads"
        )
    return path, config, tokenizer


def refuse_model(name: str, error: Exception) -> None:
    """End the program with the reason why --model cannot be loaded, on one line."""
    hub = re.fullmatch(HUB_ID, name) and not Path(name).is_dir()
    where = "there is no such folder, and for a hub id: " if hub else ""
    fail(f"--model {name} cannot be loaded: {where}{first_line(error)}")


def local_folder(source: str, kinds: list[str]) -> str:
    """The folder `source`, or the local folder of a hub id's files; each node fetches them once.

    Args:
        kinds: patterns of the files' names.
    """
    from huggingface_hub import snapshot_download

    if Path(source).is_dir():
        return source
    if os.environ.get("LOCAL_RANK", "0") == "0":
        snapshot_download(source, allow_patterns=kinds)
    if dist.is_initialized():  # one_step.py has no other ranks
        wait_for_all()
    return snapshot_download(source, local_files_only=True)


def fix_date(args) -> None:
    """Set args.date, which chat templates print: the day when the run began, also on --resume."""
    folder = Path(getattr(args, "output_dir", "") or ".")
    day = None
    if getattr(args, "resume", "") and (folder / "args.json").is_file():
        day = read_args(folder).get("date")
    shared = [day or datetime.date.today().isoformat()]
    dist.broadcast_object_list(shared)  # ranks may start on either side of midnight
    args.date = shared[0]


def fix_content(path: str, datasets: dict[str, list[dict]], args) -> None:
    """Set args.content: hashes of the model's files and of each data set, by name.

    --resume compares them with those in args.json: harness.refuse_changes(). Not times of files,
    which a copy or another node's download changes. Of the weights, 64 blocks of 64 KiB of each
    file: an update changes them all, and to read 15 GB takes a while.

    Args:
        path: folder of the model; datasets: rows with id, prompt_ids and answer.
    """
    model = hashlib.sha256()
    configs = [Path(path) / name for name in ("config.json", "generation_config.json")]
    for file in [*filter(Path.is_file, configs), *models.weight_files(path)]:
        size = file.stat().st_size
        model.update(f"{file.name} {size} ".encode())
        with open(file, "rb") as content:
            for i in range(64):
                content.seek(i * size // 64)
                model.update(content.read(2**16))
    found = {"the model": model.hexdigest()}
    for name, rows in datasets.items():
        text = json.dumps([[row["id"], row["prompt_ids"], row["answer"]] for row in rows])
        found[f"data set {name}"] = hashlib.sha256(text.encode()).hexdigest()
    shared = [found]
    dist.broadcast_object_list(shared)  # rank 0's: all ranks must decide the same
    args.content = shared[0]


def load_tokenizer(path: str):
    """The tokenizer that a folder's tokenizer.json defines.

    Raises:
        ValueError: the folder has no tokenizer; transformers might make an empty one.
    """
    from transformers import AutoTokenizer

    kinds = ("tokenizer.json", "tekken.json", "vocab.*", "*.model")
    if not any(file for kind in kinds for file in Path(path).glob(kind)):
        raise ValueError("the folder has no tokenizer.json; save the tokenizer there too")
    tokenizer = AutoTokenizer.from_pretrained(path)
    if not workarounds.fits_file(tokenizer, path):
        tokenizer = workarounds.tokenizer_of_file(path)
        announce("the folder's tokenizer class does not fit tokenizer.json: the file is used")
    return tokenizer


def num_tokens(tokenizer, config) -> int:
    """The number of ids that can occur: tokens of the tokenizer that have an embedding.

    Qwen has more embeddings than tokens; Gemma 3 and R1-Distill-Llama have one token more than
    embeddings. Such ids are never sampled.
    """
    return min(len(tokenizer), config.vocab_size)


def find_bos(tokenizer, bos_token: str) -> int:
    """Id of the token that replaces the prompt: --bos-token, else BOS, else <|im_start|>."""
    if bos_token:
        ids = tokenizer.encode(bos_token, add_special_tokens=False)
        if len(ids) != 1:
            fail(f"--bos-token {bos_token!r} is {len(ids)} tokens: give a text that is one token")
        return ids[0]
    if tokenizer.bos_token_id is not None:
        return tokenizer.bos_token_id
    if "<|im_start|>" in tokenizer.get_vocab():
        return tokenizer.convert_tokens_to_ids("<|im_start|>")
    fail("the tokenizer has neither BOS nor <|im_start|>: name a start token with --bos-token")


def find_stop_tokens(path: str, tokenizer, vocab_size: int) -> list[int]:
    """Ids that end a response, sorted: EOS, those in generation_config.json, and the end of a turn.

    The end of a turn is found by rendering a chat. It may differ from the others: Qwen2.5-Math's
    chat template ends a turn with <|im_end|>, while the base model's EOS is <|endoftext|>.

    Args:
        path: folder of the model.
        vocab_size: num_tokens(); ids from there on cannot occur.
    """
    found = {tokenizer.eos_token_id}
    file = Path(path) / "generation_config.json"
    if file.is_file():
        ids = models.read_json(path, file).get("eos_token_id")
        for i in ids if isinstance(ids, list) else [ids]:
            if not isinstance(i, int | None):
                fail(f"{file}: eos_token_id must be a number or a list of numbers, not {i!r}")
        found |= set(ids) if isinstance(ids, list) else {ids}
    if tokenizer.chat_template:
        turn = [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "It is two."}]
        try:
            text = tokenizer.apply_chat_template(turn, tokenize=False)
        except Exception:  # a template may refuse such a chat
            text = ""
        behind = text.rpartition("two.")[2] if "two." in text else ""  # or leave the answer out
        ids = tokenizer.encode(behind, add_special_tokens=False)
        special = tokenizer.added_tokens_decoder  # some tokenizers add runs of blanks to these
        found |= set([i for i in ids if i in special and special[i].content.strip()][:1])
    found = sorted(i for i in found if i is not None and i < vocab_size)
    if not found:
        fail("the tokenizer has no EOS token, so no response can end: set eos_token in its config")
    return found


# ----------------------------------------------------------------------------------------- problems


def load_problems(name: str, split: str) -> list[dict]:
    """[{"problem": text or chat messages, "answer": LaTeX, "row": from 0}], each problem once.

    Prints how many rows are left out, and why.

    Args:
        name: math, lab, arithmetic, an evaluation set's short name, a hub id (OWNER/NAME, or
            OWNER/NAME:SUBSET), a .parquet or .jsonl, or a folder of these.
        split: "train" or "test"; only lab, arithmetic, folders and other hub ids have both.
    """
    problems, columns, placeholders = {}, None, collections.Counter()
    unanswered = repeated = different = 0
    try:
        for number, row in enumerate(data.read_rows(name, split)):
            columns = list(row) if columns is None else columns
            try:
                problem, answer = data.read_row(row)
            except ValueError as error:
                fail(f"data set {name}, row {number}, {error}")
            if not problem or not answer or not answer.strip():
                unanswered += 1
            elif data.is_placeholder(answer):
                placeholders[answer.strip()] += 1
            else:
                new = {"problem": problem, "answer": answer, "row": number}
                first = problems.setdefault(str(problem), new)
                repeated += first is not new
                different += first["answer"].strip() != answer.strip()
    except Exception as error:
        fail(f"data set {name} cannot be loaded: {first_line(error)}")
    if columns is None:
        fail(f"data set {name} cannot be loaded: it has no rows")
    if unanswered:
        announce(f"data set {name}: {unanswered} rows without a problem or an answer are left out")
    if placeholders:
        words = ", ".join(f"{word!r} {count}" for word, count in placeholders.most_common(5))
        announce(
            f"data set {name}: {placeholders.total()} rows are left out, as their answer is only a "
            f"placeholder ({words})"
        )
    if repeated:
        other = f"; {different} of them have another answer" if different else ""
        announce(f"data set {name}: {repeated} rows repeat an earlier problem: left out{other}")
    if not problems:
        fail(
            f"data set {name}: no row has a problem (column problem, question or prompt) and an "
            "answer (column answer, solution or reward_model.ground_truth); the columns are "
            f"{', '.join(columns)}"
        )
    return list(problems.values())


MAX_PROMPT_LENGTH = 1024  # tokens (paper: 1024)


def encode_prompts(problems: list[dict], tokenizer, args) -> list[dict]:
    """Add "id", its number, and "prompt_ids" to each problem.

    --system-prompt replaces the data's own system prompt. Prompts longer than MAX_PROMPT_LENGTH
    are left out; a line says how many.
    """
    joined = merged = False
    day = datetime.date.fromisoformat(getattr(args, "date", str(datetime.date.today())))
    for i, problem in enumerate(problems):
        problem["id"] = i
        messages = chat_of(problem, args)
        if tokenizer.chat_template:
            if not merged and messages[0]["role"] == "system":
                merged = not keeps_system_prompt(messages, tokenizer)
            try:
                chat = join_system_prompt(messages) if merged else messages
                problem["prompt_ids"] = tokenizer.apply_chat_template(
                    chat,
                    add_generation_prompt=True,
                    enable_thinking=False,
                    return_dict=False,
                    strftime_now=day.strftime,
                )
            except Exception as error:
                fail(f"the chat template refuses problem {i}: {first_line(error)}")
        else:
            problem["prompt_ids"] = tokenizer.encode("\n\n".join(m["content"] for m in messages))
            joined |= len(messages) > 1
    if merged:
        announce("the chat template has no system prompt: it is put before the problem")
    if joined:
        announce("the tokenizer has no chat template: messages are joined by blank lines")
    kept = [p for p in problems if len(p["prompt_ids"]) <= MAX_PROMPT_LENGTH]
    longer = f"longer than {MAX_PROMPT_LENGTH} tokens (MAX_PROMPT_LENGTH in inputs.py)"
    if not kept:
        fail(f"all {len(problems)} prompts are {longer}")
    if len(kept) < len(problems):
        announce(f"{len(problems) - len(kept)} of {len(problems)} prompts are {longer}: left out")
    return kept


def fit_context(datasets: list[list[dict]], config, args) -> None:
    """Set args.context: tokens of the longest prompt plus --max-completion-length.

    Reduces --max-completion-length if the model's context is shorter than that.

    Args:
        datasets: results of encode_prompts(), all that the engine will get.
    """
    longest = max(len(p["prompt_ids"]) for problems in datasets for p in problems)
    context = config.max_position_embeddings
    if longest >= context:
        fail(
            f"the longest prompt has {longest} tokens, but the model's context is {context} tokens"
        )
    if longest + args.max_completion_length > context:
        args.max_completion_length = context - longest
        announce(
            f"the model's context is {context} tokens and the longest prompt {longest}: "
            f"--max-completion-length is reduced to {args.max_completion_length}"
        )
    args.context = longest + args.max_completion_length


def chat_of(problem: dict, args) -> list[dict]:
    """The messages of a prompt, where --system-prompt replaces the data's own system prompt."""
    messages = problem["problem"]
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    if args.system_prompt:
        messages = [m for m in messages if m["role"] != "system"]
        messages = [{"role": "system", "content": args.system_prompt}, *messages]
    return messages


# Where a prompt may ask for the answer, other than in a box: DAPO's, GSM8K's and R1-Zero's prompts.
OTHER_FORMS = {
    "after 'Answer:'": r"(?i)\b(?:form|format|after|with|by|as|write|line|print|output|say)\b"
    r"[ :\"'`“‘*]{1,5}(?:the )?(?:final )?answer(?: is)?[*\"'`]*:",
    "after '####'": r"####",
    "in <answer> tags": r"<answer>",
}


def warn_of_other_form(name: str, problems: list[dict], args) -> None:
    r"""Warn in one line if 10% of the prompts or more ask for an answer outside of \boxed{}."""
    counts, boxed = collections.Counter(), 0
    for problem in problems:
        text = "\n".join(message["content"] for message in chat_of(problem, args))
        asked = [form for form, pattern in OTHER_FORMS.items() if re.search(pattern, text)]
        counts.update(asked[:1])
        boxed += bool(asked) and re.search(r"\\f?box(ed)?\b|\bbox", text) is not None
    if counts.total() < max(1, len(problems) / 10):
        return
    if boxed == counts.total():
        also = "They ask for a box as well: a response without a box gets reward 0"
    else:
        also = "They ask for no box, so that all responses get reward 0"
    announce(
        f"WARNING: {counts.total()} of {len(problems)} prompts of {name} ask for the answer "
        f"{counts.most_common(1)[0][0]}, but only \\boxed{{}} is read. {also}. docs/forking.md "
        "shows how to read another form"
    )


def keeps_system_prompt(messages: list[dict], tokenizer) -> bool:
    """Does the chat template render the system prompt? Gemma's raises; others silently drop it."""
    try:
        return messages[0]["content"] in tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception:
        return False


def join_system_prompt(messages: list[dict]) -> list[dict]:
    """The messages with the system prompt joined to the user's first message.

    >>> join_system_prompt([dict(role="system", content="A"), dict(role="user", content="B")])
    [{'role': 'user', 'content': 'A\\n\\nB'}]
    """
    system, user, *rest = messages if messages[0]["role"] == "system" else [None, *messages]
    content = f"{system['content']}\n\n{user['content']}" if system else user["content"]
    return [{"role": user["role"], "content": content}, *rest]


# Largest fraction of unusable reference answers. Up to it they are left out. More are an error, as
# the column is probably not the answer. The authors' MATH file has 1.4%.
MAX_BAD_REFERENCES = 0.05


def check_references(
    name: str, problems: list[dict], verifier, args, at_least: int = 1
) -> list[dict]:
    """Leave out the problems whose reference answer the grader cannot use.

    Such an answer gives every response reward 0: grading.bad_references(). Every rank checks a
    part. Refuses a data set with a larger fraction of them than MAX_BAD_REFERENCES, or with fewer
    than `at_least` other problems. Warns of prompts that ask for another form of the answer.
    """
    warn_of_other_form(name, problems, args)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    references = [p["answer"] for p in problems]
    found = [None] * world_size
    dist.all_gather_object(
        found, grading.bad_references(verifier, references[rank::world_size], args)
    )
    bad = {rank + world_size * i for rank, part in enumerate(found) for i in part}
    kept = [p for i, p in enumerate(problems) if i not in bad]
    rows = {i: problems[i].get("row", problems[i]["id"]) for i in sorted(bad)[:5]}
    shown = "; ".join(f"row {row}: {references[i][:60]!r}" for i, row in rows.items())
    more = f"; and {len(bad) - 5} more" if len(bad) > 5 else ""
    message = (
        f"{name}: {len(bad)} of {len(problems)} reference answers cannot be read ({shown}{more})"
    )
    if len(bad) > MAX_BAD_REFERENCES * len(problems):
        fail(
            f"data set {message}: more than {MAX_BAD_REFERENCES:.0%}. Give final answers, "
            "not worked solutions, and remove what is broken"
        )
    if len(kept) < at_least:
        fail(f"--num-prompts {at_least}: {name} has only {len(kept)} usable problems")
    if bad:
        announce(f"{message}: left out")
    return kept


def pick_problems(problems: list, step: int, num_prompts: int, seed: int) -> list:
    """The problems of a step, from 1. Every epoch is a new permutation without its last part batch.

    They depend on (seed, step) only, so that resuming needs no data-loader state.

    >>> [pick_problems(["a", "b", "c"], step, 1, 0) for step in (1, 2, 3)]
    [['c'], ['b'], ['a']]
    """
    per_epoch = len(problems) // num_prompts
    epoch, batch = divmod(step - 1, per_epoch)
    order = random.Random(f"{seed} epoch {epoch}").sample(range(len(problems)), len(problems))
    return [problems[i] for i in order[batch * num_prompts : (batch + 1) * num_prompts]]

"""What a run reads: the model's files and BOS, problems and their prompts."""

import datetime
import json
import os
import random
from pathlib import Path

import torch.distributed as dist

import grading
import models
from harness import announce, fail, first_line, wait_for_all

# -------------------------------------------------------------------------------------------- model

HUB_OWNERS = {"Qwen": "Qwen", "Llama": "meta-llama", "SmolLM": "HuggingFaceTB"}


def resolve_model(name: str) -> str:
    """A folder, a hub id, "smollm2", or the bare name of a known family.

    >>> resolve_model("Qwen2.5-Math-7B")
    'Qwen/Qwen2.5-Math-7B'
    """
    if Path(name).is_dir():
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
    from transformers import AutoConfig

    fix_date(args)
    try:
        source = resolve_model(args.model)
        path = local_folder(source, ["*.json", "*.txt", "*.jinja", "*.model"])
        models.check_folder(args.model, path)
        config = AutoConfig.from_pretrained(path)
        lm = models.check_config(args.model, config)
        path = local_folder(source, ["model*.safetensors"])  # what takes long, once it will be used
        models.check_weights(args.model, path, lm)
        tokenizer = load_tokenizer(path)
    except Exception as error:
        fail(f"--model {args.model} cannot be loaded: {first_line(error)}")
    if off := models.dropouts(config):
        announce(f"dropout is off: {', '.join(f'{k} {v:g}' for k, v in off.items())} by config")
    if config.num_attention_heads % args.tensor_parallel_size:
        fail(
            f"--tensor-parallel-size {args.tensor_parallel_size} does not divide the model's "
            f"{config.num_attention_heads} attention heads"
        )
    return path, config, tokenizer


def local_folder(source: str, kinds: list[str]) -> str:
    """The folder itself, or that of a hub id's files of these kinds, fetched once on every node."""
    from huggingface_hub import snapshot_download

    if Path(source).is_dir():
        return source
    if os.environ.get("LOCAL_RANK", "0") == "0":
        snapshot_download(source, allow_patterns=kinds)
    wait_for_all()
    return snapshot_download(source, local_files_only=True)


def fix_date(args) -> None:
    """args.date, which chat templates print: the day when the run began, also after --resume."""
    file = Path(getattr(args, "output_dir", "") or ".") / "args.json"
    day = None
    if getattr(args, "resume", "") and file.is_file():
        day = json.loads(file.read_text()).get("date")
    shared = [day or datetime.date.today().isoformat()]
    dist.broadcast_object_list(shared)  # ranks may start on either side of midnight
    args.date = shared[0]


def load_tokenizer(path: str):
    """The tokenizer of a folder, as its tokenizer.json has it.

    Some folders name another class than the one that their tokenizer.json is of. transformers
    believes the name, and then e.g. deepseek-math-7b loses all spaces of a prompt.
    """
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    tokenizer, file = AutoTokenizer.from_pretrained(path), Path(path) / "tokenizer.json"
    if file.is_file():
        text = "Please reason step by step.\nIt is 1+1 = 2."
        wanted = Tokenizer.from_file(str(file)).encode(text, add_special_tokens=False).ids
        if tokenizer.encode(text, add_special_tokens=False) != wanted:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
            announce("the folder names another tokenizer than its tokenizer.json: the file is used")
    return tokenizer


def num_tokens(tokenizer, config) -> int:
    """Ids that can occur: those of the tokenizer that have an embedding.

    Qwen has more embeddings than tokens, and Gemma 3 and R1-Distill-Llama a token more than
    embeddings. Neither kind of id is ever sampled.
    """
    return min(len(tokenizer), config.vocab_size)


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


def find_stop_tokens(path: str, tokenizer, vocab_size: int) -> list[int]:
    """Ids that end a response: EOS, those of generation_config.json, and what ends a turn.

    A chat template may end a turn with a token that is none of the others: Qwen2.5-Math's ends it
    with <|im_end|>, while the base model's EOS is <|endoftext|>. It is found by rendering a turn.

    Args:
        vocab_size: ids from there on cannot occur: num_tokens().
    """
    found = {tokenizer.eos_token_id}
    file = Path(path) / "generation_config.json"
    if file.is_file():
        ids = json.loads(file.read_text()).get("eos_token_id")
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
        fail("the tokenizer has no EOS token, so no response could end: set its eos_token")
    return found


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


# ----------------------------------------------------------------------------------------- problems

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


def load_problems(name: str, split: str) -> list[dict]:
    """[{"problem": text or chat messages, "answer": LaTeX}], each problem once.

    Args:
        name: math, lab, arithmetic, an evaluation set's short name, a hub id (OWNER/NAME, or
            OWNER/NAME:SUBSET), or a .parquet/.jsonl.
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
                hub_id, _, subset = hub_id.partition(":")
                rows = datasets.load_dataset(hub_id, subset or None, split=split)
        except Exception as error:
            fail(f"data set {name} cannot be loaded: {first_line(error)}")
    problems, unanswered = {}, 0
    for row in rows:
        problem = next((row[k] for k in ("problem", "question", "prompt") if row.get(k)), None)
        graded = row.get("reward_model") or {}
        given = (row.get("final_answer"), row.get("answer"), graded.get("ground_truth"))
        answer = next((value for value in given if value not in (None, "", [])), None)
        alternatives = isinstance(answer, list) and answer is not row.get("final_answer")
        if answer is None and isinstance(row.get("solution"), str):
            answer = grading.last_boxed(row["solution"])
        if alternatives and len(answer) > 1:  # any of them will do: see answers.references
            answer = json.dumps([str(one) for one in answer])
        elif isinstance(answer, list):  # OlympiadBench's final_answer: all of them together
            answer = ", ".join(map(str, answer))
        answer = "" if answer is None else str(answer).rpartition("#### ")[2]  # GSM8K's mark
        if not problem or not answer:
            unanswered += 1
        else:
            problems.setdefault(str(problem), {"problem": problem, "answer": answer})
    if not problems:
        fail(
            f"data set {name}: no row has a problem (column problem, question or prompt) and an "
            "answer (column answer, solution or reward_model.ground_truth)"
        )
    if unanswered:
        announce(f"data set {name}: {unanswered} rows without problem or answer are left out")
    return list(problems.values())


def encode_prompts(problems: list[dict], tokenizer, args) -> list[dict]:
    """Add "id", its number, and "prompt_ids" to each problem.

    --system-prompt takes the place of the data's own. Leaves out prompts over --max-prompt-length,
    with a count.
    """
    joined = merged = False
    day = datetime.date.fromisoformat(getattr(args, "date", str(datetime.date.today())))
    for i, problem in enumerate(problems):
        problem["id"] = i
        messages = problem["problem"]
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        if args.system_prompt:
            messages = [m for m in messages if m["role"] != "system"]
            messages = [{"role": "system", "content": args.system_prompt}, *messages]
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
    kept = [p for p in problems if len(p["prompt_ids"]) <= args.max_prompt_length]
    if not kept:
        fail(f"all {len(problems)} prompts are longer than --max-prompt-length")
    if len(kept) < len(problems):
        announce(f"{len(problems) - len(kept)} of {len(problems)} prompts are too long: left out")
    return kept


def keeps_system_prompt(messages: list[dict], tokenizer) -> bool:
    """Does the chat template render the system prompt? Gemma's raises, others drop it silently."""
    try:
        return messages[0]["content"] in tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception:
        return False


def join_system_prompt(messages: list[dict]) -> list[dict]:
    """The system prompt put before the first message of the user.

    >>> join_system_prompt([dict(role="system", content="A"), dict(role="user", content="B")])
    [{'role': 'user', 'content': 'A\\n\\nB'}]
    """
    system, user, *rest = messages if messages[0]["role"] == "system" else [None, *messages]
    content = f"{system['content']}\n\n{user['content']}" if system else user["content"]
    return [{"role": user["role"], "content": content}, *rest]


def check_golds(name: str, problems: list[dict], pool, args, at_least: int = 1) -> list[dict]:
    """Leave out the problems whose gold answer no usual form of itself meets.

    Every rank checks its part. Refuses a data set with more of them than --max-bad-gold, as against
    such golds every answer, right or wrong, would score 0; and one in which fewer than `at_least`
    problems remain.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    golds = [p["answer"] for p in problems]
    found = [None] * world_size
    dist.all_gather_object(found, grading.bad_golds(pool, golds[rank::world_size], args))
    bad = {rank + world_size * i for rank, part in enumerate(found) for i in part}
    kept = [p for i, p in enumerate(problems) if i not in bad]
    shown = "; ".join(f"row {problems[i]['id']}: {golds[i][:60]!r}" for i in sorted(bad)[:5])
    more = f"; and {len(bad) - 5} more" if len(bad) > 5 else ""
    message = f"{name}: {len(bad)} of {len(problems)} gold answers cannot be read ({shown}{more})"
    if len(bad) > args.max_bad_gold * len(problems):
        fail(f"data set {message}: more than --max-bad-gold {args.max_bad_gold:g}")
    if len(kept) < at_least:
        fail(f"--num-prompts {at_least}: {name} has only {len(kept)} usable problems")
    if bad:
        announce(f"{message}: left out")
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

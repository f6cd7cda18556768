"""Mutants: faults put into the code one at a time, each of which a test must see.

    python tests/mutants.py                 all of them
    python tests/mutants.py --only NAME...  some; a name may be a part of one
    python tests/mutants.py --list

A mutant changes a copy of the tracked files, never the tree, and its tests run there. One line
each: killed by a test, SURVIVED, or BROKEN (its tests fail without it, or cannot start with
it). The exit code is 1 if one is not killed. Those whose tests take seconds come first.
"""

import argparse
import importlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import warm

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 600  # seconds that a mutant's tests may take; one that hangs for longer is killed by that
LIBRARIES = """torch torch.distributed.fsdp torch.distributed.checkpoint.state_dict numpy
torch.utils.tensorboard transformers.models.qwen2.modeling_qwen2 pyarrow.parquet huggingface_hub
transformers.models.qwen3.modeling_qwen3 transformers.models.auto.modeling_auto tyro pebble"""


class Mutant(NamedTuple):
    name: str
    tests: str  # pytest's arguments
    file: str
    old: str
    new: str
    count: int = 1  # how often the old text occurs; each is replaced


LOSSES = "tests/test_losses.py"
INPUTS = "tests/test_inputs.py"
PROMPTS = (
    "tests/test_reliability.py -k 'add_bos or own_system or what_ends or system_role or date_in'"
)
BOXES = "tests/test_grading.py -k 'boxed or right_and_wrong or conventions or bad_references'"
HANGS = "tests/test_grading.py -k never_end"
THOUGHTS = "tests/test_thoughts.py -k 'not linear'"
PLOT = "tests/test_plot.py -k 'bands or table or methods or unequal or at_a_step'"
FIGURES = "tests/test_evaluate.py -k 'summary or as_the_hub or in_any_order or two_sets'"
POLICY = (
    "tests/test_policy.py "
    "-k 'full_logits or prefix or plain_attention or own_problem or of_all_ranks'"
)
CANARY = "tests/test_policy.py -k canary"
STEP = "tests/test_policy.py -k 'optimizer or skipped'"
SAVED = "tests/test_policy.py -k 'checkpoint_and_export or flags_of_this_run'"
RANKS = "tests/test_policy.py -k unequal_work"
MODELS = (
    "tests/test_families.py -k 'refused or cannot_be or not_the_models or dropout or other_form'"
)
HEADS = "tests/test_families.py -k test_heads"
ENGINE = "tests/test_engine.py -k 1-1-2"
GRPO = "tests/test_scripts.py -k '(steps_are or outputs_are or rewards_are) and grpo'"
PRERL = "tests/test_scripts.py -k 'steps_are and [prerl]'"
NSR = "tests/test_scripts.py -k 'steps_are and [nsr_prerl]'"
DSRL = "tests/test_scripts.py -k '(steps_are or outputs_are) and [dsrl]'"
CLIP = "tests/test_scripts.py -k importance_weights"
SIGNS = "tests/test_scripts.py -k left_out"
RESUMED = "tests/test_scripts.py -k resume_in"
TWO_RANKS = "tests/test_scripts.py -k 'two_processes and nsr_prerl'"
EXPORT = "tests/test_scripts.py -k becomes_a_model"
PARTS = "tests/test_evaluate.py -k 'test_parts or content_of'"
FULL = "tests/test_reliability.py -k disk_full_while"
LOST = "tests/test_reliability.py -k lost_terminal"
WHICH = "tests/test_reliability.py -k which_checkpoint"
SAME_WEIGHTS = "tests/test_reliability.py -k train_on_nothing"

# fmt: off
MUTANTS = [
    # ------------------------------------------------------------------------ advantages and losses
    Mutant("advantage: sign", LOSSES, "common.py",
           "A = r - r.mean(1, keepdim=True)", "A = r.mean(1, keepdim=True) - r"),
    Mutant("advantage: mean of the batch", LOSSES, "common.py",
           "A = r - r.mean(1, keepdim=True)", "A = r - r.mean()"),
    Mutant("advantage: ddof 0", LOSSES, "common.py",
           "r.std(1, keepdim=True)", "r.std(1, keepdim=True, correction=0)"),
    Mutant("advantage: std without epsilon", LOSSES, "common.py",
           "(r.std(1, keepdim=True) + 1e-6)", "r.std(1, keepdim=True)"),
    Mutant("advantage: larger epsilon", LOSSES, "common.py",
           "(r.std(1, keepdim=True) + 1e-6)", "(r.std(1, keepdim=True) + 1e-4)"),
    Mutant("advantage: rloo's factor upside down", LOSSES, "common.py",
           "A * group_size / (group_size - 1)", "A * (group_size - 1) / group_size"),
    Mutant("advantage: sign is 0 or 1", LOSSES, "common.py", "return 2 * rewards - 1",
           "return rewards"),
    Mutant("advantage: reinforce++ without std", LOSSES, "common.py",
           " / (rewards.std() + 1e-6)", ""),
    Mutant("advantage: groups are interleaved", LOSSES, "common.py",
           "r = rewards.view(-1, group_size)", "r = rewards.view(group_size, -1).T"),
    Mutant("sign weights: swapped", LOSSES, "common.py",
           "torch.where(A > 0, positive, torch.where(A < 0, negative,",
           "torch.where(A < 0, positive, torch.where(A > 0, negative,"),
    Mutant("sign weights: A = 0 always counts", LOSSES, "common.py",
           "positive != 0 and negative != 0", "positive != 0 or negative != 0"),
    Mutant("normaliser: tokens of samples that are not in the loss", LOSSES, "common.py",
           "(lengths * in_loss).sum()", "lengths.sum()"),
    Mutant("normaliser: all samples", LOSSES, "common.py",
           "n = in_loss.sum().clamp(min=1)", "n = len(in_loss)"),
    Mutant("normaliser: longest response for each", LOSSES, "common.py",
           "(n * lengths.clamp(min=1))", "(n * lengths.max().clamp(min=1)) + 0 * lengths"),
    Mutant("normaliser: without the longest length", LOSSES, "common.py", "(n * max_length)", "n"),
    Mutant("mask of the loss not applied", LOSSES, "common.py",
           "return weight * in_loss", "return weight"),
    Mutant("ratio upside down", LOSSES, "common.py",
           "torch.exp(logp - old_logp)", "torch.exp(old_logp - logp)"),
    Mutant("clip: the larger objective", LOSSES, "common.py",
           "torch.minimum(ratio * A, clipped * A)", "torch.maximum(ratio * A, clipped * A)"),
    Mutant("clip: never", LOSSES, "common.py",
           "torch.minimum(ratio * A, clipped * A)", "ratio * A"),
    Mutant("clip: bounds swapped", LOSSES, "common.py",
           "ratio.clamp(1 - clip[0], 1 + clip[1])", "ratio.clamp(1 - clip[1], 1 + clip[0])"),
    Mutant("dual clip: off", LOSSES, "common.py",
           "torch.where(A < 0, torch.maximum(objective, DUAL_CLIP * A), objective)", "objective"),
    Mutant("dual clip: of both signs", LOSSES, "common.py",
           "torch.where(A < 0, torch.maximum(objective",
           "torch.where(A != 0, torch.maximum(objective"),
    Mutant("dual clip: 3", LOSSES, "common.py", "DUAL_CLIP = 10.0", "DUAL_CLIP = 3.0"),
    Mutant("EOS dropped from the loss", LOSSES, "common.py",
           "is_response[row, start:end] = True", "is_response[row, start : end - 1] = True"),
    Mutant("first token dropped from the loss", LOSSES, "common.py",
           "is_response[row, start:end] = True", "is_response[row, start + 1 : end] = True"),
    Mutant("prompt in the loss", LOSSES, "common.py",
           "is_response[row, start:end] = True", "is_response[row, :end] = True"),
    Mutant("filler counts in the loss", LOSSES, "common.py",
           "torch.zeros_like(values) if self.is_filler else values", "values"),
    Mutant("mini-batches: samples that are not in the loss", LOSSES, "common.py",
           "chosen[part] = in_loss[part]", "chosen[part] = True"),
    Mutant("mini-batches: each has all samples", LOSSES, "common.py",
           "chosen[part] = in_loss[part]", "chosen[:] = in_loss"),
    Mutant("mini-batches: the same split at every step", LOSSES, "common.py",
           "manual_seed(step)", "manual_seed(0)"),
    Mutant("micro-batches: over the budget", LOSSES, "common.py",
           "(len(batches[-1]) + 1) <= max_tokens", "len(batches[-1]) <= max_tokens"),
    Mutant("micro-batches: unequal numbers", LOSSES, "common.py",
           "while len(batches) % world_size:", "while False:"),
    Mutant("micro-batches: every rank the first one's", LOSSES, "common.py",
           "batches[rank::world_size] for", "batches[::world_size] for"),
    Mutant("pass@k: biased", LOSSES, "common.py",
           "1.0 - math.comb(n - c, k) / math.comb(n, k)", "1.0 - (1 - c / n) ** k"),
    Mutant("pass@k: of the wrong ones", LOSSES, "common.py",
           "math.comb(n - c, k)", "math.comb(c, k)"),
    # ------------------------------------------------------------------------------- data and model
    Mutant("data order: step from 0", LOSSES, "inputs.py",
           "divmod(step - 1, per_epoch)", "divmod(step, per_epoch)"),
    Mutant("data order: without the seed", LOSSES, "inputs.py",
           'f"{seed} epoch {epoch}"', 'f"epoch {epoch}"'),
    Mutant("data order: the same every epoch", LOSSES, "inputs.py",
           'f"{seed} epoch {epoch}"', 'f"{seed}"'),
    Mutant("data order: a part batch at the end", LOSSES, "inputs.py",
           "len(problems) // num_prompts", "-(-len(problems) // num_prompts)"),
    Mutant("BOS: <|im_start|> before the tokenizer's", LOSSES, "inputs.py",
           "if tokenizer.bos_token_id is not None:", "if tokenizer.bos_token_id is None:"),
    Mutant("vocabulary: all rows of the embeddings", LOSSES, "inputs.py",
           "return min(len(tokenizer), config.vocab_size)", "return config.vocab_size"),
    Mutant("vocabulary: tokens without an embedding", LOSSES, "inputs.py",
           "return min(len(tokenizer), config.vocab_size)", "return len(tokenizer)"),
    Mutant("data: numbers as floats", INPUTS, "data.py",
           "parse_float=str, parse_constant", "parse_constant"),
    Mutant("data: placeholders are answers", INPUTS, "inputs.py",
           "elif data.is_placeholder(answer):", "elif False:"),
    Mutant("data: repeats stay", INPUTS, "inputs.py",
           "problems.setdefault(str(problem), new)", "problems.setdefault(number, new)"),
    Mutant("data: the solution is in the prompt", INPUTS, "data.py",
           'final = messages.pop()["content"]', 'final = messages[-1]["content"]; break'),
    Mutant("data: alternatives are one answer", INPUTS, "data.py",
           "return json.dumps(members)", 'return ", ".join(members)'),
    Mutant("data: GSM8K's text before the mark", FIGURES, "data.py",
           'read_answer(value, column).rpartition("#### ")[2]',
           'read_answer(value, column).rpartition("#### ")[0]'),
    Mutant("references: the bad ones are kept", INPUTS, "inputs.py",
           "if i not in bad]", "if i in bad]"),
    Mutant("prompt: without the assistant's turn", PROMPTS, "inputs.py",
           "add_generation_prompt=True", "add_generation_prompt=False"),
    Mutant("prompt: cut", PROMPTS, "inputs.py",
           '"\\n\\n".join(m["content"] for m in messages))', 'messages[-1]["content"])[:3]'),
    Mutant("prompt: without the system prompt", PROMPTS, "inputs.py",
           "if args.system_prompt:", "if False:"),
    Mutant("prompt: both system prompts", PROMPTS, "inputs.py",
           '[m for m in messages if m["role"] != "system"]', "messages"),
    Mutant("prompt: today's date", PROMPTS, "inputs.py",
           "day or datetime.date.today()", "None or datetime.date.today()"),
    Mutant("stop tokens: without EOS", PROMPTS, "inputs.py",
           "found = {tokenizer.eos_token_id}", "found = set()"),
    Mutant("stop tokens: without the turn's end", PROMPTS, "inputs.py",
           "special[i].content.strip()][:1])", "special[i].content.strip()][:0])"),
    Mutant("stop tokens: without the generation config's", PROMPTS, "inputs.py",
           "found |= set(ids) if isinstance(ids, list) else {ids}", "pass"),
    Mutant("stop tokens: ids that cannot occur", PROMPTS, "inputs.py",
           "if i is not None and i < vocab_size", "if i is not None"),
    # --------------------------------------------------------------------- grading, thoughts, plots
    Mutant("box: the first one", BOXES, "grading.py",
           "found = max(found or (0, 0), (start, match.start()))",
           "found = found or (start, match.start())"),
    Mutant("box: an empty one counts", BOXES, "grading.py",
           "if start is not None and text[start : match.start()].strip():",
           "if start is not None:"),
    Mutant("grading: integers are all equal", BOXES, "grading.py",
           "int(answer) == int(reference)", "True"),
    Mutant("grading: verdicts in another order", BOXES, "grading.py",
           "for pair in pairs], timeouts", "for pair in reversed(pairs)], timeouts"),
    Mutant("grading: strings as they are", BOXES, "grading.py",
           "answers.bare_string(answer) in wanted", "answer in wanted"),
    Mutant("grading: without algebra", BOXES, "algebra.py",
           "answers.squeeze(gold) or same_value(answer, gold)", "answers.squeeze(gold)"),
    Mutant("grading: a tiny difference is none", BOXES, "algebra.py",
           "or differ(first, second)", ""),
    Mutant("grading: references are never bad", BOXES, "grading.py",
           "        if not met:\n", "        if False:\n"),
    Mutant("thoughts: no transitions", THOUGHTS, "thoughts.py",
           "if TRANSITION.search(block):", "if False:"),
    Mutant("thoughts: per token", THOUGHTS, "thoughts.py",
           "1000 * n / tokens", "n / tokens"),
    Mutant("plot: standard deviation for the mean's", PLOT, "plot.py",
           "t * stdev(values) / n**0.5", "t * stdev(values)"),
    Mutant("plot: seconds of one step less", PLOT, "plot.py", "step - (s - 1)", "step - s"),
    Mutant("plot: seconds of runs that end before", PLOT, "plot.py",
           "if last_step(rows) < step:", "if False:"),
    Mutant("plot: means over fewer seeds", PLOT, "plot.py",
           "values = [run[step] for run in runs]", "values = [run[step] for run in runs][:2]"),
    Mutant("plot: thoughts of the evaluation before", PLOT, "plot.py",
           "(at_step - step0) / (step1 - step0) if step1 > step0 else 0.0", "0.0"),
    Mutant("evaluation: samples of other problems", FIGURES, "common.py",
           ".reshape(-1, k)  # [problems, k]", ".reshape(k, -1).T"),
    Mutant("evaluation: error with ddof 0", FIGURES, "common.py", ".std(ddof=1)", ".std()"),
    Mutant("evaluation: parts in any order", FIGURES, "evaluate.py",
           '    rows.sort(key=lambda row: (row["problem"], row["sample"]))\n', ""),
    # ----------------------------------------------------------------------------------- the policy
    Mutant("log-probs: temperature missing", POLICY, "common.py",
           "z.mul_(slope / temperature)", "z.mul_(slope)"),
    Mutant("log-probs: temperature missing in the gradient", POLICY, "common.py",
           "g = grad[c, None] * (slope / temperature)", "g = grad[c, None] * slope"),
    Mutant("log-probs: at temperature 1", POLICY, "common.py",
           "vocab_size, args.temperature)", "vocab_size, 1.0)"),
    Mutant("log-probs: normaliser without its largest term", POLICY, "common.py",
           "norm[c] = top + z.sub_(top)", "norm[c] = z.sub_(top)"),
    Mutant("log-probs: sign of the softmax's gradient", POLICY, "common.py",
           ".exp_().mul_(-g)", ".exp_().mul_(g)"),
    Mutant("log-probs: the head's gradient of the last chunk", POLICY, "common.py",
           "grad_W += torch.mm", "grad_W = torch.mm"),
    Mutant("log-probs: padded vocabulary", POLICY, "common.py",
           "self.lm.lm_head.weight[: self.vocab_size]", "self.lm.lm_head.weight"),
    Mutant("log-probs: the token itself predicts it", POLICY, "common.py",
           "out.last_hidden_state], 1)[:, :-1]", "out.last_hidden_state], 1)[:, 1:]"),
    Mutant("log-probs: of the token before", POLICY, "common.py",
           "tokens[:, first:][marked]", "tokens.roll(1, 1)[:, first:][marked]"),
    Mutant("log-probs: positions shifted", POLICY, "common.py",
           "marked = is_response[:, first:]", "marked = is_response.roll(-1, 1)[:, first:]"),
    Mutant("prefix: positions from 0 behind it", POLICY, "common.py",
           "self.lm.model(input_ids=tokens, past_key_values=cache,",
           "self.lm.model(input_ids=tokens, past_key_values=cache, "
           "position_ids=torch.arange(tokens.shape[1])[None],"),
    Mutant("prefix: its first token predicts", POLICY, "common.py",
           "out.last_hidden_state[:, -1:].expand", "out.last_hidden_state[:, :1].expand"),
    Mutant("prefix: one token more is cut", POLICY, "common.py",
           "x[len(prefix) :] for x in contexts", "x[len(prefix) + 1 :] for x in contexts"),
    Mutant("attention: scale missing", POLICY, "workarounds.py",
           "(q * scaling).reshape", "q.reshape"),
    Mutant("attention: mask missing", POLICY, "workarounds.py", ".add_(mask).softmax", ".softmax"),
    Mutant("reward: a truncated response keeps it", POLICY, "common.py",
           '0.0 if sample["truncated"] else reward', "reward"),
    Mutant("reward: of the next sample's reference", POLICY, "common.py",
           'references[s["index"]] for', 'references[s["index"] - 1] for'),
    Mutant("verify: time-outs of one rank", POLICY, "common.py",
           "    dist.all_reduce(counts)\n", ""),
    Mutant("canary: signed differences", CANARY, "common.py",
           ".abs().cpu()\n    total", ".cpu()\n    total"),
    Mutant("canary: never stops", CANARY, "common.py",
           "if not gap <= limit:", "if False:"),
    Mutant("AdamW: beta2", STEP, "common.py", "betas=(0.9, 0.999)", "betas=(0.9, 0.95)"),
    Mutant("AdamW: beta1", STEP, "common.py", "betas=(0.9, 0.999)", "betas=(0.95, 0.999)"),
    Mutant("AdamW: weight decay", STEP, "common.py",
           "weight_decay=args.weight_decay", "weight_decay=0.0"),
    Mutant("AdamW: epsilon", STEP, "common.py",
           "lr=args.learning_rate,", "lr=args.learning_rate, eps=1e-3,"),
    Mutant("gradients: not clipped", STEP, "common.py",
           "clip_gradients(policy, MAX_GRAD_NORM)", "clip_gradients(policy, math.inf)"),
    Mutant("gradients: clipped to 10", STEP, "common.py",
           "MAX_GRAD_NORM = 1.0", "MAX_GRAD_NORM = 10.0"),
    Mutant("gradients: not set to 0", STEP, "common.py", "    optimizer.zero_grad()\n", ""),
    Mutant("gradients: a step with NaN", STEP, "common.py",
           "    if math.isfinite(norm):\n", "    if True:\n"),
    Mutant("skipped updates: never stops", STEP, "common.py", "if skipped == 2:", "if False:"),
    Mutant("skipped updates: not in a row", STEP, "common.py",
           "    if math.isfinite(grad_norm):\n        return 0", 
           "    if math.isfinite(grad_norm):\n        return skipped"),
    Mutant("checkpoint: optimiser not saved", SAVED, "harness.py",
           'dcp.save({"model": model, "optimizer": optim}', 'dcp.save({"model": model}'),
    Mutant("checkpoint: optimiser not restored", SAVED, "harness.py",
           "optim_state_dict=optim)", "optim_state_dict={})"),
    Mutant("checkpoint: weights not restored", SAVED, "harness.py",
           'dcp.load({"model": model, "optimizer": optim}', 'dcp.load({"optimizer": optim}'),
    Mutant("checkpoint: of the step after", SAVED, "harness.py",
           'int(path.name.removeprefix("step_"))', 'int(path.name.removeprefix("step_")) + 1'),
    Mutant("checkpoint: the learning rate that was saved", SAVED, "harness.py",
           "        optimizer.param_groups[0].update(flags)", "        pass"),
    Mutant("model: saved in half precision", SAVED, "harness.py",
           "parameter.detach().to(device).to(dtype).full_tensor()",
           "parameter.detach().to(device).half().to(dtype).full_tensor()"),
    Mutant("canary: of one rank", RANKS, "common.py",
           "    dist.all_reduce(total)\n    return {", "    return {"),
    Mutant("alignment: dot of one rank's shards", RANKS, "grad_alignment.py",
           "    dist.all_reduce(total)\n    return total", "    return total"),
    # ----------------------------------------------------------------------- models and their heads
    Mutant("models: mixtures of experts", MODELS, "models.py", 'if "expert" in name', "if False"),
    Mutant("models: a weight is missing", MODELS, "models.py",
           "    if missing:\n", "    if False:\n"),
    Mutant("models: another shape", MODELS, "models.py", "if found != shape:", "if False:"),
    Mutant("models: eight bits", MODELS, "models.py",
           '"F16", "BF16")', '"F16", "BF16", "F8_E4M3")'),
    Mutant("models: dropout stays", MODELS, "models.py",
           "setattr(config, key, 0.0)", "pass"),
    Mutant("models: any head", MODELS, "models.py", "if head_form(lm) is None:", "if False:"),
    Mutant("head: bias missing", HEADS, "common.py", "z.add_(b)", "pass"),
    Mutant("head: bias's gradient of the last chunk", HEADS, "common.py",
           "grad_b += z.sum(0)", "grad_b = z.sum(0)"),
    Mutant("head: softcap without its factor", HEADS, "common.py",
           "tanh_().mul_(cap / temperature)", "tanh_().mul_(1 / temperature)"),
    Mutant("head: softcap's gradient without temperature", HEADS, "common.py",
           "(z * (temperature / cap)).square()", "(z / cap).square()"),
    Mutant("head: softcap's gradient", HEADS, "common.py",
           "d.copy_(z if bend is None else z.mul_(bend))", "d.copy_(z)"),
    # ----------------------------------------------------------------------------- rollout and sync
    Mutant("sampling: top_p ignored", ENGINE, "common.py",
           'top_p=getattr(args, "top_p", 1.0)', "top_p=1.0"),
    Mutant("sampling: temperature missing", ENGINE, "common.py",
           "temperature=args.temperature,", "temperature=1.0,"),
    Mutant("sampling: one seed for all problems", ENGINE, "common.py",
           "f\"{seed} {problems[i]['id']}\"", 'f"{seed}"'),
    Mutant("sampling: seed by the place in the batch", ENGINE, "common.py",
           "f\"{seed} {problems[i]['id']}\"", 'f"{seed} {i}"'),
    Mutant("sampling: seed without the step", ENGINE, "common.py",
           "f\"{seed} {problems[i]['id']}\"", "f\"{problems[i]['id']}\""),
    Mutant("sampling: no stop tokens", ENGINE, "common.py",
           "stop_token_ids=stop,", "stop_token_ids=[],"),
    Mutant("sampling: truncated from the wrong finish reason", ENGINE, "common.py",
           'y.finish_reason == "length"', 'y.finish_reason == "stop"'),
    Mutant("sampling: EOS dropped", ENGINE, "common.py",
           "np.array(y.token_ids, dtype", "np.array(y.token_ids[:-1], dtype"),
    Mutant("sampling: index by number, then problem", ENGINE, "common.py",
           "index=i * num_samples + g,", "index=i + g * len(problems),"),
    Mutant("evaluation: a seed of its own", FIGURES, "common.py",
           'f"{args.seed} eval"', '"eval"'),
    Mutant("evaluation: sets overlap", FIGURES, "common.py",
           "start += len(each) * k", "start += len(each)"),
    Mutant("evaluation: references by number", FIGURES, "common.py",
           '[p["answer"] for p in problems for _ in range(k)]',
           '[p["answer"] for _ in range(k) for p in problems]'),
    Mutant("sync: prefix cache stays", ENGINE, "common.py",
           "    engine.reset_prefix_cache()\n", ""),
    Mutant("sync: a tied head is not sent", ENGINE, "common.py",
           'names.append("lm_head.weight")', "pass"),
    Mutant("sync: padded vocabulary", ENGINE, "common.py",
           "weight = weight[:vocab_size]", "pass"),
    Mutant("sync: check sees nothing", ENGINE, "common.py",
           "if held != expected.get(group):", "if False:"),
    Mutant("sync: check of norms only", ENGINE, "common.py",
           "for group in {*expected, *parts[first]}:", "for group in ('norm',):"),
    # ----------------------------------------------------------------------------- the four scripts
    Mutant("GRPO: x dropped", GRPO, "grpo_baseline.py",
           "contexts = prompts  #", "contexts = [[bos]] * len(prompts)  #"),
    Mutant("GRPO: advantage without std", GRPO, "grpo_baseline.py",
           "args.num_generations, args.advantage)", 'args.num_generations, "mean")'),
    Mutant("GRPO: loss's sign", GRPO, "grpo_baseline.py", "loss = -(", "loss = ("),
    Mutant("GRPO: normaliser of samples with an advantage", GRPO, "grpo_baseline.py",
           "chosen, lengths, args.loss_aggregation",
           "chosen & computed, lengths, args.loss_aggregation"),
    Mutant("GRPO: references shifted by a sample", GRPO, "grpo_baseline.py",
           "counts = common.verify(samples, references,",
           "counts = common.verify(samples, references[1:] + references[:1],"),
    Mutant("GRPO: references by number", GRPO, "grpo_baseline.py",
           'p["answer"] for p in problems for _ in range(args.num_generations)',
           'p["answer"] for _ in range(args.num_generations) for p in problems'),
    Mutant("GRPO: prompts by number", GRPO, "grpo_baseline.py",
           'p["prompt_ids"] for p in problems for _ in range(args.num_generations)',
           'p["prompt_ids"] for _ in range(args.num_generations) for p in problems'),
    Mutant("GRPO: sampling seed without the step", SAME_WEIGHTS, "grpo_baseline.py",
           'f"{args.seed} {step}"', 'f"{args.seed}"'),
    Mutant("GRPO: data order without the seed", GRPO, "grpo_baseline.py",
           "args.num_prompts, args.seed)", "args.num_prompts, 1)"),
    Mutant("GRPO: the step's problems are the next one's", GRPO, "grpo_baseline.py",
           "pick_problems(train, step,", "pick_problems(train, step + 1,"),
    Mutant("GRPO: a step less", GRPO, "grpo_baseline.py",
           "range(done + 1, args.num_steps + 1)", "range(done + 1, args.num_steps)"),
    Mutant("GRPO: stale weights", GRPO, "grpo_baseline.py", "if updates:", "if False:"),
    Mutant("GRPO: stale weights, unchecked", GRPO, "grpo_baseline.py",
           "            common.sync_weights(engine, policy)\n"
           "        common.check_sync(engine, policy)\n",
           "            pass\n"),
    Mutant("GRPO: no evaluation at the end", GRPO, "grpo_baseline.py",
           " or step == args.num_steps)", ")"),
    Mutant("GRPO: saved a step late", GRPO, "grpo_baseline.py",
           "step % args.save_every == 0", "step % args.save_every == 1"),
    Mutant("clip fraction: ratio off", GRPO, "common.py",
           "(logp - old_logp).exp()", "(logp - old_logp + 1).exp()"),
    Mutant("completions: finish reasons swapped", GRPO, "harness.py",
           '"length" if s["truncated"] else "stop"', '"stop" if s["truncated"] else "length"'),
    Mutant("alignment: sign", PRERL, "grad_alignment.py",
           '"alignment/cosine_to_grpo": cosine', '"alignment/cosine_to_grpo": -cosine'),
    Mutant("alignment: of this update's own space", PRERL, "grad_alignment.py",
           "(prompts, grpo))", "(contexts, grpo))"),
    Mutant("alignment: gradients stay", PRERL, "grad_alignment.py",
           "        parameter.grad = None\n", ""),
    Mutant("PreRL: x kept", PRERL, "prerl.py",
           "contexts = [[bos]] * len(prompts)", "contexts = prompts"),
    Mutant("PreRL: another BOS", PRERL, "prerl.py",
           "[[bos]] * len(prompts)", "[[stop[0]]] * len(prompts)"),
    Mutant("PreRL: negatives only", PRERL, "prerl.py",
           "in_loss = torch.ones_like(A, dtype=torch.bool)", "in_loss = A < 0"),
    Mutant("PreRL: advantage over std", PRERL, "prerl.py",
           "args.num_generations, args.advantage)", 'args.num_generations, "grpo")'),
    Mutant("GRPO: sign weight not applied", CLIP, "grpo_baseline.py", "A = weight * A", "pass"),
    Mutant("PreRL: a weight of 0 stays in the mean", SIGNS, "prerl.py",
           "in_loss &= weight != 0", "pass"),
    Mutant("NSR-PreRL: positives only", NSR, "nsr_prerl.py", "in_loss = A < 0", "in_loss = A > 0"),
    Mutant("NSR-PreRL: A = 0 counts", NSR, "nsr_prerl.py", "in_loss = A < 0", "in_loss = A <= 0"),
    Mutant("NSR-PreRL: x kept", NSR, "nsr_prerl.py",
           "contexts = [[bos]] * len(prompts)", "contexts = prompts"),
    Mutant("NSR-PreRL: loss's sign", NSR, "nsr_prerl.py", "loss = -(", "loss = ("),
    Mutant("DSRL: switches a step early", DSRL, "dsrl.py",
           "warmup = step <= args.warmup_steps", "warmup = step < args.warmup_steps"),
    Mutant("DSRL: switches a step late", DSRL, "dsrl.py",
           "warmup = step <= args.warmup_steps", "warmup = step <= args.warmup_steps + 1"),
    Mutant("DSRL: negatives only after the switch", DSRL, "dsrl.py",
           "(A < 0) | (not warmup)", "(A < 0)"),
    Mutant("DSRL: all samples in the warm-up", DSRL, "dsrl.py",
           "(A < 0) | (not warmup)", "(A < 0) | True"),
    Mutant("DSRL: GRPO's advantage in the warm-up", DSRL, "dsrl.py",
           '"mean" if warmup and', '"grpo" if warmup and'),
    Mutant("DSRL: x dropped after the switch", DSRL, "dsrl.py",
           "[[bos]] * len(prompts) if ", "[[bos]] * len(prompts) if True or "),
    Mutant("DSRL: x kept in the warm-up", DSRL, "dsrl.py",
           "[[bos]] * len(prompts) if ", "[[bos]] * len(prompts) if False and "),
    Mutant("DSRL: phase", DSRL, "dsrl.py",
           '"pretrain" if warmup else "rl"', '"rl" if warmup else "pretrain"'),
    Mutant("old log-probs: those of now", CLIP, "grpo_baseline.py",
           "batch.take(old_logps) if old_logps else logp.detach()", "logp.detach()"),
    Mutant("old log-probs: not with two mini-batches", CLIP, "common.py",
           "if len(minibatches) > 1", "if len(minibatches) > 2"),
    Mutant("importance weight: upside down", CLIP, "grpo_baseline.py",
           "(old_logp - sampler).exp()", "(sampler - old_logp).exp()"),
    Mutant("importance weight: without its cap", CLIP, "grpo_baseline.py",
           ".exp().clamp(max=args.tis_cap)", ".exp()"),
    Mutant("importance weight: never", CLIP, "grpo_baseline.py",
           'if args.tis_cap and phase == "rl":', "if False:"),
    Mutant("clip fraction: what is inside", CLIP, "common.py", "outside.sum()", "(~outside).sum()"),
    Mutant("mini-batches: one", CLIP, "grpo_baseline.py",
           "common.split(in_loss, args.num_minibatches, step)", "common.split(in_loss, 1, step)"),
    Mutant("resume: a step again", RESUMED, "grpo_baseline.py",
           "range(done + 1,", "range(max(1, done),"),
    Mutant("resume: a step left out", RESUMED, "grpo_baseline.py",
           "range(done + 1,", "range(done + 1 + (done > 0),"),
    Mutant("export: not in the run's dtype", EXPORT, "export.py", "w.to(dtype)", "w"),
    Mutant("export: not --model's", EXPORT, "export.py",
           'args.model or run["model"]', 'run["model"]'),
    Mutant("evaluation's resume: a set's problems for another's", PARTS, "evaluate.py",
           ' if row["dataset"] == dataset}', "}"),
    Mutant("evaluation's resume: all once more", PARTS, "evaluate.py",
           'problem["id"] not in done[0]', 'problem["id"] not in set()'),
    Mutant("evaluation's resume: a part that was cut in writing", PARTS, "evaluate.py",
           'temporary = part.with_suffix(".tmp")', "temporary = part"),
    Mutant("resume: other answers", PARTS, "inputs.py",
           'row["prompt_ids"], row["answer"]]', 'row["prompt_ids"]]'),
    Mutant("resume: other content", PARTS, "harness.py",
           "if content.get(name, value) != value", "if False"),
    Mutant("evaluation: problem and sample swapped", PARTS, "evaluate.py",
           'sample=s["index"] % k', 'sample=s["index"] // k'),
    Mutant("evaluation: samples of the next problem", PARTS, "evaluate.py",
           'problems[s["index"] // k]', 'problems[s["index"] % k]'),
    Mutant("full disk: nothing is said", FULL, "harness.py",
           """        say(f"rank {rank} failed: {why} (details in {log.name})")
        traceback.print_exception(kind, error, trace)  # fails on a full disk
""",
           """        traceback.print_exception(kind, error, trace)
        say(f"rank {rank} failed: {why} (details in {log.name})")
"""),
    Mutant("console: the run ends with its reader", LOST, "harness.py",
           "        with contextlib.suppress(OSError):\n            print(*words",
           "        if True:\n            print(*words"),
    Mutant("resume: a cut checkpoint", WHICH, "harness.py",
           "return all(part.offset + part.length <=", "return all(0 * part.length <="),
    Mutant("resume: later checkpoints stay", WHICH, "harness.py",
           'if int(later.name.removeprefix("step_")) > step', "if False"),
    Mutant("full disk: the library's words", FULL, "harness.py",
           "if full(folder) else error", "if False else error"),
    Mutant("resume: the oldest checkpoint", RESUMED, "harness.py",
           'glob("step_??????"), reverse=True)', 'glob("step_??????"))'),
    Mutant("resume: last line lost", RESUMED, "harness.py",
           'json.loads(x)["step"] <= step', 'json.loads(x)["step"] < step'),
    Mutant("resume: later lines stay", RESUMED, "harness.py",
           'if step and json.loads(x)["step"] <= step', "if step"),
    Mutant("checkpoints: the newest goes", RESUMED, "harness.py",
           "[:-KEPT_CHECKPOINTS]", "[KEPT_CHECKPOINTS:]"),
    Mutant("two ranks: loss not times their number", TWO_RANKS, "nsr_prerl.py",
           "(loss * world_size).backward()", "loss.backward()"),
    Mutant("two ranks: loss of one", TWO_RANKS, "nsr_prerl.py",
           "        dist.all_reduce(stats)\n", ""),
    Mutant("two ranks: filler counts in the figures", TWO_RANKS, "common.py",
           "torch.zeros_like(stats) if batch.is_filler else stats", "stats"),
    Mutant("two ranks: samples in the order of ranks", TWO_RANKS, "common.py",
           'return sorted((s for part in parts for s in part), key=lambda s: s["index"])',
           "return [s for part in parts for s in part]"),
    Mutant("two ranks: both sample the first one's", TWO_RANKS, "common.py",
           "mine = range(rank // tp,", "mine = range(0,"),
    Mutant("grading: no limit of time", HANGS, "grading.py",
           "signal.setitimer(signal.ITIMER_PROF, seconds)", "pass", 2),
]
# fmt: on


def copy_tree(place: Path) -> Path:
    """The tracked files, as they are in the working tree."""
    names = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, text=True, capture_output=True, check=True
    ).stdout.splitlines()
    for name in names:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, place / name)
    return place


def warm_up() -> None:
    """Import what nearly all tests need, none of it ours: that takes longer than most tests."""
    for name in LIBRARIES.split():
        importlib.import_module(name)


def start_tests(tests: str, mutant: Mutant | None, base: Path, place: Path) -> int:
    """pytest in a copy with the mutant, by a fork of this process. Returns its process id."""
    shutil.copytree(base, place)
    if mutant:
        file = place / mutant.file
        file.write_text(file.read_text().replace(mutant.old, mutant.new))
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    output = os.open(place / "output", os.O_CREAT | os.O_WRONLY)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(place)
    sys.path[0] = str(place)  # in the place of this file's folder
    words = ["-x", "-q", "-rfE", "--tb=line", "-p", "no:cacheprovider"]
    words += [f"--basetemp={place / 'temporary'}", *shlex.split(tests)]
    code = 3
    try:
        code = int(pytest.main(words))
    finally:
        sys.stdout.flush()
        os._exit(code)


def run_all(work: list[tuple[str, Mutant | None]], base: Path, jobs: int):
    """Exit code of pytest (-9: out of time) and what it printed, of each piece of work in turn."""
    running, done, given = {}, {}, 0  # running: pid -> number, folder, start
    for number in range(len(work)):
        while number not in done:
            while len(running) < jobs and given < len(work):
                place = base.with_name(f"{given}")
                running[start_tests(*work[given], base, place)] = given, place, time.monotonic()
                given += 1
            for pid, (_, _, begun) in running.items():
                if time.monotonic() - begun > LIMIT:
                    os.killpg(pid, signal.SIGKILL)
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid:
                finished, place, _ = running.pop(pid)
                output = (place / "output").read_text(errors="replace")
                done[finished] = os.waitstatus_to_exitcode(status), output
                shutil.rmtree(place)
            time.sleep(0.05)
        yield done.pop(number)


def verdict(code: int, output: str) -> str:
    if code == -signal.SIGKILL:
        return "killed by the time limit"
    if code == 0:
        return "SURVIVED"
    failed = re.search(r"^(?:FAILED|ERROR) \S*?([\w.]+::\S+)", output, re.MULTILINE)
    if code == 1 and failed:
        return f"killed by {failed[1]}"
    return f"BROKEN: {output.strip().splitlines()[-1] if output.strip() else code}"


def run_mutants(mutants: list[Mutant], base: Path, jobs: int) -> list[str]:
    """Print a line for each. Returns the names of those that are not killed."""
    sets, fine, bad = list(dict.fromkeys(m.tests for m in mutants)), {}, []
    for tests, (code, output) in zip(sets, run_all([(s, None) for s in sets], base, jobs)):
        fine[tests] = code == 0
        print(f"{'pass' if code == 0 else 'FAIL'} without a mutant: {tests}", flush=True)
        if code:
            print(output[-1500:], flush=True)
    work = [(m.tests, m) for m in mutants if fine[m.tests]]
    results = run_all(work, base, jobs)
    for mutant in mutants:
        said = verdict(*next(results)) if fine[mutant.tests] else "BROKEN: see above"
        bad += [] if said.startswith("killed") else [mutant.name]
        print(f"{mutant.name:50} {said}", flush=True)
    return bad


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the mutants: docs/testing.md.")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="names, or parts of them")
    parser.add_argument("--list", action="store_true", help="print the names")
    parser.add_argument("--jobs", type=int, default=1, help="how many at a time (default 1)")
    flags = parser.parse_args()
    chosen = [m for m in MUTANTS if not flags.only or any(part in m.name for part in flags.only)]
    if flags.list:
        print(*(f"{m.name:50} {m.file:18} {m.tests}" for m in chosen), sep="\n")
        return 0
    start = time.monotonic()
    warm.python()  # one server for the tests' commands
    warm_up()
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        bad = run_mutants(chosen, copy_tree(Path(folder) / "base"), flags.jobs)
    minutes = (time.monotonic() - start) / 60
    print(f"{len(chosen) - len(bad)} of {len(chosen)} killed in {minutes:.0f} minutes")
    print(*(f"not killed: {name}" for name in bad), sep="\n")
    return 1 if bad else 0


if __name__ == "__main__":
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    sys.dont_write_bytecode = True
    sys.exit(main())

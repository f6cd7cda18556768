"""The page of one_step.py: every value of one step, as one HTML file without outside resources.

The file also has the values as JSON, which read_values() reads.
"""

import html
import json
import re
from pathlib import Path

import torch

FULL = 3.0  # nats of difference at which a token has its full colour
LOWEST, BLUE, ORANGE = 0.05, "0,114,178", "213,94,0"  # Okabe and Ito's, safe for the colour-blind


def collect(args, tokenizer, bos: int, problems, ys, r, before, updates) -> dict:
    """The page's values as numbers and texts that JSON can hold.

    Args:
        ys: N responses, token ids; r: rewards [P, G].
        before: per response, (log π(y_t|x,y_<t) [T], log π(y_t|BOS,y_<t) [T]).
        updates: method -> (A, in_loss, given x?, loss, gradient, `before` after the update).
    """
    methods, grpo_gradient = [], updates["GRPO"][4].double()
    for name, (A, in_loss, given_x, loss, gradient, after) in updates.items():
        kept = in_loss.flatten().tolist()
        methods.append(
            {
                "name": name,
                "space": "x" if given_x else "BOS",
                "A": A.flatten().tolist(),
                "in_loss": kept,
                "tokens": sum(len(y) for y, k in zip(ys, kept) if k),
                "loss": loss,
                "norm": gradient.double().norm().item(),
                "cosine": cosine(gradient.double(), grpo_gradient),
                "change_x": [(a[0] - b[0]).sum().item() for a, b in zip(after, before)],
                "change_bos": [(a[1] - b[1]).sum().item() for a, b in zip(after, before)],
            }
        )
    rewards = r.flatten().tolist()
    return {
        "model": "/".join(Path(args.model).parts[-2:]),
        "learning_rate": args.learning_rate,
        "bos": tokenizer.convert_ids_to_tokens(bos),
        "bos_id": bos,
        "problems": [
            dict(
                ids=p["prompt_ids"],
                text=tokenizer.decode(p["prompt_ids"]),
                answer=p["answer"],
            )
            for p in problems
        ],
        "responses": [
            {
                "problem": i // r.shape[1],
                "ids": y,
                "tokens": [tokenizer.decode([token]) for token in y],
                "reward": rewards[i],
                "logp_x": before[i][0].tolist(),
                "logp_bos": before[i][1].tolist(),
            }
            for i, y in enumerate(ys)
        ],
        "methods": methods,
    }


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    """Cosine of two float64 vectors: float32 sums over millions of weights are off by percents."""
    return (a @ b / (a.norm() * b.norm())).item()


def read_values(file: Path) -> dict:
    """The values in a page that render() made."""
    found = re.search(r'<script type="application/json">(.*?)</script>', file.read_text(), re.S)
    return json.loads(found[1].replace("<\\/", "</"))


def signed(value: float, digits: int = 2) -> str:
    """A number with its sign, and with more digits if it would otherwise be shown as 0."""
    while 0 < abs(value) < 0.5 * 10**-digits and digits < 6:
        digits += 1
    return f"{value:+.{digits}f}".replace("-", "−")


def coloured(response: dict) -> str:
    """The response's tokens; blue: likelier with the prompt, orange: likelier without it."""
    text = ""
    for token, x, b in zip(response["tokens"], response["logp_x"], response["logp_bos"]):
        strength = min(1, abs(x - b) / FULL)
        colour, kind = (BLUE, "with") if x > b else (ORANGE, "without")
        shown = html.escape(token).replace("\n", "↵\n")
        if strength < LOWEST:
            text += shown
        else:
            text += f'<span class="{kind}" style="background:rgba({colour},{0.6 * strength:.2f})"'
            text += f' title="given x {signed(x)}, given BOS {signed(b)}">{shown}</span>'
    return text


def token_table(response: dict) -> str:
    rows = zip(response["tokens"], response["logp_x"], response["logp_bos"])
    body = "".join(
        f"<tr><td>{t}</td><td><code>{html.escape(token)}</code></td><td>{signed(x)}</td>"
        f"<td>{signed(b)}</td><td>{signed(x - b)}</td></tr>"
        for t, (token, x, b) in enumerate(rows, 1)
    )
    return (
        "<details><summary>Token by token</summary><div class=wide><table><thead><tr>"
        "<th scope=col>t</th><th scope=col>y<sub>t</sub></th><th scope=col>log π(y<sub>t</sub>|x)"
        "</th><th scope=col>log π(y<sub>t</sub>|BOS)</th><th scope=col>difference</th></tr></thead>"
        f"<tbody>{body}</tbody></table></div></details>"
    )


def response_card(number: int, response: dict, methods: list[dict]) -> str:
    i, rows = number - 1, ""
    for m in methods:
        kept = m["in_loss"][i]
        direction = "up" if m["A"][i] > 0 else "down" if m["A"][i] < 0 else "none"
        cell = (
            f"<td class={direction}>{signed(m['A'][i])}</td>"
            if kept
            else "<td class=out>not in it</td>"
        )
        rows += f"<tr><th scope=row>{m['name']}</th>{cell}"
        rows += f"<td>{signed(m['change_x'][i])}</td><td>{signed(m['change_bos'][i])}</td></tr>"
    verdict = "correct" if response["reward"] else "incorrect"
    return (
        f"<article class={verdict}>"
        f"<h4>Response {number}: {verdict}, r = {response['reward']:.0f}</h4>"
        f"<pre>{coloured(response)}</pre>"
        f"<p>log π(y|x) = <b>{signed(sum(response['logp_x']))}</b>, log π(y|BOS) = "
        f"<b>{signed(sum(response['logp_bos']))}</b>, {len(response['ids'])} tokens</p>"
        "<table><thead><tr><th scope=col>method</th><th scope=col>A in the loss</th>"
        "<th scope=col>change of log π(y|x)</th><th scope=col>change of log π(y|BOS)</th></tr>"
        f"</thead><tbody>{rows}</tbody></table>{token_table(response)}</article>"
    )


def by_hand(m: dict, responses: list[dict]) -> str:
    """The loss as a sum over the responses in the loss."""
    key = "logp_x" if m["space"] == "x" else "logp_bos"
    terms = [
        f"({signed(A)})({signed(sum(y[key]))})"
        for A, kept, y in zip(m["A"], m["in_loss"], responses)
        if kept
    ]
    total = sum(A * sum(y[key]) for A, kept, y in zip(m["A"], m["in_loss"], responses) if kept)
    return (
        f"−[ {' + '.join(terms)} ] / {m['tokens']} = −({signed(total)}) / {m['tokens']} "
        f"= <b>{signed(m['loss'], 4)}</b>"
    )


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def method_card(m: dict, values: dict) -> str:
    responses, rows = values["responses"], ""
    context = "the prompt x" if m["space"] == "x" else f"<code>{html.escape(values['bos'])}</code>"
    for verdict, reward in (("correct", 1), ("incorrect", 0)):
        kept = [i for i, y in enumerate(responses) if y["reward"] == reward]
        rows += f"<tr><th scope=row>{verdict}</th>"
        for key in ("change_x", "change_bos"):
            rows += f"<td>{signed(mean([m[key][i] for i in kept]))}</td>"
        rows += "</tr>"
    also = {"GRPO": " (and DSRL after its warm-up)", "NSR-PreRL": " (and DSRL in its warm-up)"}
    return (
        f"<article><h3>{m['name']}{also.get(m['name'], '')}</h3><dl>"
        f"<dt>Context before y</dt><dd>{context}</dd>"
        f"<dt>Responses in the loss</dt><dd>{sum(m['in_loss'])} of {len(responses)}</dd>"
        f"<dt>Loss: −Σ A log π, divided by the tokens in the loss</dt>"
        f"<dd>{by_hand(m, responses)}</dd>"
        f"<dt>Gradient norm</dt><dd>{m['norm']:.3f}</dd>"
        f"<dt>Cosine with GRPO's gradient</dt><dd>{signed(m['cosine'], 3)}</dd></dl>"
        "<table><caption>Mean change by the step</caption><thead><tr><th scope=col>responses</th>"
        "<th scope=col>log π(y|x)</th><th scope=col>log π(y|BOS)</th></tr></thead>"
        f"<tbody>{rows}</tbody></table></article>"
    )


STYLE = """
body{font:16px/1.45 system-ui,sans-serif;color:#111;background:#fff;max-width:90rem;margin:auto;
padding:1rem}h1{font-size:1.6rem}h2{font-size:1.3rem;margin-top:2rem}h3,h4{margin:.2rem 0}
.grid{display:grid;gap:1rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,20rem),1fr))}
article{border:1px solid #bbb;border-left:.4rem solid #bbb;border-radius:.3rem;padding:.6rem}
article.correct{border-left-color:rgb(0,114,178)}article.incorrect{border-left-color:rgb(213,94,0)}
pre{white-space:pre-wrap;overflow-wrap:anywhere;margin:.5rem 0;font:14px/1.6 ui-monospace,monospace}
span.with{border-bottom:2px solid rgb(0,114,178)}
span.without{border-bottom:2px dotted rgb(213,94,0)}
table{border-collapse:collapse;font-size:.85rem;margin:.4rem 0;width:100%}caption{text-align:left}
td,th{border:1px solid #ddd;padding:.2rem .4rem;text-align:right;font-variant-numeric:tabular-nums}
th{text-align:left;font-weight:600}.up{background:rgba(0,114,178,.15)}
.down{background:rgba(213,94,0,.18)}.out{color:#595959}.wide{overflow-x:auto}dt{font-weight:600}
dd{margin:0 0 .4rem;overflow-wrap:anywhere}@media(min-width:1800px){body{font-size:20px}}
"""


def render(values: dict) -> str:
    """The whole page."""
    methods, responses = values["methods"], values["responses"]
    body = f"""<h1>One step of GRPO, PreRL and NSR-PreRL, with every value</h1>
<p>Model {html.escape(values["model"])}. Each method takes one AdamW step (learning rate
{values["learning_rate"]:g}) from the same weights, on the same responses.</p>
<h2>1. Sample y ~ π(·|x), verify, compare with the group</h2>
<p>A token is <span class=with style="background:rgba({BLUE},.4)">blue</span> if the prompt makes it
likelier, log π(y<sub>t</sub>|x) &gt; log π(y<sub>t</sub>|BOS), and
<span class=without style="background:rgba({ORANGE},.4)">orange</span> if the prompt makes it less
likely. Full colour is {FULL:g} nats. The responses were chosen so that their texts differ and a
group has both rewards; a training batch is as it comes.</p>"""
    for p, problem in enumerate(values["problems"]):
        prompt = f"<pre>{html.escape(problem['text'])}</pre>"
        if len(problem["text"]) > 400:
            prompt = f"<details><summary>The prompt x</summary>{prompt}</details>"
            prompt += f"<pre>… {html.escape(problem['text'][-120:])}</pre>"
        cards = "".join(
            response_card(i, y, methods) for i, y in enumerate(responses, 1) if y["problem"] == p
        )
        body += f"<h3>Problem {p + 1}, reference answer {html.escape(problem['answer'])}</h3>"
        body += f"{prompt}<div class=grid>{cards}</div>"
    body += (
        "<h2>2. The losses</h2><p>The methods differ in A, in the responses that are in the loss, "
    )
    body += "and in the context that stands before y.</p><div class=grid>"
    body += "".join(method_card(m, values) for m in methods) + "</div>"
    raw = json.dumps(values).replace("</", "<\\/")
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8><meta name=viewport "
        'content="width=device-width,initial-scale=1"><title>One step, with every value</title>'
        f"<style>{STYLE}</style></head><body><main>{body}</main>"
        f'<script type="application/json">{raw}</script></body></html>\n'
    )

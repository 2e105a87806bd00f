"""Tables of light training, from `benchmarks/recovery.py`."""

from __future__ import annotations

from measured import grid, measured, number, read


def training() -> str:
    """Light training of ours and of CMoE, by minutes."""
    d = read("recovery-demo/recovery.json")
    found, rows = d["rows"], []
    order = ["ours", "both", "lm", "distill", "cmoe"]
    keys = sorted(
        (name.split("-") for name in found if name != "dense"), key=lambda k: (k[0], order.index(k[1]), int(k[2]))
    )
    for plan, recipe, minutes in keys:
        r = found[f"{plan}-{recipe}-{minutes}"]
        tune = r.get("finetune")
        tuned = [
            t["finetune"]
            for other, t in found.items()
            if other.startswith(plan) and t.get("finetune") and (recipe == "cmoe") == ("-cmoe-" in other)
        ]
        bundled = tune["perplexity"] if tune else tuned[0]["perplexity_before"]
        rows.append(
            [
                plan,
                "CMoE's" if recipe == "cmoe" else "ours",
                f"{minutes} min, `{recipe}`" if tune else "none",
                number(r["ratio"]["wikitext2"]),
                number(r["ratio"]["web"]),
                number(bundled / tuned[0]["perplexity_dense"]),
                f"{r['tasks']['mean']['acc']:.3f}",
                f"{tune['tokens']:,}" if tune else "",
            ]
        )
    dense = found["dense"]
    rows.append(["*dense*", "", "", "*1*", "*1*", "*1*", f"*{dense['tasks']['mean']['acc']:.3f}*", ""])
    head = ["shape", "conversion", "training", "WikiText-2", "web", "bundled", "zero-shot", "trained tokens"]
    s = d["setting"]
    return (
        grid(head, rows)
        + "\n\n"
        + measured(
            "recovery-demo/recovery.json",
            f"python benchmarks/recovery.py demo --web {s['files']['web']} --data {' '.join(s['files']['data'])} "
            f"--text {s['files']['text']} --tasks pack_200.jsonl --items {s['items_per_task']} "
            f"--max-tokens {s['max_tokens']} --plans S1A1E8 S2A2E8 --minutes 15 60",
            f"Protocol: perplexity `gptq`, windows of {dense['web']['window']:,}, "
            f"{s['max_tokens']:,} tokens of each text; "
            f"dense {dense['wikitext2']['perplexity']:.2f} and {dense['web']['perplexity']:.2f}; "
            f"{s['items_per_task']} items of each of 12 tasks, standard error {dense['tasks']['mean']['stderr']:.3f}",
            f"Training text: sha256 `{s['data_sha256']}`; calibration: {s['calibration_tokens']:,} tokens of "
            f"{s['files']['web']}; {s['threads']} thread; one seed (0)",
        )
    )


def settings() -> str:
    """The same conversion trained for as many steps with other settings, and the dense model trained alike."""
    file = "recovery-settings-demo/recovery.json"
    d = read(file)
    found, s, rows = d["rows"], d["setting"], []
    for name, r in found.items():
        if name == "dense":
            continue
        tune, plan = r.get("finetune"), r["plan"]
        whole = next(t["finetune"] for t in found.values() if t.get("plan") == plan and t.get("finetune"))
        bundled = tune["perplexity"] if tune else whole["perplexity_before"]
        rows.append(
            [
                "dense" if plan == "S8A0E8" else plan,
                f"`{r['recipe'].replace('+', ', ')}`" if tune else "not trained",
                number(r["ratio"]["wikitext2"]),
                number(r["ratio"]["web"]),
                number(bundled / whole["perplexity_dense"]),
                f"{tune['held_out_loss']:.3f}" if tune else f"{whole['held_out_loss_before']:.3f}",
            ]
        )
    rows.sort(key=lambda row: (row[0] == "dense", row[0], row[1] != "not trained", row[1]))
    steps = next(r["steps"] for r in found.values() if r.get("steps"))
    dense = found["dense"]
    head = ["model", "training", "WikiText-2", "web", "bundled", "held-out loss, nats"]
    return (
        grid(head, rows)
        + "\n\n"
        + measured(
            file,
            f"python benchmarks/recovery.py demo --web {s['files']['web']} --data {' '.join(s['files']['data'])} "
            f"--text {s['files']['text']} --max-tokens {s['max_tokens']} --steps {steps} --plans ... --recipes ... "
            f"--threads {s['threads']}",
            f"Protocol: perplexity over the dense model's, `gptq`, windows of {dense['web']['window']:,}, "
            f"{s['max_tokens']:,} tokens of each text; {steps} steps of 1,024 tokens each; one seed (0)",
            f"Training text: sha256 `{s['data_sha256']}`; calibration: {s['calibration_tokens']:,} tokens of "
            f"{s['files']['web']}",
        )
    )


def beside_siblings(model: str) -> str:
    """Light training of a model, beside the line through the smaller dense models of its family."""
    file = f"recovery-{model}/recovery.json"
    d, rows = read(file), []
    found, s, millions = d["rows"], d["setting"], lambda row: f"{row['active_parameters'] / 1e6:,.0f} M"
    cells = lambda row: [number(row[text]["perplexity"]) for text in ("wikitext2", "web")]  # noqa: E731
    for r in sorted((r for r in found.values() if "plan" in r), key=lambda r: (r["plan"], r["minutes"])):
        tune = r.get("finetune")
        over = [number(r["over_line"][text]) for text in ("wikitext2", "web")]
        trained = f"{r['minutes']:g} min, {tune['tokens']:,} tokens" if tune else "none"
        rows.append([r["plan"], trained, millions(r), *cells(r), *over])
    for name, r in found.items():
        if "plan" not in r:
            label = model if name == "dense" else name.removeprefix("sibling-")
            rows.append([f"*`{label}`, dense*", "", millions(r), *cells(r), "", ""])
    head = [
        "shape",
        "training",
        "active parameters",
        "WikiText-2",
        "web",
        "ours / line, WikiText-2",
        "ours / line, web",
    ]
    plans = " ".join(dict.fromkeys(r["plan"] for r in found.values() if "plan" in r))
    return (
        grid(head, rows)
        + "\n\n"
        + measured(
            file,
            f"python benchmarks/recovery.py {model} --web {s['files']['web']} --data {' '.join(s['files']['data'])} "
            f"--text {s['files']['text']} --siblings demo --max-tokens {s['max_tokens']} "
            f"--tokens {s['calibration_tokens']} --plans {plans} --recipes both --minutes 60 --threads {s['threads']}",
            f"Protocol: perplexity `gptq`, windows of {found['dense']['web']['window']:,}, {s['max_tokens']:,} tokens "
            f"of each text; minutes are the processor's, of all threads together",
            f"Training text: sha256 `{s['data_sha256']}`; calibration: {s['calibration_tokens']:,} tokens of "
            f"{s['files']['web']}; one seed (0)",
        )
    )

"""Write an experiment's table: experiments/NAME.md to be read, and NAME.json, which it is made of.

    python experiments/tables.py table1           of what map.sh has left in runs/map
    python experiments/tables.py ablations        of what ablations.sh has left in runs/ablations

Called by those scripts; a missing seed is an error. Each figure is the mean over seeds ± the
standard deviation (n - 1), in percent; every seed's own figures stand below, the failures with the
others.

Results are {method: {seed: {figure: value}}}; a seed's figures are called a row.
"""

import argparse
import json
import os
import platform
import re
import statistics
from datetime import date
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
# The arms of ablations.sh.
ARMS = (
    "paper",
    "no_std",
    "token_mean",
    "kl_in_reward",
    "no_kl",
    "group_4",
    "two_steps",
    "two_steps_clip_higher",
)
METHODS = {
    "base": "base",
    "cold_start": "cold start",
    "label_only": "label-only SFT",
    "rlvr": "RLVR (GRPO)",
    "label_only_noisy": "label-only SFT, half wrong",
    "rlvr_noisy": "RLVR (GRPO), half wrong",
}
# The methods' results among those of map.sh: world and arm.
IN_THE_MAP = {
    "base": ("wrong_0.0", "base"),
    "cold_start": ("wrong_0.0", "cold_start"),
    "label_only": ("wrong_0.0", "label_only"),
    "rlvr": ("wrong_0.0", "grpo_think"),
    "label_only_noisy": ("wrong_0.5", "label_only"),
    "rlvr_noisy": ("wrong_0.5", "grpo_think"),
}
SPLITS = ("test", "test_ood", "swapped")
MEDIA = ("video", "audio")

# What is counted of the statements in <think> -> the figure's name.
STATED = {
    "face_true": "face true",
    "voice_true": "voice true",
    "eea": "EEA",
    "epc": "EPC",
    "fcr": "FCR",
}

RATES = [f"{split} {rate}" for split in SPLITS for rate in ("WAR", "UAR")]
TRUE = [f"{split} {name}" for split in ("test", "test_ood") for name in STATED.values()]
ALONE = [f"{split} WAR, {medium} alone" for split in ("test", "test_ood") for medium in MEDIA]
VARIANTS = [
    "test WAR",
    "test_ood WAR",
    "sampled accuracy",
    "sampled format",
    "face true",
    "voice true",
    "KL",
    "length",
]
# Figures are shares, given in percent, but for these.
FORMS = {"KL": "{:.3f}", "length": "{:.1f}"}

# Where figures come from.
FACTS = ("command", "date", "machine", "torch", "minutes")

# Tables that pages quote: the page, the experiment, the figures.
QUOTED = [
    ("README.md", "table1", [f"{split} WAR" for split in SPLITS]),
    ("docs/variants.md", "table1", TRUE[5:]),
    ("docs/variants.md", "table1", ALONE),
    ("docs/variants.md", "ablations", VARIANTS),
]


# --------------------------------------------------------------------------------------------------
# Reading what the scripts have left


def read(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def table1(folder):
    """Table 1's part of map.sh's results."""
    results = {}
    for method, (world, arm) in IN_THE_MAP.items():
        for file in sorted((folder / world).glob(f"{arm}_[0-9].json")):
            results.setdefault(method, {})[file.stem[-1]] = table1_row(read(file))
    return results


def map_seconds(folder):
    """How long map.sh took, with two of its jobs at a time."""
    return sum(read(file).get("seconds", 0) for file in folder.glob("*/*_[0-9].json")) / 2


def table1_row(figures):
    row = {}
    for split in SPLITS:
        found = figures[split]
        row[f"{split} WAR"], row[f"{split} UAR"] = found["war"], found["uar"]
        for medium in MEDIA:
            if f"{medium}_alone" in found:
                row[f"{split} WAR, {medium} alone"] = found[f"{medium}_alone"]
        row |= {f"{split} {name}": found[key] for key, name in STATED.items() if key in found}
    return row


def ablations(folder):
    """Results of ablations.sh; an arm's seed lies in the folder ARM_SEED."""
    results = {}
    for arm in ARMS:
        for file in sorted(folder.glob(f"{arm}_[0-9]/results.json")):
            seed = file.parent.name[-1]
            results.setdefault(arm, {})[seed] = ablations_row(file.parent)
    return results


def ablations_row(place):
    after = read(place / "results.json")["after"]
    text = (place / "metrics.jsonl").read_text(encoding="utf-8")
    header, *lines = [json.loads(line) for line in text.splitlines()]

    def late(metric):  # its mean over the last ten updates
        return statistics.mean(line[metric] for line in lines[-10:])

    return {
        "test WAR": after["test"]["war"],
        "test_ood WAR": after["test_ood"]["war"],
        "sampled accuracy": late("reward_accuracy"),
        "sampled format": late("reward_format"),
        "face true": after["test"]["face_true"],
        "voice true": after["test"]["voice_true"],
        "KL": late("kl") if header["config"]["beta"] else None,
        "length": late("completion_length"),
    }


def check_complete(name, results, folder):
    """Every method has the same seeds; only the base of table1 is one for all."""
    seeds = {method: sorted(rows) for method, rows in results.items() if method != "base"}
    wanted = set(ARMS) if name == "ablations" else set(METHODS) - {"base"}
    distinct = {tuple(numbers) for numbers in seeds.values()}
    if set(seeds) != wanted or len(distinct) != 1:
        raise SystemExit(
            f"error: {folder}: something is missing, there are only {seeds}; start its script again"
        )


# --------------------------------------------------------------------------------------------------
# Tables


def cell(figure, values):
    """The mean of the values that are not None, ± the standard deviation of several."""
    form, scale = FORMS.get(figure, "{:.1f}"), 1 if figure in FORMS else 100
    known = [scale * value for value in values if value is not None]
    if not known:
        return "–"
    spread = f" ± {form.format(statistics.stdev(known))}" if len(known) > 1 else ""
    return form.format(statistics.mean(known)) + spread


def markdown_table(results, figures):
    """A line per method that has any of these figures: one without a <think> states nothing."""
    lines = ["| | " + " | ".join(figures) + " |", "|---" * (len(figures) + 1) + "|"]
    for method, rows in results.items():
        if not any(figure in row for row in rows.values() for figure in figures):
            continue
        cells = []
        for figure in figures:
            cells.append(cell(figure, [row.get(figure) for row in rows.values()]))
        lines.append(f"| {METHODS.get(method, method)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def each_seed(results, figures):
    """The same with a line per method and seed."""
    alone = {}
    for method, rows in results.items():
        for seed, row in rows.items():
            alone[f"{METHODS.get(method, method)}, seed {seed}"] = {seed: row}
    return markdown_table(alone, figures)


# --------------------------------------------------------------------------------------------------
# Pages


def facts_of_now(command, seconds):
    """Where an experiment's figures come from: what has just been run here."""
    values = (command, str(date.today()), processor(), torch.__version__, round(seconds / 60))
    return dict(zip(FACTS, values))


def facts_line(facts):
    return (
        f"`{facts['command']}`, {facts['date']}, {facts['machine']}, torch {facts['torch']}, "
        f"{facts['minutes']} minutes"
    )


def page(name, facts):
    """The text of experiments/NAME.md."""
    head = (
        f"{facts_line(facts)}; mean ± standard deviation over seeds, in percent. "
        f"Written by `experiments/tables.py`; the figures are in `{name}.json`.\n"
    )
    parts = table1_page if name == "table1" else ablations_page
    return "\n".join(parts(head, facts["results"])) + "\n"


def table1_page(head, results):
    return [
        "# Table 1 in miniature\n",
        head,
        markdown_table(results, RATES),
        "\nThe base is one, of seed 0, as the published one is one. The others: seeds 0 to 4. "
        "Clean labels; in the last two lines half of them are wrong.",
        "\n## Is the reasoning true?\n",
        "Statements in `<think>` about face and voice that are true; and the emotion that follows "
        "from them: is it the label (EEA), the answer (EPC), both (FCR)?\n",
        markdown_table(results, TRUE),
        "\n## Without one modality\n",
        "WAR with one medium taken out of prompt and input.\n",
        markdown_table(results, ALONE),
        "\n## Each seed\n",
        each_seed(results, RATES),
    ]


def ablations_page(head, results):
    return [
        "# Variants of GRPO on the toy\n",
        head,
        "Eight arms, seeds 0 to 2, 50 updates from the cold start of the same seed. *Sampled*, KL "
        "(nats per token, to the cold start; – where there is no reference) and length (tokens) "
        "are means over the last ten updates; the others are greedy after training.\n",
        markdown_table(results, VARIANTS),
        "\n## Each seed\n",
        each_seed(results, VARIANTS),
    ]


def processor():
    """The machine in words."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    name = found[1] if found else platform.processor()
    return f"{name}, {os.cpu_count()} cores"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=("table1", "ablations"))
    name = parser.parse_args().name
    if name == "table1":
        folder = ROOT / "runs" / "map"
        results = table1(folder)
        of_the_map = read(ROOT / "experiments" / "map.json")  # of the same runs
        facts = {fact: of_the_map[fact] for fact in FACTS}
    else:
        folder = ROOT / "runs" / "ablations"
        results = ablations(folder)
        facts = facts_of_now("experiments/ablations.sh", int((folder / "seconds").read_text()))
    check_complete(name, results, folder)
    facts["results"] = results
    out, text = ROOT / "experiments", page(name, facts)
    (out / f"{name}.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    (out / f"{name}.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()

"""Write an experiment's table: experiments/NAME.md to be read, and experiments/NAME.json, from which it is made.

    python experiments/tables.py table1           of what table1.sh has left in runs/table1
    python experiments/tables.py ablations        of what ablations.sh has left in runs/ablations

Called by those scripts; a missing seed is an error. Each figure is the mean over seeds ± the standard deviation (n - 1), in percent; every seed's own
figures stand below, the failures with the others.
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
ARMS = (
    "paper",
    "no_std",
    "token_mean",
    "kl_in_reward",
    "no_kl",
    "group_4",
    "two_steps",
    "two_steps_clip_higher",
)  # of ablations.sh
METHODS = {
    "base": "base",
    "cold_start": "cold start",
    "label_only": "label-only SFT",
    "rlvr": "RLVR (GRPO)",
}


def read(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def processor():
    found = (
        re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        if Path("/proc/cpuinfo").exists()
        else None
    )
    return f"{found[1] if found else platform.processor()}, {os.cpu_count()} cores"


def table1(folder):
    """-> {method: {seed: {figure: value}}}"""
    results = {}
    for method in METHODS:
        for place in sorted(folder.glob(f"{method}_*")):
            if not place.is_dir():
                continue
            row = results.setdefault(method, {}).setdefault(
                place.name.removeprefix(f"{method}_"), {}
            )
            for split in ("test", "test_ood", "swapped"):
                both, *alone = (
                    read(place / f"{split}.{modality}.json")["metrics"]
                    for modality in ("video_audio", "video", "audio")
                )
                row |= {f"{split} WAR": both["war"], f"{split} UAR": both["uar"]}
                row |= {
                    f"{split} WAR, {medium} alone": metrics["war"]
                    for medium, metrics in zip(("video", "audio"), alone)
                }
                if method != "label_only":  # that one states nothing
                    row |= {f"{split} {name}": both[key] for key, name in STATED.items()}
            if method != "label_only":
                sampled = read(place / "sampled" / "test.json")["metrics"]
                row |= {
                    f"sampled {name}": sampled[key]
                    for key, name in {"war": "accuracy", "format": "format", **STATED}.items()
                }
    return results


STATED = {"face_true": "face true", "voice_true": "voice true", "follows": "answer follows"}


def ablations(folder):
    """-> {arm: {seed: {figure: value}}}"""
    results = {}
    for arm, seed, file in (
        (arm, file.parent.name[-1], file)
        for arm in ARMS
        for file in sorted(folder.glob(f"{arm}_[0-9]/results.json"))
    ):
        after = read(file)["after"]
        header, *lines = map(json.loads, (file.parent / "metrics.jsonl").read_text().splitlines())
        last = lines[-10:]
        results.setdefault(arm, {})[seed] = {
            "test WAR": after["test"]["war"],
            "test_ood WAR": after["test_ood"]["war"],
            **{
                f"sampled {name}": statistics.mean(line[f"reward_{name}"] for line in last)
                for name in ("accuracy", "format")
            },
            "face true": after["test"]["face_true"],
            "voice true": after["test"]["voice_true"],
            "KL": statistics.mean(line["kl"] for line in last)
            if header["config"]["beta"]
            else None,
            "length": statistics.mean(line["completion_length"] for line in last),
        }
    return results


UNITS = {"KL": "{:.3f}", "length": "{:.1f}"}  # the others are shares, given in percent


def cell(name, values):
    """The mean, and ± the standard deviation where there are several."""
    form, scale = UNITS.get(name, "{:.1f}"), 1 if name in UNITS else 100
    values = [scale * value for value in values if value is not None]
    if not values:
        return "–"
    spread = f" ± {form.format(statistics.stdev(values))}" if len(values) > 1 else ""
    return form.format(statistics.mean(values)) + spread


def markdown_table(results, figures, titles=None):
    lines = ["| | " + " | ".join(figures) + " |", "|---" * (len(figures) + 1) + "|"]
    for method, seeds in results.items():
        values = (cell(name, [row.get(name) for row in seeds.values()]) for name in figures)
        lines.append(f"| {(titles or {}).get(method, method)} | " + " | ".join(values) + " |")
    return "\n".join(lines)


def each_seed(results, figures, titles=None):
    rows = {
        f"{(titles or {}).get(method, method)}, seed {seed}": {seed: row}
        for method, seeds in results.items()
        for seed, row in seeds.items()
    }
    return markdown_table(rows, figures)


def rows_with(results, figures):
    """The methods that have any of these figures: a model without a <think> states nothing."""
    return {
        method: seeds
        for method, seeds in results.items()
        if any(name in row for row in seeds.values() for name in figures)
    }


def facts_line(facts):
    return f"`{facts['command']}`, {facts['date']}, {facts['machine']}, torch {facts['torch']}, {facts['minutes']} minutes"


RATES = [f"{split} {rate}" for split in ("test", "test_ood", "swapped") for rate in ("WAR", "UAR")]
TRUE = [f"{how} {name}" for how in ("test", "test_ood", "sampled") for name in STATED.values()]
ALONE = [
    f"{split} WAR, {medium} alone"
    for split in ("test", "test_ood")
    for medium in ("video", "audio")
]
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
IN_README = [
    ("table1", RATES[:5]),
    ("table1", TRUE[3:]),
    ("table1", ALONE),
    ("ablations", VARIANTS),
]


def page(name, facts):
    """The text of experiments/NAME.md."""
    results = facts["results"]
    head = (
        f"{facts_line(facts)}; mean ± standard deviation over seeds, in percent. Written by `experiments/tables.py`; the figures are in "
        f"`{name}.json`.\n"
    )

    def table(figures):
        return markdown_table(rows_with(results, figures), figures, METHODS)

    if name == "table1":
        text = [
            "# Table 1 in miniature\n",
            head,
            table(RATES),
            "\nThe base is one, of seed 0, as the published one is one. The others: seeds 0 to 4.",
            "\n## Is the reasoning true?\n",
            "Statements in `<think>` about face and voice that are true, and answers that follow from the "
            "statements, true or not; greedy on test and test_ood, and sampled at temperature 1 on test.\n",
            table(TRUE),
            "\n" + table(["sampled accuracy", "sampled format"]),
            "\n## Without one modality\n",
            "WAR with one medium taken out of prompt and input.\n",
            table(ALONE),
            "\n## Each seed\n",
            each_seed(results, RATES, METHODS),
        ]
    else:
        text = [
            "# Variants of GRPO on the toy\n",
            head,
            "Eight arms, seeds 0 to 2, 50 updates from the cold start of the same seed. *Sampled*, KL "
            "(nats per token, to the cold start; – where there is no reference) and length (tokens) are means over the last ten updates; the others "
            "are greedy after training.\n",
            table(VARIANTS),
            "\n## Each seed\n",
            each_seed(results, VARIANTS),
        ]
    return "\n".join(text) + "\n"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=("table1", "ablations"))
    args = parser.parse_args()
    out, folder = ROOT / "experiments", ROOT / "runs" / args.name
    results = table1(folder) if args.name == "table1" else ablations(folder)
    seeds = {name: sorted(rows) for name, rows in results.items() if name != "base"}
    if (
        not seeds
        or len({*map(tuple, seeds.values())}) > 1
        or len(seeds) != (len(METHODS) - 1 if args.name == "table1" else len(ARMS))
    ):
        raise SystemExit(
            f"error: {folder}: something is missing, there are only {seeds}; start {args.name}.sh again"
        )
    facts = {
        "command": f"experiments/{args.name}.sh",
        "date": str(date.today()),
        "machine": processor(),
        "torch": torch.__version__,
        "minutes": round(int((folder / "seconds").read_text()) / 60),
        "results": results,
    }
    (out / f"{args.name}.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    (out / f"{args.name}.md").write_text(page(args.name, facts), encoding="utf-8")
    print(page(args.name, facts))


if __name__ == "__main__":
    main()

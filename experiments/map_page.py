"""The page of map.sh: experiments/map.md and .json, and map.png.

    python -m experiments.map_page [--all]     of the results in runs/map
    python -m experiments.map_page --quick     prints the table of what there is, and writes nothing

Figures are means over seeds ± the standard deviation (n - 1), in percent, but for the KL. Every
prediction of predictions.md is printed beside the numbers that it was about.
"""

import argparse
import json
import statistics
from pathlib import Path

from experiments.map import OUT, jobs, result_file
from experiments.map_results import away, cell, mean, read_rates, read_results, values, world_name
from experiments.predicted import predicted
from experiments.tables import facts_line, facts_of_now, map_seconds
from show import new_figure, write_picture

HERE = Path(__file__).parent
ARMS = {
    "label_only": "label-only",
    "label_cold": "label-only, from the cold start",
    "label_words": "label-only, from words",
    "label_kept": "labels of kept clips",
    "own_correct": "own correct samples",
    "grpo_answer": "GRPO without think",
    "grpo_think": "GRPO with think (RLVR)",
}
RIVALS = ("label_only", "grpo_think")
OWES = {  # what an arm starts from, and what it learns from
    "label_only": ("base", "labels"),
    "label_cold": ("cold start", "labels"),
    "label_words": ("cold start of words", "labels"),
    "label_kept": ("cold start", "labels of the clips that the next arm keeps"),
    "own_correct": ("cold start", "own completions that are right, with `<think>`"),
    "grpo_answer": ("cold start of words", "own answers, rewarded"),
    "grpo_think": ("cold start", "own completions, rewarded"),
}
COLOURS = ("tab:red", "tab:orange", "tab:brown", "tab:olive", "tab:green", "tab:purple", "tab:blue")
COLOURS = dict(zip(ARMS, COLOURS))


# --------------------------------------------------------------------------------------------------
# Tables


def table(head, lines):
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def accuracy_table(results):
    """WAR at home and away, a line per world; where an arm has fewer seeds, their number."""
    lines = []
    for world in results:
        seeds = len(values(results, world, "grpo_think", "test.war"))
        line = [world_name(world), str(seeds)]
        for arm in ARMS:
            known = len(values(results, world, arm, "test.war"))
            fewer = f" ({known})" if known != seeds else ""
            line.append(home_and_away(results, world, arm) + fewer * bool(known))
        lines.append(line)
    return table(["world", "seeds", *ARMS.values()], lines)


def summary_table(results):
    """Of when_rlvr_wins.md: RLVR beside its rival."""
    lines = []
    for world in results:
        runs = [values(results, world, arm, f"{away(world)}.war") for arm in RIVALS]
        pairs = [(runs[0][seed], runs[1][seed]) for seed in runs[1] if seed in runs[0]]
        better, worse = (sum(s * (b - a) > 0 for a, b in pairs) for s in (1, -1))
        cells = [home_and_away(results, world, arm) for arm in RIVALS]
        lines.append([world_name(world), *cells, str(len(pairs)), f"{better} / {worse}"])
    return table(["world", "label-only", "RLVR", "seeds", "RLVR better / worse away"], lines)


def arms_table(results):
    """Of when_rlvr_wins.md: what each arm owes to what."""
    worlds = {
        "wrong_0.5": "half wrong, uniformly",
        "confused_0.4": "40 % wrong, confused",
        "early_0.0": "a weak base",
        "early_0.5": "a weak base, half wrong",
    }
    lines = []
    for arm, owes in OWES.items():
        cells = [home_and_away(results, world, arm) for world in worlds]
        lines.append([ARMS[arm], *owes, *cells])
    return table(["", "starts from", "learns from", *worlds.values()], lines)


def home_and_away(results, world, arm):
    """WAR on `test` / on other data; empty where the arm was not run."""
    home = values(results, world, arm, "test.war")
    if not home:
        return ""
    return f"{cell(home)} / {cell(values(results, world, arm, f'{away(world)}.war'))}"


def paired_table(results):
    """RLVR less label-only, seed by seed."""
    lines = []
    for world in results:
        line = [world_name(world)]
        for split in ("test", away(world)):
            a = values(results, world, "grpo_think", f"{split}.war")
            b = values(results, world, "label_only", f"{split}.war")
            gaps = {seed: a[seed] - b[seed] for seed in a if seed in b}
            better = sum(gap > 0 for gap in gaps.values())
            worse = sum(gap < 0 for gap in gaps.values())
            line += [cell(gaps), f"{better} / {worse}"]
        lines.append(line)
    head = ["world", "test", "better / worse", "other data", "better / worse"]
    return table(head, lines)


def reasoning_table(results):
    """What <think> says, at home and away."""
    names = ("face_true", "voice_true", "eea", "epc", "fcr")
    head = ["world", "model", *("face true", "voice true", "EEA", "EPC", "FCR")]
    lines = []
    for world in results:
        for arm in ("cold_start", "own_correct", "grpo_think"):
            cells = []
            for name in names:
                home = values(results, world, arm, f"test.{name}")
                other = values(results, world, arm, f"{away(world)}.{name}")
                cells.append(f"{cell(home)} / {cell(other)}")
            if values(results, world, arm, "test.eea"):
                lines.append([world_name(world), ARMS.get(arm, "cold start"), *cells])
    return table(head, lines)


def why_table(results):
    names = {
        "groups with a wrong label": "wrong_groups",
        "it is ever said in": "said_in",
        "completions that say it": "said",
        "that say a right one": "right_said",
        "those groups' share of the weight": "weight",
    }
    lines = []
    for world in results:
        for arm in ("grpo_answer", "grpo_think"):
            if values(results, world, arm, "wrong.said_in"):
                cells = [cell(values(results, world, arm, f"wrong.{x}")) for x in names.values()]
                lines.append([world_name(world), ARMS[arm], *cells])
    return table(["world", "arm", *names], lines)


def swapped_table(results):
    """What is answered of a clip with one's face and another's voice."""
    names = {
        "of the two together": "war",
        "of the face's clip": "as_the_face",
        "of the voice's clip": "as_the_voice",
    }
    lines = []
    for world in results:
        for arm in ARMS:
            if values(results, world, arm, "swapped.war"):
                cells = [cell(values(results, world, arm, f"swapped.{x}")) for x in names.values()]
                lines.append([world_name(world), ARMS[arm], *cells])
    return table(["world", "arm", *names], lines)


def kl_table(results):
    lines = []
    for world in results:
        cells = [cell(values(results, world, arm, "kl"), scale=1, digits=2) for arm in ARMS]
        lines.append([world_name(world), *cells])
    return table(["world", *ARMS.values()], lines)


def rare_table(results):
    """The world of rare emotions: recall of the commonest and of the rarest."""
    lines = []
    for arm in ARMS:
        if values(results, "films", arm, "test.uar"):
            names = ("uar", "recall.neutral", "recall.fear", "recall.disgust")
            cells = [cell(values(results, "films", arm, f"test.{name}")) for name in names]
            lines.append([ARMS[arm], *cells])
    return table(["arm", "UAR", "neutral (23 %)", "fear (8 %)", "disgust (1 %)"], lines)


def rates_table(rates):
    lines = []
    for arm, tried in rates.items():
        for lr, wars in tried.items():
            each = ", ".join(f"{100 * war:.1f}" for war in wars)
            lines.append([ARMS[arm], lr, f"{100 * statistics.mean(wars):.1f}", each])
    return table(["arm", "learning rate", "WAR on validation", "seeds 10, 11, ..."], lines)


# --------------------------------------------------------------------------------------------------
# The figure


def draw(results, path):
    """Three panels: wrong labels, and what else a world may be like; thin dots are seeds."""
    figure = new_figure(13, 4.4)
    test, ood, others = figure.subplots(1, 3, gridspec_kw={"width_ratios": [1, 1, 1.5]})
    shares = [world for world in results if world.startswith("wrong_")]
    for axes, split in ((test, "test"), (ood, "test_ood")):
        for arm, name in ARMS.items():
            points = {w: values(results, w, arm, f"{split}.war") for w in shares}
            points = {float(w[6:]): found for w, found in points.items() if found}
            x = [100 * share for share in points]
            y = [100 * statistics.mean(found.values()) for found in points.values()]
            axes.plot(
                x, y, "o-" if len(x) > 3 else "s--", color=COLOURS[arm], label=name, markersize=4
            )
            for share, found in points.items():
                dots = [100 * value for value in found.values()]
                axes.plot([100 * share] * len(dots), dots, ".", color=COLOURS[arm], alpha=0.25)
        axes.set_title(f"{split}: labels wrong, uniformly", fontsize=10)
        axes.set_xlabel("% of the training labels")
        axes.set_ylim(0, 103)
        axes.grid(alpha=0.3)
    test.set_ylabel("WAR, %")
    test.legend(fontsize=7.5, loc="lower left")
    worlds = [w for w in results if not w.startswith("wrong_") or w == "wrong_0.0"]
    for arm in ARMS:
        shift = (list(ARMS).index(arm) - len(ARMS) // 2) * 0.09
        for place, world in enumerate(worlds):
            found = values(results, world, arm, f"{away(world)}.war")
            if arm == "grpo_think" or found:
                dots = [100 * value for value in found.values()]
                others.plot(dots, [place + shift] * len(dots), ".", color=COLOURS[arm], alpha=0.3)
            if found:
                others.plot(
                    statistics.mean(dots), place + shift, "D", color=COLOURS[arm], markersize=4
                )
    others.set_yticks(range(len(worlds)), [world_name(world) for world in worlds], fontsize=7.5)
    others.invert_yaxis()
    others.set_xlim(0, 103)
    others.set_xlabel("WAR on other data, %")
    others.set_title("other worlds", fontsize=10)
    others.grid(alpha=0.3)
    write_picture(figure, path, dpi=90)


# --------------------------------------------------------------------------------------------------
# The page


def page(facts):
    """The text of experiments/map.md."""
    results = facts["results"]
    parts = [
        "# When does RLVR beat fine-tuning on the labels?\n",
        f"{facts_line(facts)}. Written by `experiments/map_page.py`, figures in `map.json`. "
        "Means over seeds ± standard deviation, in percent. What the worlds and the arms are: "
        "[worlds.py](../toy/worlds.py), [map.py](map.py). The minutes are half of all jobs', as "
        "two run at a time; other work ran beside some. What follows from all this: "
        "[when_rlvr_wins.md](when_rlvr_wins.md).\n",
        "![Accuracy by share of wrong labels, and in other worlds](map.png)\n",
        "## Accuracy\n",
        "WAR on `test` / on other data: `test_ood`, for the rule `test_unseen`. The tests have as "
        "many clips of each emotion, so UAR is the same, but for the rule's.\n",
        accuracy_table(results),
        "RLVR less label-only, paired by seed; and in how many seeds it is better / worse.\n",
        paired_table(results),
        "## Rare emotions\n",
        "Emotions in training as frequent as in films; recall on `test`, where all are alike.\n",
        rare_table(results),
        "## Why: wrong labels in GRPO's groups\n",
        "A wrong label pulls only where a completion of its group says it. The weight: the sum of "
        "|A| over the groups with a wrong label, as a share of all.\n",
        why_table(results),
        "## What is said in `<think>`\n",
        "On `test` / on other data. EEA: the emotion that follows from the statements is the "
        "label; EPC: it is the answer; FCR: both.\n",
        reasoning_table(results),
        "## Face and voice\n",
        "`swapped` clips have one clip's face and another's voice. Whose emotion is answered?\n",
        swapped_table(results),
        "## How far from the start\n",
        "KL from the model that training started from, in nats per completion, on `test`. A cold "
        "start says `<think>` to the question for a label, too: most of what labels from there are "
        "away is giving that up. Those from words had nothing to give up.\n",
        kl_table(results),
        "## Learning rates\n",
        "Chosen by WAR on validation with half of the labels wrong, there as in training; with "
        "seeds that are used for nothing else. Rates that differ by a clip or less count as equal: "
        "then the one that others have is taken.\n",
        rates_table(facts["rates"]),
        "## Predictions\n",
        "What [predictions.md](predictions.md) said before any run, and what was measured.\n",
        table(["", "prediction", "measured", "held"], predicted(results)),
        "The linear probe names the wall from the vision tower's features in "
        f"{mean(results, 'scene_0.0', 'probe', 'toy'):.1f} % (the toy's base) and "
        f"{mean(results, 'scene_0.0', 'probe', 'scene'):.1f} % (the base whose captions name it).",
    ]
    return "\n".join(parts) + "\n"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--all", action="store_true", help="more seeds must be there, too")
    parser.add_argument("--quick", action="store_true", help="print a table of what there is")
    args = parser.parse_args()
    results = read_results()
    if args.quick:
        print(accuracy_table(results))
        return
    missing = [job for job in jobs(more=args.all) if not result_file(*job[1:]).exists()]
    if missing:
        raise SystemExit(f"error: {len(missing)} results are missing; start map.sh again")
    command = "experiments/map.sh" + " --all" * args.all
    facts = facts_of_now(command, map_seconds(OUT)) | {"results": results, "rates": read_rates()}
    (HERE / "map.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    (HERE / "map.md").write_text(page(facts), encoding="utf-8")
    draw(results, HERE / "map.png")
    print(accuracy_table(results))


if __name__ == "__main__":
    main()

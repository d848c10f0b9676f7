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

from experiments.map import LR_SEEDS, LR_TRIED, OUT, WORLDS, jobs, result_file
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
NAMES = {
    "wrong": "labels wrong, uniformly: ",
    "confused": "labels wrong, confused: ",
    "labelled": "labelled clips: ",
    "films": "emotions as in films",
    "rule": "rule, unseen pairs",
    "scene": "walls that tell: ",
    "early": "a weak base, labels wrong: ",
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
# Results


def read_results():
    """{world: {arm: {seed: figures}}} of what there is."""
    results = {}
    for world in WORLDS:
        for file in sorted((OUT / world).glob("*_[0-9].json")):
            arm, seed = file.stem.rsplit("_", 1)
            figures = json.loads(file.read_text(encoding="utf-8"))
            results.setdefault(world, {}).setdefault(arm, {})[seed] = figures
    return results


def read_rates():
    """{arm: {learning rate: its WARs on validation, by seed}}"""
    rates = {}
    for arm, tried in LR_TRIED.items():
        for lr in tried:
            files = [OUT / "lr" / f"{arm}_{lr}_{seed}.json" for seed in LR_SEEDS[arm]]
            wars = [json.loads(file.read_text(encoding="utf-8"))["war"] for file in files]
            rates.setdefault(arm, {})[str(lr)] = wars
    return rates


def values(results, world, arm, figure):
    """The figure's values by seed; figure: names on the way to it, "test.war"."""
    found = {}
    for seed, figures in results.get(world, {}).get(arm, {}).items():
        for name in figure.split("."):
            figures = figures.get(name) if isinstance(figures, dict) else None
        if figures is not None:
            found[seed] = figures
    return found


def mean(results, world, arm, figure):
    """In percent; not a number where there is none."""
    found = values(results, world, arm, figure).values()
    return 100 * statistics.mean(found) if found else float("nan")


def cell(found, scale=100, digits=1):
    """{seed: value} -> mean ± standard deviation."""
    numbers = [scale * value for value in found.values()]
    if not numbers:
        return "–"
    spread = f" ± {statistics.stdev(numbers):.{digits}f}" if len(numbers) > 1 else ""
    return f"{statistics.mean(numbers):.{digits}f}{spread}"


def away(world):
    """The test of other data: for the rule the pairs that training lacks, else other colours and
    voices."""
    return {"rule": "test_unseen"}.get(world, "test_ood")


def world_name(world):
    if world == "wrong_0.0":
        return "clean labels"
    kind, _, value = world.partition("_")
    return NAMES[kind] + (f"{100 * float(value):.0f} %" if "." in value else value)


def table(head, lines):
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


# --------------------------------------------------------------------------------------------------
# Tables


def accuracy_table(results):
    """WAR at home and away, a line per world; where an arm has fewer seeds, their number."""
    lines = []
    for world in results:
        seeds = len(values(results, world, "grpo_think", "test.war"))
        line = [world_name(world), str(seeds)]
        for arm in ARMS:
            known = len(values(results, world, arm, "test.war"))
            fewer = f" ({known})" if known != seeds else ""
            line.append(f"{home_and_away(results, world, arm)}{fewer}" if known else "")
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
    lines = []
    for arm, owes in OWES.items():
        cells = [home_and_away(results, world, arm) for world in ("wrong_0.5", "confused_0.4")]
        lines.append([ARMS[arm], *owes, *cells])
    head = ["", "starts from", "learns from", "half wrong, uniformly", "40 % wrong, confused"]
    return table(head, lines)


def home_and_away(results, world, arm):
    home = values(results, world, arm, "test.war")
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
# Predictions: number in predictions.md -> [(claim, the numbers it is about, does it hold?)]


def predicted(results):
    """-> [(number, claim, measured, held)]"""

    def m(world, arm, figure):
        return mean(results, world, arm, figure)

    def war(world, arm):
        return m(world, arm, "test.war"), m(world, arm, f"{away(world)}.war")

    def gap(world, a, b, figure):
        return m(world, a, figure) - m(world, b, figure)

    found = []

    def claim(number, text, numbers, held):
        measured = ", ".join(f"{value:.1f}" for value in numbers)
        found.append([str(number), text, measured, "yes" if held else "**no**"])

    rival, rlvr = "label_only", "grpo_think"
    clean, half, confused = "wrong_0.0", "wrong_0.5", "confused_0.4"
    numbers = [war(clean, rival)[0], war(clean, rlvr)[0]]
    claim(1, "clean labels: both 100 on test", numbers, min(numbers) == 100)
    numbers = [war(clean, rival)[1], war(clean, rlvr)[1]]
    claim(1, "and less than 3 apart on test_ood", numbers, abs(numbers[0] - numbers[1]) < 3)

    shares = (0.1, 0.2, 0.3, 0.4, 0.5)
    for split, least in (("test", 97), ("test_ood", 85)):
        numbers = [m(f"wrong_{share}", rlvr, f"{split}.war") for share in shares]
        claim(2, f"RLVR at 10 to 50 % wrong: {least} on {split}", numbers, min(numbers) >= least)
    numbers = war("wrong_0.6", rlvr)
    claim(2, "RLVR at 60 %: 90 / 80", numbers, numbers[0] >= 90 and numbers[1] >= 80)
    numbers = [war("wrong_0.3", rival)[0]]
    claim(2, "label-only at 30 %: at least 97 on test", numbers, numbers[0] >= 97)
    numbers = war(half, rival)
    claim(2, "label-only at 50 %: at most 85 / 75", numbers, numbers[0] <= 85 and numbers[1] <= 75)
    numbers = [war("wrong_0.6", rival)[0]]
    claim(2, "label-only at 60 %: at most 65 on test", numbers, numbers[0] <= 65)

    numbers = war(confused, rival)
    claim(
        3,
        "confused at 40 %: label-only at most 88 / 70",
        numbers,
        numbers[0] <= 88 and numbers[1] <= 70,
    )
    numbers = war(confused, rlvr)
    claim(3, "RLVR at least 97 / 85", numbers, numbers[0] >= 97 and numbers[1] >= 85)
    numbers = [war("confused_0.2", rival)[0], war("confused_0.2", rlvr)[0]]
    claim(3, "at 20 % a tie on test (less than 4 apart)", numbers, abs(numbers[0] - numbers[1]) < 4)

    numbers = [war(half, "label_cold")[0]]
    claim(
        4,
        "labels alone from the cold start, 50 % wrong: at least 90 on test",
        numbers,
        numbers[0] >= 90,
    )
    numbers = [war(half, arm)[1] for arm in (rival, "label_cold", rlvr)]
    claim(4, "and on test_ood between the two", numbers, numbers == sorted(numbers))

    for number, arm, text in (
        (5, "own_correct", "own correct samples"),
        (6, "grpo_answer", "without think"),
    ):
        for world in (half, confused):
            numbers = [gap(world, rlvr, arm, f"{split}.war") for split in ("test", "test_ood")]
            claim(
                number,
                f"{world_name(world)}: {text} within 4 of RLVR (RLVR less it, test, test_ood)",
                numbers,
                max(map(abs, numbers)) <= 4,
            )

    numbers = [m(half, rlvr, "wrong.said_in")]
    claim(7, "50 % wrong: said in at most 20 % of its groups", numbers, numbers[0] <= 20)
    numbers = [m(half, rlvr, "wrong.weight")]
    claim(7, "and at most 25 % of the gradient's weight", numbers, numbers[0] <= 25)
    numbers = [m(half, rlvr, "wrong.said_in"), m(confused, rlvr, "wrong.said_in")]
    claim(7, "more under confusion", numbers, numbers[0] < numbers[1])

    for clips in (14, 42):
        numbers = [war(f"labelled_{clips}", arm)[1] for arm in (rival, rlvr)]
        held = abs(numbers[0] - numbers[1]) < 4
        claim(8, f"{clips} labels: a tie on test_ood (less than 4 apart)", numbers, held)

    numbers = [m("films", arm, "test.uar") for arm in (rival, rlvr)]
    claim(
        9, "rare emotions: label-only has the higher UAR on test", numbers, numbers[0] > numbers[1]
    )
    numbers = [m("films", arm, "test.recall.disgust") for arm in (rival, rlvr)]
    claim(9, "recall of disgust above 50, RLVR's below", numbers, numbers[0] > 50 > numbers[1])

    numbers = [war("rule", rival)[1], war("rule", rlvr)[1]]
    claim(10, "unseen pairs: label-only ahead by 10", numbers, numbers[0] - numbers[1] >= 10)
    numbers = [m("rule", rlvr, f"test_unseen.{name}_true") for name in ("face", "voice")]
    claim(10, "RLVR's statements there 95 % true", numbers, min(numbers) >= 95)
    numbers = [m("rule", rlvr, "test_unseen.epc")]
    claim(10, "its answers follow in less than half", numbers, numbers[0] < 50)

    numbers = [m("scene_0.0", "probe", "scene")]
    claim(11, "the towers carry the wall (probe at least 90)", numbers, numbers[0] >= 90)
    for arm, text, rule in (
        (rival, "label-only falls by at least 15 on test", lambda fall: fall >= 15),
        (rlvr, "RLVR by less than 5", lambda fall: fall < 5),
    ):
        fall = war("scene_0.0", arm)[0] - war("scene_1.0", arm)[0]
        claim(11, f"all walls tell: {text}", [fall], rule(fall))
    numbers = [
        war("scene_0.0", rival)[0] - war(world, rival)[0] for world in ("scene_0.9", "scene_1.0")
    ]
    claim(11, "label-only falls by less at 90 %", numbers, numbers[0] < numbers[1])

    order = (rlvr, "own_correct", "label_cold")
    for world in (clean, half):
        numbers = [m(world, arm, "kl") / 100 for arm in order]
        held = numbers == sorted(numbers)
        claim(12, f"{world_name(world)}: KL of RLVR < own correct samples < labels", numbers, held)

    truth = {
        world: min(m(world, rlvr, f"test.{name}_true") for name in ("face", "voice"))
        for world in results
        if values(results, world, rlvr, "test.face_true") and not world.startswith("early")
    }
    worst = min(truth, key=truth.get)
    claim(
        13,
        f"RLVR's statements 95 % true on test in every world (least: {world_name(worst)})",
        [truth[worst]],
        truth[worst] >= 95,
    )
    if not values(results, half, "label_kept", "kl"):  # without map.sh --all
        return found

    numbers = [gap(half, "own_correct", "label_kept", "test.war")]
    claim(
        14, "own correct samples less labels of kept clips: within 4", numbers, abs(numbers[0]) <= 4
    )
    numbers = [gap(half, "label_kept", "label_cold", "test_ood.war")]
    claim(
        14,
        "labels of kept clips less those of all, test_ood: at least 10",
        numbers,
        numbers[0] >= 10,
    )
    numbers = [war(half, "label_words")[1], war(half, rival)[1], war(half, "grpo_answer")[1]]
    held = abs(numbers[0] - numbers[1]) <= 8 and numbers[2] - numbers[0] >= 10
    claim(
        15,
        "labels from words: within 8 of label-only, 10 below GRPO without think, test_ood",
        numbers,
        held,
    )
    numbers = [m(clean, "label_words", "kl") / 100]
    claim(15, "clean labels: its KL at most 5", numbers, numbers[0] <= 5)
    return found


# --------------------------------------------------------------------------------------------------
# The figure


def draw(results, path):
    """Three panels: wrong labels, and what else a world may be like; thin dots are seeds."""
    figure = new_figure(13, 3.9)
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
        shift = (list(ARMS).index(arm) - len(ARMS) // 2) * 0.12
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
        "[worlds.py](../toy/worlds.py), [map.py](map.py). What follows from all this: "
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
        "KL from the model that training started from, in nats per completion, on `test`.\n",
        kl_table(results),
        "## Learning rates\n",
        "Chosen by WAR on validation with half of the labels wrong, there as in training; with "
        "seeds that are used for nothing else.\n",
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

"""Results of map.sh: read from runs/map, and as figures."""

import json
import statistics

from experiments.map import LR_SEEDS, LR_TRIED, OUT, WORLDS

NAMES = {
    "wrong": "labels wrong, uniformly: ",
    "confused": "labels wrong, confused: ",
    "labelled": "labelled clips: ",
    "films": "emotions as in films",
    "rule": "rule, unseen pairs",
    "scene": "walls that tell: ",
    "early": "a weak base, labels wrong: ",
}


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

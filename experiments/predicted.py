"""What predictions.md said, held against the results of map.sh.

Each prediction is a generator of claims: its text, the numbers that it is about, and whether it
holds. Numbers are means over seeds in percent; WAR but where something else is said."""

from experiments.map_results import away, mean, values, world_name

RIVAL, RLVR = "label_only", "grpo_think"
CLEAN, HALF, CONFUSED = "wrong_0.0", "wrong_0.5", "confused_0.4"


class Figures:
    """Of results, {world: {arm: {seed: figures}}}, what claims are about."""

    def __init__(self, results):
        self.results = results

    def of(self, world, arm, figure):
        return mean(self.results, world, arm, figure)

    def home(self, world, arm):
        return self.of(world, arm, "test.war")

    def away(self, world, arm):
        return self.of(world, arm, f"{away(world)}.war")


def clean_labels(f):
    numbers = [f.home(CLEAN, RIVAL), f.home(CLEAN, RLVR)]
    yield "clean labels: both 100 on test", numbers, min(numbers) == 100
    numbers = [f.away(CLEAN, RIVAL), f.away(CLEAN, RLVR)]
    yield "and less than 3 apart on test_ood", numbers, abs(numbers[0] - numbers[1]) < 3


def wrong_labels(f):
    shares = (0.1, 0.2, 0.3, 0.4, 0.5)
    for split, least in (("test", 97), ("test_ood", 85)):
        numbers = [f.of(f"wrong_{share}", RLVR, f"{split}.war") for share in shares]
        yield f"RLVR at 10 to 50 % wrong: {least} on {split}", numbers, min(numbers) >= least
    home, ood = f.home("wrong_0.6", RLVR), f.away("wrong_0.6", RLVR)
    yield "RLVR at 60 %: 90 / 80", [home, ood], home >= 90 and ood >= 80
    home = f.home("wrong_0.3", RIVAL)
    yield "label-only at 30 %: at least 97 on test", [home], home >= 97
    home, ood = f.home(HALF, RIVAL), f.away(HALF, RIVAL)
    yield "label-only at 50 %: at most 85 / 75", [home, ood], home <= 85 and ood <= 75
    home = f.home("wrong_0.6", RIVAL)
    yield "label-only at 60 %: at most 65 on test", [home], home <= 65


def confused_labels(f):
    home, ood = f.home(CONFUSED, RIVAL), f.away(CONFUSED, RIVAL)
    held = home <= 88 and ood <= 70
    yield "confused at 40 %: label-only at most 88 / 70", [home, ood], held
    home, ood = f.home(CONFUSED, RLVR), f.away(CONFUSED, RLVR)
    yield "RLVR at least 97 / 85", [home, ood], home >= 97 and ood >= 85
    numbers = [f.home("confused_0.2", RIVAL), f.home("confused_0.2", RLVR)]
    held = abs(numbers[0] - numbers[1]) < 4
    yield "at 20 % a tie on test (less than 4 apart)", numbers, held


def from_the_cold_start(f):
    home = f.home(HALF, "label_cold")
    yield "labels alone from the cold start, 50 % wrong: at least 90 on test", [home], home >= 90
    numbers = [f.away(HALF, arm) for arm in (RIVAL, "label_cold", RLVR)]
    yield "and on test_ood between the two", numbers, numbers == sorted(numbers)


def near_rlvr(arm, text):
    """-> the prediction that an arm is within 4 of RLVR under noise."""

    def prediction(f):
        for world in (HALF, CONFUSED):
            numbers = [f.home(world, RLVR) - f.home(world, arm)]
            numbers += [f.away(world, RLVR) - f.away(world, arm)]
            claim = f"{world_name(world)}: {text} within 4 of RLVR (RLVR less it, test, test_ood)"
            yield claim, numbers, max(map(abs, numbers)) <= 4

    return prediction


def why(f):
    said = f.of(HALF, RLVR, "wrong.said_in")
    yield "50 % wrong: said in at most 20 % of its groups", [said], said <= 20
    weight = f.of(HALF, RLVR, "wrong.weight")
    yield "and at most 25 % of the gradient's weight", [weight], weight <= 25
    numbers = [f.of(world, RLVR, "wrong.said_in") for world in ("wrong_0.4", CONFUSED)]
    yield "said in more under confusion (both at 40 %)", numbers, numbers[0] < numbers[1]


def few_labels(f):
    for clips in (14, 42):
        numbers = [f.away(f"labelled_{clips}", arm) for arm in (RIVAL, RLVR)]
        held = abs(numbers[0] - numbers[1]) < 4
        yield f"{clips} labels: a tie on test_ood (less than 4 apart)", numbers, held


def rare_emotions(f):
    numbers = [f.of("films", arm, "test.uar") for arm in (RIVAL, RLVR)]
    claim = "rare emotions: label-only has the higher UAR on test"
    yield claim, numbers, numbers[0] > numbers[1]
    numbers = [f.of("films", arm, "test.recall.disgust") for arm in (RIVAL, RLVR)]
    yield "recall of disgust above 50, RLVR's below", numbers, numbers[0] > 50 > numbers[1]


def unseen_pairs(f):
    numbers = [f.away("rule", RIVAL), f.away("rule", RLVR)]
    yield "unseen pairs: label-only ahead by 10", numbers, numbers[0] - numbers[1] >= 10
    numbers = [f.of("rule", RLVR, f"test_unseen.{name}_true") for name in ("face", "voice")]
    yield "RLVR's statements there 95 % true", numbers, min(numbers) >= 95
    follow = f.of("rule", RLVR, "test_unseen.epc")
    yield "its answers follow in less than half", [follow], follow < 50


def telling_walls(f):
    probe = f.of("scene_0.0", "probe", "scene")
    yield "the towers carry the wall (probe at least 90)", [probe], probe >= 90

    def fall(arm, share):
        return f.home("scene_0.0", arm) - f.home(f"scene_{share}", arm)

    most = fall(RIVAL, 1.0)
    yield "all walls tell: label-only falls by at least 15 on test", [most], most >= 15
    yield "all walls tell: RLVR by less than 5", [fall(RLVR, 1.0)], fall(RLVR, 1.0) < 5
    some = fall(RIVAL, 0.9)
    yield "label-only falls by less at 90 %", [some, most], some < most


def distance(f):
    for world in (CLEAN, HALF):
        numbers = [f.of(world, arm, "kl") / 100 for arm in (RLVR, "own_correct", "label_cold")]
        claim = f"{world_name(world)}: KL of RLVR < own correct samples < labels"
        yield claim, numbers, numbers == sorted(numbers)


def true_statements(f):
    """In the worlds that there were when it was written."""
    truth = {
        world: min(f.of(world, RLVR, f"test.{name}_true") for name in ("face", "voice"))
        for world in f.results
        if values(f.results, world, RLVR, "test.face_true") and not world.startswith("early")
    }
    worst = min(truth, key=truth.get)
    claim = f"RLVR's statements 95 % true on test in every world (least: {world_name(worst)})"
    yield claim, [truth[worst]], truth[worst] >= 95


def filter_or_samples(f):
    gap = f.home(HALF, "own_correct") - f.home(HALF, "label_kept")
    yield "own correct samples less labels of kept clips: within 4", [gap], abs(gap) <= 4
    gap = f.away(HALF, "label_kept") - f.away(HALF, "label_cold")
    yield "labels of kept clips less those of all, test_ood: at least 10", [gap], gap >= 10


def from_words(f):
    numbers = [f.away(HALF, arm) for arm in ("label_words", RIVAL, "grpo_answer")]
    words, labels, grpo = numbers
    claim = "labels from words: within 8 of label-only, 10 below GRPO without think, test_ood"
    yield claim, numbers, abs(words - labels) <= 8 and grpo - words >= 10
    kl = f.of(CLEAN, "label_words", "kl") / 100
    yield "clean labels: its KL at most 5", [kl], kl <= 5


def weak_base(f):
    clean, half = "early_0.0", "early_0.5"
    said = f.of(half, RLVR, "wrong.said_in")
    yield "a weak base, 50 % wrong: said in at least 15 % of its groups", [said], said >= 15
    loss = f.home(clean, RLVR) - f.home(half, RLVR)
    yield "RLVR loses by wrong labels at least 3 on test", [loss], loss >= 3
    gap = f.home(half, RLVR) - f.home(half, RIVAL)
    yield "and is at least 5 ahead of label-only", [gap], gap >= 5
    gap = f.home(clean, RIVAL) - f.home(clean, RLVR)
    yield "clean labels: label-only at least 3 ahead of RLVR", [gap], gap >= 3
    gap = f.home(clean, RLVR) - f.home(clean, "own_correct")
    yield "and RLVR at least 3 ahead of own correct samples", [gap], gap >= 3


def weak_base_from_words(f):
    clean, half = "early_0.0", "early_0.5"
    gap = f.home(clean, RLVR) - f.home(clean, "label_words")
    yield "a weak base, clean labels: RLVR less labels from words within 5", [gap], abs(gap) <= 5
    loss = f.home(clean, "label_words") - f.home(half, "label_words")
    yield "which lose at least 10 by half being wrong", [loss], loss >= 10


PREDICTIONS = {
    1: clean_labels,
    2: wrong_labels,
    3: confused_labels,
    4: from_the_cold_start,
    5: near_rlvr("own_correct", "own correct samples"),
    6: near_rlvr("grpo_answer", "without think"),
    7: why,
    8: few_labels,
    9: rare_emotions,
    10: unseen_pairs,
    11: telling_walls,
    12: distance,
    13: true_statements,
    14: filter_or_samples,
    15: from_words,
    16: weak_base,
    17: weak_base_from_words,
}
# These are about what only map.sh --all runs.
LATER = (14, 15, 16, 17)


def predicted(results):
    """-> [[number, claim, measured, does it hold?]], as text"""
    figures, rows = Figures(results), []
    for number, prediction in PREDICTIONS.items():
        if number in LATER and "early_0.5" not in results:
            continue
        for claim, numbers, held in prediction(figures):
            measured = ", ".join(f"{value:.1f}" for value in numbers)
            rows.append([str(number), claim, measured, "yes" if held else "**no**"])
    return rows

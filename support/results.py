"""Results files of evaluate.py, side by side: the paper's Table 1, and what is drawn of it."""

from pathlib import Path

from support.errors import read_json, require

PUBLISHED = {  # the paper's Table 1: WAR, UAR
    "HumanOmni-0.5B": {"DFEW": (22.64, 19.44), "MAFW": (20.18, 13.52), "RAVDESS": (7.33, 9.38)},
    "EMER-SFT": {"DFEW": (38.66, 35.31), "MAFW": (38.39, 28.02), "RAVDESS": (29.00, 27.19)},
    "MAFW-DFEW-SFT": {"DFEW": (60.23, 44.39), "MAFW": (50.44, 30.39), "RAVDESS": (29.33, 30.75)},
    "R1-Omni": {"DFEW": (65.83, 56.27), "MAFW": (57.68, 40.04), "RAVDESS": (43.00, 44.69)},
}
# The name of a manifest -> the data set's in the paper.
PAPERS_NAME = {
    f"{name.lower()}{test}": name for name in PUBLISHED["R1-Omni"] for test in ("", "_test")
}


def read_result(file, names=("war", "uar")):
    """A results file -> model, data set (dfew_test: DFEW), metrics, which have these names.

    Raises DataError."""
    result = read_json(Path(file))
    try:
        model, data, metrics = result["settings"]["model"], result["name"], result["metrics"]
        missing = [name for name in names if name not in metrics]
    except (KeyError, TypeError):
        missing = ["a name, settings or metrics"]
    require(not missing, f"{file}: is no result of evaluate.py, it lacks {', '.join(missing)}")
    return model, PAPERS_NAME.get(str(data).lower(), data), metrics


def scores_of(files, published=False):
    """Results files -> {model: {data set: (WAR, UAR)}}, in percent.

    published: the models of the paper's Table 1, too. Two results of one model on one data set, or
    a file that is none, are a DataError."""
    scores = {}
    for file in files:
        model, data, metrics = read_result(file)
        row = scores.setdefault(model, {})
        require(data not in row, f"{file}: a second result of {model} on {data}; give one of them")
        shares = metrics["war"], metrics["uar"]
        known = all(isinstance(share, (int, float)) for share in shares)
        require(known, f"{file}: its WAR and UAR are no numbers")
        row[data] = tuple(100 * share for share in shares)
    if published:
        scores |= {f"{model} (published)": row for model, row in PUBLISHED.items()}
    return scores


def results_table(files, published=False):
    """Results files -> the paper's layout in Markdown, with the counts below.

    Rows: checkpoints, columns: data sets."""
    scores = scores_of(files, published)
    columns = list(dict.fromkeys(data for row in scores.values() for data in row))
    lines = ["| method | " + " | ".join(f"{data} WAR | {data} UAR" for data in columns) + " |"]
    lines.append("|---" * (1 + 2 * len(columns)) + "|")
    for model, row in scores.items():
        values = [f"{row[d][0]:.2f} | {row[d][1]:.2f}" if d in row else "– | –" for d in columns]
        lines.append(f"| {model} | {' | '.join(values)} |")
    counts = ("n", "unknown", "unformatted", "truncated")
    lines += ["", "| method | data | n | unknown words | unformatted | truncated |"]
    lines.append("|---|---|---|---|---|---|")
    for file in files:
        model, data, metrics = read_result(file, counts)
        lines.append(f"| {model} | {data} | {' | '.join(str(metrics[name]) for name in counts)} |")
    return "\n".join(lines)

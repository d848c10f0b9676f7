"""What the README and the pages in docs/ say is so.

Their commands parse, the file tree is the real one, links lead to files that define what they name,
tables and numbers are those of the results files, every metric is explained."""

import ast
import importlib
import json
import re
import runpy
import shlex
import subprocess
import sys
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "experiments"))
import tables

import evaluate
import prepare
import show
import train_grpo
import train_sft
from support.flags import parse_flags
from support.results import PUBLISHED
from support.updates import log_line

PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
}
README = PAGES["README.md"]
# To find a sentence wherever its lines break.
FLOWING = {page: " ".join(text.split()) for page, text in PAGES.items()}
PRESETS = {train_grpo: {"paper": train_grpo.PAPER}, train_sft: {"paper": train_sft.PAPER}}


def code_blocks(text):
    return re.findall(r"(?:^ {4}.*\n)+", text, re.MULTILINE)


def commands():
    """(what Python runs, its arguments) of every command line in an indented block."""
    found = []
    for text in PAGES.values():
        for name, value in re.findall(r'^ {4}(\w+)="(.*)"$', text, re.MULTILINE):
            text = text.replace(f"${name}", value)
        for block in code_blocks(text):
            for line in block.replace("\\\n", " ").splitlines():
                found += commands_of(line)
    return found


def commands_of(line):
    if not re.match(r" {4}(python|torchrun|pip) ", line):
        return []
    found = []
    for part in " ".join(shlex.split(line, comments=True)).split(" && "):
        called = re.match(r"(?:python|torchrun --nproc_per_node=\d+) (-m \w+|\w+\.py)(.*)", part)
        if called:
            found.append((called[1], called[2].split()))
    return found


COMMANDS = [(script, words) for script, words in commands() if script != "-m pytest"]
SCRIPTS = sorted({script for script, _ in COMMANDS})


def test_there_are_commands_of_every_script():
    scripts = {"train_grpo.py", "train_sft.py", "evaluate.py", "prepare.py", "show.py"}
    assert set(SCRIPTS) == scripts | {"-m toy", "-m bench"}
    assert ("-m pytest", []) in commands()


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_commands_flags_are_in_the_help(script, monkeypatch, capsys):
    """Each script's --help explains itself and knows every flag that the pages give it."""
    own = [words for name, words in COMMANDS if name == script]
    subcommands = sorted({words[0] for words in own}) if script == "show.py" else [None]
    known = set()
    for subcommand in subcommands:
        monkeypatch.setattr(sys, "argv", [script, *([subcommand] if subcommand else []), "--help"])
        with pytest.raises(SystemExit, match="^0$"):
            if script.startswith("-m "):
                runpy.run_module(script[3:], run_name="__main__")
            else:
                runpy.run_path(ROOT / script, run_name="__main__")
        shown = capsys.readouterr().out
        assert "usage:" in shown
        known |= set(re.findall(r"--[a-z][a-z-]*", shown))
    for words in own:
        flags = {word for word in words if word.startswith("--")}
        assert flags <= known, f"{script} has no {flags - known}"


@pytest.mark.parametrize("script, words", COMMANDS, ids=lambda x: x if type(x) is str else None)
def test_the_commands_parse(script, words):
    """Values too: a choice that does not exist, or a number that makes no sense, is refused."""
    module = importlib.import_module(script.removesuffix(".py")) if ".py" in script else None
    if module in (train_grpo, train_sft, evaluate):
        parse_flags(module.Config, "", words, PRESETS.get(module))
    elif module is prepare:
        args, given = prepare.parse_args(words)
        prepare.check_flags(args.set, given)
    elif module is show:
        show.parse_args(words)


def test_flags_in_the_text_exist():
    known = {"--nnodes"}  # torchrun's
    for script in (train_grpo, train_sft, evaluate):
        known |= {"--" + f.name.replace("_", "-") for f in fields(script.Config)}
    known |= {flag.replace("--", "--no-") for flag in known}
    sources = [*ROOT.glob("*.py"), *ROOT.glob("toy/*.py"), *ROOT.glob("bench/*.py")]
    for path in sources:
        source = path.read_text(encoding="utf-8")
        known |= set(re.findall(r'(?:add_argument|add)\(\s*"(--[a-z-]+)"', source))
    for page, text in PAGES.items():
        flags = set(re.findall(r"`(--[a-z][a-z_-]*)", text))
        assert flags <= known, f"{page}: there is no {flags - known}"


def test_the_readme_is_half_an_hour():
    assert len(README.split()) <= 2500


# --------------------------------------------------------------------------------------------------
# Files and links


def test_the_file_tree_is_the_real_one():
    blocks = code_blocks(README)
    (block,) = [block for block in blocks if re.search(r"^ {4}model\.py ", block, re.MULTILINE)]
    listed = [line.split()[0] for line in block.splitlines()]
    try:
        files = subprocess.run(
            ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.split("\n")
    except (OSError, subprocess.CalledProcessError):  # not a clone
        paths = [*ROOT.glob("*.py"), *ROOT.glob("*/*.*")]
        files = [path.relative_to(ROOT).as_posix() for path in paths]
        files = [file for file in files if not re.match(r"runs/|\.|__|\w*venv\w*/", file)]
    real = {name for name in files if name.endswith(".py") and "/" not in name}
    real |= {name.split("/")[0] + "/" for name in files if "/" in name and not name.startswith(".")}
    assert set(listed) == real
    assert all((ROOT / name).exists() for name in listed)


def test_files_named_in_the_text_exist():
    for page, text in PAGES.items():
        for name in re.findall(r"`((?:experiments|tests|examples|toy|support)/[\w./]*)`", text):
            assert (ROOT / name).exists(), f"{page}: {name}"


LINKS = []  # (page, text, target) of every link that stays in the repository
for _page, _text in PAGES.items():
    for _link, _target in re.findall(r"\[((?:[^\[\]]|\n)+)\]\(([^)]+)\)", _text):
        if not _target.startswith("http"):
            LINKS.append((_page, " ".join(_link.split()), _target))


def headings(path):
    """The anchors that a page's headings have on GitHub."""
    lines = path.read_text(encoding="utf-8").splitlines()
    titles = [line.lstrip("# ").lower() for line in lines if line.startswith("#")]
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in titles}


def defined(path, name):
    """Is `name` (or Class.name) a function, a class or a constant of this file?"""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    for part in name.split("."):
        found = [node for node in body if getattr(node, "name", None) == part]
        for node in body:
            if isinstance(node, ast.Assign) and any(part == ast.unparse(t) for t in node.targets):
                found.append(node)
        if not found:
            return False
        body = getattr(found[0], "body", [])
    return True


@pytest.mark.parametrize("page, text, target", LINKS)
def test_links_lead_to_what_they_name(page, text, target):
    """To files, never to lines, which move; a function's name beside a file is defined in it."""
    file, _, anchor = target.partition("#")
    path = (ROOT / page).parent / file if file else ROOT / page
    assert path.exists()
    if anchor:
        assert path.suffix == ".md" and anchor in headings(path)
    if path.suffix == ".py":
        named = re.fullmatch(r"`([\w.]+)`", text)
        assert defined(path, named[1]) if named else text.endswith(path.name)


def test_no_page_points_at_lines():
    for page, text in PAGES.items():
        assert not re.search(r"#L\d|\.py:\d", text), page


def test_every_step_and_the_mathematics_are_linked():
    """Each of the six steps names functions of its own, in the order of the training loop."""
    section = README.split("## The six steps")[1].split("\n## ")[0]
    steps = re.split(r"^\d\. \*\*", section, flags=re.MULTILINE)[1:]
    wanted = [
        {"sample_groups", "Sampler"},
        {"reward_groups", "accuracy_reward", "format_reward"},
        {"logps_without_gradient", "completion_logps"},
        {"advantages_of", "group_advantages"},
        {"per_token_kl"},
        {"add_gradients", "grpo_loss"},
    ]
    assert len(steps) == len(wanted)
    for text, names in zip(steps, wanted):
        assert names <= set(re.findall(r"\[`(\w+)`\]\(", text))
    source = (ROOT / "train_grpo.py").read_text(encoding="utf-8")
    loop = source[source.index("in run.steps(") :]
    numbers = re.findall(r"^ +# (\d)\.(?:, (\d)\.)?", loop, re.MULTILINE)
    assert [n for pair in numbers for n in pair if n] == list("123456")


def test_the_readme_links_every_page_and_every_page_the_readme():
    linked = {target.partition("#")[0] for page, _, target in LINKS if page == "README.md"}
    assert set(PAGES) - {"README.md"} <= linked
    for page in set(PAGES) - {"README.md"}:
        assert (page, "chapter", "../README.md") in LINKS, page


# --------------------------------------------------------------------------------------------------
# Numbers


@pytest.mark.parametrize("page, name, figures", tables.QUOTED)
def test_tables_are_those_of_the_results_files(page, name, figures):
    facts = json.loads((ROOT / "experiments" / f"{name}.json").read_text())
    assert {"command", "date", "machine", "minutes", "torch"} <= facts.keys()
    assert tables.markdown_table(facts["results"], figures) in PAGES[page]
    assert tables.facts_line(facts) in FLOWING[page]


@pytest.mark.parametrize("name", ["table1", "ablations"])
def test_the_page_of_an_experiment_is_made_of_its_results(name):
    facts = json.loads((ROOT / "experiments" / f"{name}.json").read_text())
    page = (ROOT / "experiments" / f"{name}.md").read_text(encoding="utf-8")
    assert page == tables.page(name, facts)


def test_the_papers_table():
    for model, sets in PUBLISHED.items():
        numbers = " | ".join(f"{war:.2f} | {uar:.2f}" for war, uar in sets.values())
        assert f"| {model} | {numbers} |" in PAGES["docs/real_model.md"]
    assert tuple(PUBLISHED["R1-Omni"]) == ("DFEW", "MAFW", "RAVDESS")


def test_memory_is_what_was_counted():
    benchmarks = (ROOT / "BENCHMARKS.md").read_text(encoding="utf-8")
    lines = [line for line in benchmarks.splitlines() if re.match(r" +\d+ +\d+ +\d+ +\w", line)]
    # A line's first number with one decimal behind its settings is its peak.
    counted = {re.findall(r" (\d+\.\d) ", line)[0] for line in lines}
    text = FLOWING["docs/gpus.md"]
    quoted = re.search(
        r"needs (\d+\.\d) GiB; `--gradient-checkpointing` brings that to (\d+\.\d), "
        r"`--offload-optimizer` to (\d+\.\d), `--beta 0` to (\d+\.\d)",
        text,
    )
    small_card = re.search(r"\((\d+\.\d) GiB here", text)
    assert {*quoted.groups(), small_card[1]} <= counted


def test_numbers_of_single_runs_are_those_that_were_measured():
    runs = json.loads((ROOT / "experiments" / "runs.json").read_text())
    assert {"date", "machine", "seed"} <= runs.keys()
    for quote in runs["quoted"]:
        assert any(quote in text for text in FLOWING.values()), quote


def test_sizes_that_are_computed():
    """The largest tensor, and the towers' output of a clip, at full size."""
    V, rows, C = 151_936, 128, 512
    assert f"{4 * 512 * V / 1e6:.0f} MB at full" in FLOWING["README.md"]
    assert f"would take {4 * rows * C * V / 1e9:.0f} GB" in FLOWING["README.md"]
    features = 8 * 196 * 768 + 500 * 1280
    assert f"({2 * features / 1e6:.1f} MB per clip in bf16)" in FLOWING["docs/real_model.md"]
    p, G = 0.1, 8
    assert f"{100 * (p**G + (1 - p) ** G):.0f} % for G = 8" in FLOWING["README.md"]


def test_defaults_that_are_named_are_the_defaults():
    config, text = train_grpo.Config(), FLOWING["README.md"]
    assert f"B = {config.prompts} prompts × G = {config.group} completions" in text
    assert f"ε is {config.clip_eps}" in text
    assert config.lr == 2e-4 and "2·10⁻⁴ here" in text
    assert train_grpo.PAPER["lr"] == 1e-6 and "10⁻⁶ for the real model" in text
    assert config.clip_norm == 1 and "clipped to norm 1" in text
    assert f"`--val` every {config.val_every} updates" in text
    micro_batches = f"{config.micro_batch} by default, {train_grpo.PAPER['micro_batch']} with"
    assert micro_batches in FLOWING["docs/gpus.md"]
    saved = f"`--save-every`: {config.save_every} updates, {train_grpo.PAPER['save_every']} with"
    assert saved in FLOWING["docs/troubleshooting.md"]


def test_every_metric_is_explained():
    """What a run logs stands in docs/metrics.md, and nothing else does."""
    zeros, ones = torch.zeros(1, 2, 3), torch.ones(1, 2, 3, dtype=torch.bool)
    rollout = SimpleNamespace(
        batch=[None],
        mask=ones,
        sampled_logps=zeros,
        old_logps=zeros,
        ref_logps=zeros,
        ended=torch.ones(1, 2, dtype=torch.bool),
        rewards={name: torch.zeros(1, 2) for name in train_grpo.REWARDS},
    )
    step = dict.fromkeys(["loss", "kl", "clip_share", "grad_norm", "lr", "steps_left_out"], 0.0)
    logged = set(log_line(1, rollout, [step]))
    for path in [ROOT / "train_grpo.py", ROOT / "data.py", *ROOT.glob("support/*.py")]:
        phases = re.findall(r'timed\("(\w+)"\)', path.read_text(encoding="utf-8"))
        logged |= {f"seconds_{phase}" for phase in phases}
    logged |= {"peak_memory_gib", "val_war", "val_uar", "val_format", "loss_scale"}
    section = PAGES["docs/metrics.md"].split("## Metrics")[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == logged

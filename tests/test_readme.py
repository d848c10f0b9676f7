"""What the README says is so: its commands parse, its file tree is the real one, its links lead to the lines they name, its
tables are those of the results files."""

import ast
import json
import re
import shlex
import subprocess
import sys
from dataclasses import fields

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "experiments"))
import evaluate
import tables
import train_grpo
import train_sft
from evaluate import PUBLISHED

README = (ROOT / "README.md").read_text(encoding="utf-8")
TEXT = " ".join(README.split())  # to find a sentence wherever its lines break
BLOCKS = re.findall(r"(?:^ {4}.*\n)+", README, re.MULTILINE)


def commands():
    """(script, its arguments) of every command line in an indented block."""
    for block in BLOCKS:
        for line in block.replace("\\\n", " ").splitlines():
            words = (
                shlex.split(line, comments=True)
                if re.match(r" {4}(python|torchrun|pip) ", line)
                else []
            )
            for part in " ".join(words).split(" && "):
                found = re.match(r"(?:python|torchrun .*?) (\S+\.py)(.*)", part)
                if found:
                    yield found[1], found[2].split()


def test_there_are_commands_of_every_script():
    scripts = {script for script, _ in commands()}
    assert scripts >= {
        "train_grpo.py",
        "train_sft.py",
        "evaluate.py",
        "prepare.py",
        "toy.py",
        "data.py",
        "bench.py",
    }


@pytest.mark.parametrize("script", sorted({script for script, _ in commands()}))
def test_the_commands_parse(script):
    """Each script's --help explains itself and knows every flag that the README gives it."""
    subcommands = {
        words[0] for name, words in commands() if name == script and words and script == "data.py"
    } or {None}
    help_text = ""
    for sub in subcommands:
        done = subprocess.run(
            [sys.executable, str(ROOT / script), *([sub] if sub else []), "--help"],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0 and "usage:" in done.stdout, done.stderr
        help_text += done.stdout
    known = set(re.findall(r"--[a-z][a-z-]*", help_text))
    for name, words in commands():
        flags = {word for word in words if name == script and word.startswith("--")}
        assert flags <= known, f"{script} has no {flags - known}"


def test_flags_in_the_text_exist():
    known = {
        "--" + f.name.replace("_", "-")
        for script in (train_grpo, train_sft, evaluate)
        for f in fields(script.Config)
    }
    known |= {flag.replace("--", "--no-") for flag in known}
    known |= {
        flag
        for path in ROOT.glob("*.py")
        for flag in re.findall(r'add_argument\("(--[a-z-]+)"', path.read_text(encoding="utf-8"))
    }
    known |= {"--nnodes", "--nproc_per_node"}  # torchrun's
    assert set(re.findall(r"`(--[a-z][a-z_-]*)", README)) <= known


def test_the_file_tree_is_the_real_one():
    (block,) = [block for block in BLOCKS if re.search(r"^ {4}model\.py ", block, re.MULTILINE)]
    listed = [line.split()[0] for line in block.splitlines() if not line.startswith(" " * 8)]
    try:
        files = subprocess.run(
            ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.split("\n")
    except (OSError, subprocess.CalledProcessError):  # not a clone
        files = [
            path.relative_to(ROOT).as_posix()
            for pattern in ("*.py", "*/*.*")
            for path in ROOT.glob(pattern)
        ]
        files = [file for file in files if not re.match(r"runs/|\.|__|\w*venv\w*/", file)]
    real = {name for name in files if name.endswith(".py") and "/" not in name}
    real |= {name.split("/")[0] + "/" for name in files if "/" in name and not name.startswith(".")}
    assert {name for name in listed if name.endswith((".py", "/"))} == real
    assert all((ROOT / name).exists() for name in listed)


def definition(path, name):
    """First and last line of a function or class, or of a method Class.name, decorators included."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    for part in name.split("."):
        node = next(node for node in body if getattr(node, "name", None) == part)
        body = getattr(node, "body", [])
    return min([node.lineno, *(d.lineno for d in node.decorator_list)]), node.end_lineno


def step(path, number):
    """First and last line of a numbered step of the training loop: from its comment to the next blank line's or number's."""
    lines = path.read_text(encoding="utf-8").splitlines()
    first = next(i for i, line in enumerate(lines) if re.match(rf" +# (\d\., )?{number}\.", line))
    last = next(
        i
        for i in range(first + 1, len(lines))
        if not lines[i].strip() and re.match(r" +# [\dA-Z]", lines[i + 1])
    )
    return first + 1, last


LINKS = re.findall(r"\[([^\]]+)\]\((\w+\.py)#L(\d+)-L(\d+)\)", README)


@pytest.mark.parametrize("text, file, first, last", LINKS)
def test_links_lead_to_what_they_name(text, file, first, last):
    name = text.strip("`")
    lines = (
        step(ROOT / file, name.removeprefix("step "))
        if name.startswith("step ")
        else definition(ROOT / file, name)
    )
    assert (int(first), int(last)) == lines, f"[{text}] is {file}#L{lines[0]}-L{lines[1]}"


def test_every_step_and_the_mathematics_are_linked():
    texts = {text.strip("`") for text, *_ in LINKS}
    assert texts >= {f"step {n}" for n in (1, 2, 3, 4, 5)} | {
        "group_advantages",
        "per_token_kl",
        "grpo_loss",
        "completion_mask",
        "completion_logps",
    }
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target
    headings = {
        re.sub(r"[^\w\- ]", "", line.lstrip("# ")).lower().replace(" ", "-")
        for line in README.splitlines()
        if line.startswith("#")
    }
    assert set(re.findall(r"\]\(#([^)]+)\)", README)) <= headings


# ------------------------------------------------------------------------------------------------------------ numbers


@pytest.mark.parametrize("name, figures", tables.IN_README)
def test_tables_are_those_of_the_results_files(name, figures):
    facts = json.loads((ROOT / "experiments" / f"{name}.json").read_text())
    assert {"command", "date", "machine", "minutes", "torch"} <= facts.keys()
    assert (
        tables.markdown_table(tables.rows_with(facts["results"], figures), figures, tables.METHODS)
        in README
    )
    assert tables.facts_line(facts) in TEXT


@pytest.mark.parametrize("name", ["table1", "ablations"])
def test_the_page_of_an_experiment_is_made_of_its_results(name):
    facts = json.loads((ROOT / "experiments" / f"{name}.json").read_text())
    assert (ROOT / "experiments" / f"{name}.md").read_text(encoding="utf-8") == tables.page(
        name, facts
    )


def test_the_papers_table():
    for model, sets in PUBLISHED.items():
        numbers = " | ".join(f"{war:.2f} | {uar:.2f}" for war, uar in sets.values())
        assert f"| {model} | {numbers} |" in README
    assert tuple(PUBLISHED["R1-Omni"]) == ("DFEW", "MAFW", "RAVDESS")


def test_memory_is_what_was_counted():
    rows = [
        line.split()
        for line in (ROOT / "BENCHMARKS.md").read_text(encoding="utf-8").splitlines()
        if re.match(r" +\d+ +\d+ +\d+ +(yes|no) ", line)
    ]
    counted = {next(cell for cell in row[5:] if re.fullmatch(r"\d+\.\d", cell)) for row in rows}
    quoted = re.search(
        r"needs (\d+\.\d) GiB; `--gradient-checkpointing` brings that to (\d+\.\d), `--offload-optimizer` to (\d+\.\d), "
        r"`--beta 0` to (\d+\.\d)",
        TEXT,
    )
    assert quoted and all(
        number in counted
        for number in (*quoted.groups(), re.search(r"\((\d+\.\d) GiB here", README)[1])
    )


def test_times_are_those_that_were_measured():
    runs = json.loads((ROOT / "experiments" / "runs.json").read_text())
    assert {"date", "machine", "seed"} <= runs.keys()
    for quote in runs["quoted"]:
        assert quote in TEXT, quote

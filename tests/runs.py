"""What the tests of the scripts share: a small manifest, short commands, what a run leaves."""

import json
from pathlib import Path

from conftest import GOLDEN
from safetensors.torch import load_file

from data import QUESTION_REASONING
from support.run import Run

CHECKPOINT = str(GOLDEN / "tiny" / "humanomni")
CLIPS = [str(GOLDEN / "media" / name) for name in ("clip.mp4", "clip16k.mp4")]
LABELS = ["happy", "sad", "angry"]
# GRPO's numbers as in the paper, whatever the toy's are.
PAPER = "--beta 0.04 --updates-per-rollout 1".split()
# The smallest GRPO run and the smallest fine-tuning: of this model, decoded in this process.
GRPO = f"--model {CHECKPOINT} --prompts 2 --group 2 --max-new-tokens 4 --workers 0".split() + PAPER
SFT = f"--model {CHECKPOINT} --batch-size 2 --steps 1 --workers 0".split()
EVALUATE = f"--model {CHECKPOINT} --max-new-tokens 4 --workers 0".split()


def entry(i, answer=None, media="<video>\n<audio>\n", clip=None):
    """A manifest's entry number i: the two golden clips by turns."""
    human = {"from": "human", "value": media + QUESTION_REASONING}
    gpt = {"from": "gpt", "value": answer or LABELS[i % 3]}
    return {"video": str(clip or CLIPS[i % 2]), "conversations": [human, gpt]}


def write_manifest(path, entries=None):
    """Six labelled entries over the two golden clips, or these."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(entries or [entry(i) for i in range(6)]))
    return str(path)


def read_metrics(folder):
    """metrics.jsonl -> its first line, which holds the flags, and the others."""
    text = (Path(folder) / "metrics.jsonl").read_text()
    config, *lines = [json.loads(line) for line in text.splitlines()]
    return config, lines


def stop_in_update(monkeypatch, number):
    """Interrupt a GRPO run when it logs this update."""
    log = Run.log

    def stop(run, line, shown=None):
        if line["update"] == number:
            raise KeyboardInterrupt
        log(run, line, shown)

    monkeypatch.setattr(Run, "log", stop)


def without_times(lines):
    return [{key: x for key, x in line.items() if "second" not in key} for line in lines]


def result_of(out):
    """All that a run leaves, times aside: metrics, and file -> weights."""
    files = sorted(Path(out).rglob("model.safetensors"))
    weights = {str(file.relative_to(out)): load_file(file) for file in files}
    return without_times(read_metrics(out)[1]), weights


def assert_same_run(a, b):
    """The same bits."""
    (lines, weights), (expected_lines, expected_weights) = result_of(a), result_of(b)
    assert lines == expected_lines
    assert weights.keys() == expected_weights.keys() and weights
    for file, tensors in weights.items():
        assert tensors.keys() == expected_weights[file].keys()
        differing = [
            name for name in tensors if not tensors[name].equal(expected_weights[file][name])
        ]
        assert not differing, (file, differing[:3])

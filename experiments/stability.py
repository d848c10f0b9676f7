"""Does the default run keep its reasoning? The same command over seeds and numbers of CPU threads.

    python experiments/stability.py                               # seeds 0 to 9, 1 and 2 threads
    python experiments/stability.py --seeds 10 11 --threads 1 --flags "--lr 1e-4" --name slow

Each run is `python train_grpo.py` of the toy and, of its best/, an evaluation of sampled
completions on the test set: how often the statements in <think> are true, how often answer and
format are right. KL is the mean of the last ten updates. Runs go to runs/stability/NAME; what is
there is not done again. The table is printed, and written to runs/stability/NAME.md;
experiments/stability.md is made of such tables.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
COLUMNS = ("WAR", "KL", "largest KL", "accuracy", "format", "face true", "voice true", "updates")


def run(folder, seed, threads, flags):
    """One run and its evaluation, unless its result is there."""
    if (folder / "sampled" / "test.json").exists():
        return
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    train = [sys.executable, str(ROOT / "train_grpo.py"), "--seed", str(seed)]
    train += ["--out", str(folder), "--show-every", "0", *flags]
    sample = [sys.executable, str(ROOT / "evaluate.py"), "--model", str(folder / "best")]
    sample += ["--data", "runs/toy/test.json", "--temperature", "1", "--samples", "4"]
    sample += ["--max-new-tokens", "64", "--batch-size", "70", "--workers", "0"]
    sample += ["--check", "toy.world:check_statements", "--out", str(folder / "sampled")]
    for command in (train, sample):
        with open(folder.with_suffix(".log"), "a", encoding="utf-8") as log:
            subprocess.run(command, env=environment, stdout=log, stderr=log, check=True)


def read(folder):
    """A finished run -> one value per column."""
    sampled = json.loads((folder / "sampled" / "test.json").read_text(encoding="utf-8"))["metrics"]
    after = json.loads((folder / "results.json").read_text(encoding="utf-8"))["after"]["test"]
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[1:]
    updates = [json.loads(line) for line in lines]
    shares = (sampled["war"], sampled["format"], sampled["face_true"], sampled["voice_true"])
    kl = [update["kl"] or 0.0 for update in updates]  # None without a reference
    values = [100 * after["war"], sum(kl[-10:]) / 10, max(kl), *(100 * share for share in shares)]
    return [*values, len(updates)]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(10)))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--flags", default="", help="further flags of train_grpo.py, as one text")
    parser.add_argument("--name", default="default", help="of the setting, for folder and table")
    args = parser.parse_args()
    folder = Path("runs/stability") / args.name
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"| seed | threads | {' | '.join(COLUMNS)} |", "|---" * (2 + len(COLUMNS)) + "|"]
    for threads in args.threads:
        for seed in args.seeds:
            place = folder / f"seed_{seed}_threads_{threads}"
            run(place, seed, threads, args.flags.split())
            war, kl, largest_kl, accuracy, form, face, voice, updates = read(place)
            lines.append(
                f"| {seed} | {threads} | {war:.1f} | {kl:.3f} | {largest_kl:.3f} | {accuracy:.1f} "
                f"| {form:.1f} | {face:.1f} | {voice:.1f} | {updates} |"
            )
            print(lines[-1], flush=True)
    folder.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

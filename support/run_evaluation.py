"""What a GRPO run is measured by: tests before and after, validation on the way."""

import random
from dataclasses import asdict

import torch
from tqdm import tqdm

from data import clips_of
from evaluate import Settings, evaluate, percent, score, unique_names
from model import HumanOmni
from show import draw_curves
from support.custom import find_function
from support.errors import write_json
from support.flags import read_examples
from support.ranks import on_first_rank

EXAMPLES = 12  # completions of all tests together that results.json has before and after


class RunEvaluation:
    """What a GRPO run is measured by: --test before and after, --val on the way, always greedy."""

    def __init__(self, omni, config):
        self.omni, self.config = omni, config
        self.settings = Settings(
            max_new_tokens=config.max_new_tokens,
            workers=config.workers,
            compile=config.compile,
            check=find_function("--check", config.check) if config.check else None,
        )
        names = unique_names(config.test)
        self.tests = {name: self._open([path]) for name, path in zip(names, config.test)}
        self.val = self._open(config.val) if config.val else None

    def _open(self, manifests):
        examples = read_examples(manifests, self.config)
        return clips_of(self.omni.model, examples, self.config.fit, keep=True)

    def _test_all(self, run, when):
        results = {}
        for name, clips in self.tests.items():
            log = run.skip_log(f"skipped_{name}.txt")
            rows = evaluate(self.omni, clips, self.settings, f"{name}, {when}", skip_log=log)
            results[name] = score(rows) | {"examples": self._examples(rows, clips)}
        return results

    def _examples(self, rows, clips):
        """Some of a test's rows for the page that show.py makes of a run: the same clips before and
        after."""
        count = min(len(rows), max(1, EXAMPLES // len(self.tests)))
        chosen = sorted(random.Random(0).sample(range(len(rows)), count))
        return [rows[i] | {"modality": clips.examples[rows[i]["index"]].modality} for i in chosen]

    def before(self, run):
        """Evaluate the model that training starts from, unless that has been done."""
        if "before" not in run.facts:
            run.facts["before"] = self._test_all(run, "before")
            run.facts["best_war"] = -1.0  # whatever is validated first is better
            run.save()

    def due(self, update):
        return update % self.config.val_every == 0 or update == self.config.updates

    def validate(self, line, run):
        """Evaluate on --val: into an update's line of metrics, and the curves. Keep the best model.

        The model that training started from is not among those that can be the best."""
        if self.val:
            log = run.skip_log("skipped_validation.txt")
            rows = evaluate(self.omni, self.val, self.settings, "validation", skip_log=log)
            result = score(rows)
            line |= {f"val_{name}": result[name] for name in ("war", "uar", "format")}
            tqdm.write(
                f"\nupdate {line['update']} · validation WAR {100 * result['war']:.1f}  "
                f"format {percent(result['format'])}"
            )
            if result["war"] >= run.facts["best_war"]:  # on a tie the later, which has seen more
                run.facts["best_war"] = result["war"]
                self._save(run.folder / "best")
        on_first_rank(lambda: draw_curves([*run.metrics, line], run.folder / "curves.png"))

    def _save(self, folder):
        dtype = getattr(torch, self.config.save_dtype)
        on_first_rank(lambda: self.omni.model.save_pretrained(folder, dtype))

    def after(self, run):
        """Save last/, evaluate best/ (or else the last) on --test, write and print the results."""
        out = run.folder
        self._save(out / "last")
        if (out / "best").exists():  # evaluated in the policy's place, which has been saved
            best = HumanOmni.from_pretrained(out / "best")
            self.omni.model.load_state_dict(best.state_dict())
        before, after = run.facts["before"], self._test_all(run, "after")
        results = {"config": asdict(self.config), "before": before, "after": after}
        on_first_rank(lambda: write_json(out / "results.json", results))
        run.finish()
        if self.tests:
            print(f"\n{'':18}{'WAR':>8}{'UAR':>8}{'format':>8}{'length':>8}")
        for name in self.tests:
            for when in ("before", "after"):
                r = results[when][name]
                print(
                    f"{name:10}{when:8}{100 * r['war']:8.2f}{100 * r['uar']:8.2f}"
                    f"{100 * r['format']:8.1f}{r['mean_length']:8.1f}"
                )
        print(f"\n{len(run.metrics)} updates; checkpoints, metrics, curves, results in {out}")

"""What a training run leaves on disk, so that it may be killed at any moment and go on unharmed.

    run = Run("runs/grpo", config, inputs)      # a new folder, or the unfinished run that is in it
    run.track(parameters, adamw)                # what was saved comes back into both
    for step, batch in run.steps(batches, 100, "grpo"):     # those still to do
        ...
        run.log({"update": step, ...})          # a line of metrics.jsonl, kept in run.metrics too
    run.finish()

After SIGINT or SIGTERM a step that has begun is finished and saved, and the script ends.

A state is one file, state/000040.safetensors: weights and optimizer moments in float32 as tensors,
and in its header, as JSON, the step, the flags, the length of metrics.jsonl at that moment and
whatever the script keeps in run.facts. It is written under another name, synced and renamed, so
that a file that is there is whole. Nothing is pickled.

A resumed run repeats what was done after the last state; on a CPU it gets the same bits, because
nothing random depends on more than the seed and the step.
"""

import errno
import fnmatch
import json
import math
import os
import shutil
import signal
import sys
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from checkpoint import COMPANIONS, CheckpointError, save_tensors, sync
from support.clock import lap, timed
from support.errors import DataError, naming
from support.flags import Common, flag
from support.ranks import RANK, leave_together, on_first_rank, rank_file, true_on_any_rank

try:
    import fcntl
except ImportError:  # Windows: two processes on one folder are then not noticed
    fcntl = None


@dataclass
class TrainingFlags(Common):
    """Flags of both training scripts: what is saved, and what happens when something goes wrong."""

    save_every: int = flag(
        10, "steps between saved states, from which a stopped run goes on", least=1
    )
    keep: int = flag(2, "states kept, newest first", least=1)
    resume: bool = flag(
        True,
        "go on with the unfinished run in --out; else it is kept under a number",
    )
    override: bool = flag(
        False, "go on even if flags or input files are not those of the unfinished run"
    )
    skip_nonfinite: bool = flag(
        False, "pass over steps with a NaN or an infinity, instead of stopping"
    )
    offload_optimizer: bool = flag(
        False,
        "keep AdamW's moments in main memory between steps: up to 4 GiB of a GPU less, and slower",
    )
    save_dtype: str = flag(
        "bfloat16",
        "of the saved weights; on a GPU what is frozen is bfloat16 already",
        choices=("bfloat16", "float16", "float32"),
    )


# Flags that do not change what a run computes while all goes well: it may go on with others.
FREE = set(
    "save_every keep resume override out workers show_every on_bad_clip skip_nonfinite "
    "offload_optimizer log_completions".split()
)

# What the training scripts write into an output folder: a run's own, and a checkpoint's files.
WRITTEN = (
    "metrics.jsonl curves.png results.json best last state state.done checkpoint skipped*.txt "
    "nonfinite_*.json completions*.jsonl page.html made_from.json text_metrics.jsonl *.partial "
    ".*.saving config.json model.safetensors siglip whisper bert"
).split()
WRITTEN += [Path(name).parts[0] for name in COMPANIONS]


def make_room(out, inputs=()):
    """An output folder that may be written: not there yet, or empty.

    What an earlier run of ours left there is kept under a number. Anything else is not touched: a
    folder with other things in it, one that is a link, a mount or the working directory, or holds
    one of the `inputs` (paths that this run reads), is a DataError."""
    out = Path(out)
    check_room(out, inputs)
    if out.is_dir() and any(out.iterdir()):
        number = next(n for n in range(1, 10_000) if not out.with_name(f"{out.name}.{n}").exists())
        kept = out.rename(out.with_name(f"{out.name}.{number}"))
        print(f"{out} is kept as {kept}")
    out.parent.mkdir(parents=True, exist_ok=True)
    return out


def _check_ours(out, inputs):
    """Raise DataError unless the folder holds an earlier run, nothing else, and can be renamed."""
    try:
        with open(out / "metrics.jsonl", encoding="utf-8") as file:
            ours = "config" in dict(json.loads(file.readline()))
    except (OSError, ValueError, TypeError):
        ours = False
    foreign = [
        entry.name
        for entry in sorted(out.iterdir())
        if not any(fnmatch.fnmatch(entry.name, pattern) for pattern in WRITTEN)
    ]
    if foreign or not ours:
        reason = f"holds {foreign[0]}" if foreign else "holds no run of this program"
        raise DataError(f"{out}: {reason}, so it is left as it is; choose another --out")
    _check_movable(out)
    for path in inputs:
        if Path(path).resolve().is_relative_to(out.resolve()):
            raise DataError(
                f"{out}: holds an earlier run with {path}, which this reads; choose another --out"
            )


def _check_movable(out):
    if out.is_symlink() or out.is_mount() or Path.cwd().resolve().is_relative_to(out.resolve()):
        raise DataError(
            f"{out}: is a link, a mount or where you are, so it can be neither renamed nor "
            "replaced; choose another --out"
        )


def check_room(out, inputs=(), replaced=False):
    """Raise the DataError that make_room would raise, before hours of work.

    replaced: a folder will be put in its place, and not files into it."""
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise DataError(f"{out}: is a file; choose another --out")
    if out.is_dir() and any(out.iterdir()):
        _check_ours(out, inputs)
    if replaced and out.exists():
        _check_movable(out)


def input_paths(config):
    """All files and folders that a run reads, as given."""
    folders = [config.model, config.siglip, config.whisper, config.bert, config.media_root]
    manifests = [*config.data, *getattr(config, "val", ()), *getattr(config, "test", ())]
    return [path for path in (*folders, *manifests) if path]


def input_files(config):
    """Facts by which changed input is noticed: weights by size and time, manifests by content."""
    facts = {}
    for name in ("model", "siglip", "whisper", "bert"):
        folder = getattr(config, name)
        if folder:
            files = sorted(Path(folder).glob("*.safetensors"))
            facts[f"weights in --{name}"] = [
                [file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files
            ]
    for path in (*config.data, *getattr(config, "val", ()), *getattr(config, "test", ())):
        facts[str(path)] = zlib.crc32(Path(path).read_bytes())
    return facts


class Run:
    """One training run in its folder.

    config   a dataclass with TrainingFlags
    inputs   JSON-able facts about the input files; these and the flags, but for FREE, must be the
             same to go on

    step     steps done, by earlier processes too
    facts    JSON-able dict of the script's own, saved with every state
    metrics  the lines logged so far, by earlier processes too
    """

    def __init__(self, folder, config, inputs):
        self.folder, self.states = Path(folder), Path(folder) / "state"
        self.config, self.progress = config, None
        self.step, self.facts, self.metrics, self.parameters = 0, {}, [], {}
        settings = {"flags": asdict(config), "inputs": inputs}
        self.settings = json.loads(json.dumps(settings, default=str))
        # Rank 0 opens the folder and holds it; the others are told what is in it.
        self.saved, self.step, self.facts, self.metrics = on_first_rank(self._open)
        self.asked_to_stop = self.in_step = False
        self.handlers = {
            number: signal.signal(number, self._on_signal)
            for number in (signal.SIGINT, signal.SIGTERM)
        }

    def skip_log(self, name):
        """This rank's file of clips that are left out; None if they are to stop the run."""
        return rank_file(self.folder / name) if self.config.on_bad_clip == "skip" else None

    # ----------------------------------------------------------------------------------------------
    # What is found

    def _open(self):
        """The folder as it is found, or a new one -> newest state or None, step, facts, metrics."""
        try:
            if any(self.states.glob("*")) and not (self.states / "lock").exists():
                raise DataError(
                    f"{self.states}: is of no run of this program; choose another --out"
                )
            if self.states.exists():
                self._lock()
            newest = max(self.states.glob("*.safetensors"), default=None)
            self.saved = newest if self.config.resume else None
            if not self.saved:
                files = [file for file in self.folder.glob("*") if file != self.states]
                if newest or any(file.stat().st_size for file in files):  # else: killed at birth
                    make_room(self.folder, input_paths(self.config))
                self.states.mkdir(parents=True, exist_ok=True)
                self._lock()
            for torn in self.states.glob("*.tmp"):
                torn.unlink()
            metrics_bytes, changed = self._read_state() if self.saved else (0, False)
            self._open_metrics(metrics_bytes, changed)
        except OSError as error:
            raise DataError(
                f"{self.folder}: cannot be written ({error}); choose another --out"
            ) from None
        return self.saved, self.step, self.facts, self.metrics

    def _lock(self):
        # A lock of the process, not of the file: workers that outlive a killed process hold none.
        self.lock = open(self.states / "lock", "w")  # noqa: SIM115
        if not fcntl:
            return
        try:
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                print(
                    f"warning: {self.folder} is on a file system without locks "
                    f"({error.strerror}); a second process on this run would not be noticed",
                    file=sys.stderr,
                )
                return
            raise DataError(
                f"{self.folder}: another process is at work on this run; wait for it, or choose "
                "another --out"
            ) from None

    def _read_state(self):
        """Take over what the newest state says.

        -> the length of metrics.jsonl then, and whether flags or files have changed since"""
        try:
            with safe_open(self.saved, "pt") as file:
                state = json.loads(file.metadata()["run"])
            self.step, self.facts = state["step"], state["facts"]
            old, metrics_bytes = state["settings"], state["metrics_bytes"]
            differing = self._differences(old, self.settings)
        except (SafetensorError, OSError, TypeError, KeyError, ValueError) as error:
            raise self._damaged(error) from None
        if differing and not self.config.override:
            raise DataError(
                f"{self.folder}: holds an unfinished run, saved after step {self.step}, of which\n"
                "  "
                + "\n  ".join(differing)
                + "\nGive the same flags to go on with it, or --override to go on with these; "
                "--no-resume keeps it under a number and starts anew, as does another --out"
            )
        print(f"{self.folder}: going on after step {self.step}")
        return metrics_bytes, bool(differing)

    @staticmethod
    def _differences(old, new):
        """What is not as it was, in words."""
        found = []
        for name, value in new["flags"].items():
            before = old["flags"].get(name)
            if name not in FREE and before != value:
                found.append(f"--{name.replace('_', '-')} was {before!r}, is {value!r}")
        for name in old["inputs"] | new["inputs"]:
            if old["inputs"].get(name) != new["inputs"].get(name):
                found.append(f"{name} is not what it was")
        return found

    def _open_metrics(self, metrics_bytes, changed):
        """metrics.jsonl is cut back to what it was at the state: the rest will be done again."""
        path = self.folder / "metrics.jsonl"
        way_on = "put it back, or start anew with --no-resume"
        self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115
        if self.file.tell() < metrics_bytes:
            raise DataError(
                f"{path}: is shorter than when the run's last state was saved; {way_on}"
            )
        self.file.truncate(metrics_bytes)
        try:
            lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        except ValueError as error:
            raise DataError(f"{path}: is not as this run wrote it ({error}); {way_on}") from None
        self.metrics = [line for line in lines if "config" not in line]
        if not self.saved:
            self.save()  # from here on the folder is known for an unfinished run
        if changed or metrics_bytes == 0:
            line = {"config": self.settings["flags"]}
            if changed:
                line["after_step"] = self.step
            self._write_line(line)

    def _damaged(self, error):
        return CheckpointError(
            f"{self.saved}: not a whole state of this run ({error}); delete it to go on from the "
            "state before it, or start anew with --no-resume"
        )

    # ----------------------------------------------------------------------------------------------
    # What is saved

    def track(self, parameters, optimizer):
        """What save() saves from now on: name -> parameter, and torch's optimizer of them.

        If the run is being resumed, they get the values that were saved. Only here does a run write
        into a model: what was copied or loaded elsewhere, as GRPO's reference, stays as it is."""
        self.parameters, self.optimizer = parameters, optimizer
        if not self.step:
            return
        try:
            with safe_open(self.saved, "pt") as file, torch.no_grad():
                names = set(file.keys())
                missing = {f"weight/{name}" for name in parameters} - names
                if missing:
                    raise KeyError(f"no {min(missing)}")
                for key in names:
                    self._restore(key, file.get_tensor(key))
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise self._damaged(error) from None

    def _restore(self, key, tensor):
        """One tensor of a state; key: KIND/PARAMETER, where KIND is weight or a moment's name."""
        kind, name = key.split("/")
        parameter = self.parameters[name]
        # A clone lies where torch puts it, not where the file happens to: vector code then gives
        # the same bits.
        tensor = tensor.clone().to(parameter.device)
        if tensor.dim() and tensor.shape != parameter.shape:
            raise ValueError(f"{key} is {tuple(tensor.shape)}, not {tuple(parameter.shape)}")
        if kind == "weight":
            parameter.copy_(tensor)
        else:
            self.optimizer.state[parameter][kind] = tensor

    def save(self):
        """Write the state of now, and remove those that are older than the newest --keep."""
        if RANK:
            return  # all ranks hold the same
        tensors = {}
        for name, parameter in self.parameters.items():
            if self.step:
                tensors[f"weight/{name}"] = parameter.detach()
            for kind, moment in self.optimizer.state.get(parameter, {}).items():
                tensors[f"{kind}/{name}"] = moment
        self.file.flush()
        state = {
            "step": self.step,
            "facts": self.facts,
            "settings": self.settings,
            "metrics_bytes": self.file.tell(),
        }
        path = self.states / f"{self.step:06}.safetensors"
        temporary = path.with_suffix(".tmp")
        try:
            os.fsync(self.file.fileno())
            save_tensors(tensors, temporary, {"run": json.dumps(state)})
            sync(temporary)
            os.replace(temporary, path)
            sync(self.states)
        except (OSError, SafetensorError) as error:
            temporary.unlink(missing_ok=True)
            raise CheckpointError(
                f"{path}: cannot be written ({error}); states saved before are whole: make room, "
                "and run the same command again to go on from the last one"
            ) from None
        for old in sorted(self.states.glob("*.safetensors"))[: -self.config.keep]:
            old.unlink()

    # ----------------------------------------------------------------------------------------------
    # Steps

    def steps(self, batches, total, title=""):
        """Yield (step, batch) for the steps that are left of `total`, with a progress bar.

        Batches come in the order of the steps that are left. States are saved between steps. A step
        whose batch is empty on any rank (all its clips are bad) is left out on all."""
        self.in_step = True
        with tqdm(
            total=total, initial=self.step, desc=title, unit="step", disable=RANK > 0
        ) as self.progress:
            for step in range(self.step + 1, total + 1):
                lap()  # what came between two steps, as validation, belongs to neither
                with timed("data"):
                    batch = next(batches, None)
                if not true_on_any_rank(not batch):
                    yield step, batch
                self.progress.update()
                self.step = step
                # A signal may reach one rank before another.
                stop = true_on_any_rank(self.asked_to_stop)
                if stop or step % self.config.save_every == 0 or step == total:
                    self.save()
                if stop:
                    leave_together()
                    self._stop()
        self.in_step = False

    def _on_signal(self, number, frame):
        """SIGINT, SIGTERM: a step that has begun is finished and saved; a second one stops at
        once."""
        if self.asked_to_stop:
            raise KeyboardInterrupt
        self.asked_to_stop = True
        if not self.in_step:
            self._stop()
        if RANK == 0:
            message = "\nfinishing this step, then saving; once more to stop at once"
            tqdm.write(message, file=sys.stderr)

    def _stop(self):
        print(
            f"\nstopped after step {self.step}, saved in {self.states}; to go on, run the same "
            "command again"
        )
        sys.exit(0)

    def log(self, line, shown=None):
        """Append to metrics.jsonl; NaN and infinity are written as null. shown: on the progress
        bar.

        A sudden jump of the gradient norm is said."""
        for name, value in line.items():
            if isinstance(value, float) and not math.isfinite(value):
                line[name] = None
        norms = [old["grad_norm"] for old in self.metrics[-50:] if old["grad_norm"] is not None]
        norm = line["grad_norm"]
        if len(norms) >= 10 and norm is not None and norm > 10 * median(norms):
            tqdm.write(
                f"gradient norm {norm:.3g}: the median of the last {len(norms)} steps is "
                f"{median(norms):.3g}"
            )
        self.metrics.append(line)
        if RANK == 0:
            self._write_line(line)
        if shown:
            numbers = {name: f"{line[name]:.3g}" for name in shown if line.get(name) is not None}
            self.progress.set_postfix(numbers)

    def _write_line(self, line):
        with naming(self.folder / "metrics.jsonl"):
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()

    def finish(self):
        """All is done and written elsewhere: the states go, the next run here is a new one."""
        if RANK == 0:
            self.file.close()
            # Renamed first: there is no half-removed state.
            done = self.states.rename(self.states.with_name("state.done"))
            shutil.rmtree(done)
            self.lock.close()
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

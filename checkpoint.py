"""What a training run leaves on disk, so that it may be killed at any moment and go on as if nothing had happened.

    run = Run("runs/grpo", config, inputs)        # a new folder, or the unfinished run of the same flags that is in it
    run.track(parameters, optimizer)              # name -> parameter; what was saved comes back into both
    for update in run.steps(100):                 # those still to do; after SIGINT or SIGTERM it saves and the script ends
        ...
        run.log({"update": update, ...})          # a line of metrics.jsonl, kept in run.metrics too
    run.finish()

A state is one file, state/000040.safetensors: weights and optimizer moments in float32 as tensors, and in its header, as
JSON, the step, the flags, the length of metrics.jsonl at that moment and whatever the script keeps in run.facts. It is
written under another name, synced and renamed, so that a file that is there is whole. Nothing is pickled.

A resumed run repeats what was done after the last state; on a CPU it gets the same bits, because nothing random
depends on more than the seed and the step.
"""

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
from safetensors.torch import save_file
from tqdm import tqdm

from common import Common, flag
from distributed import RANK, add, first
from errors import DataError, TrainingError
from model import CheckpointError, sync

try:
    import fcntl
except ImportError:  # Windows: two processes on one folder are then not noticed
    fcntl = None


@dataclass
class TrainingFlags(Common):
    """Flags of both training scripts: what is saved, and what happens when something goes wrong."""
    save_every: int = flag(10, "steps between saved states, from which a stopped run goes on", least=1)
    keep: int = flag(2, "states kept, newest first", least=1)
    resume: bool = flag(True, "go on with the unfinished run in --out; --no-resume keeps it under a number and starts anew")
    override: bool = flag(False, "go on even if flags or input files are not those of the unfinished run")
    skip_nonfinite: bool = flag(False, "pass over steps with a NaN or an infinity, instead of stopping")
    offload_optimizer: bool = flag(False, "keep AdamW's moments in main memory between steps: up to 4 GiB of a GPU less, and slower")
    save_dtype: str = flag("bfloat16", "of the saved weights; on a GPU what is frozen is bfloat16 already",
                           choices=("bfloat16", "float16", "float32"))


# Flags that do not change what a run computes while all goes well: it may go on with others.
FREE = {"save_every", "keep", "resume", "override", "out", "workers", "show_every", "on_bad_clip", "skip_nonfinite",
        "offload_optimizer"}


def make_room(out):
    """An output folder that is not there yet; what an earlier run left is kept under a number."""
    out = Path(out)
    if out.exists() and any(out.iterdir()):
        number = next(n for n in range(1, 10_000) if not out.with_name(f"{out.name}.{n}").exists())
        kept = out.rename(out.with_name(f"{out.name}.{number}"))
        print(f"{out} is kept as {kept}")
    out.parent.mkdir(parents=True, exist_ok=True)
    return out


def input_files(config):
    """Facts by which changed input is noticed: weights by size and time of change, manifests by content."""
    weights = {f"weights in --{name}": [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in sorted(Path(folder).glob("*.safetensors"))]
               for name in ("model", "siglip", "whisper", "bert") if (folder := getattr(config, name))}
    manifests = [*config.data, *getattr(config, "val", ()), *getattr(config, "test", ())]
    return weights | {str(path): zlib.crc32(Path(path).read_bytes()) for path in manifests}


class Run:
    """One training run in its folder.

    config   a dataclass with TrainingFlags
    inputs   JSON-able facts about the input files; these and the flags, but for FREE, must be the same to go on

    step     steps done, by earlier processes too
    facts    JSON-able dict of the script's own, saved with every state
    metrics  the lines logged so far, by earlier processes too
    """

    def __init__(self, folder, config, inputs):
        self.folder, self.states = Path(folder), Path(folder) / "state"
        self.save_every, self.keep = config.save_every, config.keep
        self.step, self.facts, self.metrics, self.parameters = 0, {}, [], {}
        self.settings = json.loads(json.dumps({"flags": asdict(config), "inputs": inputs}, default=str))
        # Rank 0 opens the folder and holds it; the others are told what is in it.
        self.saved, self.step, self.facts, self.metrics = first(lambda: self._open(config))
        self.asked_to_stop = self.in_step = False
        self.handlers = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}

    def _open(self, config):
        """The folder as it is found, or a new one -> newest state's file or None, step, facts, metrics."""
        try:
            if self.states.exists():
                self._lock()
            saved = max(self.states.glob("*.safetensors"), default=None)
            self.saved = saved if config.resume else None
            if not self.saved:
                if saved or any(file.stat().st_size for file in self.folder.glob("*") if file != self.states):  # else: killed at birth
                    make_room(self.folder)
                self.states.mkdir(parents=True, exist_ok=True)
                self._lock()
            for torn in self.states.glob("*.tmp"):
                torn.unlink()
            self._open_metrics(*self._read(config.override) if self.saved else (0, False))
        except OSError as error:
            raise DataError(f"{self.folder}: cannot be written ({error}); choose another --out") from None
        return self.saved, self.step, self.facts, self.metrics

    def _lock(self):
        # A lock of the process, not of the file: workers that outlive a killed process do not hold it.
        self.lock = open(self.states / "lock", "w")
        try:
            if fcntl:
                fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise DataError(f"{self.folder}: another process is at work on this run; wait for it, or choose another --out") from None

    def _read(self, override):
        """Take over what the newest state says -> length of metrics.jsonl then, and whether flags or files have changed."""
        try:
            with safe_open(self.saved, "pt") as file:
                state = json.loads(file.metadata()["run"])
            self.step, self.facts, old, length = (state[key] for key in ("step", "facts", "settings", "metrics_bytes"))
        except (SafetensorError, OSError, TypeError, KeyError, ValueError) as error:
            raise self._damaged(error) from None
        new = self.settings
        differing = [f"--{name.replace('_', '-')} was {old['flags'].get(name)!r}, is {value!r}"
                     for name, value in new["flags"].items() if name not in FREE and old["flags"].get(name) != value]
        differing += [f"{name} is not what it was" for name in old["inputs"] | new["inputs"]
                      if old["inputs"].get(name) != new["inputs"].get(name)]
        if differing and not override:
            raise DataError(f"{self.folder}: holds an unfinished run, saved after step {self.step}, of which\n  " + "\n  ".join(differing)
                            + "\nGive the same flags to go on with it, or --override to go on with these; --no-resume keeps it under "
                            "a number and starts anew, as does another --out")
        print(f"{self.folder}: going on after step {self.step}")
        return length, bool(differing)

    def _open_metrics(self, length, changed):
        """metrics.jsonl is cut back to what was in it when the state was saved: what came after will be done again."""
        path = self.folder / "metrics.jsonl"
        self.file = open(path, "a", encoding="utf-8")
        if self.file.tell() < length:
            raise DataError(f"{path}: is shorter than when the run's last state was saved; put it back, or start anew with --no-resume")
        self.file.truncate(length)
        try:
            lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        except ValueError as error:
            raise DataError(f"{path}: is not as this run wrote it ({error}); put it back, or start anew with --no-resume") from None
        self.metrics = [line for line in lines if "config" not in line]
        if not self.saved:
            self.save()  # from here on the folder is known for an unfinished run
        if changed or length == 0:
            self.file.write(json.dumps({"config": self.settings["flags"]} | ({"after_step": self.step} if changed else {})) + "\n")
            self.file.flush()

    def _damaged(self, error):
        return CheckpointError(f"{self.saved}: not a whole state of this run ({error}); delete it to go on from the state before it, "
                               "or start anew with --no-resume")

    def track(self, parameters, optimizer):
        """What save() saves from now on; if the run is being resumed, it gets the values that were saved."""
        self.parameters, self.optimizer = parameters, optimizer
        if not self.step:
            return
        try:
            with safe_open(self.saved, "pt") as file, torch.no_grad():
                missing = {f"weight/{name}" for name in parameters} - set(file.keys())
                if missing:
                    raise KeyError(f"no {min(missing)}")
                for key in file.keys():
                    kind, name = key.split("/")
                    parameter = parameters[name]
                    # A clone lies where torch puts it, not where the file happens to: vector code then gives the same bits.
                    tensor = file.get_tensor(key).clone().to(parameter.device)
                    if tensor.dim() and tensor.shape != parameter.shape:
                        raise ValueError(f"{key} is {tuple(tensor.shape)}, not {tuple(parameter.shape)}")
                    if kind == "weight":
                        parameter.copy_(tensor)
                    else:
                        optimizer.state[parameter][kind] = tensor
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise self._damaged(error) from None

    def save(self):
        """Write the state of now, and remove those that are older than the newest `keep`."""
        if RANK:
            return  # all ranks hold the same
        tensors = {f"weight/{name}": parameter.detach() for name, parameter in self.parameters.items()} if self.step else {}
        for name, parameter in self.parameters.items():
            tensors |= {f"{kind}/{name}": tensor for kind, tensor in self.optimizer.state.get(parameter, {}).items()}
        self.file.flush()
        state = {"step": self.step, "facts": self.facts, "settings": self.settings, "metrics_bytes": self.file.tell()}
        path = self.states / f"{self.step:06}.safetensors"
        temporary = path.with_suffix(".tmp")
        try:
            os.fsync(self.file.fileno())
            save_file(tensors, temporary, metadata={"run": json.dumps(state)})
            sync(temporary)
            os.replace(temporary, path)
            sync(self.states)
        except (OSError, SafetensorError) as error:
            temporary.unlink(missing_ok=True)
            raise CheckpointError(f"{path}: cannot be written ({error}); states saved before are whole: make room, and run the same "
                                  "command again to go on from the last one") from None
        for old in sorted(self.states.glob("*.safetensors"))[:-self.keep]:
            old.unlink()

    def steps(self, total):
        """Numbers of the steps that are left of `total`; states are saved between them."""
        self.in_step = True
        for step in range(self.step + 1, total + 1):
            yield step
            self.step = step
            stop = add({"asked": self.asked_to_stop})["asked"] > 0  # a signal may reach one rank before another
            if stop or step % self.save_every == 0 or step == total:
                self.save()
            if stop:
                self._stop()
        self.in_step = False

    def _on_signal(self, number, frame):
        """SIGINT, SIGTERM: a step that has begun is finished and saved first; a second signal stops at once."""
        if self.asked_to_stop:
            raise KeyboardInterrupt
        self.asked_to_stop = True
        if not self.in_step:
            self._stop()
        if RANK == 0:
            tqdm.write("\nfinishing this step, then saving; once more to stop at once", file=sys.stderr)

    def _stop(self):
        print(f"\nstopped after step {self.step}, saved in {self.states}; to go on, run the same command again")
        sys.exit(0)

    def log(self, line):
        """Append to metrics.jsonl, which knows no NaN or infinity: None; a sudden jump of the gradient norm is said."""
        line = {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in line.items()}
        norms = [old["grad_norm"] for old in self.metrics[-50:] if old["grad_norm"] is not None]
        if len(norms) >= 10 and line["grad_norm"] is not None and line["grad_norm"] > 10 * median(norms):
            tqdm.write(f"gradient norm {line['grad_norm']:.3g}: the median of the last {len(norms)} steps is {median(norms):.3g}")
        self.metrics.append(line)
        if RANK == 0:
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()

    def finish(self):
        """All is done and written elsewhere: the states go, and the next run in this folder is a new one."""
        if RANK == 0:
            self.file.close()
            done = self.states.rename(self.states.with_name("state.done"))  # at once: there is no half-removed state
            shutil.rmtree(done)
            self.lock.close()
        for number, handler in self.handlers.items():
            signal.signal(number, handler)


def all_finite(values, file, story, skip):
    """May the optimizer take this step? values: name -> number or tensor; all finite -> True.

    If not, `story` (JSON-able: inputs, outputs, rewards) is written to `file`; then False with `skip`, else TrainingError."""
    broken = [name for name, value in values.items() if not torch.as_tensor(value).isfinite().all()]
    if not add({"broken": len(broken)})["broken"]:
        return True
    if not broken:
        broken = ["another rank's numbers"]  # all ranks leave the step out, or none
    story = {"not_finite": broken, **story}
    file.write_text(json.dumps(story, indent=1, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
    message = f"{' and '.join(broken)} not finite; what went in and came out is in {file}"
    if not skip:
        raise TrainingError(f"{message}. Weights are as saved before. Lower --lr or --clip-norm, or pass over such steps with --skip-nonfinite")
    tqdm.write(f"step left out: {message}")
    return False

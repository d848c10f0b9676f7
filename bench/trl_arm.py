"""T3: one text-only update on a CPU, against TRL's GRPOTrainer, which a user would really pick.

Both arms train a Qwen2 of one size from the same weights, on the same prompts: 16 prompts x 8
completions of 32 tokens, forward, reference, backward, AdamW. TRL has its fastest setting for this:
one rollout per update, scored 16 rows at a time. Its first update is held against ours before
anything counts: log-probabilities of its completions, and the gradient of the whole update.

Shapes: B prompts · G completions per prompt · P prompt length · C completion length · V vocabulary.
"""

import argparse
import statistics
import tempfile
import time

import torch

from bench.arms import Update
from bench.measures import phases
from bench.other import qwen2
from bench.rows import NotHere, Unequal, need, row
from bench.workbench import Bench
from support.optimizer import set_trainable
from train_grpo import Rollout, add_gradients, logps_without_gradient

INSTALL = "trl==1.16.0 transformers==5.24.0"
P = 143  # the toy's prompt, its video and sound included
SIZES = {"prompt_tokens": P, "prompts": 16, "group": 8, "completion": 32, "micro_batch": 4}
ROWS = 16  # that TRL scores at a time, which is its fastest
LOGP_GAP, GRADIENT_GAP = 1e-5, 1e-4


class TextBench(Bench):
    """As Bench, with random text for prompts."""

    def clips(self, B):
        """Not clips but ids (B, P), each prompt another."""
        generator = torch.Generator().manual_seed(1)
        return torch.randint(self.vocab, (B, self.flags.prompt_tokens), generator=generator)

    def encode(self, prompt_ids):
        nothing = [None] * len(prompt_ids)
        return self.batch(prompt_ids.tolist(), video=nothing, audio=nothing)


def words_tokenizer(V):
    """A tokenizer for text that is written as numbers: "17 4 250" is these three ids.

    EOS is V, an id that the model does not have: every completion has C tokens."""
    import tokenizers
    import transformers

    vocabulary = {str(i): i for i in range(V)} | {"<eos>": V}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<eos>", pad_token="<eos>", padding_side="left"
    )


def trainer_of(bench, prompt_ids, folder):
    """GRPOTrainer for 1 + repeats updates of these prompts; its files lie in `folder`."""
    import datasets
    import trl

    flags, model = bench.flags, f"{folder}/model"
    qwen2(bench.model).save_pretrained(model)  # TRL loads policy and reference from there
    rewards = torch.Generator().manual_seed(0)

    def random_reward(completions, **columns):
        return torch.rand(len(completions), generator=rewards).tolist()

    prompts = [" ".join(map(str, ids)) for ids in prompt_ids.tolist()]
    config = trl.GRPOConfig(
        output_dir=f"{folder}/trl",
        # the same algorithm
        loss_type="grpo",
        beta=0.04,
        use_bias_correction_kl=False,
        num_generations=flags.group,
        max_completion_length=flags.completion,
        top_k=0,
        learning_rate=0.0,
        weight_decay=0.0,
        max_steps=1 + flags.repeats,
        # its fastest way
        per_device_train_batch_size=ROWS,
        gradient_accumulation_steps=flags.prompts * flags.group // ROWS,
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=False,
        # nothing but the update
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    return trl.GRPOTrainer(
        model=model,
        reward_funcs=random_reward,
        args=config,
        train_dataset=datasets.Dataset.from_dict({"prompt": prompts}),
        processing_class=words_tokenizer(bench.vocab),
    )


def their_rollout(bench, batch, trainer):
    """What TRL has sampled for its update, as a Rollout; TRL shuffles the rows."""
    slices = trainer._buffered_inputs
    names = ("prompt_ids", "completion_ids", "advantages", "ref_per_token_logps")
    prompts, ids, advantages, ref_logps = (torch.cat([s[name] for s in slices]) for name in names)
    B, G = bench.flags.prompts, bench.flags.group
    same = (prompts[None] == torch.tensor(batch.prompt_ids)[:, None]).all(-1)  # (B, B*G)
    if not (same.sum(1) == G).all():
        raise Unequal("TRL's rows are not G completions of each prompt")
    rows = same.nonzero()[:, 1].view(B, G)
    return Rollout(
        batch=batch,
        ids=ids[rows],
        mask=torch.ones_like(ids[rows], dtype=torch.bool),
        sampled_logps=torch.zeros(ids[rows].shape),
        texts=[[""] * G] * B,
        ended=torch.zeros(B, G, dtype=torch.bool),
        ref_logps=ref_logps[rows],
        advantages=advantages[rows],
    )


def check_update(update, trainer):
    """Hold TRL's update, its gradient just made, against ours of the same completions."""
    bench, model = update.bench, update.bench.model
    rollout = their_rollout(bench, bench.encode(update.clips), trainer)
    logps = logps_without_gradient(bench.reference, rollout, update.config)
    gap = (logps - rollout.ref_logps).abs().max().item()
    add_gradients(model, rollout, update.config)
    torch.nn.utils.clip_grad_norm_(set_trainable(model).values(), update.config.clip_norm)
    theirs = {name: p.grad for name, p in trainer.model.named_parameters()}
    ours = {f"model.{name}": p.grad for name, p in model.named_parameters()}
    gradient = torch.cat([theirs[name].flatten() for name in theirs])
    difference = gradient - torch.cat([ours[name].flatten() for name in theirs])
    gradient_gap = (difference.norm() / gradient.norm()).item()
    model.zero_grad()
    if not (gap < LOGP_GAP and gradient_gap < GRADIENT_GAP):
        raise Unequal(f"log-probabilities differ by {gap:.1e}, gradients by {gradient_gap:.1e}")
    return f"equal: log-probabilities to {gap:.0e}, gradient of the update to {gradient_gap:.0e}"


def against_trl(bench, preset):
    """Seconds of one update at the size `preset`, in turns with TRL's own training loop."""
    if bench.on_gpu:
        raise NotHere("is a measure of the CPU: --device cpu")
    need("trl", INSTALL)
    import transformers

    sizes = SIZES | {"preset": preset}
    text = TextBench(argparse.Namespace(**(vars(bench.flags) | sizes)))
    update = Update(text, text.flags.prompts)

    class Turns(transformers.TrainerCallback):
        """TRL's updates are timed as they come, and each is followed by one of ours."""

        outcome, ours, theirs = None, [], []

        def on_step_begin(self, *args, **more):
            self.start = time.perf_counter()

        def on_pre_optimizer_step(self, *args, **more):
            if self.outcome is None:  # the first, which warms up both
                self.outcome = check_update(update, trainer)

        def on_step_end(self, *args, **more):
            self.theirs.append(time.perf_counter() - self.start)
            self.ours.append(text.seconds(update))

    turns = Turns()
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(text, update.clips, folder)
        trainer.pop_callback(transformers.PrinterCallback)
        trainer.add_callback(turns)
        trainer.train()
    B, G, C = text.flags.prompts, text.flags.group, text.flags.completion
    note = f"{B} x {G} rows, P {P}, C {C}; {turns.outcome}; ours: {phases(update.seconds)}"
    return row(statistics.median(turns.ours[1:]), statistics.median(turns.theirs[1:]), "s", note)

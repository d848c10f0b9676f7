"""Run by test_cuda_path.py, in a process of its own, as it makes torch believe in a GPU.

    python tests/cuda_path.py kernels|sizes|waits [slices]

Prints one JSON line. Nothing runs on a device: tensors on "cuda" are fake, with shapes and types
but no content, and Inductor writes the kernels for an imaginary H100 without loading them. With
`slices` the decode step writes its cache in the way that the compiler copies: a defect to be found.

Shapes: B prompts · G completions per prompt · R = B*G rows · P prompt length · C completion length.
"""

import copy
import json
import re
import sys
import types
import warnings
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).parent.parent))
import model as model_file
from bench.memory import fake_prompts
from bench.sizes import FULL_SIZE
from generate import Decoding, Sampler
from grpo import completion_logps, grpo_loss
from model import DecoderLayer, HumanOmni
from support.compiling import DECODING
from support.kv_cache import LayerCache

B, G, P, C = 16, 8, 952, 512
EOS = 2
LAYERS = FULL_SIZE["llm"]["num_hidden_layers"]
# What makes the host wait until a GPU has come this far.
WAITS = {"_local_scalar_dense", "nonzero", "equal", "masked_select", "is_nonzero", "_unique2"}
# What launches no kernel.
VIEWS = set(
    "view _unsafe_view expand transpose t permute slice select unsqueeze squeeze alias detach "
    "split split_with_sizes as_strided unbind device _reshape_alias unfold lift_fresh empty "
    "empty_like new_empty new_empty_strided empty_strided".split()
)


class ImaginaryGPU(FakeTensorMode):
    """Operations on "cuda" are fake and counted, those in main memory are real."""

    def __init__(self):
        super().__init__(allow_non_fake_inputs=True)
        self.kernels, self.waits, self.products = 0, Counter(), Counter()
        self.inside = False  # an operation, whose parts are not counted

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.inside:
            return super().__torch_dispatch__(func, types, args, kwargs)
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        to, name = kwargs.get("device"), func._schema.name.split("::")[1]
        to_gpu = to is not None and torch.device(to).type == "cuda"
        if not to_gpu and not any(isinstance(x, FakeTensor) for x in inputs):
            return func(*args, **kwargs)
        if name == "_to_copy" and to is not None and torch.device(to).type == "cpu":
            self.waits["copy to the host"] += 1
            (x,) = inputs
            return torch.zeros(x.shape, dtype=kwargs.get("dtype") or x.dtype)
        if name == "_local_scalar_dense":  # .item(): the content does not matter here
            self.waits[name] += 1
            return 0
        if name == "_to_copy" and inputs[0].device.type == "cpu" and not kwargs.get("non_blocking"):
            self.waits["copy to the GPU"] += 1
        self.waits[name] += name in WAITS
        self.kernels += name not in VIEWS
        if name in ("mm", "bmm", "addmm", "baddbmm"):
            self.products[str(inputs[-1].dtype)] += 1
        self.inside = True
        try:
            return super().__torch_dispatch__(func, types, args, kwargs)
        finally:
            self.inside = False

    def counts(self):
        """Since the last call."""
        result = {"kernels": self.kernels, "waits": dict(+self.waits), **dict(self.products)}
        self.kernels, self.waits, self.products = 0, Counter(), Counter()
        return result


class LowerRight:
    """In place of torch's causal bias, which makes a real tensor: it only selects the kernel."""

    def __init__(self, *sizes):
        pass


def attention(q, k, v, attn_mask=None, is_causal=False, enable_gqa=False):
    """The kernels that a GPU chooses."""
    if torch.is_autocast_enabled(q.device.type):
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    assert q.dtype == k.dtype == v.dtype, (q.dtype, k.dtype, v.dtype)
    if attn_mask is None or isinstance(attn_mask, LowerRight):
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        if not enable_gqa:
            assert q.shape[1] == k.shape[1]
        if q.device.type == "cpu":  # whose fake flash kernel wants as many key heads
            k, v = (x.expand(-1, -1, -1, -1) for x in (k, v))
            shared = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
        return flash(q, k, v, 0.0, is_causal or attn_mask is not None)[0]
    bias = torch.zeros_like(attn_mask, dtype=q.dtype).expand(*q.shape[:3], k.shape[2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, False)[0]


def imagine_gpu():
    """Autocast, attention, generators and Graphs find a GPU."""
    import torch.cuda.amp.common

    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.cuda.is_bf16_supported = lambda including_emulation=True: True
    F.scaled_dot_product_attention, model_file.causal_lower_right = attention, LowerRight
    real = torch.Generator

    class Generator:
        def __new__(cls, device="cpu"):
            if torch.device(device).type == "cuda":
                return types.SimpleNamespace(manual_seed=lambda seed: None)
            return real(device)

    torch.Generator = Generator


def build(dtype=torch.bfloat16, size=FULL_SIZE, device="cuda"):
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return HumanOmni(size)
    finally:
        torch.set_default_dtype(torch.float32)


class Undrawn(Sampler):
    """A sampler that draws without its generator, which fake tensors do not take."""

    def _decode(self, R):
        self.generator, kept = None, self.generator
        super()._decode(R)
        self.generator = kept


def waits():
    """Of decoding, of the reference's scoring and of the policy's, for the host."""
    gpu, results = ImaginaryGPU(), {}
    with gpu, torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        copy = build().requires_grad_(False)
        sampler = Undrawn(copy, B, G, P, Decoding(C, eos_token_id=EOS))
        gpu.counts()
        for rows in (B * G, B * G // 2, B * G // 4, B):
            sampler._decode(rows)
            results[f"decode {rows}"] = gpu.counts()
        sampler.C = 64
        sampler([torch.zeros(P, 896, device="cuda")] * B, seed=0)
        results["rollout of 64"] = gpu.counts()
        copy.encode(*clips(B))
        results["encode"] = gpu.counts()
        lengths = torch.linspace(1, C, G).long()
        mask = torch.arange(C) < lengths[:, None]
        logps = completion_logps(copy, prompts(copy), torch.zeros(G, C).long(), mask)
        results["score"] = gpu.counts()
        grpo_loss(logps, None, logps, torch.zeros(G), mask, total=128)
        results["loss"] = gpu.counts()
    return results


def clips(n):
    frames = torch.zeros(n, 8, 3, 224, 224, device="cuda")
    return frames, torch.zeros(n, 128, 3000, device="cuda")


def prompts(model):
    with torch.device("cuda"):
        return fake_prompts(model, 1)


def imagine_h100():
    """What Dynamo, Inductor and Triton ask of a device is answered; code is kept, not loaded.

    -> the list that the code of each compiled graph goes into"""
    import torch._dynamo.device_interface
    import torch._functorch.config
    import torch._inductor.config
    import torch._inductor.fx_passes.joint_graph as joint_graph
    import torch._inductor.fx_passes.pad_mm as pad_mm
    import torch._inductor.fx_passes.post_grad as post_grad
    import torch._inductor.graph
    import triton
    from triton.backends.compiler import GPUTarget

    config = torch._inductor.config
    config.compile_threads, config.fx_graph_cache, config.joint_graph_constant_folding = (
        1,
        False,
        False,
    )
    torch._functorch.config.enable_autograd_cache = False
    properties = types.SimpleNamespace(
        name="NVIDIA H100 80GB HBM3",
        major=9,
        minor=0,
        multi_processor_count=132,
        total_memory=80 * 2**30,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
        warp_size=32,
        L2_cache_size=50 * 2**20,
        gcnArchName="",
        is_integrated=0,
        shared_memory_per_block=49152,
        shared_memory_per_block_optin=232448,
        shared_memory_per_multiprocessor=233472,
    )
    answers = {
        "get_device_properties": properties,
        "current_device": 0,
        "get_compute_capability": 90,
        "synchronize": None,
        "is_available": True,
        "is_triton_capable": True,
        "raise_if_triton_unavailable": None,
    }
    interface = torch._dynamo.device_interface.CudaInterface
    for place in (torch.cuda, interface, interface.Worker):
        for name, value in answers.items():
            if hasattr(place, name):
                setattr(place, name, staticmethod(lambda *a, value=value, **k: value))
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    torch.cuda.device_count = lambda: 1
    torch.cuda._lazy_init = lambda: None
    torch.cuda.is_initialized = lambda: False
    torch.cuda.get_rng_state = lambda *a: torch.zeros(16, dtype=torch.uint8)
    torch.cuda.set_rng_state = lambda *a: None
    for place, name in (
        (torch.cuda, "_exchange_device"),
        (torch.cuda, "_maybe_exchange_device"),
        (torch._C, "_cuda_exchangeDevice"),
        (torch._C, "_cuda_maybeExchangeDevice"),
        (torch._C, "_cuda_getCurrentRawStream"),
    ):
        setattr(place, name, lambda i: 0)
    torch._C._cuda_setDevice = lambda i: None
    torch.accelerator.is_available = lambda: False
    torch._subclasses.fake_tensor.init_gpu_context = lambda device: None
    triton.runtime.driver.set_active(
        types.SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", 90, 32),
            get_current_device=lambda: 0,
            get_active_torch_device=lambda: torch.device("cuda", 0),
            get_device_interface=lambda: torch.cuda,
        )
    )
    # Their patterns are traced on small real tensors.
    for place in (joint_graph, post_grad):
        first = place.lazy_init
        place.lazy_init = lambda device=None, first=first: first(torch.device("cpu"))
    pad_mm._should_pad = lambda *args, **more: False  # a GPU would time it
    codes = []

    def keep(graph):
        text = graph.codegen()[0]
        codes.append(getattr(text, "value", text))
        raise RuntimeError("kept")

    torch._inductor.graph.GraphLowering.compile_to_module = keep
    return codes


def kernels():
    """Of one decoder layer in a decode step, at each number of rows: launches, and copies of its
    cache."""
    size = copy.deepcopy(FULL_SIZE)
    size["llm"]["num_hidden_layers"] = 1
    for name, key in (
        ("siglip", "num_hidden_layers"),
        ("whisper", "encoder_layers"),
        ("bert", "num_hidden_layers"),
    ):
        size[name][key] = 2
    results, rows = {}, [B * G // shrunk for shrunk in (1, 2, 4, 8)]
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        model = build(size=size).requires_grad_(False)
        sampler = Sampler(model, B, G, P, Decoding(C, eos_token_id=EOS))
        inputs = {}
        for R in rows:
            rope = [torch.zeros(R, 1, 1, 64, device="cuda") for _ in range(2)]
            inputs[R] = torch.zeros(R, 1, 896, dtype=torch.bfloat16, device="cuda"), tuple(rope)
    codes = imagine_h100()
    (layer,), (cache,) = model.layers, sampler.cache
    compiled = torch.compile(DecoderLayer.forward, dynamic=False, fullgraph=True, options=DECODING)
    for R in rows:
        codes.clear()
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            try:
                compiled(layer, *inputs[R], cache, None)
            except torch._dynamo.exc.BackendCompilerFailed:  # ended on purpose, the code is kept
                if not codes:
                    raise
        (code,) = codes  # one graph
        lines = [line.strip() for line in code.splitlines()]
        own = [line for line in lines if re.match(r"triton_\w+\.run\(", line)]
        library = [line for line in lines if re.match(r"extern_kernels\.\w+\(", line)]
        whole = R * 2 * C * 64  # numbers in the layer's keys
        copies = [line for line in own if re.search(rf"\b{whole}, stream", line)]
        results[R] = {"triton": len(own), "library": len(library), "copies": len(copies)}
    return results


def sizes():
    """GiB at the peak of one group's forward and backward, kept and computed again."""
    from bench.memory import scoring_bytes

    return {
        "kept": scoring_bytes(G, C, True, False) / 2**30,
        "again": scoring_bytes(G, C, True, True) / 2**30,
    }


def write_slices(cache, k, v):
    cache.keys[: len(k)].index_copy_(1, cache.step, k[:, None])
    cache.values[: len(v)].index_copy_(1, cache.step, v[:, None])


def main():
    warnings.filterwarnings("ignore")
    what, *defects = sys.argv[1:]
    if "slices" in defects:
        LayerCache.write = write_slices
    if what != "sizes":
        imagine_gpu()
    print(json.dumps({"kernels": kernels, "sizes": sizes, "waits": waits}[what]()))


if __name__ == "__main__":
    main()

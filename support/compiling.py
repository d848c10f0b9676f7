"""What a GPU run compiles: the decoder layers, and the decode step as a CUDA graph.

On a GPU a small kernel costs the CPU more time to launch than the GPU to run it. So the layers are
compiled, which melts several kernels into one, and the decode step, whose shapes never change, is
recorded once and replayed as a whole.
"""

import functools
import warnings

import torch


@functools.cache
def compiler_works(device):
    """Is this a GPU, for which torch.compile can make a kernel? If it cannot, one warning."""
    if device.type != "cuda":
        return False
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(8, device=device))
        return True
    except torch._dynamo.exc.BackendCompilerFailed as error:
        reason = " ".join(str(error).split())[:200]
        warnings.warn(
            f"torch.compile does not work here ({reason}): nothing is compiled, which is slower "
            "and otherwise the same. It needs a C compiler and Python's headers",
            stacklevel=2,
        )
        return False


# Of a decode step: its softmax over some 1 500 keys in one kernel, not in five.
DECODING = {"split_reductions": False}


def compile_layers(model, dynamic):
    """Compile the decoder layers in place: what is compiled for one layer serves the others.

    dynamic: for any shape, to score; else anew for every shape, to decode"""
    # Shapes of the decode step: one for every halving of the group, in each of a run's samplers.
    # Beyond its limit torch would run them uncompiled, and not say so.
    torch._dynamo.config.recompile_limit = 64
    for layer in model.layers:
        layer.compile(dynamic=dynamic, options=None if dynamic else DECODING)


class Replay:
    """One CUDA graph per number of rows, captured when it is first asked for."""

    def __init__(self):
        self.graphs = {}
        self.pool = torch.cuda.graph_pool_handle()  # shared by all: only one runs at a time

    def __call__(self, step, R, written, generator):
        """step(), which works on R rows.

        written: what is put back, with the generator's state, after a step that only warms up (to
        record one does not run it). Not the cache: the replay writes to the same place again."""
        if R not in self.graphs:
            contents, drawn = [buffer.clone() for buffer in written], generator.get_state()
            step()  # compiles; nothing may be allocated for the first time during capture
            graph = torch.cuda.CUDAGraph()
            graph.register_generator_state(generator)
            # thread_local: what other threads ask of the GPU meanwhile is not the graph's business
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                step()
            for buffer, content in zip(written, contents):
                buffer.copy_(content)
            generator.set_state(drawn)
            self.graphs[R] = graph
        self.graphs[R].replay()

"""A GPU that carries shapes and devices, but no numbers: what would make the host wait for one?

Within `rehearsal`, tensors "on cuda" are fake and tensors on the CPU are real. An operation that
mixes devices raises. Copies and reads for which the host would wait until the GPU has caught up are
recorded with the line that caused them, and so are the collectives of a fake process group, of
which this process is rank 0.

It cannot show what kernels compute, how fast they are, or what NCCL does.
"""

import traceback
from collections import Counter, defaultdict
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._pytree import tree_leaves, tree_map

from moco_common import comm

ROOT = Path(__file__).parents[1]
GPU = torch.device("cuda", 0)
# Operations whose result, or its size, the host must know.
READS = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "unique",
    "_unique",
    "equal",
    "bincount",
)


class FakeGPU(FakeTensorMode):
    """The mode.

    Attributes:
        waits: ``(what, "file:line")`` of everything that the host would wait for, counted.
        collectives: by operation, the bytes that this rank passes to each call.
    """

    def __init__(self):
        super().__init__(allow_non_fake_inputs=True)
        self.waits = Counter()
        self.collectives = defaultdict(list)
        self._pinned = {}  # address -> a tensor there, kept so that the address is not used again
        self._nested = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        if self._nested:  # a step of an operation that FakeTensorMode divides
            return super().__torch_dispatch__(func, types, args, kwargs)
        if name in ("is_pinned", "_pin_memory", "pin_memory") or kwargs.get("pin_memory"):
            return self._pin(func, name, args, kwargs)
        leaves = tree_leaves((args, kwargs))
        tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
        on_gpu = any(isinstance(x, FakeTensor) for x in tensors) or any(
            isinstance(x, torch.device) and x.type == "cuda" for x in leaves
        )
        if func.namespace == "c10d":
            self.collectives[name].append(sum(x.nbytes for x in tensors[-1:]))
        if not on_gpu:
            return func(*args, **kwargs)
        self._record(name, args, kwargs, tensors)
        if name == "_local_scalar_dense":
            return 1  # any number, so that the lines after it are seen too
        args, kwargs = tree_map(self._fake, (args, kwargs))
        self._nested = True
        try:
            return super().__torch_dispatch__(func, types, args, kwargs)
        finally:
            self._nested = False

    def _fake(self, x):
        real = isinstance(x, torch.Tensor) and not isinstance(x, FakeTensor)
        return self.from_tensor(x) if real else x

    def _pin(self, func, name, args, kwargs):
        if name == "is_pinned":
            return self.is_pinned(args[0])
        if name in ("_pin_memory", "pin_memory"):
            result = args[0] if self.is_pinned(args[0]) else args[0].clone()
        else:
            result = func(*args, **{**kwargs, "pin_memory": False})
        self._pinned[result.untyped_storage().data_ptr()] = result
        return result

    def is_pinned(self, x):
        return not isinstance(x, FakeTensor) and x.untyped_storage().data_ptr() in self._pinned

    def _record(self, name, args, kwargs, tensors):
        if name in ("_to_copy", "copy_"):
            source = args[1] if name == "copy_" else args[0]
            target = args[0].device if name == "copy_" else kwargs.get("device") or source.device
            soft = kwargs.get(
                "non_blocking", args[2] if name == "copy_" and len(args) > 2 else False
            )
            ends = source.device.type, torch.device(target).type
            pinned = self.is_pinned(source if ends[0] == "cpu" else args[0])
            if ends[0] != ends[1] and not (soft and pinned):
                self.wait(f"{'->'.join(ends)}, {'not pinned' if soft else 'blocking'}")
        elif name in READS:
            self.wait(name)
        elif name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            for x in filter(None.__ne__, args[1]):
                if x.dtype in (torch.bool, torch.uint8):
                    self.wait(f"{name} by a mask")
                if x.device.type == "cpu":
                    self.wait(f"{name} by an index on the CPU")

    def wait(self, what):
        frames = [f for f in traceback.extract_stack() if f.filename.startswith(str(ROOT))]
        own = [f for f in frames if f.filename != __file__ and "/.venv/" not in f.filename]
        at = f"{Path(own[-1].filename).relative_to(ROOT)}:{own[-1].lineno}" if own else "?"
        self.waits[what, at] += 1


class _Event:
    """A CUDA event. Waiting for one of an earlier step is how the host stays a step ahead."""

    def record(self, stream=None):
        pass

    def synchronize(self):
        pass


class _Replica(nn.Module):
    """Stands for DistributedDataParallel, whose reducer is C++ that needs real memory."""

    def __init__(self, module, device_ids, broadcast_buffers):
        super().__init__()
        assert list(device_ids) == [GPU], device_ids
        assert not broadcast_buffers
        self.module = module

    def forward(self, *args):
        return self.module(*args)


def backward(loss, gradient=None, **_):
    """``loss.backward()`` in Python: torch's engine asks the driver for the device."""
    root, uses, seen, stack = loss.grad_fn, Counter(), set(), [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            after = [n for n, _ in node.next_functions if n is not None]
            uses.update(after)
            stack += after
    gradients = defaultdict(dict)  # node -> {output: gradient}
    gradients[root][0] = torch.ones_like(loss) if gradient is None else gradient
    ready = [root]
    while ready:
        node = ready.pop()
        given = gradients.pop(node, {})
        results = [None] * len(node.next_functions)
        if hasattr(node, "variable"):  # a leaf
            old = node.variable.grad
            node.variable.grad = given[0] if old is None else old + given[0]
        elif given:
            inputs = [given.get(i) for i in range(len(node._input_metadata))]
            with torch.no_grad():
                results = node(*inputs) if callable(node) else node.apply(*inputs)
            results = results if isinstance(results, tuple) else (results,)
        # Functions written in Python also return a None for each argument that is no tensor.
        for (after, i), result in zip(node.next_functions, results, strict=False):
            if after is None:
                continue
            if result is not None:
                like = after._input_metadata[i]
                result = result.sum_to_size(like.shape).to(like.dtype)
                old = gradients[after].get(i)
                gradients[after][i] = result if old is None else old + result
            uses[after] -= 1
            if not uses[after]:
                ready.append(after)


def to_gpu(module):
    """Replace the parameters, buffers and other tensors of a module by fake ones, in place."""
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None:
                fake = torch.empty_like(value, device=GPU)
                part._parameters[name] = nn.Parameter(fake, requires_grad=value.requires_grad)
        for name, value in part._buffers.items():
            if value is not None:
                part._buffers[name] = torch.empty_like(value, device=GPU)
        for name, value in vars(part).items():
            if isinstance(value, torch.Tensor):
                setattr(part, name, torch.empty_like(value, device=GPU))
    return module


@contextmanager
def rehearsal(world=1):
    """Yield a `FakeGPU` while this process believes to be rank 0 of ``world`` with a GPU each."""
    with ExitStack() as stack:
        if world > 1:
            dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
            stack.callback(dist.destroy_process_group)
            stack.enter_context(patch("torch.nn.parallel.DistributedDataParallel", _Replica))
        mode = stack.enter_context(FakeGPU())  # before torch is told that there is a GPU
        for name, value in {
            "is_available": lambda: True,
            "device_count": lambda: world,
            "current_device": lambda: 0,
            "is_bf16_supported": lambda *_: True,
            "is_current_stream_capturing": lambda: False,
            "synchronize": lambda *_: mode.wait("synchronize"),
            "Event": _Event,
        }.items():
            stack.enter_context(patch.object(torch.cuda, name, value))
        stack.enter_context(patch.object(torch.Tensor, "backward", backward))
        stack.enter_context(patch.object(comm, "_leave_gpus", False))  # if a test asked for CPUs
        yield mode

"""A GPU where there is none: tensors that say "cuda", are computed on the CPU, and refuse what a GPU refuses.

    python -m tests.pretend_gpu dpo --preset tiny --device cuda        any program here with its flags; needs g++

What fails on a first GPU is mostly a tensor that stayed on the CPU, or NumPy asked for memory that it cannot see. Both fail
here as they do there, and PyTorch's own code takes its "cuda" branches: autocast, fused optimizers, attention, streams of
the backward pass. Kernels, their rounding, memory and speed do not show, nor does --compile; what another Python thread does on
the GPU is not caught. Last is printed what made the program wait for it, [["why file function", times], …]: figures read back,
sizes that depend on them, and copies, save those to the GPU from pinned memory that need not be waited for. It needs a build
of PyTorch for CPUs: one for CUDA has such a device already."""

import ctypes
import importlib
import importlib.util
import json
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path

# What PyTorch asks of a device beside its arithmetic. A build for CPUs has none of it for "cuda": here is one that does nothing.
DEVICE = r"""
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace c10::impl {
struct PretendGuard : NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device device() const { return Device(DeviceType::CUDA, 0); }
  Stream stream() const { return Stream(Stream::DEFAULT, device()); }
  Device exchangeDevice(Device) const override { return device(); }
  Device getDevice() const override { return device(); }
  Stream getStream(Device) const noexcept override { return stream(); }
  Stream getDefaultStream(Device) const override { return stream(); }
  Stream exchangeStream(Stream) const noexcept override { return stream(); }
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};
C10_REGISTER_GUARD_IMPL(CUDA, PretendGuard)
}
namespace at {
struct CUDAHooks : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
  void setCurrentDevice(DeviceIndex) const override {}
};
REGISTER_CUDA_HOOKS(CUDAHooks);
}
"""


def load_device():
    """Compile DEVICE and load it into this process, which must not have imported torch: that asks for devices at once."""
    torch_folder = Path(importlib.util.find_spec("torch").origin).parent
    if list((torch_folder / "lib").glob("*torch_cuda*")):
        sys.exit("error: this PyTorch is a build for CUDA, and only one for CPUs can pretend (README.md: Run it)")
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "device.cpp", Path(folder) / "device.so"
        source.write_text(DEVICE)
        subprocess.run(["g++", "-std=c++20", "-shared", "-fPIC", f"-I{torch_folder}/include", source, "-o", library,
                        f"-L{torch_folder}/lib", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch_folder}/lib"], check=True)
        ctypes.CDLL(str(library))


load_device()
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch._dynamo  # noqa: E402, F401          before torch.Generator is another
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves, tree_map  # noqa: E402
from torch.utils.weak import WeakTensorKeyDictionary  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
WAITS = Counter()
READS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_consecutive", "unique_dim", "equal", "bincount",
         "repeat_interleave", "multinomial")
COPIES = ("_to_copy", "copy_")
PINNED = WeakTensorKeyDictionary()


def count_wait(why):
    """One more wait, of the innermost function of this project that is at work."""
    own = [f for f in traceback.extract_stack() if Path(f.filename).parent == ROOT and f.name[0] != "<"]         # not <lambda>
    WAITS[f"{why} {Path(own[-1].filename).name} {own[-1].name}" if own else f"{why} in the backward pass"] += 1


class OnGPU(torch.Tensor):
    """A tensor whose device is cuda:0; `inner` holds its numbers."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(),
                                                   dtype=inner.dtype, device="cuda:0")

    def __init__(self, inner):
        self.inner = inner

    def __repr__(self, **_):
        return f"OnGPU({self.inner!r})"

    def __tensor_flatten__(self):                 # tells nn.Module.to that its parameters are to be replaced
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner, *_):
        return OnGPU(inner["inner"])

    def __getitem__(self, index):
        return super().__getitem__(on_gpu(index))

    def __setitem__(self, index, value):
        super().__setitem__(on_gpu(index), value)

    def tolist(self):
        count_wait("tolist")
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return compute(function, args, kwargs or {})


def on_gpu(index):
    """An index with its lists as tensors, which PyTorch does where Python cannot see it."""
    if isinstance(index, tuple):
        return tuple(map(on_gpu, index))
    return torch.tensor(index, device="cuda") if isinstance(index, list | np.ndarray) else index


def check_copy(tensors, to_gpu, asynchronous):
    """Count a copy from one device to the other, unless it is one to the GPU that nobody waits for."""
    source = tensors[-1]
    if isinstance(source, OnGPU) != to_gpu and not (to_gpu and asynchronous and source in PINNED):
        count_wait("copy")


def check_operation(name, args, tensors):
    """Count what an operation of the GPU's waits for. Raises RuntimeError where tensors of both devices meet."""
    index, put = [], []
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        index, put = [i for i in args[1] if i is not None], args[2:3] if "put" in name else []
    for x in tensors:                             # from the CPU may come what picks, and single numbers
        if not isinstance(x, OnGPU) and not any(x is i for i in index) and (x.dim() or name in ("cat", "stack")):
            raise RuntimeError(f"{name}: tensors on cuda:0 and on the CPU, {tuple(x.shape)}")
    if any(not isinstance(x, OnGPU) for x in (*index, *put)):
        count_wait("copy")
    if name in READS or any(i.dtype == torch.bool for i in index):
        count_wait(name)


def compute(function, args, kwargs):
    """One operation of PyTorch's, on the inner tensors."""
    name = function._schema.name.removeprefix("aten::")
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    ours = {id(x.inner): x for x in tensors if isinstance(x, OnGPU)}
    if name == "_pin_memory":
        PINNED[pinned := args[0].clone()] = True
        return pinned
    result_on_gpu = isinstance(args[0], OnGPU) if name == "copy_" else \
        kwargs["device"].type == "cuda" if kwargs.get("device") else bool(ours)
    if name in COPIES:
        check_copy(tensors, result_on_gpu, kwargs.get("non_blocking"))
    elif ours:
        check_operation(name, args, tensors)

    def inner(x):
        if isinstance(x, torch.device) and x.type == "cuda":
            return torch.device("cpu")
        return x.inner if isinstance(x, OnGPU) else x

    result = function(*tree_map(inner, args), **tree_map(inner, kwargs))
    outer = lambda x: ours.get(id(x)) if id(x) in ours else OnGPU(x) if result_on_gpu and isinstance(x, torch.Tensor) else x
    return tree_map(outer, result)                # an operation in place gives back the very tensor that it was given


class PretendGPU(TorchDispatchMode):
    """Operations that make tensors, and copies to the GPU, come to `compute` as well."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return compute(function, args, kwargs or {})


class Generator(torch.Generator):
    """A generator for any device, which draws on the CPU."""

    def __new__(cls, device="cpu"):
        return super().__new__(cls, "cpu")


def main(program, *argv):
    """Run a program of this project; PyTorch is told that there is a GPU where it asks in Python."""
    torch.cuda._lazy_init = lambda: None
    torch.cuda.is_bf16_supported = lambda including_emulation=True: True
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.Generator = Generator
    torch.inference_mode = torch.no_grad                     # which allows tensors of other classes
    torch._C._set_only_lift_cpu_tensors(True)                # torch.tensor(list, device="cuda") is copied where it shows
    WAITS.clear()
    with PretendGPU():
        importlib.import_module(program).main(list(argv))
    print(json.dumps(WAITS.most_common()))


if __name__ == "__main__":
    main(*sys.argv[1:])

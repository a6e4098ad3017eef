"""Describes where the sections of gpu_check.py run: the GPU that torch sees, or in a dry run the CPU."""

from __future__ import annotations

import importlib.util
import re
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: What a section needs beside the package, and the extra that installs it.
NEEDED = {"torch": "torch", "ml_dtypes": "testing"}
#: What torch warns of each wait with. (When its mode is set, it warns that it does not "detect all synchronizing operations".)
SYNCHRONIZED = "called a synchronizing"
#: The names that CUDA's and ROCm's profilers give to copies between the host and the device.
UPLOAD, DOWNLOAD = re.compile(r"HtoD|HostToDevice"), re.compile(r"DtoH|DeviceToHost")


def refusal(dry: bool) -> str | None:
    """Returns the sentence that refuses a run on this machine, or None if it can be made."""
    for module, extra in NEEDED.items():
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed, and every section needs it: pip install 'grace_ext[{extra}]'"
    import torch

    if dry or torch.cuda.is_available():
        return None
    return (
        f"torch {torch.__version__} sees no GPU of CUDA or ROCm on this machine (torch.cuda.is_available() is False): run this where it "
        "sees one, or give --dry, which runs every section on the CPU"
    )


@dataclass(frozen=True)
class Machine:
    """Says whether the run is dry. If it is not, tensors are on cuda:0, which is torch's name for the first GPU of ROCm, too."""

    dry: bool

    @property
    def device(self) -> Any:
        import torch

        return torch.device("cpu" if self.dry else "cuda:0")

    def world(self, in_dry_run: str) -> Any:
        """Returns a World (grace_ext/testing/worlds.py) whose tensors are on the GPU, or in a dry run the one of this name."""
        from grace_ext.frameworks.torch.devices import ops_for

        ops = ops_for(self.device)  # before TensorFlow, which the worlds import: Triton after it may end the process
        from grace_ext.testing.worlds import WITH_DEVICE, World

        by_name = {world.name: world for world in WITH_DEVICE}
        if self.dry:
            return by_name[in_dry_run]
        host, device = by_name["torch-host"], self.device
        return World("gpu", "torch", ops, lambda a: host.tensor(a).to(device), lambda t: host.array(t.cpu()), native=False)

    def now(self) -> float:
        """Returns the time in seconds, once the device has done all that was launched."""
        import torch

        if not self.dry:
            torch.cuda.synchronize()
        return time.perf_counter()

    def described(self) -> dict[str, Any]:
        """Returns the device, its driver and the versions that the results depend on."""
        import torch

        from grace_ext.frameworks.torch.devices import ops_for

        found: dict[str, Any] = {"torch": torch.__version__, "triton": _triton()}
        if self.dry:
            return {"device": "none: a dry run on the CPU", **found}
        seen = torch.cuda.get_device_properties(0)
        kind = getattr(seen, "gcnArchName", "") if torch.version.hip else "sm_{}{}".format(*torch.cuda.get_device_capability(0))
        runtime = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
        nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else "not built in"
        more = {"runtime": runtime, "driver": _driver(), "nccl": nccl, "operations": type(ops_for(self.device)).__name__}
        return {"device": f"{seen.name} ({kind}, {seen.total_memory / 2**30:.0f} GiB)", **more, **found}


def _triton() -> str:
    if importlib.util.find_spec("triton") is None:
        return "not installed"
    import triton

    return str(triton.__version__)


def _driver() -> str:
    """Returns the version of the driver that the kernel has loaded."""
    for name in ("nvidia", "amdgpu"):
        file = Path("/sys/module") / name / "version"
        if file.exists():
            return f"{name} {file.read_text().strip()}"
    return "unknown"


def counted(call: Callable[[], Any]) -> dict[str, int]:
    """Counts on a GPU what one call costs, by the names of the pretended device's Counts."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    def watched() -> int:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                call()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum(SYNCHRONIZED in str(warning.message) for warning in caught)

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        waits = watched()
        torch.cuda.synchronize()
    on_device = [event.name for event in seen.events() if event.device_type.name == "CUDA"]
    return {"waits": waits, **tally(on_device)}


def tally(names: Iterable[str]) -> dict[str, int]:
    """Sorts what a device has done, by the profiler's names: kernels, fills and copies on the device are launches."""
    kinds = Counter("uploads" if UPLOAD.search(n) else "downloads" if DOWNLOAD.search(n) else "launches" for n in names)
    return {kind: kinds[kind] for kind in ("launches", "uploads", "downloads")}

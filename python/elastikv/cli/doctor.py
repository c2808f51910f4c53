"""`elastikv doctor`: what this machine has, and what to do about what it lacks."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import typer

HOST_ADVICE = "see the reason on the left: elastikv needs Linux with memfd_create"
CUDA_ADVICE = (
    "fine on a machine without a GPU: everything runs on host memory. "
    "For a GPU: install NVIDIA's driver (libcuda.so.1), and see that nvidia-smi lists the device"
)


@dataclass(frozen=True)
class Finding:
    """One line of the report. advice is empty where all is well; needed: elastikv can't work without it."""

    name: str
    ok: bool
    value: str
    advice: str = ""
    needed: bool = False


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False) -> None:
    """Says what this machine has, and what to do about what is missing. Exits 0 if the host backend works."""
    findings = examine()
    healthy = all(one.ok for one in findings if one.needed)
    if as_json:
        typer.echo(json.dumps({"healthy": healthy, "findings": [asdict(one) for one in findings]}, indent=2))
    else:
        _print(findings)
    raise typer.Exit(0 if healthy else 1)


def examine() -> list[Finding]:
    """All findings, in the order of the report. Nothing is changed, and only a few pages are touched."""
    findings = [Finding("python", True, f"{platform.python_version()} on {platform.platform(terse=True)}")]
    try:
        import elastikv
        from elastikv import _build_info
    except ImportError as broken:
        advice = "build it: pip install --no-build-isolation . (see the message on the left)"
        return [*findings, Finding("elastikv", False, str(broken), advice, needed=True)]
    import torch

    findings.append(Finding("elastikv", True, f"{elastikv.__version__}, built for torch {_build_info.TORCH_VERSION}"))
    findings.append(_torch(torch))
    findings += [_package(name, extra) for name, extra in (("transformers", "hf"), ("matplotlib", "plots"))]
    devices = elastikv.devices()
    gpus = [str(one["device"]) for one in devices if one["available"] and one["device"] != "cpu"]
    findings.append(_attention(torch, gpus))
    findings.append(_kernels(torch, gpus))
    findings.append(_host_works())
    for device in devices:
        findings += _device(device)
    findings.append(_driver(devices))
    if gpus and not torch.cuda.is_available():
        advice = "install a torch wheel with CUDA, then build elastikv anew against it"
        findings.append(Finding("torch on CUDA", False, "there is a GPU, but this torch can't use it", advice))
    return findings


def _torch(torch: Any) -> Finding:
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    return Finding("torch", True, f"{torch.__version__} ({cuda})")


def _package(name: str, extra: str) -> Finding:
    try:
        return Finding(name, True, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, False, "not installed", f"pip install 'elastikv[{extra}]'")


def _attention(torch: Any, gpus: Sequence[str]) -> Finding:
    """Which way attention 'elastikv' goes here. What it says of models, elastikv.hf.attention decides as they come."""
    name = "attention 'elastikv'"
    if not gpus:
        return Finding(name, True, "over views of exact length (the flash op needs a GPU)")
    schema = torch.ops.aten._flash_attention_forward.default._schema
    if not any(argument.name == "seqused_k" for argument in schema.arguments):
        return Finding(name, False, "over views: this torch's flash op takes no lengths", "use torch 2.11 or newer")
    limits = "float16 and bfloat16, heads of a multiple of 8 up to 256"
    return Finding(name, True, f"flash for {limits}; over views for soft caps, position biases, sinks and the rest")


def _kernels(torch: Any, gpus: Sequence[str]) -> Finding:
    """Whether a decode step's own kernels can be compiled and loaded."""
    from elastikv import _core

    name = "decode kernels"
    if not gpus:
        return Finding(name, True, "torch's operators (our kernels need a GPU)")
    try:
        reason = _core.why_no_decode_kernels(torch.empty(0, dtype=torch.bfloat16, device=gpus[0]))
    except (RuntimeError, AssertionError) as error:  # torch can't use the device, or was built without CUDA
        reason = str(error).splitlines()[0]
    if reason:
        return Finding(name, False, f"torch's operators: {reason}", "install torch with its nvidia-cuda-nvrtc package")
    return Finding(name, True, "compiled here, for float16 and bfloat16")


def _host_works() -> Finding:
    """Grows, writes, reads and shrinks a small tensor on host memory."""
    import torch

    import elastikv

    try:
        with elastikv.SharedMemoryPool(physical_limit=1 << 22, device="cpu") as pool:
            model = pool.register_model("doctor", virtual_capacity=1 << 24)
            tensor = elastikv.empty((0, 64), max_shape=(1 << 14, 64), dtype=torch.float32, model=model)
            elastikv.grow_(tensor, 4096).fill_(1.0)
            works = bool(tensor.sum() == 4096 * 64)
            elastikv.shrink_(tensor, 16)
            del tensor
            model.drain()
            left = pool.global_stats().physical_usage
    except (elastikv.VmmError, MemoryError) as error:
        return Finding("host backend", False, str(error), "check /proc/sys/vm/max_map_count and ulimit -v", needed=True)
    value = "grows, shrinks and gives back" if works and not left else f"sum right: {works}, bytes left: {left}"
    return Finding("host backend", works and not left, value, "" if works and not left else "please report this", True)


def _device(device: Mapping[str, Any]) -> list[Finding]:
    name = device["device"]
    if not device["available"]:
        advice = HOST_ADVICE if name == "cpu" else CUDA_ADVICE
        return [Finding(name, False, device["reason"], advice, needed=name == "cpu")]
    memory = f"{device['free'] / (1 << 30):.1f} of {device['total'] / (1 << 30):.1f} GiB free"
    fd_export = "yes" if device["fd_export"] else "no: memory can't be shared with other processes"
    findings = [
        Finding(name, True, f"{device['name']}, {memory}"),
        Finding(f"{name}: virtual memory", True, f"yes, granularity {_size(device['granularity'])}"),
        Finding(f"{name}: file descriptor export", True, fd_export),
    ]
    if name != "cpu":  # the host is host memory
        numa = "yes" if device["host_numa"] else "no: pages can't be placed on the host under the same addresses"
        findings.append(Finding(f"{name}: host NUMA memory", True, numa))
    return findings


def _driver(devices: Sequence[Mapping[str, Any]]) -> Finding:
    version = max((device.get("driver_version") or 0 for device in devices), default=0)
    if not version:
        return Finding("CUDA driver", True, "none")
    return Finding("CUDA driver", True, f"supports CUDA {version // 1000}.{version % 1000 // 10}")


def _size(size: int) -> str:
    return f"{size >> 20} MiB" if size >= 1 << 20 else f"{size >> 10} KiB"


def _print(findings: list[Finding]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", "what", "found", "what to do", title="elastikv doctor", title_justify="left")
    for one in findings:
        mark = "[green]ok[/]" if one.ok else "[red]no[/]" if one.needed else "[yellow]-[/]"
        table.add_row(mark, one.name, one.value, one.advice)
    console = Console() if sys.stdout.isatty() else Console(width=160)
    console.print(table)

"""Accelerators by their vendors' data sheets, what `ntkjax plan` and the benchmarks compare with; simulated ones."""

from __future__ import annotations

import dataclasses
import re

from ntkjax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Device:
    """One accelerator.

    Attributes:
      kinds: parts of the name by which JAX calls it (``jax.Device.device_kind``).
      tflops: dense bfloat16 TFLOP/s. memory_gb: its memory, in units of 1e9 bytes.
      link_gb: 1e9 bytes a second that it can send to the others of its node or slice (NVLink, ICI; else PCIe).
    """

    kinds: tuple[str, ...]
    tflops: float
    memory_gb: float
    link_gb: float


# A name that is part of another one stands after it. NVLink and PCIe figures of the sheets count both ways, and are
# halved here; those of ICI are taken as the sheets have them.
DEVICES = {
    "B200": Device(("B200",), 2250, 180, 900),
    "H200": Device(("H200",), 989, 141, 450),
    "H100-PCIe": Device(("H100 PCIe",), 756, 80, 64),
    "H100": Device(("H100",), 989, 80, 450),
    "A100": Device(("A100",), 312, 80, 300),
    "L40S": Device(("L40S",), 362, 48, 32),
    "L4": Device(("L4",), 121, 24, 32),
    "A10G": Device(("A10G",), 70, 24, 32),
    "v6e": Device(("TPU v6",), 918, 32, 448),
    "v5p": Device(("TPU v5p", "TPU v5."), 459, 95, 600),
    "v5e": Device(("TPU v5 lite", "TPU v5e"), 197, 16, 200),
    "v4": Device(("TPU v4",), 275, 32, 300),
}


def peak_tflops(kind: str) -> float | None:
    """Dense bfloat16 TFLOP/s of what JAX calls ``kind``; None where it is not in the table."""
    return next((d.tflops for d in DEVICES.values() if any(name in kind for name in d.kinds)), None)


_SIMULATED = "--xla_force_host_platform_device_count"
MOST_DEVICES = 1_000_000
"""Of a plan; its mesh shapes are tried one by one."""


def parse_devices(text: str) -> tuple[int, str]:
    """(count, name) of ``64 x v5e``, or of ``v5e`` for one; upper and lower case alike.

    Raises:
      ConfigError: another form, more than MOST_DEVICES, or a name that is not in DEVICES.
    """
    match = re.fullmatch(r"\s*(?:(\d+)\s*x\s*)?(\S+)\s*", text)
    names = {name.lower(): name for name in DEVICES}
    if match is None or int(match[1] or 1) < 1 or match[2].lower() not in names:
        raise ConfigError(f"--devices {text!r}: expected COUNT x NAME with a name of {', '.join(DEVICES)}: '64 x v5e'")
    if (count := int(match[1] or 1)) > MOST_DEVICES:
        raise ConfigError(f"--devices {text!r}: expected at most {MOST_DEVICES:,} devices")
    return count, names[match[2].lower()]


def simulated_devices(flags: str, count: int) -> str:
    """XLA_FLAGS of a process that has ``count`` simulated devices on a CPU: ``flags``, whose own number is replaced."""
    kept = [flag for flag in flags.split() if not flag.startswith(f"{_SIMULATED}=")]
    return " ".join([*kept, f"{_SIMULATED}={count}"])

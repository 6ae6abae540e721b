"""What a device could do at best, to compare with what it does."""

from dataclasses import dataclass

from nemohybrid.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class Device:
    """A GPU by NVIDIA's data sheet: dense bf16 FLOP/s (never the figure with sparsity), and bytes/s of its memory.

    network: bytes/s, one way, of an adapter of its own, as in the DGX and HGX systems with it.
    """

    flops: float
    memory: float
    network: float


DEVICES = {
    "GB200": Device(2.5e15, 8.0e12, 50e9),
    "B200": Device(2.25e15, 8.0e12, 50e9),
    "H200": Device(989.4e12, 4.8e12, 50e9),
    "H100 PCIe": Device(756e12, 2.0e12, 50e9),
    "H100": Device(989.4e12, 3.35e12, 50e9),
    "A100": Device(312e12, 2.039e12, 25e9),
}
"""SXM boards where the name does not say, the A100 with 80 GB. A device's name may contain more: the first counts."""


def device(name: str) -> Device:
    """By its name here. Raises ConfigError for others, naming those there are."""
    if name not in DEVICES:
        raise ConfigError(
            f"unknown device {name!r}{did_you_mean(name, DEVICES)}. There are {', '.join(sorted(DEVICES))}"
        )
    return DEVICES[name]


def peak_flops(device_name: str, override_tflops: float | None = None) -> float | None:
    """Peak FLOP/s of a device by its name, e.g. "NVIDIA H100 80GB HBM3"; None when unknown, as for CPUs."""
    if override_tflops:
        return override_tflops * 1e12
    return next((known.flops for name, known in DEVICES.items() if name in device_name), None)

"""Costs of a model in its report."""

from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["COSTS"]

COSTS: dict[str, Callable[[Mapping[str, Any]], float | None]] = {
    "images_per_second": lambda report: report["throughput"]["forward"][-1]["images_per_second"],
    "latency": lambda report: report["throughput"]["forward"][-1]["latency"]["median"],
    "memory": lambda report: report["throughput"]["forward"][-1]["peak_memory"],
    "parameters": lambda report: report["parameters"]["total"],
    "gmacs": lambda report: report["gmacs"],
    # Reports of earlier versions lack it.
    "reference": lambda report: report["throughput"]["forward"][-1].get("reference"),
}
"""Getters of the costs by name; costs that depend on the batch size are those of the larger batch."""

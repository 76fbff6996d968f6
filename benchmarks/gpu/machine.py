"""Description of the machine, and the rate of copies on its device, as JSON."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from measuring import describe_run, time_in_turns


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Return the run's description, the device's limits, and bytes read and written per second by copies."""
    sizes = [2**20, 2**24] if device.type == "cpu" else [2**22, 2**24, 2**26, 2**27, 2**30]
    rates = {}
    for size in sizes:
        source = torch.zeros(size, dtype=torch.uint8, device=device)
        into = torch.empty_like(source)
        copies = {"copy": lambda _, source=source, into=into: into.copy_(source)}
        samples = time_in_turns(copies, device, budget=0.2, min_rounds=3)["copy"]
        rates[f"{2 * size / 2**20:g} MiB"] = 2 * size / sorted(samples)[len(samples) // 2]
    found: dict[str, Any] = {"run": describe_run(device), "copy_bytes_per_second": rates}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["device"] = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory": properties.total_memory,
            "l2_cache": properties.L2_cache_size,
            "shared_memory_per_block": properties.shared_memory_per_block_optin,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Describe the machine.")
    parser.add_argument("--device", default="cuda", help="default: %(default)s")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    options = parser.parse_args()
    options.output.write_text(json.dumps(describe_machine(torch.device(options.device)), indent=1) + "\n")

"""Backends: they run a network on CUDA, on OpenVINO or on torch's CPU kernels."""

import sys

# Importing OpenVINO sends usage statistics to its makers. Without this module of theirs it cannot.
if "openvino_telemetry" not in sys.modules:
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]

"""Backends: they run a network on CUDA, on OpenVINO or on torch's CPU kernels."""

import sys

# Importing OpenVINO sends usage statistics to its makers, unless it cannot import this module of theirs.
if "openvino_telemetry" not in sys.modules:
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]

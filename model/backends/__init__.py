"""What computes: a network on CUDA, on OpenVINO or on torch."""

import sys

# To import OpenVINO sends usage statistics to its makers, unless this module of theirs cannot be imported.
if "openvino_telemetry" not in sys.modules:
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]

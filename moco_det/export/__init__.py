"""Export of a trained detector to ONNX and TorchScript, verified against the detector itself."""

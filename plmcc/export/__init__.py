"""Programs that run without the code of the model: AOTInductor, ONNX, ExecuTorch."""

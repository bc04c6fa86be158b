"""Programs of ExecuTorch: a model's forward, lowered to XNNPACK where that has the operators, and read back."""

"""ONNX files: a model's forward as a graph whose weights keep the names they have in PyTorch."""

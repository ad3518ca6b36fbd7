"""Taking a recogniser elsewhere: ONNX graphs, safetensors, and a card that says what it is."""

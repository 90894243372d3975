"""Open exported models: ``gate`` checks a file without running it, ``ort`` runs it in ONNX Runtime."""

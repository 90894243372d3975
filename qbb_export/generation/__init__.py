"""Language models that generate: a decoder's graph with its KV cache, and the folder that onnxruntime-genai opens."""

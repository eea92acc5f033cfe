"""The server as a router in front of engines that serve the model: vLLM, SGLang, llama-server."""

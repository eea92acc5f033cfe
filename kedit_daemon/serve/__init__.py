"""The edited model over HTTP: an API in OpenAI's shapes, and pages for people."""

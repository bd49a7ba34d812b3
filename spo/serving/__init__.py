"""The endpoint without Ray: keys, limits, pictures, vectors, the OpenAI schema, the application.

`spo.stages.serve` puts it on Ray Serve.
"""

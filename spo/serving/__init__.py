"""The endpoint without Ray: keys, limits, pictures, vectors, the OpenAI schema, the application.

`spo.serving.deployment` puts it on Ray Serve.
"""

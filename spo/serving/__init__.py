"""The endpoint: keys, limits, pictures, vectors, the OpenAI schema, the application.

`deployment`, `backend` and `metrics` put it on Ray Serve; nothing else here knows Ray.
"""
